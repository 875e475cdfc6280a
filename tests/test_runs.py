import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import xarray as xr
from conftest import counted, without_seconds

import xattn.occlusion
from xattn import runs, store
from xattn.explain import Occlusion, explain, explain_targets
from xattn.models import load_model
from xattn.runs import cost, explain_corpus

SMALL = {"input_masks": 12, "encoder_masks": 10, "batch_size": 5, "precision": "float32"}


class Untouchable:
    """A model of which only the name, the device and the hash may be read."""

    def __init__(self, model):
        self.name, self.device, self.weights_hash = model.name, model.device, model.weights_hash


def test_a_corpus_is_explained_into_the_store_once(model, utterances, tmp_path, capsys, monkeypatch):
    occlusion = Occlusion(**SMALL)
    explain_corpus(model, utterances, ["en", "en-it"], tmp_path, occlusion)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["tiny en+en-it 1/2 en-test-0", "tiny en+en-it 2/2 en-test-1"]
    assert all("s an utterance" in line and line.endswith("s left") for line in lines)
    assert lines[-1].endswith(" 0 s left")
    for setting, target in (("en", "en"), ("en-it", "it")):
        stored = list(store.load_all(tmp_path, "tiny", setting))
        assert [item.utterance for item in stored] == ["en-test-0", "en-test-1"]
        expected = explain(model, utterances[1], target, **SMALL)
        del stored[1].attrs["key"]
        xr.testing.assert_identical(without_seconds(stored[1]), without_seconds(expected))

    for again in (occlusion, Occlusion(**SMALL | {"batch_size": 64})):
        explain_corpus(Untouchable(model), utterances, ["en", "en-it"], tmp_path, again)
        assert capsys.readouterr().out == ""
    with pytest.raises(AttributeError):
        explain_corpus(Untouchable(model), utterances, ["en"], tmp_path, Occlusion(**SMALL | {"seed": 1}))


def test_an_interrupted_corpus_is_continued(model, utterances, tmp_path, capsys, monkeypatch):
    occlusion = Occlusion(**SMALL)
    explain_corpus(model, utterances[:1], ["en"], tmp_path, occlusion)
    first = next((tmp_path / "tiny" / "en").glob("*.zarr.zip"))
    before = first.stat().st_mtime_ns
    capsys.readouterr()
    calls = counted(model, monkeypatch, "encode")
    explain_corpus(model, utterances, ["en"], tmp_path, occlusion)
    assert capsys.readouterr().out.startswith("tiny en 2/2 en-test-1: ")
    assert calls == [1, 5, 5, 2] and first.stat().st_mtime_ns == before


def test_the_cost_of_a_corpus_is_foretold(model, utterances):
    few = Occlusion(input_masks=50, encoder_masks=50, batch_size=5, precision="float32")
    many = Occlusion(input_masks=5000, encoder_masks=5000, batch_size=5, precision="float32")
    sizes = []
    for occlusion in (few, many):
        seconds, size = cost(model, utterances, ["en", "en-it"], occlusion)
        assert seconds > 0
        sizes.append(size)
    both = explain_targets(model, utterances[1], ["en", "it"], few)
    stored = sum(maps.drop_vars("input_saliency").nbytes for maps in both)
    share = sum(utterance.duration for utterance in utterances) / utterances[1].duration
    assert sizes[0] == pytest.approx(stored * share)
    tokens = sum(maps.sizes["token"] for maps in both)
    assert sizes[1] - sizes[0] == pytest.approx(2 * 4950 * tokens * 4 * share)


@pytest.mark.parametrize("killed_at", [2, 4, 5, 7])
def test_a_kill_in_the_middle_of_an_utterance_costs_no_finished_batch(
    model, utterances, tmp_path, monkeypatch, killed_at
):
    """Killed at a batch of the spectrogram's masks or, after those three, of the encoder's; then continued."""
    occlusion = Occlusion(**SMALL | {"encoder_masks": 20})
    expected = explain(model, utterances[0], **asdict(occlusion))
    monkeypatch.setattr("xattn.occlusion.CHECKPOINT_SECONDS", -1.0)
    scored, whole = [], xattn.occlusion.divergence_from

    def dying(log_p):
        divergence = whole(log_p)

        def counted(log_q):
            scored.append(len(log_q))
            if len(scored) == killed_at:
                raise KeyboardInterrupt
            return divergence(log_q)

        return counted

    monkeypatch.setattr(sys.modules["xattn.explain"], "divergence_from", dying)
    with pytest.raises(KeyboardInterrupt):
        explain_corpus(model, utterances[:1], ["en"], tmp_path, occlusion)
    (partial,) = (tmp_path / "tiny" / "en").iterdir()
    assert partial.name == ".en-test-0.partial.npz"
    explain_corpus(model, utterances[:1], ["en"], tmp_path, occlusion)
    assert len(scored) == 7 + 1  # 12 and 20 masks in batches of 5, and the one that was interrupted
    (stored,) = store.load_all(tmp_path, "tiny", "en")
    del stored.attrs["key"]
    xr.testing.assert_identical(without_seconds(stored), without_seconds(expected))
    assert not partial.exists()


def test_a_smaller_run_leaves_the_rest_of_a_larger_one_out(model, utterances, tmp_path):
    explain_corpus(model, utterances, ["en"], tmp_path, Occlusion(**SMALL))
    explain_corpus(model, utterances[1:], ["en"], tmp_path, Occlusion(**SMALL | {"seed": 5}))
    (only,) = store.load_all(tmp_path, "tiny", "en")
    assert (only.utterance, only.seed) == ("en-test-1", 5)


def test_a_corpus_goes_on_without_an_utterance_that_has_no_output(model, utterances, tmp_path, capsys, monkeypatch):
    whole, first = model.generate, model.features(utterances[0].audio())[None]
    short = torch.tensor([9, 2])  # one token before </s>

    def generate(features, language):
        return [short] if features.shape == first.shape else whole(features, language)

    monkeypatch.setattr(model, "generate", generate)
    assert first.shape != model.features(utterances[1].audio())[None].shape
    explain_corpus(model, utterances, ["en"], tmp_path, Occlusion(**SMALL))
    assert [item.utterance for item in store.load_all(tmp_path, "tiny", "en")] == [utterances[1].id]
    printed = capsys.readouterr().out
    assert (
        printed.startswith("tiny en 1/2 en-test-0: left out (tiny wrote ") and "for en-test-0 in 'en': check" in printed
    )
    explain(model, utterances[0], **SMALL)  # a single token can be explained


def test_a_corrected_transcript_reaches_the_maps_and_costs_none(model, utterances, tmp_path, capsys):
    settings, occlusion = ["en", "en-it"], Occlusion(**SMALL)
    explain_corpus(model, utterances, settings, tmp_path, occlusion)
    capsys.readouterr()
    corrected = [replace(utterances[0], transcript="the dog slept"), utterances[1]]
    explain_corpus(Untouchable(model), corrected, settings, tmp_path, occlusion)
    assert capsys.readouterr().out == ""
    found = {setting: [maps.reference for maps in store.load_all(tmp_path, "tiny", setting)] for setting in settings}
    assert found == {
        "en": ["the dog slept", utterances[1].transcript],
        "en-it": [utterance.translation for utterance in utterances],
    }


def test_maps_that_end_where_all_settings_are_reliable_are_those_of_all_settings(model, utterances, tmp_path):
    for reliability in (1.0, 0.99):
        occlusion = Occlusion(**SMALL | {"reliability": reliability})
        explain_corpus(model, utterances[:1], ["en", "en-it"], tmp_path, occlusion)
        explain_corpus(Untouchable(model), utterances[:1], ["en-it", "en"], tmp_path, occlusion)
        if reliability == 1:
            explain_corpus(Untouchable(model), utterances[:1], ["en"], tmp_path, occlusion)
        else:
            with pytest.raises(AttributeError):
                explain_corpus(Untouchable(model), utterances[:1], ["en"], tmp_path, occlusion)


def test_workers_are_told_whole_paths_and_a_model_of_the_hub_by_its_id(
    model, utterances, tiny_folder, tmp_path, monkeypatch
):
    told = []

    class Client:
        def submit(self, function, utterance, **options):
            told.append((function.args[0], function.args[3].keywords["folder"], utterance))
            raise ConnectionError

    monkeypatch.chdir(tiny_folder.parent)
    relative = [
        replace(u, audio_path=Path(os.path.relpath(u.audio_path)), manifest=Path(os.path.relpath(u.manifest)))
        for u in utterances
    ]
    for source in ("tiny", "FBK-MT/fama-small@0123abc"):
        monkeypatch.setattr(model, "source", source)
        with pytest.raises(ConnectionError):
            explain_corpus(model, relative, ["en"], os.path.relpath(tmp_path), Occlusion(**SMALL), Client())
    assert told == [(source, tmp_path, utterances[0]) for source in (str(tiny_folder), "FBK-MT/fama-small@0123abc")]


def test_a_worker_has_the_model_that_is_asked_for_and_no_other(made, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "tiny")

    def of_worker(weights_hash):
        return runs._on_worker(str(folder), "cpu", weights_hash, lambda model, utterance: model, None)

    first = load_model(folder).weights_hash
    loaded = of_worker(first)
    assert loaded.weights_hash == first and of_worker(first) is loaded
    made.network(seed=1).save_pretrained(folder)  # trained again in the same place
    second = load_model(folder).weights_hash
    assert second != first and of_worker(second).weights_hash == second
    with pytest.raises(ValueError, match="tiny holds other weights than the model that was loaded from it: load it"):
        of_worker(first)


def test_threads_of_a_worker_take_turns(model, tiny_folder):
    running, most = [], []

    def unit(model, number):
        running.append(number)
        most.append(len(running))
        time.sleep(0.02)
        running.remove(number)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda n: runs._on_worker(str(tiny_folder), "cpu", model.weights_hash, unit, n), range(4)))
    assert most == [1, 1, 1, 1]
