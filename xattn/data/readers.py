"""Utterances from a folder of recordings, a table, or a Hugging Face dataset."""

import hashlib
import re
import tempfile
from pathlib import Path
from sys import intern

from xattn.audio import load_audio
from xattn.data.manifest import claim, utterances_from_manifest, write_audio, write_manifest, written_audio
from xattn.data.tables import number_in, read_text, rows_with_ids, where_in
from xattn.data.utterance import Utterance, check_id, folded, listed_seconds, located, nothing_selected

RECORDING = re.compile(
    r"[^.].*\.(3gp|aac|aifc|aiff?|amr|ape|au|avi|caf|flac|gsm|m4[abv]|mk[av]|mov|mp[234]|mpe?g|nist|og[agv]|opus|rf64|snd"
    r"|sph|spx|voc|w64|wave?|webm|wm[av]|wv)",
    re.IGNORECASE | re.DOTALL,
)  # the names of recordings, unless hidden
TABLE_COLUMNS = ("id", "audio", "language")
SOURCE = "a dataset"  # what a manifest calls a Hugging Face dataset


def is_recording(path: Path) -> bool:
    """Whether a file's name says that it is a recording."""
    return RECORDING.fullmatch(path.name) is not None


def utterances_from_folder(folder: str | Path, language: str, *, channel: int | None = None) -> list[Utterance]:
    """Make an utterance from each recording in a folder, of any format and rate, in the order of their names.

    The transcript of `talk.m4a` is `talk.txt`, if that exists. Names are compared without case and in Unicode NFC.
    Every file ending in .txt must be a transcript, so that a misspelt name is noticed; other files that are no
    recordings (subtitles, notes, hidden files) are ignored, and so are subfolders.

    channel: the channel of every recording to use, counted from 0, instead of the average of all.

    Raises:
        FileNotFoundError: there is no recording.
        ValueError: a transcript has no recording, or two files have the same name.
    """
    folder = Path(folder)
    recordings, texts = {}, {}
    for path in sorted(folder.glob("*")):
        text = path.suffix.lower() == ".txt" and not path.name.startswith(".")
        if not (text or is_recording(path)) or path.is_dir():
            continue
        own, kind = (texts, "transcripts") if text else (recordings, "recordings")
        first = own.setdefault(folded(path.stem), path)
        if first is not path:
            raise ValueError(
                f"{path} has the name of {first.name}, compared without case and in Unicode NFC: rename one of the "
                f"{kind}."
            )
    if not recordings:
        raise FileNotFoundError(
            f"There is no recording in {folder}: give the folder that holds the audio files (.wav, .flac, .mp3, ...)."
        )
    for name, path in texts.items():
        if name not in recordings:
            raise ValueError(f"{path} has no recording of its name beside it: rename it, or put it elsewhere.")
    return [
        Utterance(
            path.stem,
            path,
            language,
            listed_seconds(path),
            transcript=" ".join(read_text(texts[name]).split()) if name in texts else "",
            channel=channel,
        )
        for name, path in recordings.items()
    ]


def utterances_from_table(
    table: str | Path, *, language: str | None = None, split: str | None = None, channel: int | None = None
) -> list[Utterance]:
    """Make an utterance from each row of a CSV or Parquet file; recordings can have any format and rate.

    Required columns are id, audio (path relative to the table's folder) and language; optional ones are transcript,
    translation, target_language, split, channel and duration (s). Others are ignored. Without durations every recording
    is opened, so a large table is read faster with them.

    The cells of a CSV file are separated by commas, semicolons or tabs, and numbers have a decimal point. It is encoded
    in UTF-8, with or without a byte order mark, or in UTF-16 with one.

    Args:
        table: the file.
        language: keep only utterances in this language.
        split: keep only this part of the table.
        channel: the channel to use, counted from 0, of each recording whose row states none; by default the average of
            all.

    Raises:
        FileNotFoundError: the table or a recording is missing.
        ValueError: a column is missing, a row is not valid, or no utterance has this language and split.
        ImportError: pyarrow, which reads Parquet, is not installed.
    """
    table = Path(table)
    if not table.is_file():
        raise FileNotFoundError(f"There is no {table}: give a CSV or Parquet file with one row for each utterance.")
    utterances, present, folder, known = [], set(), table.parent, {}
    for number, row in rows_with_ids(table, TABLE_COLUMNS):
        own = intern(row["language"]), intern(row.get("split", ""))  # one string for all rows
        present.add(own)
        if language in (None, own[0]) and split in (None, own[1]):
            path = folder / row["audio"]
            utterance = Utterance(
                id=row["id"],
                audio_path=path,
                language=own[0],
                duration=_duration(table, number, row, path, known),
                split=own[1],
                transcript=row.get("transcript", ""),
                translation=row.get("translation", ""),
                target_language=intern(row.get("target_language", "")),
                channel=_channel(table, number, row, channel),
            )
            utterances.append(utterance)
    if not present:
        raise ValueError(f"{table} has no rows: add one for each utterance.")
    if not utterances:
        raise nothing_selected(table, present, language=language, split=split)
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
    return utterances_from_manifest(folder)


def _duration(table: Path, number: int, row: dict[str, str], path: Path, known: dict[str, float]) -> float:
    """Length of a recording in seconds: from the column `duration` if there is one, from the recording otherwise.

    known: the lengths of recordings that were opened, because rows can share one. The first recording is always opened,
    to notice a column in other units.
    """
    stated = number_in(table, number, row, "duration")
    if stated is not None and known:
        if not path.is_file():
            raise FileNotFoundError(f"{where_in(table, number, row)}: There is no audio file {path}: check the path.")
        return stated
    seconds = known.get(row["audio"])
    if seconds is None:
        with located(where_in(table, number, row)):
            seconds = known[row["audio"]] = listed_seconds(path)
    if stated is not None and abs(stated - seconds) > max(1, 0.1 * seconds):
        raise ValueError(
            f"{where_in(table, number, row)}: {path} lasts {seconds:.3f} s, but the column duration says {stated:g} s: "
            "correct the column, or leave it out."
        )
    return seconds if stated is None else stated


def _channel(table: Path, number: int, row: dict[str, str], default: int | None) -> int | None:
    """The column `channel` of a row, if it is not empty. ValueError: it is not a whole number."""
    text = row.get("channel", "")
    if not text:
        return default
    if not re.fullmatch(r"\d+(\.0*)?", text):  # pandas writes 1.0 if other cells are empty
        raise ValueError(
            f"{where_in(table, number, row)} has {text!r} as its channel: give its number, counted from 0, leave the "
            "cell empty for the average of all channels, or rename the column if it means something else."
        )
    return int(float(text))


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
        if rows.setdefault(folded(row["id"]), row) is not row:
            raise ValueError(
                f"{where} repeats the id {row['id']}, compared without case and in Unicode NFC: set id to another "
                "column, or leave it out."
            )
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
