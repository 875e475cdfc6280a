"""rho against numpy and scipy alone: whole maps, averages, and selections of layers, heads, tokens and time."""

import numpy as np
import pytest
import xarray as xr
from conftest import halves_by_hand, random_maps
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from xattn import correlate
from xattn.analysis.correlation import correlate_all, normalised_saliency, saliencies_of

SALIENCIES = ("input_saliency", "encoder_saliency")
POOL = {"2d_max": np.max, "2d_avg": np.mean}
VARIABLES = {"by_layer_and_head": ("layer", "head"), "by_layer": ("layer",), "by_head": ("head",), "overall": ()}


def pearson(attention, saliency):
    return stats.pearsonr(attention.ravel(), saliency.ravel()).statistic


def attention_of(maps, layer=None, head=None):
    """Mean of the chosen layers and heads, or of all, without the last token, as z-scores of each step."""
    values = maps.cross_attention.values[:, :, :-1].astype(np.float64)
    values = values if layer is None else values[[layer - 1]]
    values = values if head is None else values[:, [head - 1]]
    return stats.zscore(values.mean(axis=(0, 1)), axis=0, ddof=1)


def steps_of(saliency, reduction="2d_max", width=4):
    """z-scores of each token's cells (token, time, mel), reduced to steps; the last frame fills the last step."""
    cells = stats.zscore(saliency.reshape(len(saliency), -1), axis=1, ddof=1).reshape(saliency.shape)
    steps = -(-cells.shape[1] // width)
    cells = np.pad(cells, ((0, 0), (0, steps * width - cells.shape[1]), (0, 0)), mode="edge")
    return np.stack([POOL[reduction](part, axis=(1, 2)) for part in np.split(cells, steps, axis=1)], axis=1)


@pytest.mark.parametrize(("layer", "head"), [(2, 3), (1, None), (None, 2), (None, None)])
def test_rho_is_pearson_s_correlation_of_the_normalised_maps(made, layer, head):
    maps = made.maps()
    attention = attention_of(maps, layer, head)
    chosen = {axis: label for axis, label in (("layer", layer), ("head", head)) if label is not None}
    (name,) = [name for name, axes in VARIABLES.items() if set(axes) == set(chosen)]

    encoder = stats.zscore(maps.encoder_saliency.values[:-1], axis=1, ddof=1)
    found = correlate(maps.cross_attention, maps.encoder_saliency)[name].sel(chosen)
    assert found.item() == pytest.approx(pearson(attention, encoder), abs=1e-6)

    for reduction in POOL:
        found = correlate(maps.cross_attention, maps.input_saliency, reduction)[name].sel(chosen)
        expected = pearson(attention, steps_of(maps.input_saliency.values[:-1], reduction))
        assert found.item() == pytest.approx(expected, abs=1e-6)


def test_averages_are_those_of_the_attention_before_it_is_normalised(made):
    maps = made.maps()
    rho = correlate(maps.cross_attention, maps.encoder_saliency)
    for axis, name in (("head", "by_layer"), ("layer", "by_head")):
        averaged = correlate(maps.cross_attention.mean(axis), maps.encoder_saliency)
        xr.testing.assert_allclose(averaged[name], rho[name])
        assert set(averaged) == {"overall", name}
    bare = correlate(maps.cross_attention.mean(["layer", "head"]), maps.encoder_saliency)
    assert set(bare) == {"overall"} and bare.overall.item() == pytest.approx(rho.overall.item(), abs=1e-6)


def test_rho_has_the_labels_of_the_attention(made):
    maps = made.maps()
    rho = correlate(maps.cross_attention, maps.encoder_saliency)
    assert {name: rho[name].dims for name in rho} == VARIABLES
    assert rho["layer"].values.tolist() == [1, 2] and rho["head"].values.tolist() == [1, 2, 3]


@pytest.mark.parametrize("name", SALIENCIES)
def test_selected_layers_and_heads_have_the_rho_of_the_whole_maps(made, name):
    maps = made.maps()
    whole = correlate(maps.cross_attention, maps[name])
    layer = maps.sel(layer=2)
    rho = correlate(layer.cross_attention, layer[name])
    assert set(rho) == {"overall", "by_head"}
    np.testing.assert_allclose(rho.by_head, whole.by_layer_and_head.sel(layer=2), atol=1e-12)
    np.testing.assert_allclose(rho.overall, whole.by_layer.sel(layer=2), atol=1e-12)
    single = correlate(maps.cross_attention.sel(layer=2, head=3), maps[name])
    assert set(single) == {"overall"}
    assert single.overall.item() == pytest.approx(whole.by_layer_and_head.sel(layer=2, head=3).item())
    heads = maps.isel(head=[0, 2])
    rho = correlate(heads.cross_attention, heads[name])
    np.testing.assert_allclose(rho.by_layer_and_head, whole.by_layer_and_head.sel(head=[1, 3]), atol=1e-12)
    for number in (1, 2):
        attention = stats.zscore(heads.cross_attention.values[number - 1, :, :-1].mean(0), axis=0, ddof=1)
        saliency = maps[name].values[:-1]
        saliency = steps_of(saliency) if saliency.ndim == 3 else stats.zscore(saliency, axis=1, ddof=1)
        assert rho.by_layer.sel(layer=number).item() == pytest.approx(pearson(attention, saliency), abs=1e-6)


def test_selected_tokens_are_normalised_by_themselves(made):
    maps = made.maps(tokens=("▁a", "▁b", "▁c", "▁d", "</s>")).isel(token=[0, 2, 3])
    attention = maps.cross_attention.values.astype(np.float64).mean(axis=(0, 1))
    attention = stats.zscore(attention, axis=0, ddof=1)
    expected = pearson(attention, steps_of(maps.input_saliency.values))
    assert correlate(maps.cross_attention, maps.input_saliency).overall.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("start", "stop"), [(8, 16), (8, 22), (0, 12)])
def test_a_stretch_of_time_has_the_rho_of_its_steps(made, start, stop):
    maps = made.maps()
    part = maps.isel(time=slice(start, stop))
    attention = attention_of(maps)[:, start // 4 : -(-stop // 4)]
    expected = pearson(attention, steps_of(maps.input_saliency.values[:-1, start:stop]))
    assert correlate(part.cross_attention, part.input_saliency).overall.item() == pytest.approx(expected, abs=1e-6)


def test_only_steps_in_both_arrays_are_compared(made):
    maps = made.maps()
    first, last = maps.isel(step=slice(0, 4)), maps.isel(step=slice(2, None))
    saliency = stats.zscore(last.encoder_saliency.values[:-1], axis=1, ddof=1)[:, :2]
    found = correlate(first.cross_attention, last.encoder_saliency).overall.item()
    assert found == pytest.approx(pearson(attention_of(first)[:, 2:], saliency), abs=1e-6)
    with pytest.raises(ValueError, match=r"share no step: select the same stretch of time in both\."):
        correlate(first.cross_attention, maps.encoder_saliency.isel(step=[5]))


def test_the_order_of_axes_does_not_matter(made):
    maps = made.maps()
    for name in SALIENCIES:
        expected = correlate(maps.cross_attention, maps[name])
        turned = correlate(maps.cross_attention.transpose(), maps[name].transpose())
        for variable in expected:
            xr.testing.assert_allclose(turned[variable].transpose(*expected[variable].dims), expected[variable])


def test_the_row_of_eos_has_no_influence(made):
    maps, other = made.maps(), made.maps()
    last = np.arange(maps.sizes["step"], 0.0, -1)
    other["cross_attention"][..., -1, :] = last / last.sum()
    other["encoder_saliency"][-1] = last
    other["input_saliency"][-1] = np.arange(22.0)[:, None]
    for name in SALIENCIES:
        xr.testing.assert_identical(
            correlate(maps.cross_attention, maps[name]), correlate(other.cross_attention, other[name])
        )


def matched_maps(made):
    """Attention whose normalised rows have equal mean and spread, and saliency that is an affine function of it."""
    angles = 2 * np.pi * np.add.outer(np.arange(6), np.arange(6)) / 6
    pattern = np.cos(angles)  # every row and every column holds the same six values
    rng = np.random.default_rng(0)
    attention = np.vstack([1 / 6 + 0.1 * pattern, rng.dirichlet(np.ones(6))])
    saliency = np.vstack([rng.uniform(0.5, 4, (6, 1)) * pattern + rng.uniform(5, 9, (6, 1)), rng.uniform(size=(1, 6))])
    maps = made.maps(tokens=(*"abcdef", "</s>"), frames=24)
    maps["cross_attention"][:] = attention.astype(np.float32)
    maps["encoder_saliency"][:] = saliency
    maps["input_saliency"][:] = np.repeat(saliency, 4, axis=1)[..., None]
    return maps


@pytest.mark.parametrize("name", SALIENCIES)
def test_maps_that_agree_perfectly_have_rho_1(made, name):
    maps = matched_maps(made)
    for sign in (1, -1):
        rho = correlate(maps.cross_attention, sign * maps[name])
        for variable in rho.values():
            np.testing.assert_allclose(variable, sign, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(scale=hnp.arrays(float, 5, elements=st.floats(1e-3, 1e3)), shift=hnp.arrays(float, 5, elements=st.floats(-5, 5)))
def test_rho_does_not_depend_on_the_scale_and_offset_of_a_token_s_saliency(scale, shift):
    maps = random_maps()
    scale, shift = xr.DataArray(scale, dims="token"), xr.DataArray(shift, dims="token")
    for name in SALIENCIES:
        changed = correlate(maps.cross_attention, maps[name] * scale + shift * scale)
        xr.testing.assert_allclose(changed, correlate(maps.cross_attention, maps[name]), atol=1e-9)


def test_undefined_correlations_raise(made):
    maps = made.maps()
    one = made.maps(tokens=("▁a", "</s>"))
    flat, constant = maps.encoder_saliency.copy(data=np.full((5, 6), 0.1)), maps.cross_attention.copy()
    constant[1, 2] = 1 / 6
    even = maps.cross_attention.copy(data=np.full((2, 3, 5, 6), 1 / 6, np.float32))
    for attention, saliency, sentence in (
        (one.cross_attention, one.encoder_saliency, "fewer than two tokens besides </s>: rho needs two or more"),
        (maps.cross_attention, flat, "The saliency is the same everywhere: explain the utterance again with more"),
        (maps.cross_attention[:, :, ::-1], flat, "The two arrays explain different tokens: select the same tokens in"),
        (maps.input_saliency, maps.cross_attention, "^The first array has no axis step: give attention first"),
        (maps.cross_attention.isel(token=0), flat, "an array has no axis token: select several tokens"),
        (constant, maps.encoder_saliency, "The attention of layer 2, head 3 never changes, so it correlates with"),
        (even.sel(layer=1, head=1), maps.encoder_saliency, "The attention of all heads together never changes"),
    ):
        with pytest.raises(ValueError, match=sentence) as error:
            correlate(attention, saliency)
        assert "\n" not in str(error.value) and str(error.value).endswith(".")


@pytest.mark.parametrize("reduction", POOL)
def test_many_utterances_are_correlated_one_by_one(made, reduction):
    maps = [made.scored(seed, utterance=f"made-{seed}") for seed in range(3)]
    rho = correlate_all(iter(maps), reduction)
    for name, axes in VARIABLES.items():
        assert rho[name].dims == ("saliency", "masks", "utterance", *axes)
    assert rho.saliency.values.tolist() == ["input", "encoder"] and rho.masks.values.tolist() == ["all", "half"]
    assert rho.utterance.values.tolist() == ["made-0", "made-1", "made-2"]
    for item in maps:
        for place in ("input", "encoder"):
            own = rho.sel(utterance=item.utterance, saliency=place)
            whole = correlate(item.cross_attention, item[f"{place}_saliency"], reduction)
            both = [*halves_by_hand(item, place)]
            halves = [correlate(item.cross_attention, half, reduction) for half in both]
            for name in VARIABLES:
                np.testing.assert_array_equal(own[name].sel(masks="all"), whole[name])
                mean = (halves[0][name] + halves[1][name]) / 2
                np.testing.assert_allclose(own[name].sel(masks="half"), mean, atol=1e-6)
                assert np.abs(mean - whole[name]).max() > 1e-3
            compared = [
                normalised_saliency(half, item, reduction).values.ravel() for half in halves_by_hand(item, place)
            ]
            r = np.corrcoef(*compared)[0, 1]
            assert own.reliability.item() == pytest.approx(2 * r / (1 + r), abs=1e-6)
    assert rho.reliability.dims == ("saliency", "utterance")
    if reduction == "2d_max":
        stored = [[item.attrs[f"{place}_reliability"] for item in maps] for place in ("input", "encoder")]
        np.testing.assert_allclose(rho.reliability, stored, rtol=1e-6)


@pytest.mark.parametrize(
    ("partition", "reduction", "linear"),
    [
        ("superpixels", "2d_max", ["encoder"]),
        ("spread", "1d_max_1d_avg", ["encoder"]),
        ("superpixels", "2d_avg", ["input", "encoder"]),
        ("windows", "2d_max", ["input", "encoder"]),
        ("windows", "2d_avg", ["input", "encoder"]),
    ],
)
def test_maps_that_are_linear_in_the_scores_are_listed(made, partition, reduction, linear):
    rho = correlate_all([made.scored(partition=partition)], reduction)
    assert rho.attrs == {
        "model": "tiny", "setting": "en", "estimator": "mean", "linear": linear, "without_scores": []
    }  # fmt: skip


def test_maps_without_scores_have_no_halves_and_no_reliability(made):
    maps = [made.maps(seed, utterance=f"made-{seed}") for seed in range(3)]
    rho = correlate_all(maps)
    assert rho.linear == ["encoder"] and rho.without_scores == ["input", "encoder"]
    for name in VARIABLES:
        assert np.isnan(rho[name].sel(masks="half")).all() and np.isfinite(rho[name].sel(masks="all")).all()
    assert np.isnan(rho.reliability).all() and rho.reliability.shape == (2, 3)


def test_maps_without_encoder_saliency_are_correlated_with_the_input_alone(made):
    maps = [made.scored(seed, utterance=f"made-{seed}") for seed in range(3)]
    bare = [item.drop_vars("encoder_saliency") for item in maps]
    assert saliencies_of(bare[0]) == ["input_saliency"]
    rho = correlate_all(bare)
    xr.testing.assert_identical(rho, correlate_all(maps).sel(saliency=["input"]))


def test_an_utterance_that_cannot_be_correlated_is_named(made):
    maps = [made.maps(), made.maps(utterance="short", tokens=("▁a", "</s>"))]
    with pytest.raises(ValueError, match=r"^tiny, en, short: The maps have fewer than two tokens besides </s>"):
        correlate_all(maps)
