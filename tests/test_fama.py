import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from pretrained import WITHOUT_EFFECT
from safetensors.torch import load_file, save_file
from transformers import Speech2TextFeatureExtractor, Speech2TextTokenizer

from xattn import Occlusion, explain
from xattn.analysis.quality import transcribe
from xattn.models import load_model
from xattn.models.conformer import ConformerForConditionalGeneration
from xattn.models.fama import configuration, conformer
from xattn.models.weights import folder_hash

COMMIT = "0123456789abcdef0123456789abcdef01234567"

# From https://huggingface.co/FBK-MT/fama-medium/blob/main/config.json up to max_target_positions, with small sizes; the
# rest from transformers' Speech2Text models.
CONFIGURATION = {
    "activation_dropout": 0.1,
    "activation_function": "relu",
    "architectures": ["ConformerEncoderDecoderForConditionalGeneration"],
    "attention_dropout": 0.1,
    "auto_map": {
        "AutoConfig": "configuration_conformer.Speech2TextConformerConfig",
        "AutoModelForSpeechSeq2Seq": "conformer_model.ConformerEncoderDecoderForConditionalGeneration",
    },
    "batch_unsafe_relative_shift": True,
    "bos_token_id": 0,
    "conformer_attention_dropout": 0.1,
    "conformer_conv_dropout": 0.1,
    "conformer_conv_kernel_size": 31,
    "conformer_feedforward_dropout": 0.1,
    "conformer_half_step_residual": True,
    "conv_channels": 32,
    "conv_expansion_factor": 2,
    "conv_kernel_sizes": [5, 5],
    "ctc_compress_fixed_ratio": 4,
    "ctc_compress_max_out_size": -1,
    "ctc_compress_strategy": "none",
    "d_model": 16,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 32,
    "decoder_layerdrop": 0.0,
    "decoder_layers": 2,
    "decoder_start_token_id": 2,
    "dropout": 0.1,
    "early_stopping": None,
    "encoder_attention_heads": 2,
    "encoder_layers": 2,
    "eos_token_id": 2,
    "feed_forward_expansion_factor": 4,
    "init_std": 0.02,
    "input_channels": 1,
    "input_feat_per_channel": 80,
    "is_encoder_decoder": True,
    "max_length": None,
    "max_source_positions": 3000,
    "max_target_positions": 16,
    "model_type": "speech_to_text",
    "pad_token_id": 1,
    "scale_embedding": True,
    "tie_word_embeddings": False,
}


def tiny(made, **changes):
    """A random network with the sizes of CONFIGURATION."""
    sizes = {"encoder_ffn_dim": 64, "final_ctc": False, "ctc_encoder_layer": None, "tie_word_embeddings": False}
    return made.network(**sizes | {"batch_unsafe_relative_shift": True, "starts_with_eos": True} | changes)


def write_published(folder, network, vocabulary, **configuration):
    """Write a network as a folder like those on the hub."""
    folder.mkdir(parents=True)
    for file in ("sentencepiece.bpe.model", "vocab.json"):
        shutil.copy(vocabulary / file, folder)
    content = CONFIGURATION | {"vocab_size": network.config.vocab_size} | configuration
    (folder / "config.json").write_text(json.dumps(content))
    weights = {f"model.{key}": value.clone() for key, value in network.state_dict().items()}
    weights["lm_head.weight"] = weights.pop("model.decoder.output_projection.weight")
    save_file(weights, folder / "model.safetensors")
    return folder


@pytest.fixture
def published(made, vocabulary, tmp_path):
    """A function that makes a folder like those on the hub."""

    def make(network=None, name=COMMIT, **configuration):
        return write_published(tmp_path / name, network or tiny(made), vocabulary, **configuration)

    return make


def features(frames, seed=0):
    return torch.randn(frames, 80, generator=torch.Generator().manual_seed(seed))


def logits(network):
    with torch.inference_mode():
        return network(features(50)[None], decoder_input_ids=torch.tensor([[2, 4, 9, 8]]), use_cache=False).logits


def test_a_folder_from_the_hub_gives_the_network_it_was_made_from(made, published):
    network = tiny(made)
    model = load_model(published(network))
    assert torch.equal(logits(model.network), logits(network))
    assert model.config.encoder_ffn_dim == 64 and model.config.batch_unsafe_relative_shift
    assert not model.padding_safe and model.config.ctc_encoder_layer is None and not model.network.training
    assert {value.dtype for value in model.network.parameters()} == {torch.float32}


@pytest.mark.parametrize("entry", WITHOUT_EFFECT, ids=str)
def test_the_attention_that_config_json_asks_for_has_no_effect(made, published, entry):
    network = tiny(made)
    model = load_model(published(network, **entry))
    assert model.config._attn_implementation == "eager" and torch.equal(logits(model.network), logits(network))


def fused(weights, module, ours, joint):
    """Join the projections `ours` of a module into one called `joint`."""
    for kind in ("weight", "bias"):
        parts = [weights.pop(f"{module}.{each}_proj.{kind}") for each in ours]
        weights[f"{module}.{joint}{kind}"] = torch.cat(parts)
    return weights


DECODER, ENCODER = "decoder.layers.0.self_attn", "encoder.conformer_layers.1.attention.attention"
LAYOUTS = {
    "the reference's": lambda weights: weights,
    "transformers'": lambda weights: {f"model.{name}": tensor for name, tensor in weights.items()},
    "layers": lambda weights: {name.replace("conformer_layers", "layers"): weights[name] for name in weights},
    "in_proj_weight": lambda weights: fused(weights, DECODER, "qkv", "in_proj_"),
    "qkv_proj.weight": lambda weights: fused(weights, ENCODER, ("query", "key", "value"), "qkv_proj."),
    "letters": lambda weights: {re.sub(r"\.(q|k|v)[a-z]+_proj", r".\1_proj", name): weights[name] for name in weights},
    "half": lambda weights: {name: tensor.half() for name, tensor in weights.items()},
    "without counters": lambda weights: {name: weights[name] for name in weights if "num_batches" not in name},
    "computed tables": lambda weights: (
        weights
        | {f"encoder.conformer_layers.{i}.attention.positional_encoding.pe": torch.zeros(1, 9, 16) for i in range(2)}
        | {"decoder.embed_positions.weights": torch.zeros(20, 16), "decoder.version": torch.tensor([3.0])}
    ),
    "a subsampler called conv": lambda weights: {
        name.replace("encoder.subsample.", "encoder.conv."): weights[name] for name in weights
    },
    "joint CTC": lambda weights: weights | {"auxiliary_decoder.fc.weight": torch.zeros(40, 16)},
    "a CTC head of no layer": lambda weights: (
        weights | {"encoder.ctc_fc.weight": torch.zeros(7, 16), "encoder.ctc_fc.bias": torch.zeros(7)}
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_are_found_under_all_their_names(made, layout):
    network = tiny(made)
    weights = LAYOUTS[layout](dict(network.state_dict()))
    read = conformer(CONFIGURATION, weights, Path("here"))
    tolerance = 0.02 if layout == "half" else 0
    torch.testing.assert_close(logits(read), logits(network), rtol=0, atol=tolerance)
    assert not hasattr(read.encoder, "ctc_fc")


@pytest.mark.parametrize(("name", "layers", "millions"), [("small", (12, 6), 474), ("medium", (24, 12), 878)])
def test_model_sizes_equal_the_paper_s(name, layers, millions):
    """The paper's table counts both CTC heads; the second one is not built here."""
    size = {"d_model": 1024, "decoder_ffn_dim": 4096, "conv_channels": 1024, "vocab_size": 16000}
    heads = {"encoder_attention_heads": 16, "decoder_attention_heads": 16, "max_target_positions": 512}
    depth = dict(zip(("encoder_layers", "decoder_layers"), layers, strict=True))
    with torch.device("meta"):
        config = configuration(CONFIGURATION | size | heads | depth | {"ctc_encoder_layer": 8}, Path(name))
        network = ConformerForConditionalGeneration(config)
    head = sum(value.numel() for value in network.encoder.ctc_fc.parameters())
    assert (sum(value.numel() for value in network.parameters()) + head) // 10**6 == millions


@pytest.mark.parametrize("stored", ["decoder.embed_tokens.weight", "decoder.output_projection.weight"])
@pytest.mark.parametrize("stated", [True, False])
def test_shared_embeddings_can_be_stored_once(made, stored, stated):
    network = tiny(made, tie_word_embeddings=True)
    weights = dict(network.state_dict())
    both = {"decoder.embed_tokens.weight", "decoder.output_projection.weight"}
    assert torch.equal(*(weights[name] for name in both))
    del weights[(both - {stored}).pop()]
    options = {name: value for name, value in CONFIGURATION.items() if name != "tie_word_embeddings"}
    read = conformer(options | ({"tie_word_embeddings": True} if stated else {}), weights, Path("here"))
    assert read.config.tie_word_embeddings and torch.equal(logits(read), logits(network))


def test_a_ctc_head_can_have_another_vocabulary(made):
    network = tiny(made, ctc_encoder_layer=2, ctc_vocab_size=7)
    read = conformer(CONFIGURATION | {"ctc_encoder_layer": 2}, network.state_dict(), Path("here"))
    hidden = read.encoder(features(30)[None]).hidden_states
    (head,) = read.ctc_logits(hidden)
    assert head.shape == (1, 8, 7) and torch.equal(head, network.encoder.ctc_fc(hidden[1]))


def test_one_sentence_lists_all_weights_that_do_not_fit(made):
    weights = dict(tiny(made).state_dict())
    weights["model.decoder.layer_norm.bias"] = weights["decoder.layer_norm.bias"]
    weights["encoder.conformer_layers.2.layernorm.bias"] = torch.zeros(16)
    weights["encoder.auxiliary.weight"] = weights["decoder.ctc_fc.bias"] = torch.zeros(7)
    weights["decoder.layers.1.fc1.bias"] = torch.zeros(33)
    del weights["decoder.layers.0.fc2.bias"], weights["encoder.conformer_layers.0.attention.attention.u_bias"]
    with pytest.raises(ValueError) as error:
        conformer(CONFIGURATION, weights, Path("here"))
    assert str(error.value) == (
        "The weights in here do not fit its configuration (model.decoder.layer_norm.bias repeats "
        "decoder.layer_norm.bias; decoder.layers.1.fc1.bias is [33] and not [32]; "
        "encoder.conformer_layers.2.layernorm.bias is unknown; encoder.auxiliary.weight is unknown; "
        "decoder.ctc_fc.bias is unknown; "
        "encoder.conformer_layers.0.attention.attention.u_bias is missing; decoder.layers.0.fc2.bias is missing): "
        "download it again."
    )


def test_shared_embeddings_that_differ_raise(made):
    weights = tiny(made).state_dict()
    with pytest.raises(
        ValueError, match="decoder.embed_tokens.weight and decoder.output_projection.weight should be equal"
    ):
        conformer(CONFIGURATION | {"tie_word_embeddings": True}, weights, Path("here"))
    del weights["decoder.output_projection.weight"]
    with pytest.raises(ValueError, match=r"\(decoder.output_projection.weight is missing\)"):
        conformer(CONFIGURATION, weights, Path("here"))


def test_one_sentence_lists_all_unsupported_options(made):
    options = CONFIGURATION | {"ctc_compress_strategy": "avg", "conv_expansion_factor": 4, "distance_penalty": "log"}
    del options["d_model"]
    with pytest.raises(ValueError) as error:
        conformer(options, tiny(made).state_dict(), Path("here"))
    assert str(error.value) == (
        "The configuration in here describes no Conformer that the kit can build (d_model is missing; "
        "conv_expansion_factor is 4 and not 2; ctc_compress_strategy is 'avg' and not 'none'; "
        "distance_penalty is 'log' and not False): give another model."
    )
    conformer(CONFIGURATION | {"distance_penalty": None}, tiny(made).state_dict(), Path("here"))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"d_model": "wide"}, "expected int, got str"),
        ({"conv_kernel_sizes": 5}, "has no len"),
        ({"vocab_size": "many"}, "expected int, got str"),
        ({"decoder_attention_heads": 3}, "divisible"),
        ({"activation_function": "swoosh"}, "swoosh"),
    ],
)
def test_options_of_a_wrong_type_raise(published, options, reason):
    with pytest.raises(
        ValueError, match=f"The configuration in .* describes no Conformer .*{reason}.*: give another model"
    ) as error:
        load_model(published(**options))
    assert "\n" not in str(error.value)


def test_pieces_and_text_equal_those_of_the_published_tokenizer(published):
    folder = published()
    model = load_model(folder)
    tokenizer = Speech2TextTokenizer(str(folder / "vocab.json"), str(folder / "sentencepiece.bpe.model"))
    ids = tokenizer("the dog sì lo è").input_ids
    assert len(set(ids)) > 5 and ids[-1] == 2
    assert model.tokens(torch.tensor(ids)) == tokenizer.convert_ids_to_tokens(ids)
    assert model.token_ids("the dog sì lo è").tolist() == ids
    prompts = {language: model.prompt(language) for language in ("en", "it")}
    assert sorted(model.languages) == ["en", "it"]
    for language, prompt in prompts.items():
        assert tokenizer.convert_ids_to_tokens(prompt.tolist()) == ["</s>", f"<lang:{language}>"]
        assert model.text(torch.tensor([*prompt.tolist(), *ids])) == "the dog sì lo è"
        assert tokenizer.decode(ids, skip_special_tokens=True) == "the dog sì lo è"


def test_a_vocabulary_can_lack_only_the_blank(made, published):
    model = load_model(published(tiny(made, vocab_size=41), "more"))
    assert model.tokens(torch.tensor([39, 40]))[1] == "<ctc_blank>"
    with pytest.raises(ValueError, match="vocab.json has 40 pieces, but the model has 43: give the model's own"):
        load_model(published(tiny(made, vocab_size=43), "many"))
    folder = published(name="gap")
    ids = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(ids | {max(ids, key=ids.get): 99}))
    with pytest.raises(ValueError, match="vocab.json does not number its 40 pieces from 0: download it again"):
        load_model(folder)


def test_features_equal_those_of_its_feature_extractor(published):
    """preprocessor_config.json: Speech2TextFeatureExtractor, 80 bands, means and variances normalised."""
    time = np.arange(24000) / 16000
    noise = np.random.default_rng(0).standard_normal(time.size)
    audio = (0.3 * np.sin(2 * np.pi * (300 + 400 * time) * time) + 0.01 * noise).astype(np.float32)
    extractor = Speech2TextFeatureExtractor(feature_size=80, num_mel_bins=80)
    expected = extractor(audio, sampling_rate=16000, return_tensors="np").input_features[0]
    np.testing.assert_allclose(load_model(published()).features(audio), expected, atol=2e-3)


def test_maps_have_one_row_for_each_token_after_the_prompt(published, utterances):
    model = load_model(published())
    occlusion = Occlusion(input_masks=6, encoder_masks=6)
    maps = explain(model, utterances[0], translate_to="it", occlusion=occlusion, progress=False)
    ids = model.generate(model.features(utterances[0].audio())[None], "en-it")[0]
    assert maps.token.values.tolist() == model.tokens(ids) and maps.token.values[-1] == "</s>"
    assert maps.input_saliency.sizes["token"] == maps.cross_attention.sizes["token"] == len(ids) > 1
    np.testing.assert_allclose(maps.cross_attention.sum("step"), 1, atol=1e-5)


def test_missing_or_damaged_files_raise(published):
    folder = published()
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "vocab.json").unlink()
    with pytest.raises(FileNotFoundError, match=f"{COMMIT} has no vocab.json, .*safetensors: download it again"):
        load_model(folder)
    shutil.copy(published(name="other") / "vocab.json", folder)
    for name, sentence in (
        ("vocab.json", "not a JSON object of pieces"),
        ("sentencepiece.bpe.model", "damaged or no Sent"),
    ):
        whole = (folder / name).read_bytes()
        (folder / name).write_text("{")
        (folder / "model.safetensors").write_bytes((folder / "weights").read_bytes())
        with pytest.raises(ValueError, match=f"{name} is {sentence}.*: download it again"):
            load_model(folder)
        (folder / name).write_bytes(whole)
    (folder / "model.safetensors").write_bytes((folder / "weights").read_bytes()[:500])
    with pytest.raises(ValueError, match="The weights in .* are damaged"):
        load_model(folder)


def test_weights_in_several_files_give_the_same_model(published):
    folder = published()
    one = load_model(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    for part in range(2):
        some = {name: tensors[name] for name in sorted(tensors)[part::2]}
        save_file(some, folder / f"model-0000{part + 1}-of-00002.safetensors")
    several = load_model(folder)
    assert several.weights_hash == one.weights_hash == folder_hash(folder)
    assert torch.equal(logits(several.network), logits(one.network))
    (folder / "vocab.json").write_text((folder / "vocab.json").read_text() + " ")
    assert folder_hash(folder) != one.weights_hash


def test_a_hub_model_is_downloaded_at_its_revision_and_records_its_commit(published, monkeypatch):
    folder, calls = published(), []

    def snapshot_download(name, revision, allow_patterns):
        calls.append((name, revision))
        downloaded = huggingface_hub.utils.filter_repo_objects
        code = ["config.json", "conformer_model.py", "pytorch_model.bin", "model.pt", "model.safetensors", "vocab.json"]
        kept = ["config.json", "model.safetensors", "vocab.json"]
        assert list(downloaded(code, allow_patterns=allow_patterns)) == kept
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model = load_model("FBK-MT/fama-small")
    assert (model.name, model.source) == ("fama-small", f"FBK-MT/fama-small@{COMMIT}")
    again = load_model(model.source)
    assert (again.name, again.source, again.weights_hash) == (model.name, model.source, model.weights_hash)
    assert load_model(folder).weights_hash == model.weights_hash
    assert calls == [("FBK-MT/fama-small", "main"), ("FBK-MT/fama-small", COMMIT)]


def test_nothing_is_downloaded_for_other_names(published, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("downloaded"))
    monkeypatch.chdir(tmp_path)
    published(name="here")
    (tmp_path / "FBK-MT").mkdir()
    (tmp_path / "here").rename(tmp_path / "FBK-MT" / "fama-small")
    assert load_model("FBK-MT/fama-small").source == str(Path("FBK-MT/fama-small"))
    for name in ("fama-small", "./fama-small", "/FBK-MT/fama-small", "data/models/fama", "a/b@", "../fama", "a b/c"):
        with pytest.raises(FileNotFoundError, match="There is no model folder .*: give the path of one"):
            load_model(name)


def test_an_unreachable_hub_raises(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for name in ("FBK-MT/fama-small@main", "FBK-MT/fama-small"):
        with pytest.raises(OSError) as error:
            load_model(name)
        assert isinstance(error.value.__cause__, LocalEntryNotFoundError)
        sentence = (
            "There is no model folder FBK-MT/fama-small, and the Hugging Face hub does not provide it at revision"
        )
        assert str(error.value).startswith(f"{sentence} main") and "\n" not in str(error.value)
        assert str(error.value).endswith("check the name and the network, or give a local folder.")


SPECIAL = ("<unk>", "<pad>", "<s>", "<ctc_blank>", "<lang:it>", "<lang:en>")


@pytest.mark.parametrize("piece", SPECIAL)
def test_special_tokens_are_never_written_except_the_last_one(made, published, piece):
    model = load_model(published(tiny(made, vocab_size=41)))
    pieces = model.tokens(torch.arange(41))
    token, special = pieces.index(piece), [pieces.index(each) for each in SPECIAL]
    with torch.no_grad():
        decoder = model.network.decoder
        decoder.output_projection.weight[token] = 10 * decoder.layer_norm.bias
    for seed in range(3):
        inputs = features(60, seed)[None]
        assert model.decode(model.encode(inputs), model.prompt("it"))[0, -1].argmax() == token
        (ids,) = model.generate(inputs, "it")
        assert len(ids) > 1 and ids[-1] == 2
        assert not {token, *special} & set(ids[:-1].tolist())


def test_a_model_that_does_not_start_with_eos_suppresses_no_tokens(model):
    assert model.network.generation_config.suppress_tokens is None


LENGTHS = (90, 57, 90, 34, 57, 90)


def test_texts_of_an_unsafe_model_do_not_depend_on_the_batch(made, published, monkeypatch):
    model = load_model(published(tiny(made, seed=1)))
    inputs = [features(frames, seed) for seed, frames in enumerate(LENGTHS)]
    alone = [model.text(model.generate(item[None], "en")[0]) for item in inputs]
    assert len(set(alone)) > 2
    monkeypatch.setattr(model, "padding_safe", True)
    assert transcribe(model, inputs, "en") != alone
    monkeypatch.setattr(model, "padding_safe", False)
    calls, generate = [], model.generate

    def record(batch, language, mask):
        calls.append(batch.shape[:2])
        assert mask.all()
        return generate(batch, language, mask)

    monkeypatch.setattr(model, "generate", record)
    assert transcribe(model, inputs, "en") == alone
    assert sorted(calls) == [(1, 34), (2, 57), (3, 90)]
    calls.clear()
    assert transcribe(model, inputs[::-1], "en", batch_size=2) == alone[::-1]
    assert sorted(calls) == [(1, 34), (1, 90), (2, 57), (2, 90)]


def test_padding_that_would_change_the_output_raises(published):
    model = load_model(published())
    padded = torch.nn.utils.rnn.pad_sequence([features(90), features(40, 1)], batch_first=True)
    mask = (torch.arange(90) < torch.tensor([[90], [40]])).long()
    with torch.inference_mode():
        together = model.network.encoder(padded, mask).last_hidden_state[1, :10]
        assert (together - model.encode(features(40, 1)[None])[0]).abs().max() > 1e-3
    with pytest.raises(
        ValueError, match=f"The outputs of {COMMIT} depend on how much its input is padded: give it one"
    ):
        model.generate(padded, "en", mask)
