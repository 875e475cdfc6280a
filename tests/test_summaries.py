"""What the notebooks compute and arrange, on small tables with known answers."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import xarray as xr

from reproduction import conditions, summaries
from xattn.maps import REDUCTIONS

NAN = dict.fromkeys(["corrected", "corrected_low", "corrected_high", "ceiling"], np.nan)


def row(source="input", layer="mean", head="mean", rho=0.4, model="base", setting="en", **others):
    about = {"model": model, "setting": setting, "estimator": "mean", "source": source, "layer": layer, "head": head}
    noise = {"corrected": rho / 0.8, "corrected_low": 0.1, "corrected_high": 0.9, "ceiling": 0.8}
    return about | {"rho": rho, "low": rho - 0.1, "high": rho + 0.1, "n": 2} | noise | others


def test_progress_is_silent_at_first_and_then_says_what_is_left(monkeypatch, capsys):
    assert list(conditions.progress([1, 2, 3], "Loop")) == [1, 2, 3]
    assert capsys.readouterr().out == ""
    clock = iter([0.0, 0.0, 4.0, 5.0, 25.0])
    monkeypatch.setattr(conditions.time, "monotonic", lambda: next(clock))
    assert list(conditions.progress(iter("abcd"), "Loop", total=4)) == list("abcd")
    assert capsys.readouterr().out == "Loop: 1 of 4, about 12 s left\nLoop: 3 of 4, about 8 s left\n"


def test_what_is_given_is_written(tmp_path):
    stem = tmp_path / "figures" / "tab1"
    summaries.write(stem, numbers=pd.DataFrame({"rho": [1 / 3]}), figure=plt.figure())
    assert stem.with_suffix(".csv").read_text() == "rho\n0.333333\n"
    assert sorted(path.name for path in stem.parent.iterdir()) == ["tab1.csv", "tab1.png"]
    summaries.write(stem, text=pd.DataFrame({"a": ["b"]}), caption="Caption.")
    assert stem.with_suffix(".md").read_text().startswith("Caption.\n\n| a")


def test_reductions_are_compared_with_the_paper_s_choice():
    values = {name: np.array([0.5, 0.7]) - 0.1 * number for number, name in enumerate(REDUCTIONS)}
    rho = {
        name: xr.Dataset({"overall": (("saliency", "utterance"), found[None])}, {"saliency": ["input"]})
        for name, found in values.items()
    }
    rho["2d_max"].attrs.update(model="base", setting="en", estimator="mean")
    table = summaries.reductions(rho)
    assert set(table.quantity) == {"rho"} and table.columns[-3:].tolist() == ["model", "setting", "estimator"]
    by_name = table.set_index(["reduction", "minus"]).value.to_dict()
    expected = {("2d_max", ""): 0.6, ("2d_avg", ""): 0.5, ("1d_max_1d_avg", ""): 0.4}
    assert by_name == pytest.approx(expected | {("2d_max", "2d_avg"): 0.1, ("2d_max", "1d_max_1d_avg"): 0.2})
    assert summaries.arranged_reductions(table).rho.tolist()[0] == "0.60 (0.50 to 0.70)"
    assert summaries.differences(table, "value", 1).difference.tolist()[0] == "0.1 (0.1 to 0.1)"


def test_aggregates_are_compared_with_single_heads():
    rho = {(1, 1): 0.1, (1, 2): 0.3, (1, "mean"): 0.35, ("mean", 1): 0.2, ("mean", 2): 0.4, ("mean", "mean"): 0.3}
    table = pd.DataFrame([row(layer=layer, head=head, rho=value) for (layer, head), value in rho.items()])
    found = summaries.single_heads_and_averages(table).loc["rho(CA, SM^X)"]
    assert found.tolist() == pytest.approx([0.2, 0.3, 0.35, 0.35, 0.3])
    best = summaries.best_aggregate(table, pd.DataFrame({"value": []})).iloc[0]
    assert (best.ours, best["layer"], best["head"], best.paper) == (0.4, "mean", 2, None)
    assert summaries.arranged_heads(table).loc["mean", "head 2"] == "0.40 (0.30 to 0.50)"


@pytest.mark.parametrize("noise", [{}, NAN], ids=["with reliability", "without"])
def test_layers_and_mixing_are_arranged_with_and_without_reliability(noise):
    layers = [row(layer=layer, rho=value, **noise) for layer, value in ((1, 0.2), (2, 0.45), ("mean", 0.4))]
    wide = summaries.arranged_layers(pd.DataFrame(layers).drop(columns=["source", "head"]), ["base/en"])
    assert wide.index.tolist()[:3] == [1, 2, "mean"]
    column = wide["base", "en"]
    assert column["best, ours"] == "0.45 (0.35 to 0.55)" and column["best, paper"] == "0.588"
    assert column["mean, ceiling"] == ("" if noise else "0.80")
    mixing = pd.DataFrame(row(source, rho=value, **noise) for source, value in (("input", 0.4), ("encoder", 0.5)))
    mixing = pd.concat([mixing, pd.DataFrame([row("difference", rho=0.1, **NAN)])])
    wide = summaries.arranged_mixing(mixing, ["base/en"])
    ours = wide.loc["base", "en"]
    assert ours["rho(CA, SM^X)"] == "0.400 (0.300 to 0.500)" and ours.share == "20.0%"
    assert ours.ceilings == ("" if noise else "0.80 / 0.80")
    assert wide.loc[("paper, range", ""), "difference"] == "0.03 to 0.18"


def test_quality_stands_beside_the_paper_s_values():
    common = {"model": "small", "setting": "en-it", "low": np.nan, "high": np.nan, "n": 100}
    table = pd.DataFrame([{"metric": "BLEU", "value": 60.0, **common}, {"metric": "size", "value": 40.0, **common}])
    text = summaries.arranged_quality(table).set_index("metric")
    assert text.ours.to_dict() == pytest.approx({"BLEU": "60.0", "size": "40.0", "COMET": np.nan}, nan_ok=True)
    assert text.paper["COMET"] == "0.854"
    assert summaries.arranged_quality(table[table.metric == "size"]).metric.tolist() == ["size"]
    assert summaries.metric_titles(table)["size"] == "size (%)\nlower is better"


def test_deletion_areas_have_the_paper_s_values_if_there_are_any():
    areas = pd.DataFrame({"map": ["CA", "SM^H"], "minus": "", "metric": "WER", "area": [40.0, 50.0]})
    areas = areas.assign(low=30.0, high=60.0, n=2)
    assert summaries.arranged_deletion(areas, ["SM^H", "CA"], "base/en").paper.tolist() == ["", "41.2"]
    assert summaries.arranged_deletion(areas, ["CA"], "other/en").paper.tolist() == [""]


def test_estimators_are_judged_by_both_goals():
    rows = [
        ("base/en", "input", estimator, masks, r, bias)
        for estimator, r, bias in (("mean", 0.99, 0.02), ("ridge", 0.99, -0.005))
        for masks in (100, 2000)
        for _ in range(2)
    ]
    table = pd.DataFrame(rows, columns=["pair", "source", "estimator", "perturbations", "r", "bias"])
    means = summaries.convergence_intervals(table)
    assert set(means.n) == {2} and len(means) == 8
    reached = summaries.goals_reached(means)
    assert reached["goal reached"].to_dict() == {"mean": 0, "ridge": 1} and set(reached["of"]) == {1}


def test_the_first_conditions_of_models():
    assert summaries.first_of_models(["base/en", "small/it", "small/en", "large/en"], 2) == ["base/en", "small/it"]


def test_noise_is_compared_where_it_varies():
    overall = xr.DataArray([[0.1, 0.2, 0.3]], {"saliency": ["input"], "utterance": ["a", "b", "c"]})
    rho = {"base/en": xr.Dataset({"overall": overall})}

    class Recording:
        def __init__(self, id, snr):
            self.id, self.snr = id, snr

    found = summaries.correlation_with_noise(rho, [Recording("a", 1), Recording("b", 2), Recording("c", 3)])
    assert found.loc[("base/en", "input"), "Spearman's r"] == 1
    assert summaries.correlation_with_noise(rho, [Recording("a", 1), Recording("b", 2)]).empty
