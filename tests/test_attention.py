from types import SimpleNamespace

import numpy as np
import pytest
import torch

from xattn.attention import MEAN, cross_attention, with_means


def test_means_over_heads_layers_and_both(made):
    attention = made.maps().cross_attention
    result = with_means(attention)
    assert result.dims == ("layer", "head", "token", "step")
    assert result["layer"].values.tolist() == [1, 2, MEAN] and result["head"].values.tolist() == [1, 2, 3, MEAN]
    values = attention.values.astype(np.float64)
    for layer in (1, 2, MEAN):
        for head in (1, 2, 3, MEAN):
            chosen = values[slice(None) if layer == MEAN else [layer - 1]]
            chosen = chosen[:, slice(None) if head == MEAN else [head - 1]]
            actual = result.sel(layer=layer, head=head).values
            np.testing.assert_allclose(actual, chosen.mean(axis=(0, 1)), rtol=1e-6)
    assert result.token.values.tolist() == attention.token.values.tolist()
    np.testing.assert_allclose(result.sum("step"), 1, rtol=1e-5)


def fake(weights):
    return SimpleNamespace(name="fake", cross_attention=lambda states, ids: weights)


def test_attention_is_handed_on_as_float32():
    weights = torch.full((2, 3, 4, 5), 0.2, dtype=torch.bfloat16)
    result = cross_attention(fake(torch.softmax(weights.double(), -1)), None, None)
    assert result.shape == (2, 3, 4, 5) and result.dtype == np.float32
    assert result == pytest.approx(0.2)


@pytest.mark.parametrize("wrong", [0.21, float("nan")])
def test_rows_that_do_not_sum_to_1_are_refused(wrong):
    weights = torch.full((2, 3, 4, 5), 0.2)
    weights[1, 2, 3, 4] = wrong
    with pytest.raises(RuntimeError, match="of fake sum to 1 only within .*: load the model with eager attention"):
        cross_attention(fake(weights), None, None)
