"""The kit's own format of a corpus: a manifest of utterances with audio, transcripts, translations and word times."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from sys import intern

import numpy as np
import soundfile

from xattn.audio import SAMPLE_RATE
from xattn.data.tables import number_in, read_rows, rows_with_ids, where_in
from xattn.data.utterance import DURATION_TOLERANCE, Utterance, Word, audio_header, hash_samples, nothing_selected
from xattn.files import write_whole

REQUIRED_COLUMNS = ("id", "audio", "language", "transcript")
WORD_COLUMNS = ("id", "word", "start", "end")


def utterances_from_manifest(
    folder: str | Path, *, language: str | None = None, split: str | None = None
) -> list[Utterance]:
    """Read the corpus in a folder, in the order of its manifest.

    `manifest.csv` needs the columns id, audio (path relative to the folder), language and transcript. It can have
    split, duration (s), translation, target_language, voice, snr (dB) and sha256; other columns are ignored.
    `words.csv` is optional and holds id, word, start and end (s), the words of an utterance in spoken order;
    neighbours may overlap. If a manifest names no target language and has exactly two languages, each is assumed to be
    translated into the other.

    Args:
        folder: the folder.
        language: keep only utterances in this language.
        split: keep only this part of the corpus.

    Raises:
        FileNotFoundError: the manifest or the audio of an utterance is missing.
        ValueError: a column is missing, a row is not valid, or no utterance has this language and split.
    """
    folder = Path(folder)
    manifest = folder / "manifest.csv"
    if not manifest.is_file():
        raise FileNotFoundError(f"There is no {manifest}: give the folder of a corpus, which has a manifest.csv.")
    utterances, present = [], set()
    for number, row in rows_with_ids(manifest, REQUIRED_COLUMNS):
        own = row["language"], row.get("split", "")
        present.add(own)
        if language in (None, own[0]) and split in (None, own[1]):
            utterances.append(_utterance(folder, manifest, number, row))
    if not utterances:
        raise nothing_selected(manifest, present, language=language, split=split)
    languages = {own for own, _ in present}
    words = _read_words(folder / "words.csv", utterances)
    return [_completed(utterance, languages, words.get(utterance.id, ())) for utterance in utterances]


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


def write_words(folder: Path, words: Mapping[str, Sequence[Word]]) -> None:
    """Write words.csv, with the words of each utterance by its id."""
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n", quoting=csv.QUOTE_NONNUMERIC)
    writer.writerow(WORD_COLUMNS)
    writer.writerows((id, word.word, word.start, word.end) for id, own in words.items() for word in own)
    write_whole(folder / "words.csv", table.getvalue().encode())


def _utterance(folder: Path, manifest: Path, number: int, row: dict[str, str]) -> Utterance:
    audio_path = folder / row["audio"]
    if not audio_path.is_file():
        raise FileNotFoundError(
            f"{where_in(manifest, number, row)} names the audio {audio_path}, which is missing: restore it or drop the "
            "row."
        )
    duration = number_in(manifest, number, row, "duration")
    if duration is None:
        duration = audio_header(audio_path, where_in(manifest, number, row)).duration
    return Utterance(
        id=row["id"],
        audio_path=audio_path,
        language=intern(row["language"]),  # one string for all rows
        duration=duration,
        split=intern(row.get("split", "")),
        transcript=row["transcript"],
        translation=row.get("translation", ""),
        target_language=intern(row.get("target_language", "")),
        voice=intern(row.get("voice", "")),
        snr=number_in(manifest, number, row, "snr"),
        sha256=row.get("sha256", ""),
        manifest=manifest,
        row=number,
    )


def _completed(utterance: Utterance, languages: set[str], words: Iterable[Word]) -> Utterance:
    """The utterance with its words and, in a corpus of two languages, with the other one as its target language."""
    others = languages - {utterance.language}
    target = utterance.target_language or (others.pop() if len(others) == 1 else "")
    if not words and target == utterance.target_language:
        return utterance
    return replace(utterance, target_language=target, words=tuple(words))


def _read_words(table: Path, utterances: list[Utterance]) -> dict[str, list[Word]]:
    """The words of these utterances by their ids."""
    if not table.is_file():
        return {}
    words: dict[str, list[Word]] = {}
    durations = {utterance.id: utterance.duration for utterance in utterances}
    for number, row in read_rows(table, WORD_COLUMNS):
        if row["id"] not in durations:
            continue
        own = words.setdefault(row["id"], [])
        word = Word(row["word"], *(number_in(table, number, row, column) for column in WORD_COLUMNS[2:]))
        previous, duration = own[-1].start if own else 0.0, durations[row["id"]]
        if not previous <= word.start <= word.end:
            raise ValueError(
                f"{where_in(table, number, row)}: the word {word.word!r} from {word.start:g} to {word.end:g} s is out "
                f"of order after one that starts at {previous:g} s: list the words in the order of their starts."
            )
        if word.end > duration + DURATION_TOLERANCE:
            raise ValueError(
                f"{where_in(table, number, row)}: the word {word.word!r} ends at {word.end:g} s, beyond the audio's "
                f"{duration:.3f} s: correct its times."
            )
        own.append(word)
    return words
