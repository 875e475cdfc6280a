"""rho of maps averaged over blocks of time, and attention on padding."""

import numpy as np
import pytest
from scipy import stats

from reproduction.resolution import padding_by_head, rho_by_width
from xattn.analysis.correlation import correlate


@pytest.fixture
def stored(made):
    return [made.maps(seed=seed, utterance=f"made-{seed}", frames=96) for seed in range(3)]


def test_single_steps_give_the_usual_rho(stored):
    table = rho_by_width(stored, [1]).set_index("saliency")
    for kind in ("input", "encoder"):
        rho = [float(correlate(item.cross_attention, item[f"{kind}_saliency"]).overall) for item in stored]
        assert table.value[kind] == pytest.approx(np.mean(rho), abs=1e-6)
        low, high = stats.t.interval(0.95, 2, np.mean(rho), stats.sem(rho))
        assert (table.low[kind], table.high[kind]) == pytest.approx((low, high), abs=1e-6)
    assert (table.n == 3).all() and (table.seconds == 0.04).all()


def test_blocks_are_means_of_neighbouring_steps(stored):
    item = stored[0]
    table = rho_by_width([item], [5, 30]).set_index("saliency")
    attention = item.cross_attention.values[:, :, :-1].mean(axis=(0, 1))  # without </s>
    pairs = attention, stats.zscore(item.encoder_saliency.values[:-1], axis=1, ddof=1)
    assert attention.shape[1] == 24
    first, second = (np.stack([each[:, i : i + 5].mean(axis=1) for i in range(0, 20, 5)], axis=1) for each in pairs)
    rho = np.corrcoef(stats.zscore(first, axis=0).ravel(), second.ravel())[0, 1]
    assert table.value["encoder"] == pytest.approx(rho)
    assert table.steps.tolist() == [5, 5] and table.seconds.tolist() == [0.2, 0.2]  # 30 steps are too many


def test_attention_on_padding_is_averaged_over_tokens_and_utterances(stored):
    assert padding_by_head(stored).empty
    shares = np.random.default_rng(0).random((3, 2, 3, 5))
    padded = [
        item.assign(padding_attention=(("layer", "head", "token"), own))
        for item, own in zip(stored, shares, strict=True)
    ]
    np.testing.assert_allclose(padding_by_head(padded), shares[..., :-1].mean(axis=(0, 3)))
