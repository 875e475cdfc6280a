"""The long table of correlations, and the labels of averages over layers and heads."""

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from conftest import halves_by_hand
from scipy import stats

from reproduction.tables import MEAN, correlation_table, with_mean_labels, without_noise
from xattn import correlate
from xattn.analysis.correlation import correlate_all, normalised_saliency

COLUMNS = ["model", "direction", "estimator", "saliency", "layer", "head", "rho", "low", "high", "reliability"]
COLUMNS += ["reported", "reported_low", "reported_high", "n"]
REPORTED = COLUMNS[-4:-1]
LABELS = [(layer, head) for layer in (1, 2, MEAN) for head in (1, 2, 3, MEAN)]


def agreeing(made, seed, number=400):
    """Maps whose attention follows both kinds of saliency, the more so the higher the layer and head."""
    maps = made.scored(seed, f"made-{seed}", number=number)
    rng = np.random.default_rng(seed)
    both = sum(
        stats.zscore(normalised_saliency(maps[name], maps).values, axis=None)
        for name in ("input_saliency", "encoder_saliency")
    )
    spoken = len(both)
    weights = np.arange(1, 7).reshape(2, 3, 1, 1) / 4
    attention = rng.exponential(size=maps.cross_attention.shape)
    attention[:, :, :spoken] *= np.exp(weights * both)
    attention /= attention.sum(axis=-1, keepdims=True)
    return maps.assign(cross_attention=maps.cross_attention.copy(data=attention))


def rho_of(rho, layer, head):
    """One value of `correlate` for labels that can be "mean"."""
    chosen = {axis: label for axis, label in (("layer", layer), ("head", head)) if label != MEAN}
    name = {(): "overall", ("layer",): "by_layer", ("head",): "by_head"}.get(tuple(chosen), "by_layer_and_head")
    return rho[name].sel(chosen)


def test_averages_have_the_label_mean(made):
    rho = correlate_all([made.maps(seed, utterance=f"made-{seed}") for seed in range(2)]).sel(masks="all", drop=True)
    rho = rho.drop_vars("reliability")
    labelled = with_mean_labels(rho)
    assert labelled.dims == ("saliency", "utterance", "layer", "head")
    assert labelled["layer"].values.tolist() == [1, 2, MEAN] and labelled["head"].values.tolist() == [1, 2, 3, MEAN]
    for layer, head in LABELS:
        np.testing.assert_array_equal(labelled.sel(layer=layer, head=head), rho_of(rho, layer, head))
    maps = made.maps()
    single = with_mean_labels(correlate(maps.cross_attention, maps.input_saliency))
    assert single.dims == ("layer", "head") and single.shape == (3, 4)
    turned = with_mean_labels(correlate(maps.cross_attention.transpose("head", ...), maps.input_saliency))
    xr.testing.assert_allclose(turned, single)


def by_hand(maps, reduction):
    """rho of all masks and, on average, of their halves: (masks, saliency, label, utterance); and reliabilities."""
    both, reliability = [], []
    for item in maps:
        rows, own = [], []
        for place in ("input", "encoder"):
            halves = list(halves_by_hand(item, place))
            found = [correlate(item.cross_attention, each, reduction) for each in (item[f"{place}_saliency"], *halves)]
            found = np.array([[rho_of(each, *label) for label in LABELS] for each in found])
            rows.append([found[0], found[1:].mean(axis=0)])
            steps = [normalised_saliency(each, item, reduction).values.ravel() for each in halves]
            r = stats.pearsonr(*steps).statistic
            own.append(2 * r / (1 + r))
        both.append(rows)
        reliability.append(own)
    return np.moveaxis(np.array(both), [2, 0], [0, -1]), np.mean(reliability, axis=0)


def jackknife(statistic, n):
    """Value and 95 % interval from pseudo-values, centred on the value."""
    everything = statistic(np.arange(n))
    others = np.array([statistic(np.delete(np.arange(n), row)) for row in range(n)])
    pseudo = n * everything - (n - 1) * others
    half = stats.t.ppf(0.975, n - 1) * pseudo.std(axis=0, ddof=1) / np.sqrt(n)
    return everything, everything - half, everything + half


@pytest.mark.parametrize("reduction", ["2d_max", "2d_avg"])
def test_table_of_correlations(made, reduction):
    maps = [agreeing(made, seed) for seed in range(4)]
    table = correlation_table(correlate_all(iter(maps), reduction))
    assert table.columns.tolist() == COLUMNS
    assert len(table) == 3 * len(LABELS) and (table.n == 4).all()
    assert set(table.model) == {"tiny"} and set(table.direction) == {"en"} and set(table.estimator) == {"mean"}
    (everything, half), reliability = by_hand(maps, reduction)
    assert reliability[1] >= 0.5
    assert (reliability[0] >= 0.5) == (reduction == "2d_max")  # a noisy map in one of the cases
    corner = LABELS.index((MEAN, MEAN))

    def raw(rows):
        means = everything[..., rows].mean(axis=-1)
        return np.stack([*means, means[1] - means[0]])

    def reported(rows):
        mean, less = (each[:, corner, rows].mean(axis=-1) for each in (everything, half))
        power = np.array([2.0 if reduction == "2d_avg" else 1.0, 2.0])
        limit = (2 * mean**-power - less**-power) ** (-1 / power)
        factor = np.minimum(mean / limit, 1)
        means = everything[..., rows].mean(axis=-1) / factor[:, None]
        return np.stack([*means, means[1] - means[0]])

    order = [(saliency, *label) for saliency in ("input", "encoder", "difference") for label in LABELS]
    found = table.set_index(["saliency", "layer", "head"]).loc[order]
    for columns, statistic in ((["rho", "low", "high"], raw), (REPORTED, reported)):
        for column, values in zip(columns, jackknife(statistic, 4), strict=True):
            values = values.copy()
            if column in REPORTED and reliability[0] < 0.5:
                values[[0, 2]] = np.nan
            np.testing.assert_allclose(found[column], values.ravel(), rtol=1e-5, atol=1e-7, err_msg=column)
    expected = [*reliability, reliability.min()]
    np.testing.assert_allclose(found.reliability, np.repeat(expected, len(LABELS)), rtol=1e-5)
    assert found.reported.notna().all() == (reliability[0] >= 0.5)


def test_one_utterance_has_no_interval(made):
    single = correlation_table(correlate_all([agreeing(made, 0)]))
    assert (single.n == 1).all() and single.rho.notna().all() and single.reported.notna().any()
    assert single[["low", "high", "reported_low", "reported_high"]].isna().all(axis=None)


def test_noisy_maps_have_no_reported_value(made):
    rho = correlate_all(agreeing(made, seed) for seed in range(3))
    table = correlation_table(rho).set_index("saliency")
    assert table[REPORTED].notna().all(axis=None)
    rho["reliability"] = xr.full_like(rho.reliability, 0.8)
    rho.reliability.loc[{"saliency": "input"}] = [0.6, 0.5, 0.39]  # 0.497 on average
    noisy = correlation_table(rho).set_index("saliency")
    assert noisy.loc[["input", "difference"], REPORTED].isna().all(axis=None)
    pd.testing.assert_frame_equal(noisy.loc[["encoder"], REPORTED], table.loc[["encoder"], REPORTED])
    pd.testing.assert_frame_equal(noisy[["rho", "low", "high"]], table[["rho", "low", "high"]])
    np.testing.assert_allclose(noisy.loc["difference", "reliability"], 1.49 / 3)


def test_a_table_without_encoder_saliency_has_the_rows_of_the_input(made):
    maps = [agreeing(made, seed) for seed in range(3)]
    whole = correlation_table(correlate_all(maps))
    table = correlation_table(correlate_all(item.drop_vars("encoder_saliency") for item in maps))
    pd.testing.assert_frame_equal(table, whole[whole.saliency == "input"].reset_index(drop=True))


def test_values_of_unknown_noise_are_reported_as_measured(made):
    table = correlation_table(correlate_all(made.maps(seed, f"made-{seed}") for seed in range(3)))
    assert table.reliability.isna().all() and table.rho.notna().all()
    np.testing.assert_allclose(table[REPORTED], table[["rho", "low", "high"]])


def test_a_mean_without_noise_is_divided_by_the_attenuation_of_the_same_utterances(made):
    rho = correlate_all(agreeing(made, seed) for seed in range(5))
    for saliency, power in (("input", 1), ("encoder", 2)):
        values = rho.by_layer.sel(saliency=saliency, masks="all", layer=2).values
        statistic = without_noise(rho, saliency, values)
        for rows in (np.arange(5), np.array([0, 2, 3]), np.array([4])):
            everything, half = rho.overall.sel(saliency=saliency).values[:, rows].mean(axis=1)
            limit = max(everything, (2 * everything**-power - half**-power) ** (-1 / power))
            assert statistic(rows) == pytest.approx(values[rows].mean() * limit / everything, rel=1e-9)
    measured = correlate_all(made.maps(seed, f"made-{seed}") for seed in range(3))
    assert without_noise(measured, "input", np.array([0.1, 0.2, 0.6]))(np.arange(3)) == pytest.approx(0.3)
