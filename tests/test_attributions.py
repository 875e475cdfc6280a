"""Gradients and variants of attention, against other libraries, finite differences and cases worked by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr
from captum.attr import InputXGradient, IntegratedGradients, Saliency
from scipy import stats

import xattn
from xattn.analysis.forced_faithfulness import effects, infidelity, on_cells, probability_area
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
from xattn.attribution.occlusion import Masks, Partition
from xattn.attribution.variants import foils_of, occlude_input, previous_tokens, runners_up, word_units
from xattn.maps import frames_of_steps

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


def test_hidden_units_follow_words(maps):
    units = word_units(maps, [(0.1, 0.2), (0.2, 0.3)])
    times = maps.time.values
    assert units.shape == (1, maps.sizes["time"], maps.sizes["mel"])
    for inside in ((times < 0.1), (times >= 0.1) & (times < 0.2), (times >= 0.2) & (times < 0.3), times >= 0.3):
        assert inside.any() and len(np.unique(units[0, inside])) == 1
    assert np.unique(units).tolist() == [0, 1, 2, 3]


def test_occlusion_of_a_single_word_is_the_divergence_without_it(model, forced, maps):
    units = word_units(maps, [(0.1, 0.2), (0.2, 0.3)])
    found = occlude_input(forced, maps, units, 400, estimator="mean")
    masks = Masks(Partition.of(units), 400, 0.5, 0, "en-test-0/units")
    _, hidden = masks.draw(0, 400)
    log_p = model.decode(forced.encode(forced.features), forced.decoder_inputs)[0, forced.rows].double()
    scores = []
    for row in hidden[:, units[0, :, 0]]:
        states = model.encode(forced.features[None] * torch.from_numpy(~row).float()[:, None])
        log_q = model.decode(states, forced.decoder_inputs)[0, forced.rows].double()
        scores.append((log_p.exp() * (log_p - log_q)).sum(dim=1).numpy())
    expected = [np.mean(np.array(scores)[hidden[:, unit]], axis=0) for unit in range(4)]
    for unit in range(4):
        np.testing.assert_allclose(found.values[:, units[0, :, 0] == unit][:, 0, 0], expected[unit], rtol=1e-3)


def test_a_contrast_of_occlusion_explains_the_log_ratio(model, forced, maps):
    units, foils = word_units(maps, [(0.1, 0.2), (0.2, 0.3)]), runners_up(forced)
    log_p = model.decode(forced.encode(forced.features), forced.decoder_inputs)[0, forced.rows]
    order = log_p.argsort(dim=1, descending=True)
    for row, (own, foil) in enumerate(zip(forced.ids, foils, strict=True)):
        assert foil == (order[row, 1] if order[row, 0] == own else order[row, 0])
    plain, contrast = (
        occlude_input(replace(forced, ids=ids), maps, units, 200, estimator="ridge", foils=other)
        for ids, other in ((forced.ids, foils), (foils, forced.ids))
    )
    np.testing.assert_allclose(plain, -contrast, atol=1e-5)
    assert float(np.abs(plain).max()) > 1e-3
    with pytest.raises(ValueError, match="sqrt_ridge takes their roots: choose mean or ridge"):
        occlude_input(forced, maps, units, 4, foils=foils)


def test_a_foil_is_the_first_token_that_differs(model, forced):
    first, foils = foils_of(forced, "the bird sleeps")
    assert model.text(forced.ids[:first]) == "the bird" == model.text(model.token_ids("the bird sleeps")[:first])
    assert foils[first] == model.token_ids("the bird sleeps")[first] != forced.ids[first]
    assert torch.equal(foils[:first], forced.ids[:first])
    with pytest.raises(ValueError, match="The text 'the bird sings' does not differ from the hypothesis: give one"):
        foils_of(forced, "the bird sings")


def test_previous_tokens_are_hidden_one_at_a_time(model, forced, maps):
    found = previous_tokens(forced, maps)
    states, start = forced.encode(forced.features), forced.rows.start
    log_p = model.decode(states, forced.decoder_inputs)[0, forced.rows].double()
    zero = model.network.decoder.embed_tokens.weight.clone()
    assert found.dims == ("token", "previous") and np.array_equal(found.values, np.tril(found.values, -1))
    for previous in range(len(forced.ids) - 1):
        # The token's row of the embedding is set to 0; it occurs once.
        token = forced.ids[previous]
        if (forced.decoder_inputs == token).sum() > 1:
            continue
        changed = zero.clone()
        changed[token] = 0
        with torch.no_grad():
            model.network.decoder.embed_tokens.weight.data = changed
            hidden = model.network.decoder(
                input_ids=forced.decoder_inputs[None], encoder_hidden_states=states
            ).last_hidden_state
            model.network.decoder.embed_tokens.weight.data = zero
        log_q = model.network.decoder.output_projection(hidden)[0, forced.rows].double().log_softmax(dim=-1)
        expected = (log_p.exp() * (log_p - log_q)).sum(dim=1).numpy()
        np.testing.assert_allclose(found[previous + 1 :, previous], expected[previous + 1 :], rtol=1e-3, atol=1e-5)
    keep = torch.ones(1, len(forced.decoder_inputs))
    assert torch.equal(
        model.decode_without(states, forced.decoder_inputs, keep), model.decode(states, forced.decoder_inputs)
    )
    keep[:, start + 1 :] = 0
    log_q = model.decode_without(states, forced.decoder_inputs, keep)[0, forced.rows].double()
    everything = (log_p.exp() * (log_p - log_q)).sum(dim=1)[:-1].mean()
    assert found.attrs["text"] == pytest.approx(float(everything), rel=1e-3)
    assert found.attrs["audio"] == pytest.approx(maps.hidden_divergence, rel=1e-3)


def test_curves_of_probability_are_those_of_inputs_deleted_by_hand(model, forced, maps):
    rng = np.random.default_rng(0)
    cells = maps.input_saliency.copy(data=rng.random(maps.input_saliency.shape))
    whole = forced.values(model.decode(forced.encode(forced.features), forced.decoder_inputs))[0]
    scaled = (cells - cells.min(["time", "mel"])) / (cells.max(["time", "mel"]) - cells.min(["time", "mel"]))
    order = np.argsort(scaled.mean("token").values, axis=None)
    drops = []
    for percent in (0, 25, 50, 75, 100):
        features = forced.features.clone().flatten()
        count = features.numel() * percent // 100
        features[torch.from_numpy(order[len(order) - count :].copy())] = 0
        states = model.encode(features.view(forced.features.shape)[None])
        values = forced.values(model.decode(states, forced.decoder_inputs))[0]
        drops.append(float((values - whole).mean()))
    expected = np.trapezoid(drops, [0, 0.25, 0.5, 0.75, 1.0])
    assert probability_area(forced, cells, maps, step=25) == pytest.approx(expected, rel=1e-3, abs=1e-6)
    reverse = cells.copy(data=-cells.values)  # deleting the least important cells first is inserting backwards
    inserted = probability_area(forced, reverse, maps, insertion=True, step=25)
    assert inserted == pytest.approx(probability_area(forced, cells, maps, step=25), abs=0.02)


def test_infidelity_is_0_for_an_attribution_that_predicts_the_effects_and_1_for_none(forced, maps):
    hidden, changes = effects(forced, maps, 40)
    assert hidden.shape == (40, maps.sizes["time"]) and changes.shape == (40, maps.sizes["token"])
    assert 0.15 < hidden.mean() < 0.45
    weights = np.linspace(-1, 2, hidden.shape[1])
    exact = np.repeat((hidden @ weights)[:, None], maps.sizes["token"], axis=1)
    cells = np.broadcast_to(weights[:, None] / maps.sizes["mel"], maps.input_saliency.shape)
    array = maps.input_saliency.copy(data=3 * cells)  # the factor does not matter
    assert infidelity(array, maps, hidden, exact) == pytest.approx(0, abs=1e-9)
    assert infidelity(array * 0, maps, hidden, exact) == 1
    by_hand = []
    for token in range(maps.sizes["token"]):
        predicted = hidden @ array.values[token].sum(axis=1)
        factor = (predicted @ changes[:, token]) / (predicted @ predicted)
        by_hand.append(((factor * predicted - changes[:, token]) ** 2).mean() / (changes[:, token] ** 2).mean())
    assert infidelity(array, maps, hidden, changes) == pytest.approx(np.mean(by_hand))


def test_attributions_on_steps_have_the_cells_of_their_steps(maps):
    cells = on_cells(maps.encoder_saliency, maps)
    frames = frames_of_steps(maps, maps.time.values)
    for step, (first, end) in enumerate(frames):
        own = cells[:, max(first, 0) : end]
        np.testing.assert_array_equal(
            own, np.broadcast_to(maps.encoder_saliency.values[:, step, None, None], own.shape)
        )
    assert np.array_equal(on_cells(maps.input_saliency, maps), maps.input_saliency)
