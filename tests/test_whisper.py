"""Whisper on a tiny random checkpoint that takes 2 s of audio, with a tokenizer trained here."""

import copy
import json
import shutil

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch
import xarray as xr
import yaml
from conftest import SENTENCES
from hypothesis import given, settings
from hypothesis import strategies as st
from pretrained import SMALL, PretrainedChecks, changed, quietly, randomised
from safetensors.torch import load_file, save_file
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)

from reproduction.pipeline import STEPS, run
from reproduction.tables import ROOT
from xattn.analysis.localisation import KINDS, token_kinds, token_times
from xattn.analysis.quality import quality_table, transcribe
from xattn.data.utterance import Utterance, Word
from xattn.explain import Occlusion, explain
from xattn.maps import drop_special_tokens, spelled, words_of
from xattn.models import load_model
from xattn.models.whisper import SEARCHED_AT_ONCE, WhisperModel, attention_by_head
from xattn.released import write_released
from xattn.runs import explain_corpus
from xattn.store import load_maps

TAGS = ("<|startoftranscript|>", "<|en|>", "<|it|>", "<|translate|>", "<|transcribe|>", "<|notimestamps|>")
FRAMES = 200  # in 2 s


def small_whisper(folder):
    """Write a checkpoint like those on the hub, with two encoder and three decoder layers."""
    tokenizer = WhisperTokenizer().train_new_from_iterator(sum(SENTENCES.values(), ()), vocab_size=290)
    tokenizer.add_special_tokens({"additional_special_tokens": list(TAGS)})
    tokenizer.add_tokens([f"<|{0.02 * step:.2f}|>" for step in range(101)])
    ids = dict(zip(TAGS, tokenizer.convert_tokens_to_ids(TAGS), strict=True))
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), tokenizer.eos_token_id)
    torch.manual_seed(0)
    network = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=len(tokenizer),
            d_model=16,
            encoder_layers=2,
            decoder_layers=3,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            max_source_positions=FRAMES // 2,
            max_target_positions=16,
            decoder_start_token_id=ids["<|startoftranscript|>"],
            **special,
        )
    )
    network.generation_config = GenerationConfig(
        is_multilingual=True,
        lang_to_id={tag: ids[tag] for tag in ("<|en|>", "<|it|>")},
        task_to_id={task: ids[f"<|{task}|>"] for task in ("translate", "transcribe")},
        no_timestamps_token_id=ids["<|notimestamps|>"],
        suppress_tokens=[5, 6, *ids.values()],
        begin_suppress_tokens=[tokenizer.eos_token_id],
        forced_decoder_ids=[
            [1, None],
            [2, ids["<|translate|>"]],
        ],  # older checkpoints have these; a prompt overrules them
        decoder_start_token_id=ids["<|startoftranscript|>"],
        max_length=16,
        num_beams=5,
        no_repeat_ngram_size=5,  # outputs of a greedy search are all the same
        **special,
    )
    for part in (randomised(network), WhisperFeatureExtractor(chunk_length=2), tokenizer):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return small_whisper(tmp_path_factory.mktemp("whisper") / "whisper-tiny")


class TestWhisper(PretrainedChecks):
    DIRECTIONS = ("en", "it", "it-en")

    def own(self, model, audio):
        inputs = model.extractor(audio, sampling_rate=16_000, return_tensors="pt")
        return {"input_features": inputs.input_features}

    def framed(self, model, inputs):
        return inputs["input_features"][0].T

    def search(self, model, inputs, direction):
        task = "translate" if "-" in direction else "transcribe"
        return WhisperForConditionalGeneration.generate(
            model.network,
            inputs["input_features"],
            attention_mask=torch.ones(1, FRAMES),
            language=direction[:2],
            task=task,
            forced_eos_token_id=model.config.eos_token_id,
            num_beams=5,
            no_repeat_ngram_size=5,
        )[0]

    def seconds(self, frames, steps):
        last = np.minimum(2 * np.arange(steps) + 1, frames - 1)
        return 0.01 * np.arange(frames), 0.01 * (2 * np.arange(steps) + last) / 2


def test_a_loaded_model_has_the_interface(pretrained):
    assert isinstance(pretrained, WhisperModel) and pretrained.name == "whisper-tiny"
    assert pretrained.languages == ("en", "it")
    assert pretrained.frame_seconds == 0.01 and pretrained.detects_language
    assert pretrained.step_frames(5).tolist() == [[0, 2], [2, 4], [4, 6]]
    ids = torch.tensor(pretrained.tokenizer(" the dog sì", add_special_tokens=False).input_ids)
    assert "".join(pretrained.tokens(ids)).startswith("▁the▁dog▁s")  # ì is two bytes, each a token of its own here
    assert pretrained.text(torch.cat([pretrained.prompt("en"), ids, torch.tensor([0])])) == "the dog sì"


def with_vocabulary(model, *texts):
    """The model with a tokenizer that has learnt pieces from the texts."""
    other = copy.copy(model)
    other.tokenizer = WhisperTokenizer().train_new_from_iterator(texts, vocab_size=265)
    return other


@pytest.mark.parametrize(
    ("learnt", "text", "expected"),
    [
        ("", "aé😀", ["▁", "a", "<0xC3>", "<0xA9>", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>"]),
        ("né nè nê", "né", ["▁n<0xC3>", "<0xA9>"]),  # a complete part and an incomplete tail
        ("é1é2é3", "é", ["▁", "é"]),
        ("a\ufffd b\ufffd c\ufffd", "\ufffd", ["▁", "\ufffd"]),  # a character like any other
        ("", "$_ <0x41>", ["▁", "$", "_", "▁", "<", "0", "x", "4", "1", ">"]),
    ],
)
def test_parts_of_characters_are_shown_as_their_bytes(pretrained, learnt, text, expected):
    model = with_vocabulary(pretrained, learnt)
    assert model.tokens(model.token_ids(text)) == [*expected, "<|endoftext|>"]


@settings(max_examples=50, deadline=None)
@given(st.text())
def test_joined_tokens_spell_the_text(pretrained, text):
    tokens = pretrained.tokens(pretrained.token_ids(text))
    assert spelled(tokens) == f"{text.strip()}<|endoftext|>".replace(" ", "").replace("▁", "")


def test_tokens_outside_of_the_alphabet_of_bytes_are_shown_as_they_are(pretrained):
    model = with_vocabulary(pretrained, "")
    model.tokenizer.add_tokens(["é", "日 本"])
    ids = model.tokenizer.convert_tokens_to_ids(["é", "日 本"])
    assert model.tokens(torch.tensor([*ids, 9999])) == ["é", "日▁本", "<9999>"]
    model.tokenizer = WhisperTokenizer(vocab={"<|endoftext|>": 0, "日": 1, "æĹ¥": 2}, merges=[])
    assert model.tokens(torch.tensor([0, 1, 2])) == ["<|endoftext|>", "日", "日"]


def test_words_of_split_characters_are_found_in_the_recording(pretrained):
    tokens = pretrained.tokens(pretrained.token_ids("sì 日本 😀 lo"))
    maps = xr.DataArray(np.zeros(len(tokens)), dims="token", coords={"token": tokens})
    spoken = [Word("sì", 0.0, 0.2), Word("日本", 0.2, 0.5), Word("lo", 0.6, 0.7)]
    words, times = words_of(tokens), token_times(maps, spoken, "it")
    assert list(dict.fromkeys(words)) == ["sì", "日本", "😀", "lo", "<|endoftext|>"]
    for word in spoken:
        assert (times[words == word.word] == (word.start, word.end)).all()
    assert np.isnan(times[words == "😀"]).all()
    start, continuation, punctuation = KINDS  # the space before a word is a token of its own here
    assert token_kinds(tokens)[words == "日本"].tolist() == [start, *[continuation] * 6]
    assert token_kinds(tokens)[words == "😀"].tolist() == [start, *[punctuation] * 4]


@pytest.mark.parametrize("samples", [400, 4_000, 4_001, 4_159, 4_161, 31_700, 32_000])
def test_the_frames_after_the_recording_are_silent(pretrained, samples):
    rng = np.random.default_rng(samples)
    for loudness in (0.3, 1e-3, 1e-6):  # the quietest are at the floor of the logarithm
        audio = (loudness * rng.standard_normal(samples)).astype(np.float32)
        whole = pretrained.extractor(audio, sampling_rate=16_000, return_tensors="pt").input_features[0].T
        features = pretrained.features(audio)
        assert len(features) == min(FRAMES, -(-(samples + 200) // 160))  # frames whose 400 samples overlap the audio
        torch.testing.assert_close(pretrained.padded(features), whole, rtol=0, atol=1e-6)
        if samples < 31_000:
            assert whole[len(features) :].unique().numel() == 1
            assert whole[len(features) - 1].unique().numel() > 1 or loudness < 0.1
    assert whole.min() == -1.5


def test_masked_cells_become_0_and_padding_stays(pretrained, audio):
    features = pretrained.features(audio)
    keep = (torch.rand(3, *features.shape, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    keep[0] = 1.0
    inputs = pretrained.mask_input(features, keep)
    assert inputs.shape == (3, FRAMES, 80)
    assert torch.equal(inputs[:, : len(features)], features * keep)
    assert torch.equal(inputs[:, len(features) :], pretrained.padded(features)[len(features) :].expand(3, -1, -1))
    torch.testing.assert_close(pretrained.encode(inputs)[:1], pretrained.encode(features[None]))


def test_attention_by_head_equals_fused_attention():
    query, key, value = torch.randn(3, 2, 4, 30, 8, generator=torch.Generator().manual_seed(0))
    found, weights = attention_by_head(None, query, key, value, None, scaling=0.3)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, scale=0.3)
    torch.testing.assert_close(found, expected.transpose(1, 2))
    assert weights is None and found.is_contiguous()


def test_passes_in_bfloat16_leave_the_model_as_it_is(pretrained, audio):
    features = pretrained.features(audio)[None]
    expected, ids = pretrained.encode(features), pretrained.prompt("en")
    with pretrained.perturbing("float32") as passes:
        assert torch.equal(passes.encode(features), expected)
    with pretrained.perturbing("bfloat16") as passes:
        assert {each.dtype for each in passes.network.parameters()} == {torch.bfloat16}
        assert passes.network.get_encoder().layers[0].self_attn.config._attn_implementation == "by_head"
        assert passes.network.config._attn_implementation == "sdpa"
        rounded = passes.encode(features)
        log_p = passes.decode(expected, ids)
    assert rounded.dtype == torch.bfloat16 and log_p.dtype == torch.float32
    assert 0 < (rounded.float() - expected).norm() / expected.norm() < 0.03
    assert 0 < (log_p - pretrained.decode(expected, ids)).abs().max() < 0.2
    assert torch.equal(pretrained.encode(features), expected) and pretrained.network.dtype == torch.float32


def test_few_passes_over_30_s_are_computed_at_once(pretrained, audio, monkeypatch):
    batches = {"encode": [], "decode": []}
    monkeypatch.setattr(WhisperModel, "encode", _counting(WhisperModel.encode, batches["encode"]))
    masked = WhisperModel.masked_decoder
    monkeypatch.setattr(
        WhisperModel, "masked_decoder", lambda self, states: _counting_keep(masked(self, states), batches["decode"])
    )
    explain(pretrained, audio, rate=16_000, language="en", occlusion=Occlusion(5, 11, reliability=1.0), progress=False)
    assert batches["encode"][1:-1] == [2, 2, 1] and batches["decode"] == [8, 3]


def _counting(function, sizes):
    return lambda self, features: sizes.append(len(features)) or function(self, features)


def _counting_keep(function, sizes):
    return lambda keep, inputs: sizes.append(len(keep)) or function(keep, inputs)


def test_attention_to_the_padding_is_recorded(pretrained, utterances):
    maps = quietly(pretrained, utterances[0])
    assert maps.padding_attention.dims == ("layer", "head", "token")
    np.testing.assert_allclose(maps.cross_attention.sum("step") + maps.padding_attention, 1, atol=1e-5)
    assert 0.1 < maps.padding_attention.mean() < 0.9  # 0.6 of the 2 s are recorded


def test_a_recording_longer_than_the_input_raises(pretrained):
    audio = np.random.default_rng(0).standard_normal(32_001).astype(np.float32)
    assert pretrained.features(audio[:-1]).shape == (FRAMES, 80)
    with pytest.raises(ValueError, match=r"The recording lasts 2.0 s, but whisper-tiny takes at most 2 s: cut it with"):
        pretrained.features(audio)


def test_a_recording_that_is_too_long_is_skipped_in_a_corpus(pretrained, utterances, tmp_path, capsys):
    samples = np.random.default_rng(0).standard_normal(48_000).astype(np.float32) / 10
    soundfile.write(tmp_path / "long.flac", samples, 16_000)
    long = Utterance("long", tmp_path / "long.flac", "en", 3.0, transcript="a dog")
    reason = "The recording lasts 3.0 s, but whisper-tiny takes at most 2 s: cut it with xattn.cut_at_pauses."
    explain_corpus(pretrained, [long, utterances[1]], tmp_path / "maps", occlusion=Occlusion(**SMALL))
    assert f"1/2 long: skipped ({reason})" in capsys.readouterr().out
    assert [maps.utterance for maps in load_maps(tmp_path / "maps", "whisper-tiny", "en")] == [utterances[1].id]
    table = quality_table(pretrained, [long, utterances[1]], "en")
    assert capsys.readouterr().out == f"long is skipped: {reason}\n" and table.n.tolist() == [1]
    with pytest.raises(ValueError, match="All 1 recordings are too long for whisper-tiny: give it others"):
        quality_table(pretrained, [long], "en")


def test_prompts_name_language_and_task(pretrained):
    start, rest = "<|startoftranscript|>", "<|notimestamps|>"
    for direction, task in (
        ("en", ["<|en|>", "<|transcribe|>"]),
        ("it", ["<|it|>", "<|transcribe|>"]),
        ("it-en", ["<|it|>", "<|translate|>"]),
    ):
        assert pretrained.tokens(pretrained.prompt(direction)) == [start, *task, rest]


@pytest.mark.parametrize(
    ("direction", "sentence"),
    [
        ("en-it", "whisper-tiny translates only into English, not into 'it': leave out translate_to"),
        ("fr", "The model whisper-tiny does not write 'fr'; choose one of en, it"),
        ("fr-en", "The model whisper-tiny does not support 'fr'; choose one of en, it"),
    ],
)
def test_directions_that_it_does_not_support_raise(pretrained, direction, sentence):
    with pytest.raises(ValueError, match=sentence):
        pretrained.prompt(direction)


def test_an_english_checkpoint_has_no_tags_of_language_and_task(folder, tmp_path):
    copy = tmp_path / "whisper-tiny.en"
    shutil.copytree(folder, copy)
    generation = json.loads((copy / "generation_config.json").read_text())
    (copy / "generation_config.json").write_text(json.dumps(generation | {"is_multilingual": False}))
    model = load_model(copy)
    assert model.languages == ("en",)
    assert model.tokens(model.prompt("en")) == ["<|startoftranscript|>", "<|notimestamps|>"]
    for direction in ("it", "it-en", "en-it"):
        with pytest.raises(ValueError, match="whisper-tiny.en"):
            model.prompt(direction)
    assert not model.detects_language


@pytest.mark.parametrize(("vocabulary", "multilingual"), [(None, False), (51864, False), (51865, True), (51866, True)])
@pytest.mark.parametrize("generation", [False, True])
def test_the_size_of_the_vocabulary_tells_whether_a_checkpoint_is_multilingual(
    folder, tmp_path, vocabulary, multilingual, generation
):
    """If generation_config.json does not say so or is missing. All have the tags of both languages."""
    older = changed(folder, tmp_path / "older", "generation_config.json", is_multilingual=None)
    tensors = load_file(older / "model.safetensors")
    rows = tensors["model.decoder.embed_tokens.weight"]
    size = vocabulary or len(rows)
    copy = changed(older, tmp_path / "whisper", vocab_size=size)
    rows = torch.cat([rows, torch.zeros(size - len(rows), rows.shape[1])])
    tensors = tensors | {"model.decoder.embed_tokens.weight": rows}
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    if not generation:
        (copy / "generation_config.json").unlink()
    model = load_model(copy)
    tags = ["<|en|>", "<|transcribe|>"] if multilingual else []
    assert model.tokens(model.prompt("en")) == ["<|startoftranscript|>", *tags, "<|notimestamps|>"]
    assert model.languages == (("en", "it") if multilingual else ("en",))
    assert model.detects_language == multilingual


@pytest.mark.parametrize("stated", [{"suppress_tokens": [5, 6], "begin_suppress_tokens": [7]}, {}])
def test_without_a_generation_config_tokens_are_suppressed_as_config_json_says(folder, tmp_path, audio, stated):
    entries = dict.fromkeys(("suppress_tokens", "begin_suppress_tokens")) | stated
    copy = changed(folder, tmp_path / "whisper", **entries)
    (copy / "generation_config.json").unlink()
    model = load_model(copy)
    found, stamps = model.network.generation_config, range(int(model.prompt("en")[-1]) + 1, model.config.vocab_size)
    assert found.suppress_tokens == [*stated.get("suppress_tokens", []), *stamps] and len(stamps) == 101
    assert found.begin_suppress_tokens == stated.get("begin_suppress_tokens")
    assert len(model.prompt("en")) == 2 and len(model.generate(model.features(audio)[None], "en")[0]) > 1


def test_the_language_is_the_most_probable_first_token(folder, utterances, capsys):
    model = load_model(folder)
    features = model.features(utterances[1].audio())
    ids = model.tokenizer.convert_tokens_to_ids(["<|en|>", "<|it|>"])
    with torch.inference_mode():
        inputs = model.padded(features).T[None]
        start = torch.tensor([[model.config.decoder_start_token_id]])
        logits = model.network(inputs, decoder_input_ids=start).logits[0, 0, ids]
    detected = ("en", "it")[int(logits.argmax())]
    assert model.detect_language(features) == detected
    few = {"occlusion": Occlusion(**SMALL)}
    maps = explain(model, utterances[1].audio_path, **few)
    assert maps.setting == detected and capsys.readouterr().out.startswith(f"Language: {detected} (detected)\n")
    with torch.no_grad():  # favour the other language
        weights = model.network.get_decoder().embed_tokens.weight
        weights[ids[("it", "en").index(detected)]] += 5 * model.network.get_decoder().layer_norm.bias
    (other,) = {"en", "it"} - {detected}
    assert model.detect_language(features) == other
    given = explain(model, utterances[1].audio_path, language=detected, **few)
    assert given.setting == detected and "Language" not in capsys.readouterr().out


def test_time_stamps_are_never_written(folder, audio):
    model = load_model(folder)
    features, prompt = model.features(audio), model.prompt("en")
    stamp = int(prompt[-1]) + 30
    with torch.no_grad():
        decoder = model.network.get_decoder()
        decoder.embed_tokens.weight[stamp] = 5 * decoder.layer_norm.bias
    assert model.decode(model.encode(features[None]), prompt)[0, -1].argmax() == stamp
    (ids,) = model.generate(features[None], "en")
    assert len(ids) > 1 and ids.max() < prompt[-1]


def test_many_utterances_are_decoded_in_parts(pretrained, audio):
    features = [pretrained.features(audio[1500 * row :]) for row in range(6)]
    assert len(features) > SEARCHED_AT_ONCE
    alone = [pretrained.text(pretrained.generate(one[None], "en")[0]) for one in features]
    assert transcribe(pretrained, features, "en") == alone and len(set(alone)) > 1


def test_its_maps_cannot_be_released(pretrained, utterances, tmp_path):
    with pytest.raises(ValueError, match="whisper-tiny also attends to padding, which such files cannot hold"):
        write_released([quietly(pretrained, utterances[0])], tmp_path / "whisper-tiny" / "en")


def readable(folder):
    """Suppress incomplete characters: a text with them would have more tokens than the model writes."""
    tokenizer, path = WhisperTokenizer.from_pretrained(folder), folder / "generation_config.json"
    incomplete = [token for token in range(len(tokenizer)) if "\ufffd" in tokenizer.decode([token])]
    config = json.loads(path.read_text(encoding="utf-8"))
    config["suppress_tokens"] = sorted({*config["suppress_tokens"], *incomplete})
    path.write_text(json.dumps(config), encoding="utf-8")


def test_its_profile_runs(made, folder, tmp_path):
    """The profile differs only in tiny models, few masks and recordings that are short enough for them."""
    root, profile = tmp_path / "kit", yaml.safe_load((ROOT / "notebooks/profiles/whisper.yaml").read_text())
    root.mkdir()
    for name in ("notebooks", "xattn", "reproduction"):
        (root / name).symlink_to(ROOT / name)
    pairs = [(f"{language}-test-{i}", "test", language, text) for language, texts in SENTENCES.items()
             for i, text in enumerate(texts)]  # fmt: skip
    made.corpus(root / "data" / "speech", [(*each, "") for each in pairs])
    for model in profile["models"]:
        profile["models"][model] = f"models/{model}"
        readable(shutil.copytree(folder, root / "models" / model))
    few = {"input_masks": 20, "encoder_masks": 20, "precision": "float32", "compared": {"superpixels": 20}}
    few |= {
        "beyond": [step.notebook for step in STEPS if step.on_request and "maps" in step.parameters],
        "judged": {f"{[*profile['models']][0]}/en": 2},
    }
    path = tmp_path / "whisper.yaml"
    path.write_text(yaml.safe_dump(profile | few), encoding="utf-8")
    run(path, root=root, at_once=2)
    figures = root / "figures/whisper"
    conditions = [(model, each) for model, own in profile["directions"].items() for each in own]
    padding = {}
    for model, direction in conditions:
        maps = list(load_maps(figures / "maps", model, direction))
        assert 3 <= len(maps) <= len(SENTENCES["en"])  # a random model can write too little for an utterance
        padding[model, direction] = np.mean([drop_special_tokens(item).padding_attention.mean() for item in maps])
    layers = pd.read_csv(figures / "tab4.csv").groupby(["model", "direction"]).padding.first().to_dict()
    assert layers == pytest.approx(padding, abs=1e-6) and all(0 < share < 1 for share in padding.values())
    assert "attention on padding" in (figures / "tab4.md").read_text(encoding="utf-8")
    quality = pd.read_csv(figures / "tab2.csv")
    scored = quality.query("metric == 'WER'")
    assert set(scored.model + "/" + scored.direction) == {f"{m}/{d}" for m, d in conditions if "-" not in d}
    assert (scored.n == len(SENTENCES["en"])).all()
    assert set(quality.query("direction == 'it-en'").metric) == {"size"}  # there are no references
    assert set(pd.read_csv(figures / "partitions.csv").partition) == {"windows", "superpixels"}
    methods = pd.read_csv(figures / "methods.csv")
    assert {"attention: large norm", "SM^X"} <= set(methods.method) and (methods.condition == "en").all()
    sufficiency = pd.read_csv(figures / "sufficiency.csv")
    assert set(sufficiency.part) == {"single cue", "held-out model", "detection"}
    assert set(pd.read_csv(figures / "findings.csv")["where"]) >= {"/".join(each) for each in conditions}
