"""From the scores of perturbations to a map: the published mean, and a regression that needs fewer of them.

The published estimator (paper, definitions) credits a unit with the mean score of the perturbations that hid it. It is
noisy for two reasons: divergences are heavy-tailed, so that a few perturbations decide a mean, and many other units
were hidden in each of them too. The root of the score calms the tail, but is a slightly different thing to explain. A
regression on everything that was hidden explains the other units away, but shrinks its weights towards 0. Both stand
beside the published mean, not for it.

Letters in shapes: N perturbations, G levels, K units of all levels together, I tokens; "cells" stands for (time, mel)
or (step,).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from scipy import sparse, stats
from scipy.ndimage import gaussian_filter1d

from xattn.occlusion import Masks, Partition

ESTIMATORS = ("mean", "sqrt_mean", "ridge", "sqrt_ridge")
# How far the prior makes neighbouring steps alike. Superpixels have no such prior: a Gaussian over time and band,
# 2 cells wide, gave r 0.89 instead of 0.87 (1,000 of 20,000 masks, 8 utterances), which is not worth its code and time.
SIGMA = 1.0  # steps
STRENGTH = 3.0  # of the shrinkage, in units of the mean prior variance of a score
BLOCK = 1024  # perturbations whose masks are in memory at once


@dataclass(frozen=True)
class UnitScores:
    """What perturbations say of units. sums: float64 (I, K), summed scores of the perturbations that hid each unit;
    counts: int64 (K,), how many there were."""

    sums: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, scores: np.ndarray, masks: Masks, used: np.ndarray | None = None) -> "UnitScores":
        """From the scores (N, I) of all perturbations, or of those `used` (N,), summed in float64."""
        bounds, units = masks.partition.bounds, masks.partition.units
        sums, counts = torch.zeros(scores.shape[1], units, dtype=torch.float64), np.zeros(units, dtype=np.int64)
        used = np.ones(len(scores), dtype=bool) if used is None else used
        for start in range(0, len(scores), BLOCK):
            levels, hidden = masks.draw(start, min(start + BLOCK, len(scores)))
            for level in np.unique(levels):
                rows = np.flatnonzero((levels == level) & used[start : start + BLOCK])
                own = slice(bounds[level], bounds[level + 1])
                # In torch, as numpy's matrix product has threads of its own, which would fight the model's.
                sums[:, own] += (
                    torch.from_numpy(scores[start + rows]).double().T @ torch.from_numpy(hidden[rows, own]).double()
                )
                counts[own] += hidden[rows, own].sum(axis=0)
        return cls(sums.numpy(), counts)

    def cells(self, labels: np.ndarray) -> np.ndarray:
        """The map: mean score over the perturbations that hid a cell, at whichever level, 0 where none did.

        labels: (G, *cells) of the partition; returns float64 (I, *cells).
        """
        counts = self.counts[labels].sum(axis=0)  # (*cells)
        sums = _added_up(self.sums, labels)
        return np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)

    def compact(self) -> dict:
        """As variables of a dataset."""
        return {"segment_score": (("token", "segment"), self.sums), "segment_count": (("segment",), self.counts)}


@dataclass(frozen=True)
class UnitWeights:
    """A ridge regression of the score on the hidden cells: float64 (I, K), each unit's share of its cells' weights.

    The score is modelled as a constant, plus the weights of the cells that are hidden, plus noise. Weights are a priori
    normal and independent, those of encoder steps with a covariance that falls off as a Gaussian of SIGMA steps. In the
    dual form a cell's weight is the sum of its units' shares (smoothed, for steps), as compact as `UnitScores`.
    """

    weights: np.ndarray

    @classmethod
    def of(cls, scores: np.ndarray, masks: Masks, used: np.ndarray | None = None) -> "UnitWeights":
        """From the scores (N, I) of all perturbations, or of those `used` (N,); solves for one unknown each."""
        rows = np.arange(len(scores)) if used is None else np.flatnonzero(used)
        hidden = masks.draw(0, rows[-1] + 1)[1][rows].astype(np.float64)  # (N, K)
        gram = torch.from_numpy(hidden) @ torch.from_numpy(_covariance(masks.partition.labels) @ hidden.T)
        gram -= gram.mean(dim=0)
        gram -= gram.mean(dim=1, keepdim=True)
        gram.diagonal().add_(STRENGTH * gram.diagonal().mean())
        scores = scores[rows].astype(np.float64)
        centred = torch.from_numpy(scores - scores.mean(axis=0))
        dual = torch.linalg.solve(gram, centred)  # (N, I)
        return cls((dual.T @ torch.from_numpy(hidden)).numpy())

    def cells(self, labels: np.ndarray) -> np.ndarray:
        """The map: weights of cells, float64 (I, *cells); labels (G, *cells) of the partition."""
        cells = _added_up(self.weights, labels)
        return cells if cells.ndim > 2 else _smooth(cells)

    def compact(self) -> dict:
        """As variables of a dataset."""
        return {"segment_weight": (("token", "segment"), self.weights)}


def _added_up(units: np.ndarray, labels: np.ndarray) -> np.ndarray:
    cells = np.zeros((len(units), *labels.shape[1:]))
    for level in labels:
        cells += units[:, level]
    return cells


def _covariance(labels: np.ndarray) -> sparse.csr_array | np.ndarray:
    """Prior covariance (K, K) of the weights of units, each the sum of its cells' weights."""
    if labels.ndim == 2:
        return _smooth(np.eye(labels.shape[1]))
    cells = np.tile(np.arange(labels[0].size), len(labels))
    members = sparse.csr_array((np.ones(labels.size), (cells, labels.ravel())))  # (cells, K)
    return members.T @ members


def _smooth(steps: np.ndarray) -> np.ndarray:
    """A Gaussian of SIGMA along steps (n, S), as the product of two equal ones, so that it is a covariance."""
    for _ in range(2):
        steps = gaussian_filter1d(steps, SIGMA / math.sqrt(2), mode="constant")
    return steps


def estimate(
    scores: np.ndarray, masks: Masks, estimator: str = "mean", used: np.ndarray | None = None
) -> UnitScores | UnitWeights:
    """What the scores (N, I) say of units, by one of ESTIMATORS: mean or regression, of the scores or their roots."""
    if estimator.startswith("sqrt_"):
        scores = np.sqrt(np.maximum(scores, 0))  # rounding can take a divergence below 0
    return (UnitWeights if estimator.endswith("ridge") else UnitScores).of(scores, masks, used)


def reliability(scores: np.ndarray, masks: Masks, estimator: str, reduced: Callable[[np.ndarray], np.ndarray]) -> float:
    """Split-half reliability of a map: the correlation expected with a second map from as many other perturbations.

    Pearson's correlation between the maps of two interleaved halves of the perturbations, stepped up to their whole
    number by the Spearman-Brown formula. Undefined (NaN) where a half is flat or has no perturbation of some level.

    Args:
        reduced: from cells (I, *cells) to what is compared, any shape.
    """
    if len(scores) < 2 * len(masks.partition.labels):
        return math.nan
    halves = np.arange(len(scores)) // len(masks.partition.labels) % 2 == 0  # each half has all levels
    first, second = (
        reduced(estimate(scores, masks, estimator, used).cells(masks.partition.labels)).reshape(-1)
        for used in (halves, ~halves)
    )
    if not (np.ptp(first) and np.ptp(second)):
        return math.nan
    r = stats.pearsonr(first, second).statistic
    return float(2 * r / (1 + r))


def masks_of(maps: xr.Dataset, source: str) -> Masks:
    """The perturbations behind the stored scores of a source, "input" or "encoder"."""
    labels = maps.segmentation.values if source == "input" else np.arange(maps.sizes["step"])[None]
    bounds = np.array([*(level.min() for level in labels), labels.max() + 1])
    number, p = maps.sizes[f"{source}_mask"], maps.attrs[f"{source}_p"]
    return Masks(Partition(labels, bounds), number, p, maps.seed, f"{maps.utterance}/{source}")


def expand(maps: xr.Dataset) -> xr.Dataset:
    """Add SM^X per cell, input_saliency (token, time, mel), to maps that hold its compact form; those of other tools
    have none and hold it already."""
    if "segmentation" not in maps:
        return maps
    if "segment_weight" in maps:
        units = UnitWeights(maps.segment_weight.values)
    else:
        units = UnitScores(maps.segment_score.values, maps.segment_count.values)
    return maps.assign(input_saliency=(("token", "time", "mel"), units.cells(maps.segmentation.values)))
