"""Confidence intervals over utterances."""

import numpy as np
from scipy import stats

RESAMPLES = 2000  # bootstrap resamples of the utterances for a mean


def mean_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Mean over utterances and its 95 % interval by the percentile bootstrap.

    values: one number an utterance, (n,). A single one has no interval (NaN), and no utterance has no mean either.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        return float(values.mean()) if len(values) else np.nan, np.nan, np.nan
    interval = stats.bootstrap(
        (values,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(seed)
    ).confidence_interval
    return float(values.mean()), float(interval.low), float(interval.high)


def difference_interval(first: np.ndarray, second: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """Difference of the means of two independent samples, (n,) and (m,), and its 95 % percentile bootstrap interval."""
    result = stats.bootstrap(
        (first, second),
        lambda a, b, axis: a.mean(axis=axis) - b.mean(axis=axis),
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(np.mean(first) - np.mean(second)), *map(float, result.confidence_interval)
