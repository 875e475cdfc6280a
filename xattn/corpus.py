"""A corpus on disk: a manifest of utterances with audio, transcript, translation and word timings."""

import csv
import hashlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

from xattn.audio import SAMPLE_RATE, load_audio
from xattn.store import write_whole

REQUIRED_COLUMNS = ("id", "audio", "language", "transcript")
WORD_COLUMNS = ("id", "word", "start", "end")
DURATION_TOLERANCE = 0.05  # seconds by which the manifest and the audio may disagree
ID_BYTES = 200  # of UTF-8: file names may have 255, and those made of an id add an extension and a random one


class Word(NamedTuple):
    """A spoken word with its start and end in seconds from the start of the audio."""

    word: str
    start: float
    end: float


@dataclass(frozen=True)
class Utterance:
    """One recording and its texts; the audio stays on disk until `audio` is called.

    `duration` is in seconds and `snr` in dB. `target_language` is the language of `translation`, empty where the
    corpus does not tell. `sha256` is the hash of the audio's 16-bit samples (little-endian), empty where unknown.
    `row` is the utterance's row in `manifest` (the header is row 1).
    """

    id: str
    audio_path: Path
    language: str
    duration: float
    split: str = ""
    transcript: str = ""
    translation: str = ""
    target_language: str = ""
    voice: str = ""
    snr: float | None = None
    sha256: str = ""
    words: tuple[Word, ...] = ()
    manifest: Path | None = None
    row: int | None = None

    def __post_init__(self):
        check_id(self.id)

    def audio(self) -> np.ndarray:
        """float32 samples at 16 kHz, shape (samples,).

        A recording of one's own is resampled where needed; an utterance of a corpus has to be what its manifest says.

        Raises:
            ValueError: the audio of a corpus is not at 16 kHz, or its length or hash disagrees with the manifest; or
                as `load_audio`.
        """
        if self.manifest is None:
            return load_audio(self.audio_path)
        where = f"{self.manifest} row {self.row} (id {self.id})"
        self._check_audio(where)
        try:
            return load_audio(self.audio_path)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def text(self, setting: str) -> str:
        """Its transcript in a setting of its own language, such as "en", its translation in one such as "en-it"; empty
        where there is none."""
        return self.transcript if setting == self.language else self.translation

    def reference(self, setting: str) -> str:
        """The text a model should produce: the transcript for "en" or "it" (ASR), the translation for "en-it" (ST).

        Raises:
            ValueError: the utterance is spoken in another language, or has no such text.
        """
        source, _, target = setting.partition("-")
        if source != self.language:
            raise ValueError(
                f"Utterance {self.id} is spoken in {self.language!r} and has no reference for the setting {setting!r}: "
                f"choose a setting that starts with {self.language!r}."
            )
        if target and self.target_language and target != self.target_language:
            raise ValueError(
                f"Utterance {self.id} is translated into {self.target_language!r} and has no reference for the setting "
                f"{setting!r}: use the setting '{self.language}-{self.target_language}'."
            )
        kind = "translation" if target else "transcript"
        text = getattr(self, kind)
        if not text:
            raise ValueError(f"Utterance {self.id} has no {kind}, which the setting {setting!r} needs: add it first.")
        return text

    def _check_audio(self, where: str) -> None:
        header = _header(self.audio_path, where)
        if header.samplerate != SAMPLE_RATE:
            raise ValueError(
                f"{where}: {self.audio_path} is at {header.samplerate} Hz where a corpus needs {SAMPLE_RATE} Hz: "
                "resample it."
            )
        if abs(header.duration - self.duration) > DURATION_TOLERANCE:
            raise ValueError(
                f"{where}: {self.audio_path} lasts {header.duration:.3f} s where the manifest says "
                f"{self.duration:.3f} s: restore the file or correct the column 'duration'."
            )
        if self.sha256 and header.subtype == "PCM_16":
            try:
                samples, _ = soundfile.read(self.audio_path, dtype="int16")
            except soundfile.LibsndfileError as error:
                raise ValueError(f"{where}: {self.audio_path} is damaged ({error}): restore the file.") from error
            if _digest(samples) != self.sha256:
                raise ValueError(
                    f"{where}: {self.audio_path} is not the audio the manifest was made for (its SHA-256 differs): "
                    "restore the file or correct the column 'sha256'."
                )


def load_corpus(path: str | Path, *, language: str | None = None, split: str | None = None) -> list[Utterance]:
    """Read the corpus in a folder, in the order of its manifest.

    `manifest.csv` needs the columns id, audio (path relative to the folder), language and transcript, and may have
    split, duration (s), translation, target_language, voice, snr (dB) and sha256; other columns are ignored.
    `words.csv`, where there is one, holds id, word, start and end (s), the words of an utterance in spoken order. Where
    a manifest names no target language but has exactly two languages, each is taken to be translated into the other.

    Args:
        path: the folder.
        language: keep only utterances spoken in it.
        split: keep only this part.

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


def utterance_from_file(path: str | Path, language: str, transcript: str = "") -> Utterance:
    """A recording of one's own, of any format and rate, as an utterance named after its file.

    Raises:
        FileNotFoundError, ValueError: as `load_audio`.
    """
    path = Path(path)
    duration = load_audio(path).size / SAMPLE_RATE
    return Utterance(path.stem, path, language, duration, transcript=transcript)


def check_id(id: str, where: str = "") -> None:
    """ValueError, told with `where`: the id of an utterance is not safe as a part of file names."""
    try:
        fits = len(id.encode()) <= ID_BYTES
    except UnicodeEncodeError:  # bytes of a file's name that are no text
        fits = False
    if not fits or id in ("", ".", "..") or any(character in "/\\" or ord(character) < 32 for character in id):
        raise ValueError(
            f"{where}The utterance id {id!r} cannot name the files of its maps: choose one of at most {ID_BYTES} bytes "
            "without slashes, backslashes and control characters."
        )


def claim(folder: Path, source: str) -> None:
    """Make the folder of a corpus that is to be written from `source`, its manifest first of the files beside `audio`.

    Raises:
        ValueError: it holds other files, or a corpus from elsewhere. OSError: it cannot be made.
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
    """Write samples (samples,) at 16 kHz as 16-bit FLAC, whole or not at all, and in it what they were made from."""
    samples = np.clip(np.rint(audio * 2**15), -(2**15), 2**15 - 1).astype(np.int16)
    content = io.BytesIO()
    with soundfile.SoundFile(content, "w", SAMPLE_RATE, channels=1, subtype="PCM_16", format="FLAC") as file:
        file.comment = f"{origin} {_digest(samples)}"
        file.write(samples)
    write_whole(path, content.getvalue())


def written_audio(path: Path, origin: str) -> dict[str, str | float] | None:
    """Duration (s) and sha256 of what `write_audio` made from `origin`; None where it did not, or it is damaged."""
    try:
        with soundfile.SoundFile(path) as file:
            comment, samples = file.comment, file.read(dtype="int16")
    except soundfile.LibsndfileError:
        return None
    digest = _digest(samples)
    return {"duration": len(samples) / SAMPLE_RATE, "sha256": digest} if comment == f"{origin} {digest}" else None


def write_manifest(folder: Path, rows: list[dict[str, str | float]]) -> None:
    """Write manifest.csv, whole or not at all; every row has the columns of the first."""
    table = io.StringIO(newline="")
    # Texts are quoted, as they may hold a carriage return.
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
        duration = _header(audio_path, where).duration
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
    """As `read_rows`, where every row is an utterance of its own. ValueError: an id is repeated or not safe."""
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
    """Rows of a CSV file with their numbers as a spreadsheet shows them, or of a Parquet file with theirs from 1.

    Cells are texts without blanks around them, empty where nothing is known; every required one is filled.
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
            raise ValueError(
                f"{where} does not have as many cells as the header: put texts that contain commas in quotes."
            )
        row = {column: cell.strip() for column, cell in row.items()}
        empty = [column for column in required if not row[column]]
        if empty:
            raise ValueError(f"{where} has an empty {', '.join(empty)}: fill it in or drop the row.")
        yield number, row


def _read_csv(table: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    try:
        # utf-8-sig also reads the byte order mark that spreadsheets put first.
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
        raise ValueError(f"{table} is no readable Parquet file: write it again.") from error
    # Anything but texts and numbers, such as embedded audio, is left out as an unknown column.
    other = (pyarrow.types.is_nested, pyarrow.types.is_binary, pyarrow.types.is_large_binary)
    columns = [field.name for field in content.schema if not any(kind(field.type) for kind in other)]
    rows = content.select(columns).to_pylist()
    # A number that is not equal to itself is NaN, with which pandas marks what is missing.
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
        raise ValueError(f"{where} has {text!r} as its {column}, where a number is needed: correct it.")
    return number


def _header(path: Path, where: str):
    try:
        return soundfile.info(path)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{where}: {path} cannot be read: convert it to WAV or FLAC at {SAMPLE_RATE} Hz.") from error


def _digest(samples: np.ndarray) -> str:
    return hashlib.sha256(samples.astype("<i2").tobytes()).hexdigest()
