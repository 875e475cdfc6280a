"""Maps on disk: one zipped Zarr group for each utterance and direction, keyed by everything that determines its
numbers.

A folder of maps holds <model>/<direction>/<utterance>.zarr.zip and, for each model and direction, utterances.json: the
utterances of the last finished run with their keys.
"""

import json
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import xarray as xr
from zarr.storage import ZipStore

from xattn.files import hash_value, replacing, write_whole
from xattn.maps import upgraded, with_cells, without_cells

KEY, CONTENTS = "key", "contents"
INDEX = "utterances.json"
AGAIN = "make the maps again"


def key_of(parameters: dict) -> str:
    """Hash everything that determines the numbers of a file; `parameters` must be JSON values."""
    return hash_value(parameters, 16)


def path_of(folder: str | Path, model: str, direction: str, utterance: str) -> Path:
    """Path of the maps of one utterance below `folder`."""
    return Path(folder) / model / direction / f"{utterance}.zarr.zip"


def is_current(path: Path, key: str) -> bool:
    """Whether `path` holds maps made under `key`. ValueError: the file is damaged."""
    if not path.exists():
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return json.loads(archive.read(".zattrs")).get(KEY) == key
    except Exception as error:  # a damaged archive can raise anything
        raise ValueError(f"{path} holds no readable maps ({error}): delete it and {AGAIN}.") from error


def save(maps: xr.Dataset, path: Path, key: str) -> None:
    """Write maps completely or not at all, without the cells that follow from segments. OSError: writing failed."""
    compact = without_cells(maps)
    compact = compact.assign_attrs({KEY: key, CONTENTS: sorted(compact.variables)})
    with replacing(path, f" and {AGAIN}") as temporary:
        group = temporary.with_name(f"{temporary.name}.zarr")
        try:
            compact.to_zarr(group, mode="w", zarr_format=2, consolidated=False)
            # A single file can be renamed in one step and has a checksum for every part.
            with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
                for file in sorted(file for file in group.rglob("*") if file.is_file()):
                    archive.write(file, file.relative_to(group).as_posix())
        finally:
            shutil.rmtree(group, ignore_errors=True)


def load(path: Path) -> xr.Dataset:
    """Read the maps of one utterance, with input_saliency computed from its segments. ValueError: they are damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"{damaged} fails its checksum")
        zipped = ZipStore(path, mode="r")
        try:
            maps = xr.open_zarr(zipped, consolidated=False, chunks=None).load()
        finally:
            zipped.close()
        # A damaged directory of the archive can hide variables; files of early versions do not list theirs.
        if sorted(maps.variables) != maps.attrs.pop(CONTENTS, sorted(maps.variables)):
            raise ValueError("some variables are missing")
        return with_cells(upgraded(maps))
    except Exception as error:  # a damaged archive can raise anything
        raise ValueError(f"{path} holds no readable maps ({error}): delete it and {AGAIN}.") from error


def save_index(
    keys: dict[str, str], folder: str | Path, model: str, direction: str, references: dict[str, str] | None = None
) -> None:
    """Record the utterances of a finished run with their keys, so that utterances of earlier runs are left out.

    references: the reference text of each utterance, if known; a corrected one then needs no new maps.
    """
    index = {id: {KEY: key, "reference": references[id]} if references else key for id, key in keys.items()}
    write_whole(Path(folder) / model / direction / INDEX, json.dumps(index).encode())


def load_maps(folder: str | Path, model: str, direction: str) -> Iterator[xr.Dataset]:
    """Read the maps of the last finished run of a model and direction, one utterance at a time, in the run's order.

    Args:
        folder: written by `xattn.explain_corpus`.
        model: the model's name, such as "base".
        direction: such as "en" (transcription of English) or "en-it" (translation into Italian).

    Raises:
        FileNotFoundError: there is no finished run.
        ValueError: the run skipped every utterance; maps or the list of utterances are damaged; or an unfinished run
            has replaced maps by ones with other parameters.
    """
    path = Path(folder) / model / direction / INDEX
    if not path.is_file():
        raise FileNotFoundError(
            f"There are no maps of {model} for the direction {direction} in {folder}: make them first."
        )
    index = _read_index(path)
    if not index:
        raise ValueError(f"{path} lists no utterance, because all were skipped: explain others, or use another model.")
    return (_load_keyed(path_of(folder, model, direction, id), *found) for id, found in index.items())


def _read_index(path: Path) -> dict[str, tuple[str, dict[str, str]]]:
    """The key of every utterance and the attributes that replace those of its maps."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        entries = {id: {KEY: entry} if isinstance(entry, str) else dict(entry) for id, entry in index.items()}
        return {id: (entry.pop(KEY), entry) for id, entry in entries.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} holds no readable list of utterances ({error}): delete it and {AGAIN}.") from error


def _load_keyed(path: Path, key: str, replaced: dict[str, str]) -> xr.Dataset:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: {AGAIN}.")
    maps = load(path)
    if maps.attrs.get(KEY) != key:
        raise ValueError(f"{path} was made under other parameters than the last finished run: {AGAIN}.")
    return maps.assign_attrs(replaced)


class Checkpoint:
    """Scores of an unfinished utterance, kept on disk so that an interrupted run resumes with them.

    It starts with what an earlier process wrote under the same key, or empty if that is absent or unreadable.
    """

    def __init__(self, path: Path, key: str):
        self.path, self.key, self.scores, self.warned = path, key, {}, False
        try:
            with np.load(path, allow_pickle=False) as file:
                scores = dict(file)
        except Exception:  # a damaged archive can raise anything
            return
        if str(scores.pop(KEY, "")) == key:
            self.scores = scores

    def save(self, place: str, scores: np.ndarray) -> None:
        """Write the scores of a place, "input" or "encoder". If that fails, print the reason once and continue."""
        self.scores[place] = scores
        try:
            tail = "; the run continues, but would lose this utterance if it were interrupted"
            with replacing(self.path, tail) as temporary, temporary.open("wb") as file:
                np.savez(file, **self.scores, **{KEY: np.array(self.key)})
        except OSError as error:
            if not self.warned:
                print(error, flush=True)
            self.warned = True

    def remove(self) -> None:
        """Delete the file, once the maps are stored."""
        with suppress(OSError):
            self.path.unlink()
