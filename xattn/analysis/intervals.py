"""Confidence intervals over utterances: Student's t, on jackknife pseudo-values where a statistic is not a mean."""

from collections.abc import Callable

import numpy as np
from scipy import stats

LEVEL = 0.95


def mean_interval(values: np.ndarray, level: float = LEVEL) -> tuple[float, float, float]:
    """Mean over utterances with its Student interval: value, low, high.

    values: one number for each utterance, (n,). A single one has no interval (NaN), no utterance has no mean either.
    """
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        return float(values.mean()) if len(values) else np.nan, np.nan, np.nan
    return tuple(float(each) for each in _student(values, level))


def jackknife_interval(
    statistic: Callable[[np.ndarray], np.ndarray | float], n: int, level: float = LEVEL
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A statistic of n utterances with its jackknife interval: value, low, high, each of the statistic's shape.

    The pseudo-values n * all - (n - 1) * all but one are treated like independent observations (Tukey 1958); for a mean
    this is Student's interval. The interval is centred on the statistic itself. It needs a smooth statistic: a best
    layer has to be chosen on other utterances, see `chosen_on_others`.

    Args:
        statistic: of the utterances with the given indices, (m,).
    """
    everything = np.arange(n)
    value = np.asarray(statistic(everything), dtype=np.float64)
    if n < 2:
        return value, np.full_like(value, np.nan), np.full_like(value, np.nan)
    others = np.stack([np.asarray(statistic(np.delete(everything, left_out))) for left_out in everything])
    _, low, high = _student(n * value - (n - 1) * others, level)
    half = (high - low) / 2
    return value, value - half, value + half


def rate_interval(counts: np.ndarray, level: float = LEVEL) -> tuple[float, float, float]:
    """A rate of events over utterances, such as a word error rate: value, low, high.

    counts: events and trials of each utterance, (n, 2). Rates of utterances are skewed, so the jackknife works on the
    logarithm of the rate, with half an event added to avoid log 0.
    """

    def log_rate(rows: np.ndarray) -> float:
        events, trials = counts[rows].sum(axis=0)
        return np.log((events + 0.5) / trials)

    events, trials = counts.sum(axis=0)
    _, low, high = jackknife_interval(log_rate, len(counts), level)
    return float(events / trials), min(float(np.exp(low)), events / trials), float(np.exp(high))


def difference_interval(first: np.ndarray, second: np.ndarray, level: float = LEVEL) -> tuple[float, float, float]:
    """Difference of the means of two independent samples, (n,) and (m,), with Welch's interval: value, low, high."""
    difference = float(np.mean(first) - np.mean(second))
    if min(len(first), len(second)) < 2:
        return difference, np.nan, np.nan
    variances = [np.var(sample, ddof=1) / len(sample) for sample in (first, second)]
    total = sum(variances)
    if total == 0:
        return difference, difference, difference
    freedom = total**2 / sum(v**2 / (len(s) - 1) for v, s in zip(variances, (first, second), strict=True))
    half = stats.t.ppf((1 + level) / 2, freedom) * np.sqrt(total)
    return difference, difference - half, difference + half


def chosen_on_others(values: np.ndarray) -> np.ndarray:
    """The values of the best column, chosen for even rows by the mean over odd rows and the reverse: (n,).

    A best layer or head that is chosen and reported on the same utterances looks better than it is. (Choosing for each
    row on all others would give intervals that are much too narrow where candidates are equally good.) A single row is
    its own choice.

    values: one row for each utterance, one column for each candidate, (n, k).
    """
    even = np.arange(len(values)) % 2 == 0
    chosen = np.empty(len(values))
    for own, others in ((even, ~even), (~even, even)):
        chosen[own] = values[own][:, values[others if others.any() else own].mean(axis=0).argmax()]
    return chosen


def _student(values: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over the first axis with its Student interval."""
    n, mean = len(values), values.mean(axis=0)
    half = stats.t.ppf((1 + level) / 2, n - 1) * values.std(axis=0, ddof=1) / np.sqrt(n)
    return mean, mean - half, mean + half
