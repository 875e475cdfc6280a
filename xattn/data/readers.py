"""Utterances from a folder of recordings, a table, or a Hugging Face dataset."""

import hashlib
import tempfile
from pathlib import Path

from xattn.audio import load_audio, seconds_of
from xattn.data.corpus import claim, load_corpus, rows_by_id, write_audio, write_manifest, written_audio
from xattn.data.utterance import Utterance, check_id, utterance_from_file

TABLE_COLUMNS = ("id", "audio", "language")
SOURCE = "a dataset"  # what a manifest calls a Hugging Face dataset


def utterances_from_folder(folder: str | Path, language: str) -> list[Utterance]:
    """Make an utterance from each recording in a folder, of any format and rate, in the order of their names.

    The transcript of `talk.m4a` is `talk.txt`, if that exists. Hidden files and subfolders are ignored.

    Raises:
        FileNotFoundError: there is no recording.
        ValueError: a file is neither a recording nor the transcript of one, or two recordings have the same name.
    """
    folder = Path(folder)
    files = sorted(p for p in folder.glob("*") if p.is_file() and not p.name.startswith("."))
    texts = {path.stem: path for path in files if path.suffix == ".txt"}
    recordings = {}
    for path in files:
        if path.suffix != ".txt" and recordings.setdefault(path.stem, path) != path:
            raise ValueError(f"{path} has the name of {recordings[path.stem].name}: rename one of the recordings.")
    if not recordings:
        raise FileNotFoundError(f"There is no recording in {folder}: give the folder that holds the audio files.")
    for stem, path in texts.items():
        if stem not in recordings:
            raise ValueError(f"{path} has no recording of its name beside it: rename it, or put it elsewhere.")
    return [
        utterance_from_file(path, language, _text(texts[stem]) if stem in texts else "")
        for stem, path in recordings.items()
    ]


def utterances_from_table(table: str | Path) -> list[Utterance]:
    """Make an utterance from each row of a CSV or Parquet file; recordings can have any format and rate.

    Required columns are id, audio (path relative to the table's folder) and language; optional ones are transcript,
    translation, target_language and split. Others are ignored.

    Raises:
        FileNotFoundError: the table or a recording is missing.
        ValueError: a column is missing or a row is not valid.
        ImportError: pyarrow, which reads Parquet, is not installed.
    """
    table = Path(table)
    if not table.is_file():
        raise FileNotFoundError(f"There is no {table}: give a CSV or Parquet file with one row for each utterance.")
    utterances = []
    for id, (number, row) in rows_by_id(table, TABLE_COLUMNS).items():
        path = table.parent / row["audio"]
        try:
            duration = seconds_of(path)
        except (FileNotFoundError, ValueError) as error:
            raise type(error)(f"{table} row {number} (id {id}): {error}") from error
        texts = {name: row.get(name, "") for name in ("split", "transcript", "translation", "target_language")}
        utterances.append(Utterance(id, path, row["language"], duration, **texts))
    if not utterances:
        raise ValueError(f"{table} has no rows: add one for each utterance.")
    return utterances


def utterances_from_dataset(
    dataset,
    folder: str | Path,
    language: str,
    *,
    audio: str = "audio",
    transcript: str = "text",
    translation: str | None = None,
    target_language: str = "",
    id: str | None = None,
) -> list[Utterance]:
    """Write one split of a Hugging Face dataset as a corpus and load it.

    Rows that an earlier call has written are not decoded again. Nothing is downloaded.

    Args:
        dataset: a `datasets.Dataset`, or a folder written by its `save_to_disk`.
        folder: for the corpus: 16-bit FLAC at 16 kHz and manifest.csv.
        language: the spoken language.
        audio, transcript, translation: names of columns; the audio is encoded files or paths, of any format and rate.
        target_language: the language of the translation.
        id: name of the column that identifies a row; by default rows are numbered.

    Raises:
        ImportError: datasets is not installed.
        ValueError: a column is missing, a row has no text or no readable audio, or the folder holds another corpus.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError("This needs datasets: install it with `pip install 'xattn[datasets]'`.") from error
    if bool(translation) != bool(target_language):
        raise ValueError(
            "A translation needs a column and a language: give both translation and target_language, or neither."
        )
    if isinstance(dataset, str | Path):
        try:
            dataset = datasets.load_from_disk(str(Path(dataset)))
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{dataset} is not a folder written by save_to_disk: check the path.") from error
    if not isinstance(dataset, datasets.Dataset):
        raise ValueError(f"A {type(dataset).__name__} is not a datasets.Dataset: choose one split, without streaming.")
    columns = {"audio": audio, "transcript": transcript, "translation": translation, "id": id}
    for name, column in columns.items():
        if column and column not in dataset.column_names:
            raise ValueError(
                f"The dataset has no column {column!r}: set {name} to one of {', '.join(dataset.column_names)}."
            )
    rows = _texts(dataset, columns)
    try:
        # Undecoded, because datasets would decode with another package.
        recordings = dataset.select_columns(audio).cast_column(audio, datasets.Audio(decode=False))
    except (TypeError, NotImplementedError) as error:
        raise ValueError(f"The column {audio!r} holds no recordings: set audio to the one that does.") from error
    folder = Path(folder)
    claim(folder, SOURCE)
    with tempfile.TemporaryDirectory() as scratch:
        for number, (row, recording) in enumerate(zip(rows, recordings, strict=True)):
            where = f"Row {number} of the dataset"
            row |= {"audio": f"audio/{row['id']}.flac", "language": language, "target_language": target_language}
            row |= {"split": str(dataset.split or ""), "source": SOURCE}
            row |= _write(folder / row["audio"], recording[audio], Path(scratch, "recording"), where)
    write_manifest(folder, rows)
    return load_corpus(folder)


def _text(path: Path) -> str:
    try:
        return " ".join(path.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not encoded in UTF-8: save it again as text in UTF-8.") from error


def _texts(dataset, columns: dict[str, str | None]) -> list[dict[str, str]]:
    """Id, transcript and translation of every row of a dataset, as far as there are columns for them."""
    columns = {name: columns[name] for name in ("id", "transcript", "translation") if columns[name]}
    rows: dict[str, dict[str, str]] = {}
    for number, cells in enumerate(dataset.select_columns([*columns.values()])):
        where = f"Row {number} of the dataset"
        texts = {name: "" if cells[column] is None else str(cells[column]).strip() for name, column in columns.items()}
        empty = [columns[name] for name, text in texts.items() if not text]
        if empty:
            raise ValueError(f"{where} has an empty {', '.join(empty)}: filter such rows out first.")
        row = {"id": f"{number:06}", "translation": ""} | texts
        check_id(row["id"], f"{where}: ")
        if row["id"] in rows:
            raise ValueError(f"{where} repeats the id {row['id']}: set id to another column, or leave it out.")
        rows[row["id"]] = row
    if not rows:
        raise ValueError("The dataset has no rows: choose another split.")
    return [*rows.values()]


def _write(path: Path, recording: dict | None, scratch: Path, where: str) -> dict[str, str | float]:
    """Write the audio of a row, unless that was done, via the file `scratch`; return its columns of the manifest."""
    content, source = (recording["bytes"], recording["path"]) if recording else (None, None)
    if content is None:
        if not (source and Path(source).is_file()):
            raise FileNotFoundError(f"{where} has no audio, and there is no file at its path {source!r}: put it there.")
        content = Path(source).read_bytes()
    origin = f"{SOURCE} {hashlib.sha256(content).hexdigest()}"
    if written_audio(path, origin) is None:
        scratch.write_bytes(content)
        try:
            write_audio(path, load_audio(scratch), origin)
        except ValueError as error:
            raise ValueError(f"{where}: {str(error).replace(str(scratch), 'its audio')}") from error
    return written_audio(path, origin)
