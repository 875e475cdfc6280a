"""Whisper as people have it: the published weights of tiny.en and base in faster-whisper's format, and real speech."""

import csv
import json
import os
import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats
from test_checkpoints import write_openai
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

import xattn
from recipes.speech import LISTS, write_corpus
from reproduction.pipeline import run, steps_of
from reproduction.profiles import load_profile
from reproduction.tables import ROOT
from xattn.analysis.quality import transcribe, wer
from xattn.attribution.attention import cross_attention
from xattn.audio import load_audio
from xattn.data.corpus import load_corpus
from xattn.data.readers import utterances_from_folder
from xattn.maps import drop_special_tokens, on_steps, on_words, padding_share
from xattn.models import load_model
from xattn.models.convert.openai import blank_tokens, non_speech_tokens

FILES = {
    "XATTN_WHISPER": ("faster-whisper-tiny.en/model.bin", "faster-whisper-base/model.bin"),
    "XATTN_SPEECH": ("jfk.flac", "common_voice_it/common_voice_it_20047586.mp3"),
}
KENNEDY = "And so my fellow Americans ask not what your country can do for you, ask what you can do for your country."


@pytest.fixture(scope="session")
def real():
    """Both models, the folders that they were read from, an English recording and an Italian one."""
    folders = {name: Path(os.environ.get(name, "")) for name in FILES}
    if any(not (folders[name] / file).is_file() for name, files in FILES.items() for file in files):
        asked = " and ".join(f"{name} to a folder with {' and '.join(files)}" for name, files in FILES.items())
        pytest.skip(f"set {asked}")
    english, italian = (folders["XATTN_SPEECH"] / file for file in FILES["XATTN_SPEECH"])
    places = {name: folders["XATTN_WHISPER"] / f"faster-whisper-{name}" for name in ("tiny.en", "base")}
    models = {name: load_model(folder) for name, folder in places.items()}
    return SimpleNamespace(folders=places, tiny=models["tiny.en"], base=models["base"], en=english, it=italian)


def written(model, path, direction):
    features = model.features(load_audio(path))
    return model.text(model.generate(features[None], direction)[0])


def test_english_speech_is_transcribed(real):
    assert written(real.tiny, real.en, "en") == KENNEDY
    assert (real.tiny.name, real.tiny.languages, real.tiny.multilingual) == ("faster-whisper-tiny.en", ("en",), False)


def test_italian_speech_is_detected_transcribed_and_translated(real):
    assert real.base.detect_language(real.base.features(load_audio(real.it))) == "it"
    assert real.base.detect_language(real.base.features(load_audio(real.en))) == "en"
    assert written(real.base, real.it, "it") == "Lo staff iniziale superava le 10.000 unità."
    assert written(real.base, real.it, "it-en") == "The final staff was super happy with the 10,000 units."
    assert len(real.base.languages) == 99 and real.base.languages[0] == "en"


@pytest.mark.parametrize("name", ["tiny", "base"])
def test_attention_equals_that_of_a_forced_pass_in_transformers(real, name):
    model = getattr(real, name)
    samples = load_audio(real.en)
    ids = torch.cat([model.prompt("en"), model.token_ids(KENNEDY)[:-1]])
    inputs = WhisperFeatureExtractor()(samples, sampling_rate=16_000, return_tensors="pt").input_features
    config = deepcopy(model.config)
    eager = WhisperForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    eager.load_state_dict(model.network.state_dict())
    with torch.inference_mode():
        output = eager(inputs, decoder_input_ids=ids[None], output_attentions=True)
    found = cross_attention(model, model.encode(model.features(samples)[None]), ids)
    expected = torch.stack(output.cross_attentions)[:, 0]
    assert found.shape == expected.shape == {"tiny": (4, 6, 26, 1500), "base": (6, 8, 28, 1500)}[name]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert model.config._attn_implementation == "sdpa" and found.max(-1).mean() > 0.05


def test_maps_follow_the_speech(real):
    """The alignment heads look later in the recording from word to word."""
    few = xattn.Occlusion(input_masks=8, encoder_masks=8, precision="float32")
    maps = xattn.explain(real.tiny, real.en, occlusion=few, progress=False)
    assert maps.hypothesis == KENNEDY and maps.token.values[:3].tolist() == ["▁And", "▁so", "▁my"]
    heads = real.tiny.network.generation_config.alignment_heads
    assert len(heads) == 8
    attention = np.mean([maps.cross_attention.values[layer, head] for layer, head in heads], axis=0)
    seconds = maps.step.values[attention.argmax(axis=1)]
    assert np.corrcoef(seconds[:-1], np.arange(len(seconds) - 1))[0, 1] > 0.9 and 9 < seconds[:-1].max() < 11


@pytest.fixture(scope="module")
def windows(real):
    """Maps of the English recording from 100 windows masks for SM^X and 400 for SM^H."""
    occlusion = xattn.Occlusion(100, 400, precision="float32", reliability=1.0)
    return xattn.explain(real.tiny, real.en, occlusion=occlusion, progress=False)


def test_a_hundred_masks_of_windows_make_a_reliable_map(windows):
    assert windows.input_reliability > 0.45 and windows.encoder_reliability > 0.4
    rho = xattn.correlate(windows.cross_attention, windows.input_saliency)
    assert rho.overall > 0.4
    assert 0.2 < padding_share(windows) < 0.4
    total = windows.cross_attention.sum("step") + windows.padding_attention
    np.testing.assert_allclose(total, 1, atol=1e-4)


def test_the_peaks_of_saliency_follow_the_order_of_the_words(windows):
    words = on_words(drop_special_tokens(on_steps(windows.input_saliency, windows)))
    peaks = words.step.values[words.values.argmax(axis=1)]
    assert stats.spearmanr(np.arange(len(peaks)), peaks).statistic > 0.9
    assert peaks.min() < 1.5 and 9.5 < peaks.max() < 11


@pytest.mark.parametrize(("batch_size", "threads"), [(1, 1), (5, 2)])
def test_batches_and_threads_change_only_rounding(real, batch_size, threads):
    few = xattn.Occlusion(10, 20, precision="float32", reliability=1.0)
    used = torch.get_num_threads()
    maps = xattn.explain(real.tiny, real.en, occlusion=few, progress=False)
    try:
        torch.set_num_threads(threads)
        other = xattn.explain(real.tiny, real.en, occlusion=replace(few, batch_size=batch_size), progress=False)
    finally:
        torch.set_num_threads(used)
    for name in ("input_scores", "encoder_scores"):
        np.testing.assert_allclose(other[name], maps[name], rtol=1e-2, atol=1e-4)


def test_bfloat16_gives_almost_the_same_scores(real):
    few = xattn.Occlusion(24, 48, precision="float32", reliability=1.0)
    exact, rounded = (
        xattn.explain(real.tiny, real.en, occlusion=replace(few, precision=precision), progress=False)
        for precision in ("float32", "bfloat16")
    )
    if rounded.precision != "bfloat16":
        pytest.skip("this processor does not compute in bfloat16")
    for name in ("input_scores", "encoder_scores"):
        roots = [np.sqrt(maps[name].values.clip(0)).ravel() for maps in (exact, rounded)]
        assert 0.999 < np.corrcoef(*roots)[0, 1] < 1
    assert next(real.tiny.network.parameters()).dtype == torch.float32


def test_its_profile_runs_on_real_speech(real, tmp_path):
    """The profile differs in its numbers of utterances and masks, and lacks the overview, which takes 1,000 masks."""
    root, profile = tmp_path / "kit", load_profile(ROOT / "notebooks" / "profiles" / "whisper.yaml")
    (root / "data" / "whisper").mkdir(parents=True)
    for name in ("notebooks", "xattn", "reproduction"):
        (root / name).symlink_to(ROOT / name)
    for folder in real.folders.values():
        (root / "data" / "whisper" / folder.name).symlink_to(folder)
    speech = real.en.parent
    with LISTS["speech"].open(encoding="utf-8", newline="") as file:
        listed = [row["id"] for row in csv.DictReader(file)]
    english = sorted(load_corpus(speech / "librispeech" / "LibriSpeech"), key=lambda each: each.duration)
    italian = [replace(each, transcript="lo staff") for each in utterances_from_folder(real.it.parent, "it")]
    assert {each.id for each in (*english[:2], *italian)} & set(listed)
    write_corpus([*english[:2], *italian[:2]], root / "data" / "speech", "speech.csv")
    few = {"utterances": 2, "input_masks": 6, "encoder_masks": 6, "compared": {"superpixels": 6}}
    path = tmp_path / "whisper.yaml"
    path.write_text(json.dumps(profile | few | {"deletion_step": 50}))
    slow = ("00_overview", "43_methods", "44_sufficiency")  # a random Whisper runs these in test_whisper.py
    steps = tuple(step for step in steps_of(profile, root) if step.notebook not in slow)
    run(path, root=root, steps=steps, at_once=2)
    figures = root / "figures" / "whisper"
    table = pd.read_csv(figures / "tab5.csv").query("layer == 'mean' and saliency != 'difference'")
    assert sorted(set(table.model + "/" + table.direction)) == [
        *("faster-whisper-base/en", "faster-whisper-base/it", "faster-whisper-base/it-en", "faster-whisper-tiny.en/en")
    ]
    assert (figures / "resolution.png").is_file()
    assert (table.n == 2).all() and table.padding.between(0.3, 0.8).all()
    assert (pd.read_csv(figures / "findings.csv").verdict.isin(("too noisy", "not available"))).all()  # two utterances


def test_segments_of_europarl_are_transcribed(real):
    """The paper's own corpus: eight segments of the English test set."""
    folder = real.en.parent / "europarl_st_en"
    with (real.en.parent / "manifest.csv").open(encoding="utf-8", newline="") as file:
        texts = {Path(row["path"]).stem: row["transcript"] for row in csv.DictReader(file)}
    found = {each.id: each for each in utterances_from_folder(folder, "en")}
    assert len(found) == 8
    for model, most in ((real.tiny, 25), (real.base, 20)):
        written = transcribe(model, [model.features(each.audio()) for each in found.values()], "en")
        assert 0 < wer([texts[id] for id in found], written, "en") < most


@pytest.mark.parametrize("name", ["tiny.en", "base"])
def test_the_tokens_that_openai_suppresses_are_those_of_the_checkpoint(real, name):
    stated = json.loads((real.folders[name] / "config.json").read_text())
    tokenizer = {"tiny.en": real.tiny, "base": real.base}[name].tokenizer
    assert non_speech_tokens(tokenizer) == stated["suppress_ids"] and len(stated["suppress_ids"]) in (88, 90)
    assert blank_tokens(tokenizer) == stated["suppress_ids_begin"]


def test_a_checkpoint_of_openai_with_these_weights_is_the_same_model(real, tmp_path):
    real.tiny.network.save_pretrained(tmp_path / "saved")
    write_openai(tmp_path / "openai" / "tiny.en.pt", tmp_path / "saved")
    shutil.copy(real.folders["tiny.en"] / "tokenizer.json", tmp_path / "openai")
    model = load_model(tmp_path / "openai" / "tiny.en.pt")
    found, expected = (each.network.state_dict() for each in (model, real.tiny))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    stated = model.network.generation_config
    assert stated.suppress_tokens == real.tiny.network.generation_config.suppress_tokens
    assert written(model, real.en, "en") == KENNEDY
