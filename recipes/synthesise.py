"""Speech with exact word times from eSpeak NG, using the C library in the package espeakng-loader."""

import os
import pickle
import string
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from math import gcd
from pathlib import Path

import espeakng_loader
import numpy as np
from scipy.signal import resample_poly

from recipes import espeak
from xattn.audio import SAMPLE_RATE

# Accent and speaker variant, by file name. Dev and test use only the held-out speakers, training only the others.
VOICES = {
    "en": (
        "gmw/en-US+m1",
        "gmw/en-US+f2",
        "gmw/en-US+m7",
        "gmw/en-US+shelby",
        "gmw/en-US-nyc+m3",
        "gmw/en-US-nyc+f4",
        "gmw/en-GB-x-rp+m2",
        "gmw/en-GB-x-rp+f1",
        "gmw/en-GB-x-rp+robert",
        "gmw/en-GB-scotland+m4",
        "gmw/en-GB-scotland+f3",
        "gmw/en-GB-x-gbclan+m5",
        "gmw/en-GB-x-gbclan+f5",
        "gmw/en-GB-x-gbcwmd+m8",
        "gmw/en-GB-x-gbcwmd+aunty",
        "gmw/en-029+m6",
        "gmw/en-029+steph",
        "gmw/en+victor",
        "gmw/en+linda",
        "gmw/en+adam",
    ),
    "it": tuple(
        f"roa/it+{variant}"
        for variant in (
            *("m1", "m2", "m3", "m4", "m5", "m6", "m7", "m8", "f1", "f2", "f3", "f4", "f5"),
            *("shelby", "robert", "aunty", "steph", "victor", "linda", "adam"),
        )
    ),
}
HELD_OUT_VOICES = {
    "en": ("gmw/en-US+Andy", "gmw/en-GB-x-rp+Annie", "gmw/en-GB-scotland+Michael", "gmw/en+belinda"),
    "it": ("roa/it+Andy", "roa/it+Annie", "roa/it+Michael", "roa/it+belinda"),
}

PUNCTUATION = string.punctuation + "«»“”‘’…–—"
# Without it, eSpeak NG treats frequent pairs ("of the", "did not") as one word and reports no time for the second.
WORD_JOINER = "\u2060"


@dataclass(frozen=True)
class Word:
    """A word of a transcript, without punctuation, with its start and end in seconds."""

    text: str
    start: float
    end: float


def speak(text: str, voice: str, rate: int, pitch: int, seed: int) -> tuple[np.ndarray, list[Word]]:
    """Synthesise a text; the same arguments always give the same samples.

    A word starts at eSpeak NG's word event. It ends where the next word starts, or earlier if a pause precedes that.

    Args:
        text: words separated by single spaces.
        voice: file name of a voice with its variant, such as "gmw/en-US+m3".
        rate: words per minute.
        pitch: 0 to 100; 50 is the voice's default.
        seed: of eSpeak NG's random numbers, at least 1.

    Returns:
        float64 samples at 16 kHz in [-1, 1], shape (samples,), and one Word for each word of the text.

    Raises:
        ValueError: the voice does not exist, a word is only punctuation, or eSpeak NG reports no time for a word.
    """
    _check_voice(voice)
    words = text.split()
    labels = [word.strip(PUNCTUATION) for word in words]
    if not all(labels):
        raise ValueError(f"A word of {text!r} consists only of punctuation: attach it to its neighbour.")
    spoken = f" {WORD_JOINER}".join(words)
    pcm, events, file_rate = _request(text=spoken, voice=voice, rate=rate, pitch=pitch, seed=seed)
    samples = np.frombuffer(pcm, dtype=np.int16) / 2**15
    divisor = gcd(SAMPLE_RATE, file_rate)
    samples = resample_poly(samples, SAMPLE_RATE // divisor, file_rate // divisor)
    spans = _word_spans(spoken, events)
    if missing := [label for label, span in zip(labels, spans, strict=True) if span is None]:
        raise ValueError(f"eSpeak NG reports no time for {missing[0]!r} in {text!r} ({voice}): reword the sentence.")
    return samples, [Word(label, *span) for label, span in zip(labels, spans, strict=True)]


@cache
def _server(process: int) -> tuple[subprocess.Popen, int]:
    """Start a server (recipes/espeak.py) for this process only; return it and the rate of its samples in Hz."""
    # -P keeps the files beside espeak.py from shadowing modules of the standard library.
    command = [sys.executable, "-P", espeak.__file__]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    return server, pickle.load(server.stdout)


@cache
def _check_voice(voice: str) -> None:
    # If a variant does not exist, eSpeak NG uses its default voice without an error.
    data = Path(espeakng_loader.get_data_path())
    accent, _, variant = voice.partition("+")
    if not (data / "lang" / accent).is_file() or not (data / "voices" / "!v" / variant).is_file():
        raise ValueError(f"eSpeak NG has no voice {voice!r}: join a file of lang/ and one of voices/!v/ by '+'.")


def _request(**request) -> tuple[bytes, list, int]:
    """Return the samples and events of `espeak.synthesise`, and the rate in Hz."""
    server, file_rate = _server(os.getpid())
    pickle.dump(request, server.stdin)
    server.stdin.flush()
    answer = pickle.load(server.stdout)
    if isinstance(answer, ValueError):
        raise answer
    return *answer, file_rate


def _word_spans(text: str, events: list) -> list[tuple[float, float] | None]:
    """Return start and end (seconds) of each word of the text, or None for a word without a word event."""
    spans: list[tuple[float, float] | None] = [None] * len(text.split())
    current, start, pause = None, 0, None
    for kind, position, ms, phoneme in events:
        if kind == espeak.PHONEME_EVENT:
            # Names of pauses and of the end of speech start with "_" or are empty.
            silent = phoneme.startswith(b"_") or not phoneme
            pause = (ms if pause is None else pause) if silent else None
        elif kind == espeak.WORD_EVENT and (word := text.count(" ", 0, position)) != current:
            if current is not None:
                spans[current] = (start / 1000, (ms if pause is None else pause) / 1000)
            current, start, pause = word, ms, None
    if current is not None and pause is not None:
        spans[current] = (start / 1000, pause / 1000)
    return spans
