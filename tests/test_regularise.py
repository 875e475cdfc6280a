"""Continued training with a loss on attention: targets, losses, weights, resuming."""

import json
import math
import shutil
from collections import namedtuple
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from conftest import SENTENCES, tiny_network, write_corpus

import xattn
from recipes import regularise as code
from recipes import train as recipe_code
from recipes.regularise import (
    CONTROL,
    LANGUAGE,
    RUNS,
    START,
    TARGETS,
    Batches,
    attention_loss,
    distributions,
    gradient_norms,
    load_start,
    make_targets,
    padded_targets,
    regularise,
    resynthesise,
    shares_of_words,
    step_losses,
    upper_average,
)
from recipes.train import TrainingData
from xattn.data.utterance import Utterance, Word
from xattn.files import hash_file
from xattn.models import load_model

FEW = xattn.Occlusion(input_masks=12, encoder_masks=12, precision="float32", reliability=1.0)
SHORT = replace(START, schedule=((0, 0.0), (2, 3e-3), (6, 0.0)), batch_frames=300)
VARIANTS = (*TARGETS, "entropy")


def spoken(row):
    """An utterance of noise with the transcript of a row, whose words divide it evenly."""
    samples = np.random.default_rng(row.start_frame).standard_normal(160 * (row.frames + 2)).astype(np.float32) / 10
    seconds, words = len(samples) / 16_000, row.transcript.split()
    edges = np.linspace(0, seconds, len(words) + 1)
    timed = tuple(Word(*each) for each in zip(words, edges[:-1], edges[1:], strict=True))
    return Utterance(row.id, None, LANGUAGE, seconds, transcript=row.transcript, words=timed, samples=samples)


def data_folder(folder, tiny_folder):
    """A data folder with a tiny `base`, training features of five utterances and a dev part."""
    write_corpus(folder, [("en-dev-0", "dev", "en", "yes it is", "sì lo è")])
    without = dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), 0.0)  # as in the shipped models
    tiny_network(max_target_positions=64, **without).save_pretrained(folder / "models" / "base")
    shutil.copy(tiny_folder / "spm.model", folder / "models" / "base")
    rng = np.random.default_rng(0)
    frames = np.array([64, 72, 64, 80, 72])
    table = {
        "id": [f"en-train-{number}" for number in range(5)],
        "start_frame": np.cumsum(frames) - frames,
        "frames": frames,
        "transcript": SENTENCES["en"],
        "translation": SENTENCES["it"],
        "sha256": [f"hash {number}" for number in range(5)],
    }
    (folder / "train").mkdir()
    pd.DataFrame(table).to_csv(folder / "train" / "en.csv", index=False)
    np.save(folder / "train" / "en.npy", rng.standard_normal((frames.sum(), 80)).astype(np.float16))
    return folder


@pytest.fixture
def data(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setattr(recipe_code, "CHECKPOINT_SECONDS", -1.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield data_folder(tmp_path / "data", tiny_folder)
    torch.set_num_threads(threads)


def train(names, data, start=SHORT, explained=4):
    regularise(names, [0], data, explained=explained, start=start, occlusion=FEW, utterance_of=spoken)


def batches_of(data, explained=4):
    everything = TrainingData(data / "train", (LANGUAGE,), SHORT.batch_frames)
    table = everything.table.sort_values("id")[:explained]
    folder = data / "train" / "regularised"
    targets = make_targets(load_start(data, "cpu"), table, folder, FEW, spoken)
    return Batches(everything, TrainingData(data / "train", (LANGUAGE,), SHORT.batch_frames, targets), targets)


def test_distributions_scale_what_is_positive():
    rows = np.array([[1.0, -2.0, 3.0], [0.0, -1.0, 0.0], [2.0, 2.0, 4.0]])
    assert distributions(rows).tolist() == [[0.25, 0, 0.75], [0, 0, 0], [0.25, 0.25, 0.5]]


def test_a_step_has_the_share_of_its_time_in_the_word():
    edges = np.array([0.0, 0.04, 0.08, 0.12])
    coordinates = {"token": ["▁the", "▁do", "g", "▁cat"], "step_start": ("step", edges)}
    steps = xr.DataArray(
        np.zeros((4, 4)), dims=("token", "step"), coords=coordinates | {"step_end": ("step", edges + 0.04)}
    )
    words = [Word("the", 0.0, 0.04), Word("dog", 0.06, 0.14)]
    expected = [[1, 0, 0, 0], [0, 0.25, 0.5, 0.25], [0, 0.25, 0.5, 0.25], [0, 0, 0, 0]]
    np.testing.assert_allclose(shares_of_words(steps, words, "en"), expected, atol=1e-9)


def test_losses_on_attention_by_hand():
    attention = torch.tensor([[[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.0, 0.0], [0.7, 0.1, 0.1, 0.1]]])
    targets = torch.tensor([[[0.0, 1.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]])
    # The third token has no target. KL is log 4 for the first one and 0 for the second.
    assert attention_loss("word_times", attention, targets).item() == pytest.approx(math.log(4) / 2)
    assert attention_loss("entropy", attention, targets).item() == pytest.approx((math.log(4) + math.log(2)) / 2)
    halves = torch.tensor([[[0.5, 0.0, 0.5, 0.0]]])
    expected = 0.5 * math.log(0.5 / 0.7) + 0.5 * math.log(0.5 / 0.1)
    assert attention_loss("input_saliency", attention[:, 2:], halves).item() == pytest.approx(expected)


def test_a_loss_on_attention_of_0_is_finite_and_has_gradients():
    attention = torch.tensor([[[1.0, 0.0]]], requires_grad=True)
    loss = attention_loss("word_times", attention, torch.tensor([[[0.0, 1.0]]]))
    loss.backward()
    assert loss.isfinite() and attention.grad.isfinite().all()


@pytest.mark.parametrize(("layers", "first"), [(1, 0), (2, 1), (3, 1), (6, 3)])
def test_the_upper_half_of_the_layers_is_the_one_of_word_times(layers, first):
    values = [torch.full((2, 3, 4, 5), float(layer)) for layer in range(layers)]
    assert upper_average(values).shape == (2, 4, 5)
    assert upper_average(values).unique().tolist() == pytest.approx([np.mean(range(first, layers))])


def test_targets_are_cut_to_the_steps_of_the_batch():
    padded = padded_targets([np.array([[0.2, 0.2, 0.6]]), np.array([[0, 0, 1.0], [0.5, 0.5, 0]])], 4, 2, first=1)
    assert padded[0].tolist() == [[0, 0], [0.5, 0.5], [0, 0], [0, 0]]
    assert padded[1].tolist() == [[0, 0], [0, 0], [0.5, 0.5], [0, 0]]


def test_targets_are_distributions_over_the_steps_of_every_word(data):
    targets = batches_of(data).targets
    model = load_model(data / "models" / "base")
    assert [*targets] == [f"en-train-{number}" for number in range(4)]
    for own, text, frames in zip(targets.values(), SENTENCES["en"], (64, 72, 64, 80), strict=False):
        for name in TARGETS:
            assert own[name].shape == (len(model.token_ids(text)) - 1, -(-frames // 4))
            sums = own[name].sum(axis=1)
            assert ((abs(sums - 1) < 1e-5) | (sums == 0)).all() and (sums > 0).any(), name
        assert (own["word_times"].sum(axis=1) > 0.99).all()
    row = pd.read_csv(data / "train" / "en.csv").iloc[0]
    maps = xattn.explain(model, spoken(row), text=row.transcript, occlusion=FEW, progress=False)
    expected = distributions(maps.encoder_saliency.values[:-1])
    np.testing.assert_allclose(targets[row.id]["encoder_saliency"], expected, rtol=1e-5, atol=1e-6)
    reliability = pd.read_csv(data / "train" / "regularised" / "targets.csv").set_index("id")
    assert reliability.encoder_reliability[row.id] == pytest.approx(maps.encoder_reliability, abs=1e-5, nan_ok=True)


def test_stored_targets_are_read_unless_the_recording_has_changed(data, monkeypatch):
    before, table = batches_of(data).targets, data / "train" / "en.csv"
    monkeypatch.setattr(code, "targets_of", lambda *_: pytest.fail("targets were made again"))
    again = batches_of(data).targets
    assert all(np.array_equal(before[id][name], again[id][name]) for id in before for name in TARGETS)
    table.write_text(table.read_text().replace("hash 2", "another hash"))
    made = []
    monkeypatch.setattr(
        code, "targets_of", lambda model, utterance, _: made.append(utterance.id) or reliable(before[utterance.id])
    )
    batches_of(data)
    assert made == ["en-train-2"]


def reliable(targets):
    return targets | {"input_reliability": 1.0, "encoder_reliability": 1.0}


def test_an_utterance_is_synthesised_again_with_its_words(monkeypatch):
    word = namedtuple("Spoken", "text start end")
    pcm = np.array([0, 2**14, -(2**15)], dtype=np.int16)
    recording = SimpleNamespace(pcm=pcm, words=[word("dog", 0.1, 0.2)], row={"sha256": "abc", "duration": 0.1})
    asked = []
    monkeypatch.setattr(code, "record", lambda *arguments: asked.append(arguments) or recording)
    utterance = resynthesise(SimpleNamespace(id="en-train-00042", sha256="abc", transcript="dog"))
    assert asked == [("en", "train", code.SEED, 41)]
    assert utterance.audio().tolist() == [0, 0.5, -1] and utterance.words == (Word("dog", 0.1, 0.2),)
    with pytest.raises(SystemExit, match="^en-train-00042 sounds different now than in the training features: run"):
        resynthesise(SimpleNamespace(id="en-train-00042", sha256="other", transcript="dog"))


def test_weights_make_gradients_comparable(data, monkeypatch):
    monkeypatch.setattr(code, "CALIBRATION", 1)
    batches, model = batches_of(data), load_start(data, "cpu")
    norms = gradient_norms(model, SHORT, batches, "word_times")
    for name, norm in norms.items():
        model = load_start(data, "cpu")
        model.network.train()
        step_losses(model, SHORT, batches, "word_times", 0)[name].backward()
        gradients = [each.grad.flatten() for each in model.network.parameters() if each.grad is not None]
        assert torch.cat(gradients).norm().item() == pytest.approx(norm, rel=1e-4) and norm > 0
    train(["word_times-low"], data)
    stored = json.loads((data / "train" / "regularised" / "gradients" / "word_times.json").read_text())
    assert stored["norms"] == pytest.approx(norms, rel=1e-5)
    log = pd.read_csv(data / "train" / "regularised" / "word_times-low-0" / "training_log.csv").iloc[-1]
    weight = 0.2 * norms["loss"] / norms["attention"]
    objective = log.cross_entropy + SHORT.intermediate_ctc * log.intermediate_ctc + SHORT.final_ctc * log.final_ctc
    assert log.loss == pytest.approx(objective + weight * log.attention, rel=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_few_steps_lower_each_loss(data, variant):
    longer = replace(SHORT, schedule=((0, 0.0), (2, 5e-3), (16, 0.0)))
    train([CONTROL, f"{variant}-high"], data, longer)
    batches, losses = batches_of(data), {}
    for name in ("start", f"{CONTROL}-0", f"{variant}-high-0"):
        model = load_start(data, "cpu")
        if name != "start":
            model.network.load_state_dict(load_model(data / "train" / "regularised" / name).network.state_dict())
        with torch.no_grad():
            losses[name] = np.mean(
                [step_losses(model, SHORT, batches, variant, step)["attention"].item() for step in range(3)]
            )
    assert losses[f"{variant}-high-0"] < 0.98 * min(losses["start"], losses[f"{CONTROL}-0"]), losses


def test_all_parameters_are_trained_and_the_control_has_no_loss_on_attention(data):
    train([CONTROL], data)
    folder = data / "train" / "regularised" / f"{CONTROL}-0"
    assert "attention" not in pd.read_csv(folder / "training_log.csv") and not list(data.rglob("gradients/*"))
    before, after = (load_model(each).network.state_dict() for each in (data / "models" / "base", folder))
    moved = {name for name, value in before.items() if not torch.equal(value.half(), after[name].half())}
    assert moved >= {name for name in before if name.endswith("_proj.weight")}


def test_an_interrupted_run_gives_the_same_weights(data, tmp_path, tiny_folder, monkeypatch, capsys):
    train(["encoder_saliency-low"], data)
    again, calls = data_folder(tmp_path / "again", tiny_folder), []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == code.CALIBRATION + 4:
            raise KeyboardInterrupt
        return step_losses(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(code, "step_losses", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(["encoder_saliency-low"], again)
    assert not list(again.rglob("encoder_saliency-low-0/model.safetensors"))
    train(["encoder_saliency-low"], again)
    assert "encoder_saliency-low-0: resuming at step 3 of 6" in capsys.readouterr().out
    name = "train/regularised/encoder_saliency-low-0/model.safetensors"
    assert hash_file(data / name) == hash_file(again / name)
    with pytest.raises(SystemExit, match="holds a checkpoint of another recipe or other training data"):
        train(["encoder_saliency-low"], again, explained=3)


def test_every_variant_has_two_weights_and_unknown_runs_are_refused(monkeypatch, capsys):
    assert (CONTROL, *(f"{variant}-{weight}" for variant in VARIANTS for weight in ("low", "high"))) == RUNS
    monkeypatch.setattr("sys.argv", ["regularise", "word_times-medium"])
    with pytest.raises(SystemExit):
        code.main()
    assert "there is no run word_times-medium: choose among control-none, " in capsys.readouterr().err
