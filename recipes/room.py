"""Room acoustics: light reverberation and additive noise."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.fft import next_fast_len
from scipy.signal import fftconvolve

from xattn.audio import SAMPLE_RATE

NOISES = ("white", "pink", "speech-shaped", "babble")
BABBLE_TALKERS = 4


@dataclass(frozen=True)
class Talkers:
    """Speech of other speakers.

    samples: their utterances, one after the other, (samples,) at 16 kHz.
    """

    samples: np.ndarray

    @cached_property
    def spectrum(self) -> tuple[np.ndarray, np.ndarray]:
        """Frequencies (Hz) and the mean power at each, over blocks of 32 ms."""
        block = SAMPLE_RATE * 32 // 1000
        blocks = self.samples[: self.samples.size // block * block].reshape(-1, block) * np.hanning(block)
        return np.fft.rfftfreq(block, 1 / SAMPLE_RATE), np.mean(np.abs(np.fft.rfft(blocks)) ** 2, axis=0)


def reverberate(samples: np.ndarray, rt60: float, direct_to_reverberant: float, rng: np.random.Generator) -> np.ndarray:
    """Convolve samples with an undelayed direct path, which keeps word times valid, and a decaying noise tail.

    Args:
        samples: (samples,) at 16 kHz.
        rt60: reverberation time, in which the tail decays exponentially by 60 dB, in seconds.
        direct_to_reverberant: energy of the direct path relative to the tail, in dB.
        rng: draws the tail.

    Returns:
        (samples,); the reverberation after the last sample is cut off.
    """
    time = np.arange(1, round(rt60 * SAMPLE_RATE)) / SAMPLE_RATE
    tail = rng.standard_normal(time.size) * 10 ** (-3 * time / rt60)
    tail *= np.sqrt(10 ** (-direct_to_reverberant / 10) / np.sum(tail**2))
    return fftconvolve(samples, np.concatenate([[1.0], tail]))[: samples.size]


def noise(kind: str, size: int, talkers: Talkers, rng: np.random.Generator) -> np.ndarray:
    """Generate noise of power 1, shape (size,).

    Args:
        kind: one of NOISES. "speech-shaped" noise has the long-term spectrum of the talkers; "babble" adds
            BABBLE_TALKERS stretches of their speech.
        size: number of samples.
        talkers: the speech for these two kinds.
        rng: draws the noise.

    Raises:
        ValueError: the kind is not in NOISES.
    """
    if kind == "babble":
        starts = rng.integers(talkers.samples.size, size=BABBLE_TALKERS)
        samples = sum(np.take(talkers.samples, np.arange(start, start + size), mode="wrap") for start in starts)
    elif kind in NOISES:
        length = next_fast_len(size, real=True)
        spectrum = np.fft.rfft(rng.standard_normal(length))
        frequency = np.fft.rfftfreq(length, 1 / SAMPLE_RATE)
        if kind == "pink":
            spectrum /= np.sqrt(np.maximum(frequency, 20.0))
        elif kind == "speech-shaped":
            spectrum *= np.sqrt(np.interp(frequency, *talkers.spectrum))
        samples = np.fft.irfft(spectrum, length)[:size]
    else:
        raise ValueError(f"There is no noise {kind!r}: choose one of {', '.join(NOISES)}.")
    return samples / np.sqrt(np.mean(samples**2))
