import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from conftest import counted, listed, without_seconds
from torch.nn import functional

import xattn
import xattn.occlusion
from xattn.audio import mel_centres
from xattn.compare import correlate, saliency_on_steps
from xattn.estimators import estimate, masks_of
from xattn.explain import VERSION, Occlusion, explain, explain_targets
from xattn.models.conformer import ConformerModel
from xattn.occlusion import Masks, Partition
from xattn.segments import slic_pyramid

SMALL = {"input_masks": 12, "encoder_masks": 10, "batch_size": 5, "precision": "float32"}


@pytest.fixture(scope="module")
def utterance(utterances):
    return utterances[0]


@pytest.fixture(scope="module")
def maps(model, utterance):
    return explain(model, utterance, **SMALL)


def by_definition(model, utterance, target, place, masks, p, seed=0):
    """SM^X or SM^H one mask at a time, cell by cell, through torch's own KL divergence: (token, *cells)."""
    features = model.features(utterance.audio())
    states = model.encode(features[None])
    prompt = model.prompt(target)
    hypothesis = model.generate(features[None], target)[0]
    inputs = torch.cat([prompt, hypothesis[:-1]])

    def log_p(states):
        return model.decode(states, inputs)[0, len(prompt) - 1 :].double()

    original = log_p(states)
    levels = slic_pyramid(features.numpy()) if place == "input" else np.arange(states.shape[1])[None]
    total, times = 0.0, 0.0
    for level, hidden in listed(Masks(Partition.of(levels), masks, p, seed, f"{utterance.id}/{place}")):
        occluded = torch.from_numpy(hidden[levels[level]])
        if place == "input":
            perturbed = log_p(model.encode(features.masked_fill(occluded, 0.0)[None]))
        else:
            perturbed = log_p(states.masked_fill(occluded[:, None], 0.0))
        score = functional.kl_div(perturbed, original, log_target=True, reduction="none").sum(-1).numpy()
        total = total + np.multiply.outer(score, occluded.numpy())
        times = times + occluded.numpy()
    return np.where(times > 0, total / np.maximum(times, 1), 0.0)


def test_axes_and_units(maps, model, utterance):
    features = model.features(utterance.audio())
    hypothesis = model.generate(features[None], "en")[0]
    tokens, frames, steps = len(hypothesis), len(features), math.ceil(len(features) / 4)
    assert tokens > 4 and steps * 4 > frames  # the last step has frames fewer than four
    assert dict(maps.sizes) | {"segment": 0} == {
        "layer": 2, "head": 2, "token": tokens, "step": steps, "time": frames, "mel": 80, "level": 3, "segment": 0,
        "input_mask": 12, "encoder_mask": 10,
    }  # fmt: skip
    assert maps.cross_attention.dims == ("layer", "head", "token", "step")
    assert maps.input_saliency.dims == ("token", "time", "mel")
    assert maps.encoder_saliency.dims == ("token", "step")
    assert maps.features.dims == ("time", "mel")
    assert maps["layer"].values.tolist() == maps["head"].values.tolist() == [1, 2]
    assert maps.token.values.tolist() == model.tokens(hypothesis) and maps.token.values[-1] == "</s>"
    # Seconds: frame t is centred 12.5 ms after its start at 10 t ms, a step midway between its first and last frame.
    np.testing.assert_allclose(maps.time, [0.0125 + 0.01 * frame for frame in range(frames)])
    last = [min(4 * step + 3, frames - 1) for step in range(steps)]
    np.testing.assert_allclose(maps.step, [0.0125 + 0.005 * (4 * step + end) for step, end in enumerate(last)])
    assert 0 < utterance.duration - maps.time.values[-1] < 0.0225
    assert np.array_equal(maps.mel, mel_centres())
    assert np.array_equal(maps.features, features)


def test_attributes_tell_what_produced_the_maps(maps, model, utterance):
    hypothesis = model.generate(model.features(utterance.audio())[None], "en")[0]
    expected = {
        "model": "tiny",
        "weights": model.weights_hash,
        "utterance": "en-test-0",
        "setting": "en",
        "hypothesis": model.text(hypothesis),
        "reference": "the dog sleeps",
        "subsampling": 4,
        "lead": 0,
        "version": xattn.__version__,
        **asdict(Occlusion(**SMALL)),
    }
    assert {name: maps.attrs[name] for name in expected} == expected
    assert set(maps.attrs) - set(expected) == {"audio", "seconds", "input_reliability", "encoder_reliability"}
    assert len(maps.audio) == 16 and maps.seconds > 0


def test_encoder_saliency_is_its_definition(maps, model, utterance):
    expected = by_definition(model, utterance, "en", "encoder", 10, 0.7)
    assert expected.max() > 0.1
    np.testing.assert_allclose(maps.encoder_saliency, expected, rtol=1e-4, atol=1e-6)


def test_input_saliency_is_its_definition(maps, model, utterance):
    expected = by_definition(model, utterance, "en", "input", 12, 0.5)
    assert expected.max() > 0.1
    np.testing.assert_allclose(maps.input_saliency, expected, rtol=1e-4, atol=1e-6)


def test_the_scores_of_all_masks_give_the_maps(maps, utterance):
    steps = Masks(Partition.of(np.arange(maps.sizes["step"])[None]), 10, 0.7, 0, f"{utterance.id}/encoder")
    _, hidden = steps.draw(0, 10)
    sums, counts = maps.encoder_scores.values.T.astype(np.float64) @ hidden, hidden.sum(axis=0)
    expected = np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)
    np.testing.assert_allclose(maps.encoder_saliency, expected, rtol=1e-6)
    segments = Masks(Partition.of(slic_pyramid(maps.features.values)), 12, 0.5, 0, f"{utterance.id}/input")
    expected = maps.input_scores.values.T.astype(np.float64) @ segments.draw(0, 12)[1]
    np.testing.assert_allclose(maps.segment_score, expected, rtol=1e-6)


def test_numbers_move_with_a_new_version_only(maps):
    """Stored maps are trusted by version: a change that moves these numbers must raise it and renew them."""
    found = (
        float(maps.input_saliency.mean()), float(maps.encoder_saliency.mean()), float(maps.cross_attention[1, 0, 0, 2])
    )  # fmt: skip
    assert VERSION == 6
    assert found == pytest.approx((0.067363, 0.192280, 0.021243), rel=1e-3)


def test_attention_is_that_of_the_forced_hypothesis(maps, model, utterance):
    states = model.encode(model.features(utterance.audio())[None])
    ids = torch.tensor([4, *(model.tokenizer.piece_to_id(token) for token in maps.token.values[:-1])])
    np.testing.assert_allclose(maps.cross_attention, model.cross_attention(states, ids), atol=1e-6)


def test_parameters_reach_the_masks(model, utterance):
    changed = explain(
        model, utterance, **SMALL | {"input_masks": 6, "encoder_masks": 4, "input_p": 0.3, "encoder_p": 0.4, "seed": 5}
    )
    for place, masks, p in (("input", 6, 0.3), ("encoder", 4, 0.4)):
        expected = by_definition(model, utterance, "en", place, masks, p, seed=5)
        np.testing.assert_allclose(changed[f"{place}_saliency"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("estimator", ["mean", "ridge"])
def test_reliability_is_that_of_halves_of_the_reduced_map(model, utterance, estimator):
    maps = explain(model, utterance, **SMALL | {"input_masks": 60, "encoder_masks": 40, "estimator": estimator})
    spoken = maps.token.values != "</s>"
    for place in ("input", "encoder"):
        scores, name, masks = maps[f"{place}_scores"].values, f"{place}_saliency", masks_of(maps, place)
        labels = masks.partition.labels
        np.testing.assert_allclose(estimate(scores, masks, estimator).cells(labels), maps[name], rtol=1e-5, atol=1e-7)
        first = np.arange(len(scores)) // len(labels) % 2 == 0
        halves = []
        for used in (first, ~first):
            cells = estimate(scores, masks, estimator, used).cells(labels)
            halves.append(saliency_on_steps(maps.assign({name: maps[name].copy(data=cells)}), place)[spoken])
        r = np.corrcoef(*(half.ravel() for half in halves))[0, 1]
        assert maps.attrs[f"{place}_reliability"] == pytest.approx(2 * r / (1 + r))


def test_perturbations_end_where_the_maps_are_reliable(model, utterance):
    many = SMALL | {"input_masks": 400, "encoder_masks": 400}
    everything = explain(model, utterance, **many)
    stopped = explain(model, utterance, **many | {"reliability": 0.01})
    for place in ("input", "encoder"):
        assert stopped.sizes[f"{place}_mask"] in (200, 250, 312, 390)
        assert stopped.attrs[f"{place}_reliability"] >= 0.01
        assert np.allclose(stopped[f"{place}_scores"], everything[f"{place}_scores"][: stopped.sizes[f"{place}_mask"]])
        assert everything.sizes[f"{place}_mask"] == 400


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batch_size_moves_rounding_only(maps, model, utterance, batch_size):
    other = explain(model, utterance, **SMALL | {"batch_size": batch_size})
    assert np.array_equal(other.segment_count, maps.segment_count)
    for name in ("input_saliency", "encoder_saliency"):
        np.testing.assert_allclose(other[name], maps[name], rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def shipped():
    return xattn.load_model(Path(__file__).parents[1] / "data" / "models" / "base")


@pytest.mark.parametrize("number", [0, 3])
def test_bfloat16_gives_the_maps_of_float32(shipped, number):
    utterance = xattn.load_corpus(Path(__file__).parents[1] / "data", language="en", split="test")[number]
    masks = {"input_masks": 200, "encoder_masks": 200}
    exact, rounded = (explain(shipped, utterance, **masks, precision=name) for name in ("float32", "bfloat16"))
    assert rounded.precision == "bfloat16" and exact.hypothesis == rounded.hypothesis
    assert np.array_equal(exact.segment_count, rounded.segment_count)
    spoken = exact.token.values != "</s>"
    for place, like, nearest in (("input", 0.95, 0.05), ("encoder", 0.995, 0.01)):
        scores = [maps[f"{place}_scores"].values[:, spoken] for maps in (exact, rounded)]
        assert not np.array_equal(*scores)
        assert np.corrcoef(*(each.ravel() for each in scores))[0, 1] > 0.9995
        by_token = np.array([np.corrcoef(*pair)[0, 1] for pair in zip(*(each.T for each in scores), strict=True)])
        matters = scores[0].mean(axis=0) > 0.02  # nats; of tokens that hardly depend on the input, rounding is the rest
        assert np.median(by_token) > 0.999 and by_token[matters].min() > 0.995 and by_token.min() > 0.8
        assert 5 < matters.sum() < spoken.sum()
        reduced = [saliency_on_steps(maps, place)[spoken].ravel() for maps in (exact, rounded)]
        assert np.corrcoef(*reduced)[0, 1] > like
        assert abs(correlate(exact, place) - correlate(rounded, place)).max() < nearest


def test_the_size_of_batches_is_decided_by_the_device(model, utterance):
    for device, size in (("cpu", 32), ("cuda", 128)):
        assert Occlusion(precision="float32").on(torch.device(device)).batch_size == size
        assert Occlusion(batch_size=5, precision="float32").on(torch.device(device)).batch_size == 5
    assert explain(model, utterance, **SMALL | {"batch_size": None}).batch_size == 32


def test_auto_is_decided_by_the_device(model, utterance, monkeypatch):
    for capable, decided in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda capable=capable: {"avx512_bf16": capable})
        assert Occlusion().on(model.device).precision == decided
        assert Occlusion(precision="float32").on(model.device).precision == "float32"
        assert explain(model, utterance, **SMALL | {"precision": "auto"}).precision == decided


def test_rows_of_a_prompt_of_two_tokens_explain_no_token(model, utterance):
    class TwoTags(ConformerModel):
        def prompt(self, language):
            return torch.tensor([3, self.config.language_ids[language]])

    longer = TwoTags(model.network, model.tokenizer, "two", "hash")
    maps = explain(longer, utterance, **SMALL)
    expected = by_definition(longer, utterance, "en", "encoder", 10, 0.7)
    assert maps.sizes["token"] == len(expected)
    np.testing.assert_allclose(maps.encoder_saliency, expected, rtol=1e-4, atol=1e-6)
    states = longer.encode(longer.features(utterance.audio())[None])
    ids = longer.generate(longer.features(utterance.audio())[None], "en")[0]
    attention = longer.cross_attention(states, torch.cat([longer.prompt("en"), ids[:-1]]))
    np.testing.assert_allclose(maps.cross_attention, attention[:, :, 1:], atol=1e-6)


def test_two_languages_share_the_encoder_passes(model, utterance, maps, monkeypatch):
    alone = [maps, explain(model, utterance, "it", **SMALL)]
    calls = counted(model, monkeypatch, "encode")
    both = explain_targets(model, utterance, ["en", "it"], Occlusion(**SMALL))
    assert calls == [1, 5, 5, 2]
    assert [item.setting for item in both] == ["en", "en-it"]
    assert both[0].hypothesis != both[1].hypothesis
    assert [item.reference for item in both] == ["the dog sleeps", "il cane dorme"]
    for together, single in zip(both, alone, strict=True):
        xr.testing.assert_identical(without_seconds(together), without_seconds(single))


def test_a_recording_of_one_s_own(model, utterance, maps):
    own = explain(model, utterance.audio_path, **SMALL)
    assert (own.utterance, own.setting, own.reference, own.audio) == ("en-test-0", "en", "", maps.audio)
    np.testing.assert_array_equal(own.encoder_saliency, maps.encoder_saliency)
    italian = explain(model, utterance.audio_path, "it", **SMALL)
    assert italian.setting == "it" and italian.hypothesis != own.hypothesis
    translated = explain(model, utterance.audio_path, "it", "en", **SMALL)
    assert (translated.setting, translated.hypothesis) == ("en-it", italian.hypothesis)


def test_maps_can_be_correlated(maps):
    for source in ("input", "encoder"):
        assert np.isfinite(correlate(maps, source)).all()


@pytest.mark.parametrize(
    ("parameter", "value", "sentence"),
    [
        ("input_p", 1.5, "input_p is 1.5: give a number from 0 to 1"),
        ("encoder_p", -0.1, "encoder_p is -0.1: give a number from 0 to 1"),
        ("encoder_p", float("nan"), "encoder_p is nan: give a number from 0 to 1"),
        ("input_masks", 0, "input_masks is 0: give a whole number of at least 1"),
        ("input_masks", 2.5, "input_masks is 2.5: give a whole number of at least 1"),
        ("encoder_masks", -3, "encoder_masks is -3: give a whole number of at least 1"),
        ("encoder_masks", float("nan"), "encoder_masks is nan: give a whole number of at least 1"),
        ("encoder_masks", None, "encoder_masks is None: give a whole number of at least 1"),
        ("batch_size", 0, "batch_size is 0: give a whole number of at least 1"),
        ("batch_size", 2.5, "batch_size is 2.5: give a whole number of at least 1"),
        ("batch_size", True, "batch_size is True: give a whole number of at least 1"),
        ("seed", 1.5, "seed is 1.5: give a whole number of at least 0"),
        ("seed", -1, "seed is -1: give a whole number of at least 0"),
        ("precision", "half", "There is no precision 'half': choose one of auto, float32, bfloat16"),
    ],
)
def test_parameters_out_of_range(model, utterance, parameter, value, sentence):
    with pytest.raises(ValueError, match=sentence):
        explain(model, utterance, **{parameter: value})


def test_a_language_the_model_does_not_write(model, utterance):
    with pytest.raises(ValueError, match="The model tiny does not write 'fr'"):
        explain(model, utterance, "fr")


def test_an_empty_hypothesis(model, utterance, monkeypatch):
    monkeypatch.setattr(model, "generate", lambda features, language: [torch.tensor([2])])
    with pytest.raises(ValueError, match="tiny wrote nothing for en-test-0 in 'en': check the recording"):
        explain(model, utterance)


def test_weights_that_are_not_finite(made, model, utterance, monkeypatch):
    broken = ConformerModel(made.network(), model.tokenizer, "broken", "hash")
    broken.network.encoder.conformer_layers[0].layernorm.bias.data[0] = float("nan")
    monkeypatch.setattr(broken, "generate", lambda features, language: [torch.tensor([9, 8, 2])])
    with pytest.raises(FloatingPointError, match="check its weights and the recording"):
        explain(broken, utterance, **SMALL)
