"""Stored maps of a condition, the maps that a notebook finds, and progress."""

import json
from pathlib import Path

import numpy as np
import pytest

from reproduction import conditions, profiles
from reproduction.conditions import correlate_conditions, estimator_of, find_maps, load_condition
from reproduction.tables import ROOT
from xattn import correlate, load_maps, store

MINI = "figures/mini/maps"
LAB = "figures/lab/maps"


def keep(folder, maps, direction="en"):
    """Store maps as those of a finished run."""
    for item in maps:
        store.save(item, store.path_of(folder, "tiny", direction, item.utterance), "key")
    store.save_index({item.utterance: "key" for item in maps}, folder, "tiny", direction)


def finish(condition, folder):
    """Write an index as a finished run does."""
    path = Path(folder, condition, store.INDEX)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"u": "key"}))


def test_progress_is_silent_at_first_and_then_says_what_is_left(monkeypatch, capsys):
    assert list(conditions.progress([1, 2, 3], "Loop")) == [1, 2, 3]
    assert capsys.readouterr().out == ""
    clock = iter([0.0, 0.0, 4.0, 5.0, 25.0])
    monkeypatch.setattr(conditions.time, "monotonic", lambda: next(clock))
    assert list(conditions.progress(iter("abcd"), "Loop", total=4)) == list("abcd")
    assert capsys.readouterr().out == "Loop: 1 of 4, about 12 s left\nLoop: 3 of 4, about 8 s left\n"


def test_stored_maps_are_read_in_the_order_of_the_run(made, tmp_path):
    keep(tmp_path, [made.maps(seed, name) for seed, name in enumerate(("b", "a", "c"))])
    assert [item.utterance for item in load_condition(tmp_path, "tiny/en")] == ["b", "a", "c"]
    assert [item.utterance for item in load_condition(tmp_path, "tiny/en", first=2)] == ["b", "a"]
    assert estimator_of(tmp_path, "tiny/en") == "mean"


def test_every_condition_is_correlated(made, tmp_path):
    maps = [made.maps(seed, str(seed)) for seed in range(2)]
    keep(tmp_path, maps)
    keep(tmp_path, maps[:1], "en-it")
    found = correlate_conditions(tmp_path, ["tiny/en", "tiny/en-it"], "2d_avg")
    assert [*found] == ["tiny/en", "tiny/en-it"]
    assert found["tiny/en"].utterance.values.tolist() == ["0", "1"]
    expected = [correlate(item.cross_attention, item.input_saliency, "2d_avg").overall.item() for item in maps]
    np.testing.assert_allclose(found["tiny/en"].overall.sel(saliency="input", masks="all"), expected)


@pytest.fixture
def explained(monkeypatch, tmp_path):
    """What a notebook in an empty repository would explain: model, utterances, folder, target and occlusion."""
    calls = []

    def explain_corpus(model, corpus, folder, translate_to, occlusion):
        calls.append((model, corpus, folder, translate_to, occlusion))
        finish(f"{Path(model).name}/{corpus[0]}" + (f"-{translate_to}" if translate_to else ""), folder)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(conditions, "load_model", lambda folder: folder)
    monkeypatch.setattr(conditions, "load_corpus", lambda data, language, split: [language, data, split] * 5)
    monkeypatch.setattr(conditions, "explain_corpus", explain_corpus)
    return calls


def test_given_maps_are_read(explained, capsys):
    assert find_maps("figures/full/maps", ["base/en"]) == "figures/full/maps"
    assert (explained, capsys.readouterr().out) == ([], "")


def test_a_notebook_reads_the_maps_of_the_default_profile_if_it_has_all_conditions(explained, capsys):
    for condition in ("base/en", "small/en-it"):
        finish(condition, MINI)
    assert find_maps("", ["base/en", "small/en-it"]) == MINI
    assert (explained, capsys.readouterr().out) == ([], f"Maps: {MINI}\n")


def test_a_notebook_explains_what_is_missing_with_the_default_profile_s_settings(explained, capsys):
    finish("base/en", MINI)  # not enough
    finish("base/en", LAB)
    assert find_maps("", ["base/en", "small/en-it", "small/it"]) == LAB
    assert capsys.readouterr().out == f"Maps: {LAB} (8 utterances; `make reproduce` makes more)\n"
    assert [call[0] for call in explained] == ["data/models/small"] * 2
    assert [call[1] for call in explained] == [([each, "data", "test"] * 5)[:8] for each in ("en", "it")]
    assert [call[2:4] for call in explained] == [(LAB, "it"), (LAB, None)]
    mini = profiles.load_profile(ROOT / "notebooks" / "profiles" / "mini.yaml")
    for *_, occlusion in explained:
        assert {key: getattr(occlusion, key) for key in profiles.OCCLUSION} == {
            key: mini[key] for key in profiles.OCCLUSION
        }
        assert (occlusion.input_masks, occlusion.partition, occlusion.seconds) == (800, "superpixels", None)
    assert find_maps("", ["small/it", "small/en-it"]) == LAB and len(explained) == 2  # they are there now


def test_maps_that_a_notebook_makes_can_be_read(model, tiny_folder, corpus_folder, monkeypatch, tmp_path):
    few = {"input_masks": 12, "encoder_masks": 12, "precision": "float32"}
    own = {"models": {"tiny": str(tiny_folder)}, "data": str(corpus_folder)}
    mini = profiles.load_profile(ROOT / "notebooks" / "profiles" / "mini.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(conditions, "load_profile", lambda path: mini | own | few)
    folder = find_maps("", ["tiny/en", "tiny/en-it"])
    assert folder == LAB and sorted(path.name for path in (tmp_path / LAB / "tiny").iterdir()) == ["en", "en-it"]
    for direction in ("en", "en-it"):
        found = list(load_maps(folder, "tiny", direction))
        assert [item.utterance for item in found] == ["en-test-0", "en-test-1"]
        assert {item.sizes["input_mask"] for item in found} == {12} and {item.setting for item in found} == {direction}
