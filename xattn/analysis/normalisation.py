"""Normalisations that precede a comparison of maps."""

import numpy as np


def standardise(saliency: np.ndarray) -> np.ndarray:
    """Normalise each token's map: subtract its mean and divide by its sample standard deviation (paper, section 3).

    saliency: (token, ...). NaN cells count as absent and become 0, and so does every cell of a constant map (the
    reference leaves rounding residue there).
    """
    return _standardise(saliency, axis=tuple(range(1, saliency.ndim)))


def standardise_over_tokens(attention: np.ndarray) -> np.ndarray:
    """Normalise each encoder step over the tokens, which damps attention sinks (paper, section 3: "frame-wise").

    attention: (..., token, step); a step whose weight never changes becomes 0.
    """
    return _standardise(attention, axis=(-2,))


def min_max(*maps: np.ndarray) -> list[np.ndarray]:
    """Scale each token's maps, taken together, to the range 0..1.

    Several maps (token, ...) of the same tokens share a minimum and maximum, as SPES does for the maps of the
    spectrogram and the previous tokens. NaN cells count as absent and become 0, and so does a constant token (the
    reference returns NaN).
    """
    flat = np.concatenate([values.reshape(len(values), -1) for values in maps], axis=1)
    low, high = np.nanmin(flat, axis=1), np.nanmax(flat, axis=1)
    scaled = []
    for values in maps:
        shape = (-1, *[1] * (values.ndim - 1))
        low_, range_ = low.reshape(shape), (high - low).reshape(shape)
        scaled.append(np.nan_to_num(np.divide(values - low_, range_, out=np.zeros_like(values), where=range_ > 0)))
    return scaled


def _standardise(values: np.ndarray, axis: tuple[int, ...]) -> np.ndarray:
    values = values.astype(np.float64)
    # Compare exactly: rounding of a constant map's mean would leave a deviation to divide by.
    varies = np.nanmax(values, axis=axis, keepdims=True) > np.nanmin(values, axis=axis, keepdims=True)
    centred = values - np.nanmean(values, axis=axis, keepdims=True)
    present = (~np.isnan(values)).sum(axis=axis, keepdims=True)
    deviation = np.sqrt(np.nansum(centred**2, axis=axis, keepdims=True) / np.maximum(present - 1, 1))
    return np.nan_to_num(np.divide(centred, deviation, out=np.zeros_like(centred), where=varies & (deviation > 0)))
