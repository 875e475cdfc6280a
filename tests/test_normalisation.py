import numpy as np
import pytest
from scipy import stats

from xattn.analysis.normalisation import min_max, standardise, standardise_over_tokens


@pytest.fixture
def values():
    return np.random.default_rng(0).exponential(size=(5, 6, 4))


def test_standardise_gives_the_z_score_of_each_token(values):
    result = standardise(values)
    np.testing.assert_allclose(result.reshape(5, -1), stats.zscore(values.reshape(5, -1), axis=1, ddof=1), rtol=1e-12)
    steps = 3 * values[:, 0]
    np.testing.assert_allclose(standardise(steps), stats.zscore(steps, axis=1, ddof=1), rtol=1e-12)


def test_standardise_ignores_absent_cells(values):
    values[1, :3] = np.nan
    result = standardise(values)
    assert not result[1, :3].any()
    np.testing.assert_allclose(result[1, 3:].ravel(), stats.zscore(values[1, 3:].ravel(), ddof=1), rtol=1e-12)
    np.testing.assert_allclose(result[0].ravel(), stats.zscore(values[0].ravel(), ddof=1), rtol=1e-12)


def test_standardise_over_tokens_gives_the_z_score_of_each_step(values):
    np.testing.assert_allclose(standardise_over_tokens(values), stats.zscore(values, axis=-2, ddof=1), rtol=1e-12)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1 / 3, 1e9])
def test_constant_maps_become_0(values, constant):
    values[2] = constant
    assert not standardise(values)[2].any() and standardise(values)[1].any()
    assert not min_max(values)[0][2].any() and min_max(values)[0][1].any()
    values[:, :, 1] = constant
    result = standardise_over_tokens(values)
    assert not result[:, :, 1].any() and result[0, :, 0].all()
    assert not standardise_over_tokens(np.full((3, 4), constant, dtype=np.float32)).any()


def test_min_max_scales_the_maps_of_a_token_together(values):
    previous = np.random.default_rng(1).exponential(3, size=(5, 5))
    previous[np.triu_indices(5, 1)] = np.nan
    spectrogram, tokens = min_max(values, previous)
    for token in range(5):
        own = np.concatenate([values[token].ravel(), previous[token, : token + 1]])
        expected = (own - own.min()) / (own.max() - own.min())
        np.testing.assert_allclose(spectrogram[token].ravel(), expected[: values[token].size], rtol=1e-12)
        np.testing.assert_allclose(tokens[token, : token + 1], expected[values[token].size :], rtol=1e-12)
        assert not tokens[token, token + 1 :].any()
