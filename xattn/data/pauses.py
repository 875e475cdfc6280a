"""Long recordings cut into parts where the sound is quietest."""

from itertools import pairwise

import numpy as np

from xattn.audio import SAMPLE_RATE, Recording
from xattn.data.utterance import Utterance, utterance_from_recording

PAUSE = 0.3  # seconds over which the level is averaged: longer than the closure of a stop, shorter than most pauses
STEP = SAMPLE_RATE // 100  # samples from one possible cut to the next
SHORTEST = 1.0  # seconds of a part


def cut_at_pauses(
    audio: Recording, longest: float = 20.0, *, rate: int | None = None, channel: int | None = None, language: str = ""
) -> list[Utterance]:
    """Cut a recording into parts of at most `longest` seconds, each for one call of `xattn.explain`.

    Each cut is where the sound is quietest over 0.3 s, between half of `longest` and `longest` after the one before.
    The maps of the parts have the times of the whole recording.

    Args:
        audio, rate, channel: see `xattn.explain`.
        longest: at least 2 s. Models are best at lengths that they were trained on, and the memory for most of them
            grows with the square of the length.
        language: the spoken language, if it is known.

    Returns:
        The parts in their order; together they are the whole recording. Their ids end in the second at which they
        start. A recording that is short enough is one part.

    Raises:
        ValueError: `longest` is less than 2 s, or see `xattn.audio.load_audio`.
    """
    if not longest >= 2 * SHORTEST:
        raise ValueError(f"longest is {longest}: give at least {2 * SHORTEST:g} seconds.")
    whole = utterance_from_recording(audio, rate, language, channel)
    edges = [0, *_cuts(whole.samples, longest), len(whole.samples)]
    parts = []
    for first, last in pairwise(edges):
        start, end = first / SAMPLE_RATE, last / SAMPLE_RATE
        parts.append(
            Utterance(
                f"{whole.id}-{start:07.2f}",
                whole.audio_path,
                language,
                end - start,
                samples=whole.samples[first:last],
                start=start,
                end=end,
            )
        )
    return parts


def _cuts(samples: np.ndarray, longest: float) -> list[int]:
    """Samples at which parts begin, without the first."""
    energy = np.add.reduceat(samples.astype(np.float64) ** 2, np.arange(0, len(samples), STEP))
    level = np.convolve(energy, np.ones(round(PAUSE * SAMPLE_RATE / STEP)), mode="same")
    per_second = SAMPLE_RATE / STEP
    most, least = int(longest * per_second), int(SHORTEST * per_second)
    cuts, start = [], 0
    while len(level) - start > most:
        low, high = start + most // 2, min(start + most, len(level) - least)
        start = low + int(np.argmin(level[low : high + 1]))
        cuts.append(start * STEP)
    return cuts
