"""Gradients and variants of attention, against other libraries, finite differences and cases worked by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr
from captum.attr import InputXGradient, IntegratedGradients, Saliency
from scipy import stats

import xattn
from xattn.attribution.attention import (
    attention_times_gradient,
    by_entropy,
    by_norm,
    entropies,
    norm_weighted,
    of_heads,
    rollout,
)
from xattn.attribution.forced import Forced
from xattn.attribution.gradients import gradient, gradient_times_input, integrated_gradients, masked_gradients

PLACES = ("input", "encoder")


@pytest.fixture(scope="module")
def maps(model, utterances):
    return xattn.explain(model, utterances[0], occlusion=xattn.Occlusion(4, 4), text="the bird sings", progress=False)


@pytest.fixture(scope="module")
def forced(model, maps):
    return Forced.of(model, maps)


def attention_of(*heads):
    """Attention (1 layer, heads, tokens without </s>, steps) with labels."""
    values = np.array([heads], dtype=np.float64)
    coordinates = {name: 1 + np.arange(values.shape[axis]) for axis, name in enumerate(("layer", "head"))}
    coordinates |= {"token": [f"▁{number}" for number in range(values.shape[2])]}
    return xr.DataArray(values, dims=("layer", "head", "token", "step"), coords=coordinates)


def test_the_input_and_the_output_are_those_of_the_maps(model, maps, forced, utterances):
    assert torch.equal(forced.features, model.features(utterances[0].audio()))
    assert torch.equal(forced.ids, model.token_ids("the bird sings"))
    assert forced.decoder_inputs.tolist() == [*model.prompt("en").tolist(), *forced.ids[:-1].tolist()]
    log_p = model.decode(forced.encode(forced.features), forced.decoder_inputs)
    own = [log_p[0, forced.rows.start + row, token].item() for row, token in enumerate(forced.ids)]
    np.testing.assert_allclose(forced.values(log_p)[0], own, rtol=1e-6)
    np.testing.assert_allclose(forced.values(log_p, forced.ids)[0], 0, atol=1e-7)


def test_a_hypothesis_that_the_tokenizer_splits_otherwise_is_searched_again(model, utterances, monkeypatch):
    maps = xattn.explain(model, utterances[0], occlusion=xattn.Occlusion(4, 4), progress=False)
    expected = Forced.of(model, maps).ids
    monkeypatch.setattr(model, "token_ids", lambda text: torch.tensor([9, 9, 2]))
    assert torch.equal(Forced.of(model, maps).ids, expected)


def test_maps_of_other_tokens_raise(model, maps):
    with pytest.raises(ValueError, match="tiny does not write the tokens of the maps of en-test-0: give complete maps"):
        Forced.of(model, maps.isel(token=[0, 1]))


def value_of(forced, place, row, foils=None):
    """A function (B, ...) to (B,) for captum: the value of one token."""

    def function(points):
        states = torch.cat([forced.encode(each) for each in points]) if place == "input" else points[:, 0]
        return forced.values(forced.model.decode(states, forced.decoder_inputs), foils)[:, row]

    return function


def on_steps_or_cells(found, place):
    """captum's array (1, T, F) or (1, 1, S, D) as the kit arranges it."""
    return found[0].numpy() if place == "input" else found[0, 0].sum(dim=-1).numpy()


@pytest.mark.parametrize("place", PLACES)
def test_gradients_equal_those_of_captum(forced, maps, place):
    point = (forced.features if place == "input" else forced.encode(forced.features))[None].requires_grad_()
    found = [each(forced, maps, place) for each in (gradient, gradient_times_input, integrated_gradients)]
    for row in range(len(forced.ids)):
        function = value_of(forced, place, row)
        plain = Saliency(function).attribute(point, abs=False)
        size = plain[0].abs() if place == "input" else plain[0, 0].norm(dim=-1)
        product = InputXGradient(function).attribute(point).detach()
        integrated = IntegratedGradients(function).attribute(point.detach(), n_steps=16, method="riemann_middle")
        expected = size.numpy(), on_steps_or_cells(product, place), on_steps_or_cells(integrated, place)
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours[row], theirs, rtol=1e-3, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("place", PLACES)
def test_integrated_gradients_add_up_to_the_change_that_zeros_make(forced, maps, place):
    few, many = (integrated_gradients(forced, maps, place, steps=steps) for steps in (4, 100))
    assert many.attrs["completeness_error"] < 0.01 < few.attrs["completeness_error"]
    states = forced.encode(forced.features)
    zeros = forced.encode(torch.zeros_like(forced.features)) if place == "input" else torch.zeros_like(states)
    whole, none = (forced.values(forced.model.decode(each, forced.decoder_inputs))[0] for each in (states, zeros))
    np.testing.assert_allclose(many.sum(many.dims[1:]), whole - none, atol=0.01 * (whole - none).abs().sum())


@pytest.mark.parametrize("place", PLACES)
def test_the_gradient_is_the_slope_along_a_cell(forced, maps, place):
    product = gradient_times_input(forced, maps, place)
    point = forced.features if place == "input" else forced.encode(forced.features)
    shape = point.shape if place == "input" else (1, point.shape[1], 1)
    for cell in (np.argmax(np.abs(product.values[0])), 3):
        factor = torch.ones(shape)
        slopes = []
        for change in (1e-2, -1e-2):
            factor.view(-1)[cell] = 1 + change
            slopes.append(value_of(forced, place, 0)((point * factor)[None]).item())
        slope = (slopes[0] - slopes[1]) / 2e-2
        assert slope == pytest.approx(product.values[0].flat[cell], rel=0.02, abs=2e-4)


@pytest.mark.parametrize("place", PLACES)
def test_masked_gradients_are_reproducible_and_approach_their_mean(forced, maps, place):
    first, again = (masked_gradients(forced, maps, place, masks=4) for _ in range(2))
    assert first.equals(again)
    other = masked_gradients(forced, maps.assign_attrs(utterance="another"), place, masks=4)
    assert not np.allclose(first, other)
    many, more = (
        masked_gradients(forced, maps.assign_attrs(utterance=name), place, masks=60) for name in ("one", "two")
    )
    assert np.corrcoef(many.values.ravel(), more.values.ravel())[0, 1] > 0.9
    assert np.corrcoef(first.values.ravel(), other.values.ravel())[0, 1] < 0.9


def test_a_contrast_is_the_difference_of_two_tokens(forced, maps):
    foils = (forced.ids + 3) % 40
    both = gradient_times_input(forced, maps, foils=foils).values
    pair = [gradient_times_input(replace(forced, ids=ids), maps).values for ids in (forced.ids, foils)]
    np.testing.assert_allclose(both, pair[0] - pair[1], atol=1e-4 * np.abs(both).max())
    assert np.abs(both).max() > 1e-3


def test_attributions_have_the_labels_of_the_maps(forced, maps):
    for place in PLACES:
        for method in (gradient, gradient_times_input, integrated_gradients, masked_gradients):
            found = method(forced, maps, place)
            assert found.dims == maps[f"{place}_saliency"].dims
            assert xattn.correlate(maps.cross_attention, found).overall.ndim == 0
    for method in (norm_weighted, attention_times_gradient):
        assert method(forced, maps).dims == ("layer", "head", "token", "step")
    for found in (rollout(forced, maps), by_entropy(maps.cross_attention), by_norm(maps.cross_attention, 2)):
        assert found.dims == ("token", "step")
        assert found.step_end.equals(maps.step_end) and found.token.equals(maps.token)


def test_focused_heads_have_a_low_entropy_and_count_more():
    focused, uniform = [[1.0, 0, 0, 0], [0, 1.0, 0, 0]], [[0.25] * 4] * 2
    attention = attention_of(focused, uniform, [[0.5, 0.5, 0, 0]] * 2)
    np.testing.assert_allclose(entropies(attention), [[0, 1, 0.5]], atol=1e-12)
    np.testing.assert_allclose(by_entropy(attention), [[5 / 6, 1 / 6, 0, 0], [1 / 6, 5 / 6, 0, 0]], atol=1e-12)


def test_entropy_is_that_of_the_weights_on_the_recording():
    rng = np.random.default_rng(0)
    rows = rng.dirichlet(np.ones(7), (2, 3))
    expected = [np.mean([stats.entropy(row / row.sum(), base=7) for row in head]) for head in 0.3 * rows]
    np.testing.assert_allclose(entropies(attention_of(*(0.3 * rows)))[0], expected)


def test_heads_with_the_largest_norms_are_chosen_for_each_utterance():
    diagonal, sink, uniform = np.eye(3), np.array([[0, 0, 1.0]] * 3), np.full((3, 3), 1 / 3)
    attention = attention_of(diagonal, sink, uniform)
    # Sums of norms over columns and over rows: 3 + 3, sqrt(3) + 3, sqrt(3) + sqrt(3).
    np.testing.assert_allclose(by_norm(attention, 1), diagonal)
    np.testing.assert_allclose(by_norm(attention, 2), (diagonal + sink / np.sqrt(3)) / 2)
    np.testing.assert_allclose(of_heads(attention, [(1, 1), (1, 3)]), (diagonal + uniform) / 2)


def test_norms_are_those_of_the_transformed_values(model, forced, maps):
    found = norm_weighted(forced, maps)
    states = forced.encode(forced.features)[0]
    for layer, block in enumerate(model.network.decoder.layers):
        value, output = block.encoder_attn.v_proj, block.encoder_attn.out_proj
        for head in range(2):
            rows = slice(8 * head, 8 * head + 8)
            moved = torch.einsum("sd,hd,oh->so", states, value.weight[rows], output.weight[:, rows])
            moved += output.weight[:, rows] @ value.bias[rows]
            expected = maps.cross_attention[layer, head].values * moved.norm(dim=1).numpy()
            np.testing.assert_allclose(found[layer, head], expected, rtol=1e-4)


def test_attention_times_gradient_is_the_effect_of_a_weight(model, forced, maps, monkeypatch):
    """Adding to one weight of one row changes the token's log-probability by the gradient."""
    found = attention_times_gradient(forced, maps)
    assert (found >= 0).all() and float(found.max()) > 1e-3
    states, row = forced.encode(forced.features), 1
    layer, head, step = np.unravel_index(found[:, :, row].values.argmax(), found[:, :, row].shape)
    softmax = torch.nn.functional.softmax

    def value(change):
        calls = []

        def changed(scores, *arguments, **keywords):
            weights = softmax(scores, *arguments, **keywords)
            if weights.shape[-1] == states.shape[1]:  # cross-attention, one call for each layer
                if len(calls) == layer:
                    weights = weights.clone()
                    weights[0, head, forced.rows.start + row, step] += change
                calls.append(weights)
            return weights

        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.functional, "softmax", changed)
            log_p = model.attentions(states, forced.decoder_inputs).log_p
        assert len(calls) == 2
        return forced.values(log_p[None])[0, row].item()

    assert states.shape[1] != len(forced.decoder_inputs)
    slope = (value(1e-2) - value(-1e-2)) / 2e-2
    weight = float(maps.cross_attention[layer, head, row, step])
    assert weight * slope == pytest.approx(float(found[layer, head, row, step]), rel=0.02)


def test_rollout_equals_products_of_whole_matrices(model, forced, maps):
    attentions = model.attentions(forced.encode(forced.features), forced.decoder_inputs)
    tokens, steps = len(forced.decoder_inputs), maps.sizes["step"]
    product = np.eye(tokens + steps)
    for own, cross in zip(attentions.own, attentions.cross, strict=True):
        for columns, weights in ((slice(0, tokens), own), (slice(tokens, None), cross)):
            mixed = np.eye(tokens + steps)
            mixed[:tokens] /= 2
            mixed[:tokens, columns] += weights[0].mean(dim=0).double().numpy() / 2
            product = mixed @ product
    np.testing.assert_allclose(rollout(forced, maps), product[forced.rows.start : tokens, tokens:], rtol=1e-4)
