"""Reliability against a second, independent map; the limit of rho on data where it is known; convergence by hand."""

import math

import numpy as np
import pytest
import torch
import xarray as xr
from conftest import GivenMasks, listed, scored_maps
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import zscore

from xattn import Occlusion, explain
from xattn.analysis.correlation import correlate_all
from xattn.analysis.reliability import (
    attenuation,
    attenuation_factor,
    attenuation_of,
    converged,
    convergence,
    half_maps,
    halves_of,
    split_half_reliability,
    too_noisy,
)
from xattn.attribution.estimators import ESTIMATORS, estimate
from xattn.attribution.occlusion import Masks, Partition, occlude
from xattn.maps import drop_special_tokens, frames_of_steps, masks_of

ROWS, COLUMNS = np.indices((12, 8))
PARTITION = Partition.of(np.stack([ROWS // 2 * 4 + COLUMNS // 2, ROWS // 4 * 2 + COLUMNS // 4]))
STEPS = Partition.of(np.arange(12)[None])
STEP_FRAMES = np.array([[0, 4], [4, 8], [8, 12]])
PLACES = ("input", "encoder")


def noisy(number, name, partition=PARTITION):
    """Masks, and scores (N, 2) that add up the hidden cells of two planted blocks, with noise."""
    masks, planted = Masks(partition, number, 0.5, 0, name), torch.zeros(2, 12, 8)
    planted[0, 2:4, 2:6] = 1.0
    planted[1, 8:12, 0:4] = 0.5
    if partition is STEPS:
        planted = planted.sum(dim=2)
    rng = np.random.default_rng(len(name) + number)

    def score(keep):
        exact = (1 - keep).flatten(1) @ planted.flatten(1).T
        return exact + 3 * torch.from_numpy(rng.standard_normal(exact.shape)).float()

    return occlude(score, masks, batch_size=50), masks


def subset(scores, masks, rows):
    """The scores and masks of some perturbations, as if there were no others."""
    everything = listed(masks)
    return scores[rows], GivenMasks(masks.partition, [everything[row] for row in rows])


def in_steps(cells, reduction="2d_max", width=4):
    """Maps of cells (I, T, F) or steps (I, S) as z-scores of each token, reduced to steps of four frames: (I, S)."""
    normalised = zscore(cells.reshape(len(cells), -1), axis=1, ddof=1).reshape(cells.shape)
    if normalised.ndim == 2:
        return normalised
    pool = {"2d_max": np.max, "2d_avg": np.mean}[reduction]
    missing = -normalised.shape[1] % width  # the last frame fills the last step
    normalised = np.pad(normalised, ((0, 0), (0, missing), (0, 0)), mode="edge")
    return np.stack([pool(part, axis=(1, 2)) for part in np.split(normalised, normalised.shape[1] // width, 1)], axis=1)


def alternating(number, levels):
    """Two halves of the perturbations: runs of `levels` perturbations, one of each level, take turns."""
    runs = np.split(np.arange(number), np.arange(levels, number, levels))
    return [np.concatenate(runs[start::2]) for start in (0, 1)]


@pytest.mark.parametrize("reduction", ["2d_max", "2d_avg"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_half_maps_are_the_maps_of_each_half_of_the_perturbations(estimator, reduction):
    for scores, masks in (noisy(61, "u"), noisy(40, "u", STEPS)):
        halves = alternating(len(scores), len(masks.partition.labels))
        expected = [
            in_steps(estimate(*subset(scores, masks, rows), estimator).cells(masks.partition.labels), reduction)
            for rows in halves
        ]
        found = half_maps(scores, masks, STEP_FRAMES, estimator, reduction)
        assert found.shape == ((2, 2, 3) if masks.partition is PARTITION else (2, 2, 12)) and found.dtype == np.float64
        np.testing.assert_allclose(found, expected, atol=1e-8)
        assert np.abs(found[0] - found[1]).max() > 0.1


@pytest.mark.parametrize("number", [1, 2, 3])
def test_halves_without_all_levels_have_no_maps(number):
    assert half_maps(*noisy(number, "f"), STEP_FRAMES, "mean") is None
    assert half_maps(*noisy(4, "f"), STEP_FRAMES, "mean").shape == (2, 2, 3)
    assert math.isnan(split_half_reliability(None))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_halves_that_hide_the_same_everywhere_have_no_maps(estimator, p):
    scores = np.random.default_rng(0).exponential(size=(40, 2))
    for partition in (PARTITION, STEPS):
        assert half_maps(scores, Masks(partition, 40, p, 0, "h"), STEP_FRAMES, estimator) is None


@pytest.mark.parametrize("reduction", ["2d_max", "2d_avg", "1d_max_1d_avg"])
@pytest.mark.parametrize("partition", ["superpixels", "windows"])
def test_halves_of_maps_are_those_of_their_scores(model, utterances, partition, reduction):
    occlusion = Occlusion(60, 40, estimator="ridge", partition=partition, reliability=1.0, precision="float32")
    maps = explain(model, utterances[0], occlusion=occlusion, progress=False)
    step_frames = frames_of_steps(maps, maps.time.values)
    for place in PLACES:
        found = halves_of(maps, f"{place}_saliency", reduction)
        assert found.dims == ("half", "token", "step") and np.array_equal(found.token, maps.token)
        if place == "encoder" or reduction == "2d_max":
            assert found.identical(maps[f"{place}_halves"]) and found.dtype == np.float32
        scores, masks = maps[f"{place}_scores"].values, masks_of(maps, place)
        expected = half_maps(scores, masks, step_frames, "ridge", reduction)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert halves_of(maps.drop_vars("input_halves"), "input_saliency", reduction) is None


def test_maps_without_scores_have_no_halves(made):
    for place in PLACES:
        assert halves_of(made.maps(), f"{place}_saliency") is None


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_reliability_predicts_the_agreement_with_a_second_map(estimator):
    partition, weights = Partition.of(np.arange(40)[None]), np.random.default_rng(0).exponential(size=(40, 20)) ** 2
    predicted, maps = [], []
    for name in ("first", "the second"):
        masks, noise = Masks(partition, 200, 0.7, 0, name), np.random.default_rng(len(name)).exponential(8, (200, 20))
        scores = masks.draw(0, 200)[1] @ weights + noise
        predicted.append(split_half_reliability(half_maps(scores, masks, STEP_FRAMES, estimator)))
        maps.append(in_steps(estimate(scores, masks, estimator).cells(partition.labels)))
    found = np.corrcoef(*(each.ravel() for each in maps))[0, 1]
    assert 0.3 < found < 0.9 and predicted == pytest.approx([found, found], abs=0.06)


def test_reliability_is_the_share_of_a_map_that_is_not_noise():
    """The Spearman-Brown formula, where noise of known variance was added to a known map."""
    rng = np.random.default_rng(0)
    signal, noise = rng.standard_normal((40, 500)), rng.standard_normal((2, 40, 500))
    for variance in (0.1, 1, 9):  # of the noise in a half
        found = split_half_reliability(signal + math.sqrt(variance) * noise)
        assert found == pytest.approx(1 / (1 + variance / 2), abs=0.01)


@given(st.integers(0, 10_000), st.floats(-3, 3))
def test_reliability_follows_from_the_correlation_of_the_halves(seed, shared):
    first, other = np.random.default_rng(seed).standard_normal((2, 3, 7))
    halves = np.stack([first, shared * first + other])
    r = np.corrcoef(*halves.reshape(2, -1))[0, 1]
    assert split_half_reliability(halves) == pytest.approx(2 * r / (1 + r)) and r > -1
    assert split_half_reliability(halves[:, :, ::-1]) == pytest.approx(2 * r / (1 + r))


def test_a_constant_half_has_no_reliability():
    halves = np.random.default_rng(0).standard_normal((2, 3, 7))
    assert math.isfinite(split_half_reliability(halves))
    for half in (0, 1):
        constant = halves.copy()
        constant[half] = 0.3
        assert math.isnan(split_half_reliability(constant))


def test_opposite_halves_have_no_reliability():
    half = np.random.default_rng(0).standard_normal((3, 7))
    for other in (-half, -0.3 * half):
        assert math.isnan(split_half_reliability(np.stack([half, other])))


def correlations(everything, half, reliability=0.9, linear=("encoder",), without_scores=()):
    """A dataset like that of `correlate_all`, from rho (saliency, utterance) of all masks and of half of them."""
    overall = np.stack([everything, half], axis=1)
    rho = xr.Dataset({"overall": (("saliency", "masks", "utterance"), overall)})
    rho["by_layer"] = rho.overall * xr.DataArray([0.5, -0.25, 1.25], dims="layer")
    rho["reliability"] = ("saliency", "utterance"), np.broadcast_to(reliability, (len(overall), overall.shape[2]))
    rho = rho.assign_coords(saliency=["input", "encoder"][: len(overall)], masks=["all", "half"])
    return rho.assign_attrs(linear=list(linear), without_scores=list(without_scores))


@settings(max_examples=30)
@given(
    limits=st.lists(st.floats(0.1, 1), min_size=1, max_size=5),
    noise=st.tuples(*[st.floats(0, 20)] * 2),
)
def test_rho_whose_power_is_linear_in_the_noise_converges_to_its_limit(limits, noise):
    """rho^-p = limit^-p (1 + noise / n), with p = 1 for SM^X and p = 2 for SM^H; half of the masks double the noise."""
    power = np.array([[1], [2]])
    everything, half = (np.array(limits) * (1 + part * np.array(noise)[:, None]) ** (-1 / power) for part in (1, 2))
    rho = correlations(everything, half)
    expected = (1 + np.array(noise)) ** (-1 / power[:, 0])
    np.testing.assert_allclose(attenuation(rho), expected, rtol=1e-9)
    found = converged(rho)
    assert found.overall.dims == ("saliency", "utterance") and set(found) == {"overall", "by_layer"}
    np.testing.assert_allclose(found.overall, [limits] * 2, rtol=1e-9)
    for name, weight in enumerate((0.5, -0.25, 1.25)):  # noise lowers all layers by one factor
        np.testing.assert_allclose(found.by_layer.isel(layer=name), weight * found.overall, rtol=1e-9)


def test_the_limit_is_that_of_the_mean_over_utterances():
    rho = correlations([[0.2, 0.4], [0.1, 0.5]], [[0.15, 0.33], [0.3, 0.1]])
    expected = 2 - 0.3 / 0.24, math.sqrt(2 - (0.3 / 0.2) ** 2) if (0.3 / 0.2) ** 2 < 2 else np.nan
    np.testing.assert_allclose(attenuation(rho), expected)


@pytest.mark.parametrize(("half", "input_factor", "encoder_factor"), [
    (0.4, 1, 1), (0.39, 2 - 40 / 39, math.sqrt(2 - (40 / 39) ** 2)), (0.29, 2 - 40 / 29, math.sqrt(2 - (40 / 29) ** 2)),
    (0.28, 2 - 40 / 28, np.nan), (0.21, 2 - 40 / 21, np.nan), (0.2, np.nan, np.nan), (0.1, np.nan, np.nan),
    (0, np.nan, np.nan), (-0.3, np.nan, np.nan), (0.5, 1, 1), (np.nan, np.nan, np.nan),
])  # fmt: skip
def test_halves_that_lost_too_much_have_no_limit_and_no_factor_exceeds_1(half, input_factor, encoder_factor):
    rho = correlations([[0.4], [0.4]], [[half], [half]])
    np.testing.assert_allclose(attenuation(rho), [input_factor, encoder_factor])
    np.testing.assert_allclose(converged(rho).overall[:, 0], 0.4 / np.array([input_factor, encoder_factor]))
    assert too_noisy(rho).values.tolist() == np.isnan([input_factor, encoder_factor]).tolist()


def test_a_factor_is_between_0_and_1():
    everything, half = np.random.default_rng(0).uniform(-1, 1, (2, 1000))
    for linear in (False, True):
        factor = attenuation_factor(everything, half, linear)
        assert 100 < np.isnan(factor).sum() < 900
        assert (np.isnan(factor) | (factor >= 0) & (factor <= 1)).all() and (factor < 1).sum() > 50


@pytest.mark.parametrize(
    ("reliability", "noisy"), [(0.5, False), (0.49, True), (np.nan, True), (-0.2, True), (1.0, False)]
)
def test_maps_of_low_reliability_are_too_noisy(reliability, noisy):
    rho = correlations([[0.4]] * 2, [[0.38]] * 2, [[0.9], [reliability]])
    assert too_noisy(rho).values.tolist() == [False, noisy]
    mean = correlations([[0.4, 0.3]] * 2, [[0.38, 0.3]] * 2, [[0.2, 0.9], [0.2, 0.7]])
    assert too_noisy(mean).values.tolist() == [False, True]


def test_maps_without_scores_are_left_as_they_are():
    rho = correlations([[0.4], [0.4]], [[np.nan], [0.38]], [[np.nan], [0.9]], without_scores=["input"])
    assert attenuation(rho).sel(saliency="input") == 1 and attenuation(rho).sel(saliency="encoder") < 1
    assert converged(rho).overall.sel(saliency="input").item() == 0.4
    assert too_noisy(rho).values.tolist() == [False, False]


def rho_of(attention, maps):
    """Pearson's correlation of each row of two arrays."""
    return [np.corrcoef(*pair)[0, 1] for pair in zip(attention, maps, strict=True)]


def test_attenuation_of_some_utterances_is_that_of_a_selection():
    everything, half = np.random.default_rng(0).uniform([[[0.3]], [[0.2]]], [[[0.5]], [[0.35]]], (2, 2, 7))
    rho = correlations(everything, half)
    factor = attenuation_of(rho)
    for rows in ([0, 1, 2, 3, 4, 5, 6], [2], [5, 1, 3], [0, 0, 4]):
        np.testing.assert_allclose(factor(np.array(rows)), attenuation(rho.isel(utterance=rows)))
        lost = everything[0, rows].mean() / half[0, rows].mean()
        np.testing.assert_allclose(factor(np.array(rows))[0], min(1, 2 - lost) if lost < 2 else np.nan)
    unknown = rho.assign_attrs(without_scores=["encoder"])
    np.testing.assert_allclose(attenuation_of(unknown)(np.arange(7)), [factor(np.arange(7))[0], 1])


def test_linear_maps_converge_to_the_classical_correction_for_attenuation():
    """Maps that are a true map plus noise, the mean of two halves: the truth is known."""
    rng = np.random.default_rng(0)
    truth, others = rng.standard_normal((2, 100, 2000))
    attention = 0.4 * truth + math.sqrt(1 - 0.4**2) * others
    for variance in (0.3, 1, 2):  # of the noise in a whole map, relative to the true map
        halves = truth + math.sqrt(2 * variance) * rng.standard_normal((2, *truth.shape))
        everything = [rho_of(attention, halves.mean(axis=0))]
        half = [
            np.mean([[np.corrcoef(*pair)[0, 1] for pair in zip(attention, h, strict=True)] for h in halves], axis=0)
        ]
        reliability = [split_half_reliability(pair[:, None]) for pair in halves.transpose(1, 0, 2)]
        rho = correlations(everything, half, [reliability], linear=["input"])
        measured = np.mean(everything)
        assert measured == pytest.approx(0.4 / math.sqrt(1 + variance), abs=0.01)
        assert converged(rho).overall.mean() == pytest.approx(0.4, abs=0.02)
        classical = measured / math.sqrt(np.mean(reliability))
        assert converged(rho).overall.mean() == pytest.approx(classical, abs=0.02)
        assert attenuation(rho).item() ** 2 == pytest.approx(np.mean(reliability), abs=0.06)
        assert converged(correlations(everything, half, linear=[])).overall.mean() < 0.395  # p = 1 corrects too little


def test_the_halves_of_correlate_all_give_the_limit():
    """Fewer masks lower rho of SM^H, but not its limit, where attention follows what is planted."""
    few, many = (correlate_all(planted(seed, number) for seed in range(10)) for number in (60, 240))
    limits = [converged(rho).overall.mean().item() for rho in (few, many)]
    measured = [rho.overall.sel(masks="all").mean().item() for rho in (few, many)]
    assert measured[0] < measured[1] - 0.01
    assert limits[0] == pytest.approx(limits[1], abs=0.3 * (measured[1] - measured[0]))


def planted(seed, number):
    """Maps whose attention is the encoder saliency of many perturbations."""
    maps, exact = (scored_maps(seed, f"u{seed}", number=each) for each in (number, 1000))
    return maps.assign(cross_attention=0 * maps.cross_attention + exact.encoder_saliency).drop_vars("input_saliency")


@pytest.mark.parametrize("place", PLACES)
def test_convergence_compares_blocks_of_perturbations_with_all_of_them(made, place):
    maps = made.scored(number=130)
    table = convergence(maps, place, ["mean", "sqrt_ridge"], [20, 60, 100, 1000], blocks=3)
    assert table.columns.tolist() == [
        "saliency", "linear", "estimator", "masks", "block", "r", "everything", "half", "reliability"
    ]  # fmt: skip
    assert set(table.saliency) == {place} and set(table.linear) == {place == "encoder"}
    blocks = [(20, 0), (20, 1), (20, 2), (60, 0), (60, 1)]
    expected = [("mean", 130, 0), *((name, *block) for block in blocks for name in ("mean", "sqrt_ridge"))]
    assert list(zip(table.estimator, table.masks, table.block, strict=True)) == expected

    spoken, masks = drop_special_tokens(maps), masks_of(maps, place)
    scores, levels = spoken[f"{place}_scores"].values, len(masks.partition.labels)
    attention = zscore(spoken.cross_attention.values.astype(np.float64).mean(axis=(0, 1)), axis=0, ddof=1).ravel()

    def map_from(rows, estimator):
        return in_steps(estimate(*subset(scores, masks, rows), estimator).cells(masks.partition.labels)).ravel()

    whole = map_from(np.arange(130), "mean")
    for row in table.itertuples():
        rows = np.arange(row.block * row.masks, (row.block + 1) * row.masks)
        halves = [np.intersect1d(rows, half) for half in alternating(130, levels)]
        found, first, second = (map_from(each, row.estimator) for each in (rows, *halves))
        assert row.r == pytest.approx(np.corrcoef(found, whole)[0, 1], abs=1e-9)
        assert row.everything == pytest.approx(np.corrcoef(found, attention)[0, 1], abs=1e-6)
        both = [np.corrcoef(each, attention)[0, 1] for each in (first, second)]
        assert row.half == pytest.approx(np.mean(both), abs=1e-6)
        r = np.corrcoef(first, second)[0, 1]
        assert row.reliability == pytest.approx(2 * r / (1 + r), abs=1e-9)
    assert table.r[0] == pytest.approx(1) and (table.r[1:] < 0.99).all()


def test_convergence_of_constant_maps_and_of_maps_without_halves_is_unknown(made):
    maps = made.scored().assign_attrs(estimator="sqrt_ridge").isel(input_mask=slice(3), encoder_mask=slice(3))
    for p, place in ((0.0, "input"), (1.0, "encoder"), (0.5, "input"), (0.7, "encoder")):
        table = convergence(maps.assign_attrs({f"{place}_p": p}), place, ESTIMATORS, [1], blocks=3)
        assert len(table) == 13 and table[["half", "reliability"]][1:].isna().all(axis=None)
        assert table[["r", "everything"]].isna().all(axis=None) == (p in (0, 1))


def test_windows_are_linear_in_convergence(made):
    table = convergence(made.scored(partition="windows"), "input", ["mean"], [], blocks=1)
    assert table.linear.tolist() == [True] and len(table) == 1
