"""Whether attributions point at the sound of the word that was written, if the times of the spoken words are known."""

from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import groupby

import numpy as np
import xarray as xr

from xattn.analysis.quality import normalise
from xattn.data.utterance import Word
from xattn.maps import BYTES, SPECIAL_TOKENS, spelled, word_numbers

PUNCTUATION = "punctuation"
KINDS = ("word start", "continuation", PUNCTUATION)
REGIONS = ("own word", "other speech", "pauses")


def token_kinds(tokens: Sequence[str]) -> np.ndarray:
    """The kind of each token, one of KINDS, or "special": str (I,)."""
    numbers = word_numbers(tokens)
    kinds = np.where(np.diff(numbers, prepend=-1) > 0, KINDS[0], KINDS[1]).astype(object)
    # Tokens that split a character among them are judged together.
    for _, run in groupby(range(len(tokens)), lambda row: (numbers[row], -1 if BYTES.search(tokens[row]) else row)):
        rows = [*run]
        text = spelled([tokens[row] for row in rows])
        if tokens[rows[0]] in SPECIAL_TOKENS:
            kinds[rows] = "special"
        elif text and not any(character.isalnum() for character in text):
            kinds[rows] = PUNCTUATION
    return kinds.astype(str)


def token_times(attribution: xr.DataArray | xr.Dataset, words: Sequence[Word], language: str) -> np.ndarray:
    """Start and end of the spoken word that each token transcribes, in seconds: float64 (I, 2).

    The words of the hypothesis are aligned with the spoken ones after Whisper's normaliser; tokens of other words, of
    punctuation and </s> are NaN.

    Args:
        attribution: an array or dataset with the coordinate token.
        words: the spoken words in order, such as `utterance.words`.
    """
    tokens = attribution.token.values.tolist()
    numbers, kinds = word_numbers(tokens), token_kinds(tokens)
    written = [spelled(np.array(tokens)[numbers == number]) for number in range(numbers.max() + 1)]
    written, spoken = (
        [normalise(text, language) for text in texts] for texts in (written, [each.word for each in words])
    )
    times = np.full((len(tokens), 2), np.nan)
    for block in SequenceMatcher(None, written, spoken, autojunk=False).get_matching_blocks():
        for offset in range(block.size):
            if written[block.a + offset]:
                word = words[block.b + offset]
                times[(numbers == block.a + offset) & np.isin(kinds, KINDS[:2])] = word.start, word.end
    return times


def peak_distances(attribution: xr.DataArray, times: np.ndarray) -> np.ndarray:
    """How far the highest step of each token is from the word that it transcribes, in seconds: float64 (I,).

    0 if the step overlaps the word; NaN for tokens without times.

    attribution: (token, step), such as attention averaged over layers and heads; times: from `token_times`.
    """
    peaks = attribution.transpose("token", "step").values.argmax(axis=1)
    start, end = attribution.step_start.values[peaks], attribution.step_end.values[peaks]
    return np.where(np.isnan(times[:, 0]), np.nan, np.maximum(0, np.maximum(times[:, 0] - end, start - times[:, 1])))


def mass_inside(attribution: xr.DataArray, times: np.ndarray) -> np.ndarray:
    """The share of each token's positive values on steps whose middle is in the word that it transcribes: float64 (I,).

    NaN for tokens without times; arguments as for `peak_distances`.
    """
    weights = np.maximum(attribution.transpose("token", "step").values, 0)
    inside = (attribution.step.values >= times[:, :1]) & (attribution.step.values < times[:, 1:])
    totals = weights.sum(axis=1)
    shares = np.divide((weights * inside).sum(axis=1), totals, out=np.zeros_like(totals), where=totals > 0)
    return np.where(np.isnan(times[:, 0]), np.nan, shares)


def regions(attribution: xr.DataArray | xr.Dataset, words: Sequence[Word], times: np.ndarray) -> np.ndarray:
    """The region, one of REGIONS, of each cell (token, step); "" for tokens without times: str (I, S)."""
    middle = attribution.step.values
    speech = np.any([(word.start <= middle) & (middle < word.end) for word in words], axis=0)
    own = (times[:, :1] <= middle) & (middle < times[:, 1:])
    found = np.where(own, REGIONS[0], np.where(speech, REGIONS[1], REGIONS[2]))
    return np.where(np.isnan(times[:, :1]), "", found)
