"""rho in parts of the maps, as rank correlations, and against properties of recordings."""

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from conftest import halves_by_hand
from scipy import stats
from scipy.stats import zscore

from reproduction.agreement import by_part, by_voice, rank_correlations, with_recordings
from xattn import correlate
from xattn.analysis.correlation import correlate_all
from xattn.analysis.localisation import KINDS
from xattn.data.utterance import Utterance, Word

TOKENS = ("▁ab", "▁cd", "e", "f", "</s>")
STEPS = 16
# Rows have mean 0, and so have the columns of the first and of the last two rows: normalising only scales this matrix.
ROWS = np.array([[1, 1, -1, -1] * 4, [1, -1, 1, -1] * 4])
PATTERN = np.stack([ROWS[0], -ROWS[0], ROWS[1], -ROWS[1]])


def constructed(made, attention, saliency=PATTERN, utterance="made-1"):
    """Maps of 16 steps of 40 ms with this attention and both saliencies, (4 tokens, step)."""
    maps = made.maps(utterance=utterance, tokens=TOKENS, frames=4 * STEPS)
    last = np.zeros((1, STEPS))
    rows = np.concatenate([attention, last])
    cells = np.broadcast_to(np.repeat(np.concatenate([saliency, last]), 4, axis=1)[..., None], (5, 4 * STEPS, 8))
    return maps.assign(
        cross_attention=maps.cross_attention.copy(data=np.broadcast_to(rows, maps.cross_attention.shape)),
        encoder_saliency=maps.encoder_saliency.copy(data=np.concatenate([saliency, last])),
        input_saliency=maps.input_saliency.copy(data=cells),
    )


def recording(utterance="made-1", **others):
    return Utterance(utterance, None, "en", **{"duration": 0.5} | others)


def parts_of(table, saliency="encoder"):
    return table[table.saliency == saliency].set_index("part")


def test_rho_of_kinds_of_tokens(made):
    """Attention equals saliency for the starts of words and is its opposite for the other tokens."""
    table = by_part([constructed(made, PATTERN * np.array([[1], [1], [-1], [-1]]))], [])
    intervals = ["rho", "low", "high", "reliability", "reported", "reported_low", "reported_high"]
    assert table.columns.tolist() == ["saliency", "part", "share", *intervals, "n"]
    for saliency in ("input", "encoder"):
        found = parts_of(table, saliency)
        assert found.index.tolist() == ["everything", "single tokens", *KINDS]
        expected = {"everything": 0, "single tokens": 0, "word start": 1, "continuation": -1}
        assert found.rho.drop("punctuation").to_dict() == pytest.approx(expected, abs=1e-6)
        # The maps have no scores, so that their noise is unknown.
        assert found.reported.drop("punctuation").to_dict() == pytest.approx(expected, abs=1e-6)
        assert found.share.tolist() == [1, 1, 0.5, 0.5, 0]
        assert found.n.tolist() == [1, 1, 1, 1, 0] and np.isnan(found.rho["punctuation"])


def test_single_tokens_ignore_differences_between_tokens(made):
    """Every token's row of attention is its row of saliency plus noise, but their levels have the opposite order."""
    noise = np.random.default_rng(0).normal(0, 0.1, PATTERN.shape)
    level = np.array([[0], [1], [2], [3]])
    attention, saliency = PATTERN + noise + level, zscore(PATTERN, axis=1, ddof=1)
    found = parts_of(by_part([constructed(made, attention)], []))
    normalised = zscore(attention, axis=0, ddof=1)
    rows = [stats.pearsonr(*pair).statistic for pair in zip(normalised, saliency, strict=True)]
    assert found.rho["single tokens"] == pytest.approx(np.mean(rows)) and np.mean(rows) > 0.9
    assert found.rho["everything"] == pytest.approx(stats.pearsonr(normalised.ravel(), saliency.ravel()).statistic)
    assert found.rho["everything"] < found.rho["single tokens"] - 0.1


def test_rho_of_regions_of_time(made):
    rng = np.random.default_rng(0)
    attention, saliency = rng.exponential(size=(2, 4, STEPS))
    maps = constructed(made, attention, saliency)
    # The middle of step n is at 0.0275 + 0.04 n, so that the words have steps 0 to 6 and 9 to 15.
    words = (Word("ab", 0.0, 0.2875), Word("cdef", 0.3675, 0.65))
    found = parts_of(by_part([maps], [recording(words=words)]))
    assert found.index.tolist()[-3:] == ["own word", "other speech", "pauses"]
    first, second = (np.isin(np.arange(STEPS), steps) for steps in (range(7), range(9, 16)))
    own, other = np.stack([first, second, second, second]), np.stack([second, first, first, first])
    normalised = zscore(attention, axis=0, ddof=1), zscore(saliency, axis=1, ddof=1)
    for name, cells in (("own word", own), ("other speech", other)):
        assert found.rho[name] == pytest.approx(stats.pearsonr(*(each[cells] for each in normalised)).statistic)
        assert found.share[name] == pytest.approx(28 / 64) and found.n[name] == 1
    # The 8 cells of pauses are too few.
    assert found.share["pauses"] == pytest.approx(8 / 64) and found.n["pauses"] == 0 and np.isnan(found.rho["pauses"])
    for other in (recording("made-2", words=words), recording()):
        assert "own word" not in parts_of(by_part([maps], [other])).index
    translated = maps.assign_attrs(setting="en-it")
    assert "own word" not in parts_of(by_part([translated], [recording(words=words)])).index


def following(made, seed, partition="superpixels"):
    """Scored maps whose attention follows both saliencies, with noise."""
    maps = made.scored(seed, f"made-{seed}", number=400, partition=partition)
    cells = zscore(maps.input_saliency.values.reshape(5, -1), axis=1).reshape(maps.input_saliency.shape)
    steps = np.stack([cells[:, 4 * step : 4 * step + 4].max(axis=(1, 2)) for step in range(6)], axis=1)
    both = zscore(steps, axis=None) + zscore(maps.encoder_saliency.values, axis=1)
    rng = np.random.default_rng(seed)
    attention = rng.exponential(size=maps.cross_attention.shape) * np.exp(both)
    return maps.assign(cross_attention=maps.cross_attention.copy(data=attention))


@pytest.mark.parametrize("partition", ["superpixels", "windows"])
def test_parts_are_reported_without_noise(made, partition):
    maps = [following(made, seed, partition) for seed in range(4)]
    table = by_part(maps, [])
    assert set(table[table.part == "everything"].n) == {4}
    for saliency in ("input", "encoder"):
        means = []
        for item in maps:
            all_and_halves = [item[f"{saliency}_saliency"], *halves_by_hand(item, saliency)]
            attention = item.cross_attention.mean(["layer", "head"])
            rho, *halves = (float(correlate(attention, each).overall) for each in all_and_halves)
            means.append((rho, np.mean(halves)))
        everything, half = np.array(means).T
        power = 1 if (saliency, partition) == ("input", "superpixels") else 2

        def limit(rows, everything=everything, half=half, power=power):
            return (2 * everything[rows].mean() ** -power - half[rows].mean() ** -power) ** (-1 / power)

        found = parts_of(table, saliency).loc["everything"]
        assert found.rho == pytest.approx(everything.mean())
        assert found.reported == pytest.approx(limit(np.arange(4)), rel=1e-5)
        assert found.reported > found.rho
        pseudo = [4 * limit(np.arange(4)) - 3 * limit(np.delete(np.arange(4), row)) for row in range(4)]
        half_width = stats.t.ppf(0.975, 3) * np.std(pseudo, ddof=1) / 2
        expected = found.reported - half_width, found.reported + half_width
        assert (found.reported_low, found.reported_high) == pytest.approx(expected, rel=1e-4)


def test_rank_correlations(made):
    maps = [following(made, seed) for seed in range(3)]
    table = rank_correlations(maps)
    assert table.columns.tolist() == ["saliency", "measure", "value", "low", "high", "n"] and set(table.n) == {3}
    found = table.set_index(["saliency", "measure"])
    own = {name: [] for name in ("Pearson", "Spearman", "Kendall")}
    for item in maps:
        attention = zscore(item.cross_attention.values[:, :, :4].mean(axis=(0, 1)), axis=0, ddof=1).ravel()
        saliency = zscore(item.encoder_saliency.values[:4], axis=1, ddof=1).ravel()
        ranks = [stats.rankdata(each) for each in (attention, saliency)]
        own["Spearman"].append(np.corrcoef(*ranks)[0, 1])  # the definition
        signs = [np.sign(each[:, None] - each) for each in (attention, saliency)]
        own["Kendall"].append((signs[0] * signs[1]).sum() / (len(attention) * (len(attention) - 1)))  # without ties
        own["Pearson"].append(float(correlate(item.cross_attention, item.encoder_saliency).overall))
    for name, values in own.items():
        expected = np.mean(values), *stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert tuple(found.loc["encoder", name][["value", "low", "high"]]) == pytest.approx(expected)
    rho = correlate_all(maps).overall.sel(masks="all")
    np.testing.assert_allclose(found.xs("Pearson", level="measure").value, rho.mean("utterance"))


def sample(values, reliability):
    """rho of SM^X of some utterances, as from `correlate_all`."""
    overall = np.stack([values, np.full(len(values), np.nan)])[None]
    return xr.Dataset(
        {
            "overall": (("saliency", "masks", "utterance"), overall),
            "reliability": (("saliency", "utterance"), np.array([reliability])),
        },
        coords={"saliency": ["input"], "masks": ["all", "half"], "utterance": list("abcd")[: len(values)]},
    )


def test_rho_is_compared_with_what_is_known_of_the_recordings():
    rho = {"base/en": sample([0.1, 0.2, 0.3, 0.4], [0.9, 0.8, 0.5, 0.6])}
    known = zip("abcd", (0, 5, 9, 20), (4, 3, 1, 2), strict=True)
    corpus = [recording(name, snr=snr, duration=seconds) for name, snr, seconds in known]
    table = with_recordings(rho, corpus)
    assert table.columns.tolist() == ["condition", "saliency", "property", "value", "p", "n"]
    found = table.set_index("property")
    # Spearman's r is 1 - 6 sum(d^2) / (n (n^2 - 1)), d the differences of ranks.
    falling = 1 - 6 * 18 / 60
    assert found.value.to_dict() == pytest.approx({"SNR": 1, "duration": falling, "reliability": falling})
    assert found.p["duration"] == pytest.approx(stats.spearmanr([1, 2, 3, 4], [4, 3, 1, 2]).pvalue)
    assert set(found.n) == {4}
    assert set(found.condition) == {"base/en"} and set(found.saliency) == {"input"}


@pytest.mark.parametrize(
    ("corpus", "reliability", "expected"),
    [
        ([], [0.9, 0.8], ["reliability"]),
        ([recording("a", snr=1.0), recording("b", snr=None)], [0.9, 0.8], ["reliability"]),  # equally long
        ([recording("a", snr=1.0), recording("b", snr=0.0, duration=2)], [np.nan, np.nan], ["SNR", "duration"]),
        ([recording("a", snr=1.0), recording("b", snr=1.0, duration=2)], [0.9, 0.9], ["duration"]),
    ],
)
def test_properties_that_are_unknown_or_equal_are_left_out(corpus, reliability, expected):
    table = with_recordings({"base/en": sample([0.1, 0.2], reliability)}, corpus)
    assert table.property.tolist() == expected
    assert table.empty or set(table.n) == {2}


def test_means_of_voices():
    corpus = [recording(name, voice=voice) for name, voice in zip("abcd", ("x", "y", "x", ""), strict=True)]
    table = by_voice({"base/en": sample([0.1, 0.2, 0.3, 0.9], [0.8] * 4)}, corpus).set_index("voice")
    assert table.index.tolist() == ["x", "y"] and table.n.tolist() == [2, 1]
    low, high = stats.ttest_1samp([0.1, 0.3], 0).confidence_interval(0.95)
    assert tuple(table.loc["x", ["value", "low", "high"]]) == pytest.approx((0.2, low, high))
    assert table.value["y"] == 0.2 and pd.isna(table.low["y"])
    assert by_voice({"base/en": sample([0.1], [0.8])}, []).empty
