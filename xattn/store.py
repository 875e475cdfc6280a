"""Maps on disk: a zipped Zarr group an utterance and setting, written whole or not at all, keyed by what made it."""

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import xarray as xr
from zarr.storage import ZipStore

from xattn.estimators import expand

KEY, CONTENTS = "key", "contents"
INDEX = "utterances.json"
AGAIN = "run 10_maps or 11_released again"


def key_of(parameters: dict) -> str:
    """Hash of everything that determines a unit's numbers; `parameters` must be plain JSON values."""
    return hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()[:16]


def path_of(folder: str | Path, model: str, setting: str, utterance: str) -> Path:
    """Where the maps of one utterance lie below `folder`."""
    return Path(folder) / model / setting / f"{utterance}.zarr.zip"


def is_current(path: Path, key: str) -> bool:
    """Whether `path` holds maps that were made under `key`. ValueError: they are damaged."""
    return path.exists() and _read(path, whole=False).attrs.get(KEY) == key


def save(maps: xr.Dataset, path: Path, key: str) -> None:
    """Write maps under a temporary name and rename them whole; SM^X only in its compact form, if it has one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    group = temporary.with_name(f"{temporary.name}.zarr")
    shutil.rmtree(group, ignore_errors=True)
    compact = maps.drop_vars("input_saliency") if "segmentation" in maps else maps
    compact = compact.assign_attrs({KEY: key, CONTENTS: sorted(compact.variables)})
    try:
        compact.to_zarr(group, mode="w", zarr_format=2, consolidated=False)
        # One file can be renamed in one step, and carries a checksum of every part.
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            for file in sorted(file for file in group.rglob("*") if file.is_file()):
                archive.write(file, file.relative_to(group).as_posix())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written ({error.strerror}): make room and {AGAIN}.") from error
    finally:
        shutil.rmtree(group, ignore_errors=True)


def load(path: Path) -> xr.Dataset:
    """Read the maps of one utterance, with SM^X expanded to cells again. ValueError: they are damaged."""
    return expand(_read(path, whole=True))


def save_index(keys: dict[str, str], folder: str | Path, model: str, setting: str) -> None:
    """Record which utterances a run of a model and setting covers, and under which keys, so that those of an earlier
    run stay out of it."""
    write_whole(Path(folder) / model / setting / INDEX, json.dumps(keys).encode())


def load_all(folder: str | Path, model: str, setting: str) -> Iterator[xr.Dataset]:
    """The maps of the last finished run of a model and setting, in the order of its utterances, read one at a time.

    Raises:
        FileNotFoundError: there was none.
        ValueError: maps are damaged, or were made again under other parameters by a run that did not finish.
    """
    index = Path(folder) / model / setting / INDEX
    if not index.is_file():
        raise FileNotFoundError(
            f"There are no maps of {model} in the setting {setting} in {folder}: run 10_maps or 11_released first."
        )
    keys = json.loads(index.read_text(encoding="utf-8"))
    return (_load_keyed(path_of(folder, model, setting, utterance), key) for utterance, key in keys.items())


def _load_keyed(path: Path, key: str) -> xr.Dataset:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is gone: {AGAIN}.")
    maps = load(path)
    if maps.attrs.get(KEY) != key:
        raise ValueError(f"{path} was made under other parameters than the last finished run: {AGAIN}.")
    return maps


class Checkpoint:
    """The scores (N so far, I) of an utterance that is being explained, by place, so that a kill costs seconds.

    It starts with what an earlier one wrote under the same key; with nothing where that is absent or unreadable, as it
    is quickly redone.
    """

    def __init__(self, path: Path, key: str):
        self.path, self.key, self.scores = path, key, {}
        try:
            with np.load(path, allow_pickle=False) as file:
                scores = dict(file)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            return
        if str(scores.pop(KEY, "")) == key:
            self.scores = scores

    def save(self, place: str, scores: np.ndarray) -> None:
        """Write them, whole or not at all."""
        self.scores[place] = scores
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = _temporary(self.path)
        with temporary.open("wb") as file:
            np.savez(file, **self.scores, **{KEY: np.array(self.key)})
        os.replace(temporary, self.path)


def save_texts(texts: list[str], path: Path, key: str) -> None:
    """Write decoded texts, whole or not at all."""
    write_whole(path, json.dumps({KEY: key, "texts": texts}, ensure_ascii=False).encode())


def load_texts(path: Path, key: str) -> list[str] | None:
    """The texts stored under `key`; None where the file is absent or was made under another key."""
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return stored["texts"] if stored[KEY] == key else None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no readable texts ({error}): delete it and run the notebook again.") from error


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name and rename it. OSError: it could not be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written ({error.strerror}): make room and call this again.") from error


def _read(path: Path, whole: bool) -> xr.Dataset:
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{damaged} fails its checksum")
        zipped = ZipStore(path, mode="r")
        try:
            maps = xr.open_zarr(zipped, consolidated=False, chunks=None)
            if sorted(maps.variables) != maps.attrs.pop(CONTENTS, sorted(maps.variables)):  # absent in older ones
                raise ValueError("some are missing")
            return maps.load() if whole else maps
        finally:
            zipped.close()
    except Exception as error:  # whatever flipped bits make of an archive
        raise ValueError(f"{path} holds no readable maps ({error}): delete it and {AGAIN}.") from error
