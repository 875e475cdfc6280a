"""How much of a map is noise: split halves of the perturbations, and maps of few against many."""

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import xarray as xr
from scipy import stats

from xattn.analysis.correlation import normalised_attention
from xattn.analysis.normalisation import standardise
from xattn.attribution.estimators import ESTIMATORS, estimate
from xattn.attribution.occlusion import Masks
from xattn.maps import SPECIAL_TOKENS, drop_special_tokens, frames_of_steps, masks_of, reduce_to_steps

LOW = 0.3  # below this reliability a map is mostly noise


def reliability(
    scores: np.ndarray, masks: Masks, estimator: str, compared: Callable[[np.ndarray], np.ndarray]
) -> float:
    """Split-half reliability of a map: its expected correlation with a second map from as many other perturbations.

    It is Pearson's correlation between the maps of two interleaved halves of the perturbations, corrected to their full
    number by the Spearman-Brown formula. It is NaN if a half is constant or lacks a level of the partition.

    Args:
        scores: (N, I).
        compared: turns a map (I, *cells) into what is compared, of any shape.
    """
    if len(scores) < 2 * len(masks.partition.labels):
        return math.nan
    halves = np.arange(len(scores)) // len(masks.partition.labels) % 2 == 0  # each half has all levels
    first, second = (
        compared(estimate(scores, masks, estimator, used).cells(masks.partition.labels)).reshape(-1)
        for used in (halves, ~halves)
    )
    if not (np.ptp(first) and np.ptp(second)):
        return math.nan
    r = stats.pearsonr(first, second).statistic
    return float(2 * r / (1 + r))


def map_reliability(
    scores: np.ndarray, masks: Masks, tokens: list[str], step_frames: np.ndarray, estimator: str
) -> float:
    """`reliability` of a map in the form that is correlated with attention: without special tokens, on steps.

    Args:
        scores: (N, I), for the tokens (I,) of one hypothesis.
        step_frames: see `S2TModel.step_frames`.
    """
    spoken = scores[:, ~np.isin(tokens, SPECIAL_TOKENS)]
    return reliability(spoken, masks, estimator, lambda cells: _compared(cells, step_frames))


def _compared(cells: np.ndarray, step_frames: np.ndarray) -> np.ndarray:
    """A map of cells (I, T, F) or steps (I, S) as it is compared with attention: (I, S)."""
    normalised = standardise(cells)
    return normalised if normalised.ndim == 2 else reduce_to_steps(normalised, step_frames)


def noise_ceiling(reliabilities: xr.DataArray) -> xr.DataArray:
    """The square root of each reliability, which by classical test theory no correlation with the map exceeds.

    It is NaN where the halves disagree.
    """
    return np.sqrt(reliabilities.where(reliabilities > 0))


def corrected_for_noise(rho: xr.Dataset) -> xr.Dataset:
    """Divide the results of `correlate_all` by their `noise_ceiling`: approximately what rho would be without noise.

    The correction is not exact: the maximum of "2d_max" is not linear, so it is too small there; and a regression that
    makes neighbouring steps similar raises rho as well as the reliability, so it is too large there.
    """
    corrected = rho.drop_vars("reliability") / noise_ceiling(rho.reliability)
    if "difference" in rho.saliency:
        difference = corrected.sel(saliency="encoder") - corrected.sel(saliency="input")
        corrected = corrected.where(corrected.saliency != "difference", difference)
    return corrected


def convergence(maps: xr.Dataset, place: str) -> pd.DataFrame:
    """Compare maps from the first few stored perturbations with the published mean of all later ones.

    The first eightieth to tenth of the perturbations are used, at least 12 of them; the reference shares none of them.

    Args:
        place: "input" (SM^X) or "encoder" (SM^H).

    Returns:
        A long table with the columns source (the place), estimator, perturbations, r (Pearson's correlation of the maps
        in the form that is compared with attention) and bias (of rho with attention averaged over layers and heads).
    """
    spoken = drop_special_tokens(maps)
    scores, masks = spoken[f"{place}_scores"].values, masks_of(maps, place)
    numbers = [max(12, len(scores) // part) for part in (80, 40, 20, 10)]
    attention = normalised_attention(maps.cross_attention.mean(["layer", "head"])).values.ravel()
    step_frames = frames_of_steps(maps, maps.time.values)
    order = np.arange(len(scores))

    def compared(estimator: str, used: np.ndarray) -> np.ndarray:
        cells = estimate(scores, masks, estimator, used).cells(masks.partition.labels)
        return _compared(cells, step_frames).ravel()

    reference, rows = compared("mean", order >= numbers[-1]), []
    for number in dict.fromkeys(numbers):
        for estimator in ESTIMATORS:
            found = compared(estimator, order < number)
            r, rho, expected = np.corrcoef([found, reference, attention])[np.triu_indices(3, 1)]
            rows.append((place, estimator, number, r, rho - expected))
    return pd.DataFrame(rows, columns=["source", "estimator", "perturbations", "r", "bias"])
