import io
import math
import pickle
import re
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import platformdirs
import pytest
import soundfile
import torch
import xarray as xr
from conftest import Clock, counted, listed, without_seconds
from torch.nn import functional

import xattn
from reproduction.tables import ROOT
from xattn.analysis.correlation import correlate, normalised_saliency
from xattn.attribution import occlusion
from xattn.attribution.estimators import ESTIMATORS, estimate
from xattn.attribution.occlusion import Masks, Partition
from xattn.attribution.segments import slic_pyramid
from xattn.audio import SAMPLE_RATE, mel_centres
from xattn.data.corpus import load_corpus
from xattn.explain import VERSION, Occlusion, explain, explain_directions
from xattn.figures import heatmaps
from xattn.maps import masks_of
from xattn.models import Decoding, load_model
from xattn.models.conformer import ConformerModel

PUBLISHED = {"estimator": "mean", "partition": "superpixels", "reliability": 1.0}
SMALL = Occlusion(input_masks=12, encoder_masks=10, batch_size=5, precision="float32", **PUBLISHED)
PLACES = ("input", "encoder")


def quietly(model, audio, changes=SMALL, **arguments):
    """Explain without printing; `changes` replace fields of SMALL."""
    given = changes if isinstance(changes, Occlusion) else replace(SMALL, **changes)
    return explain(model, audio, occlusion=given, progress=False, **arguments)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    """The folder for scores of interrupted calls."""
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda name: tmp_path / "cache" / name)
    return tmp_path / "cache" / "xattn"


@pytest.fixture(scope="module")
def utterance(utterances):
    return utterances[0]


@pytest.fixture(scope="module")
def maps(model, utterance):
    return quietly(model, utterance)


def windows(features):
    """Windows of 10, 20 and 40 frames: (level, time, mel)."""
    frames = np.arange(features.size).reshape(features.shape) // features.shape[1]
    return np.stack([frames // width for width in (10, 20, 40)])


def by_definition(model, utterance, direction, place, masks, p, seed=0, partition=slic_pyramid):
    """SM^X or SM^H one mask at a time, cell by cell, through torch's own KL divergence: (token, *cells)."""
    features = model.features(utterance.audio())
    states = model.encode(features[None])
    prompt = model.prompt(direction)
    hypothesis = model.generate(features[None], direction)[0]
    inputs = torch.cat([prompt, hypothesis[:-1]])

    def log_p(states):
        return model.decode(states, inputs)[0, len(prompt) - 1 :].double()

    original = log_p(states)
    levels = partition(features.numpy()) if place == "input" else np.arange(states.shape[1])[None]
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
    assert tokens > 4 and steps * 4 > frames  # the last step has fewer than four frames
    assert dict(maps.sizes) | {"segment": 0} == {
        "layer": 2, "head": 2, "token": tokens, "step": steps, "time": frames, "mel": 80, "level": 3, "segment": 0,
        "input_mask": 12, "encoder_mask": 10, "half": 2,
    }  # fmt: skip
    assert maps.cross_attention.dims == ("layer", "head", "token", "step")
    assert maps.input_saliency.dims == ("token", "time", "mel")
    assert maps.encoder_saliency.dims == ("token", "step")
    assert maps.features.dims == ("time", "mel")
    assert maps["layer"].values.tolist() == maps["head"].values.tolist() == [1, 2]
    assert maps.token.values.tolist() == model.tokens(hypothesis) and maps.token.values[-1] == "</s>"
    # Frame t is centred 12.5 ms after its start at 10 t ms; a step is centred between its first and last frame.
    np.testing.assert_allclose(maps.time, [0.0125 + 0.01 * frame for frame in range(frames)])
    last = [min(4 * step + 3, frames - 1) for step in range(steps)]
    np.testing.assert_allclose(maps.step, [0.0125 + 0.005 * (4 * step + end) for step, end in enumerate(last)])
    assert 0 < utterance.duration - maps.time.values[-1] < 0.0225
    assert np.array_equal(maps.mel, mel_centres())
    assert np.array_equal(maps.features, features)


def test_attributes_record_what_produced_the_maps(maps, model, utterance):
    hypothesis = model.generate(model.features(utterance.audio())[None], "en")[0]
    expected = {
        "model": "tiny",
        "weights": model.weights_hash,
        "utterance": "en-test-0",
        "setting": "en",
        "hypothesis": model.text(hypothesis),
        "reference": "the dog sleeps",
        "forced": 0,
        "version": xattn.__version__,
        **asdict(SMALL),
    }
    del expected["seconds"]  # in the maps, this is how long they took
    assert {name: maps.attrs[name] for name in expected} == expected
    assert set(maps.attrs) - set(expected) == {
        *("audio", "seconds", "input_reliability", "encoder_reliability", "hidden_divergence")
    }
    assert len(maps.audio) == 16 and maps.seconds > 0


def test_encoder_saliency_follows_its_definition(maps, model, utterance):
    expected = by_definition(model, utterance, "en", "encoder", 10, 0.7)
    assert expected.max() > 0.1
    np.testing.assert_allclose(maps.encoder_saliency, expected, rtol=1e-4, atol=1e-6)


def test_input_saliency_follows_its_definition(maps, model, utterance):
    expected = by_definition(model, utterance, "en", "input", 12, 0.5)
    assert expected.max() > 0.1
    np.testing.assert_allclose(maps.input_saliency, expected, rtol=1e-4, atol=1e-6)


def test_saliency_of_windows_follows_its_definition(model, utterance):
    maps = quietly(model, utterance, {"partition": "windows"})
    expected = by_definition(model, utterance, "en", "input", 12, 0.5, partition=windows)
    assert expected.max() > 0.1 and (expected == expected[..., :1]).all()
    np.testing.assert_allclose(maps.input_saliency, expected, rtol=1e-4, atol=1e-6)
    assert maps.partition == "windows"


def test_maps_follow_from_the_scores_of_all_masks(maps, utterance):
    steps = Masks(Partition.of(np.arange(maps.sizes["step"])[None]), 10, 0.7, 0, f"{utterance.id}/encoder")
    _, hidden = steps.draw(0, 10)
    sums, counts = maps.encoder_scores.values.T.astype(np.float64) @ hidden, hidden.sum(axis=0)
    expected = np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)
    np.testing.assert_allclose(maps.encoder_saliency, expected, rtol=1e-6)
    segments = Masks(Partition.of(slic_pyramid(maps.features.values)), 12, 0.5, 0, f"{utterance.id}/input")
    expected = maps.input_scores.values.T.astype(np.float64) @ segments.draw(0, 12)[1]
    np.testing.assert_allclose(maps.segment_score, expected, rtol=1e-6)


def test_numbers_change_only_with_a_new_version(maps):
    """Stored maps stay valid until VERSION is raised, so raise it with any change that moves these numbers."""
    found = (
        float(maps.input_saliency.mean()), float(maps.encoder_saliency.mean()), float(maps.cross_attention[1, 0, 0, 2])
    )  # fmt: skip
    assert VERSION == 7
    assert found == pytest.approx((0.067363, 0.192280, 0.021243), rel=1e-3)


def test_attention_comes_from_the_forced_hypothesis(maps, model, utterance):
    states = model.encode(model.features(utterance.audio())[None])
    ids = torch.tensor([4, *(model.tokenizer.piece_to_id(token) for token in maps.token.values[:-1])])
    np.testing.assert_allclose(maps.cross_attention, torch.stack(model.attentions(states, ids).cross)[:, 0], atol=1e-6)


def test_parameters_reach_the_masks(model, utterance):
    options = {"input_masks": 6, "encoder_masks": 4, "input_p": 0.3, "encoder_p": 0.4, "seed": 5}
    changed = quietly(model, utterance, options)
    for place, masks, p in (("input", 6, 0.3), ("encoder", 4, 0.4)):
        expected = by_definition(model, utterance, "en", place, masks, p, seed=5)
        np.testing.assert_allclose(changed[f"{place}_saliency"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("estimator", ["mean", "ridge"])
def test_halves_of_the_reduced_map_are_stored_and_their_reliability(model, utterance, estimator):
    maps = quietly(model, utterance, {"input_masks": 60, "encoder_masks": 40, "estimator": estimator})
    spoken = maps.token.values != "</s>"
    for place in PLACES:
        scores, name, masks = maps[f"{place}_scores"].values, f"{place}_saliency", masks_of(maps, place)
        labels = masks.partition.labels
        np.testing.assert_allclose(estimate(scores, masks, estimator).cells(labels), maps[name], rtol=1e-5, atol=1e-7)
        first = np.arange(len(scores)) // len(labels) % 2 == 0
        halves = []
        for used in (first, ~first):
            cells = estimate(scores, masks, estimator, used).cells(labels)
            halves.append(normalised_saliency(maps[name].copy(data=cells), maps).values)
        stored = maps[f"{place}_halves"]
        assert stored.dims == ("half", "token", "step") and stored.dtype == np.float32
        np.testing.assert_allclose(stored[:, spoken], halves, rtol=1e-5, atol=1e-5)
        r = np.corrcoef(*(each.ravel() for each in halves))[0, 1]
        assert maps.attrs[f"{place}_reliability"] == pytest.approx(2 * r / (1 + r))


def test_too_few_perturbations_have_no_halves(model, utterance):
    maps = quietly(model, utterance, {"input_masks": 5, "encoder_masks": 2})
    assert "input_halves" not in maps and np.isnan(maps.input_reliability)  # two halves of three levels need six
    assert maps.encoder_halves.shape[0] == 2 and np.isfinite(maps.encoder_reliability)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("partition", ["superpixels", "windows"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_masks_that_hide_nothing_or_everything_give_constant_maps_without_reliability(
    model, utterance, capsys, estimator, partition
):
    given = replace(SMALL, estimator=estimator, partition=partition, reliability=0.8)
    for probabilities in ((0.0, 1.0), (1.0, 0.0)):
        extreme = replace(given, input_p=probabilities[0], encoder_p=probabilities[1])
        maps = explain(model, utterance, occlusion=extreme)
        assert "Reliability: SM^X unknown (12 masks), SM^H unknown (10 masks)\n" in capsys.readouterr().out
        for place, p in zip(PLACES, probabilities, strict=True):
            found = maps[f"{place}_saliency"].values.reshape(maps.sizes["token"], -1)
            assert (found == found[:, :1]).all() and f"{place}_halves" not in maps
            assert p == 1 or not found.any()
    heatmaps(maps).canvas.draw()
    plt.close()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("masks", [1, 2, 3])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_maps_of_a_few_masks_are_defined(model, utterance, estimator, masks):
    maps = quietly(model, utterance, {"input_masks": masks, "encoder_masks": masks, "estimator": estimator})
    assert np.isfinite(maps.input_saliency).all() and np.isfinite(maps.encoder_saliency).all()
    assert np.isnan(maps.input_reliability)
    assert np.isnan(maps.encoder_reliability) or (masks > 1 and "encoder_halves" in maps)
    assert maps.encoder_saliency.any() == (masks > 1 or not estimator.endswith("ridge"))
    heatmaps(maps).canvas.draw()
    plt.close()


def test_perturbations_stop_when_the_maps_are_reliable(model, utterance):
    many = {"input_masks": 250, "encoder_masks": 250, "batch_size": 32}
    everything = quietly(model, utterance, many)
    reached = quietly(model, utterance, many | {"reliability": 0.0}).attrs  # after the first check
    target = max(reached[f"{place}_reliability"] for place in PLACES) + 0.01
    stopped = quietly(model, utterance, many | {"reliability": target})
    for place in PLACES:
        assert everything.sizes[f"{place}_mask"] == 250
        number = stopped.sizes[f"{place}_mask"]
        assert number in (90, 135, 202, 250)
        assert stopped.attrs[f"{place}_reliability"] >= target or number == 250
        assert np.allclose(stopped[f"{place}_scores"], everything[f"{place}_scores"][:number], rtol=1e-4, atol=1e-6)
    assert min(stopped.sizes[f"{place}_mask"] for place in PLACES) < 250


@pytest.fixture
def clock(monkeypatch):
    """A clock on which every perturbation, and nothing else, takes a second."""
    clock, whole = Clock(), occlusion.divergence_from
    monkeypatch.setattr(occlusion, "time", clock)
    monkeypatch.setitem(explain.__globals__, "time", clock)
    monkeypatch.setitem(explain.__globals__, "divergence_from", lambda log_p: clock.slow(whole(log_p)))
    return clock


@pytest.mark.parametrize(
    ("seconds", "masks", "numbers"),
    [
        (40, (200, 200), (32, 16)),  # SM^X has three quarters, 30 s: batches of 8 end at 32 s and, for SM^H, at 48 s
        (1, (200, 200), (8, 8)),  # one batch of each
        (40, (16, 200), (16, 32)),  # SM^H has what SM^X did not need
        (40, (200, 10), (32, 10)),
        (1000, (20, 20), (20, 20)),
    ],
)
def test_perturbations_stop_at_the_time_limit(model, utterance, clock, seconds, masks, numbers):
    fewer = {"batch_size": 8, "seconds": seconds}
    limited = quietly(model, utterance, fewer | dict(zip(("input_masks", "encoder_masks"), masks, strict=True)))
    assert tuple(limited.sizes[f"{place}_mask"] for place in PLACES) == numbers
    assert clock.now == 1000 + sum(numbers)
    alone = quietly(model, utterance, {"batch_size": 8, "input_masks": numbers[0], "encoder_masks": numbers[1]})
    names = {"input_masks": None, "encoder_masks": None}
    xr.testing.assert_identical(
        without_seconds(limited).assign_attrs(names), without_seconds(alone).assign_attrs(names)
    )


@pytest.mark.parametrize(("target", "numbers"), [(0.5, (60, 60)), (0.6, (155, 60))])
def test_the_time_limit_and_the_target_can_be_combined(model, utterance, clock, monkeypatch, target, numbers):
    """The target is met at the first check, or SM^X ends with a batch after 150 s and SM^H with one after 200 s."""
    monkeypatch.setitem(explain.__globals__, "_reliability", lambda *_: 0.5)
    many = {"input_masks": 400, "encoder_masks": 400, "batch_size": 20, "seconds": 200, "reliability": target}
    maps = quietly(model, utterance, many)
    assert (maps.sizes["input_mask"], maps.sizes["encoder_mask"]) == numbers


def test_a_first_look_stops_after_two_minutes(model, utterance, monkeypatch):
    used = []

    def noting(model, utterance, directions, occlusion, **options):
        used.append(occlusion)
        few = replace(occlusion, input_masks=12, encoder_masks=10)
        return explain_directions(model, utterance, directions, few, **options)

    monkeypatch.setitem(explain.__globals__, "explain_directions", noting)
    maps = explain(model, utterance, progress=False)
    assert used == [Occlusion(reliability=0.6, seconds=120).on(model)]
    assert (used[0].input_masks, used[0].encoder_masks) == (8000, 8000)
    assert (maps.partition, maps.estimator, maps.input_p, maps.encoder_p) == ("windows", "sqrt_ridge", 0.5, 0.7)
    assert np.array_equal(maps.segmentation[0], windows(maps.features.values)[0])
    assert Occlusion().seconds is None


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_the_batch_size_changes_only_rounding(maps, model, utterance, batch_size):
    other = quietly(model, utterance, {"batch_size": batch_size})
    assert np.array_equal(other.segment_count, maps.segment_count)
    for name in ("input_saliency", "encoder_saliency"):
        np.testing.assert_allclose(other[name], maps[name], rtol=1e-4, atol=1e-6)


@pytest.fixture
def bfloat16(monkeypatch):
    """Sets whether the processor says that it computes in bfloat16; torch emulates what it cannot do."""
    return lambda capable: monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": capable})


@pytest.fixture(scope="module")
def shipped():
    return xattn.load_model(Path(__file__).parents[1] / "data" / "models" / "base")


@pytest.mark.parametrize("number", [0, 3])
def test_bfloat16_gives_the_maps_of_float32(shipped, number, bfloat16):
    bfloat16(True)
    utterance = xattn.load_corpus(Path(__file__).parents[1] / "data", language="en", split="test")[number]
    many = Occlusion(input_masks=200, encoder_masks=200, **PUBLISHED)
    exact, rounded = (
        quietly(shipped, utterance, replace(many, precision=precision)) for precision in ("float32", "bfloat16")
    )
    assert rounded.precision == "bfloat16" and exact.hypothesis == rounded.hypothesis
    assert np.array_equal(exact.segment_count, rounded.segment_count)
    spoken = exact.token.values != "</s>"
    for place, like, nearest in (("input", 0.95, 0.05), ("encoder", 0.995, 0.01)):
        scores = [maps[f"{place}_scores"].values[:, spoken] for maps in (exact, rounded)]
        assert not np.array_equal(*scores)
        assert np.corrcoef(*(each.ravel() for each in scores))[0, 1] > 0.9995
        by_token = np.array([np.corrcoef(*pair)[0, 1] for pair in zip(*(each.T for each in scores), strict=True)])
        matters = (
            scores[0].mean(axis=0) > 0.02
        )  # nats; for tokens that hardly depend on the input, most of the score is rounding
        assert np.median(by_token) > 0.999 and by_token[matters].min() > 0.995 and by_token.min() > 0.8
        assert 5 < matters.sum() < spoken.sum()
        saliencies = [maps[f"{place}_saliency"] for maps in (exact, rounded)]
        reduced = [normalised_saliency(saliency, exact).values.ravel() for saliency in saliencies]
        assert np.corrcoef(*reduced)[0, 1] > like
        rho = [correlate(maps.cross_attention, maps[f"{place}_saliency"]) for maps in (exact, rounded)]
        for variable in abs(rho[0] - rho[1]).values():
            assert variable.max() < nearest


def test_the_model_and_its_device_decide_the_batch_size(model, utterance, monkeypatch):
    for device, size in (("cpu", 32), ("cuda", 128)):
        with monkeypatch.context() as patch:
            patch.setattr(type(model), "device", torch.device(device))
            assert Occlusion(precision="float32").on(model).batch_size == size
            assert Occlusion(batch_size=5, precision="float32").on(model).batch_size == 5
    assert quietly(model, utterance, {"batch_size": None}).batch_size == 32


def test_the_device_decides_the_precision(model, utterance, bfloat16):
    for capable, decided in ((True, "bfloat16"), (False, "float32")):
        bfloat16(capable)
        assert Occlusion().on(model).precision == decided
        assert Occlusion(precision="float32").on(model).precision == "float32"
        assert quietly(model, utterance, {"precision": "auto"}).precision == decided


def test_bfloat16_becomes_float32_on_a_processor_without_it(model, utterance, maps, bfloat16, capsys):
    for capable, decided in ((True, "bfloat16"), (False, "float32")):
        bfloat16(capable)
        found = quietly(model, utterance, {"precision": "bfloat16"})
        assert found.precision == decided
        assert np.array_equal(found.encoder_scores, maps.encoder_scores) == (decided == "float32")
        line = "Precision: float32, because this processor does not compute in bfloat16.\n"
        assert capsys.readouterr().out == line * (not capable)
    xr.testing.assert_identical(without_seconds(found), without_seconds(maps))


def test_a_prompt_of_two_tokens_has_no_rows(model, utterance):
    class TwoTags(ConformerModel):
        def prompt(self, direction):
            return torch.tensor([3, self.config.language_ids[direction]])

    longer = TwoTags(model.network, model.tokenizer, "two", "hash")
    maps = quietly(longer, utterance)
    expected = by_definition(longer, utterance, "en", "encoder", 10, 0.7)
    assert maps.sizes["token"] == len(expected)
    np.testing.assert_allclose(maps.encoder_saliency, expected, rtol=1e-4, atol=1e-6)
    states = longer.encode(longer.features(utterance.audio())[None])
    ids = longer.generate(longer.features(utterance.audio())[None], "en")[0]
    attention = torch.stack(longer.attentions(states, torch.cat([longer.prompt("en"), ids[:-1]])).cross)[:, 0]
    np.testing.assert_allclose(maps.cross_attention, attention[:, :, 1:], atol=1e-6)


def test_two_directions_share_the_encoder_passes(model, utterance, maps, monkeypatch):
    alone = [maps, quietly(model, utterance, translate_to="it")]
    calls = counted(model, monkeypatch, "encode")
    both = explain_directions(model, utterance, ["en", "en-it"], SMALL)
    assert calls == [1, 5, 5, 2, 1]  # first nothing is hidden, last everything
    assert [item.setting for item in both] == ["en", "en-it"]
    assert both[0].hypothesis != both[1].hypothesis
    assert [item.reference for item in both] == ["the dog sleeps", "il cane dorme"]
    for together, single in zip(both, alone, strict=True):
        xr.testing.assert_identical(without_seconds(together), without_seconds(single))


def without_origin(maps):
    """Maps without the attributes in which recordings of the same samples differ."""
    return maps.assign_attrs(dict.fromkeys(("seconds", "utterance", "reference", "recording")))


def test_a_recording_can_be_given_in_many_forms(model, tmp_path):
    samples = (0.1 * np.random.default_rng(0).standard_normal((14_400, 2))).astype(np.float32)
    path = tmp_path / "my talk.wav"
    soundfile.write(path, samples, 24_000, subtype="FLOAT")
    content, few = path.read_bytes(), {"input_masks": 4, "encoder_masks": 4}
    expected = quietly(model, path, few)
    assert (expected.utterance, expected.setting, expected.reference) == ("my talk", "en", "")
    assert expected.sizes["time"] == 1 + (9600 - 400) // 160
    xr.testing.assert_identical(*map(without_seconds, (quietly(model, str(path), few), expected)))
    memory = quietly(model, samples, few, rate=24_000)
    assert re.fullmatch("recording-[0-9a-f]{8}", memory.utterance) and memory.audio == expected.audio
    # The masks depend on the name, so recordings without one share theirs.
    assert not np.array_equal(memory.input_scores, expected.input_scores)
    with path.open("rb") as file:
        others = [quietly(model, file, few)]
    others += [
        quietly(model, audio, few)
        for audio in (
            (24_000, samples),
            {"array": samples, "sampling_rate": 24_000},
            io.BytesIO(content),
            content,
            xattn.data.utterance.utterance_from_recording(samples, 24_000),
        )
    ]
    others.append(quietly(model, torch.from_numpy(samples), few, rate=24_000))
    for other in others:
        xr.testing.assert_identical(without_seconds(other), without_seconds(memory))


def test_a_file_gives_the_maps_of_its_utterance(model, utterance, maps):
    own = quietly(model, utterance.audio_path)
    xr.testing.assert_identical(without_origin(own), without_origin(maps))
    assert (own.utterance, own.reference) == ("en-test-0", "")
    italian = quietly(model, utterance.audio_path, language="it")
    assert italian.setting == "it" and italian.hypothesis != own.hypothesis
    translated = quietly(model, utterance.audio_path, language="en", translate_to="it")
    assert (translated.setting, translated.hypothesis) == ("en-it", italian.hypothesis)


def test_maps_in_a_language_without_a_reference_have_none(model, utterance):
    found = {
        other: quietly(model, replace(utterance, target_language=other), translate_to="it").reference
        for other in ("", "it", "de")
    }
    assert found == {"": "il cane dorme", "it": "il cane dorme", "de": ""}


def test_what_is_given_overrules_the_language_of_an_utterance(model, utterance):
    assert quietly(model, utterance, language="it").setting == "it"
    assert quietly(model, utterance, translate_to="en").setting == "en"


def test_a_given_text_is_forced(model, utterance, maps):
    forced = quietly(model, utterance, text="the bird sings")
    assert "".join(forced.token.values) == "▁the▁bird▁sings</s>"
    assert (forced.hypothesis, forced.forced) == ("the bird sings", 1)
    features = model.features(utterance.audio())
    states, ids = model.encode(features[None]), model.token_ids("the bird sings")
    inputs = torch.cat([model.prompt("en"), ids[:-1]])
    attention = torch.stack(model.attentions(states, inputs).cross)[:, 0]
    np.testing.assert_allclose(forced.cross_attention, attention, atol=1e-6)
    log_p = model.decode(states, inputs)[0].double()
    _, hidden = masks_of(forced, "encoder").draw(0, 10)
    for number in (0, 7):
        perturbed = model.decode(states.masked_fill(torch.from_numpy(hidden[number])[:, None], 0.0), inputs)[0].double()
        expected = functional.kl_div(perturbed, log_p, log_target=True, reduction="none").sum(-1)
        np.testing.assert_allclose(forced.encoder_scores[number], expected, rtol=1e-3, atol=1e-5)
    again = quietly(model, utterance, text=maps.hypothesis)
    if again.token.values.tolist() == maps.token.values.tolist():  # its text can have other subwords
        np.testing.assert_allclose(again.encoder_saliency, maps.encoder_saliency, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="The text is empty: give the words to explain, or leave out text"):
        quietly(model, utterance, text=" ")
    with pytest.raises(ValueError, match=r"The text has \d+ tokens, but tiny writes at most 15: give a shorter text"):
        quietly(model, utterance, text="the dog sleeps " * 4)


def test_decoding_settings_reach_the_search(model, utterance):
    decoding = Decoding(beams=1, max_length=7, no_repeat_ngram=0)
    found = quietly(model, utterance, decoding=decoding)
    (ids,) = model.generate(model.features(utterance.audio())[None], "en", decoding=decoding)
    assert found.token.values.tolist() == model.tokens(ids) and len(ids) <= 6


def test_maps_can_be_correlated(maps):
    for place in PLACES:
        rho = correlate(maps.cross_attention, maps[f"{place}_saliency"])
        assert all(np.isfinite(variable).all() for variable in rho.values())


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
        ("estimator", "median", "There is no estimator 'median': choose one of mean, sqrt_mean, ridge, sqrt_ridge"),
        ("partition", "published", "There is no partition 'published': choose one of superpixels, spread, windows"),
        ("reliability", 2, "reliability is 2: give a number from 0 to 1"),
        ("seconds", 0, "seconds is 0: give a number above 0, or None"),
        ("seconds", -1.5, "seconds is -1.5: give a number above 0, or None"),
        ("seconds", float("nan"), "seconds is nan: give a number above 0, or None"),
    ],
)
def test_parameters_out_of_range_raise(parameter, value, sentence):
    with pytest.raises(ValueError, match=sentence):
        Occlusion(**{parameter: value})


def test_a_language_that_the_model_does_not_write_raises(model, utterance):
    with pytest.raises(ValueError, match="The model tiny does not write 'fr'; choose one of en, it"):
        quietly(model, utterance, translate_to="fr")
    with pytest.raises(ValueError, match="tiny does not support 'fr': choose one of en, it"):
        quietly(model, utterance, language="fr")


def test_an_empty_hypothesis_raises(model, utterance, monkeypatch):
    monkeypatch.setattr(model, "generate", lambda *_, **__: [torch.tensor([2])])
    with pytest.raises(ValueError, match="tiny wrote nothing for en-test-0 in 'en': check the recording"):
        quietly(model, utterance)


def test_weights_that_are_not_finite_raise(made, model, utterance, monkeypatch):
    broken = ConformerModel(made.network(), model.tokenizer, "broken", "hash")
    broken.network.encoder.conformer_layers[0].layernorm.bias.data[0] = float("nan")
    monkeypatch.setattr(broken, "generate", lambda *_, **__: [torch.tensor([9, 8, 2])])
    with pytest.raises(FloatingPointError, match="check its weights and the recording"):
        quietly(broken, utterance)


def printed(capsys, model, audio, occlusion=SMALL, **arguments):
    """The lines that `explain` prints, with progress bars in their last state."""
    explain(model, audio, occlusion=occlusion, **arguments)
    out, err = capsys.readouterr()
    assert err == ""
    return [line.rpartition("\r")[2] for line in out.split("\n")[:-1]]


def test_language_transcript_progress_and_reliability_are_printed(model, utterance, maps, capsys):
    lines = printed(capsys, model, utterance.audio_path)
    assert lines[:2] == [
        "Language: en (the default of tiny; set language= to change it)",
        f"Transcript: {maps.hypothesis}",
    ]
    bars = [re.match(r"SM\^([XH]): 100%.*\| (\d+)/(\d+) ", line) for line in lines[2:4]]
    assert [bar.groups() for bar in bars] == [("X", "12", "12"), ("H", "10", "10")]
    values = {place: maps.attrs[f"{place}_reliability"] for place in PLACES}
    assert lines.pop(4).startswith(
        f"What tiny wrote hardly depends on this recording ({maps.hidden_divergence:.2f} nats"
    )
    assert lines[4] == f"Reliability: SM^X {values['input']:.2f} (12 masks), SM^H {values['encoder']:.2f} (10 masks)"
    assert max(values.values()) < 0.3  # of so few masks
    times = [10 if value <= 0 else min(100, math.ceil(1.5 * (1 - value) / value)) for value in values.values()]
    assert lines[5:] == [
        "A map with a reliability below 0.3 can be mostly noise: try "
        f"occlusion=Occlusion(input_masks={12 * times[0]}, encoder_masks={10 * times[1]}, precision='float32', "
        "estimator='mean', partition='superpixels', reliability=1.0, batch_size=5)."
    ]
    lines = printed(capsys, model, utterance, translate_to="it")  # the language is known
    assert lines[0].startswith("Translation: ") and "Language" not in "".join(lines)
    assert printed(capsys, model, utterance, progress=False) == []


def test_the_line_of_progress_shows_how_many_masks_were_enough(model, utterance, capsys):
    given = replace(SMALL, input_masks=400, encoder_masks=400, reliability=0.0)  # enough at the first check
    maps = explain(model, utterance, occlusion=given)
    masks = [str(maps.sizes[f"{place}_mask"]) for place in PLACES]
    assert max(map(int, masks)) < 400
    bars = re.findall(r"SM\^([XH]): 100%\S* (\d+)/(\d+) ", capsys.readouterr().out)
    assert [bar for bar in bars if bar[2] != "400"] == [("X", masks[0], masks[0]), ("H", masks[1], masks[1])]


def test_the_line_of_progress_shows_the_longest_time(model, utterance, clock, capsys):
    lines = printed(capsys, model, utterance, replace(SMALL, seconds=100))
    assert [line for line in lines if line.startswith("SM")] == [
        "SM^X: 12 masks in 00:00, at most 01:15",
        "SM^H: 10 masks in 00:00, at most 01:28",  # the clock advances by a second for each mask
    ]


@pytest.mark.parametrize(
    ("values", "changes", "more"),
    [
        ((0.3, 0.9), {}, ""),
        ((0.29, 0.9), {}, "input_masks=48"),
        ((0.9, np.nan), {}, "encoder_masks=100"),
        ((np.nan, -0.5), {}, "input_masks=120, encoder_masks=100"),
        ((0.001, 0.9), {}, "input_masks=1200"),
        ((0.9, 0.9), {"seconds": 4}, ""),
        ((0.2, 0.9), {"seconds": 4}, "seconds=24"),  # of both kinds, the limit allows a batch
        ((0.2, 0.1), {"seconds": 2.5}, "seconds=35.0"),
        ((0.1, 0.2), {"seconds": 2.5}, "seconds=35.0"),
        ((0.9, 0.1), {"seconds": 2.5, "encoder_masks": 5}, "encoder_masks=70"),
        ((0.2, 0.1), {"seconds": 2.5, "encoder_masks": 5}, "seconds=15.0, encoder_masks=70"),
        ((0.2, 0.2), {"input_masks": 100, "encoder_masks": 100, "reliability": 0.1}, "reliability=0.8"),
        ((0.2, 0.2), {"input_masks": 100, "encoder_masks": 9, "reliability": 0.1}, "reliability=0.8, encoder_masks=54"),
    ],
)
def test_low_reliability_is_reported_with_what_would_raise_it(
    model, utterance, monkeypatch, clock, capsys, values, changes, more
):
    def half_maps(scores, masks, step_frames, *_):
        return np.full((2, scores.shape[1], len(step_frames)), values[masks.name.endswith("encoder")])

    monkeypatch.setitem(explain.__globals__, "half_maps", half_maps)
    monkeypatch.setitem(explain.__globals__, "_reliability", lambda halves, tokens: float(halves[0, 0, 0]))
    given = replace(SMALL, **changes)
    lines = printed(capsys, model, utterance, given)
    (line,) = [line for line in lines if line.startswith("Reliability")]
    texts = ["unknown" if np.isnan(value) else f"{value:.2f}" for value in values]
    assert re.match(rf"Reliability: SM\^X {texts[0]} \(\d+ masks\), SM\^H {texts[1]} \(\d+ masks\)$", line)
    found = [line for line in lines if "noise" in line]
    assert len(found) == bool(more)
    if more:
        (advice,) = re.findall(r"try occlusion=(Occlusion\(.*\))\.$", found[0])
        assert eval(advice) == replace(given, **eval(f"dict({more})"))
        assert ("unknown or below 0.3" in found[0]) == bool(np.isnan(values).any())


def test_a_time_limit_that_was_too_short_is_reported(model, utterance, monkeypatch, clock, capsys):
    monkeypatch.setitem(explain.__globals__, "_reliability", lambda halves, tokens: 0.5)
    lines = printed(capsys, model, utterance, replace(SMALL, seconds=4, reliability=0.6))
    assert lines[-1] == (
        "The time limit of 4 s ended before SM^X and SM^H reached a reliability of 0.6: "
        "occlusion=Occlusion(seconds=8) allows more masks."
    )
    for enough in ({"reliability": 0.4}, {"reliability": 1.0}, {"reliability": 0.6, "seconds": None}):
        lines = printed(capsys, model, utterance, replace(SMALL, **({"seconds": 4} | enough)))
        assert not any("time limit" in line for line in lines)


def test_occlusion_of_another_type_raises(model, utterance):
    with pytest.raises(TypeError, match=r"^occlusion is 'superpixels': give an xattn\.Occlusion, such as "):
        explain(model, utterance, occlusion="superpixels")


def test_the_only_language_of_a_model_is_printed_without_advice(model, utterance, monkeypatch, capsys):
    monkeypatch.setattr(model, "languages", ("en",), raising=False)
    assert printed(capsys, model, utterance.audio_path)[0] == "Language: en (the only one of tiny)"


def test_what_maps_of_windows_do_not_show_is_printed(model, utterance, capsys):
    sentence = (
        "SM^X comes from windows of 0.1 s and longer: it is coarse in time and silent about frequency. "
        'occlusion=Occlusion(partition="superpixels") shows both, with many more masks.'
    )
    for kind in ("superpixels", "spread", "windows"):
        lines = printed(capsys, model, utterance, replace(SMALL, partition=kind))
        assert [line for line in lines if "frequency" in line] == [sentence] * (kind == "windows")
        assert (lines[-1] == sentence) == (kind == "windows")


def test_the_model_s_default_is_not_the_language_that_it_translates_into(model, utterance, capsys):
    lines = printed(capsys, model, utterance.audio_path, translate_to="en")
    assert lines[0] == "Language: it (the default of tiny; set language= to change it)"
    assert lines[1].startswith("Translation: ")


class Interrupted(Exception):
    pass


def interrupted_after(monkeypatch, model, batches):
    """Let the model's encoder fail after so many batches; every batch is saved."""
    monkeypatch.setattr(occlusion, "CHECKPOINT_SECONDS", -1.0)
    calls, encode = [], model.encode

    def failing(features):
        calls.append(len(features))
        if len(calls) > batches:
            raise Interrupted
        return encode(features)

    monkeypatch.setattr(model, "encode", failing)


def test_an_interrupted_call_resumes(model, utterance, maps, cache, monkeypatch):
    with monkeypatch.context() as patch:
        interrupted_after(patch, model, 3)  # the recording itself and two batches of five
        with pytest.raises(Interrupted):
            quietly(model, utterance)
    (file,) = cache.iterdir()
    with np.load(file) as held:
        assert held["input"].shape == (10, maps.sizes["token"])
    calls = counted(model, monkeypatch, "encode")
    others = ({"seed": 1}, {"input_p": 0.4}), ({"translate_to": "it"}, {"text": "the dog"}, {"decoding": Decoding(1)})
    for changes in others[0]:
        quietly(model, utterance, changes)
    for arguments in others[1]:
        quietly(model, utterance, **arguments)
    assert calls == [1, 5, 5, 2, 1] * 5 and [*cache.iterdir()] == [file]  # none of them is the same call
    calls.clear()
    resumed = quietly(model, utterance)
    assert calls == [1, 2, 1] and not [*cache.iterdir()]
    xr.testing.assert_identical(without_seconds(resumed), without_seconds(maps))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 damaged"])
def test_unreadable_scores_of_an_interrupted_call_are_ignored(model, utterance, maps, cache, monkeypatch, content):
    with monkeypatch.context() as patch:
        interrupted_after(patch, model, 3)
        with pytest.raises(Interrupted):
            quietly(model, utterance)
    (file,) = cache.iterdir()
    file.write_bytes(content)
    xr.testing.assert_identical(without_seconds(quietly(model, utterance)), without_seconds(maps))


def test_a_cache_that_cannot_be_written_is_reported_once(model, utterance, maps, cache, monkeypatch, capsys):
    cache.parent.mkdir()
    cache.write_text("a file in the place of the folder")
    monkeypatch.setattr(occlusion, "CHECKPOINT_SECONDS", -1.0)
    found = quietly(model, utterance)
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "is a file where a folder is needed: rename that file; the run continues" in out
    xr.testing.assert_identical(without_seconds(found), without_seconds(maps))


def test_a_model_can_be_pickled_before_and_after_it_explains(tiny_folder, utterance, maps):
    model = load_model(tiny_folder)
    copies = [pickle.loads(pickle.dumps(model))]
    quietly(model, utterance)
    copies.append(pickle.loads(pickle.dumps(model)))
    for copy in copies:
        assert (copy.name, copy.weights_hash) == (model.name, model.weights_hash)
        xr.testing.assert_identical(without_seconds(quietly(copy, utterance)), without_seconds(maps))


def test_a_channel_of_a_recording_is_explained(tmp_path, model, utterance):
    samples, path = utterance.audio(), tmp_path / "stereo.wav"
    soundfile.write(path, np.stack([samples, -samples], axis=1), SAMPLE_RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "mono.wav", samples, SAMPLE_RATE, subtype="FLOAT")
    with pytest.raises(ValueError, match=r"stereo\.wav has 2 channels that cancel each other .* such as channel=0\."):
        quietly(model, path, language="en")
    found = quietly(model, path, language="en", channel=0)
    assert found.attrs["audio"] == quietly(model, tmp_path / "mono.wav", language="en").attrs["audio"]
    with pytest.raises(ValueError, match=r"channel does not apply to an Utterance, which names its own: leave it"):
        quietly(model, utterance, channel=0)


def test_an_output_that_hardly_depends_on_the_recording_is_told_from_one_that_does(capsys):
    base = load_model(ROOT / "data" / "models" / "base")
    noise = 0.1 * np.random.default_rng(1).standard_normal(3 * SAMPLE_RATE).astype(np.float32)
    spoken = next(each for each in load_corpus(ROOT / "data", language="en", split="test") if each.duration > 4)
    found, printed = {}, {}
    capsys.readouterr()
    for name, audio in (("noise", noise), ("speech", spoken.audio())):
        found[name] = explain(base, audio, rate=SAMPLE_RATE, language="en", occlusion=SMALL).hidden_divergence
        printed[name] = "hardly depends on this recording" in capsys.readouterr().out
    assert printed == {"noise": True, "speech": False}
    assert found["noise"] < 0.9 < 1.5 < found["speech"]


def test_the_divergence_of_a_hidden_input_follows_its_definition(model, utterance, maps):
    features = model.features(utterance.audio())
    ids = model.generate(features[None], "en")[0]
    inputs, rows = torch.cat([model.prompt("en"), ids])[:-1], slice(len(model.prompt("en")) - 1, None)
    log_p, log_q = (model.decode(model.encode(each[None]), inputs)[0, rows] for each in (features, 0 * features))
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)[:-1].mean()
    assert maps.hidden_divergence == pytest.approx(float(expected), rel=1e-4)
