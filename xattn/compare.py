"""Attention against saliency: reduction to the encoder's time axis, normalisation, correlation, intervals."""

from collections.abc import Iterable

import numpy as np
import pandas as pd
import xarray as xr
from scipy import stats

from xattn.attention import with_means
from xattn.estimators import ESTIMATORS, estimate, masks_of

REDUCTIONS = ("2d_max", "2d_avg", "1d_max_1d_avg")
SPECIAL_TOKENS = ("</s>", "<s>", "<|endoftext|>")  # BOS and EOS, the last one Whisper's
SOURCES = ("input", "encoder")  # of saliency


def mean_std(*maps: np.ndarray) -> list[np.ndarray]:
    """Normalise each token's own map: subtract its mean, divide by its sample standard deviation (paper: SM^X, SM^H).

    Each map has shape (token, ...). Cells that are NaN count as absent and become 0, and so does every cell of a map
    without spread, where the reference leaves rounding residue.
    """
    return [_standardise(values, axis=tuple(range(1, values.ndim))) for values in maps]


def min_max(*maps: np.ndarray) -> list[np.ndarray]:
    """Bring each token's maps, taken together, to the range 0..1.

    Several maps (token, ...) of the same tokens share one minimum and maximum, as SPES pairs the spectrogram's map
    with that of the previous tokens. NaN cells count as absent and become 0; a token without range becomes 0, where
    the reference gives NaN.
    """
    flat = np.concatenate([values.reshape(len(values), -1) for values in maps], axis=1)
    low, high = np.nanmin(flat, axis=1), np.nanmax(flat, axis=1)
    scaled = []
    for values in maps:
        shape = (-1, *[1] * (values.ndim - 1))
        low_, range_ = low.reshape(shape), (high - low).reshape(shape)
        scaled.append(np.nan_to_num(np.divide(values - low_, range_, out=np.zeros_like(values), where=range_ > 0)))
    return scaled


def frame_wise(attention: np.ndarray) -> np.ndarray:
    """Mean-variance normalise every encoder step over the tokens, which damps attention sinks (paper: CA).

    attention: (..., token, step); a step whose weight never changes becomes 0.
    """
    return _standardise(attention, axis=(-2,))


def _standardise(values: np.ndarray, axis: tuple[int, ...]) -> np.ndarray:
    values = values.astype(np.float64)
    # Compared exactly, because the rounding of a constant map's mean would leave a spread to divide by.
    spread = np.nanmax(values, axis=axis, keepdims=True) > np.nanmin(values, axis=axis, keepdims=True)
    centred = values - np.nanmean(values, axis=axis, keepdims=True)
    present = (~np.isnan(values)).sum(axis=axis, keepdims=True)
    deviation = np.sqrt(np.nansum(centred**2, axis=axis, keepdims=True) / np.maximum(present - 1, 1))
    return np.nan_to_num(np.divide(centred, deviation, out=np.zeros_like(centred), where=spread & (deviation > 0)))


def reduce_to_steps(saliency: np.ndarray, steps: int, window: int, how: str = "2d_max", lead: int = 0) -> np.ndarray:
    """Reduce a spectrogram's map (token, time, mel) to the encoder's time axis: (token, step).

    Step s covers the `window` frames from s * window - lead on; the first and the last window, where incomplete, repeat
    the first and the last frame, and frames past the last window, where a lead leaves some, belong to no step.
    "2d_max" is the maximum over the window and all bands, "2d_avg" the mean. For "1d_max_1d_avg" the paper leaves the
    axes open; here it is the maximum over the bands, then the mean over the window's frames.
    """
    if how not in REDUCTIONS:
        raise ValueError(f"There is no reduction {how!r}: choose one of {', '.join(REDUCTIONS)}.")
    tokens, frames, mels = saliency.shape
    if not windows_fit(frames, steps, window, lead):
        raise ValueError(
            f"{steps} steps of {window} frames do not fit {frames} frames: give the model's own subsampling."
        )
    missing = max(0, steps * window - lead - frames)
    padded = np.pad(saliency, ((0, 0), (lead, missing), (0, 0)), mode="edge")[:, : steps * window]
    windows = padded.reshape(tokens, steps, window, mels)
    if how == "2d_max":
        return windows.max(axis=(2, 3))
    if how == "2d_avg":
        return windows.mean(axis=(2, 3))
    return windows.max(axis=3).mean(axis=2)


def windows_fit(frames: int, steps: int, window: int, lead: int = 0) -> bool:
    """Whether an input of `frames` frames has this many encoder steps; see `reduce_to_steps`."""
    missing = steps * window - lead - frames
    return lead - window < missing <= lead if lead else 0 <= missing < window


def sources_of(maps: xr.Dataset) -> list[str]:
    """The sources of saliency that the maps hold; those of other tools may lack SM^H."""
    return [source for source in SOURCES if f"{source}_saliency" in maps]


def spoken_tokens(maps: xr.Dataset) -> xr.Dataset:
    """The maps without the rows of BOS and EOS, which the paper leaves out of every correlation."""
    return maps.isel(token=~np.isin(maps.token.values, SPECIAL_TOKENS))


def on_steps(saliency: np.ndarray, steps: int, window: int, reduction: str = "2d_max", lead: int = 0) -> np.ndarray:
    """Saliency of cells (token, time, mel) or of steps (token, step) as attention is compared with it: (token, step).

    Normalised over a token's whole map and then, where it is of cells, reduced to the encoder's steps.
    """
    normalised = mean_std(saliency)[0]
    return normalised if normalised.ndim == 2 else reduce_to_steps(normalised, steps, window, reduction, lead)


def lead_of(maps: xr.Dataset) -> int:
    """Frames by which the first step's window begins before the first frame; maps of most models do not note it: 0."""
    return maps.attrs.get("lead", 0)


def saliency_on_steps(maps: xr.Dataset, source: str, reduction: str = "2d_max") -> np.ndarray:
    """`on_steps` for the maps of an utterance, of the source "input" (SM^X) or "encoder" (SM^H)."""
    if source not in SOURCES:
        raise ValueError(f"There is no saliency source {source!r}: choose 'input' (SM^X) or 'encoder' (SM^H).")
    if source not in sources_of(maps):
        raise ValueError(f"The maps of {maps.utterance} hold no {source} saliency: add it to what they were read from.")
    values = maps[f"{source}_saliency"].values
    return on_steps(values, maps.sizes["step"], maps.subsampling, reduction, lead_of(maps))


def correlate(maps: xr.Dataset, source: str, reduction: str = "2d_max") -> xr.DataArray:
    """rho(CA, SM^X) or rho(CA, SM^H) of one utterance for every layer and head and their means.

    Pearson's correlation of the two flattened token x step matrices after normalisation (paper, definitions).

    Args:
        maps: a dataset of `xattn.explain`.
        source: "input" for SM^X, "encoder" for SM^H.
        reduction: how SM^X comes to the encoder's time axis; see `reduce_to_steps`.

    Returns:
        (layer, head), with the label "mean" for averages as in `with_means`.

    Raises:
        ValueError: fewer than two tokens, or a map without any spread, for which rho is undefined.
    """
    maps = spoken_tokens(maps)
    if maps.sizes["token"] < 2:
        raise ValueError(f"The hypothesis of {maps.utterance} has fewer than two tokens: leave it out of correlations.")
    saliency = saliency_on_steps(maps, source, reduction)
    if not saliency.any():
        raise ValueError(f"The {source} saliency of {maps.utterance} is flat: explain it again with more masks.")
    attention = with_means(maps.cross_attention)
    normalised = frame_wise(attention.values)
    flat = normalised.reshape(*normalised.shape[:2], -1)
    if not flat.any(axis=-1).all():
        row, column = np.argwhere(~flat.any(axis=-1))[0]
        layer, head = attention.layer.values[row], attention["head"].values[column]
        raise ValueError(
            f"The attention of layer {layer}, head {head} to {maps.utterance} never changes, so it correlates with "
            "nothing: check the model, or leave the utterance out."
        )
    rho = stats.pearsonr(flat, saliency.reshape(1, 1, -1), axis=-1).statistic
    return attention.isel(token=0, step=0, drop=True).copy(data=rho).rename("rho")


def correlations(maps: Iterable[xr.Dataset], reduction: str = "2d_max") -> xr.DataArray:
    """`correlate` for datasets of one model and setting: (source, utterance, layer, head).

    source: "input", "encoder", and "difference" for encoder minus input utterance by utterance; "input" alone for maps
    without SM^H. The coordinate `reliability` (source, utterance) is the stored one, of saliency reduced by "2d_max";
    the difference has none (NaN).
    """
    rows = []
    for item in maps:
        rho = {source: correlate(item, source, reduction) for source in sources_of(item)}
        reliability = [item.attrs[f"{source}_reliability"] for source in rho]
        if len(rho) == len(SOURCES):
            rho["difference"] = rho["encoder"] - rho["input"]
            reliability.append(np.nan)
        stacked = xr.concat([value.expand_dims(source=[source]) for source, value in rho.items()], "source")
        stacked = stacked.assign_coords(reliability=("source", reliability))
        rows.append(stacked.expand_dims(utterance=[item.utterance]))
    rho = xr.concat(rows, "utterance", coords=["reliability"]).transpose("source", "utterance", "layer", "head")
    return rho.assign_attrs(model=item.model, setting=item.setting, estimator=item.estimator)


def noise_ceiling(rho: xr.DataArray) -> xr.DataArray:
    """The root of each map's reliability (source, utterance), which no correlation with it exceeds in the classical
    theory of tests; undefined (NaN) where its halves disagree, and for the difference. rho: of `correlations`."""
    return np.sqrt(rho.reliability.where(rho.reliability > 0))


def corrected_for_noise(rho: xr.DataArray) -> xr.DataArray:
    """`correlations` over `noise_ceiling`, utterance by utterance: what rho would be without noise, approximately.

    The maximum in "2d_max" is not linear, and a regression that makes neighbours alike both lowers the noise and moves
    rho, so that the correction undoes a part of the loss of the one and overshoots for the other.
    """
    corrected = rho / noise_ceiling(rho)
    if "difference" in rho.source:
        corrected.loc[{"source": "difference"}] = corrected.sel(source="encoder") - corrected.sel(source="input")
    return corrected


def correlation_table(rho: xr.DataArray) -> pd.DataFrame:
    """Means over utterances of `correlations`, with their 95 % intervals.

    Returns a long table with the columns model, setting, estimator, source, layer, head, rho, low, high, corrected
    (`corrected_for_noise`, over the utterances that have it), corrected_low, corrected_high, ceiling (`noise_ceiling`)
    and n (utterances).
    """
    grouped = rho.to_series().groupby(["source", "layer", "head"], sort=False)
    summary = grouped.apply(lambda values: pd.Series(mean_interval(values), ["rho", "low", "high"])).unstack()
    corrected = corrected_for_noise(rho).to_series().groupby(["source", "layer", "head"], sort=False)
    names = ["corrected", "corrected_low", "corrected_high"]
    summary[names] = corrected.apply(lambda values: pd.Series(mean_interval(values.dropna()), names)).unstack()
    summary["ceiling"] = noise_ceiling(rho).mean("utterance").to_series().reindex(summary.index, level="source")
    table = summary.assign(n=grouped.size()).reset_index()
    return table.assign(**rho.attrs)[["model", "setting", "estimator", *table.columns]]


def few_against_all(maps: xr.Dataset, source: str) -> pd.DataFrame:
    """How saliency from a part of the stored perturbations agrees with the published mean of all others.

    The parts are the first eightieth to tenth of the perturbations, at least 12 of them; the reference is the mean of
    those past the largest part, so that the two share none.

    Returns a long table with the columns source, estimator, perturbations, r (Pearson's, of the maps as attention is
    compared with them, over spoken tokens) and bias (of rho with the attention averaged over layers and heads).
    """
    spoken = spoken_tokens(maps)
    scores, masks = spoken[f"{source}_scores"].values, masks_of(maps, source)
    numbers = [max(12, len(scores) // part) for part in (80, 40, 20, 10)]
    attention = frame_wise(spoken.cross_attention.mean(["layer", "head"]).values).ravel()
    place = np.arange(len(scores))

    def reduced(estimator: str, used: np.ndarray) -> np.ndarray:
        cells = estimate(scores, masks, estimator, used).cells(masks.partition.labels)
        return on_steps(cells, maps.sizes["step"], maps.subsampling, lead=lead_of(maps)).ravel()

    reference, rows = reduced("mean", place >= numbers[-1]), []
    for number in dict.fromkeys(numbers):
        for estimator in ESTIMATORS:
            found = reduced(estimator, place < number)
            r, rho, expected = np.corrcoef([found, reference, attention])[np.triu_indices(3, 1)]
            rows.append((source, estimator, number, r, rho - expected))
    return pd.DataFrame(rows, columns=["source", "estimator", "perturbations", "r", "bias"])


def mean_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Mean over utterances and its 95 % interval by the percentile bootstrap (scipy, 2,000 resamples).

    values: one number an utterance, (n,); with a single one the interval is undefined (NaN), with none the mean too.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        return float(values.mean()) if len(values) else np.nan, np.nan, np.nan
    interval = stats.bootstrap(
        (values,), np.mean, n_resamples=2000, method="percentile", rng=np.random.default_rng(seed)
    ).confidence_interval
    return float(values.mean()), float(interval.low), float(interval.high)
