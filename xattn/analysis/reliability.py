"""How much of a map is noise, and what rho would be without it; maps of few perturbations against maps of many."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import xarray as xr
from scipy import stats

from xattn.analysis.normalisation import standardise, standardise_over_tokens
from xattn.attribution.estimators import estimate
from xattn.attribution.occlusion import Masks
from xattn.maps import drop_special_tokens, frames_of_steps, masks_of, reduce_to_steps

LOW = 0.3  # below this reliability a map is mostly noise
ENOUGH = 0.5  # below this mean reliability the limit of rho is not estimated


def half_maps(
    scores: np.ndarray, masks: Masks, step_frames: np.ndarray, estimator: str, reduction: str = "2d_max"
) -> np.ndarray | None:
    """Maps from the two interleaved halves of the perturbations, in the form that is correlated with attention.

    Args:
        scores: (N, I).
        step_frames: see `S2TModel.step_frames`.

    Returns:
        float64 (2, I, S), standardised per token and then reduced to steps; None if a half would lack a level of the
        partition or is constant for every token, because its perturbations hide the same cells.
    """
    halves = half_cells(scores, masks, estimator)
    return None if halves is None else np.stack([_compared(cells, step_frames, reduction) for cells in halves])


def half_cells(
    scores: np.ndarray, masks: Masks, estimator: str, used: np.ndarray | None = None
) -> list[np.ndarray] | None:
    """The two `half_maps` before any normalisation, float64 (I, *cells) each; of the perturbations `used` (N,)."""
    levels = len(masks.partition.labels)
    used = np.ones(len(scores), dtype=bool) if used is None else used
    if used.sum() < 2 * levels:
        return None
    first = np.arange(len(scores)) // levels % 2 == 0  # each half has all levels
    halves = used & first, used & ~first
    cells = [estimate(scores, masks, estimator, half).cells(masks.partition.labels) for half in halves]
    varies = [np.ptp(each, axis=tuple(range(1, each.ndim))).any() for each in cells]  # over the cells of a token
    return cells if all(varies) else None


def halves_of(maps: xr.Dataset, saliency: str, reduction: str = "2d_max") -> xr.DataArray | None:
    """`half_maps` of stored maps, (half, token, step): stored for "2d_max", otherwise computed from the scores.

    saliency: "input_saliency" or "encoder_saliency". None for maps without scores.
    """
    place = saliency.removesuffix("_saliency")
    if f"{place}_halves" not in maps:
        return None
    halves = maps[f"{place}_halves"]
    if reduction == "2d_max" or place == "encoder":  # maps on steps are not reduced
        return halves
    frames = frames_of_steps(maps, maps.time.values)
    scores = maps[f"{place}_scores"].values
    return halves.copy(data=half_maps(scores, masks_of(maps, place), frames, maps.estimator, reduction))


def split_half_reliability(halves: np.ndarray | None) -> float:
    """Reliability of a map: its expected correlation with a second map from as many other perturbations.

    It is Pearson's correlation of the two half maps (2, I, S), corrected to the full number of perturbations by the
    Spearman-Brown formula; NaN without halves, if one is constant, or if each is the opposite of the other.
    """
    if halves is None or not (np.ptp(halves[0]) and np.ptp(halves[1])):
        return math.nan
    r = stats.pearsonr(*halves.reshape(2, -1)).statistic
    return math.nan if math.isclose(r, -1) else float(2 * r / (1 + r))


def _compared(cells: np.ndarray, step_frames: np.ndarray, reduction: str = "2d_max") -> np.ndarray:
    """A map of cells (I, T, F) or steps (I, S) as it is compared with attention: (I, S)."""
    normalised = standardise(cells)
    return normalised if normalised.ndim == 2 else reduce_to_steps(normalised, step_frames, reduction)


def is_linear(maps: xr.Dataset, place: str, reduction: str = "2d_max") -> bool:
    """Whether the map of a place, "input" or "encoder", is linear in the scores, up to the reduction.

    A maximum over superpixels is not. The windows of a time partition are constant over bands and longer than a step,
    so that their maximum is almost a mean.
    """
    return place == "encoder" or reduction == "2d_avg" or maps.attrs.get("partition") == "windows"


def attenuation(rho: xr.Dataset) -> xr.DataArray:
    """By which factor noise in the maps lowers rho: (saliency,).

    It is the overall rho of all masks over the value that this converges to with more masks. With n masks, rho^-p is
    taken to be linear in 1/n, so that all masks and half of them give the limit; both are averaged over utterances
    first. For maps that are linear in the scores p is 2, which is the classical correction for attenuation. For the
    maximum over superpixels p is 1: its noise also moves the maximum to other cells. The notebook 28_estimators shows
    bias and spread.

    Args:
        rho: from `correlate_all`.

    Returns:
        A factor from 0 to 1; NaN if the halves have lost so much that there is no limit. It is 1 for maps without
        scores, whose noise is unknown.
    """
    return rho.saliency.copy(data=attenuation_of(rho)(np.arange(rho.sizes["utterance"])))


def attenuation_of(rho: xr.Dataset) -> Callable[[np.ndarray], np.ndarray]:
    """`attenuation` as a function of the indices of utterances, which returns an array (saliency,)."""
    overall = rho.overall.transpose("utterance", "saliency", "masks")
    # pandas, because its means skip utterances without halves and are much faster than those of xarray.
    everything, half = (pd.DataFrame(overall.sel(masks=part).values) for part in ("all", "half"))
    linear, known = rho.saliency.isin(rho.attrs["linear"]).values, ~_without_scores(rho).values

    def factor(rows: np.ndarray) -> np.ndarray:
        found = attenuation_factor(everything.iloc[rows].mean(), half.iloc[rows].mean(), linear)
        return np.where(known, found, 1.0)

    return factor


def attenuation_factor(everything: np.ndarray, half: np.ndarray, linear: np.ndarray) -> np.ndarray:
    """`attenuation` from rho of all masks and of half of them, and whether the map is linear in the scores."""
    power = np.where(linear, 2.0, 1.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        lost = (np.asarray(everything) / np.where(np.asarray(half) > 0, half, np.nan)) ** power
        factor = (2 - lost) ** (1 / power)  # rho^-p at infinity is 2 rho_all^-p - rho_half^-p
    return np.where(lost < 2, np.minimum(factor, 1.0), np.nan)


def _without_scores(rho: xr.Dataset) -> xr.DataArray:
    return rho.saliency.isin(rho.attrs["without_scores"])


def too_noisy(rho: xr.Dataset) -> xr.DataArray:
    """Whether maps are too noisy to say what rho converges to: bool (saliency,). Unknown noise is not too much."""
    enough = (rho.reliability.mean("utterance") >= ENOUGH) | _without_scores(rho)
    return ~enough | attenuation(rho).isnull()


def converged(rho: xr.Dataset) -> xr.Dataset:
    """The variables of `correlate_all` without noise: rho of all masks over its `attenuation`, without the axis masks.

    Every attention is compared with the same map, so that noise lowers the rho of all layers and heads by one factor.
    """
    return rho.drop_vars("reliability").sel(masks="all", drop=True) / attenuation(rho)


def convergence(
    maps: xr.Dataset, place: str, estimators: Sequence[str], numbers: Sequence[int], blocks: int
) -> pd.DataFrame:
    """Compare maps from disjoint blocks of the stored perturbations with the map from all of them.

    Args:
        place: "input" (SM^X) or "encoder" (SM^H).
        numbers: perturbations in a block; sizes of which fewer than two blocks are stored are left out.
        blocks: the largest number of blocks of each size.

    Returns:
        A long table with the columns saliency (the place), linear (see `correlate_all`), estimator, masks, block, r
        (Pearson's correlation with the map from all perturbations, both in the form that is compared with attention),
        everything and half (rho with attention averaged over layers and heads, for the block and on average for its
        halves) and reliability. NaN where a map is constant or has no halves. The rows of the map from all
        perturbations come first.
    """
    spoken = drop_special_tokens(maps)
    scores, masks = spoken[f"{place}_scores"].values, masks_of(maps, place)
    attention = standardise_over_tokens(spoken.cross_attention.mean(["layer", "head"]).values).ravel()
    step_frames = frames_of_steps(maps, maps.time.values)
    order, linear = np.arange(len(scores)), is_linear(maps, place)

    def compared(estimator: str, used: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        cells = estimate(scores, masks, estimator, used).cells(masks.partition.labels)
        halves = half_cells(scores, masks, estimator, used)
        halves = None if halves is None else np.stack([_compared(each, step_frames) for each in halves])
        return _compared(cells, step_frames), halves

    def pearson(*both: np.ndarray) -> float:
        return np.corrcoef(*(each.ravel() for each in both))[0, 1] if all(map(np.ptp, both)) else math.nan

    def row(estimator: str, number: int, block: int, found: np.ndarray, halves: np.ndarray | None) -> tuple:
        half = math.nan if halves is None else np.mean([pearson(attention, each) for each in halves])
        measured = pearson(found, reference), pearson(attention, found), half
        return place, linear, estimator, number, block, *measured, split_half_reliability(halves)

    reference, halves = compared(maps.estimator, order >= 0)
    rows = [row(maps.estimator, len(scores), 0, reference, halves)]
    for number in (each for each in numbers if 2 * each <= len(scores)):
        for block in range(min(blocks, len(scores) // number)):
            used = order // number == block
            rows += [row(name, number, block, *compared(name, used)) for name in estimators]
    names = ["saliency", "linear", "estimator", "masks", "block", "r", "everything", "half", "reliability"]
    return pd.DataFrame(rows, columns=names)
