"""Intervals against an independent bootstrap with the number of resamples that the kit states."""

import numpy as np
import pytest

from xattn.analysis.intervals import difference_interval, mean_interval

RESAMPLES = 2000


def percentiles(resampled):
    return pytest.approx(np.percentile(resampled, [2.5, 97.5]), abs=1e-12)


def test_the_interval_of_a_mean_is_its_percentile_bootstrap():
    values = np.random.default_rng(0).normal(0.4, 0.2, 40)
    for seed in (0, 1):
        mean, *bounds = mean_interval(values, seed)
        rows = np.random.default_rng(seed).integers(0, 40, (RESAMPLES, 40))
        assert mean == pytest.approx(values.mean()) and bounds == percentiles(values[rows].mean(axis=1))


def test_the_interval_of_a_difference_is_its_percentile_bootstrap():
    rng = np.random.default_rng(0)
    first, second = rng.normal(0.4, 0.2, 40), rng.normal(0.1, 0.5, 25)
    value, *bounds = difference_interval(first, second, seed=3)
    rng = np.random.default_rng(3)
    rows, others = (rng.integers(0, n, (RESAMPLES, n)) for n in (40, 25))
    assert value == pytest.approx(first.mean() - second.mean())
    assert bounds == percentiles(first[rows].mean(axis=1) - second[others].mean(axis=1))


def test_the_interval_of_many_values_approaches_that_of_the_normal_distribution():
    values = np.random.default_rng(0).normal(0.4, 0.2, 200)
    mean, low, high = mean_interval(values)
    assert mean == pytest.approx(values.mean())
    margin = 1.96 * values.std(ddof=1) / np.sqrt(200)
    assert [low, high] == pytest.approx([mean - margin, mean + margin], abs=0.1 * margin)
    assert mean_interval(values) == (mean, low, high)
    assert mean_interval(values, seed=1)[1:] != (low, high)


def test_a_single_value_has_no_interval_and_no_value_has_no_mean():
    mean, low, high = mean_interval([0.3])
    assert mean == 0.3 and np.isnan([low, high]).all()
    assert np.isnan(mean_interval([])).all()
