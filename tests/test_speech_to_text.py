"""Speech2Text on a tiny random checkpoint with a SentencePiece tokenizer trained here."""

import json
import shutil

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import SENTENCES
from pretrained import SMALL, PretrainedChecks, quietly, randomised
from transformers import (
    GenerationConfig,
    Speech2TextConfig,
    Speech2TextFeatureExtractor,
    Speech2TextForConditionalGeneration,
    Speech2TextTokenizer,
)
from transformers.models.speech_to_text.tokenization_speech_to_text import MUSTC_LANGS

from xattn.audio import cmvn, log_mel
from xattn.explain import Occlusion, explain
from xattn.models import load_model
from xattn.models.speech_to_text import SpeechToTextModel


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A checkpoint with several target languages, like those on the hub."""
    folder = tmp_path_factory.mktemp("speech_to_text") / "s2t-tiny"
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sum(SENTENCES.values(), ())),
        model_prefix=str(folder / "sentencepiece.bpe"),
        vocab_size=60,
        model_type="unigram",
        **{"bos_id": 0, "pad_id": 1, "eos_id": 2, "unk_id": 3, "num_threads": 1, "minloglevel": 2},
        user_defined_symbols=[f"<lang:{language}>" for language in MUSTC_LANGS],
        hard_vocab_limit=False,
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "sentencepiece.bpe.model"))
    vocabulary = {pieces.id_to_piece(index): index for index in range(len(pieces))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    tokenizer = Speech2TextTokenizer(
        str(folder / "vocab.json"), str(folder / "sentencepiece.bpe.model"), lang_codes="mustc", tgt_lang="it"
    )
    torch.manual_seed(0)
    network = Speech2TextForConditionalGeneration(
        Speech2TextConfig(
            vocab_size=len(vocabulary),
            d_model=16,
            encoder_layers=2,
            decoder_layers=3,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_ffn_dim=32,
            conv_channels=32,
            max_target_positions=16,
        )
    )
    network.generation_config = GenerationConfig(
        num_beams=5,
        length_penalty=0.0,  # otherwise a tag forced as output would count in the length, unlike one in the prompt
        decoder_start_token_id=2,
        **{"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2},
    )
    for part in (randomised(network, end=1.0), Speech2TextFeatureExtractor(), tokenizer):
        part.save_pretrained(folder)
    return folder


class TestSpeechToText(PretrainedChecks):
    DIRECTIONS, ATTENTION = ("en-it", "en-de"), "eager"

    def framed(self, model, inputs):
        return inputs["input_features"][0]

    def search(self, model, inputs, direction):
        return model.network.generate(
            **inputs,
            forced_bos_token_id=model.tokenizer.lang_code_to_id[direction[-2:]],
            forced_eos_token_id=2,
            num_beams=5,
            no_repeat_ngram_size=5,
            max_length=16,
        )[0]

    def seconds(self, frames, steps):
        last = np.minimum(4 * np.arange(steps) + 3, frames - 1)
        return 0.0125 + 0.01 * np.arange(frames), 0.0125 + 0.01 * (4 * np.arange(steps) + last) / 2


def test_a_loaded_model_has_the_interface(pretrained):
    assert isinstance(pretrained, SpeechToTextModel) and pretrained.name == "s2t-tiny"
    assert pretrained.languages == tuple(MUSTC_LANGS)
    assert pretrained.frame_seconds == 0.01 and not pretrained.detects_language
    assert pretrained.step_frames(10).tolist() == [[0, 4], [4, 8], [8, 12]]
    assert pretrained.tokens(pretrained.prompt("en-it")) == ["</s>", "<lang:it>"]
    ids = torch.tensor(pretrained.tokenizer("the dog sì").input_ids)[1:]
    assert "".join(pretrained.tokens(ids)) == "▁the▁dog▁sì</s>"
    assert pretrained.text(torch.cat([pretrained.prompt("en-it"), ids])) == "the dog sì"


def test_features_equal_those_of_the_paper_s_models(pretrained, audio):
    np.testing.assert_allclose(pretrained.features(audio), cmvn(log_mel(audio)), atol=2e-3)


def test_a_language_that_the_model_does_not_write_raises(pretrained):
    with pytest.raises(ValueError, match="The model s2t-tiny does not write 'en'; choose one of pt, fr, "):
        pretrained.prompt("en")


@pytest.fixture(scope="module")
def recogniser(folder, tmp_path_factory):
    """The same checkpoint without tags, like those for one language."""
    copy = tmp_path_factory.mktemp("recogniser") / "s2t-one"
    shutil.copytree(folder, copy)
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    settings = {name: value for name, value in settings.items() if name not in ("lang_codes", "tgt_lang")}
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_model(copy)


def test_a_checkpoint_for_one_language_accepts_every_direction(recogniser, utterances):
    assert recogniser.languages == ()
    for direction in ("en", "en-de"):
        assert recogniser.tokens(recogniser.prompt(direction)) == ["</s>"]
    maps = quietly(recogniser, utterances[0])
    assert maps.setting == "en" and maps.token.values[-1] == "</s>" and maps.sizes["token"] > 1


def test_the_language_of_a_file_has_to_be_given(recogniser, utterances):
    given = {"occlusion": Occlusion(**SMALL), "progress": False}
    with pytest.raises(ValueError, match="s2t-one does not say which language it writes: give language, such as 'en'"):
        explain(recogniser, utterances[0].audio_path, **given)
    translated = explain(recogniser, utterances[0].audio_path, language="en", translate_to="de", **given)
    assert translated.setting == "en-de"


def test_a_recording_of_one_frame_raises(pretrained):
    with pytest.raises(ValueError, match="The features of the recording are not finite for s2t-tiny: it is too short"):
        pretrained.features(np.random.default_rng(0).standard_normal(400).astype(np.float32))
