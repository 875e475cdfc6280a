"""The long table of correlations, and the labels of averages over layers and heads."""

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from reproduction.tables import MEAN, correlation_table, with_mean_labels
from xattn import correlate
from xattn.analysis.correlation import correlate_all
from xattn.analysis.intervals import mean_interval


def rho_of(rho, layer, head):
    """One value of `correlate` for labels that can be "mean"."""
    chosen = {axis: label for axis, label in (("layer", layer), ("head", head)) if label != MEAN}
    name = {(): "overall", ("layer",): "by_layer", ("head",): "by_head"}.get(tuple(chosen), "by_layer_and_head")
    return rho[name].sel(chosen)


def test_averages_have_the_label_mean(made):
    rho = correlate_all([made.maps(seed, utterance=f"made-{seed}") for seed in range(2)])
    labelled = with_mean_labels(rho)
    assert labelled.dims == ("saliency", "utterance", "layer", "head")
    assert labelled["layer"].values.tolist() == [1, 2, MEAN] and labelled["head"].values.tolist() == [1, 2, 3, MEAN]
    for layer in (1, 2, MEAN):
        for head in (1, 2, 3, MEAN):
            np.testing.assert_array_equal(labelled.sel(layer=layer, head=head), rho_of(rho, layer, head))
    maps = made.maps()
    single = with_mean_labels(correlate(maps.cross_attention, maps.input_saliency))
    assert single.dims == ("layer", "head") and single.shape == (3, 4)
    turned = with_mean_labels(correlate(maps.cross_attention.transpose("head", ...), maps.input_saliency))
    xr.testing.assert_allclose(turned, single)


def test_table_of_correlations(made):
    maps = [made.maps(seed, utterance=f"made-{seed}") for seed in range(4)]
    table = correlation_table(correlate_all(iter(maps), "2d_avg"))
    columns = ["model", "setting", "estimator", "source", "layer", "head", "rho", "low", "high"]
    assert table.columns.tolist() == [*columns, "corrected", "corrected_low", "corrected_high", "ceiling", "n"]
    assert len(table) == 3 * 3 * 4 and (table.n == 4).all()
    assert set(table.model) == {"tiny"} and set(table.setting) == {"en"}
    own = {
        source: [correlate(item.cross_attention, item[f"{source}_saliency"], "2d_avg") for item in maps]
        for source in ("input", "encoder")
    }
    for layer in (1, 2, MEAN):
        for head in (1, 2, 3, MEAN):
            rho = {source: np.array([rho_of(each, layer, head) for each in found]) for source, found in own.items()}
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
    single = correlation_table(correlate_all(maps[:1]))
    assert (single.n == 1).all() and single.low.isna().all() and single.rho.notna().all()


def test_a_table_without_encoder_saliency_has_the_rows_of_the_input(made):
    maps = [made.maps(seed, utterance=f"made-{seed}") for seed in range(3)]
    whole = correlation_table(correlate_all(maps))
    table = correlation_table(correlate_all(item.drop_vars("encoder_saliency") for item in maps))
    pd.testing.assert_frame_equal(table, whole[whole.source == "input"].reset_index(drop=True))


def test_values_of_unknown_reliability_are_not_corrected(made):
    maps = [made.maps(seed).assign_attrs(input_reliability=np.nan, encoder_reliability=np.nan) for seed in range(3)]
    table = correlation_table(correlate_all(maps))
    assert table.rho.notna().all() and table[["corrected", "corrected_low", "ceiling"]].isna().all(axis=None)
