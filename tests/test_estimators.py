"""Estimators against their definitions, such as a dense ridge regression at the stated strength."""

import math

import numpy as np
import pytest
import torch
from conftest import GivenMasks
from scipy.ndimage import gaussian_filter1d

from xattn.attribution.estimators import ESTIMATORS, UnitScores, UnitWeights, estimate
from xattn.attribution.occlusion import Masks, Partition, occlude

GRID = (12, 8)
ROWS, COLUMNS = np.indices(GRID)
LEVELS = np.stack([ROWS // 2 * 4 + COLUMNS // 2, ROWS // 4 * 2 + COLUMNS // 4])
PARTITION = Partition.of(LEVELS)
STEPS = Partition.of(np.arange(30)[None])


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


def random_scores_of_steps():
    masks = Masks(STEPS, 50, 0.7, 0, "steps")
    return np.random.default_rng(0).standard_normal((50, 3)), masks


def posterior_mean(scores, hidden, prior):
    """Weights of cells (I, cells) from masks (N, cells), by the textbook's primal formula.

    The variance of the noise is three times the mean prior variance of a score.
    """
    centred = hidden - hidden.mean(axis=0)
    noise = 3.0 * np.trace(centred @ prior @ centred.T) / len(hidden)
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
    scores, masks = random_scores_of_steps()
    root = gaussian_filter1d(np.eye(30), 1 / math.sqrt(2), mode="constant")  # twice, it smooths by one step
    expected = posterior_mean(scores, masks.draw(0, 50)[1].astype(float), root @ root.T)
    np.testing.assert_allclose(UnitWeights.of(scores, masks).cells(STEPS.labels), expected, atol=1e-7)


def test_ridge_solves_a_symmetric_system(monkeypatch):
    """Centred rows do not change the solution for centred scores, but keep the system symmetric."""
    systems, solve = [], torch.linalg.solve
    monkeypatch.setattr(torch.linalg, "solve", lambda gram, scores: systems.append(gram) or solve(gram, scores))
    UnitWeights.of(*random_scores_of_steps())
    (gram,) = systems
    np.testing.assert_allclose(gram, gram.T, atol=1e-12)
    assert torch.linalg.eigvalsh(gram).min() > 0


def test_ridge_fits_the_perturbations_that_are_used():
    scores, masks = random_scores_of_steps()
    used, hidden = np.arange(50) % 3 > 0, masks.draw(0, 50)[1].astype(float)
    root = gaussian_filter1d(np.eye(30), 1 / math.sqrt(2), mode="constant")
    expected = posterior_mean(scores[used], hidden[used], root @ root.T)
    np.testing.assert_allclose(UnitWeights.of(scores, masks, used).cells(STEPS.labels), expected, atol=1e-7)


@pytest.mark.parametrize("partition", [PARTITION, STEPS])
@pytest.mark.parametrize(("number", "p"), [(3, 0.0), (3, 1.0), (100, 0.0), (100, 1.0), (1, 0.5)])
def test_ridge_gives_no_weight_to_cells_that_the_perturbations_do_not_tell_apart(partition, number, p):
    scores = np.random.default_rng(0).standard_normal((number, 2))
    for kind in ("ridge", "sqrt_ridge"):
        cells = estimate(scores, Masks(partition, number, p, 0, "e"), kind).cells(partition.labels)
        assert cells.shape == (2, *partition.labels.shape[1:]) and not cells.any()


@pytest.mark.parametrize("number", [2, 3])
def test_ridge_tells_masks_apart_that_differ_in_one_step(number):
    hidden, scores = np.ones((number, 30)), np.random.default_rng(0).standard_normal((number, 2))
    hidden[0, 4] = 0
    masks = GivenMasks(STEPS, [(0, row == 1) for row in hidden])
    root = gaussian_filter1d(np.eye(30), 1 / math.sqrt(2), mode="constant")
    expected = posterior_mean(scores, hidden, root @ root.T)
    np.testing.assert_allclose(UnitWeights.of(scores, masks).cells(STEPS.labels), expected, atol=1e-7)
    assert np.abs(expected[:, 4]).min() > 0.01


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_finds_what_was_planted_and_ridge_finds_it_better(estimator):
    scores, masks, planted = noisy(400, "b", noise=1.0)
    scores = np.maximum(scores, 0)
    cells = estimate(scores, masks, estimator).cells(PARTITION.labels)
    fit = [np.corrcoef(found.ravel(), truth.ravel())[0, 1] for found, truth in zip(cells, planted, strict=True)]
    assert min(fit) > (0.65 if estimator.endswith("mean") else 0.85)


def test_estimators_named_sqrt_use_the_square_roots_of_the_scores():
    scores, masks, _ = noisy(40, "c")
    scores = scores**2
    for name, kind in (("ridge", UnitWeights), ("mean", UnitScores)):
        found = estimate(scores, masks, f"sqrt_{name}").cells(PARTITION.labels)
        assert np.array_equal(found, kind.of(np.sqrt(scores), masks).cells(PARTITION.labels))
    rounded = np.where(np.arange(40)[:, None] % 7 == 0, -1e-9, scores)  # rounding took these below 0
    found = estimate(rounded, masks, "sqrt_mean").cells(PARTITION.labels)
    assert np.array_equal(found, UnitScores.of(np.sqrt(rounded.clip(0)), masks).cells(PARTITION.labels))


def test_halves_have_all_levels_and_share_no_perturbation():
    scores, masks, _ = noisy(61, "d")
    first = np.arange(61) // 2 % 2 == 0
    halves = [UnitScores.of(scores, masks, used) for used in (first, ~first)]
    whole = UnitScores.of(scores, masks)
    np.testing.assert_allclose(sum(half.sums for half in halves), whole.sums)
    assert np.array_equal(sum(half.counts for half in halves), whole.counts)
    assert all((half.counts > 0).all() for half in halves)
