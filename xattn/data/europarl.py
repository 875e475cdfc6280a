"""Cut EuroParl-ST 1.1 into the paper's test sets: `python -m xattn.data.europarl ROOT FOLDER`.

ROOT is the unpacked archive: `<language>/audios/<speech>.m4a` and `<source>/<target>/<split>/` with `segments.lst`
(lines of `<speech> <start> <end>`, in seconds) and the texts `segments.<source>` and `segments.<target>`, line by line.
FOLDER becomes a corpus with a manifest; `utterances_from_europarl` reads ROOT itself. The paper's en and en-it are
en/it/test, its it and it-en are it/en/test.

EuroParl-ST (Iranzo-Sánchez et al. 2020, arXiv 1911.03167) is licensed CC BY-NC 4.0, and so are its segments.
"""

import argparse
import hashlib
import math
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from xattn.audio import SAMPLE_RATE, load_audio, seconds_of
from xattn.data.manifest import claim, utterances_from_manifest, write_audio, write_manifest, written_audio
from xattn.data.utterance import Utterance, check_id, check_unique, located, nothing_selected
from xattn.files import hash_file, write_whole

SOURCE = "EuroParl-ST 1.1"
LICENCE = "CC BY-NC 4.0"
PAIRS = (("en", "it"), ("it", "en"))  # source and target
SPLITS = ("train", "dev", "test")
SEGMENTS = {("en", "test"): 1130, ("it", "test"): 1686}  # in the paper
OVERHANG = 0.5  # seconds by which a segment may end after its speech and is cut short: our choice
LISTED = 10  # defects listed in one error


@dataclass(frozen=True)
class Segment:
    """A line of segments.lst with its texts.

    start, end: in seconds; where: the file and the line; audio: the path in the corpus.
    """

    id: str
    speech: Path
    start: float
    end: float
    language: str
    target_language: str
    split: str
    transcript: str
    translation: str
    where: str

    @property
    def audio(self) -> str:
        return f"audio/{self.language}/{self.split}/{self.id}.flac"


@dataclass
class Defects:
    """Sentences about a copy of EuroParl-ST.

    missing: what the archive has but the copy lacks; unusable: segments of the archive that cannot be used.
    """

    missing: list[str] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)

    def refuse(self, partial: bool) -> None:
        """Raise ValueError if something is missing and `partial` does not allow it."""
        if self.missing and not partial:
            listed, more = self.missing[:LISTED], len(self.missing) - LISTED
            raise ValueError(
                "\n".join(listed + [f"There are {more} more such defects."] * (more > 0))
                + "\nUnpack the archive again, or continue without them with --partial (partial=True); the numbers are "
                "then not those of the paper's test sets."
            )


def prepare(
    root: str | Path, folder: str | Path, *, splits: Sequence[str] = ("test",), partial: bool = False
) -> list[Utterance]:
    """Cut EuroParl-ST into a corpus: 16-bit FLAC at 16 kHz, manifest.csv, a card and the SHA-256 of every file used.

    Speeches whose segments are written are not decoded again, so an interrupted call resumes. The id `<speech>_<n>` is
    the n-th segment of its speech in segments.lst. Segments without transcript or translation, and segments that are
    silent or shorter than a window, are skipped and reported.

    Args:
        root: the folder that holds `en` and `it`.
        folder: for the corpus.
        splits: the parts to include, of "train", "dev" and "test".
        partial: whether to continue without what is missing or damaged.

    Raises:
        ValueError: speeches or lines are missing or damaged (segments that can be cut are kept), or the folder holds
            another corpus.
        OSError: there is too little disk space.
    """
    root, folder, defects = Path(root), Path(folder), Defects()
    segments = [
        segment
        for split in splits
        for source, target in PAIRS
        for segment in read_segments(root, source, target, split, defects, SEGMENTS.get((source, split)))
    ]
    defects.refuse(partial)
    claim(folder, SOURCE)
    speeches: dict[Path, list[Segment]] = {}
    for segment in segments:
        speeches.setdefault(segment.speech, []).append(segment)
    digests = {speech: hash_file(speech) for speech in speeches}
    origins = {s: f"{SOURCE} {digests[s.speech]} {s.start} {s.end}" for s in segments}
    written = {s: written_audio(folder / s.audio, origins[s]) for s in segments}
    waiting = {speech: own for speech, own in speeches.items() if not all(written[s] for s in own)}
    _check_room(folder, sum(s.end - s.start for own in waiting.values() for s in own))
    started = time.monotonic()
    for number, (speech, own) in enumerate(waiting.items(), start=1):
        cut(own, folder, origins, defects)
        written |= {s: written_audio(folder / s.audio, origins[s]) for s in own}
        left = (time.monotonic() - started) / number * (len(waiting) - number)
        print(f"{speech.name} {number}/{len(waiting)}: {len(own)} segments, {left:.0f} s left", flush=True)
    defects.refuse(partial)
    rows = _rows(written, folder, defects)
    if not rows:
        raise ValueError(f"{root} holds no usable segment: give the folder that contains en and it.")
    lists = [
        root / source / target / split / f"segments.{kind}"
        for split in splits
        for source, target in PAIRS
        for kind in ("lst", source, target)
    ]
    digests |= {file: hash_file(file) for file in lists if file.is_file()}
    sums = "".join(f"{digest}  {file.relative_to(root).as_posix()}\n" for file, digest in sorted(digests.items()))
    card = _card(rows, hashlib.sha256(sums.encode()).hexdigest(), defects)
    write_manifest(folder, rows)
    write_whole(folder / "SHA256SUMS", sums.encode())
    write_whole(folder / "README.md", card.encode())
    print(card, flush=True)
    return utterances_from_manifest(folder)


def utterances_from_europarl(
    root: str | Path, *, language: str | None = None, split: str | None = None
) -> list[Utterance]:
    """Make an utterance from each segment of EuroParl-ST as it is distributed, in the order of segments.lst.

    Speeches are decoded when an utterance's `audio` is called. `prepare` cuts them beforehand and checks that the
    paper's test sets are complete. If the archive has the paper's directions, en-it and it-en, only these are read.
    Segments without transcript or translation are skipped and counted in a printed line.

    Args:
        root: the unpacked archive, or its folder of one direction or split, such as `en/de` or `en/de/dev`.
        language: keep only segments of speeches in this language.
        split: keep only this part, such as "test".

    Raises:
        FileNotFoundError: there is no segments.lst.
        ValueError: a file or line is missing or damaged, a language has several target languages, or no segment has
            this language and split.
    """
    root, defects = Path(root), Defects()
    files = [file.absolute() for depth in range(5) for file in sorted(root.glob("*/" * depth + "segments.lst"))]
    if not files:
        raise FileNotFoundError(f"There is no segments.lst in {root}: give the folder of {SOURCE}.")
    parts: dict[tuple[str, str, str], Path] = {}  # the archive of each source, target and split
    for file in files:
        part, archive = (file.parents[2].name, file.parents[1].name, file.parents[0].name), file.parents[3]
        if part in parts:
            raise ValueError(f"{root} holds two copies of {SOURCE}, {parts[part]} and {archive}: give one of them.")
        parts[part] = archive
    if any((source, target) in PAIRS for source, target, _ in parts):
        parts = {part: archive for part, archive in parts.items() if part[:2] in PAIRS}
    selected = [part for part in parts if language in (None, part[0]) and split in (None, part[2])]
    if not selected:
        raise nothing_selected(root, {(source, own) for source, _, own in parts}, language=language, split=split)
    targets: dict[str, set[str]] = {}
    for source, target, _ in selected:
        targets.setdefault(source, set()).add(target)
    for source, found in targets.items():
        if len(found) > 1:
            raise ValueError(
                f"{root} has translations from {source} into {', '.join(sorted(found))}: give the folder of one "
                f"direction, such as {source}/{min(found)}."
            )
    for part in selected:
        for text in part[:2]:
            file = parts[part].joinpath(*part, f"segments.{text}")
            if not file.is_file():
                raise FileNotFoundError(f"There is no {file}: unpack the archive again.")
    segments = [segment for part in selected for segment in read_segments(parts[part], *part, defects)]
    if defects.missing:
        first, more = defects.missing[0].removesuffix("."), len(defects.missing) - 1
        raise ValueError(f"{first}{f' (and there are {more:,} more defects)' * (more > 0)}; unpack the archive again.")
    if defects.unusable:
        print(f"{root}: segments skipped without transcript or translation: {len(defects.unusable):,}.", flush=True)
    utterances = [*_uncut(segments)]
    check_unique(utterances)
    return utterances


def _uncut(segments: Sequence[Segment]) -> Iterator[Utterance]:
    """An utterance for each segment, which is a part of its speech."""
    seconds: dict[Path, float] = {}
    for segment in segments:
        if segment.speech not in seconds:
            with located(segment.where):
                seconds[segment.speech] = seconds_of(segment.speech)
        last = min(segment.end, seconds[segment.speech])
        if segment.end > last + OVERHANG or segment.start >= last:
            raise ValueError(_too_late(segment, seconds[segment.speech])[:-1] + ": unpack the archive again.")
        yield Utterance(
            id=segment.id,
            audio_path=segment.speech,
            language=segment.language,
            duration=last - segment.start,
            split=segment.split,
            transcript=segment.transcript,
            translation=segment.translation,
            target_language=segment.target_language,
            start=segment.start,
            end=segment.end,
        )


def read_segments(
    root: Path, source: str, target: str, split: str, defects: Defects, expected: int | None = None
) -> list[Segment]:
    """The segments of one direction whose speeches and texts exist, in the order of segments.lst.

    expected: how many lines the complete list has; None if that is unknown.
    """
    folder = root / source / target / split
    files = [folder / f"segments.{kind}" for kind in ("lst", source, target)]
    for file in files:
        if not file.is_file():
            defects.missing.append(f"There is no {file}: give the folder of {SOURCE} that contains en and it.")
            return []
    lines, *texts = map(_lines, files)
    for file, own in zip(files[1:], texts, strict=True):
        if len(own) != len(lines):
            defects.missing.append(
                f"{file} has {len(own):,} lines, but segments.lst has {len(lines):,}, so it is unknown which belong "
                "together."
            )
            return []
    if expected is not None and len(lines) != expected:
        defects.missing.append(f"{files[0]} lists {len(lines):,} segments, but {SOURCE} has {expected:,}.")
    segments, seen, absent = [], Counter(), set()
    for number, (line, transcript, translation) in enumerate(zip(lines, *texts, strict=True), start=1):
        where, name = f"{files[0]} line {number}", (line.split() or [""])[0]
        seen[name] += 1
        try:
            start, end = _times(line)
        except ValueError as error:
            defects.missing.append(f"{where} {error}")
            continue
        speech = root / source / "audios" / f"{name}.m4a"
        if not speech.is_file():
            if name not in absent:
                defects.missing.append(f"{where} names the speech {speech}, which is missing.")
            absent.add(name)
        elif not (transcript and translation):
            kind = "translation" if transcript else "transcript"
            defects.unusable.append(f"{where} has no {kind}, so the segment is skipped.")
        else:
            # Names usually start with the language; otherwise those of two languages could be equal.
            id = f"{'' if name.startswith(f'{source}.') else f'{source}.'}{name}_{seen[name]}"
            segments.append(Segment(id, speech, start, end, source, target, split, transcript, translation, where))
    return segments


def cut(segments: list[Segment], folder: Path, origins: dict[Segment, str], defects: Defects) -> None:
    """Decode the speech of these segments once and write each segment."""
    speech = segments[0].speech
    try:
        audio = load_audio(speech)
    except ValueError as error:
        defects.missing.append(f"{segments[0].where}: {error}")
        return
    seconds = audio.size / SAMPLE_RATE
    for segment in segments:
        samples = audio[round(segment.start * SAMPLE_RATE) : round(segment.end * SAMPLE_RATE)]
        if segment.end > seconds + OVERHANG or not samples.size:
            defects.missing.append(_too_late(segment, seconds))
        else:
            write_audio(folder / segment.audio, samples, origins[segment])


def _too_late(segment: Segment, seconds: float) -> str:
    return f"{segment.where} ends at {segment.end:g} s, but {segment.speech} lasts only {seconds:.3f} s."


def _times(line: str) -> tuple[float, float]:
    """Start and end from a line of segments.lst. ValueError: the rest of a sentence that says what is wrong."""
    try:
        name, start, end = line.split()
        start, end = float(start), float(end)
        check_id(name)
    except ValueError as error:
        raise ValueError(f"is {line!r}, but a speech, its start and its end are needed.") from error
    if not 0 <= start < end < math.inf:
        raise ValueError(f"goes from {start:g} to {end:g} s, which is not a part of a speech.")
    return start, end


def _lines(file: Path) -> list[str]:
    try:
        # splitlines() would also split at characters that texts can contain, such as U+2028.
        *lines, last = file.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not encoded in UTF-8: unpack the archive again.") from error
    return [line.strip() for line in lines + [last] * bool(last)]


def _check_room(folder: Path, seconds: float) -> None:
    needed, free = 2 * SAMPLE_RATE * seconds, shutil.disk_usage(folder).free  # bytes, at worst
    if needed > free:
        raise OSError(
            f"The segments need up to {needed / 1e6:,.1f} MB, but {folder} has {free / 1e6:,.1f} MB: free some space."
        )


def _rows(written: dict[Segment, dict | None], folder: Path, defects: Defects) -> list[dict[str, str | float]]:
    """The manifest rows of written segments, without those whose audio cannot be used."""
    rows = []
    for segment, audio in written.items():
        if audio is None:  # `cut` has reported it
            continue
        try:
            load_audio(folder / segment.audio)
        except ValueError as error:
            defects.unusable.append(f"{segment.where}: {error} The segment is skipped.")
            continue
        rows.append(
            {name: getattr(segment, name) for name in ("id", "split", "language", "target_language", "audio")}
            | audio
            | {name: getattr(segment, name) for name in ("transcript", "translation", "start", "end")}
            | {"source": SOURCE}
        )
    return rows


def _card(rows: list[dict[str, str | float]], digest: str, defects: Defects) -> str:
    segments, seconds = Counter(), Counter()
    for row in rows:
        segments[row["language"], row["split"]] += 1
        seconds[row["language"], row["split"]] += row["duration"]
    counted = [
        f"- {language} {split}: {number:,} segments, {seconds[language, split] / 3600:.2f} hours"
        for (language, split), number in segments.items()
    ]
    reported = [f"- {sentence}" for sentence in defects.missing + defects.unusable]
    return "\n".join(
        [
            f"# Segments of {SOURCE}",
            "",
            "Cut by `python -m xattn.data.europarl` from the corpus of Iranzo-Sánchez et al. (2020), *Europarl-ST: A",
            "Multilingual Corpus for Speech Translation of Parliamentary Debates*, arXiv 1911.03167.",
            f"Licence: {LICENCE}.",
            "",
            *counted,
            *reported,
            "",
            "`SHA256SUMS` lists the files they were made from (`sha256sum -c` in their folder checks them). Its own",
            f"SHA-256 is `{digest}`.",
            "",
        ]
    )


def main() -> int:
    """Run the command. Exit code 0: the corpus is written; 1: it is not; 130: interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m xattn.data.europarl", description=f"Cut {SOURCE} ({LICENCE}) into a corpus of xattn."
    )
    parser.add_argument("root", type=Path, help="the folder of EuroParl-ST that contains en and it")
    parser.add_argument("folder", type=Path, help="for the corpus")
    parser.add_argument(
        "--splits", nargs="+", choices=SPLITS, default=["test"], help="the parts to include; default: test"
    )
    parser.add_argument("--partial", action="store_true", help="continue without what is missing or damaged")
    arguments = parser.parse_args()
    try:
        prepare(arguments.root, arguments.folder, splits=arguments.splits, partial=arguments.partial)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted. Run the same command again to resume.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
