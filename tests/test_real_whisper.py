"""Whisper as people have it: the published weights of tiny.en and base in faster-whisper's format, and real speech."""

import json
import os
import shutil
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_checkpoints import write_openai
from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

import xattn
from xattn.attribution.attention import cross_attention
from xattn.audio import load_audio
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
