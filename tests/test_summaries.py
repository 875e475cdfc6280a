"""What the notebooks compute and arrange, on small tables with known answers."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from scipy import stats

from reproduction import estimators, summaries
from reproduction.tables import MEAN, correlation_table
from xattn import Occlusion, explain_corpus, load_maps
from xattn.analysis.quality import wer
from xattn.maps import REDUCTIONS

NOISY = dict.fromkeys(["reported", "reported_low", "reported_high"], np.nan) | {"reliability": 0.4}
METRICS = ["corpus-capped WER", "utterance-capped WER"]


def row(saliency="input", layer=MEAN, head=MEAN, rho=0.4, model="base", direction="en", **others):
    about = {"model": model, "direction": direction, "estimator": "mean"}
    about |= {"saliency": saliency, "layer": layer, "head": head, "rho": rho, "low": rho - 0.1, "high": rho + 0.1}
    noise = {"reliability": 0.8, "reported": rho / 0.8, "reported_low": 0.1, "reported_high": 0.9}
    return about | noise | {"n": 2} | others


def correlations(**values):
    """A result of `correlate_all` with the given arrays for SM^X; rho of half of the masks is 1 / 1.1 of them.

    overall: (n,); by_layer: (n, layer); by_head: (n, head); by_layer_and_head: (n, layer, head).
    """
    axes = {"overall": (), "by_layer": ("layer",), "by_head": ("head",), "by_layer_and_head": ("layer", "head")}
    variables = {
        name: (("saliency", "masks", "utterance", *axes[name]), np.stack([each, np.divide(each, 1.1)])[None])
        for name, each in values.items()
    }
    n = len(values["overall"])
    variables["reliability"] = (("saliency", "utterance"), np.full((1, n), 0.8))
    sizes = {name: np.shape(values[f"by_{name}"])[1] for name in ("layer", "head") if f"by_{name}" in values}
    coordinates = {name: np.arange(1, size + 1) for name, size in sizes.items()}
    coordinates |= {"saliency": ["input"], "masks": ["all", "half"], "utterance": np.arange(n)}
    about = {"model": "base", "setting": "en", "estimator": "mean", "linear": ["encoder"], "without_scores": []}
    return xr.Dataset(variables, coords=coordinates, attrs=about)


def student(values):
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    return np.mean(values), low, high


def text(values, digits):
    """Mean and interval of values that have the same factor in every utterance."""
    return "{:z.{d}f} ({:z.{d}f} to {:z.{d}f})".format(*student(values), d=digits)


def test_what_is_given_is_written(tmp_path):
    stem = tmp_path / "figures" / "tab1"
    summaries.write(stem, numbers=pd.DataFrame({"rho": [1 / 3]}), figure=plt.figure())
    assert stem.with_suffix(".csv").read_text() == "rho\n0.333333\n"
    assert sorted(path.name for path in stem.parent.iterdir()) == ["tab1.csv", "tab1.png"]
    summaries.write(stem, text=pd.DataFrame({"a": ["b"]}), caption="Caption.")
    assert stem.with_suffix(".md").read_text().startswith("Caption.\n\n| a")


def test_noisy_rows_have_a_low_reliability_or_no_value():
    table = pd.DataFrame({"value": [1.0, 1.0, np.nan, 1.0], "reliability": [0.5, 0.49, 0.9, np.nan]})
    assert summaries.is_noisy(table).tolist() == [False, True, True, False]


@pytest.fixture(scope="module")
def folder(model, utterances, tmp_path_factory):
    """Maps of the tiny model with few masks, of two recordings in two directions."""
    folder = tmp_path_factory.mktemp("maps")
    occlusion = Occlusion(40, 40, precision="float32", estimator="mean", partition="superpixels", reliability=1.0)
    explain_corpus(model, utterances, folder, translate_to=["en", "it"], occlusion=occlusion, progress=False)
    return folder


def test_deletion_and_insertion_are_measured_together(model, folder):
    maps = list(load_maps(folder, "tiny", "en"))
    pairs = [("SM^X", "CA")]
    points, table = summaries.faithfulness(model, folder, "tiny/en", ["CA", "SM^X"], METRICS, pairs, step=50)
    assert set(table.metric) == {f"{test}, {each}" for test in ("deletion", "insertion") for each in METRICS}
    assert sorted(set(points.metric)) == ["deletion, corpus-capped WER", "insertion, corpus-capped WER"]
    assert points.groupby("metric").size().tolist() == [6, 6] and set(points.percent) == {0, 50, 100}
    score = points.set_index(["metric", "map", "percent"]).score
    whole = min(100, wer([item.reference for item in maps], [item.hypothesis for item in maps], "en"))
    deletion, insertion = sorted(set(points.metric))
    for kind in ("CA", "SM^X"):
        assert score[deletion, kind, 0] == score[insertion, kind, 100] == pytest.approx(whole)
        assert score[deletion, kind, 100] == score[insertion, kind, 0]  # nothing is left of the input
        for metric in (deletion, insertion):
            first, middle, last = score[metric, kind]
            own = table[(table["map"] == kind) & (table.metric == metric) & (table.minus == "")]
            assert own.area.item() == pytest.approx((first + 2 * middle + last) / 4)
            assert own.n.item() == 2 and own.reliability.isna().item() == (kind == "CA")
    areas = table.set_index(["metric", "map", "minus"]).area
    assert areas[insertion, "SM^X", "CA"] == pytest.approx(areas[insertion, "SM^X", ""] - areas[insertion, "CA", ""])


def test_quality_of_explanations_depends_on_the_task(model, folder):
    found = summaries.explanation_quality(folder, "tiny/en", model, 50)
    expected = [f"{test}, {each}" for test in ("deletion", "insertion") for each in METRICS]
    assert found.metric.tolist() == [*expected, "size"]
    assert set(found.model) == {"tiny"} and set(found.direction) == {"en"} and set(found.estimator) == {"mean"}
    translated = summaries.explanation_quality(folder, "tiny/en-it", model, 50)
    assert translated.metric.tolist() == ["deletion, BLEU", "insertion, BLEU", "size"]
    alone = summaries.explanation_quality(folder, "tiny/en", None, 50)
    assert alone.metric.tolist() == ["size"]
    assert alone.value.item() == found.value.iloc[-1] and 0 < alone.value.item() < 100
    joined = summaries.quality([], [found, translated])
    columns = ["model", "direction", "estimator", "metric", "value", "low", "high", "reliability", "n"]
    assert joined.columns.tolist() == columns and len(joined) == 8


def reduction_values():
    """rho of three utterances for each reduction, as `reductions` needs it."""
    values = {name: np.array([0.5, 0.7, 0.75]) - 0.1 * number for number, name in enumerate(REDUCTIONS)}
    return values, {name: correlations(overall=found) for name, found in values.items()}


def test_reductions_are_compared_with_the_paper_s_choice():
    values, rho = reduction_values()
    rho["1d_max_1d_avg"]["reliability"] = rho["1d_max_1d_avg"].reliability * 0 + 0.6
    table = summaries.reductions(rho)
    columns = ["reduction", "minus", "quantity", "value", "low", "high", "reliability", "n"]
    assert table.columns.tolist() == [*columns, "model", "direction", "estimator"]
    assert set(table.model + table.direction + table.estimator) == {"baseenmean"} and set(table.n) == {3}
    found = table.set_index(["quantity", "reduction", "minus"])
    for name in REDUCTIONS:
        assert tuple(found.loc["rho", name, ""][["value", "low", "high"]]) == pytest.approx(student(values[name]))
        reported = found.loc["reported", name, ""][["value", "low", "high"]]
        assert tuple(reported) == pytest.approx(student(values[name] / 0.9))
    differences = table[table.minus != ""]
    assert differences.quantity.tolist() == ["reported", "reported"]  # noise lowers the measured ones unequally
    assert differences.minus.tolist() == [*REDUCTIONS[1:]]
    np.testing.assert_allclose(differences[["value", "low", "high"]], [[0.1 / 0.9] * 3, [0.2 / 0.9] * 3])
    np.testing.assert_allclose(differences.reliability, [0.8, 0.6])
    text = summaries.arranged_reductions(table)
    assert text.index.tolist() == [*REDUCTIONS]
    assert text.columns.tolist() == ["rho", "reported", "reliability", "n", "paper"]
    assert text.rho.iloc[0] == "0.65 (0.32 to 0.98)" and text.reported.iloc[0] == "0.72 (0.36 to 1.09)"
    assert text.reliability.tolist() == ["0.80", "0.80", "0.60"]
    found = summaries.differences(table, "value", 1)
    assert found.difference.tolist() == ["0.1 (0.1 to 0.1)", "0.2 (0.2 to 0.2)"]


def test_noisy_reductions_have_no_reported_value():
    _, rho = reduction_values()
    rho["2d_avg"]["reliability"] = rho["2d_avg"].reliability * 0 + 0.49
    table = summaries.reductions(rho)
    unknown = table[table.value.isna()]
    assert unknown[["quantity", "reduction", "minus"]].values.tolist() == [
        *(["reported", "2d_avg", ""], ["reported", "2d_max", "2d_avg"]),
    ]
    text = summaries.arranged_reductions(table)
    assert text.reported.tolist()[1] == "too noisy" and text.rho.tolist()[1].startswith("0.55 (")
    assert text.reported.tolist()[2].startswith("0.50 (")
    assert summaries.differences(table, "value", 1).difference.tolist() == ["too noisy", "0.2 (0.2 to 0.2)"]


def test_reductions_can_have_areas():
    _, rho = reduction_values()
    rows = [
        (f"SM^X {a}", f"SM^X {b}" if b else "", f"{test}, corpus-capped WER", area, reliability)
        for test, area in (("deletion", 70.0), ("insertion", 30.0))
        for a, b, reliability in (
            *((name, "", 0.8 if name != "2d_avg" else 0.3) for name in REDUCTIONS),
            *(("2d_max", "2d_avg", 0.3), ("2d_max", "1d_max_1d_avg", 0.8)),
        )
    ]
    areas = pd.DataFrame(rows, columns=["map", "minus", "metric", "area", "reliability"])
    table = summaries.reductions(rho, areas.assign(low=areas.area - 5, high=areas.area + 5, n=3))
    assert len(table) == 10 + 3 + 3 + 2
    found = table.set_index(["quantity", "reduction", "minus"]).value
    assert found["deletion", "2d_max", ""] == 70.0 and found["insertion", "2d_max", "1d_max_1d_avg"] == 30.0
    text = summaries.arranged_reductions(table)
    assert text.columns.tolist()[:4] == ["deletion", "insertion", "rho", "reported"]
    assert text.deletion.tolist() == ["70.00 (65.00 to 75.00)", "too noisy", "70.00 (65.00 to 75.00)"]
    found = summaries.differences(table, "value", 0).query("quantity == 'insertion'")
    assert found.difference.tolist() == ["too noisy", "30 (25 to 35)"]


def heads_and_layers():
    """rho of four utterances, three layers and two heads; the last layer and the first head are best."""
    rng = np.random.default_rng(0)
    values = {
        "by_layer_and_head": np.array([[0.1, 0.0], [0.2, 0.1], [0.3, 0.2]]) + rng.normal(0, 0.01, (4, 3, 2)),
        "by_layer": np.array([0.2, 0.3, 0.5]) + rng.normal(0, 0.01, (4, 3)),
        "by_head": np.array([0.3, 0.2]) + rng.normal(0, 0.01, (4, 2)),
        "overall": np.array([0.4, 0.42, 0.41, 0.39]),
    }
    return values, correlations(**values)


def test_aggregates_are_compared_with_single_heads():
    values, rho = heads_and_layers()
    found = summaries.single_heads_and_averages(rho)
    assert found.index.tolist() == ["rho(CA, SM^X)"]
    heads, layers = values["by_layer_and_head"], values["by_layer"]
    expected = {
        "single heads, mean": heads.mean(axis=(1, 2)),
        "best single head": heads[:, 2, 0],
        "layer averages, mean": layers.mean(axis=1),
        "best layer average": layers[:, 2],
        "average of everything": values["overall"],
    }
    assert found.iloc[0].to_dict() == {name: text(each / 0.9, 3) for name, each in expected.items()}
    best = summaries.best_aggregate(rho, pd.DataFrame({"value": [0.588]})).iloc[0]
    assert best["ours, without noise"] == text(layers[:, 2] / 0.9, 3)
    assert (best["ours, measured"], best.reliability) == (round(layers[:, 2].mean(), 3), 0.8)
    assert (best.chosen, best.paper) == ("layer 3", 0.588)
    assert summaries.best_aggregate(rho, pd.DataFrame({"value": []})).paper.iloc[0] is None


def test_the_best_aggregate_is_chosen_on_other_utterances():
    """One utterance makes the first layer the best on average; it is chosen for the other half, but not for its own."""
    layers = np.array([[0.9, 0.3], [0.25, 0.3], [0.25, 0.3], [0.25, 0.3]])
    rho = correlations(by_layer=layers, by_head=np.zeros((4, 1)), overall=np.zeros(4))
    best = summaries.best_aggregate(rho, pd.DataFrame({"value": []})).iloc[0]
    assert best.chosen == "layer 1"
    assert best["ours, measured"] == round((2 * 0.3 + 2 * 0.25) / 4, 3)


def test_aggregates_of_noisy_maps_are_too_noisy():
    _, rho = heads_and_layers()
    rho["reliability"] = rho.reliability * 0 + 0.49
    assert set(summaries.single_heads_and_averages(rho).iloc[0]) == {"too noisy"}
    best = summaries.best_aggregate(rho, pd.DataFrame({"value": []})).iloc[0]
    assert best["ours, without noise"] == "too noisy" and best["ours, measured"] > 0.4


def test_heads_are_arranged_in_a_grid():
    rho = {(1, 1): 0.1, (1, 2): 0.3, (1, MEAN): 0.35, (MEAN, 1): 0.2, (MEAN, 2): 0.4, (MEAN, MEAN): 0.3}
    table = pd.DataFrame([row(layer=layer, head=head, rho=value) for (layer, head), value in rho.items()])
    found = summaries.arranged_heads(table)
    assert found.index.tolist() == [1, MEAN] and found.columns.tolist() == ["head 1", "head 2", "head mean"]
    assert found.loc[MEAN, "head 2"] == "0.50 (0.10 to 0.90)"
    assert summaries.arranged_heads(table.assign(**NOISY)).loc[MEAN, "head 2"] == "too noisy (rho 0.40)"


def test_averages_over_heads_are_those_of_the_whole_table():
    _, rho = heads_and_layers()
    found = summaries.layer_averages({"base/en": rho, "base/it": rho.assign_attrs(setting="it")})
    whole = correlation_table(rho)
    whole = whole[whole["head"] == MEAN].drop(columns="head").reset_index(drop=True)
    pd.testing.assert_frame_equal(found[found.direction == "en"], whole)
    assert len(found) == 2 * len(whole) and set(found.direction) == {"en", "it"}


def test_layers_are_arranged_beside_the_paper_s_best():
    values, rho = heads_and_layers()
    table = summaries.layer_averages({"base/en": rho}).drop(columns="saliency")
    wide = summaries.arranged_layers(table, {"base/en": rho})
    extra = ["mean, measured", "reliability", "best, ours", "best, paper", "n"]
    assert wide.index.tolist() == [1, 2, 3, MEAN, *extra]
    expected = [text(each / 0.9, 2) for each in (*values["by_layer"].T, values["overall"])]
    expected += [text(values["overall"], 2), "0.80", text(values["by_layer"][:, 2] / 0.9, 2), "0.588", "4"]
    assert wide["base", "en"].tolist() == expected
    rho["reliability"] = rho.reliability * 0 + 0.3
    noisy = summaries.layer_averages({"base/en": rho}).drop(columns="saliency")
    column = summaries.arranged_layers(noisy, {"base/en": rho})["base", "en"]
    assert column[1].startswith("too noisy (rho 0.") and column["best, ours"] == "too noisy"
    assert column["mean, measured"] == expected[4] and column["reliability"] == "0.30"


def test_mixing_is_arranged_with_and_without_noise():
    rows = [row("input", rho=0.4), row("encoder", rho=0.6), row("difference", rho=0.2, reported=0.25)]
    wide = summaries.arranged_mixing(pd.DataFrame(rows), ["base/en"])
    ours = wide.loc["base", "en"]
    assert ours["rho(CA, SM^X)"] == "0.500 (0.100 to 0.900)" and ours["difference"] == "0.250 (0.100 to 0.900)"
    assert ours.share == "33.3%" and ours["rho(CA, SM^X), measured"] == "0.400 (0.300 to 0.500)"
    assert ours.reliabilities == "0.80 / 0.80" and ours.n == "2"
    assert wide.loc[("paper, range", ""), "difference"] == "0.03 to 0.18"
    rows = [row("input", rho=0.4, **NOISY), row("encoder", rho=0.6), row("difference", rho=0.2, **NOISY)]
    ours = summaries.arranged_mixing(pd.DataFrame(rows), ["base/en"]).loc["base", "en"]
    assert (ours["rho(CA, SM^X)"], ours["difference"]) == ("too noisy (rho 0.400)", "too noisy")
    assert ours["rho(CA, SM^H)"] == "0.750 (0.100 to 0.900)" and ours.share == ""
    assert ours.reliabilities == "0.40 / 0.80"


def test_quality_stands_beside_the_paper_s_values():
    common = {"model": "small", "direction": "en-it", "low": np.nan, "high": np.nan, "n": 100}
    rows = [("BLEU", 60.0, np.nan), ("deletion, BLEU", 30.0, 0.3), ("size", 40.0, 0.9)]
    table = pd.DataFrame(rows, columns=["metric", "value", "reliability"]).assign(**common)
    text = summaries.arranged_quality(table).set_index("metric")
    expected = {"BLEU": "60.0", "deletion, BLEU": "30.0 (too noisy)", "size": "40.0", "COMET": np.nan}
    assert text.ours.to_dict() == pytest.approx(expected, nan_ok=True)
    assert text.paper["COMET"] == "0.854" and text.n["size"] == "100"
    assert summaries.arranged_quality(table[table.metric == "size"]).metric.tolist() == ["size"]


def test_titles_of_metrics_say_which_side_is_better():
    lower = ["WER", "size", "deletion, BLEU", "insertion, corpus-capped WER", "insertion, utterance-capped WER"]
    higher = ["BLEU", "chrF", "COMET", "insertion, BLEU"]
    higher += ["deletion, corpus-capped WER", "deletion, utterance-capped WER"]
    titles = summaries.metric_titles(pd.DataFrame({"metric": [*lower, *higher]}))
    assert titles["size"] == "size (%)\nlower is better" and titles["BLEU"] == "BLEU\nhigher is better"
    assert titles["insertion, corpus-capped WER"] == "insertion, corpus-capped WER (%)\nlower is better"
    assert [name for name, title in titles.items() if title.endswith("lower is better")] == lower


def test_deletion_areas_have_the_paper_s_values_if_there_are_any():
    rows = [
        (name, "", f"{test}, WER", area, reliability)
        for test in ("deletion", "insertion")
        for name, area, reliability in (("CA", 40.0, np.nan), ("SM^H", 50.0, 0.45))
    ]
    areas = pd.DataFrame(rows, columns=["map", "minus", "metric", "area", "reliability"])
    areas = areas.assign(low=30.0, high=60.0, n=2)
    found = summaries.arranged_deletion(areas, ["SM^H", "CA"], "base/en")
    assert found.columns.tolist() == ["deletion, WER", "insertion, WER", "reliability", "n", "paper"]
    assert found["insertion, WER"].tolist() == ["50.0 (30.0 to 60.0) (too noisy)", "40.0 (30.0 to 60.0)"]
    assert found.paper.tolist() == ["", "41.2"] and found.reliability.tolist() == ["0.45", ""]
    assert summaries.arranged_deletion(areas, ["CA"], "other/en").paper.tolist() == [""]


def convergence_rows():
    """Two utterances, one reference map and two blocks of masks of two estimators; one block has no limit."""
    columns = ["utterance", "saliency", "linear", "estimator", "masks", "block"]
    columns, rows = [*columns, "r", "everything", "half", "reliability"], []
    for utterance, shift in (("a", 0.0), ("b", 0.1)):
        for saliency, linear in (("input", False), ("encoder", True)):
            rows.append((utterance, saliency, linear, "mean", 400, 0, 1.0, 0.5 + shift, 0.45 + shift, 0.9))
            for estimator, block, lost in (("mean", 0, 0.1), ("mean", 1, 0.3), ("ridge", 0, 0.05)):
                value = 0.4 + shift - (estimator == "ridge") / 10
                rows.append((utterance, saliency, linear, estimator, 100, block, 0.8 + shift, value, value - lost, 0.6))
    return pd.DataFrame(rows, columns=columns).assign(condition="base/en")


def test_few_masks_are_compared_with_the_reported_value_of_all():
    table = estimators.convergence_table(convergence_rows())
    assert set(table.masks) == {100} and set(table.n) == {1, 2}
    found = table.set_index(["saliency", "estimator", "quantity"])
    assert found.value["input", "mean", "r"] == pytest.approx(0.85)
    assert found.value["input", "mean", "reliability"] == pytest.approx(0.6)
    for saliency, power in (("input", 1), ("encoder", 2)):

        def limit(everything, half, power=power):
            return (2 * everything**-power - half**-power) ** (-1 / power)

        reference = limit(0.55, 0.50)  # means over utterances
        assert found.value[saliency, "mean", "measured"] == pytest.approx(0.45 - reference)
        # Block 1 loses so much that it has no limit for either map: 0.45 / 0.15 is 3.
        assert found.value[saliency, "mean", "reported"] == pytest.approx(limit(0.45, 0.35) - reference)
        assert found.n[saliency, "mean", "reported"] == 1 and np.isnan(found.spread[saliency, "mean", "reported"])
        assert found.value[saliency, "ridge", "reported"] == pytest.approx(limit(0.35, 0.30) - reference)
        assert found.n[saliency, "mean", "measured"] == 2 and found.spread[saliency, "mean", "measured"] == 0
    columns = ["condition", "saliency", "estimator", "masks", "quantity", "value", "spread", "low", "high", "n"]
    assert table.columns.tolist() == columns


def test_spread_and_interval_are_those_of_blocks():
    rows = convergence_rows()
    rows.loc[rows.block == 1, "r"] -= 0.2
    found = (
        estimators.convergence_table(rows).set_index(["saliency", "estimator", "quantity"]).loc["input", "mean", "r"]
    )
    assert (found.value, found.low, found.high) == pytest.approx(student([0.85, 0.65]))
    assert found.spread == pytest.approx(np.std([0.85, 0.65], ddof=1))


def test_convergence_is_arranged_by_estimator():
    text = estimators.arranged_convergence(estimators.convergence_table(convergence_rows()))
    assert text.index.names == ["condition", "saliency", "masks"] and len(text) == 2
    assert text["r", "mean"]["base/en", "input", 100] == "0.850 ± 0.000"
    assert [*text.columns.unique(0)] == ["r", "measured", "reported"]
    rows = convergence_rows()
    rows.loc[rows.masks == 400, "half"] = 0.1  # the reference has no limit
    assert [*estimators.arranged_convergence(estimators.convergence_table(rows)).columns.unique(0)] == ["r"]


def test_the_first_conditions_of_models():
    assert estimators.first_of_models(["base/en", "small/it", "small/en", "large/en"], 2) == ["base/en", "small/it"]


def test_an_utterance_is_chosen_by_length_or_name(folder):
    lengths = {item.utterance: item.sizes["token"] for item in load_maps(folder, "tiny", "en")}
    median = sorted(lengths.items(), key=lambda each: each[::-1])[len(lengths) // 2][0]
    assert summaries.median_utterance(folder, "tiny/en").utterance == median
    assert summaries.utterance_of(folder, "tiny/en", "en-test-0").utterance == "en-test-0"
    with pytest.raises(ValueError, match=r"There are no maps of the utterance it-0 in .* for tiny/en: choose another"):
        summaries.utterance_of(folder, "tiny/en", "it-0")
