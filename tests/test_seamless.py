"""SeamlessM4T v2 on a tiny random checkpoint with a SentencePiece tokenizer trained here."""

import shutil

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import SENTENCES
from pretrained import SMALL, PretrainedChecks, listening, log_p
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, SeamlessM4TFeatureExtractor, SeamlessM4TTokenizer, SeamlessM4Tv2Config
from transformers import SeamlessM4Tv2ForSpeechToText as Network

from xattn.audio import SAMPLE_RATE
from xattn.compare import correlate, reduce_to_steps
from xattn.explain import explain
from xattn.faithfulness import spread
from xattn.interop import read_released, write_released
from xattn.models import load_model
from xattn.models.seamless import SeamlessModel


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A checkpoint as it lies on the hub."""
    folder = tmp_path_factory.mktemp("seamless") / "seamless-tiny"
    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sum(SENTENCES.values(), ())),
        model_prefix=str(folder / "sentencepiece.bpe"),
        vocab_size=60,
        model_type="bpe",
        **{"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1, "num_threads": 1, "minloglevel": 2},
    )
    torch.manual_seed(0)
    network = Network(
        SeamlessM4Tv2Config(
            vocab_size=64,  # <pad>, the 60 pieces, three languages
            hidden_size=16,
            speech_encoder_layers=2,
            speech_encoder_attention_heads=2,
            speech_encoder_intermediate_size=32,
            decoder_layers=3,
            decoder_attention_heads=2,
            decoder_ffn_dim=32,
            max_new_tokens=12,
        )
    )
    network.generation_config = GenerationConfig(
        text_decoder_lang_to_code_id={"afr": 61, "eng": 62, "ita": 63},
        max_new_tokens=12,
        decoder_start_token_id=3,
        **{"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3},
    )
    for part in (listening(network, end=0.5), SeamlessM4TFeatureExtractor()):
        part.save_pretrained(folder)
    return folder


class TestSeamless(PretrainedChecks):
    SETTINGS = ("en", "en-it")

    def framed(self, model, inputs):
        return inputs["input_features"][0].view(-1, 80)

    def search(self, model, inputs, setting):
        languages = {"en": "eng", "it": "ita"}
        return Network.generate(
            model.network,
            **inputs,
            tgt_lang=languages[setting[-2:]],
            forced_eos_token_id=3,
            num_beams=5,
            no_repeat_ngram_size=5,
            max_new_tokens=12,
        )[0]

    def seconds(self, frames, steps):
        first = np.maximum(16 * np.arange(steps) - 8, 0)
        last = np.minimum(16 * np.arange(steps) + 7, frames - 1)
        return 0.0125 + 0.01 * np.arange(frames), 0.0125 + 0.01 * (first + last) / 2


def test_what_a_loaded_model_says_of_itself(pretrained):
    assert isinstance(pretrained, SeamlessModel) and pretrained.name == "seamless-tiny"
    assert pretrained.languages == ("en", "afr", "it")
    assert (pretrained.frame_seconds, pretrained.subsampling, pretrained.lead) == (0.01, 16, 8)
    assert pretrained.tokens(pretrained.prompt("en-it")) == ["</s>", "__ita__"]
    ids = 1 + torch.tensor([*pretrained.tokenizer.encode("the dog sì"), 2])
    assert "".join(pretrained.tokens(ids)) == "▁the▁dog▁sì</s>"
    assert pretrained.text(torch.cat([pretrained.prompt("en"), ids, torch.tensor([0])])) == "the dog sì"
    with pytest.raises(ValueError, match="The model seamless-tiny does not write 'fr'; choose one of en, afr, it"):
        pretrained.prompt("en-fr")


def test_ids_are_those_of_transformers_own_tokenizer(pretrained):
    vocabulary = {pretrained.tokenizer.id_to_piece(index): index for index in range(60)}
    ids = SeamlessM4TTokenizer.convert_from_spm_model(vocabulary)["vocab"]
    assert pretrained.tokens(torch.tensor(list(ids.values()))) == list(ids) and ids["</s>"] == 3 and len(ids) == 61


def test_an_id_that_the_checkpoint_does_not_name_is_a_number(pretrained):
    size = pretrained.tokenizer.get_piece_size()
    last = pretrained.tokenizer.id_to_piece(size - 1)
    assert size + 40 not in pretrained.names
    assert pretrained.tokens(torch.tensor([size, size + 40])) == [last, f"<{size + 40}>"]
    assert pretrained.text(torch.tensor([size + 40])) == ""


def test_an_odd_last_frame_is_left_out(pretrained):
    rng = np.random.default_rng(0)
    ids = torch.cat([pretrained.prompt("en"), torch.tensor([20, 21])])
    for frames in (99, 105, 113):
        audio = (0.1 * rng.standard_normal(400 + 160 * (frames - 1))).astype(np.float32)
        features = pretrained.features(audio)
        assert features.shape == (frames - 1, 80)
        inputs = dict(pretrained.extractor(audio, sampling_rate=SAMPLE_RATE, return_tensors="pt"))
        assert inputs["attention_mask"][0].tolist() == [1] * (frames // 2) + [0]
        expected = log_p(pretrained.network, {name: value[:, :-1] for name, value in inputs.items()}, ids)
        found = pretrained.decode(pretrained.encode(features[None]), ids)[0]
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_the_other_tasks_of_a_checkpoint_are_passed_over_in_silence(pretrained, folder, tmp_path, capfd):
    copy = tmp_path / "whole"
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    others = {f"{part}.layers.0.fc1.weight": torch.ones(2, 2) for part in ("text_encoder", "t2u_model", "vocoder")}
    save_file(tensors | others, copy / "model.safetensors", metadata={"format": "pt"})
    assert load_model(copy).weights_hash == pretrained.weights_hash
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("frames", range(98, 130, 2))
def test_a_step_covers_the_window_of_the_adapter(pretrained, frames):
    steps = pretrained.steps(frames)
    assert pretrained.encode(torch.zeros(1, frames, 80)).shape == (1, steps, 16)
    convolution = pretrained.network.speech_encoder.adapter.layers[0].self_attn_conv
    impulses = torch.eye(frames // 2)[:, None].expand(-1, 16, -1)  # one for each joined frame
    with torch.inference_mode():
        reached = (convolution(impulses) - convolution(torch.zeros(1, 16, frames // 2))).abs().amax(dim=1) > 1e-6
    covered = reached.any(dim=1)  # joined frames past the last window are not
    assert (reached.sum(dim=1) <= 1).all() and covered[:-3].all()
    own = spread(np.arange(steps)[None], frames, 1, pretrained.subsampling, pretrained.lead)[0, ::2, 0]
    assert np.array_equal(own[covered], reached[covered].int().argmax(dim=1))
    cells = np.repeat(np.arange(frames // 2.0), 2)[None, :, None]
    last = reduce_to_steps(cells, steps, pretrained.subsampling, lead=pretrained.lead)[0]
    assert np.array_equal(last, [int(reached[:, step].nonzero().max()) for step in range(steps)])


def test_its_maps_keep_their_steps_in_files_of_other_tools(pretrained, utterances, tmp_path):
    maps = explain(pretrained, utterances[0], **SMALL)
    write_released([maps], tmp_path / "seamless-tiny" / "en")
    (read,) = read_released(tmp_path / "seamless-tiny" / "en")
    for name in ("step", "time", "token", "cross_attention", "input_saliency", "encoder_saliency"):
        assert np.array_equal(read[name], maps[name]), name
    assert correlate(read, "input").identical(correlate(maps, "input"))


def test_a_checkpoint_that_does_not_tell_its_languages(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "generation_config.json").unlink()
    with pytest.raises(ValueError, match="No generation_config.json of .*copy tells its languages: fetch the model"):
        load_model(copy)
