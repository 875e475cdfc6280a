import numpy as np
import pandas as pd
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from xattn.attention import MEAN
from xattn.compare import (
    correlate,
    correlation_table,
    correlations,
    few_against_all,
    frame_wise,
    mean_interval,
    mean_std,
    min_max,
    on_steps,
    reduce_to_steps,
    saliency_on_steps,
    spoken_tokens,
)
from xattn.estimators import UnitScores, masks_of
from xattn.explain import explain


@pytest.fixture
def values():
    return np.random.default_rng(0).exponential(size=(5, 6, 4))


def test_mean_std_is_the_z_score_of_each_token(values):
    (result,) = mean_std(values)
    np.testing.assert_allclose(result.reshape(5, -1), stats.zscore(values.reshape(5, -1), axis=1, ddof=1), rtol=1e-12)
    both = mean_std(values, 3 * values[:, 0])
    assert np.array_equal(both[0], result)  # each map has its own mean
    np.testing.assert_allclose(both[1], stats.zscore(values[:, 0], axis=1, ddof=1), rtol=1e-12)


def test_mean_std_leaves_absent_cells_out(values):
    values[1, :3] = np.nan
    (result,) = mean_std(values)
    assert not result[1, :3].any()
    np.testing.assert_allclose(result[1, 3:].ravel(), stats.zscore(values[1, 3:].ravel(), ddof=1), rtol=1e-12)
    np.testing.assert_allclose(result[0].ravel(), stats.zscore(values[0].ravel(), ddof=1), rtol=1e-12)


def test_frame_wise_is_the_z_score_of_each_step_over_the_tokens(values):
    np.testing.assert_allclose(frame_wise(values), stats.zscore(values, axis=-2, ddof=1), rtol=1e-12)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1 / 3, 1e9])
def test_maps_without_spread_become_0(values, constant):
    values[2] = constant
    assert not mean_std(values)[0][2].any() and mean_std(values)[0][1].any()
    assert not min_max(values)[0][2].any() and min_max(values)[0][1].any()
    values[:, :, 1] = constant
    result = frame_wise(values)
    assert not result[:, :, 1].any() and result[0, :, 0].all()
    assert not frame_wise(np.full((3, 4), constant, dtype=np.float32)).any()


def test_min_max_pairs_the_maps_of_a_token(values):
    previous = np.random.default_rng(1).exponential(3, size=(5, 5))
    previous[np.triu_indices(5, 1)] = np.nan
    spectrogram, tokens = min_max(values, previous)
    for token in range(5):
        own = np.concatenate([values[token].ravel(), previous[token, : token + 1]])
        expected = (own - own.min()) / (own.max() - own.min())
        np.testing.assert_allclose(spectrogram[token].ravel(), expected[: values[token].size], rtol=1e-12)
        np.testing.assert_allclose(tokens[token, : token + 1], expected[values[token].size :], rtol=1e-12)
        assert not tokens[token, token + 1 :].any()


@pytest.mark.parametrize("frames", [16, 15, 13])
def test_reduction_to_steps(frames):
    saliency = np.random.default_rng(0).standard_normal((3, frames, 5))
    expected = {how: np.empty((3, 4)) for how in ("2d_max", "2d_avg", "1d_max_1d_avg")}
    for token in range(3):
        for step in range(4):
            cells = [saliency[token, min(frame, frames - 1)].tolist() for frame in range(4 * step, 4 * step + 4)]
            expected["2d_max"][token, step] = max(max(frame) for frame in cells)
            expected["2d_avg"][token, step] = sum(sum(frame) for frame in cells) / 20
            expected["1d_max_1d_avg"][token, step] = sum(max(frame) for frame in cells) / 4
    for how, map_ in expected.items():
        np.testing.assert_allclose(reduce_to_steps(saliency, 4, 4, how), map_, rtol=1e-12)
    assert np.array_equal(reduce_to_steps(saliency, 4, 4), expected["2d_max"])


@pytest.mark.parametrize("frames", [8, 10, 12, 13, 15])
def test_reduction_where_windows_begin_before_the_frames(frames):
    saliency = np.random.default_rng(0).standard_normal((2, frames, 5))
    steps = frames // 6 + 1  # windows of six, the first of which lacks three and the last one up to three
    maxima, means = np.empty((2, 2, steps))
    for step in range(steps):
        window = [min(max(frame, 0), frames - 1) for frame in range(6 * step - 3, 6 * step + 3)]
        maxima[:, step] = saliency[:, window].max(axis=(1, 2))
        means[:, step] = saliency[:, window].mean(axis=(1, 2))
    np.testing.assert_array_equal(reduce_to_steps(saliency, steps, 6, lead=3), maxima)
    np.testing.assert_allclose(reduce_to_steps(saliency, steps, 6, "2d_avg", lead=3), means)
    for wrong in (steps - 1, steps + 1):
        with pytest.raises(ValueError, match="do not fit"):
            reduce_to_steps(saliency, wrong, 6, lead=3)


def test_names_that_do_not_exist(made):
    with pytest.raises(ValueError, match="no reduction '3d': choose one of 2d_max, 2d_avg, 1d_max_1d_avg"):
        reduce_to_steps(np.zeros((1, 4, 2)), 1, 4, "3d")
    with pytest.raises(ValueError, match="no saliency source 'output': choose 'input' .* or 'encoder'"):
        saliency_on_steps(made.maps(), "output")


def test_tokens_that_are_not_spoken_are_left_out(made):
    maps = made.maps(tokens=("<s>", "▁a", "▁b", "</s>"))
    assert spoken_tokens(maps).token.values.tolist() == ["▁a", "▁b"]
    assert np.array_equal(spoken_tokens(maps).encoder_saliency, maps.encoder_saliency[1:3])


def attention_of(maps, layer, head):
    """Plain mean over the chosen layers and heads, without the last token: (token, step)."""
    values = maps.cross_attention.values[:, :, :-1].astype(np.float64)
    values = values if layer == MEAN else values[[layer - 1]]
    values = values if head == MEAN else values[:, [head - 1]]
    return stats.zscore(values.mean(axis=(0, 1)), axis=0, ddof=1)


@pytest.mark.parametrize(("layer", "head"), [(2, 3), (1, MEAN), (MEAN, 2), (MEAN, MEAN)])
def test_correlation_is_pearson_s_of_the_normalised_maps(made, layer, head):
    maps = made.maps()
    attention = attention_of(maps, layer, head)

    encoder = stats.zscore(maps.encoder_saliency.values[:-1], axis=1, ddof=1)
    expected = stats.pearsonr(attention.ravel(), encoder.ravel()).statistic
    assert correlate(maps, "encoder").sel(layer=layer, head=head).item() == pytest.approx(expected, abs=1e-6)

    whole = maps.input_saliency.values[:-1]
    whole = stats.zscore(whole.reshape(len(whole), -1), axis=1, ddof=1).reshape(whole.shape)
    for reduction, reduce in {"2d_max": np.max, "2d_avg": np.mean}.items():
        steps = [reduce(whole[:, list(range(4 * s, 4 * s + 4))[: 22 - 4 * s]], axis=(1, 2)) for s in range(5)]
        last = reduce(whole[:, [20, 21, 21, 21]], axis=(1, 2))
        expected = stats.pearsonr(attention.ravel(), np.stack([*steps, last], axis=1).ravel()).statistic
        actual = correlate(maps, "input", reduction).sel(layer=layer, head=head).item()
        assert actual == pytest.approx(expected, abs=1e-6)


def test_the_row_of_eos_has_no_influence(made):
    maps, other = made.maps(), made.maps()
    last = np.arange(maps.sizes["step"], 0.0, -1)
    other["cross_attention"][..., -1, :] = last / last.sum()
    other["encoder_saliency"][-1] = last
    other["input_saliency"][-1] = np.arange(22.0)[:, None]
    for source in ("input", "encoder"):
        assert np.array_equal(correlate(maps, source), correlate(other, source))


def matched_maps(made):
    """Attention whose normalised form has rows of equal mean and spread, and saliency that is an affine image of it."""
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


@pytest.mark.parametrize("source", ["input", "encoder"])
def test_maps_that_agree_perfectly_have_rho_1(made, source):
    maps = matched_maps(made)
    np.testing.assert_allclose(correlate(maps, source), 1.0, atol=1e-6)
    maps["encoder_saliency"] *= -1
    maps["input_saliency"] *= -1
    np.testing.assert_allclose(correlate(maps, source), -1.0, atol=1e-6)


@settings(max_examples=20, deadline=None)
@given(scale=hnp.arrays(float, 5, elements=st.floats(1e-3, 1e3)), shift=hnp.arrays(float, 5, elements=st.floats(-5, 5)))
def test_rho_does_not_depend_on_the_scale_and_offset_of_a_token_s_saliency(scale, shift):
    from conftest import random_maps

    maps = random_maps()
    scale, shift = xr.DataArray(scale, dims="token"), xr.DataArray(shift, dims="token")
    changed = maps.assign({name: maps[name] * scale + shift * scale for name in ("input_saliency", "encoder_saliency")})
    for source in ("input", "encoder"):
        np.testing.assert_allclose(correlate(changed, source), correlate(maps, source), atol=1e-9)


def test_labels_of_a_correlation(made):
    rho = correlate(made.maps(), "encoder")
    assert rho.dims == ("layer", "head") and rho.shape == (3, 4)
    assert rho["layer"].values.tolist() == [1, 2, MEAN] and rho["head"].values.tolist() == [1, 2, 3, MEAN]


def test_an_undefined_correlation_is_refused(made):
    with pytest.raises(ValueError, match="hypothesis of made-1 has fewer than two tokens: leave it out"):
        correlate(made.maps(tokens=("▁a", "</s>")), "encoder")
    maps = made.maps()
    maps["encoder_saliency"][:] = 0.1
    with pytest.raises(ValueError, match="The encoder saliency of made-1 is flat: explain it again with more masks"):
        correlate(maps, "encoder")


def test_table_of_correlations(made):
    maps = [made.maps(seed, utterance=f"made-{seed}") for seed in range(4)]
    table = correlation_table(correlations(iter(maps), "2d_avg"))
    columns = ["model", "setting", "estimator", "source", "layer", "head", "rho", "low", "high"]
    assert table.columns.tolist() == [*columns, "corrected", "corrected_low", "corrected_high", "ceiling", "n"]
    assert len(table) == 3 * 3 * 4 and (table.n == 4).all()
    assert set(table.model) == {"tiny"} and set(table.setting) == {"en"}
    for layer in (1, 2, MEAN):
        for head in (1, 2, 3, MEAN):
            rho = {
                source: np.array([correlate(item, source, "2d_avg").sel(layer=layer, head=head) for item in maps])
                for source in ("input", "encoder")
            }
            for source, each in (rho | {"difference": rho["encoder"] - rho["input"]}).items():
                chosen = table[(table.source == source) & (table.layer == layer) & (table["head"] == head)]
                assert chosen.rho.item() == pytest.approx(np.mean(each))
                roots = {"input": 0.8, "encoder": 0.9}  # of the reliabilities
                corrected = {place: rho[place] / root for place, root in roots.items()}
                corrected["difference"] = corrected["encoder"] - corrected["input"]
                value, low, high = mean_interval(corrected[source])
                assert (chosen.corrected.item(), chosen.corrected_low.item()) == pytest.approx((value, low))
                assert chosen.corrected_high.item() == pytest.approx(high)
                assert chosen.ceiling.item() == pytest.approx(roots.get(source, np.nan), nan_ok=True)
                assert min(each) <= chosen.low.item() <= np.mean(each) <= chosen.high.item() <= max(each)
    single = correlation_table(correlations(maps[:1]))
    assert (single.n == 1).all() and single.low.isna().all() and single.rho.notna().all()


def test_maps_without_encoder_saliency_are_correlated_with_the_input_alone(made):
    maps = [made.maps(seed, utterance=f"made-{seed}") for seed in range(3)]
    whole = correlation_table(correlations(maps))
    table = correlation_table(correlations(item.drop_vars("encoder_saliency") for item in maps))
    pd.testing.assert_frame_equal(table, whole[whole.source == "input"].reset_index(drop=True))
    with pytest.raises(ValueError, match="The maps of made-0 hold no encoder saliency: add it to what they were read"):
        correlate(maps[0].drop_vars("encoder_saliency"), "encoder")


def test_unknown_reliability_leaves_nothing_to_correct_for(made):
    maps = [made.maps(seed).assign_attrs(input_reliability=np.nan, encoder_reliability=np.nan) for seed in range(3)]
    table = correlation_table(correlations(maps))
    assert table.rho.notna().all() and table[["corrected", "corrected_low", "ceiling"]].isna().all(axis=None)
    assert np.isnan(mean_interval([])).all()


def test_few_perturbations_against_the_mean_of_all_others(model, utterances):
    maps = explain(model, utterances[0], input_masks=400, encoder_masks=240, precision="float32")
    table = few_against_all(maps, "input").set_index(["estimator", "perturbations"])
    assert table.index.unique("perturbations").tolist() == [12, 20, 40]
    assert set(table.index.unique("estimator")) == {"mean", "sqrt_mean", "ridge", "sqrt_ridge"}
    spoken, masks, labels = spoken_tokens(maps), masks_of(maps, "input"), maps.segmentation.values
    attention = frame_wise(spoken.cross_attention.mean(["layer", "head"]).values).ravel()
    first, others = (
        on_steps(UnitScores.of(spoken.input_scores.values, masks, used).cells(labels), maps.sizes["step"], 4).ravel()
        for used in (np.arange(400) < 20, np.arange(400) >= 40)
    )
    row = table.loc["mean", 20]
    assert row.r == pytest.approx(np.corrcoef(first, others)[0, 1])
    expected = np.corrcoef(first, attention)[0, 1] - np.corrcoef(others, attention)[0, 1]
    assert row.bias == pytest.approx(expected)
    steps = few_against_all(maps, "encoder")
    assert steps.perturbations.unique().tolist() == [12, 24] and steps.r.between(-1, 1).all()


def test_interval_of_a_mean():
    values = np.random.default_rng(0).normal(0.4, 0.2, 200)
    mean, low, high = mean_interval(values)
    assert mean == pytest.approx(values.mean())
    margin = 1.96 * values.std(ddof=1) / np.sqrt(200)
    assert [low, high] == pytest.approx([mean - margin, mean + margin], abs=0.1 * margin)
    assert mean_interval(values) == (mean, low, high)
    assert mean_interval(values, seed=1)[1:] != (low, high)


def test_interval_of_a_single_value():
    mean, low, high = mean_interval([0.3])
    assert mean == 0.3 and np.isnan([low, high]).all()
