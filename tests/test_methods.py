"""All attributions on one table: methods on a random model and on one whose truth is planted, measures by hand."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from scipy import stats

import xattn
from reproduction import judging
from reproduction.judging import (
    BETTER,
    STANDARDISED,
    arranged_methods,
    best_on_others,
    compare_methods,
    explained_with,
    localisation,
    winners,
    word_boundaries,
)
from reproduction.methods import BASELINES, METHODS, RANDOM, STORED, Explained, methods_of
from xattn.analysis.faithfulness import areas, deletion_curves
from xattn.attribution.forced import Forced
from xattn.attribution.gradients import gradient, gradient_times_input, integrated_gradients, masked_gradients
from xattn.attribution.segments import partition
from xattn.attribution.variants import occlude_input, previous_tokens
from xattn.data.utterance import Word


@pytest.fixture(scope="module")
def stored(model, utterances, tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods-maps")
    occlusion = xattn.Occlusion(60, 60, partition="superpixels", reliability=1.0)
    xattn.explain_corpus(model, utterances, folder, occlusion=occlusion, progress=False)
    return list(xattn.load_maps(folder, "tiny", "en"))


@pytest.fixture(scope="module")
def each(model, stored, utterances):
    maps = stored[0]
    (own,) = (utterance for utterance in utterances if utterance.id == maps.utterance)
    return Explained(maps, Forced.of(model, maps), own, 1, (2, 1))


def test_every_method_explains_every_token(each, model, stored):
    names = methods_of(model, stored[0])
    assert set(METHODS) - set(names) == {"attention: alignment heads"}  # only Whisper has them
    for name in names:
        found = METHODS[name](each)
        assert found.dims in (("token", "step"), ("token", "time", "mel")), name
        assert found.token.equals(each.maps.token) and np.isfinite(found).all(), name
        assert name == "energy" or np.ptp(found.values) > 0, name
        other = METHODS[name](replace(each, seed=1))
        assert found.equals(other) == (name not in RANDOM), name
    assert {*STORED, *RANDOM, *BASELINES} <= set(METHODS)


def test_layers_and_heads_are_chosen_on_other_utterances(made):
    stored = [made.maps(seed, f"made-{seed}") for seed in range(4)]
    rho = [xattn.correlate(maps.cross_attention, maps.input_saliency) for maps in stored]
    for number, (layer, head) in enumerate(best_on_others(stored)):
        others = [each for place, each in enumerate(rho) if place % 2 != number % 2]
        by_head = np.mean([each.by_layer_and_head.values for each in others], axis=0)
        assert head == tuple(1 + np.array(np.unravel_index(by_head.argmax(), by_head.shape)))
        assert layer == 1 + np.mean([each.by_layer.values for each in others], axis=0).argmax()


def test_the_table_holds_the_papers_rho_and_is_not_computed_twice(model, stored, utterances, tmp_path, monkeypatch):
    table, differences, similar = compare_methods(model, stored, utterances, tmp_path, 50, 2)
    rho = [float(xattn.correlate(maps.cross_attention, maps.input_saliency).overall) for maps in stored]
    own = table[table.method.eq("attention: all heads" + STANDARDISED) & table.measure.eq("rho, SM^X")]
    assert own.value.item() == pytest.approx(np.mean(rho), abs=1e-6) and own.n.item() == len(stored) == 2
    assert set(table.columns) == {"model", "condition", "method", "measure", "value", "low", "high", "n"}
    assert table.value.notna().all() and not table.duplicated(["method", "measure"]).any()
    # The model's words are not those that were spoken, so their times are unknown.
    assert set(BETTER) - set(table.measure) == {"deletion, BLEU"} | {name for name in BETTER if "word" in name}
    pairs = [previous_tokens(Forced.of(model, maps), maps).attrs for maps in stored]
    without = table[table.method.eq(judging.PREVIOUS)].set_index("measure").value
    for what in ("audio", "text"):
        assert without[f"without {what}"] == pytest.approx(np.mean([pair[what] for pair in pairs]))
    names = methods_of(model, stored[0])
    matrix = similar.pivot(index="first", columns="second", values="value").loc[names, names].values
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-12)
    np.testing.assert_allclose(np.diag(matrix)[[name != "energy" for name in names]], 1)
    monkeypatch.setattr(judging, "judge", None)
    assert table[table.measure.eq("cost") & ~table.method.isin(["SM^H", "SM^H, regression"])].n.eq(2).all()
    again = compare_methods(model, stored, utterances, tmp_path, 50, 2)
    pd.testing.assert_frame_equal(again[0], table)
    pd.testing.assert_frame_equal(again[1], differences)
    with pytest.raises(TypeError):  # other points of deletion are other numbers
        compare_methods(model, stored, utterances, tmp_path, 25, 2)


def test_deletion_is_that_of_the_paper(model, stored, utterances, tmp_path):
    table, differences, _ = compare_methods(model, stored, utterances, tmp_path / "numbers", 50, 0)
    curves = deletion_curves(model, stored, ["CA", "SM^X", "SM^H"], tmp_path / "texts", step=50)
    expected = areas(curves, "corpus-capped WER", "en")[1].set_index("map").area
    found = table[table.measure.eq("deletion, corpus-capped WER")].set_index("method").value
    assert "stability: noise" not in set(table.measure)  # nothing is checked
    assert table[table.measure.eq("cost")].n.eq(1).all() and table.measure.eq("cost").any()
    assert not {"cost"} & set(winners(table, differences).measure)
    for name, kind in (("attention: all heads", "CA"), ("SM^X", "SM^X"), ("SM^H", "SM^H")):
        assert found[name] == pytest.approx(expected[kind])
    pair = areas(curves, "corpus-capped WER", "en", [("SM^X", "CA")])[1].iloc[-1]
    own = differences[differences.method.eq("SM^X") & differences.minus.eq(judging.PLAIN)]
    own = own[own.measure.eq("deletion, corpus-capped WER")]
    assert own[["value", "low", "high"]].values.ravel() == pytest.approx(pair[["area", "low", "high"]].tolist())


def test_localisation_of_a_peak_in_the_word_and_one_beside_it():
    steps = xr.DataArray(
        [[0, 3.0, 1.0, 0], [0, 0, 1.0, 1.5], [0.5, -9, 0, 0.5]],
        dims=("token", "step"),
        coords={
            "token": ["▁the", "▁dog", "▁sleeps"],
            "step": [0.02, 0.06, 0.1, 0.14],
            "step_start": ("step", [0.0, 0.04, 0.08, 0.12]),
            "step_end": ("step", [0.04, 0.08, 0.12, 0.16]),
        },
    )
    words = (Word("the", 0.04, 0.08), Word("dog", 0.08, 0.11), Word("barks", 0.12, 0.16))
    utterance, maps = SimpleNamespace(words=words), SimpleNamespace(setting="en")
    found = localisation(steps, maps, utterance)
    assert found["peak inside word"] == 0.5
    assert found["mass inside word"] == pytest.approx((3 / 4 + 1 / 2.5) / 2)
    assert localisation(steps, SimpleNamespace(setting="en-it"), utterance) == {}
    assert localisation(steps, maps, SimpleNamespace(words=())) == {}


def test_word_boundaries_of_an_exact_attribution_are_exact_to_a_step(each):
    maps, words = each.maps, []
    tokens = maps.token.values.tolist()
    attribution = maps.encoder_saliency * 0
    bounds = np.linspace(0, maps.sizes["step"], len(np.unique(maps.word)) + 1).astype(int)
    for number, word in enumerate(dict.fromkeys(maps.word.values.tolist())):
        rows = [row for row in range(len(tokens)) if maps.word.values[row] == word]
        first, end = bounds[number], bounds[number + 1]
        for row, part in zip(rows, np.array_split(np.arange(first, end), len(rows)), strict=True):
            attribution.values[row, part] = 1
        words.append(Word(word, float(maps.step_start[first]), float(maps.step_end[end - 1])))
    spoken = [word for word in words if word.word != "</s>"]
    without_sound = maps.drop_vars("features")
    found = word_boundaries(attribution, without_sound, SimpleNamespace(words=tuple(spoken)))
    assert {name: value for name, value in found.items() if "within" in name and "200" in name} == {
        "start within 200 ms, warped": 1.0,
        "start within 200 ms, peak": 1.0,
    }
    assert found["start of word, warped"] <= 0.04 and found["end of word, warped"] <= 0.04


def test_another_model_and_another_input_have_their_own_attention(each, model):
    same = explained_with(each, each.forced)
    np.testing.assert_allclose(same.maps.cross_attention, each.maps.cross_attention, atol=1e-6)
    quiet = judging.noisy(each)
    pair = [one.maps.features.values.ravel() for one in (quiet, each)]
    assert np.abs(pair[0] - pair[1]).max() > 0 and np.corrcoef(*pair)[0, 1] > 0.9
    assert not np.allclose(quiet.maps.cross_attention, each.maps.cross_attention, atol=1e-4)


def test_differences_are_those_of_the_same_utterances(model, stored, utterances, tmp_path):
    table, differences, _ = compare_methods(model, stored, utterances, tmp_path, 50, 2)
    paths = sorted((tmp_path / "tiny" / "en").glob("*.json"))
    measured = [json.loads(path.read_text())["measures"] for path in paths]
    infidelity = pd.DataFrame([{name: own.get("infidelity") for name, own in each.items()} for each in measured])
    infidelity = infidelity.dropna(axis=1)
    best = infidelity.drop(columns=list(BASELINES)).mean().idxmin()
    own = differences[differences.measure.eq("infidelity")].set_index(["minus", "method"])
    assert set(own.index.get_level_values("minus")) == {best, judging.PLAIN}
    assert len(own) == 2 * (infidelity.shape[1] - 1)
    for (minus, method), row in own.iterrows():
        pair = infidelity[method], infidelity[minus]
        test = stats.ttest_rel(*pair)
        assert row.value == pytest.approx(pair[0].mean() - pair[1].mean())
        if np.ptp(pair[0] - pair[1]) > 0:
            assert row[["low", "high"]].tolist() == pytest.approx([*test.confidence_interval()])
    won = winners(table, differences).set_index("measure")
    assert won.best["infidelity"] == best
    assert set(differences.measure) <= set(BETTER)


def test_winners_are_the_best_and_those_whose_difference_may_be_0():
    rows = [
        *[("a", "infidelity", 0.2), ("b", "infidelity", 0.25), ("c", "infidelity", 0.6), ("random", "infidelity", 0.1)],
        *[("a", "peak inside word", 0.2), ("c" + STANDARDISED, "peak inside word", 0.9), ("a", "rho, SM^X", 0.2)],
    ]
    table = pd.DataFrame(rows, columns=["method", "measure", "value"]).assign(model="m", condition="en")
    rows = [
        ("b", "infidelity", "a", 0.05, -0.01, 0.11),
        ("c", "infidelity", "a", 0.4, 0.1, 0.7),
        ("random", "infidelity", "a", -0.1, -0.3, 0.1),
        ("b", "infidelity", "c", -0.35, -0.6, 0.1),
        ("a", "peak inside word", "c" + STANDARDISED, -0.7, -0.9, -0.5),
    ]
    columns = ["method", "measure", "minus", "value", "low", "high"]
    differences = pd.DataFrame(rows, columns=columns).assign(model="m", condition="en")
    found = winners(table, differences).set_index("measure")
    assert found.best.to_dict() == {"infidelity": "a", "peak inside word": "c" + STANDARDISED}
    assert found["not distinguishable"].to_dict() == {"infidelity": "b", "peak inside word": ""}
    wide = arranged_methods(table)
    assert wide.columns.tolist() == ["model", "condition", "method", "infidelity", "peak inside word", "rho, SM^X"]
    assert wide[wide.method == "c"].infidelity.item() == 0.6


class Planted(SimpleNamespace):
    """A model of one token, whose log-probability depends on the energy of known cells only."""

    batch_size, frame_seconds, device = 32, 0.01, torch.device("cpu")

    def mask_input(self, features, keep):
        return features * keep

    def encode(self, features):
        return features

    def decode(self, states, inputs):
        energy = (states.square() * self.truth).sum(dim=(1, 2)) / self.truth.sum()
        return torch.stack([energy, torch.zeros_like(energy)], dim=1)[:, None].log_softmax(dim=-1)


def test_methods_find_planted_cells():
    rng = np.random.default_rng(0)
    features = (1 + rng.random((60, 20))).astype(np.float32)
    truth = np.zeros(features.shape, dtype=bool)
    truth[20:40] = True
    planted = Planted(truth=torch.from_numpy(truth))
    forced = Forced(planted, torch.from_numpy(features), torch.tensor([0]), torch.tensor([1]))
    cells = xr.DataArray(np.zeros((1, 60, 20)), dims=("token", "time", "mel"))
    maps = xr.Dataset({"input_saliency": cells}, attrs={"seed": 0, "utterance": "planted"})
    maps["features"] = (("time", "mel"), features)
    windows = partition(features, "windows", 0.01)
    found = {
        method.__name__: method(forced, maps)
        for method in (gradient, gradient_times_input, integrated_gradients, masked_gradients)
    } | {"windows": occlude_input(forced, maps, windows, 600)}
    for name, attribution in found.items():
        values = np.abs(attribution.values[0])
        area = stats.mannwhitneyu(values[truth], values[~truth]).statistic / (truth.sum() * (~truth).sum())
        # The edges of windows do not coincide with those of the truth.
        assert area == pytest.approx(1.0, abs=0.03 if name == "windows" else 1e-12), name
    assert found["integrated_gradients"].attrs["completeness_error"] < 0.01
