"""An utterance: one recording with its texts."""

import hashlib
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from numbers import Integral
from os import PathLike
from pathlib import Path
from typing import NamedTuple
from unicodedata import normalize

import numpy as np
import soundfile

from xattn.audio import SAMPLE_RATE, Recording, beside_notebook, check_file, is_placeholder, load_audio, seconds_of

DURATION_TOLERANCE = 0.05  # seconds by which a manifest and the audio may disagree
ID_BYTES = 200  # of UTF-8: file names may have 255, and those made from an id add an extension and a random part
UNSAFE_ID = re.compile(r"[/\\\x00-\x1f\ud800-\udfff]|\A\.{0,2}\Z")  # surrogates: file names that are not valid text


class Word(NamedTuple):
    """A spoken word with its start and end in seconds from the start of the audio."""

    word: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Utterance:
    """One recording and its texts. The audio stays on disk until `audio` is called, unless `samples` hold it.

    duration: in seconds, NaN if the recording cannot be read; snr: in dB.
    target_language: the language of `translation`, empty if the corpus does not say.
    sha256: hash of the audio's 16-bit little-endian samples, empty if unknown.
    words: the spoken words with their times, if they are known.
    manifest, row: the corpus that the utterance belongs to and its row there (the header is row 1).
    samples: mono float32 at 16 kHz, for a recording in memory.
    start, end: the part of the file at `audio_path` that is the utterance, in seconds; `end` is None for a whole file.
    phones: the phones with their times, if they are known.
    channel: the channel of the file that is the utterance, counted from 0; None for the average of all.
    """

    id: str
    audio_path: Path | None
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
    samples: np.ndarray | None = field(default=None, repr=False, compare=False)
    start: float = 0.0
    end: float | None = None
    phones: tuple[Word, ...] = ()
    channel: int | None = None

    def __post_init__(self):
        check_id(self.id)
        if self.channel is None:
            return
        if not isinstance(self.channel, Integral) or isinstance(self.channel, bool) or self.channel < 0:
            raise ValueError(
                f"The channel of {self.audio_path} is {self.channel!r}: give its number, counted from 0, or None for "
                "the average of all."
            )
        object.__setattr__(self, "channel", int(self.channel))  # numpy's integers are not JSON values, which keys need

    def audio(self) -> np.ndarray:
        """Return float32 samples at 16 kHz, shape (samples,).

        Raises:
            ValueError: see `load_audio`; or the audio of a corpus is not at 16 kHz, or its length or hash disagrees
                with the manifest.
        """
        if self.samples is not None:
            return self.samples
        if self.end is not None:
            return _part_of(self.audio_path, self.start, self.end, self.channel)
        if self.manifest is None:
            return load_audio(self.audio_path, channel=self.channel)
        where = f"{self.manifest} row {self.row} (id {self.id})"
        recording = self._checked_recording(where)
        try:
            return load_audio(recording, channel=self.channel)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def text(self, direction: str) -> str:
        """Return the transcript for a direction such as "en", or the translation for "en-it"; empty if unknown.

        ValueError: the utterance is in another language, or translated into another one.
        """
        source, _, target = direction.partition("-")
        if source != self.language:
            raise ValueError(
                f"Utterance {self.id} is spoken in {self.language!r} and has no reference for the direction "
                f"{direction!r}: choose a direction that starts with {self.language!r}."
            )
        if target and self.target_language and target != self.target_language:
            raise ValueError(
                f"Utterance {self.id} is translated into {self.target_language!r} and has no reference for the "
                f"direction {direction!r}: use the direction '{self.language}-{self.target_language}'."
            )
        return self.translation if target else self.transcript

    def reference(self, direction: str) -> str:
        """Return the text that a model should write: the transcript for "en", the translation for "en-it".

        ValueError: there is no such text, or see `text`.
        """
        text, kind = self.text(direction), "translation" if "-" in direction else "transcript"
        if not text:
            raise ValueError(
                f"Utterance {self.id} has no {kind}, which the direction {direction!r} needs: add it first."
            )
        return text

    def _checked_recording(self, where: str) -> Recording:
        """What `load_audio` is to read: the file or, if its hash had to be checked, the samples read for that."""
        header = audio_header(self.audio_path, where)
        if header.samplerate != SAMPLE_RATE:
            raise ValueError(
                f"{where}: {self.audio_path} is at {header.samplerate} Hz, but a corpus needs {SAMPLE_RATE} Hz: "
                "resample it."
            )
        if abs(header.duration - self.duration) > DURATION_TOLERANCE:
            raise ValueError(
                f"{where}: {self.audio_path} lasts {header.duration:.3f} s, but the manifest says "
                f"{self.duration:.3f} s: restore the file or correct the column 'duration'."
            )
        if not (self.sha256 and header.subtype == "PCM_16"):
            return self.audio_path
        try:
            if is_placeholder(header.frames, header.frames / header.samplerate):  # soundfile needs the true length
                samples, rate = (2**15 * load_audio(self.audio_path)).astype(np.int16), SAMPLE_RATE
            else:
                samples, rate = soundfile.read(self.audio_path, dtype="int16")
        except soundfile.LibsndfileError as error:
            raise ValueError(f"{where}: {self.audio_path} is damaged ({error}): restore the file.") from error
        if hash_samples(samples) != self.sha256:
            raise ValueError(
                f"{where}: {self.audio_path} is not the audio that the manifest describes (its SHA-256 differs): "
                "restore the file or correct the column 'sha256'."
            )
        return rate, samples


def utterance_from_file(path: str | Path, language: str, transcript: str = "", channel: int | None = None) -> Utterance:
    """Make an utterance from a recording of any format and rate; its id is the file's name without extension.

    channel: see `load_audio`. FileNotFoundError, ValueError: see `load_audio`.
    """
    path = Path(beside_notebook(path))
    return Utterance(path.stem, path, language, seconds_of(path), transcript=transcript, channel=channel)


def listed_seconds(path: Path) -> float:
    """`seconds_of` for a list of recordings: NaN for one that cannot be read, which runs leave out and report.

    FileNotFoundError: there is no such file.
    """
    try:
        return seconds_of(path)
    except FileNotFoundError:
        raise
    except (OSError, ValueError):
        return math.nan


def utterance_from_recording(
    audio: Recording, rate: int | None = None, language: str = "", channel: int | None = None
) -> Utterance:
    """Make an utterance, with its samples in memory, from anything that `load_audio` accepts.

    Its id is the file's name without extension or, for other recordings, a hash of the samples.
    """
    if isinstance(audio, str | PathLike):
        audio = beside_notebook(audio)
    samples = load_audio(audio, rate, channel)
    seconds = samples.size / SAMPLE_RATE
    if isinstance(audio, str):
        path = Path(audio)
        return Utterance(path.stem, path, language, seconds, samples=samples)
    name = f"recording-{hashlib.sha256(samples.tobytes()).hexdigest()[:8]}"
    return Utterance(name, None, language, seconds, samples=samples)


def check_id(id: str, where: str = "") -> None:
    """ValueError, starting with `where`: an id is not safe as a part of file names."""
    if UNSAFE_ID.search(id) or len(id.encode()) > ID_BYTES:
        raise ValueError(
            f"{where}The utterance id {id!r} cannot be part of a file name: choose one of at most {ID_BYTES} bytes "
            "without slashes, backslashes and control characters."
        )


def folded(name: str) -> str:
    """A name without case and in Unicode NFC: some file systems take two names for one if these are equal."""
    return normalize("NFC", normalize("NFC", name).casefold())


def check_unique(utterances: Iterable[Utterance]) -> None:
    """ValueError: the ids of two utterances are equal or differ only in case or Unicode normalisation."""
    seen: dict[str, Utterance] = {}
    for utterance in utterances:
        first = seen.setdefault(folded(utterance.id), utterance)
        if first is not utterance:
            raise ValueError(
                f"The ids {first.id!r} of {first.audio_path} and {utterance.id!r} of {utterance.audio_path} are equal "
                "without case and in Unicode NFC: rename one, or load a folder that holds only one of them."
            )


def nothing_selected(where: Path, present: Iterable[tuple[str, str]], **wanted: str | None) -> ValueError:
    """The error for a corpus that has no utterance of the wanted language and split.

    present: the (language, split) of all utterances.
    """
    asked = "".join(f" {name} {value!r}" for name, value in wanted.items() if value is not None)
    choices = ", ".join(sorted({f"{language} {split}".strip() for language, split in present})) or "none"
    return ValueError(f"{where} has no utterance{' of' * bool(asked)}{asked}: choose among {choices}.")


def audio_header(path: Path, where: str):
    """Return the header that soundfile reads, with the duration that `seconds_of` finds.

    OSError or ValueError, starting with `where`: the file cannot be opened or read, or is incomplete.
    """
    try:
        with located(where):
            check_file(path)
            header = soundfile.info(path)
            header.duration = seconds_of(path)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{where}: {path} cannot be read: convert it to WAV or FLAC at {SAMPLE_RATE} Hz.") from error
    return header


@contextmanager
def located(where: str) -> Iterator[None]:
    """Put `where` in front of the message of an OSError or ValueError about a recording."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from error


def hash_samples(samples: np.ndarray) -> str:
    """SHA-256 of 16-bit samples in little-endian order."""
    return hashlib.sha256(samples.astype("<i2").tobytes()).hexdigest()


def _part_of(path: Path, start: float, end: float, channel: int | None) -> np.ndarray:
    """Samples of a recording at 16 kHz from `start` to `end` in seconds."""
    samples = _decoded(path, path.stat().st_mtime_ns, channel)[round(start * SAMPLE_RATE) : round(end * SAMPLE_RATE)]
    try:
        return load_audio((SAMPLE_RATE, samples))
    except ValueError as error:
        raise ValueError(f"{path} from {start:g} to {end:g} s: {error}") from error


@lru_cache(maxsize=1)  # the utterances of one recording usually follow each other
def _decoded(path: Path, modified: int, channel: int | None) -> np.ndarray:
    return load_audio(path, channel=channel)
