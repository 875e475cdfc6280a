"""Cues of the attention, worked by hand."""

import numpy as np
import pytest

import xattn
from xattn.analysis.cues import cues
from xattn.attribution.forced import Forced


def with_attention(made, weights):
    """Made maps whose heads all have these weights (token, step) for the first tokens, without </s>."""
    maps = made.maps(tokens=("▁the", "▁dog", "▁sleeps", "</s>"), frames=4 * weights.shape[1])
    values = np.zeros(maps.cross_attention.shape)
    values[:, :, : len(weights)] = weights
    return maps.assign(cross_attention=maps.cross_attention.copy(data=values))


def test_a_diagonal_is_focused_in_order_and_without_disagreement(made):
    found = cues(with_attention(made, np.eye(3)))
    assert found["entropy"] == pytest.approx(0, abs=1e-12) and found["peakedness"] == 1
    assert found["disagreement"] == pytest.approx(0, abs=1e-12) and found["order"] == 1 and found["padding"] == 0
    assert found["tokens per second"] == pytest.approx(3 / 0.12)


def test_uniform_and_reversed_attention(made):
    uniform = cues(with_attention(made, np.full((3, 3), 1 / 3)))
    assert uniform["entropy"] == pytest.approx(1) and uniform["peakedness"] == pytest.approx(1 / 3)
    assert uniform["disagreement"] == 1  # no head varies over tokens
    assert cues(with_attention(made, np.eye(3)[::-1]))["order"] == 0
    assert cues(with_attention(made, np.eye(3)[[0, 2, 1]]))["order"] == 0.5


def test_heads_that_contradict_each_other_disagree(made):
    maps = with_attention(made, np.eye(3))
    assert maps.sizes["layer"] * maps.sizes["head"] == 6
    values = maps.cross_attention.values.copy()
    values[1] = values[1, :, [1, 2, 0, 3]].transpose(1, 0, 2)  # half of the heads look at the next token's step
    average = values.mean(axis=(0, 1))[:3]
    standardised = (average - average.mean(axis=0)) / average.std(axis=0)
    heads = [np.eye(3), np.eye(3)[[1, 2, 0]]]
    expected = np.mean([np.corrcoef((head - head.mean(0)).ravel(), standardised.ravel())[0, 1] for head in heads])
    found = cues(maps.assign(cross_attention=maps.cross_attention.copy(data=values)))
    assert found["disagreement"] == pytest.approx(1 - expected)


def test_level_and_confidence_are_those_of_the_input_and_the_output(model, utterances):
    maps = xattn.explain(model, utterances[0], occlusion=xattn.Occlusion(4, 4), text="the bird sings", progress=False)
    forced = Forced.of(model, maps)
    found = cues(maps, forced)
    assert "confidence" not in cues(maps)
    log_p = model.decode(model.encode(forced.features[None]), forced.decoder_inputs)[0]
    start = forced.rows.start
    own = [float(log_p[start + row, token]) for row, token in enumerate(forced.ids[:-1])]
    assert found["confidence"] == pytest.approx(np.mean(own), rel=1e-5)
    level = forced.features.numpy().mean(axis=1)
    assert found["level range"] == pytest.approx(np.quantile(level, 0.9) - np.quantile(level, 0.1), rel=1e-5)


def test_the_verdict_names_what_attention_can_and_cannot_show_and_the_cost(made):
    maps = made.scored(number=60).assign_attrs(setting="en", seconds=120.0, input_reliability=0.5)
    tokens = maps.sizes["token"]
    diagonal = np.zeros(maps.cross_attention.shape)
    for token in range(tokens):
        diagonal[..., token, token] = 1
    forwards = maps.assign(cross_attention=maps.cross_attention.copy(data=diagonal))
    backwards = maps.assign(cross_attention=maps.cross_attention.copy(data=diagonal[..., ::-1, :]))
    # From 0.5 to 0.9 needs 9 times the masks, after Spearman and Brown.
    cost = "reliability of 0.9 needs about 540 masks of this kind, 18 min on the machine"
    assert xattn.attention_suffices(forwards).startswith("Attention is enough to tell when each word was spoken")
    assert cost in xattn.attention_suffices(forwards)
    assert "only 0% of the tokens attend at or after the previous token" in xattn.attention_suffices(backwards)
    assert "a translated word" in xattn.attention_suffices(backwards.assign_attrs(setting="en-it"))
    assert "masks" not in xattn.attention_suffices(forwards.assign_attrs(input_reliability=np.nan))
