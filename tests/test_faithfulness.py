"""Deletion, insertion and size against cases worked out by hand; the reference's own numbers are in test_golden.py."""

import numpy as np
import pandas as pd
import pytest
import torch

from xattn import store
from xattn.analysis.faithfulness import (
    METRICS,
    PERCENT,
    area,
    areas,
    deletion_curves,
    masked_inputs,
    ranking,
    sentence_maps,
    size,
    sizes,
)
from xattn.explain import Occlusion, explain


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


def test_areas_of_known_curves():
    assert area(np.full(21, 100.0)) == pytest.approx(100.0)
    assert area(PERCENT.astype(float)) == pytest.approx(50.0)


def test_the_two_caps_differ_for_an_output_that_is_too_long():
    references, hypotheses = ["a b", "c d"], ["a b", "x x x x x x"]
    assert METRICS["corpus-capped WER"](references, hypotheses) == 100.0  # 6 edits, 4 words
    assert METRICS["utterance-capped WER"](references, hypotheses) == 50.0
    assert METRICS["corpus-capped WER"](["", "a"], ["x", "a"]) == 100.0
    assert METRICS["corpus-capped WER"]([""], [""]) == 0.0


def test_every_map_gets_an_area_with_its_interval():
    rows = []
    for utterance in range(4):
        for kind, broken_from in (("early", 10), ("late", 90)):
            for percent in PERCENT:
                text = "one two" if percent < broken_from else "nine ten"
                rows.append((f"u{utterance}", kind, int(percent), "One, two.", text))
    curves = pd.DataFrame(rows, columns=["utterance", "map", "percent", "reference", "hypothesis"])
    points, summary = areas(curves, "corpus-capped WER", "it", [("early", "late")])
    assert (summary.low == summary.high).all() and (summary.n == 4).all()
    single, (difference,) = summary[summary.minus == ""], summary[summary.minus != ""].itertuples()
    assert (difference.map, difference.minus, difference.area) == ("early", "late", pytest.approx(80.0))
    found = single.set_index("map").area
    assert found["early"] == pytest.approx(92.5)  # 0 at 5 %, 100 from 10 % on
    assert found["late"] == pytest.approx(12.5)
    assert points.query("map == 'early' and percent == 5").score.item() == 0.0
    assert points.query("map == 'early' and percent == 10").score.item() == 100.0


def test_areas_are_subtracted_within_the_same_resamples():
    rows = []
    for utterance, level in enumerate((0, 40, 80)):  # hard and easy utterances, one map 5 % ahead in each
        for kind, broken_from in (("ahead", level + 5), ("behind", level + 10)):
            for percent in PERCENT:
                text = "one two" if percent < broken_from else "nine ten"
                rows.append((f"u{utterance}", kind, int(percent), "one two", text))
    curves = pd.DataFrame(rows, columns=["utterance", "map", "percent", "reference", "hypothesis"])
    _, summary = areas(curves, "corpus-capped WER", "it", [("ahead", "behind")])
    ahead, behind, difference = summary.itertuples()
    assert ahead.high - ahead.low > 30 and behind.high - behind.low > 30
    assert difference.area == pytest.approx(ahead.area - behind.area) == pytest.approx(5.0)
    assert difference.low == pytest.approx(5.0) == pytest.approx(difference.high)


def test_sentence_maps_of_every_kind(made):
    maps = made.maps()
    kinds = ["CA", "SM^X", "SM^X 2d_max", "SM^X 2d_avg", "SM^H", "energy", "random", "random steps"]
    found = sentence_maps(maps, kinds)
    assert list(found) == kinds
    shape = (maps.sizes["time"], maps.sizes["mel"])
    assert {sentence.shape for sentence in found.values()} == {shape}
    assert np.array_equal(found["energy"], maps.features.values)
    for kind in ("CA", "SM^H", "SM^X 2d_max", "random steps"):
        assert (np.ptp(found[kind], axis=1) == 0).all()  # the same for all bands
    for kind in ("random", "random steps"):
        assert np.array_equal(found[kind], sentence_maps(maps, [kind])[kind])
    assert len(np.unique(found["random steps"])) == maps.sizes["step"]
    with pytest.raises(ValueError, match="There is no map 'loud': choose CA, SM"):
        sentence_maps(maps, ["loud"])


def test_outputs_are_decoded_once(model, utterances, tmp_path, monkeypatch):
    occlusion = Occlusion(input_masks=6, encoder_masks=6)
    maps = explain(model, utterances[0], occlusion=occlusion, progress=False).assign_attrs({store.KEY: "k"})
    curves = deletion_curves(model, [maps], ["CA", "random"], tmp_path)
    assert len(curves) == 2 * len(PERCENT)
    whole = curves[curves.percent == 0].hypothesis
    assert (whole == maps.hypothesis).all()
    monkeypatch.setattr(type(model), "generate", lambda *_: pytest.fail("decoded again"))
    pd.testing.assert_frame_equal(deletion_curves(model, [maps], ["CA", "random"], tmp_path), curves)


def test_size_of_known_maps(made):
    _, half = size(np.array([[0.0, 1.0]]))
    assert half == pytest.approx(51.25)  # every cell at threshold 0, half of them from 0.05 to 1
    table = sizes([made.maps(), made.maps(seed=1, utterance="made-2")])
    assert table.metric.tolist() == ["size"] and table.n.item() == 2
    assert 0 < table.low.item() <= table.value.item() <= table.high.item() < 100
