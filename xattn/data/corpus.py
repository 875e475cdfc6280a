"""A corpus of any layout that is known."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from xattn.data.europarl import utterances_from_europarl
from xattn.data.layouts import (
    DEPTH,
    listing,
    utterances_from_common_voice,
    utterances_from_librispeech,
    utterances_from_timit,
)
from xattn.data.manifest import utterances_from_manifest
from xattn.data.readers import is_recording, utterances_from_folder, utterances_from_table
from xattn.data.utterance import Utterance, nothing_selected

ARCHIVES = (".7z", ".bz2", ".gz", ".rar", ".tar", ".tgz", ".xz", ".zip")


def load_corpus(path: str | Path, *, language: str | None = None, split: str | None = None) -> list[Utterance]:
    """Load a corpus, and print which layout it has.

    | layout | recognised by | language | split | reader |
    |---|---|---|---|---|
    | the kit's own | manifest.csv in the folder | a column | a column | `xattn.data.manifest` |
    | a table | a CSV or Parquet file | a column | a column | `utterances_from_table` |
    | a folder of recordings | audio files in the folder | to be given | a sub-folder | `utterances_from_folder` |
    | LibriSpeech | `*.trans.txt` | English | a sub-folder: test-clean | `utterances_from_librispeech` |
    | Common Voice | a list (.tsv) beside `clips` | the locale | a list: test | `utterances_from_common_voice` |
    | TIMIT | .WRD or .PHN | English | train or test | `utterances_from_timit` |
    | EuroParl-ST | segments.lst | of the speech | train, dev or test | `utterances_from_europarl` |

    The last four can be in sub-folders. Transcripts are kept as they are; those of LibriSpeech are in upper case. The
    readers say more about their layout.

    Args:
        path: the folder or the table.
        language: keep only utterances in this language. A folder of recordings does not say its language, so it has to
            be given.
        split: keep only this part of the corpus; by default all parts, for Common Voice train, dev and test.

    Raises:
        FileNotFoundError: there is no such corpus, or a file that belongs to it is missing.
        ValueError: a file is not valid, or no utterance has this language and split.
    """
    path = Path(path)
    layout, reader = _recognise(path)
    utterances = reader(path, language=language, split=split)
    directions = {f"{u.language}-{u.target_language}" if u.translation else u.language for u in utterances}
    splits = {utterance.split for utterance in utterances} - {""}
    described = [
        f"{len(utterances):,} utterance{'s' * (len(utterances) != 1)}",
        ", ".join(sorted(directions)),
        ", ".join(sorted(splits)),
    ]
    bare = sum(not utterance.transcript for utterance in utterances)
    described += [f"{bare:,} without transcript"] * bool(bare)
    print(f"{path} is read as {layout}: {'; '.join(filter(None, described))}.", flush=True)
    return utterances


def _recognise(path: Path) -> tuple[str, Callable[..., list[Utterance]]]:
    """The name of a corpus's layout, and its reader, which takes path, language and split."""
    if path.is_file():
        return _recognise_file(path)
    if not path.is_dir():
        raise FileNotFoundError(f"There is no {path}: give the folder or the table of a corpus.")
    level, in_folders = [path], False
    for depth in range(DEPTH + 1):
        below = []
        for folder in level:
            files, folders = listing(folder)
            layout = _layout_of(files, folders, top=not depth)
            if layout:
                return layout
            in_folders |= depth == 1 and any(map(is_recording, files))
            below += folders
        level = below
    if in_folders:
        return "a folder of recordings", _from_folder
    raise FileNotFoundError(
        f"{path} has no layout that is known: give a table, or a folder with a manifest.csv, with recordings, or of "
        "LibriSpeech, Common Voice, TIMIT or EuroParl-ST."
    )


def _recognise_file(path: Path) -> tuple[str, Callable[..., list[Utterance]]]:
    if is_recording(path):
        raise ValueError(f"{path} is one recording: give its folder, or use xattn.utterance_from_file.")
    if path.suffix.lower() in ARCHIVES:
        raise ValueError(f"{path} is an archive: unpack it and give the folder.")
    if path.name == "manifest.csv":
        return "a corpus with manifest.csv", _from_manifest_file
    if path.suffix == ".tsv" and (path.parent / "clips").is_dir():
        return "Common Voice", _from_list
    return "a table", utterances_from_table


def _layout_of(files: list[Path], folders: list[Path], top: bool) -> tuple[str, Callable[..., list[Utterance]]] | None:
    """The layout and the reader that the content of one folder indicates. top: whether it is the folder given."""
    names, suffixes = {path.name for path in files}, {path.suffix.lower() for path in files}
    if top and "manifest.csv" in names:
        return "a corpus with manifest.csv", utterances_from_manifest
    if "segments.lst" in names:
        return "EuroParl-ST", utterances_from_europarl
    if any(name.endswith(".trans.txt") for name in names):
        return "LibriSpeech", partial(_english, utterances_from_librispeech)
    if ".tsv" in suffixes and any(folder.name == "clips" for folder in folders):
        return "Common Voice", utterances_from_common_voice
    if suffixes & {".wrd", ".phn"}:
        return "TIMIT", partial(_english, utterances_from_timit)
    if top and any(map(is_recording, files)):
        return "a folder of recordings", _from_folder
    return None


def _from_folder(folder: Path, *, language: str | None, split: str | None) -> list[Utterance]:
    if language is None:
        raise ValueError(f"{folder} holds recordings in an unknown language: give it, such as language='en'.")
    files, folders = listing(folder)
    splits = [each.name for each in folders if any(map(is_recording, listing(each)[0]))]
    if split is None and any(map(is_recording, files)):
        return utterances_from_folder(folder, language)
    if split not in splits:
        wanted = "recordings only in sub-folders" if split is None else f"no sub-folder {split!r} with recordings"
        raise ValueError(f"{folder} has {wanted}: choose a split among {', '.join(splits) or 'none'}.")
    return [replace(each, split=split) for each in utterances_from_folder(folder / split, language)]


def _from_manifest_file(manifest: Path, *, language: str | None, split: str | None) -> list[Utterance]:
    return utterances_from_manifest(manifest.parent, language=language, split=split)


def _from_list(table: Path, *, language: str | None, split: str | None) -> list[Utterance]:
    if split not in (None, table.stem):
        raise ValueError(f"{table} is the split {table.stem!r}: leave out split, or give the folder.")
    return utterances_from_common_voice(table.parent, language=language, split=table.stem)


def _english(
    reader: Callable[..., list[Utterance]], folder: Path, *, language: str | None, split: str | None
) -> list[Utterance]:
    if language not in (None, "en"):
        raise nothing_selected(folder, {("en", "")}, language=language, split=split)
    return reader(folder, split=split)
