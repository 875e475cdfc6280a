"""Deletion, insertion and size against cases worked out by hand; the reference's own numbers are in test_golden.py."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import counted, halves_by_hand
from scipy import stats
from scipy.integrate import trapezoid

from xattn import store
from xattn.analysis.correlation import normalised_saliency
from xattn.analysis.faithfulness import (
    METRICS,
    area,
    areas,
    deletion_curves,
    masked_inputs,
    percentages,
    ranking,
    sentence_maps,
    sentence_reliability,
    size,
    sizes,
)
from xattn.explain import Occlusion, explain

PERCENT = percentages()


def test_percentages_are_steps_of_a_divisor_of_100():
    assert PERCENT.tolist() == [*range(0, 101, 5)]
    assert percentages(20).tolist() == [0, 20, 40, 60, 80, 100] and percentages(100).tolist() == [0, 100]
    for step in (0, -5, 3, 101):
        with pytest.raises(ValueError, match=f"step of a deletion curve is {step}: give a whole number that divides"):
            percentages(step)


def test_equal_cells_rank_by_position():
    assert ranking(np.array([[2.0, 1.0], [1.0, 3.0]])).tolist() == [1, 2, 0, 3]


def test_deletion_removes_the_top_cells_and_insertion_keeps_them():
    features = torch.arange(1.0, 21.0).view(4, 5)
    order = ranking(features.numpy())
    deleted, inserted = masked_inputs(features, order), masked_inputs(features, order, insertion=True)
    for row, percent in enumerate(PERCENT):
        k = 20 * percent // 100
        top = features > 20 - k
        assert torch.equal(deleted[row] == 0, top)
        assert torch.equal(inserted[row] == 0, ~top)
    assert torch.equal(features, torch.arange(1.0, 21.0).view(4, 5))
    assert torch.equal(masked_inputs(features, order, step=20), deleted[::4])


def test_areas_of_known_curves():
    assert area(np.full(21, 100.0), PERCENT) == pytest.approx(100.0)
    assert area(PERCENT.astype(float), PERCENT) == pytest.approx(50.0)
    assert area([0.0, 100.0, 100.0], percentages(50)) == pytest.approx(75.0)


def test_the_two_caps_differ_for_an_output_that_is_too_long():
    references, hypotheses = ["a b", "c d"], ["a b", "x x x x x x"]
    assert METRICS["corpus-capped WER"](references, hypotheses) == 100.0  # 6 edits, 4 words
    assert METRICS["utterance-capped WER"](references, hypotheses) == 50.0
    assert METRICS["corpus-capped WER"](["", "a"], ["x", "a"]) == 100.0
    assert METRICS["corpus-capped WER"]([""], [""]) == 0.0


def curves_of(broken_from, percent=PERCENT, reliability=None):
    """Curves of outputs that are right below a percentage and wrong from it on: {map: a percentage per utterance}."""
    rows = []
    for kind, points in broken_from.items():
        for utterance, point in enumerate(points):
            for each in percent:
                text = "one two" if each < point else "nine ten"
                known = (reliability or {}).get(kind, [np.nan] * len(points))[utterance]
                rows.append((f"u{utterance}", kind, known, int(each), "One, two.", text))
    return pd.DataFrame(rows, columns=["utterance", "map", "reliability", "percent", "reference", "hypothesis"])


def test_every_map_gets_an_area_with_its_interval():
    curves = curves_of({"early": [10] * 4, "late": [90] * 4})
    points, summary = areas(curves, "corpus-capped WER", "it", [("early", "late")])
    assert (summary.low == summary.high).all() and (summary.n == 4).all()
    single, (difference,) = summary[summary.minus == ""], summary[summary.minus != ""].itertuples()
    assert (difference.map, difference.minus, difference.area) == ("early", "late", pytest.approx(80.0))
    found = single.set_index("map").area
    assert found["early"] == pytest.approx(92.5)  # 0 at 5 %, 100 from 10 % on
    assert found["late"] == pytest.approx(12.5)
    assert points.query("map == 'early' and percent == 5").score.item() == 0.0
    assert points.query("map == 'early' and percent == 10").score.item() == 100.0


def test_areas_have_the_jackknife_interval_of_their_utterances():
    levels = (0, 40, 80)  # hard and easy utterances, one map 5 % ahead in each
    curves = curves_of({name: [level + 5 * lead for level in levels] for name, lead in (("ahead", 1), ("behind", 2))})
    _, summary = areas(curves, "corpus-capped WER", "it", [("ahead", "behind")])
    ahead, behind, difference = summary.itertuples()
    for row, lead in ((ahead, 5), (behind, 10)):  # with words of equal number, the area is a mean over utterances
        own = [trapezoid(np.where(level + lead > PERCENT, 0, 100), PERCENT) / 100 for level in levels]
        expected = stats.ttest_1samp(own, 0).confidence_interval()
        assert (row.low, row.area, row.high) == pytest.approx((expected.low, np.mean(own), expected.high))
        assert row.high - row.low > 150
    assert difference.area == pytest.approx(ahead.area - behind.area) == pytest.approx(5.0)
    assert difference.low == pytest.approx(5.0) == pytest.approx(difference.high)


def test_areas_of_coarser_curves():
    points, summary = areas(curves_of({"early": [10, 60]}, percentages(50)), "corpus-capped WER", "it")
    assert points.percent.tolist() == [0, 50, 100] and points.score.tolist() == [0, 50, 100]
    assert summary.area.item() == pytest.approx(50.0)


def test_the_reliability_of_a_difference_is_that_of_the_noisier_map():
    reliability = {"SM^X": [0.2, 0.6], "SM^H": [0.9, 0.7], "CA": [np.nan, np.nan]}
    curves = curves_of(dict.fromkeys(reliability, [10, 20]), reliability=reliability)
    pairs = [("SM^H", "SM^X"), ("CA", "SM^H"), ("CA", "CA")]
    _, summary = areas(curves, "corpus-capped WER", "it", pairs)
    found = {(row.map, row.minus): row.reliability for row in summary.itertuples()}
    expected = {("SM^X", ""): 0.4, ("SM^H", ""): 0.8, ("CA", ""): np.nan}
    expected |= dict(zip(pairs, (0.4, 0.8, np.nan), strict=True))
    assert found == pytest.approx(expected, nan_ok=True)


def test_sentence_maps_of_every_kind(made):
    maps = made.maps()
    kinds = ["CA", "SM^X", "SM^X 2d_max", "SM^X 2d_avg", "SM^H", "energy", "energy steps", "random", "random steps"]
    found = sentence_maps(maps, kinds)
    assert list(found) == kinds
    shape = (maps.sizes["time"], maps.sizes["mel"])
    assert {sentence.shape for sentence in found.values()} == {shape}
    assert np.array_equal(found["energy"], maps.features.values)
    louder = [maps.features.values[4 * step : 4 * step + 4].mean() for step in range(5)]
    np.testing.assert_allclose(found["energy steps"][:20:4, 0], louder, rtol=1e-6)
    for kind in ("CA", "SM^H", "SM^X 2d_max", "energy steps", "random steps"):
        assert (np.ptp(found[kind], axis=1) == 0).all()  # the same for all bands
    for kind in ("random", "random steps"):
        assert np.array_equal(found[kind], sentence_maps(maps, [kind])[kind])
    assert len(np.unique(found["random steps"])) == maps.sizes["step"]
    with pytest.raises(ValueError, match="There is no map 'loud': choose CA, SM"):
        sentence_maps(maps, ["loud"])


def sentence_by_hand(saliency):
    """The mean over tokens of maps that are scaled to 0..1."""
    flat = saliency.reshape(len(saliency), -1)
    low, high = flat.min(axis=1, keepdims=True), flat.max(axis=1, keepdims=True)
    return ((flat - low) / (high - low)).mean(axis=0)


@pytest.mark.parametrize("kind", ["SM^X", "SM^X 2d_max", "SM^X 2d_avg", "SM^H"])
@pytest.mark.parametrize("estimator", ["mean", "sqrt_ridge"])
def test_sentence_maps_have_the_reliability_of_their_halves(made, estimator, kind):
    maps = made.scored(estimator=estimator).drop_sel(token="</s>")  # which a comparison by steps would drop
    halves = halves_by_hand(maps, "encoder" if kind == "SM^H" else "input")
    if kind.partition(" ")[2]:
        halves = (normalised_saliency(half, maps, kind.partition(" ")[2]) for half in halves)
    r = np.corrcoef(*(sentence_by_hand(half.values) for half in halves))[0, 1]
    assert sentence_reliability(maps, kind) == pytest.approx(2 * r / (1 + r), abs=1e-5)


def test_maps_without_masks_or_scores_have_no_reliability(made):
    for kind in ("CA", "energy", "random", "energy steps", "random steps"):
        assert np.isnan(sentence_reliability(made.scored(), kind))
    for kind in ("SM^X", "SM^X 2d_max", "SM^H"):
        assert np.isnan(sentence_reliability(made.maps(), kind))


def test_outputs_are_decoded_once(model, utterances, tmp_path, monkeypatch):
    occlusion = Occlusion(input_masks=6, encoder_masks=6)
    maps = explain(model, utterances[0], occlusion=occlusion, progress=False).assign_attrs({store.KEY: "k"})
    curves = deletion_curves(model, [maps], ["CA", "SM^H"], tmp_path)
    assert curves.percent.tolist() == [*PERCENT] * 2 and set(curves.reference) == {"the dog sleeps"}
    whole = curves[curves.percent == 0].hypothesis
    assert (whole == maps.hypothesis).all()
    reliability = [np.nan] * 21 + [sentence_reliability(maps, "SM^H")] * 21
    assert curves.reliability.tolist() == pytest.approx(reliability, nan_ok=True) and np.isfinite(reliability[-1])
    monkeypatch.setattr(type(model), "generate", lambda *_: pytest.fail("decoded again"))
    pd.testing.assert_frame_equal(deletion_curves(model, [maps], ["CA", "SM^H"], tmp_path), curves)


@pytest.mark.parametrize("insertion", [False, True])
def test_curves_are_the_outputs_of_the_masked_inputs(model, utterances, tmp_path, insertion, monkeypatch):
    occlusion = Occlusion(input_masks=6, encoder_masks=6)
    maps = explain(model, utterances[0], occlusion=occlusion, progress=False).assign_attrs({store.KEY: "k"})
    calls = counted(model, monkeypatch, "generate")
    curves = deletion_curves(model, [maps], ["SM^X", "CA"], tmp_path, insertion)
    assert calls == [1, 19, 19]  # all maps share the input without cells, and the stored hypothesis is that with all
    features, texts = torch.from_numpy(maps.features.values), curves.groupby("map").hypothesis.apply(list)
    for kind, sentence in sentence_maps(maps, ["SM^X", "CA"]).items():
        inputs = masked_inputs(features, ranking(sentence), insertion)
        expected = [model.text(model.generate(each[None], "en")[0]) for each in inputs]
        assert texts[kind] == expected and len(set(expected)) > 2


def test_curves_can_be_coarser(model, utterances, tmp_path):
    occlusion = Occlusion(input_masks=6, encoder_masks=6)
    maps = explain(model, utterances[0], occlusion=occlusion, progress=False).assign_attrs({store.KEY: "k"})
    coarse, fine = (deletion_curves(model, [maps], ["CA"], tmp_path, step=step) for step in (50, 25))
    assert coarse.percent.tolist() == [0, 50, 100] and fine.percent.tolist() == [0, 25, 50, 75, 100]
    assert fine.hypothesis[::2].tolist() == coarse.hypothesis.tolist()


def test_maps_without_a_reference_cannot_be_deleted(model, utterances, tmp_path, monkeypatch):
    bare = replace(utterances[0], target_language="de")
    occlusion = Occlusion(input_masks=6, encoder_masks=6)
    maps = explain(model, bare, translate_to="it", occlusion=occlusion, progress=False).assign_attrs({store.KEY: "k"})
    monkeypatch.setattr(type(model), "generate", lambda *_: pytest.fail("decoded for nothing"))
    with pytest.raises(ValueError, match=r"^en-test-0 has no reference for 'en-it': add it to the corpus first\.$"):
        deletion_curves(model, [maps], ["CA"], tmp_path)


def test_size_of_known_maps(made):
    _, half = size(np.array([[0.0, 1.0]]))
    assert half == pytest.approx(51.25)  # every cell at threshold 0, half of them from 0.05 to 1
    table = sizes([made.maps(), made.maps(seed=1, utterance="made-2")])
    assert table.metric.tolist() == ["size"] and table.n.item() == 2
    assert 0 < table.low.item() <= table.value.item() <= table.high.item() < 100
