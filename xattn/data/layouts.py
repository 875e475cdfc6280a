"""Utterances from LibriSpeech, Common Voice and TIMIT, as they are distributed."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from xattn.audio import SAMPLE_RATE
from xattn.data.readers import is_recording
from xattn.data.tables import number_in, read_rows, read_text
from xattn.data.utterance import (
    DURATION_TOLERANCE,
    Utterance,
    Word,
    check_unique,
    folded,
    listed_seconds,
    located,
    nothing_selected,
)

DEPTH = 5  # of sub-folders in which files of a corpus are looked for
COMMON_VOICE_SPLITS = ("train", "dev", "test")  # the official ones, which share no clip
ANNOTATIONS = (".txt", ".wrd", ".phn")  # of a sentence of TIMIT


def utterances_from_librispeech(
    folder: str | Path, *, split: str | None = None, language: str = "en"
) -> list[Utterance]:
    """Make an utterance from each line of the transcripts (`*.trans.txt`) of LibriSpeech.

    Transcripts are kept as they are: upper case, without punctuation. The split of an utterance is the name of the
    folder that holds its speaker, such as test-clean.

    Args:
        folder: `LibriSpeech`, or a folder in it such as `LibriSpeech/test-clean`.
        split: keep only this sub-folder, such as "test-clean".
        language: of all utterances; for corpora in other languages with the same layout.

    Raises:
        FileNotFoundError: there are no transcripts, or a recording is missing.
        ValueError: a recording has no transcript, a line is not valid, or there is no such split.
    """
    folder, utterances, splits = Path(folder), [], set()
    for place, files in _walk(folder):
        recordings = {path.stem: path for path in reversed(files) if is_recording(path)}  # .flac rather than .wav
        tables = [path for path in files if path.name.endswith(".trans.txt")]
        if not (recordings or tables):
            continue
        own = _grandparent(place)
        splits.add(own)
        if split not in (None, own):
            continue
        for table in tables:
            for number, line in _lines(table):
                id, *text = line.split(maxsplit=1)
                where = f"{table} line {number}"
                if not text:
                    raise ValueError(f"{where} is {line!r}, but an id and a transcript are needed: restore the file.")
                if id not in recordings:
                    raise FileNotFoundError(
                        f"{where} names the recording {place / id}.flac, which is missing or named twice: unpack the "
                        "archive again."
                    )
                path = recordings.pop(id)
                utterances.append(Utterance(id, path, language, _seconds(path, where), own, *text))
        for path in recordings.values():
            raise ValueError(f"{path} has no transcript in a *.trans.txt beside it: unpack the archive again.")
    if not splits:
        raise FileNotFoundError(f"There is no *.trans.txt in {folder}: give the folder of LibriSpeech.")
    if not utterances:
        raise nothing_selected(folder, {(language, own) for own in splits}, split=split)
    check_unique(utterances)
    return utterances


def utterances_from_common_voice(
    folder: str | Path, *, language: str | None = None, split: str | None = None
) -> list[Utterance]:
    """Make an utterance from each row of a list (`test.tsv`, ...) of Common Voice; recordings are in `clips`.

    Sentences are kept as they are, with their quotes. The language of an utterance is its locale without region: sv for
    sv-SE. A clip's length comes from clip_durations.tsv, if that exists.

    Args:
        folder: the folder of one language, with `clips`, or one that holds several of these.
        language: keep only utterances in this language, such as "it", or of this locale, such as "sv-SE".
        split: the name of a list, such as "test" or "validated"; by default train, dev and test or, in a release
            without these, validated.

    Raises:
        FileNotFoundError: a list or a clip is missing.
        ValueError: a row is not valid, or there is no utterance in this language.
    """
    folder, utterances, present = Path(folder), [], set()
    places = [clips.parent for depth in range(3) for clips in sorted(folder.glob("*/" * depth + "clips"))]
    if not places:
        raise FileNotFoundError(f"There is no folder clips in {folder}: give the folder of a language of Common Voice.")
    names = {place: Path(os.path.abspath(place)).name for place in places}
    named = [place for place in places if language in (names[place], _without_region(names[place]))]
    if language is not None and not named and len(places) > 1:
        raise nothing_selected(folder, {(name, "") for name in names.values()}, language=language)
    for place in named or places:
        for table in _lists(place, split):
            seconds = _clip_seconds(place / "clip_durations.tsv", table)
            for number, row in _clips(table):
                locale = row.get("locale") or names[place]
                own = _without_region(locale)
                present.add((own, table.stem))
                if language not in (None, own, locale):
                    continue
                where, path = f"{table} row {number}", place / "clips" / row["path"]
                if not path.suffix:  # as in the first releases
                    path = path.with_suffix(".mp3")
                if not path.is_file():
                    raise FileNotFoundError(
                        f"{where} names the clip {path}, which is missing: unpack the archive again."
                    )
                length = seconds.get(row["path"]) or _seconds(path, where)
                utterances.append(Utterance(path.stem, path, own, length, table.stem, row["sentence"]))
    if not utterances:
        raise nothing_selected(folder, present, language=language, split=split)
    check_unique(utterances)
    return utterances


def utterances_from_timit(folder: str | Path, *, split: str | None = None) -> list[Utterance]:
    """Make an utterance from each sentence of TIMIT, with the times of its words and phones.

    Every recording (.WAV, also as NIST SPHERE) needs its text (.TXT), words (.WRD) and phones (.PHN); the case of names
    does not matter. Times in these files are samples at 16 kHz. Neighbouring words that share a phone overlap, as in
    the corpus. An utterance's id is `<speaker>_<sentence>`, because speakers read the same sentences.

    Args:
        folder: `TIMIT`, or a folder in it.
        split: "train" or "test", the names of its sub-folders; the case does not matter.

    Raises:
        FileNotFoundError: there are no sentences, or a file of one is missing.
        ValueError: a file is not valid, or there is no such split.
    """
    folder, utterances, splits = Path(folder), [], set()
    for place, files in _walk(folder):
        recordings = {folded(path.stem): path for path in files if is_recording(path)}
        # Some copies have SA1.WAV.wav, converted from SA1.WAV, beside it.
        recordings = {stem: path for stem, path in recordings.items() if stem.rpartition(".")[0] not in recordings}
        annotated = {folded(path.stem): path for path in files if path.suffix.lower() in ANNOTATIONS[1:]}
        if not (recordings or annotated):
            continue
        above = _grandparent(place).lower()
        own = above if above in ("train", "test") else ""
        splits.add(own)
        if split is not None and split.lower() != own:
            continue
        named = _by_name(files)
        for stem, path in sorted((annotated | recordings).items()):
            texts = [named.get(f"{stem}{suffix}") for suffix in ANNOTATIONS]
            if stem not in recordings or None in texts:
                suffix = ANNOTATIONS[texts.index(None)] if stem in recordings else ".wav"
                raise FileNotFoundError(f"{path} has no {suffix.upper()} beside it: unpack the archive again.")
            utterances.append(_timit(path, *texts, own))
    if not splits:
        raise FileNotFoundError(f"There is no sentence of TIMIT in {folder}: give the folder of TIMIT.")
    if not utterances:
        raise nothing_selected(folder, {("en", own) for own in splits}, split=split)
    check_unique(utterances)
    return utterances


def _timit(recording: Path, text: Path, words: Path, phones: Path, split: str) -> Utterance:
    seconds = listed_seconds(recording)
    sentence = re.sub(r"\A\d+\s+\d+(\s+|\Z)", "", " ".join(read_text(text).split()))  # samples from and to
    if not sentence:
        raise ValueError(f"{text} is empty: unpack the archive again.")
    return Utterance(
        id=f"{recording.absolute().parent.name}_{recording.stem}",
        audio_path=recording,
        language="en",
        duration=seconds,
        split=split,
        transcript=sentence,
        words=_times(words, seconds),
        phones=_times(phones, seconds),
    )


def _times(file: Path, seconds: float) -> tuple[Word, ...]:
    """Words or phones from lines of start and end, in samples at 16 kHz, and the word."""
    found: list[Word] = []
    for number, line in _lines(file):
        match = re.fullmatch(r"(\d+)\s+(\d+)\s+(\S.*)", line)
        if not match:
            raise ValueError(
                f"{file} line {number} is {line!r}, but a start and an end in samples and a word are needed: unpack "
                "the archive again."
            )
        start, end = int(match[1]) / SAMPLE_RATE, int(match[2]) / SAMPLE_RATE
        if not (found[-1].start if found else 0.0) <= start <= end <= seconds + DURATION_TOLERANCE:
            raise ValueError(
                f"{file} line {number} is {line!r}, but lines must be in order and end within the {seconds:.3f} s of "
                "the recording: unpack the archive again."
            )
        found.append(Word(match[3], start, end))
    return tuple(found)


def listing(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files and folders in a folder, in the order of their names, without hidden ones."""
    with os.scandir(folder) as entries:
        found = sorted((each for each in entries if not each.name.startswith(".")), key=lambda each: each.name)
    return ([Path(each) for each in found if not each.is_dir()], [Path(each) for each in found if each.is_dir()])


def _walk(folder: Path, depth: int = DEPTH) -> Iterator[tuple[Path, list[Path]]]:
    """A folder and the folders in it, each with its files, in the order of their names, without hidden ones."""
    files, folders = listing(folder)
    yield folder, files
    for each in folders if depth else ():
        yield from _walk(each, depth - 1)


def _by_name(files: list[Path]) -> dict[str, Path]:
    """Files by their folded names. ValueError: two names are equal."""
    named: dict[str, Path] = {}
    for path in files:
        first = named.setdefault(folded(path.name), path)
        if first is not path:
            raise ValueError(
                f"{path} has the name of {first.name}, compared without case and in Unicode NFC: remove one of them."
            )
    return named


def _grandparent(folder: Path) -> str:
    """The name of the folder two levels above; "" if there is none."""
    parts = Path(os.path.abspath(folder)).parts
    return parts[-3] if len(parts) > 3 else ""


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """The numbered lines of a text file that are not blank."""
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if line.strip():
            yield number, line.strip()


def _seconds(path: Path, where: str) -> float:
    with located(where):
        return listed_seconds(path)


def _lists(place: Path, split: str | None) -> list[Path]:
    """The lists of a language of Common Voice that make up a split."""
    names = [split] if split else [name for name in COMMON_VOICE_SPLITS if (place / f"{name}.tsv").is_file()]
    tables = [place / f"{name}.tsv" for name in names or ["validated"]]
    for table in tables:
        if not table.is_file():
            there = ", ".join(sorted(path.stem for path in place.glob("*.tsv"))) or "none"
            raise FileNotFoundError(f"There is no {table}: choose a split among {there}.")
    return tables


def _clips(table: Path) -> Iterator[tuple[int, dict[str, str]]]:
    return read_rows(table, ("path", "sentence"), filled=("path",), quoted=False)


def _clip_seconds(durations: Path, table: Path) -> dict[str, float]:
    """The lengths of a list's clips in seconds, as far as a release of Common Voice states them (in milliseconds)."""
    if not durations.is_file():
        return {}
    clips = {row["path"] for _, row in _clips(table)}
    return {
        row["clip"]: number_in(durations, number, row, "duration[ms]") / 1000
        for number, row in read_rows(durations, ("clip", "duration[ms]"), quoted=False)
        if row["clip"] in clips
    }


def _without_region(locale: str) -> str:
    return locale.partition("-")[0]
