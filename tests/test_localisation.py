"""Kinds of tokens, times of their words, and where maps point, on cases worked by hand."""

import numpy as np
import pytest
import xarray as xr

from xattn.analysis.localisation import KINDS, REGIONS, peak_distances, regions, token_kinds, token_times
from xattn.data.utterance import Word

NO = (np.nan, np.nan)
SPOKEN = (Word("the", 0.0, 0.2), Word("dog", 0.2, 0.5), Word("sleeps", 0.6, 1.0), Word("well", 1.1, 1.4))


def tokens(*names):
    """An attribution of tokens, for functions that only read their names."""
    return xr.DataArray(np.zeros((len(names), 1)), dims=("token", "step"), coords={"token": list(names)})


def on_steps(values):
    """An attribution (token, step) on steps of 0.1 s."""
    edges = 0.1 * np.arange(len(values[0]) + 1)
    steps = {"step_start": ("step", edges[:-1]), "step_end": ("step", edges[1:]), "step": (edges[:-1] + edges[1:]) / 2}
    return xr.DataArray(np.array(values, dtype=float), dims=("token", "step"), coords=steps)


def test_kinds_of_tokens():
    found = token_kinds(["▁The", "▁dog", "s", ",", "▁—", "▁it", "'", "s", "!", "</s>"])
    start, continuation, punctuation = KINDS
    expected = [start, start, continuation, punctuation, punctuation, start, punctuation, continuation, punctuation]
    assert found.tolist() == [*expected, "special"]
    assert token_kinds(["▁dog", "<0xE2><0x80>", "<0xA6>", "▁<0xC3>", "<0xA9>", "<0xF0>"]).tolist() == [
        *(start, punctuation, punctuation, start, continuation, continuation),
    ]
    assert token_kinds(["<s>", "dog", "s", "▁2", "<|endoftext|>"]).tolist() == [
        *("special", start, continuation, start, "special"),
    ]


@pytest.mark.parametrize(
    ("names", "language", "expected"),
    [
        (
            ["▁The", "▁dog", "▁sleep", "s", "▁well", "</s>"],
            "en",
            [(0, 0.2), (0.2, 0.5), *[(0.6, 1)] * 2, (1.1, 1.4), NO],
        ),
        (["▁the", "▁cat", "▁sleeps", ",", "▁well", "."], "en", [(0, 0.2), NO, (0.6, 1), NO, (1.1, 1.4), NO]),
        (["▁the", "▁big", "▁dog", "▁well"], "en", [(0, 0.2), NO, (0.2, 0.5), (1.1, 1.4)]),
        (["▁do", "g", "▁the", "▁—", "▁WELL"], "en", [*[(0.2, 0.5)] * 2, NO, NO, (1.1, 1.4)]),
        (["▁dog", "s", "</s>"], "en", [NO, NO, NO]),
        (["▁the", "▁Dog", "!"], "it", [(0, 0.2), (0.2, 0.5), NO]),
    ],
    ids=["all right", "a wrong word and punctuation", "a word too many", "order", "nothing right", "Italian"],
)
def test_tokens_have_the_times_of_the_words_that_they_transcribe(names, language, expected):
    np.testing.assert_array_equal(token_times(tokens(*names), SPOKEN, language), expected)


def test_words_are_compared_after_normalisation():
    spoken = (Word("um", 0.0, 0.1), Word("twenty", 0.1, 0.4), Word("Colour,", 0.5, 0.8))
    # Neither the dash nor the hesitation has any text after normalisation, but they are not the same word.
    found = token_times(tokens("▁—", "▁20", "▁color"), spoken, "en")
    np.testing.assert_array_equal(found, [NO, (0.1, 0.4), (0.5, 0.8)])


def test_repeated_words_are_aligned_in_order():
    spoken = tuple(Word(name, start, start + 0.1) for name, start in zip("abab", (0.0, 0.2, 0.4, 0.6), strict=True))
    found = token_times(tokens("▁a", "▁b", "▁a", "▁b"), spoken, "en")
    np.testing.assert_allclose(found, [[word.start, word.end] for word in spoken])
    np.testing.assert_allclose(
        token_times(tokens("▁b", "▁a", "▁b"), spoken, "en"), [[0.2, 0.3], [0.4, 0.5], [0.6, 0.7]]
    )


def test_distance_of_a_peak_from_its_word():
    peaks = on_steps(np.eye(8)[[2, 3, 0, 6, 5]])
    times = np.array([[0.25, 0.35], [0.25, 0.35], [0.25, 0.35], [0.25, 0.35], NO])
    expected = [0, 0, 0.15, 0.25, np.nan]  # steps 2 and 3 overlap the word, step 0 ends at 0.1, step 6 begins at 0.6
    np.testing.assert_allclose(peak_distances(peaks, times), expected, atol=1e-12)
    np.testing.assert_allclose(peak_distances(peaks.transpose(), times), expected, atol=1e-12)


def test_regions_of_the_time_axis():
    words = (Word("the", 0.1, 0.3), Word("dog", 0.5, 0.6))
    times = np.array([[0.1, 0.3], NO, [0.5, 0.6]])
    own, other, pause = REGIONS
    found = regions(on_steps(np.zeros((3, 7))), words, times)  # the middles of steps are 0.05, 0.15, ...
    assert found.tolist() == [
        [pause, own, own, pause, pause, other, pause],
        [""] * 7,
        [pause, other, other, pause, pause, own, pause],
    ]
