"""Explaining a corpus: storing, skipping, resuming, keys, cost, and the model on a worker."""

import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import xarray as xr
from conftest import counted, without_seconds

import xattn.attribution.occlusion
from xattn import runs, store, utterances_from_folder
from xattn.attribution import settings
from xattn.audio import SAMPLE_RATE
from xattn.data.utterance import Utterance
from xattn.explain import Occlusion, determinants, explain, explain_directions, reliabilities
from xattn.models import load_model
from xattn.runs import estimate_cost, explain_corpus, explain_into
from xattn.store import load_maps

SMALL = Occlusion(input_masks=12, encoder_masks=10, batch_size=5, precision="float32")
EXPLAIN = sys.modules["xattn.explain"]  # `xattn.explain` is the function


class Untouchable:
    """A model that can only be asked for its name, device, batch size and hash."""

    def __init__(self, model):
        self.name, self.device, self.weights_hash = model.name, model.device, model.weights_hash
        self.batch_size = model.batch_size


def test_corpus_is_explained_and_stored_once(model, utterances, tmp_path, capsys):
    explain_corpus(model, utterances, tmp_path, translate_to=["en", "it"], occlusion=SMALL)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["tiny en+en-it 1/2 en-test-0", "tiny en+en-it 2/2 en-test-1"]
    assert all("s per utterance" in line and line.endswith("s left") for line in lines)
    assert lines[-1].endswith(" 0 s left")
    assert "; what tiny wrote (en, en-it) hardly depends on the recording; " in lines[-1]  # it is not trained
    for direction, target in (("en", "en"), ("en-it", "it")):
        stored = list(load_maps(tmp_path, "tiny", direction))
        assert [item.utterance for item in stored] == ["en-test-0", "en-test-1"]
        expected = explain(model, utterances[1], translate_to=target, occlusion=SMALL, progress=False)
        assert f"{direction} {reliabilities(expected)}" in lines[1]
        del stored[1].attrs["key"]
        xr.testing.assert_identical(without_seconds(stored[1]), without_seconds(expected))

    for again in (SMALL, replace(SMALL, batch_size=64)):
        explain_corpus(Untouchable(model), utterances, tmp_path, translate_to=["en", "it"], occlusion=again)
        assert capsys.readouterr().out == ""
    with pytest.raises(AttributeError):
        explain_corpus(Untouchable(model), utterances, tmp_path, occlusion=replace(SMALL, seed=1))


def test_a_corpus_is_explained_without_a_time_limit(model, utterances, tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr(runs, "explain_into", lambda *_, occlusion, **options: used.append(occlusion) or ({}, ""))
    explain_corpus(model, utterances, tmp_path)
    assert used == [Occlusion().on(model)] * 2 and used[0].seconds is None


def test_a_direction_without_references_is_explained(model, utterances, tmp_path):
    german = [replace(utterances[0], target_language="de"), utterances[1]]
    explain_corpus(model, german, tmp_path, translate_to=["en", "it"], occlusion=SMALL)
    found = {each: [maps.reference for maps in load_maps(tmp_path, "tiny", each)] for each in ("en", "en-it")}
    assert found == {
        "en": [utterance.transcript for utterance in utterances],
        "en-it": ["", utterances[1].translation],
    }


def test_interrupted_corpus_resumes(model, utterances, tmp_path, capsys, monkeypatch):
    explain_corpus(model, utterances[:1], tmp_path, occlusion=SMALL)
    first = next((tmp_path / "tiny" / "en").glob("*.zarr.zip"))
    before = first.stat().st_mtime_ns
    capsys.readouterr()
    calls = counted(model, monkeypatch, "encode")
    explain_corpus(model, utterances, tmp_path, occlusion=SMALL)
    assert capsys.readouterr().out.startswith("tiny en 2/2 en-test-1: ")
    assert calls == [1, 5, 5, 2, 1] and first.stat().st_mtime_ns == before


def test_estimated_size_is_that_of_the_stored_maps(model, utterances):
    few = replace(SMALL, input_masks=50, encoder_masks=50, batch_size=10)
    many = replace(few, input_masks=5000, encoder_masks=5000)
    sizes = []
    for occlusion in (few, many):
        seconds, size = estimate_cost(model, utterances, ["en", "en-it"], occlusion)
        assert seconds > 0
        sizes.append(size)
    both = explain_directions(model, utterances[1], ["en", "en-it"], few)
    stored = sum(maps.drop_vars("input_saliency").nbytes for maps in both)
    share = sum(utterance.duration for utterance in utterances) / utterances[1].duration
    assert sizes[0] == pytest.approx(stored * share)
    tokens = sum(maps.sizes["token"] for maps in both)
    assert sizes[1] - sizes[0] == pytest.approx(2 * 4950 * tokens * 4 * share)


def test_estimates_count_all_masks_even_if_a_run_could_stop_early(model, utterances, monkeypatch):
    calls = counted(model, monkeypatch, "encode")
    occlusion = replace(SMALL, batch_size=30, reliability=0.0, seconds=1e-6)
    estimate_cost(model, utterances, ["en"], occlusion)
    assert calls == [1, 30, 1, 1, 30, 1, 1, 30, 30, 30, 1, 1, 30, 1]


@pytest.mark.parametrize("killed_at", [2, 4, 5, 7])
def test_interrupted_utterance_resumes_without_scoring_a_batch_again(
    model, utterances, tmp_path, monkeypatch, killed_at
):
    """Batches 1 to 3 mask the spectrogram, 4 to 7 the encoder output."""
    occlusion = replace(SMALL, encoder_masks=20)
    expected = explain(model, utterances[0], occlusion=occlusion, progress=False)
    monkeypatch.setattr("xattn.attribution.occlusion.CHECKPOINT_SECONDS", -1.0)
    scored, whole = [], xattn.attribution.occlusion.divergence_from

    def interrupted(log_p):
        divergence = whole(log_p)

        def counted(log_q):
            scored.append(len(log_q))
            if len(scored) == killed_at:
                raise KeyboardInterrupt
            return divergence(log_q)

        return counted

    monkeypatch.setattr(EXPLAIN, "divergence_from", interrupted)
    with pytest.raises(KeyboardInterrupt):
        explain_corpus(model, utterances[:1], tmp_path, occlusion=occlusion)
    (partial,) = (tmp_path / "tiny" / "en").iterdir()
    assert partial.name == ".en-test-0.partial.npz"
    explain_corpus(model, utterances[:1], tmp_path, occlusion=occlusion)
    assert len(scored) == 7 + 1  # 12 and 20 masks in batches of 5, and the interrupted batch
    (stored,) = load_maps(tmp_path, "tiny", "en")
    del stored.attrs["key"]
    xr.testing.assert_identical(without_seconds(stored), without_seconds(expected))
    assert not partial.exists()


def test_maps_of_a_smaller_run_exclude_the_rest_of_a_larger_one(model, utterances, tmp_path):
    explain_corpus(model, utterances, tmp_path, occlusion=SMALL)
    explain_corpus(model, utterances[1:], tmp_path, occlusion=replace(SMALL, seed=5))
    (only,) = load_maps(tmp_path, "tiny", "en")
    assert (only.utterance, only.seed) == ("en-test-1", 5)


def test_utterance_with_fewer_than_two_tokens_is_skipped(model, utterances, tmp_path, capsys, monkeypatch):
    whole, first = model.generate, model.features(utterances[0].audio())[None]
    short = torch.tensor([9, 2])  # one token before </s>

    def generate(features, direction, **options):
        return [short] if features.shape == first.shape else whole(features, direction, **options)

    monkeypatch.setattr(model, "generate", generate)
    assert first.shape != model.features(utterances[1].audio())[None].shape
    explain_corpus(model, utterances, tmp_path, occlusion=SMALL)
    assert [item.utterance for item in load_maps(tmp_path, "tiny", "en")] == [utterances[1].id]
    printed = capsys.readouterr().out
    assert printed.startswith("tiny en 1/2 en-test-0: skipped (tiny wrote ")
    assert "for en-test-0 in 'en': check" in printed
    explain(model, utterances[0], occlusion=SMALL)  # a single token can be explained


def test_corrected_transcript_reaches_the_maps_without_computing_them_again(model, utterances, tmp_path, capsys):
    options = {"translate_to": ["en", "it"], "occlusion": SMALL}
    explain_corpus(model, utterances, tmp_path, **options)
    capsys.readouterr()
    corrected = [replace(utterances[0], transcript="the dog slept"), utterances[1]]
    explain_corpus(Untouchable(model), corrected, tmp_path, **options)
    assert capsys.readouterr().out == ""
    found = {each: [maps.reference for maps in load_maps(tmp_path, "tiny", each)] for each in ("en", "en-it")}
    assert found == {
        "en": ["the dog slept", utterances[1].transcript],
        "en-it": [utterance.translation for utterance in utterances],
    }


@pytest.mark.parametrize("reliability", [1.0, 0.99])
def test_maps_of_one_direction_can_be_reused_unless_all_directions_decide_when_to_stop(
    model, utterances, tmp_path, reliability
):
    explain = partial(explain_corpus, folder=tmp_path, occlusion=replace(SMALL, reliability=reliability))
    explain(model, utterances[:1], translate_to=["en", "it"])
    explain(Untouchable(model), utterances[:1], translate_to=["it", "en"])
    with nullcontext() if reliability == 1 else pytest.raises(AttributeError):
        explain(Untouchable(model), utterances[:1])


LATER_VERSIONS = {"kaldi-native-fbank": "1.22.5", "scipy": "1.17.1", "soundfile": "0.14.0", "av": "18.1.0"}


@pytest.fixture
def key_with(model, utterances, tmp_path, monkeypatch):
    """The key of stored maps if some packages had other versions."""

    def key(versions):
        with monkeypatch.context() as patch:
            patch.setattr(EXPLAIN, "version", lambda name: versions.get(name) or version(name))
            explain_into(model, utterances[0], ["en"], tmp_path, SMALL)
        return store.load(store.path_of(tmp_path, "tiny", "en", utterances[0].id)).key

    return key


def test_keys_of_stored_maps_are_those_from_before_four_libraries_entered(key_with, monkeypatch):
    key = key_with(LATER_VERSIONS)
    monkeypatch.setattr(EXPLAIN, "LATER_LIBRARIES", {})
    assert key_with({}) == key


def test_keys_of_stored_maps_change_with_the_channel(model, utterances, tmp_path):
    """Without a channel, a key is as it was before utterances had one."""
    samples = utterances[0].audio()
    soundfile.write(tmp_path / "a.wav", np.stack([samples, samples[::-1]], axis=1), SAMPLE_RATE, subtype="FLOAT")
    keys = []
    for channel in (None, 0, 1):
        (utterance,) = utterances_from_folder(tmp_path, "en", channel=channel)
        explained, _ = explain_into(model, utterance, ["en"], tmp_path / "maps", SMALL)
        keys.append(explained["en"])
    assert len(set(keys)) == 3
    origin = determinants(model, (tmp_path / "a.wav").read_bytes(), "a", SMALL)
    assert keys[0] == store.key_of(origin | {"settings": ["en"], "setting": "en"})


def test_keys_of_stored_maps_change_with_the_version_of_every_library(key_with):
    libraries = ["torch", "transformers", "scikit-image", "numpy", *LATER_VERSIONS]
    keys = {key_with(LATER_VERSIONS | {library: "0.1"}) for library in libraries}
    assert len(keys | {key_with(LATER_VERSIONS)}) == len(libraries) + 1


def test_workers_receive_absolute_paths_and_the_id_of_a_hub_model(
    model, utterances, tiny_folder, tmp_path, monkeypatch
):
    received = []

    class Client:
        def submit(self, function, utterance, **options):
            received.append((function.args[0], function.args[3].keywords["folder"], utterance))
            raise ConnectionError

    monkeypatch.chdir(tmp_path)
    (tmp_path / "linked").symlink_to(tiny_folder)  # a linked model is named after the link
    relative = [
        replace(u, audio_path=Path(os.path.relpath(u.audio_path)), manifest=Path(os.path.relpath(u.manifest)))
        for u in utterances
    ]
    for source in ("linked", "FBK-MT/fama-small@0123abc"):
        monkeypatch.setattr(model, "source", source)
        with pytest.raises(ConnectionError):
            explain_corpus(model, relative, os.path.relpath(tmp_path), occlusion=SMALL, workers=Client())
    sources = str(tmp_path / "linked"), "FBK-MT/fama-small@0123abc"
    assert received == [(source, tmp_path, utterances[0]) for source in sources]


def test_worker_uses_exactly_the_requested_weights(made, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "tiny")

    def model_of_worker(weights_hash):
        return runs._on_worker(str(folder), "cpu", weights_hash, lambda model, utterance: model, None)

    first = load_model(folder).weights_hash
    loaded = model_of_worker(first)
    assert loaded.weights_hash == first and model_of_worker(first) is loaded
    made.network(seed=1).save_pretrained(folder)  # trained again in the same folder
    second = load_model(folder).weights_hash
    assert second != first and model_of_worker(second).weights_hash == second
    with pytest.raises(ValueError, match="tiny holds other weights than the model that was loaded from it: load it"):
        model_of_worker(first)


def test_threads_of_a_worker_run_one_at_a_time(model, tiny_folder):
    running, most = [], []

    def unit(model, number):
        running.append(number)
        most.append(len(running))
        time.sleep(0.02)
        running.remove(number)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda n: runs._on_worker(str(tiny_folder), "cpu", model.weights_hash, unit, n), range(4)))
    assert most == [1, 1, 1, 1]


def test_bad_recordings_are_left_out_by_name_with_the_reason(model, utterances, tmp_path, monkeypatch, capsys):
    audio = {name: tmp_path / f"{name}.wav" for name in ("empty", "silent", "cut short", "30 ms", "long")}
    audio["missing"] = tmp_path / "missing.wav"
    noise = 0.1 * np.random.default_rng(0).standard_normal(3 * 16_000)
    audio["empty"].touch()
    soundfile.write(audio["silent"], np.zeros(16_000), 16_000)
    soundfile.write(audio["30 ms"], noise[:480], 16_000)
    soundfile.write(audio["long"], noise, 16_000)
    soundfile.write(audio["cut short"], noise, 16_000)
    audio["cut short"].write_bytes(audio["cut short"].read_bytes()[:40_000])
    bad = [Utterance(name, path, "en", 1.0) for name, path in audio.items()]
    corpus = [utterances[0], *bad, utterances[1]]
    most = model.pass_bytes(250, 16)
    monkeypatch.setattr(settings, "needed_bytes", lambda model, frames, bands, tokens: model.pass_bytes(frames, tokens))
    monkeypatch.setattr(settings, "free_bytes", lambda device: most)
    explain_corpus(model, corpus, tmp_path / "maps", occlusion=SMALL)
    lines = capsys.readouterr().out.splitlines()
    listed = lines.index("6 of 8 utterances have no maps:")
    reasons = dict(line.split(": ", 1) for line in lines[listed + 1 :])
    assert list(reasons) == [each.id for each in bad]
    expected = {
        "empty": "is empty (0 bytes)",
        "silent": "is silent (every sample is 0)",
        "cut short": "cut short.wav ends after 40000 of the 96044 bytes it announces",
        "30 ms": "lasts 30.0 ms, less than the 35 ms of two frames",
        "long": "long lasts 3 s, which needs about",
        "missing": "There is no audio file",
    }
    for name, words in expected.items():
        assert reasons[name].startswith("skipped (") and words in reasons[name]
        assert f"tiny en {2 + list(audio).index(name)}/8 {name}: {reasons[name]}" in "\n".join(lines)
    assert [maps.utterance for maps in load_maps(tmp_path / "maps", "tiny", "en")] == [
        each.id for each in utterances[:2]
    ]


def test_a_corpus_without_progress_prints_nothing(model, utterances, tmp_path, capsys):
    missing = Utterance("missing", tmp_path / "missing.wav", "en", 1.0)
    explain_corpus(model, [utterances[0], missing], tmp_path / "maps", occlusion=SMALL, progress=False)
    assert capsys.readouterr().out == ""
