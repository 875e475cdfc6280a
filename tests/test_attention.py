from types import SimpleNamespace

import numpy as np
import pytest
import torch

from xattn.attribution.attention import cross_attention


def fake(weights):
    return SimpleNamespace(name="fake", attentions=lambda states, ids: SimpleNamespace(cross=tuple(weights[:, None])))


def test_attention_is_returned_as_float32():
    weights = torch.full((2, 3, 4, 5), 0.2, dtype=torch.bfloat16)
    result = cross_attention(fake(torch.softmax(weights.double(), -1)), None, None)
    assert result.shape == (2, 3, 4, 5) and result.dtype == np.float32
    assert result == pytest.approx(0.2)


@pytest.mark.parametrize("wrong", [0.21, float("nan")])
def test_rows_that_do_not_sum_to_1_raise(wrong):
    weights = torch.full((2, 3, 4, 5), 0.2)
    weights[1, 2, 3, 4] = wrong
    with pytest.raises(RuntimeError, match="of fake sum to 1 only within .*: the model class has to return softmax"):
        cross_attention(fake(weights), None, None)
