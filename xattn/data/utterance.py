"""An utterance: one recording with its texts."""

import hashlib
from dataclasses import dataclass, field
from os import PathLike, fspath
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

from xattn.audio import SAMPLE_RATE, Recording, load_audio, seconds_of

DURATION_TOLERANCE = 0.05  # seconds by which a manifest and the audio may disagree
ID_BYTES = 200  # of UTF-8: file names may have 255, and those made from an id add an extension and a random part


class Word(NamedTuple):
    """A spoken word with its start and end in seconds from the start of the audio."""

    word: str
    start: float
    end: float


@dataclass(frozen=True)
class Utterance:
    """One recording and its texts. The audio stays on disk until `audio` is called, unless `samples` hold it.

    duration: in seconds; snr: in dB.
    target_language: the language of `translation`, empty if the corpus does not say.
    sha256: hash of the audio's 16-bit little-endian samples, empty if unknown.
    words: the spoken words with their times, if they are known.
    manifest, row: the corpus that the utterance belongs to and its row there (the header is row 1).
    samples: mono float32 at 16 kHz, for a recording in memory.
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

    def __post_init__(self):
        check_id(self.id)

    def audio(self) -> np.ndarray:
        """Return float32 samples at 16 kHz, shape (samples,).

        Raises:
            ValueError: see `load_audio`; or the audio of a corpus is not at 16 kHz, or its length or hash disagrees
                with the manifest.
        """
        if self.samples is not None:
            return self.samples
        if self.manifest is None:
            return load_audio(self.audio_path)
        where = f"{self.manifest} row {self.row} (id {self.id})"
        recording = self._checked_recording(where)
        try:
            return load_audio(recording)
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
            samples, rate = soundfile.read(self.audio_path, dtype="int16")
        except soundfile.LibsndfileError as error:
            raise ValueError(f"{where}: {self.audio_path} is damaged ({error}): restore the file.") from error
        if hash_samples(samples) != self.sha256:
            raise ValueError(
                f"{where}: {self.audio_path} is not the audio that the manifest describes (its SHA-256 differs): "
                "restore the file or correct the column 'sha256'."
            )
        return rate, samples


def utterance_from_file(path: str | Path, language: str, transcript: str = "") -> Utterance:
    """Make an utterance from a recording of any format and rate; its id is the file's name without extension.

    FileNotFoundError, ValueError: see `load_audio`.
    """
    path = Path(path)
    return Utterance(path.stem, path, language, seconds_of(path), transcript=transcript)


def utterance_from_recording(audio: Recording, rate: int | None = None, language: str = "") -> Utterance:
    """Make an utterance, with its samples in memory, from anything that `load_audio` accepts.

    Its id is the file's name without extension or, for other recordings, a hash of the samples.
    """
    samples = load_audio(audio, rate)
    seconds = samples.size / SAMPLE_RATE
    if isinstance(audio, str | PathLike):
        path = Path(fspath(audio))
        return Utterance(path.stem, path, language, seconds, samples=samples)
    name = f"recording-{hashlib.sha256(samples.tobytes()).hexdigest()[:8]}"
    return Utterance(name, None, language, seconds, samples=samples)


def check_id(id: str, where: str = "") -> None:
    """ValueError, starting with `where`: an id is not safe as a part of file names."""
    try:
        fits = len(id.encode()) <= ID_BYTES
    except UnicodeEncodeError:  # a file name that is not valid text
        fits = False
    if not fits or id in ("", ".", "..") or any(character in "/\\" or ord(character) < 32 for character in id):
        raise ValueError(
            f"{where}The utterance id {id!r} cannot be part of a file name: choose one of at most {ID_BYTES} bytes "
            "without slashes, backslashes and control characters."
        )


def audio_header(path: Path, where: str):
    """Return the header that soundfile reads. ValueError, starting with `where`: it cannot be read."""
    try:
        return soundfile.info(path)
    except soundfile.LibsndfileError as error:
        raise ValueError(f"{where}: {path} cannot be read: convert it to WAV or FLAC at {SAMPLE_RATE} Hz.") from error


def hash_samples(samples: np.ndarray) -> str:
    """SHA-256 of 16-bit samples in little-endian order."""
    return hashlib.sha256(samples.astype("<i2").tobytes()).hexdigest()
