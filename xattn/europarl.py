"""EuroParl-ST 1.1 as it unpacks, cut into the paper's test sets: `python -m xattn.europarl ROOT FOLDER`.

ROOT holds `<language>/audios/<speech>.m4a` and `<source>/<target>/<split>/` with `segments.lst` (lines of
`<speech> <start> <end>`, in seconds) and, line by line with it, `segments.<source>` and `segments.<target>`. FOLDER
becomes a corpus for `xattn.load_corpus`. The paper's en and en-it are en/it/test, its it and it-en are it/en/test.

EuroParl-ST (Iranzo-Sánchez et al. 2020, arXiv 1911.03167) is licensed CC BY-NC 4.0, and so is what is cut from it.
"""

import argparse
import hashlib
import math
import shutil
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from xattn.audio import SAMPLE_RATE, load_audio
from xattn.corpus import (
    Utterance,
    check_id,
    claim,
    load_corpus,
    write_audio,
    write_manifest,
    written_audio,
)
from xattn.provenance import digest_file
from xattn.store import write_whole

SOURCE = "EuroParl-ST 1.1"
LICENCE = "CC BY-NC 4.0"
PAIRS = (("en", "it"), ("it", "en"))  # source and target
SPLITS = ("train", "dev", "test")
SEGMENTS = {("en", "test"): 1130, ("it", "test"): 1686}  # in the paper
OVERHANG = 0.5  # seconds by which a segment may end after its speech, to be cut short there: our choice
LISTED = 10  # defects told in one error


@dataclass(frozen=True)
class Segment:
    """A line of segments.lst with its texts.

    `start` and `end` are in seconds, `where` names the file and the line, `audio` is the path in the corpus.
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

    missing: what the archive has and the copy has not; unusable: segments of the archive that no model can take.
    """

    missing: list[str] = field(default_factory=list)
    unusable: list[str] = field(default_factory=list)

    def refuse(self, partial: bool) -> None:
        """ValueError: something is missing and `partial` does not allow it."""
        if self.missing and not partial:
            told, more = self.missing[:LISTED], len(self.missing) - LISTED
            raise ValueError(
                "\n".join(told + [f"There are {more} more such defects."] * (more > 0))
                + "\nUnpack the archive again, or go on without them by --partial (partial=True); the numbers then are "
                "not of the paper's test sets."
            )


def prepare(
    root: str | Path, folder: str | Path, *, splits: Sequence[str] = ("test",), partial: bool = False
) -> list[Utterance]:
    """Cut EuroParl-ST into a corpus: 16-bit FLAC at 16 kHz, manifest.csv, a card and the SHA-256 of every file used.

    Speeches whose segments are written are not decoded again, so an interrupted call goes on where it was. The id
    `<speech>_<n>` is the n-th segment of its speech in segments.lst. Segments without transcript or translation, or
    whose audio is silent or shorter than a window, are left out and told.

    Args:
        root: the folder that holds `en` and `it`.
        folder: of the corpus.
        splits: of "train", "dev" and "test", those that the manifest is to hold.
        partial: whether to go on without what is missing or damaged.

    Raises:
        ValueError: speeches or lines are missing or damaged (what can be cut is kept), or the folder holds a corpus
            from elsewhere.
        OSError: there is too little room.
    """
    root, folder, defects = Path(root), Path(folder), Defects()
    segments = [s for split in splits for pair in PAIRS for s in read_segments(root, *pair, split, defects)]
    defects.refuse(partial)
    claim(folder, SOURCE)
    speeches: dict[Path, list[Segment]] = {}
    for segment in segments:
        speeches.setdefault(segment.speech, []).append(segment)
    digests = {speech: digest_file(speech) for speech in speeches}
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
        raise ValueError(f"{root} holds no segment that can be used: give the folder that holds en and it.")
    lists = [
        root / source / target / split / f"segments.{kind}"
        for split in splits
        for source, target in PAIRS
        for kind in ("lst", source, target)
    ]
    digests |= {file: digest_file(file) for file in lists if file.is_file()}
    sums = "".join(f"{digest}  {file.relative_to(root).as_posix()}\n" for file, digest in sorted(digests.items()))
    card = _card(rows, hashlib.sha256(sums.encode()).hexdigest(), defects)
    write_manifest(folder, rows)
    write_whole(folder / "SHA256SUMS", sums.encode())
    write_whole(folder / "README.md", card.encode())
    print(card, flush=True)
    return load_corpus(folder)


def read_segments(root: Path, source: str, target: str, split: str, defects: Defects) -> list[Segment]:
    """The segments of one direction whose speeches and texts are there, in the order of segments.lst."""
    folder = root / source / target / split
    files = [folder / f"segments.{kind}" for kind in ("lst", source, target)]
    for file in files:
        if not file.is_file():
            defects.missing.append(f"There is no {file}: give the folder of {SOURCE} that holds en and it.")
            return []
    lines, *texts = map(_lines, files)
    for file, own in zip(files[1:], texts, strict=True):
        if len(own) != len(lines):
            defects.missing.append(
                f"{file} has {len(own):,} lines for the {len(lines):,} of segments.lst, so which belong together is "
                "unknown."
            )
            return []
    expected = SEGMENTS.get((source, split), len(lines))
    if len(lines) != expected:
        defects.missing.append(f"{files[0]} lists {len(lines):,} segments where {SOURCE} has {expected:,}.")
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
            defects.unusable.append(f"{where} has no {kind}, so the segment is left out.")
        else:
            # Names start with the language; were there any that do not, those of two languages could be the same.
            id = f"{'' if name.startswith(f'{source}.') else f'{source}.'}{name}_{seen[name]}"
            segments.append(Segment(id, speech, start, end, source, target, split, transcript, translation, where))
    return segments


def cut(segments: list[Segment], folder: Path, origins: dict[Segment, str], defects: Defects) -> None:
    """Decode the speech of these segments once and write each under its origin."""
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
            defects.missing.append(
                f"{segment.where} ends at {segment.end:g} s, but {speech} is over after {seconds:.3f} s."
            )
        else:
            write_audio(folder / segment.audio, samples, origins[segment])


def _times(line: str) -> tuple[float, float]:
    """Start and end in a line of segments.lst. ValueError: it is none, with the rest of a sentence about it."""
    try:
        name, start, end = line.split()
        start, end = float(start), float(end)
        check_id(name)
    except ValueError as error:
        raise ValueError(f"is {line!r} where a speech, its start and its end are needed.") from error
    if not 0 <= start < end < math.inf:
        raise ValueError(f"is from {start:g} to {end:g} s, which is no stretch of a speech.")
    return start, end


def _lines(file: Path) -> list[str]:
    try:
        # Not splitlines(), which also splits at characters that texts may hold, such as U+2028.
        *lines, last = file.read_bytes().decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not encoded in UTF-8: unpack the archive again.") from error
    return [line.strip() for line in lines + [last] * bool(last)]


def _check_room(folder: Path, seconds: float) -> None:
    needed, free = 2 * SAMPLE_RATE * seconds, shutil.disk_usage(folder).free  # bytes, at worst
    if needed > free:
        raise OSError(
            f"The segments need up to {needed / 1e6:,.1f} MB, and {folder} has {free / 1e6:,.1f} MB: make room."
        )


def _rows(written: dict[Segment, dict | None], folder: Path, defects: Defects) -> list[dict[str, str | float]]:
    """The manifest of segments that are written, without those whose audio no model can take."""
    rows = []
    for segment, audio in written.items():
        if audio is None:  # which `cut` has told
            continue
        try:
            load_audio(folder / segment.audio)
        except ValueError as error:
            defects.unusable.append(f"{segment.where}: {error} The segment is left out.")
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
    told = [f"- {sentence}" for sentence in defects.missing + defects.unusable]
    return "\n".join(
        [
            f"# Segments of {SOURCE}",
            "",
            "Cut by `python -m xattn.europarl` from the corpus of Iranzo-Sánchez et al. (2020), *Europarl-ST: A",
            "Multilingual Corpus for Speech Translation of Parliamentary Debates*, arXiv 1911.03167.",
            f"Licence: {LICENCE}.",
            "",
            *counted,
            *told,
            "",
            "`SHA256SUMS` lists the files that these were made of (`sha256sum -c` in their folder compares them); its",
            f"own SHA-256 is `{digest}`.",
            "",
        ]
    )


def main() -> int:
    """Exit code 0: the corpus is written; 1: it is not; 130: interrupted."""
    parser = argparse.ArgumentParser(
        prog="python -m xattn.europarl", description=f"Cut {SOURCE} ({LICENCE}) into a corpus of xattn."
    )
    parser.add_argument("root", type=Path, help="the folder of EuroParl-ST that holds en and it")
    parser.add_argument("folder", type=Path, help="of the corpus to write")
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=["test"], help="what it is to hold; test alone")
    parser.add_argument("--partial", action="store_true", help="go on without what is missing or damaged")
    arguments = parser.parse_args()
    try:
        prepare(arguments.root, arguments.folder, splits=arguments.splits, partial=arguments.partial)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on from here.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
