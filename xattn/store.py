"""Maps on disk: one Zarr group an utterance and setting, written whole or not at all, keyed by what produced it."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import xarray as xr

from xattn.occlusion import expand

KEY = "key"
INDEX = "utterances.json"


def key_of(parameters: dict) -> str:
    """Hash of everything that determines a unit's numbers; `parameters` must be plain JSON values."""
    return hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()[:16]


def path_of(folder: str | Path, model: str, setting: str, utterance: str) -> Path:
    """Where the maps of one utterance lie below `folder`."""
    return Path(folder) / model / setting / f"{utterance}.zarr"


def is_current(path: Path, key: str) -> bool:
    """Whether `path` holds maps that were made under `key`."""
    if not path.is_dir():
        return False
    return _open(path).attrs.get(KEY) == key


def save(maps: xr.Dataset, path: Path, key: str) -> None:
    """Write maps under a temporary name and rename them whole; SM^X is stored in its compact form only."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    replaced = path.with_name(f"{temporary.name}.old")
    for leftover in (temporary, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    compact = maps.drop_vars("input_saliency").assign_attrs({KEY: key})
    compact.to_zarr(temporary, mode="w", zarr_format=2, consolidated=False)
    if path.exists():
        os.replace(path, replaced)  # deleted in place, an older unit could be read while half of it is gone
    os.replace(temporary, path)
    shutil.rmtree(replaced, ignore_errors=True)


def load(path: Path) -> xr.Dataset:
    """Read the maps of one utterance, with SM^X expanded to cells again."""
    return expand(_open(path).load())


def save_index(utterances: list[str], folder: str | Path, model: str, setting: str) -> None:
    """Record which utterances a run of a model and setting covers, so that those of an earlier run stay out of it."""
    path = Path(folder) / model / setting / INDEX
    temporary = path.with_name(f".{INDEX}.{os.getpid()}")
    temporary.write_text(json.dumps(utterances), encoding="utf-8")
    os.replace(temporary, path)


def load_all(folder: str | Path, model: str, setting: str) -> Iterator[xr.Dataset]:
    """The maps of the last finished run of a model and setting, in the order of its utterances, read one at a time.

    Raises:
        FileNotFoundError: there was none.
    """
    index = Path(folder) / model / setting / INDEX
    if not index.is_file():
        raise FileNotFoundError(
            f"There are no maps of {model} in the setting {setting} in {folder}: run 10_maps first."
        )
    utterances = json.loads(index.read_text(encoding="utf-8"))
    return (load(path_of(folder, model, setting, utterance)) for utterance in utterances)


def save_texts(texts: list[str], path: Path, key: str) -> None:
    """Write decoded texts, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps({KEY: key, "texts": texts}, ensure_ascii=False), encoding="utf-8")
    os.replace(temporary, path)


def load_texts(path: Path, key: str) -> list[str] | None:
    """The texts stored under `key`; None where the file is absent or was made under another key."""
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return stored["texts"] if stored[KEY] == key else None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no readable texts ({error}): delete it and run the notebook again.") from error


def _open(path: Path) -> xr.Dataset:
    try:
        return xr.open_zarr(path, consolidated=False, chunks=None)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} holds no readable maps ({error}): delete it and run 10_maps again.") from error
