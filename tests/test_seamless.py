"""SeamlessM4T v2 on a tiny random checkpoint with a SentencePiece tokenizer trained here."""

import shutil

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import SENTENCES
from pretrained import PretrainedChecks, log_p, quietly, randomised
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, SeamlessM4TFeatureExtractor, SeamlessM4TTokenizer, SeamlessM4Tv2Config
from transformers import SeamlessM4Tv2ForSpeechToText as Network

from xattn.analysis.correlation import correlate
from xattn.audio import SAMPLE_RATE
from xattn.maps import expand_to_frames, reduce_to_steps
from xattn.models import load_model
from xattn.models.seamless import SeamlessModel
from xattn.released import read_released, write_released


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A checkpoint like those on the hub."""
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
    for part in (randomised(network, end=0.5), SeamlessM4TFeatureExtractor()):
        part.save_pretrained(folder)
    return folder


class TestSeamless(PretrainedChecks):
    DIRECTIONS = ("en", "en-it")

    def framed(self, model, inputs):
        return inputs["input_features"][0].view(-1, 80)

    def search(self, model, inputs, direction):
        languages = {"en": "eng", "it": "ita"}
        return Network.generate(
            model.network,
            **inputs,
            tgt_lang=languages[direction[-2:]],
            forced_eos_token_id=3,
            num_beams=5,
            no_repeat_ngram_size=5,
            max_new_tokens=12,
        )[0]

    def seconds(self, frames, steps):
        first = np.maximum(16 * np.arange(steps) - 8, 0)
        last = np.minimum(16 * np.arange(steps) + 7, frames - 1)
        return 0.0125 + 0.01 * np.arange(frames), 0.0125 + 0.01 * (first + last) / 2


def test_a_loaded_model_has_the_interface(pretrained):
    assert isinstance(pretrained, SeamlessModel) and pretrained.name == "seamless-tiny"
    assert pretrained.languages == ("en", "afr", "it")
    assert pretrained.frame_seconds == 0.01 and not pretrained.detects_language
    assert pretrained.step_frames(40).tolist() == [[-8, 8], [8, 24], [24, 40]]
    assert pretrained.tokens(pretrained.prompt("en-it")) == ["</s>", "__ita__"]
    ids = 1 + torch.tensor([*pretrained.tokenizer.encode("the dog sì"), 2])
    assert "".join(pretrained.tokens(ids)) == "▁the▁dog▁sì</s>"
    assert pretrained.text(torch.cat([pretrained.prompt("en"), ids, torch.tensor([0])])) == "the dog sì"
    with pytest.raises(ValueError, match="The model seamless-tiny does not write 'fr'; choose one of en, afr, it"):
        pretrained.prompt("en-fr")


def test_ids_equal_those_of_transformers_own_tokenizer(pretrained):
    vocabulary = {pretrained.tokenizer.id_to_piece(index): index for index in range(60)}
    ids = SeamlessM4TTokenizer.convert_from_spm_model(vocabulary)["vocab"]
    assert pretrained.tokens(torch.tensor(list(ids.values()))) == list(ids) and ids["</s>"] == 3 and len(ids) == 61


def test_an_id_without_a_piece_is_shown_as_a_number(pretrained):
    size = pretrained.tokenizer.get_piece_size()
    last = pretrained.tokenizer.id_to_piece(size - 1)
    assert size + 40 not in pretrained.names
    assert pretrained.tokens(torch.tensor([size, size + 40])) == [last, f"<{size + 40}>"]
    assert pretrained.text(torch.tensor([size + 40])) == ""


def test_an_odd_last_frame_is_dropped(pretrained):
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


def test_weights_of_other_tasks_are_ignored_silently(pretrained, folder, tmp_path, capfd):
    copy = tmp_path / "whole"
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    others = {f"{part}.layers.0.fc1.weight": torch.ones(2, 2) for part in ("text_encoder", "t2u_model", "vocoder")}
    save_file(tensors | others, copy / "model.safetensors", metadata={"format": "pt"})
    assert load_model(copy).weights_hash == pretrained.weights_hash
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("frames", range(98, 130, 2))
def test_a_step_covers_the_window_of_the_adapter(pretrained, frames):
    step_frames = pretrained.step_frames(frames)
    steps = len(step_frames)
    assert pretrained.encode(torch.zeros(1, frames, 80)).shape == (1, steps, 16)
    convolution = pretrained.network.speech_encoder.adapter.layers[0].self_attn_conv
    impulses = torch.eye(frames // 2)[:, None].expand(-1, 16, -1)  # one for each pair of frames
    with torch.inference_mode():
        reached = (convolution(impulses) - convolution(torch.zeros(1, 16, frames // 2))).abs().amax(dim=1) > 1e-6
    covered = reached.any(dim=1)  # pairs past the last window are not
    assert (reached.sum(dim=1) <= 1).all() and covered[:-3].all()
    own = expand_to_frames(np.arange(steps)[None], step_frames, frames, 1)[0, ::2, 0]
    assert np.array_equal(own[covered], reached[covered].int().argmax(dim=1))
    cells = np.repeat(np.arange(frames // 2.0), 2)[None, :, None]
    last = reduce_to_steps(cells, step_frames)[0]
    assert np.array_equal(last, [int(reached[:, step].nonzero().max()) for step in range(steps)])


def test_its_maps_keep_their_steps_in_released_files(pretrained, utterances, tmp_path):
    maps = quietly(pretrained, utterances[0])
    write_released([maps], tmp_path / "seamless-tiny" / "en")
    (read,) = read_released(tmp_path / "seamless-tiny" / "en")
    for name in ("step", "step_start", "step_end", "time", "token", "word"):
        assert np.array_equal(read[name], maps[name]), name
    for name in ("cross_attention", "input_saliency", "encoder_saliency"):
        assert np.array_equal(read[name], maps[name]), name
    rho = [correlate(item.cross_attention, item.input_saliency) for item in (read, maps)]
    assert rho[0].identical(rho[1])


def test_a_checkpoint_without_its_languages_raises(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "generation_config.json").unlink()
    with pytest.raises(
        ValueError, match="copy has no generation_config.json with its languages: download the complete"
    ):
        load_model(copy)
