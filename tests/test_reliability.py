"""Reliability against a second, independent map; convergence and the correction for noise against their definitions."""

import math

import numpy as np
import pytest
import torch
import xarray as xr

from xattn import Occlusion, explain
from xattn.analysis.correlation import correlate_all
from xattn.analysis.normalisation import standardise_over_tokens
from xattn.analysis.reliability import convergence, corrected_for_noise, noise_ceiling, reliability
from xattn.attribution.estimators import UnitScores, estimate
from xattn.attribution.occlusion import Masks, Partition, occlude
from xattn.maps import drop_special_tokens, masks_of, on_steps

ROWS, COLUMNS = np.indices((12, 8))
PARTITION = Partition.of(np.stack([ROWS // 2 * 4 + COLUMNS // 2, ROWS // 4 * 2 + COLUMNS // 4]))


def noisy(number, name):
    """Masks, and scores (N, 2) that add up the hidden cells of two planted blocks, with noise."""
    masks, planted = Masks(PARTITION, number, 0.5, 0, name), torch.zeros(2, 12, 8)
    planted[0, 2:4, 2:6] = 1.0
    planted[1, 8:12, 0:4] = 0.5
    rng = np.random.default_rng(len(name) + number)

    def score(keep):
        exact = torch.einsum("btf,itf->bi", 1 - keep, planted)
        return exact + 3 * torch.from_numpy(rng.standard_normal(exact.shape)).float()

    return occlude(score, masks, batch_size=50), masks


@pytest.mark.parametrize("estimator", ["mean", "ridge"])
def test_reliability_predicts_the_agreement_with_a_second_map(estimator):
    samples = [noisy(600, name) for name in ("first", "the second")]
    predicted = [reliability(*sample, estimator, lambda cells: cells) for sample in samples]
    maps = [estimate(*sample, estimator).cells(PARTITION.labels).ravel() for sample in samples]
    found = np.corrcoef(*maps)[0, 1]
    assert 0.3 < found < 0.97 and predicted == pytest.approx([found, found], abs=0.06)


def test_a_constant_half_has_no_reliability():
    masks = Masks(PARTITION, 20, 0.5, 0, "e")
    assert math.isnan(reliability(np.zeros((20, 2), dtype=np.float32), masks, "mean", lambda cells: cells))


@pytest.mark.parametrize("number", [1, 2, 3])
def test_halves_without_all_levels_have_no_reliability(number):
    scores, masks = noisy(number, "f")
    assert math.isnan(reliability(scores, masks, "mean", lambda cells: cells))
    assert math.isfinite(reliability(*noisy(4, "f"), "mean", lambda cells: cells))


def test_convergence_compares_few_perturbations_with_the_mean_of_the_others(model, utterances):
    occlusion = Occlusion(input_masks=400, encoder_masks=240, precision="float32")
    maps = explain(model, utterances[0], occlusion=occlusion, progress=False)
    table = convergence(maps, "input").set_index(["estimator", "perturbations"])
    assert table.index.unique("perturbations").tolist() == [12, 20, 40]
    assert set(table.index.unique("estimator")) == {"mean", "sqrt_mean", "ridge", "sqrt_ridge"}
    spoken, masks = drop_special_tokens(maps), masks_of(maps, "input")
    attention = standardise_over_tokens(spoken.cross_attention.mean(["layer", "head"]).values).ravel()
    first, others = (
        steps_of(spoken, UnitScores.of(spoken.input_scores.values, masks, used).cells(maps.segmentation.values))
        for used in (np.arange(400) < 20, np.arange(400) >= 40)
    )
    row = table.loc["mean", 20]
    assert row.r == pytest.approx(np.corrcoef(first, others)[0, 1])
    expected = np.corrcoef(first, attention)[0, 1] - np.corrcoef(others, attention)[0, 1]
    assert row.bias == pytest.approx(expected)
    steps = convergence(maps, "encoder")
    assert steps.perturbations.unique().tolist() == [12, 24] and steps.r.between(-1, 1).all()


def steps_of(maps, cells):
    """Cells (token, time, mel) as z-scores of each token, reduced to steps, flat."""
    flat = cells.reshape(len(cells), -1)
    cells = ((flat - flat.mean(1, keepdims=True)) / flat.std(1, ddof=1, keepdims=True)).reshape(cells.shape)
    return on_steps(maps.input_saliency.copy(data=cells), maps.cross_attention).values.ravel()


def test_rho_is_divided_by_the_root_of_the_reliability(made):
    maps = [made.maps(seed, utterance=str(seed)) for seed in range(3)]
    maps[1].attrs["input_reliability"] = -0.2
    rho = correlate_all(maps)
    ceiling = noise_ceiling(rho.reliability)
    expected = [[0.8, np.nan, 0.8], [0.9] * 3, [np.nan] * 3]
    np.testing.assert_allclose(ceiling, expected)
    corrected = corrected_for_noise(rho)
    assert set(corrected) == {"by_layer_and_head", "by_layer", "by_head", "overall"}
    for name, values in corrected.items():
        for saliency, root in (("input", xr.DataArray([0.8, np.nan, 0.8], dims="utterance")), ("encoder", 0.9)):
            np.testing.assert_allclose(values.sel(saliency=saliency), rho[name].sel(saliency=saliency) / root)
        difference = values.sel(saliency="encoder") - values.sel(saliency="input")
        np.testing.assert_allclose(values.sel(saliency="difference"), difference)
