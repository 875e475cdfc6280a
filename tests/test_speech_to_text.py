"""Speech2Text on a tiny random checkpoint with a SentencePiece tokenizer trained here."""

import json
import shutil

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import SENTENCES
from pretrained import SMALL, PretrainedChecks, listening
from transformers import (
    GenerationConfig,
    Speech2TextConfig,
    Speech2TextFeatureExtractor,
    Speech2TextForConditionalGeneration,
    Speech2TextTokenizer,
)
from transformers.models.speech_to_text.tokenization_speech_to_text import MUSTC_LANGS

from xattn.audio import cmvn, log_mel
from xattn.explain import explain
from xattn.models import load_model
from xattn.models.speech_to_text import SpeechToTextModel


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A checkpoint of several target languages as it lies on the hub."""
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
        length_penalty=0.0,  # else a tag that is forced as output counts in the length, and one in a prompt does not
        decoder_start_token_id=2,
        **{"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2},
    )
    for part in (listening(network, end=1.0), Speech2TextFeatureExtractor(), tokenizer):
        part.save_pretrained(folder)
    return folder


class TestSpeechToText(PretrainedChecks):
    SETTINGS = ("en-it", "en-de")

    def framed(self, model, inputs):
        return inputs["input_features"][0]

    def search(self, model, inputs, setting):
        return model.network.generate(
            **inputs,
            forced_bos_token_id=model.tokenizer.lang_code_to_id[setting[-2:]],
            forced_eos_token_id=2,
            num_beams=5,
            no_repeat_ngram_size=5,
            max_length=16,
        )[0]

    def seconds(self, frames, steps):
        last = np.minimum(4 * np.arange(steps) + 3, frames - 1)
        return 0.0125 + 0.01 * np.arange(frames), 0.0125 + 0.01 * (4 * np.arange(steps) + last) / 2


def test_what_a_loaded_model_says_of_itself(pretrained):
    assert isinstance(pretrained, SpeechToTextModel) and pretrained.name == "s2t-tiny"
    assert pretrained.languages == tuple(MUSTC_LANGS)
    assert (pretrained.frame_seconds, pretrained.subsampling, pretrained.lead) == (0.01, 4, 0)
    assert pretrained.tokens(pretrained.prompt("en-it")) == ["</s>", "<lang:it>"]
    ids = torch.tensor(pretrained.tokenizer("the dog sì").input_ids)[1:]
    assert "".join(pretrained.tokens(ids)) == "▁the▁dog▁sì</s>"
    assert pretrained.text(torch.cat([pretrained.prompt("en-it"), ids])) == "the dog sì"


def test_features_are_those_of_the_paper_s_models(pretrained, audio):
    np.testing.assert_allclose(pretrained.features(audio), cmvn(log_mel(audio)), atol=2e-3)


def test_a_language_the_model_does_not_write(pretrained):
    with pytest.raises(ValueError, match="The model s2t-tiny does not write 'en'; choose one of pt, fr, "):
        pretrained.prompt("en")


@pytest.fixture(scope="module")
def recogniser(folder, tmp_path_factory):
    """The same without tags, as a checkpoint of one language is."""
    copy = tmp_path_factory.mktemp("recogniser") / "s2t-one"
    shutil.copytree(folder, copy)
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    settings = {name: value for name, value in settings.items() if name not in ("lang_codes", "tgt_lang")}
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_model(copy)


def test_a_checkpoint_of_one_language_is_taken_at_the_user_s_word(recogniser, utterances):
    assert recogniser.languages == ()
    for setting in ("en", "en-de"):
        assert recogniser.tokens(recogniser.prompt(setting)) == ["</s>"]
    maps = explain(recogniser, utterances[0], **SMALL)
    assert maps.setting == "en" and maps.token.values[-1] == "</s>" and maps.sizes["token"] > 1


def test_its_language_has_to_be_given_for_a_recording_of_one_s_own(recogniser, utterances):
    with pytest.raises(ValueError, match="s2t-one does not say which language it writes: give it as target"):
        explain(recogniser, utterances[0].audio_path, **SMALL)
    assert explain(recogniser, utterances[0].audio_path, "de", "en", **SMALL).setting == "en-de"


def test_a_recording_of_one_frame_cannot_be_normalised(pretrained):
    with pytest.raises(
        ValueError, match="The features that s2t-tiny takes of the recording are not finite: it is too short"
    ):
        pretrained.features(np.random.default_rng(0).standard_normal(400).astype(np.float32))
