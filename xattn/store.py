"""Maps on disk: a zipped Zarr group an utterance and setting, written whole or not at all, keyed by what made it."""

import hashlib
import json
import os
import shutil
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from uuid import uuid4

import numpy as np
import xarray as xr
from zarr.storage import ZipStore

from xattn.estimators import expand

KEY, CONTENTS = "key", "contents"
INDEX = "utterances.json"
AGAIN = "run 10_maps or 11_released again"
LEFT_SECONDS = 3600.0  # after which nobody is still writing a file


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
    """Write maps whole or not at all; SM^X only in its compact form, if it has one. OSError: they could not be."""
    compact = maps.drop_vars("input_saliency") if "segmentation" in maps else maps
    compact = compact.assign_attrs({KEY: key, CONTENTS: sorted(compact.variables)})
    with replacing(path, AGAIN) as temporary:
        group = temporary.with_name(f"{temporary.name}.zarr")
        try:
            compact.to_zarr(group, mode="w", zarr_format=2, consolidated=False)
            # One file can be renamed in one step, and carries a checksum of every part.
            with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
                for file in sorted(file for file in group.rglob("*") if file.is_file()):
                    archive.write(file, file.relative_to(group).as_posix())
        finally:
            shutil.rmtree(group, ignore_errors=True)


def load(path: Path) -> xr.Dataset:
    """Read the maps of one utterance, with SM^X expanded to cells again. ValueError: they are damaged."""
    return expand(_read(path, whole=True))


def save_index(
    keys: dict[str, str], folder: str | Path, model: str, setting: str, references: dict[str, str] | None = None
) -> None:
    """Record which utterances a run of a model and setting covers, and under which keys, so that those of an earlier
    run stay out of it; and their references where they are known, as a corrected one makes no new maps."""
    index = {id: {KEY: key, "reference": references[id]} if references else key for id, key in keys.items()}
    write_whole(Path(folder) / model / setting / INDEX, json.dumps(index).encode())


def load_all(folder: str | Path, model: str, setting: str) -> Iterator[xr.Dataset]:
    """The maps of the last finished run of a model and setting, in the order of its utterances, read one at a time,
    with the references that its corpus had.

    Raises:
        FileNotFoundError: there was none.
        ValueError: it left every utterance out; or maps or the list of utterances are damaged, or maps were made again
            under other parameters by a run that did not finish.
    """
    path = Path(folder) / model / setting / INDEX
    if not path.is_file():
        raise FileNotFoundError(
            f"There are no maps of {model} in the setting {setting} in {folder}: run 10_maps or 11_released first."
        )
    index = _read_index(path)
    if not index:
        raise ValueError(f"{path} lists no utterance, as all were left out: explain others, or take another model.")
    return (_load_keyed(path_of(folder, model, setting, id), *found) for id, found in index.items())


def _read_index(path: Path) -> dict[str, tuple[str, dict[str, str]]]:
    """The key of every utterance, and what replaces attributes of its maps; older indexes hold keys alone."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        entries = {id: {KEY: entry} if isinstance(entry, str) else dict(entry) for id, entry in index.items()}
        return {id: (entry.pop(KEY), entry) for id, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no readable list of utterances ({error}): delete it and {AGAIN}.") from error


def _load_keyed(path: Path, key: str, replaced: dict[str, str]) -> xr.Dataset:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is gone: {AGAIN}.")
    maps = load(path)
    if maps.attrs.get(KEY) != key:
        raise ValueError(f"{path} was made under other parameters than the last finished run: {AGAIN}.")
    return maps.assign_attrs(replaced)


class Checkpoint:
    """The scores (N so far, I) of an utterance that is being explained, by place, so that a kill costs seconds.

    It starts with what an earlier one wrote under the same key; with nothing where that is absent or unreadable, as it
    is quickly redone.
    """

    def __init__(self, path: Path, key: str):
        self.path, self.key, self.scores, self.told = path, key, {}, False
        try:
            with np.load(path, allow_pickle=False) as file:
                scores = dict(file)
        except Exception:  # whatever flipped bits make of an archive
            return
        if str(scores.pop(KEY, "")) == key:
            self.scores = scores

    def save(self, place: str, scores: np.ndarray) -> None:
        """Write them, whole or not at all; where that fails, as on a full disk, say so once and go on."""
        self.scores[place] = scores
        try:
            remedy = "kills will cost seconds again; the run goes on"
            with replacing(self.path, remedy) as temporary, temporary.open("wb") as file:
                np.savez(file, **self.scores, **{KEY: np.array(self.key)})
        except OSError as error:
            if not self.told:
                print(error, flush=True)
            self.told = True


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


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name and rename it. OSError: it could not be written."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def replacing(path: Path, remedy: str = "call this again") -> Iterator[Path]:
    """A name beside `path` for a new file, which takes its place when whole; `path` stays as it was otherwise.

    OSError: it could not be written, and what to do then. Errors without a number pass, as they come from elsewhere.
    """
    # A process number would be the same in two containers that share the folder.
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:12]}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is None:
            raise
        reason = " ".join((error.strerror or str(error)).split())
        raise OSError(f"{path} could not be written ({reason}): make room and {remedy}.") from error
    finally:
        with suppress(OSError):  # it was renamed, or never written
            temporary.unlink()


def _sweep(path: Path) -> None:
    """Remove what killed writes of `path` left behind, but nothing young, as another process may be writing it."""
    for left in path.parent.glob(f".{escape(path.name)}.*.part*"):
        with suppress(OSError):  # another process sweeps, too
            if time.time() - left.stat().st_mtime > LEFT_SECONDS:
                shutil.rmtree(left) if left.is_dir() else left.unlink()


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
