"""A corpus on disk: a manifest of utterances with audio, transcripts, translations and word times."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile

from xattn.audio import SAMPLE_RATE
from xattn.data.utterance import DURATION_TOLERANCE, Utterance, Word, audio_header, check_id, hash_samples
from xattn.files import write_whole

REQUIRED_COLUMNS = ("id", "audio", "language", "transcript")
WORD_COLUMNS = ("id", "word", "start", "end")


def load_corpus(path: str | Path, *, language: str | None = None, split: str | None = None) -> list[Utterance]:
    """Read the corpus in a folder, in the order of its manifest.

    `manifest.csv` needs the columns id, audio (path relative to the folder), language and transcript. It can have
    split, duration (s), translation, target_language, voice, snr (dB) and sha256; other columns are ignored.
    `words.csv` is optional and holds id, word, start and end (s), the words of an utterance in spoken order. If a
    manifest names no target language and has exactly two languages, each is assumed to be translated into the other.

    Args:
        path: the folder.
        language: keep only utterances in this language.
        split: keep only this part of the corpus.

    Raises:
        FileNotFoundError: the manifest or the audio of an utterance is missing.
        ValueError: a column is missing, a row is not valid, or no utterance has this language and split.
    """
    folder = Path(path)
    manifest = folder / "manifest.csv"
    if not manifest.is_file():
        raise FileNotFoundError(f"There is no {manifest}: give the folder of a corpus, which has a manifest.csv.")
    rows = rows_by_id(manifest, REQUIRED_COLUMNS)
    selected = {
        id: (number, row)
        for id, (number, row) in rows.items()
        if language in (None, row["language"]) and split in (None, row.get("split", ""))
    }
    if not selected:
        wanted = "".join(f" {name} {value!r}" for name, value in (("language", language), ("split", split)) if value)
        present = sorted({f"{row['language']} {row.get('split', '')}".strip() for _, row in rows.values()})
        raise ValueError(
            f"{manifest} has no utterance{' of' * bool(wanted)}{wanted}: choose among {', '.join(present) or 'none'}."
        )
    languages = {row["language"] for _, row in rows.values()}
    words = _read_words(folder / "words.csv")
    return [_utterance(manifest, number, row, languages, words.get(id, [])) for id, (number, row) in selected.items()]


def claim(folder: Path, source: str) -> None:
    """Make the folder of a corpus that will be written from `source`.

    Raises:
        ValueError: the folder holds other files, or a corpus from another source. OSError: it cannot be made.
    """
    manifest = folder / "manifest.csv"
    if manifest.is_file():
        ours = {row.get("source") for _, row in read_rows(manifest, REQUIRED_COLUMNS)} == {source}
    else:
        ours = not any(path.is_file() and not path.name.startswith(".") for path in folder.glob("*"))
    if not ours:
        raise ValueError(f"{folder} holds files that were not made from {source}: choose a folder of its own for that.")
    folder.mkdir(parents=True, exist_ok=True)


def write_audio(path: Path, audio: np.ndarray, origin: str) -> None:
    """Write samples (samples,) at 16 kHz as 16-bit FLAC with a comment that says what they were made from."""
    samples = np.clip(np.rint(audio * 2**15), -(2**15), 2**15 - 1).astype(np.int16)
    content = io.BytesIO()
    with soundfile.SoundFile(content, "w", SAMPLE_RATE, channels=1, subtype="PCM_16", format="FLAC") as file:
        file.comment = f"{origin} {hash_samples(samples)}"
        file.write(samples)
    write_whole(path, content.getvalue())


def written_audio(path: Path, origin: str) -> dict[str, str | float] | None:
    """Duration (s) and sha256 of a file that `write_audio` made from `origin`; None if it did not or it is damaged."""
    try:
        with soundfile.SoundFile(path) as file:
            comment, samples = file.comment, file.read(dtype="int16")
    except soundfile.LibsndfileError:
        return None
    digest = hash_samples(samples)
    return {"duration": len(samples) / SAMPLE_RATE, "sha256": digest} if comment == f"{origin} {digest}" else None


def write_manifest(folder: Path, rows: list[dict[str, str | float]]) -> None:
    """Write manifest.csv; every row has the columns of the first one."""
    table = io.StringIO(newline="")
    # Texts are quoted because they can contain a carriage return.
    writer = csv.DictWriter(table, list(rows[0]), lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writeheader()
    writer.writerows(rows)
    write_whole(folder / "manifest.csv", table.getvalue().encode())


def _utterance(
    manifest: Path, number: int, row: dict[str, str], languages: set[str], words: list[tuple[int, dict[str, str]]]
) -> Utterance:
    where = f"{manifest} row {number} (id {row['id']})"
    audio_path = manifest.parent / row["audio"]
    if not audio_path.is_file():
        raise FileNotFoundError(f"{where} names the audio {audio_path}, which is missing: restore it or drop the row.")
    duration = _number(row, "duration", where)
    if duration is None:
        duration = audio_header(audio_path, where).duration
    others = languages - {row["language"]}
    return Utterance(
        id=row["id"],
        audio_path=audio_path,
        language=row["language"],
        duration=duration,
        split=row.get("split", ""),
        transcript=row["transcript"],
        translation=row.get("translation", ""),
        target_language=row.get("target_language") or (others.pop() if len(others) == 1 else ""),
        voice=row.get("voice", ""),
        snr=_number(row, "snr", where),
        sha256=row.get("sha256", ""),
        words=_words(manifest.parent / "words.csv", words, duration),
        manifest=manifest,
        row=number,
    )


def rows_by_id(table: Path, required: tuple[str, ...]) -> dict[str, tuple[int, dict[str, str]]]:
    """`read_rows` by id, with the number of each row. ValueError: an id is repeated or unsafe as a file name."""
    rows = {}
    for number, row in read_rows(table, required):
        if row["id"] in rows:
            raise ValueError(
                f"{table} row {number} (id {row['id']}) repeats the id of row {rows[row['id']][0]}: rename one."
            )
        check_id(row["id"], f"{table} row {number}: ")
        rows[row["id"]] = number, row
    return rows


def read_rows(table: Path, required: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    """Read the rows of a CSV file, numbered as in a spreadsheet, or of a Parquet file, numbered from 1.

    Cells are stripped texts, empty if unknown; required ones are never empty.
    """
    parquet = table.suffix == ".parquet"
    columns, rows = _read_parquet(table) if parquet else _read_csv(table)
    missing = [column for column in required if column not in columns]
    if missing:
        how = "add it, as texts or numbers" if parquet else "add it to the header (cells separated by commas)"
        raise ValueError(f"{table} has no column {', '.join(missing)}: {how}.")
    for number, row in rows:
        where = f"{table} row {number} (id {row['id']})"
        if None in row or None in row.values():
            raise ValueError(f"{where} does not have as many cells as the header: quote texts that contain commas.")
        row = {column: cell.strip() for column, cell in row.items()}
        empty = [column for column in required if not row[column]]
        if empty:
            raise ValueError(f"{where} has an empty {', '.join(empty)}: fill it in or drop the row.")
        yield number, row


def _read_csv(table: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    try:
        # utf-8-sig also accepts the byte order mark that spreadsheets write.
        with table.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            return list(reader.fieldnames or ()), list(enumerate(reader, start=2))
    except UnicodeDecodeError as error:
        raise ValueError(f"{table} is not encoded in UTF-8: save it again as CSV in UTF-8.") from error
    except csv.Error as error:
        raise ValueError(f"{table} cannot be read as CSV ({error}): look for a quote that is not closed.") from error


def _read_parquet(table: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f"{table} needs pyarrow: install it with `pip install 'xattn[datasets]'`.") from error
    try:
        content = parquet.ParquetFile(table).read()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{table} is not a readable Parquet file: write it again.") from error
    # Columns of other types, such as embedded audio, are dropped.
    other = (pyarrow.types.is_nested, pyarrow.types.is_binary, pyarrow.types.is_large_binary)
    columns = [field.name for field in content.schema if not any(kind(field.type) for kind in other)]
    rows = content.select(columns).to_pylist()
    # NaN, pandas' mark of missing values, is not equal to itself.
    texts = [{name: "" if cell is None or cell != cell else str(cell) for name, cell in row.items()} for row in rows]
    return columns, list(enumerate(texts, start=1))


def _read_words(table: Path) -> dict[str, list[tuple[int, dict[str, str]]]]:
    words = {}
    if table.is_file():
        for number, row in read_rows(table, WORD_COLUMNS):
            words.setdefault(row["id"], []).append((number, row))
    return words


def _words(table: Path, rows: list[tuple[int, dict[str, str]]], duration: float) -> tuple[Word, ...]:
    words, previous = [], 0.0
    for number, row in rows:
        where = f"{table} row {number} (id {row['id']})"
        word = Word(row["word"], _number(row, "start", where), _number(row, "end", where))
        if not previous <= word.start <= word.end:
            raise ValueError(
                f"{where}: the word {word.word!r} from {word.start:g} to {word.end:g} s is out of order after "
                f"{previous:g} s: list the words as they are spoken, each ending before the next starts."
            )
        if word.end > duration + DURATION_TOLERANCE:
            raise ValueError(
                f"{where}: the word {word.word!r} ends at {word.end:g} s, beyond the audio's {duration:.3f} s: "
                "correct its times."
            )
        words.append(word)
        previous = word.end
    return tuple(words)


def _number(row: dict[str, str], column: str, where: str) -> float | None:
    text = row.get(column, "")
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        number = np.nan
    if not np.isfinite(number):
        raise ValueError(f"{where} has {text!r} as its {column}, but a number is needed: correct it.")
    return number
