"""Estimators against their definitions: a dense ridge regression, and the agreement of independent maps."""

import math

import numpy as np
import pytest
import torch
from conftest import random_maps
from scipy.ndimage import gaussian_filter1d

from xattn.estimators import ESTIMATORS, SIGMA, STRENGTH, UnitScores, UnitWeights, estimate, expand, reliability
from xattn.occlusion import Masks, Partition, occlude

GRID = (12, 8)
ROWS, COLUMNS = np.indices(GRID)
LEVELS = np.stack([ROWS // 2 * 4 + COLUMNS // 2, ROWS // 4 * 2 + COLUMNS // 4])
PARTITION = Partition.of(LEVELS)


def noisy(number, name, noise=3.0):
    """Masks, and scores (N, 2) that add up the hidden cells of two planted blocks, with noise of this deviation."""
    masks = Masks(PARTITION, number, 0.5, 0, name)
    planted = torch.zeros(2, *GRID)
    planted[0, 2:4, 2:6] = 1.0
    planted[1, 8:12, 0:4] = 0.5
    rng = np.random.default_rng(len(name) + number)

    def score(keep):
        exact = torch.einsum("btf,itf->bi", 1 - keep, planted)
        return exact + noise * torch.from_numpy(rng.standard_normal(exact.shape)).float()

    return occlude(score, masks, batch_size=50), masks, planted.numpy()


def posterior_mean(scores, hidden, prior):
    """Weights of cells (I, cells) from centred masks (N, cells) by the textbook's primal formula."""
    centred = hidden - hidden.mean(axis=0)
    noise = STRENGTH * np.trace(centred @ prior @ centred.T) / len(hidden)
    precision = centred.T @ centred / noise + np.linalg.inv(prior)
    return np.linalg.solve(precision, centred.T @ (scores - scores.mean(axis=0)) / noise).T


def test_ridge_on_superpixels_is_the_posterior_mean_of_its_prior():
    scores, masks, _ = noisy(60, "a")
    levels, hidden = masks.draw(0, 60)
    cells = np.stack([row[PARTITION.labels[level]] for level, row in zip(levels, hidden, strict=True)])
    expected = posterior_mean(scores, cells.reshape(60, -1).astype(float), np.eye(math.prod(GRID)))
    found = UnitWeights.of(scores, masks).cells(PARTITION.labels)
    np.testing.assert_allclose(found, expected.reshape(-1, *GRID), atol=1e-7)


def test_ridge_on_steps_is_the_posterior_mean_of_its_prior():
    steps = Partition.of(np.arange(30)[None])
    masks, rng = Masks(steps, 50, 0.7, 0, "steps"), np.random.default_rng(0)
    root = gaussian_filter1d(np.eye(30), SIGMA / math.sqrt(2), mode="constant")
    hidden, scores = masks.draw(0, 50)[1].astype(float), rng.standard_normal((50, 3))
    expected = posterior_mean(scores, hidden, root @ root.T)
    np.testing.assert_allclose(UnitWeights.of(scores, masks).cells(steps.labels), expected, atol=1e-7)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_finds_what_was_planted_and_ridge_with_fewer_masks(estimator):
    scores, masks, planted = noisy(400, "b", noise=1.0)
    scores = np.maximum(scores, 0)
    cells = estimate(scores, masks, estimator).cells(PARTITION.labels)
    fit = [np.corrcoef(found.ravel(), truth.ravel())[0, 1] for found, truth in zip(cells, planted, strict=True)]
    assert min(fit) > (0.65 if estimator.endswith("mean") else 0.85)


def test_the_root_is_regressed_by_its_name():
    scores, masks, _ = noisy(40, "c")
    scores = scores**2
    for name, kind in (("ridge", UnitWeights), ("mean", UnitScores)):
        found = estimate(scores, masks, f"sqrt_{name}").cells(PARTITION.labels)
        assert np.array_equal(found, kind.of(np.sqrt(scores), masks).cells(PARTITION.labels))


@pytest.mark.parametrize("estimator", ["mean", "ridge"])
def test_reliability_foretells_the_agreement_with_a_second_map(estimator):
    (scores, masks, _), (others, other_masks, _) = noisy(600, "first"), noisy(600, "the second")
    foretold = reliability(scores, masks, estimator, lambda cells: cells)
    maps = (estimate(scores, masks, estimator), estimate(others, other_masks, estimator))
    found = np.corrcoef(*(units.cells(PARTITION.labels).ravel() for units in maps))[0, 1]
    assert 0.3 < found < 0.97 and foretold == pytest.approx(found, abs=0.06)


def test_halves_have_all_levels_and_share_nothing():
    scores, masks, _ = noisy(61, "d")
    first = np.arange(61) // 2 % 2 == 0
    halves = [UnitScores.of(scores, masks, used) for used in (first, ~first)]
    whole = UnitScores.of(scores, masks)
    np.testing.assert_allclose(sum(half.sums for half in halves), whole.sums)
    assert np.array_equal(sum(half.counts for half in halves), whole.counts)
    assert all((half.counts > 0).all() for half in halves)


def test_a_flat_half_has_no_reliability():
    masks = Masks(PARTITION, 20, 0.5, 0, "e")
    assert math.isnan(reliability(np.zeros((20, 2), dtype=np.float32), masks, "mean", lambda cells: cells))


def test_compact_weights_expand_to_their_cells():
    maps = random_maps().drop_vars(["input_saliency", "segment_score", "segment_count"])
    weights = UnitWeights(np.random.default_rng(0).standard_normal((5, int(maps.segmentation.max()) + 1)))
    expanded = expand(maps.assign(weights.compact()))
    assert np.array_equal(expanded.input_saliency, weights.cells(maps.segmentation.values))
