"""Intervals: their limits against scipy and textbook formulas, and how often they cover the truth in simulations."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from xattn.analysis.intervals import (
    chosen_on_others,
    difference_interval,
    jackknife_interval,
    mean_interval,
    rate_interval,
)

SIZES = (8, 16, 24)  # utterances
VALUES = st.floats(-100, 100).map(lambda value: round(value, 3))
SAMPLES = hnp.arrays(float, st.integers(2, 30), elements=VALUES).filter(lambda values: np.ptp(values) > 0.01)
COUNTS = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 30)), min_size=2, max_size=9).map(np.array)


def coverage(truth, low, high):
    """The share of intervals that hold the truth."""
    return np.mean((np.array(low) <= truth) & (truth <= np.array(high)))


def each_of(interval, samples):
    """Limits of the interval of each sample: low (n,), high (n,)."""
    _, low, high = np.array([interval(*sample) for sample in samples]).T
    return low, high


@given(SAMPLES)
def test_the_interval_of_a_mean_is_student_s(values):
    for level in (0.95, 0.8):
        expected = stats.ttest_1samp(values, 0).confidence_interval(level)
        assert mean_interval(values, level) == pytest.approx((values.mean(), *expected), abs=1e-9)
    assert mean_interval(values) == mean_interval(values.tolist(), 0.95)


def test_a_single_value_has_no_interval_and_no_value_has_no_mean():
    assert mean_interval([0.3]) == pytest.approx((0.3, np.nan, np.nan), nan_ok=True)
    assert np.isnan(mean_interval([])).all()
    assert mean_interval([0.25, 0.25, 0.25]) == (0.25, 0.25, 0.25)
    assert jackknife_interval(lambda rows: rows.size, 1) == pytest.approx((1.0, np.nan, np.nan), nan_ok=True)
    assert rate_interval(np.array([[1, 4]])) == pytest.approx((0.25, np.nan, np.nan), nan_ok=True)
    for samples in (([0.5], [0.1, 0.3]), ([0.4, 0.6], [0.2])):
        assert difference_interval(*samples) == pytest.approx((0.3, np.nan, np.nan), nan_ok=True)


@pytest.mark.parametrize("n", SIZES)
def test_the_interval_of_a_mean_covers_it(n):
    rng = np.random.default_rng(n)
    for samples, truth in ((rng.normal(0.4, 0.2, (2000, n)), 0.4), (rng.beta(4, 6, (2000, n)), 0.4)):
        assert 0.93 <= coverage(truth, *each_of(mean_interval, samples[:, None])) <= 0.97


@given(hnp.arrays(float, st.tuples(st.integers(2, 12), st.just(3)), elements=VALUES))
def test_the_jackknife_of_a_mean_is_its_student_interval(values):
    found = jackknife_interval(lambda rows: values[rows].mean(axis=0), len(values))
    expected = zip(*(mean_interval(column) for column in values.T), strict=True)
    for limits, student in zip(found, expected, strict=True):
        np.testing.assert_allclose(limits, student, atol=1e-9)


@pytest.mark.parametrize("level", [0.95, 0.8])
def test_the_jackknife_has_its_textbook_standard_error(level):
    values = np.random.default_rng(0).gamma(2, size=(12, 2))

    def ratio(rows):
        first, second = values[rows].sum(axis=0)
        return first / second

    value, low, high = jackknife_interval(ratio, 12, level)
    others = np.array([values[np.arange(12) != row].sum(axis=0) for row in range(12)])
    others = others[:, 0] / others[:, 1]
    error = np.sqrt(11 / 12 * np.square(others - others.mean()).sum())
    assert value == pytest.approx(values[:, 0].sum() / values[:, 1].sum())
    half = stats.t(11).ppf(0.5 + level / 2) * error
    assert (low, high) == (pytest.approx(value - half), pytest.approx(value + half)) and half > 0.1


@pytest.mark.parametrize("n", SIZES)
def test_the_jackknife_covers_a_ratio_of_means(n):
    rng = np.random.default_rng(n)
    first = rng.normal(0.4, 0.1, (n, 20_000))
    second = first * rng.uniform(0.5, 0.9, first.shape)
    _, low, high = jackknife_interval(lambda rows: second[rows].mean(axis=0) / first[rows].mean(axis=0), n)
    assert 0.93 <= coverage(0.7, low, high) <= 0.97


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("n", SIZES)
def test_the_jackknife_covers_an_extrapolated_correlation(n, power):
    """The limit of rho^-p, linear in 1/masks, from noisy rho of all masks and of half of them."""
    rng = np.random.default_rng(n)
    rho = rng.normal(0.5, 0.1, (n, 20_000))
    everything, half = (factor * rho + rng.normal(0, 0.02, rho.shape) for factor in (0.8, 0.7))

    def limit(rows):
        return (2 * everything[rows].mean(axis=0) ** -power - half[rows].mean(axis=0) ** -power) ** (-1 / power)

    truth = (2 * (0.8 * 0.5) ** -power - (0.7 * 0.5) ** -power) ** (-1 / power)
    assert truth > 0.45
    _, low, high = jackknife_interval(limit, n)
    assert 0.93 <= coverage(truth, low, high) <= 0.97


@given(COUNTS)
def test_the_interval_of_a_rate_is_the_jackknife_of_its_logarithm(counts):
    value, low, high = rate_interval(counts)
    (events, trials), n = counts.sum(axis=0), len(counts)
    assert value == pytest.approx(events / trials)
    logarithms = [np.log((events - e + 0.5) / (trials - t)) for e, t in counts]
    half = stats.t.ppf(0.975, n - 1) * np.sqrt((n - 1) / n * np.square(logarithms - np.mean(logarithms)).sum())
    smoothed = (events + 0.5) / trials
    assert high == pytest.approx(smoothed * np.exp(half), rel=1e-9)
    assert low == pytest.approx(min(value, smoothed * np.exp(-half)), rel=1e-9)
    assert 0 <= low <= value < high


def word_errors(shape, variability, rng):
    """Word errors and words of utterances (*shape, 2) whose word error rates vary around 0.1."""
    words = rng.integers(5, 40, shape)
    rates = rng.beta(0.1 * variability, 0.9 * variability, shape)
    return np.stack([rng.binomial(words, rates), words], axis=-1)


@pytest.mark.parametrize("variability", [20, 5])
@pytest.mark.parametrize("n", SIZES)
def test_the_interval_of_a_rate_covers_it(n, variability):
    counts = word_errors((1000, n), variability, np.random.default_rng(n))
    assert stats.skew((counts[..., 0] / counts[..., 1]).ravel()) > 1
    assert 0.93 <= coverage(0.1, *each_of(rate_interval, counts[:, None])) <= 0.98


def test_the_logarithm_covers_skewed_rates_better_than_the_rate_itself():
    counts = word_errors((1000, 8), 5, np.random.default_rng(0))
    plain = np.moveaxis(counts, 0, -1)  # (utterance, 2, sample)

    def rate(rows):
        events, trials = plain[rows].sum(axis=0)
        return events / trials

    _, low, high = jackknife_interval(rate, 8)
    assert coverage(0.1, *each_of(rate_interval, counts[:, None])) > coverage(0.1, low, high) + 0.05


@given(SAMPLES, SAMPLES)
def test_the_interval_of_a_difference_is_welch_s(first, second):
    for level in (0.95, 0.8):
        value, *limits = difference_interval(first, second, level)
        expected = stats.ttest_ind(first, second, equal_var=False).confidence_interval(level)
        assert value == pytest.approx(first.mean() - second.mean())
        assert limits == pytest.approx([*expected], rel=1e-9, abs=1e-9)


def test_the_difference_of_constant_samples_is_exact():
    assert difference_interval([0.5, 0.5], [0.25, 0.25, 0.25]) == (0.25, 0.25, 0.25)


@pytest.mark.parametrize("n", SIZES)
def test_the_interval_of_a_difference_covers_it(n):
    rng = np.random.default_rng(n)
    for first, second, truth in (
        (rng.normal(0.4, 0.2, (2000, n)), rng.normal(0.1, 0.5, (2000, n // 2)), 0.3),
        (rng.beta(4, 6, (2000, n)), rng.beta(2, 8, (2000, n + 5)), 0.2),
    ):
        found = each_of(difference_interval, zip(first, second, strict=True))
        assert 0.93 <= coverage(truth, *found) <= 0.97


@given(hnp.arrays(int, st.tuples(st.integers(2, 8), st.integers(1, 6)), elements=st.integers(-9, 9)))
def test_the_best_column_is_chosen_on_the_other_rows(values):
    expected = []
    for row in range(len(values)):
        others = values[1 - row % 2 :: 2].mean(axis=0)
        expected.append(values[row, np.flatnonzero(others == others.max())[0]])
    assert chosen_on_others(values).tolist() == expected


def test_a_single_row_is_its_own_choice():
    assert chosen_on_others(np.array([[0.1, 0.3, 0.2]])).tolist() == [0.3]


@pytest.mark.parametrize("n", [12, 24])
def test_a_difference_of_two_choices_between_equal_columns_is_rarely_significant(n):
    """At least 90 % of nominal 95 % intervals cover it; choosing for each row on all others would give 77 to 82 %."""
    samples = np.random.default_rng(n).normal(size=(1500, n, 6))
    differences = [chosen_on_others(each[:, :2]) - chosen_on_others(each[:, 2:]) for each in samples]
    assert coverage(0.0, *each_of(mean_interval, zip(differences, strict=True))) >= 0.9


def test_a_choice_on_the_same_rows_is_biased_and_one_on_other_rows_is_not():
    samples = np.random.default_rng(0).normal(0.3, 0.2, (2000, 8, 16))  # 16 layers, all equally good
    same = samples.mean(axis=1).max(axis=1)
    others = np.array([chosen_on_others(sample).mean() for sample in samples])
    assert same.mean() > 0.4
    assert others.mean() == pytest.approx(0.3, abs=4 * others.std() / np.sqrt(2000))
    assert others.std() / np.sqrt(2000) < 0.003


def test_the_best_of_unequal_columns_is_found_on_other_rows():
    columns = np.linspace(0.1, 0.8, 8)
    values = columns + np.random.default_rng(0).normal(0, 0.02, (8, 8))
    np.testing.assert_array_equal(chosen_on_others(values), values[:, 7])
