"""Partitions of the input compared, on maps of the tiny model with few masks."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from reproduction import partitions
from reproduction.conditions import correlate_conditions
from xattn import Occlusion, explain_corpus, load_maps
from xattn.analysis.faithfulness import areas, deletion_curves
from xattn.analysis.reliability import half_maps, split_half_reliability
from xattn.attribution.segments import slic_pyramid
from xattn.maps import drop_special_tokens, frames_of_steps, masks_of, reduce_to_steps

CONDITION = "tiny/en"
MASKS = 120


@pytest.fixture(scope="module")
def folders(model, utterances, tmp_path_factory):
    found = {kind: tmp_path_factory.mktemp(kind) for kind in ("superpixels", "windows")}
    for kind, folder in found.items():
        occlusion = Occlusion(
            MASKS, 12, precision="float32", estimator="mean", partition=kind, reliability=1.0, encoder_p=0.7
        )
        explain_corpus(model, utterances, folder, occlusion=occlusion, progress=False)
    return found


@pytest.fixture(scope="module")
def table(model, utterances, folders):
    return partitions.compare_partitions(model, folders, CONDITION, utterances, 50)


def test_rows_of_the_comparison(table):
    columns = ["partition", "minus", "quantity", "value", "low", "high", "reliability", "n"]
    assert table.columns.tolist() == columns and set(table.n) == {2}
    own = ["rho", "reported"]
    tests = [f"{test}, {kind}" for test in ("deletion", "insertion") for kind in partitions.KINDS]
    single = table[table.minus == ""]
    for kind in ("superpixels", "windows"):
        found = single[single.partition == kind].quantity.tolist()
        assert [name for name in found if "peak" not in name] == [*own, *tests]
    differences = table[table.minus != ""]
    assert set(differences.partition) == {"windows"} and set(differences.minus) == {"superpixels"}
    assert differences.quantity.tolist() == tests


def test_correlations_are_those_of_the_stored_maps(table, folders):
    for kind, folder in folders.items():
        rho = correlate_conditions(folder, [CONDITION])[CONDITION].sel(saliency="input")
        values = rho.overall.sel(masks="all").values
        found = table[(table.partition == kind) & (table.minus == "")].set_index("quantity")
        expected = values.mean(), *stats.ttest_1samp(values, 0).confidence_interval(0.95)
        assert tuple(found.loc["rho", ["value", "low", "high"]]) == pytest.approx(expected)
        reliability = float(rho.reliability.mean())
        assert found.reliability["rho"] == pytest.approx(reliability)
        assert np.isnan(found.value["reported"]) or reliability >= 0.5
        if reliability < 0.5:
            assert found.loc["reported", ["value", "low", "high"]].isna().all()


def test_areas_are_those_of_deletion_and_insertion(table, folders, model, tmp_path):
    found = table.set_index(["quantity", "partition", "minus"])
    for insertion, test in ((False, "deletion"), (True, "insertion")):
        own = {}
        for kind, folder in folders.items():
            curves = deletion_curves(model, load_maps(folder, "tiny", "en"), partitions.KINDS, tmp_path, insertion, 50)
            own[kind] = areas(curves, "corpus-capped WER", "en")[1].set_index("map")
            for name in partitions.KINDS:
                assert found.value[f"{test}, {name}", kind, ""] == pytest.approx(own[kind].area[name])
                assert found.reliability[f"{test}, {name}", kind, ""] == pytest.approx(own[kind].reliability[name])
        for name in partitions.KINDS:
            key = f"{test}, {name}", "windows", "superpixels"
            assert found.value[key] == pytest.approx(own["windows"].area[name] - own["superpixels"].area[name])
            lower = min(each.reliability[name] for each in own.values())
            assert found.reliability[key] == pytest.approx(lower)


def test_peaks_are_compared_with_the_words(folders, utterances, monkeypatch):
    """The times that count are made up: those of each token's own peak, and a second away from it."""
    known = {each.id: each for each in utterances}

    def peaks(shift):
        def times(maps, words, language):
            cells = maps.input_saliency.values
            steps = reduce_to_steps(cells, frames_of_steps(maps, maps.time.values)).argmax(axis=1)
            found = np.stack([maps.step_start.values[steps], maps.step_end.values[steps]], axis=1) + shift
            found[-1] = np.nan
            return found

        monkeypatch.setattr(partitions, "token_times", times)
        return partitions._peaks(folders["windows"], CONDITION, known)

    assert peaks(0.0) == {"peak inside the word": (1, 1, 1), "distance of the peak (s)": (0, 0, 0)}
    inside, distance = peaks(1.0).values()
    assert inside == (0, 0, 0) and distance == pytest.approx((0.96, 0.96, 0.96))  # a step lasts 40 ms
    monkeypatch.setattr(partitions, "token_times", lambda maps, *_: np.full((maps.sizes["token"], 2), np.nan))
    assert partitions._peaks(folders["windows"], CONDITION, known) == {}


def test_comparison_is_arranged_by_partition(table):
    text = partitions.arranged_partitions(table)
    assert text.index.tolist() == ["superpixels", "windows", "windows minus superpixels"]
    assert text.columns.tolist()[:3] == ["reliability", "rho", "reported"]
    own = table[(table.partition == "windows") & (table.minus == "")].set_index("quantity")
    assert text.reliability["windows"] == f"{own.reliability['rho']:.2f}"
    assert text.rho["windows"].startswith(f"{own.value['rho']:z.2f} (")
    assert text.rho["windows minus superpixels"] == text.reliability["windows minus superpixels"] == ""
    noisy = table.assign(value=table.value.mask(table.quantity == "reported"))
    assert partitions.arranged_partitions(noisy).reported.tolist() == ["too noisy", "too noisy", ""]


def test_reliability_of_the_first_masks(folders):
    found = partitions.reliability_by_masks(folders, CONDITION, [30, 60, MASKS], 1)
    assert found.columns.tolist() == ["superpixels", "windows"] and found.index.tolist() == [30, 60, MASKS]
    for kind, folder in folders.items():
        item = drop_special_tokens(next(load_maps(folder, "tiny", "en")))
        frames, masks = frames_of_steps(item, item.time.values), masks_of(item, "input")
        expected = split_half_reliability(half_maps(item.input_scores.values, masks, frames, "mean"))
        assert found[kind][MASKS] == pytest.approx(expected)
        first = masks_of(item.isel(input_mask=slice(60)), "input")
        expected = split_half_reliability(half_maps(item.input_scores.values[:60], first, frames, "mean"))
        assert found[kind][60] == pytest.approx(expected)


def test_superpixels_are_counted_for_each_granularity():
    features = np.random.default_rng(0).normal(size=(150, 80)).astype(np.float32)
    found = partitions.granularities([features])
    assert found.index.tolist() == [(pyramid, level) for pyramid in ("superpixels", "spread") for level in (1, 2, 3)]
    # 2000, 2500 and 3000 superpixels for 500 frames are 400, 500 and 600 per second.
    np.testing.assert_allclose(found["asked per second"].loc["superpixels"], [400, 500, 600])
    np.testing.assert_allclose(found["asked per second"].loc["spread"], [500, 222, 125.33], atol=0.4)
    levels = slic_pyramid(features, pyramid="spread")
    numbers = [len(np.unique(level)) / 1.5 for level in levels]
    np.testing.assert_allclose(found["found per second"].loc["spread"], numbers, atol=0.01)
    assert found["agrees with the first"]["superpixels", 2] == 1  # the same grid, see xattn.attribution.segments
    assert found["agrees with the first"]["spread", 1] == 1 > found["agrees with the first"]["spread", 3]
    again = partitions.granularities([features, features])
    pd.testing.assert_frame_equal(found, again)  # means over spectrograms
