"""Checkpoints of CTranslate2 (faster-whisper) and OpenAI, written here after the descriptions of their formats."""

import json
import os
import re
import shutil
import struct

import huggingface_hub
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pretrained import quietly, randomised
from safetensors.torch import load_file, save_file
from test_whisper import small_whisper
from transformers import (
    GenerationConfig,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperTokenizer,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from xattn.models import load_model
from xattn.models.whisper import WhisperModel

# A type for the weights of linear layers and embeddings, and one for everything else.
KINDS = {
    "float32": ("float32", "float32"),
    "float16": ("float16", "float16"),
    "bfloat16": ("bfloat16", "bfloat16"),
    "int16": ("int16", "float32"),
    "int8": ("int8", "float32"),
    "int8_float16": ("int8", "float16"),
    "int8_bfloat16": ("int8", "bfloat16"),
}
IDS = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4, "bfloat16": 5}
BYTES = {"float32": 4, "int8": 1, "int16": 2, "int32": 4, "float16": 2, "bfloat16": 2}
# Largest difference from the weights that each type makes, relative to the largest weight of its scale.
PRECISION = {"float32": 0, "float16": 2**-11, "bfloat16": 2**-8, "int16": 2**-10, "int8": 0.5 / 127}
SUPPRESSED, FIRST, HEADS = [5, 6, 9], [7], [[1, 0], [2, 1]]


def encoded(array, kind):
    """The bytes of a float32 array in a type, its scale (None without one), and the numbers that they stand for."""
    if kind == "bfloat16":
        rounded = torch.from_numpy(array).to(torch.bfloat16)
        return rounded.view(torch.int16).numpy().tobytes(), None, rounded.float().numpy()
    if kind.startswith("int"):
        flat = array.reshape(len(array), -1)
        largest = np.abs(flat).max(axis=1) if kind == "int8" else np.abs(flat).max()
        scale = np.float32(127 if kind == "int8" else 1024) / largest
        whole = np.rint(flat * (scale[:, None] if scale.ndim else scale)).astype(kind)
        numbers = whole.astype(np.float32) / (scale[:, None] if scale.ndim else scale)
        return whole.tobytes(), scale, numbers.reshape(array.shape)
    return array.astype(kind).tobytes(), None, array.astype(kind).astype(np.float32)


def parts_of(layers):
    """The name of each part of CTranslate2's model and those of transformers, whose rows it stacks."""
    parts = {
        "decoder/embeddings": ["model.decoder.embed_tokens"],
        "encoder/conv1": ["model.encoder.conv1"],
        "encoder/conv2": ["model.encoder.conv2"],
    }
    for side in ("encoder", "decoder"):
        parts[f"{side}/position_encodings"] = [f"model.{side}.embed_positions"]
        parts[f"{side}/layer_norm"] = [f"model.{side}.layer_norm"]
        for layer in range(layers[side]):
            theirs, ours = f"{side}/layer_{layer}", f"model.{side}.layers.{layer}"
            parts[f"{theirs}/self_attention/layer_norm"] = [f"{ours}.self_attn_layer_norm"]
            parts[f"{theirs}/self_attention/linear_0"] = [f"{ours}.self_attn.{name}_proj" for name in "qkv"]
            parts[f"{theirs}/self_attention/linear_1"] = [f"{ours}.self_attn.out_proj"]
            parts[f"{theirs}/ffn/layer_norm"] = [f"{ours}.final_layer_norm"]
            parts[f"{theirs}/ffn/linear_0"] = [f"{ours}.fc1"]
            parts[f"{theirs}/ffn/linear_1"] = [f"{ours}.fc2"]
            if side == "decoder":
                parts[f"{theirs}/attention/layer_norm"] = [f"{ours}.encoder_attn_layer_norm"]
                parts[f"{theirs}/attention/linear_0"] = [f"{ours}.encoder_attn.q_proj"]
                parts[f"{theirs}/attention/linear_1"] = [f"{ours}.encoder_attn.{name}_proj" for name in "kv"]
                parts[f"{theirs}/attention/linear_2"] = [f"{ours}.encoder_attn.out_proj"]
    return parts


def kinds_of(part):
    """The names of a part's arrays in CTranslate2 and transformers."""
    if part.endswith("layer_norm"):
        return {"gamma": "weight", "beta": "bias"}
    if part.endswith("position_encodings"):
        return {"encodings": "weight"}
    return {"weight": "weight"} if part.endswith("embeddings") else {"weight": "weight", "bias": "bias"}


def nothing(variables, aliases):
    pass


def write_ctranslate2(
    folder, source, kind="float32", *, convolutions=False, edit=nothing, version=6, name="WhisperSpec", revision=3
):
    """Write a folder in transformers' layout in CTranslate2's; return the tensors that it stands for.

    convolutions: quantise their weights too, as newer versions of CTranslate2 do.
    edit: changes variables, {name: (type, shape, bytes)}, and aliases, {alias: name}, before they are written.
    """
    folder.mkdir()
    tensors = {name: tensor.numpy() for name, tensor in load_file(source / "model.safetensors").items()}
    own = json.loads((source / "config.json").read_text())
    layers = {side: own[f"{side}_layers"] for side in ("encoder", "decoder")}
    arrays, sources = {}, {}
    for part, ours in parts_of(layers).items():
        for theirs, our_kind in kinds_of(part).items():
            names = [f"{our}.{our_kind}" for our in ours]
            width = len(tensors[f"{ours[0]}.weight"])  # keys have no bias, where 0 is written
            rows = [tensors.get(each, np.zeros(width, dtype=np.float32)) for each in names]
            arrays[f"{part}/{theirs}"], sources[f"{part}/{theirs}"] = np.concatenate(rows), names
    if "proj_out.weight" in tensors:
        arrays["decoder/projection/weight"] = tensors["proj_out.weight"]
        sources["decoder/projection/weight"] = ["proj_out.weight"]
    variables, aliases, expected = {}, {}, {}
    for variable, array in sorted(arrays.items()):
        equal = (first for first in variables if first in arrays and np.array_equal(arrays[first], array))
        first = next(equal, None)
        if first:
            aliases[variable], numbers = first, expected[first]
        else:
            quantised = variable.endswith("/weight") and (convolutions or "conv" not in variable)
            content, scale, numbers = encoded(array, KINDS[kind][0 if quantised else 1])
            variables[variable] = (KINDS[kind][0 if quantised else 1], array.shape, content)
            if scale is not None:
                variables[f"{variable}_scale"] = ("float32", scale.shape, scale.tobytes())
        expected[variable] = numbers
    if "proj_out.weight" not in tensors:
        aliases["decoder/projection/weight"] = "decoder/embeddings/weight"
    for setting, type_name, value in (
        ("decoder/activation", "int8", 3),
        ("decoder/alibi", "int8", 0),
        ("decoder/alignment_layer", "int16", -1),
        ("decoder/num_heads", "int16", own["decoder_attention_heads"]),
        ("decoder/pre_norm", "int8", 1),
        ("decoder/scale_embeddings", "int8", 0),
        ("encoder/num_heads", "int16", own["encoder_attention_heads"]),
    ):
        variables[setting] = (type_name, (), np.array(value, dtype=type_name).tobytes())
    edit(variables, aliases)

    def text(words):
        return struct.pack("<H", len(words) + 1) + words.encode() + b"\0"

    with (folder / "model.bin").open("wb") as file:
        file.write(struct.pack("<I", version) + text(name) + struct.pack("<II", revision, len(variables)))
        for variable, (type_name, shape, content) in sorted(variables.items()):
            file.write(text(variable) + struct.pack(f"<B{len(shape)}I", len(shape), *shape))
            file.write(struct.pack("<BI", IDS.get(type_name, type_name), len(content)) + content)
        file.write(struct.pack("<I", len(aliases)))
        file.writelines(text(alias) + text(target) for alias, target in aliases.items())
    stated = {"suppress_ids": SUPPRESSED, "suppress_ids_begin": FIRST, "alignment_heads": HEADS, "lang_ids": [8]}
    (folder / "config.json").write_text(json.dumps(stated))
    shutil.copy(source / "tokenizer.json", folder)
    tokens = WhisperTokenizer.from_pretrained(source).get_vocab()
    stamps = [f"<|{0.02 * step:.2f}|>" for step in range(own["vocab_size"] - len(tokens))]
    lines = "\n".join([*sorted(tokens, key=tokens.get), *stamps, ""])
    (folder / "vocabulary.txt").write_text(lines, encoding="utf-8")
    result = {}
    for variable, names in sources.items():
        rows = np.split(expected[variable], len(names))
        result |= {each: torch.from_numpy(part.copy()) for each, part in zip(names, rows, strict=True)}
    return {each: tensor for each, tensor in result.items() if not each.endswith("k_proj.bias")}


def write_openai(path, source, dtype=torch.float16, **changes):
    """Write a folder in transformers' layout as OpenAI does; changes replace entries of dims."""
    tensors, own = load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text())
    names = {"token_embedding.weight": "embed_tokens.weight", "positional_embedding": "embed_positions.weight"}
    state = {}
    for side, last in (("encoder", "ln_post"), ("decoder", "ln")):
        for theirs, ours in names.items():
            if (side, theirs) != ("encoder", "token_embedding.weight"):
                state[f"{side}.{theirs}"] = tensors[f"model.{side}.{ours}"]
        attentions = [("attn", "self_attn"), ("cross_attn", "encoder_attn")][: 1 + (side == "decoder")]
        modules = {f"{side}.{last}": f"model.{side}.layer_norm"}
        modules |= {f"encoder.{conv}": f"model.encoder.{conv}" for conv in ("conv1", "conv2")}
        for layer in range(own[f"{side}_layers"]):
            theirs, ours = f"{side}.blocks.{layer}", f"model.{side}.layers.{layer}"
            modules |= {f"{theirs}.mlp.0": f"{ours}.fc1", f"{theirs}.mlp.2": f"{ours}.fc2"}
            modules[f"{theirs}.mlp_ln"] = f"{ours}.final_layer_norm"
            for attention, our in attentions:
                modules[f"{theirs}.{attention}_ln"] = f"{ours}.{our}_layer_norm"
                for word, letter in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "out")):
                    modules[f"{theirs}.{attention}.{word}"] = f"{ours}.{our}.{letter}_proj"
        for theirs, ours in modules.items():
            for kind in ("weight", "bias"):
                if not (theirs.endswith(".key") and kind == "bias"):
                    state[f"{theirs}.{kind}"] = tensors[f"{ours}.{kind}"]
    dims = {"n_vocab": own["vocab_size"], "n_mels": own["num_mel_bins"]}
    for side, ours in (("audio", "encoder"), ("text", "decoder")):
        dims[f"n_{side}_ctx"] = own["max_source_positions" if side == "audio" else "max_target_positions"]
        dims[f"n_{side}_state"], dims[f"n_{side}_head"] = own["d_model"], own[f"{ours}_attention_heads"]
        dims[f"n_{side}_layer"] = own[f"{ours}_layers"]
    path.parent.mkdir(exist_ok=True)
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    torch.save({"dims": dims | changes, "model_state_dict": state}, path)
    return {name: tensor.to(dtype).float() for name, tensor in tensors.items()}


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A model for 2 s in transformers' layout, with 397 tokens and four times wider layers inside."""
    folder = small_whisper(tmp_path_factory.mktemp("small") / "whisper-tiny")
    config = WhisperConfig.from_pretrained(folder, encoder_ffn_dim=64, decoder_ffn_dim=64)
    torch.manual_seed(0)
    network = randomised(WhisperForConditionalGeneration(config))
    network.generation_config = GenerationConfig.from_pretrained(folder)
    network.save_pretrained(folder)
    return folder


TASKS = [f"<|{name}|>" for name in ("translate", "transcribe", "startoflm", "startofprev", "nospeech")]
MERGES = ["Ġ t", "h e", "Ġt he", "Ġ -", "- -", "Ġ '", "â Ļ", "Ġ âĻ"]


def whole_vocabulary(size):
    """Text and special tokens as many as OpenAI's, of which most text tokens are never written."""
    text = [*bytes_to_unicode().values(), *(pair.replace(" ", "") for pair in MERGES)]
    text += [f"unused{i}" for i in range((50256 if size == 51864 else 50257) - len(text))]
    languages = [f"<|{code}|>" for code in LANGUAGES][: 100 if size == 51866 else 99]
    return text, ["<|endoftext|>", "<|startoftranscript|>", *languages, *TASKS, "<|notimestamps|>"]


@pytest.fixture(scope="session")
def whole(tmp_path_factory, small):
    """Writes a small random model for 30 s in transformers' layout, with a vocabulary of OpenAI's size, once."""
    written = {}

    def write(size):
        if size not in written:
            text, special = whole_vocabulary(size)
            ids = {token: i for i, token in enumerate(text + special)}
            content = json.loads((small / "tokenizer.json").read_text())
            content["model"]["vocab"] = dict(list(ids.items())[: len(text)])
            content["model"]["merges"], content["post_processor"] = MERGES, None
            blank = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
            content["added_tokens"] = [{"id": ids[token], "content": token} | blank for token in special]
            written[size] = folder = tmp_path_factory.mktemp(str(size)) / "whisper-tiny"
            end = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), ids["<|endoftext|>"])
            start = {"decoder_start_token_id": ids["<|startoftranscript|>"]}
            sizes = {"vocab_size": size, "max_source_positions": 1500, "num_mel_bins": 128 if size == 51866 else 80}
            network = WhisperForConditionalGeneration(WhisperConfig.from_pretrained(small, **sizes, **end, **start))
            suppressed = {"suppress_tokens": SUPPRESSED, "begin_suppress_tokens": FIRST}
            network.generation_config = GenerationConfig(**suppressed, **end, **start)
            extractor = WhisperFeatureExtractor(feature_size=sizes["num_mel_bins"])
            for part in (randomised(network, seed=1), extractor):
                part.save_pretrained(folder)
            (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
        return written[size]

    return write


@pytest.fixture
def beside(tmp_path):
    """A copy of a folder in transformers' layout with other tensors."""

    def copied(source, tensors):
        copy = shutil.copytree(source, tmp_path / "reference")
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, copy / "model.safetensors")
        return load_model(copy)

    return copied


def assert_same(model, reference):
    """Equal tensors, logits to 1e-5, equal tokens and settings of the network that the kit relies on."""
    assert isinstance(model, WhisperModel) and not model.network.training
    assert model.config._attn_implementation == "sdpa"
    found, expected = (each.network.state_dict() for each in (model, reference))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=0)
    frames = 2 * model.config.max_source_positions
    inputs = torch.randn(1, model.config.num_mel_bins, frames, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[model.config.decoder_start_token_id, 20, 21, 22]])
    with torch.inference_mode():
        logits = [each.network(inputs, decoder_input_ids=ids).logits for each in (model, reference)]
    assert logits[1].std() > 0.1
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)
    assert model.tokenizer.get_vocab().items() >= reference.tokenizer.get_vocab().items()
    assert len(model.tokenizer) == model.config.vocab_size
    assert model.token_ids("the dog").tolist() == reference.token_ids("the dog").tolist()
    for name in ("decoder_start_token_id", "eos_token_id", "pad_token_id", "bos_token_id"):
        assert getattr(model.config, name) == getattr(reference.config, name)
        assert getattr(model.network.generation_config, name) == getattr(reference.network.generation_config, name)
    assert model.extractor.to_dict() == reference.extractor.to_dict()


def refused(path, sentence, kind=ValueError):
    """Check that loading fails with this one sentence."""
    with pytest.raises(kind) as error:
        load_model(path)
    assert str(error.value) == sentence


# CTranslate2


@pytest.mark.parametrize("convolutions", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_type_of_ctranslate2_equals_the_same_weights_in_transformers_layout(
    small, beside, tmp_path, kind, convolutions
):
    expected = write_ctranslate2(tmp_path / "faster", small, kind, convolutions=convolutions)
    model = load_model(tmp_path / "faster")
    assert_same(model, beside(small, expected))
    original = load_file(small / "model.safetensors")
    assert original.keys() == expected.keys()
    bound = max(PRECISION[each] for each in KINDS[kind])
    errors = {name: (expected[name] - original[name]).abs().max() / original[name].abs().max() for name in expected}
    assert max(errors[name] for name in errors if original[name].any()) <= bound
    assert (model.name, model.source) == ("faster", str(tmp_path / "faster"))


def test_an_output_matrix_of_its_own_is_read(small, beside, tmp_path):
    source = shutil.copytree(small, tmp_path / "untied")
    config = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": False}
    (source / "config.json").write_text(json.dumps(config))
    tensors = load_file(source / "model.safetensors")
    tensors["proj_out.weight"] = tensors["model.decoder.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    expected = write_ctranslate2(tmp_path / "faster", source, "int8")
    assert not torch.equal(expected["proj_out.weight"], expected["model.decoder.embed_tokens.weight"])
    model = load_model(tmp_path / "faster")
    assert_same(model, beside(source, expected))


def test_an_alias_stands_for_its_target(small, tmp_path):
    """Also for one with a scale, and whichever of the two is stored."""
    seen = {}

    def swapped(variables, aliases):
        assert sum(target == "decoder/layer_0/attention/layer_norm/gamma" for target in aliases.values()) > 5
        for kind in ("weight", "weight_scale"):
            variables[f"decoder/projection/{kind}"] = variables.pop(f"decoder/embeddings/{kind}")
        del aliases["decoder/projection/weight"]
        aliases["decoder/embeddings/weight"] = "decoder/projection/weight"
        seen.update(aliases)

    expected = write_ctranslate2(tmp_path / "swapped", small, "int8", edit=swapped)
    network = load_model(tmp_path / "swapped").network
    assert seen["decoder/embeddings/weight"] == "decoder/projection/weight"
    assert network.proj_out.weight is network.get_decoder().embed_tokens.weight
    torch.testing.assert_close(network.proj_out.weight.data, expected["model.decoder.embed_tokens.weight"])


@pytest.mark.parametrize("size", [51864, 51865, 51866])
def test_a_faster_whisper_folder_works_like_the_same_model_in_transformers_layout(
    whole, beside, utterances, tmp_path, size
):
    """Language, texts and maps; the tokens to suppress and the alignment heads are those of config.json."""
    source = whole(size)
    reference = beside(source, write_ctranslate2(tmp_path / "faster", source, "float16"))
    model = load_model(tmp_path / "faster")
    assert_same(model, reference)
    features = model.features(utterances[1].audio())
    assert torch.equal(features, reference.features(utterances[1].audio()))
    assert model.multilingual == (size > 51864) and model.languages == reference.languages
    assert len(model.languages) == {51864: 1, 51865: 99, 51866: 100}[size]
    if model.multilingual:
        assert model.detect_language(features) == reference.detect_language(features)
    directions = ("en", "it", "it-en") if model.multilingual else ("en",)
    for direction in directions:
        assert torch.equal(model.prompt(direction), reference.prompt(direction))
        (found,), (expected,) = (each.generate(features[None], direction) for each in (model, reference))
        assert torch.equal(found, expected) and len(found) > 1
        assert found[0] not in FIRST and not {*SUPPRESSED} & {*found.tolist()}
    stated = model.network.generation_config
    last = int(model.prompt("en")[-1])
    assert stated.suppress_tokens == [*SUPPRESSED, *range(last + 1, size)] and size - last == 1502
    assert stated.begin_suppress_tokens == FIRST and stated.alignment_heads == HEADS
    assert model.tokens(torch.tensor([last, last + 1, size - 1])) == ["<|notimestamps|>", "<|0.00|>", "<|30.00|>"]
    assert model.text(torch.tensor([last, last - 1, 71, 72])) == "hi"
    maps, expected = (quietly(each, utterances[1], directions[-1]) for each in (model, reference))
    assert maps.token.values.tolist() == expected.token.values.tolist()
    for name in ("cross_attention", "input_scores", "encoder_scores"):
        np.testing.assert_allclose(maps[name], expected[name], rtol=1e-5, atol=1e-7)


def test_settings_that_config_json_leaves_open_suppress_only_time_stamps(small, tmp_path):
    write_ctranslate2(tmp_path / "faster", small)
    (tmp_path / "faster" / "config.json").write_text(json.dumps({"suppress_ids": None}))
    stated = load_model(tmp_path / "faster").network.generation_config
    assert stated.suppress_tokens == [*range(296, 397)]
    assert stated.begin_suppress_tokens is None and stated.alignment_heads is None


def test_the_hash_covers_weights_settings_and_vocabulary(small, tmp_path):
    write_ctranslate2(tmp_path / "one", small)
    same = load_model(shutil.copytree(tmp_path / "one", tmp_path / "same"))
    hashes = {load_model(tmp_path / "one").weights_hash}
    assert same.weights_hash in hashes

    def other_heads(variables, aliases):
        variables["encoder/num_heads"] = ("int16", (), b"\4\0")

    for name, change in (("kind", {"kind": "int8"}), ("heads", {"edit": other_heads})):
        write_ctranslate2(tmp_path / name, small, **change)
        hashes.add(load_model(tmp_path / name).weights_hash)
    for file in ("config.json", "tokenizer.json"):
        copy = shutil.copytree(tmp_path / "one", tmp_path / f"other-{file}")
        (copy / file).write_text((copy / file).read_text(encoding="utf-8") + " ", encoding="utf-8")
        hashes.add(load_model(copy).weights_hash)
    assert len(hashes) == 5


def test_a_faster_whisper_model_is_downloaded_without_pickles(small, tmp_path, monkeypatch):
    folder, calls = tmp_path / "0123456789abcdef", []
    write_ctranslate2(folder, small, "float16")

    def snapshot_download(name, revision, allow_patterns):
        calls.append((name, revision))
        stored = ["README.md", "config.json", "model.bin", "pytorch_model.bin", "model.pt", "tokenizer.json", "a.py"]
        kept = ["config.json", "model.bin", "tokenizer.json", "vocabulary.txt"]
        filtered = huggingface_hub.utils.filter_repo_objects([*stored, "vocabulary.txt"], allow_patterns=allow_patterns)
        assert list(filtered) == kept
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    model = load_model("Systran/faster-whisper-tiny.en@main")
    assert (model.name, model.source) == ("faster-whisper-tiny.en", "Systran/faster-whisper-tiny.en@0123456789abcdef")
    assert calls == [("Systran/faster-whisper-tiny.en", "main")]
    assert load_model(folder).weights_hash == model.weights_hash


def test_weights_of_ctranslate2_beside_others_are_ignored(tiny_folder, tmp_path):
    copy = shutil.copytree(tiny_folder, tmp_path / "tiny")
    (copy / "model.bin").write_bytes(b"\6\0\0\0\x0c\0WhisperSpec\0\3\0\0\0")
    assert load_model(copy).weights_hash == load_model(tiny_folder).weights_hash


@pytest.fixture(scope="module")
def faster(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("faster") / "faster"
    write_ctranslate2(folder, small, "int8_float16")
    return folder


def test_a_file_cut_short_names_its_end(faster, tmp_path):
    copy = shutil.copytree(faster, tmp_path / "faster")
    path, whole = copy / "model.bin", (copy / "model.bin").read_bytes()
    # In the version, the length and the text of the name, the revision, and the bytes of the first variable.
    name = 4 + 2 + len("WhisperSpec") + 1
    first = name + 4 + 4 + 2 + len("decoder/activation") + 1 + 1 + 1 + 4
    for end, needed in ((0, 4), (3, 4), (5, 6), (9, name), (name + 1, name + 4), (first, first + 1)):
        path.write_bytes(whole[:end])
        refused(copy, f"{path} is cut short, because it ends at byte {end} and not after {needed}: download it again.")

    @settings(max_examples=40, deadline=None)
    @given(st.integers(0, len(whole) - 1))
    def at_any_byte(end):
        path.write_bytes(whole[:end])
        with pytest.raises(ValueError) as error:
            load_model(copy)
        pattern = (
            f"{re.escape(str(path))} is cut short, because it ends at byte {end} and not after \\d+: download it again."
        )
        assert re.fullmatch(pattern, str(error.value))

    at_any_byte()


def test_damaged_bytes_give_a_model_or_a_sentence(faster, tmp_path):
    copy = shutil.copytree(faster, tmp_path / "faster")
    whole = (copy / "model.bin").read_bytes()
    names = [match.start() for match in re.finditer(b"coder/", whole)]

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.sampled_from(names), st.integers(-4, 60), st.integers(1, 255))
    def flipped(start, offset, bits):
        content = bytearray(whole)
        content[min(start + offset, len(whole) - 1)] ^= bits
        (copy / "model.bin").write_bytes(content)
        try:
            assert isinstance(load_model(copy), WhisperModel)
        except ValueError as error:
            assert str(copy / "model.bin") in str(error) or str(copy) in str(error)
            assert "\n" not in str(error) and str(error).endswith(("again.", "model.", "CTranslate2 4."))

    flipped()


def edited(**changes):
    """Replace variables, given with __ for /; None removes one."""

    def edit(variables, aliases):
        for name, value in changes.items():
            variables[name.replace("__", "/")] = value
        for name in [name for name, value in variables.items() if value is None]:
            del variables[name]

    return {"edit": edit}


def unaliased(variables, aliases):
    aliases["decoder/projection/weight"] = "decoder/embedding"


CONVERT = "convert the original model with CTranslate2 4."
ZEROS = bytes(4 * 16 * 16)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"version": 7},
            f"{{}} has version 7 of CTranslate2's format, or another format, and not version 6: {CONVERT}",
        ),
        (
            {"name": "TransformerSpec"},
            "{} is a TransformerSpec of CTranslate2 and not a WhisperSpec: give a Whisper model.",
        ),
        ({"name": "Wav2Vec2Spec"}, "{} is a Wav2Vec2Spec of CTranslate2 and not a WhisperSpec: give a Whisper model."),
        ({"revision": 2}, f"{{}} has revision 2 of WhisperSpec and not 3: {CONVERT}"),
        (
            edited(decoder__activation=("int8", (), b"\0")),
            "{} has 0 for decoder/activation, where Whisper has 3: give a Whisper model.",
        ),
        (
            edited(decoder__alibi=("int8", (), b"\1")),
            "{} has 1 for decoder/alibi, where Whisper has 0: give a Whisper model.",
        ),
        (
            edited(decoder__pre_norm=("int8", (1,), b"\1")),
            "{} has decoder/pre_norm of shape [1]: give a complete Whisper model.",
        ),
        (edited(encoder__num_heads=None), "{} lacks encoder/num_heads: give a complete Whisper model."),
        (
            edited(decoder__layer_1__ffn__linear_0__weight=None),
            "{} lacks decoder/layer_1/ffn/linear_0/weight: give a complete Whisper model.",
        ),
        (
            edited(decoder__embeddings__weight=("float32", (16,), bytes(64))),
            "{} has decoder/embeddings/weight of shape [16]: give a complete Whisper model.",
        ),
        (
            edited(encoder__conv1__weight=("float32", (16, 80), bytes(4 * 16 * 80))),
            "{} has encoder/conv1/weight of shape [16, 80]: give a complete Whisper model.",
        ),
        (
            edited(encoder__layer_0__self_attention__linear_1__weight=("float32", (), bytes(4))),
            "{} has a number for encoder/layer_0/self_attention/linear_1/weight: give a complete Whisper model.",
        ),
        (
            edited(encoder__layer_0__self_attention__linear_0__low_rank_weight_1=("float32", (16, 16), ZEROS)),
            "{} has encoder/layer_0/self_attention/linear_0/low_rank_weight_1, which Whisper lacks: give a Whisper "
            "model.",
        ),
        (
            edited(encoder__layer_0__self_attention__linear_1__weight=("int8", (16, 16), ZEROS[:256])),
            f"{{}} has encoder/layer_0/self_attention/linear_1/weight in int8 with 0 scales: {CONVERT}",
        ),
        (
            edited(
                encoder__layer_0__self_attention__linear_1__weight=("int8", (16, 16), ZEROS[:256]),
                encoder__layer_0__self_attention__linear_1__weight_scale=("float32", (15,), ZEROS[:60]),
            ),
            f"{{}} has encoder/layer_0/self_attention/linear_1/weight in int8 with 15 scales: {CONVERT}",
        ),
        (
            edited(decoder__alibi=(6, (), b"\0")),
            "{} is damaged, because decoder/alibi has the type 6, the shape [] and 1 bytes: download it again.",
        ),
        (
            edited(decoder__alibi=("float16", (1, 2), b"\0\0")),
            "{} is damaged, because decoder/alibi has the type 4, the shape [1, 2] and 2 bytes: download it again.",
        ),
        ({"edit": unaliased}, "{} lacks decoder/embedding: give a complete Whisper model."),
    ],
)
def test_another_model_or_a_damaged_one_of_ctranslate2_is_refused(small, tmp_path, changes, sentence):
    write_ctranslate2(tmp_path / "faster", small, **changes)
    refused(tmp_path / "faster", sentence.format(tmp_path / "faster" / "model.bin"))


def test_a_name_that_is_no_text_is_refused(faster, tmp_path):
    copy = shutil.copytree(faster, tmp_path / "faster")
    content = bytearray((copy / "model.bin").read_bytes())
    start = content.index(b"decoder/activation") - 2
    for byte in (b"\xff", b"\n"):
        content[start + 5 : start + 6] = byte
        (copy / "model.bin").write_bytes(content)
        sentence = f"is damaged, because there is no name at byte {start}: download it again."
        refused(copy, f"{copy / 'model.bin'} {sentence}")


def test_a_file_of_another_format_with_the_name_of_ctranslate2s_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"lmgg" + bytes(100))
    sentence = "has version 1734831468 of CTranslate2's format, or another format, and not version 6"
    refused(tmp_path, f"{tmp_path / 'model.bin'} {sentence}: {CONVERT}")


def test_arrays_that_do_not_fit_each_other_are_refused(small, tmp_path):
    write_ctranslate2(tmp_path / "rows", small, **edited(decoder__layer_norm__beta=("float32", (15,), ZEROS[:60])))
    refused(
        tmp_path / "rows",
        f"{tmp_path / 'rows'} is not a complete Whisper model, because model.decoder.layer_norm.bias is [15] and "
        "should be [16]: download it again.",
    )
    write_ctranslate2(tmp_path / "heads", small, **edited(decoder__num_heads=("int16", (), b"\3\0")))
    with pytest.raises(ValueError) as error:
        load_model(tmp_path / "heads")
    assert re.fullmatch(
        rf"No network can be built from the dimensions in {tmp_path / 'heads'} \(embed_dim must be divisible .*3\)+: "
        "download the model again.",
        str(error.value),
    )


def drop_text(content):
    del content["model"]["merges"][-1]
    del content["model"]["vocab"][max(content["model"]["vocab"], key=content["model"]["vocab"].get)]


def drop_start(content):
    content["added_tokens"] = [each for each in content["added_tokens"] if "startof" not in each["content"]]


def drop_last(content):
    content["added_tokens"] = [each for each in content["added_tokens"] if "notime" not in each["content"]]


def drop_tag(content):
    content["added_tokens"] = [each for each in content["added_tokens"] if each["content"] != "<|it|>"]


def add_one(content):
    content["added_tokens"].append(content["added_tokens"][-1] | {"id": 397, "content": "<|more|>"})


def add_twice(content):
    content["added_tokens"].append(content["added_tokens"][-1] | {"content": "<|more|>"})


def no_model(content):
    del content["model"]


def wrong_merges(content):
    content["model"]["merges"].append(["un", "known"])


UNFIT = "does not have the tokens 0 to 396 of {}: use the tokenizer.json of the same model."


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (drop_text, UNFIT),
        (drop_tag, UNFIT),
        (add_one, UNFIT),
        (add_twice, UNFIT),
        (drop_start, "lacks the token <|startoftranscript|>: use the vocabulary of a Whisper model."),
        (drop_last, "lacks the token <|notimestamps|>: use the vocabulary of a Whisper model."),
        (no_model, "does not describe a vocabulary (KeyError: 'model'): download it again."),
        (
            wrong_merges,
            "does not describe a vocabulary (Exception: Error while initializing BPE: Token `un` out of vocabulary): "
            "download it again.",
        ),
    ],
)
@pytest.mark.parametrize("openai", [False, True])
def test_a_vocabulary_that_does_not_fit_the_weights_is_refused(small, faster, tmp_path, change, sentence, openai):
    copy = shutil.copytree(faster, tmp_path / "faster")
    path, weights = copy / "tokenizer.json", copy / "model.bin"
    if openai:
        weights.unlink()
        (copy / "config.json").unlink()
        write_openai(weights := copy / "tiny.pt", small)
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    refused(weights if openai else copy, f"{path} {sentence.format(weights)}")


def test_time_stamps_in_tokenizer_json_are_optional(small, faster, tmp_path):
    copy = shutil.copytree(faster, tmp_path / "faster")
    content = json.loads((copy / "tokenizer.json").read_text(encoding="utf-8"))
    kept = [token for token in content["added_tokens"] if token["special"]]
    assert len(content["added_tokens"]) - len(kept) == 101
    (copy / "tokenizer.json").write_text(json.dumps(content | {"added_tokens": kept}), encoding="utf-8")
    vocabulary = WhisperTokenizer.from_pretrained(small).get_vocab()
    assert load_model(copy).tokenizer.get_vocab() == vocabulary == load_model(faster).tokenizer.get_vocab()


@pytest.mark.parametrize("name", ["vocabulary.txt", "vocabulary.json"])
def test_the_vocabulary_of_ctranslate2_is_compared_with_the_tokenizer(faster, tmp_path, name):
    copy = shutil.copytree(faster, tmp_path / "faster")
    tokens = (copy / "vocabulary.txt").read_text(encoding="utf-8").split("\n")[:-1]
    (copy / "vocabulary.txt").unlink()

    def write(tokens):
        content = json.dumps(tokens) if name.endswith("json") else "\n".join([*tokens, ""])
        (copy / name).write_text(content, encoding="utf-8")

    write([token.replace("<|it|>", "<|renamed|>") for token in tokens])
    assert load_model(copy).languages == ("en",)
    sentence = f"{copy / name} does not have the tokens of the tokenizer: use the tokenizer.json of the same model."
    for other in (tokens[:-1], [*tokens, "<|more|>"], [tokens[1], tokens[0], *tokens[2:]]):
        write(other)
        refused(copy, sentence)
    (copy / name).write_text('{"a": 1}' if name.endswith("json") else "")
    refused(copy, sentence)


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("config.json", "[", "{} is damaged, because it is not a JSON object: download it again."),
        ("config.json", "[]", "{} is damaged, because it is not a JSON object: download it again."),
        (
            "config.json",
            '{"suppress_ids": [397]}',
            "suppress_ids in {} is not a list of token ids from 0 to 396: download it again.",
        ),
        (
            "config.json",
            '{"suppress_ids_begin": "7"}',
            "suppress_ids_begin in {} is not a list of token ids from 0 to 396: download it again.",
        ),
        *(
            (
                "config.json",
                f'{{"alignment_heads": {heads}}}',
                "alignment_heads in {} are not pairs of one of 3 layers and one of 2 heads: download it again.",
            )
            for heads in ("[[3, 0]]", "[[0, 2]]", "[[0]]", "[0, 1]", "7")
        ),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(faster, tmp_path, file, content, sentence):
    copy = shutil.copytree(faster, tmp_path / "faster")
    (copy / file).write_text(content)
    refused(copy, sentence.format(copy / file))


def test_a_faster_whisper_folder_needs_config_json(faster, tmp_path):
    copy = shutil.copytree(faster, tmp_path / "faster")
    (copy / "config.json").unlink()
    refused(copy, f"There is no {copy / 'config.json'}: download the complete model.", FileNotFoundError)


# OpenAI


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bfloat16])
def test_a_checkpoint_of_openai_equals_the_same_weights_in_transformers_layout(small, beside, tmp_path, dtype):
    expected = write_openai(tmp_path / "openai" / "tiny.en.pt", small, dtype)
    shutil.copy(small / "tokenizer.json", tmp_path / "openai")
    model = load_model(str(tmp_path / "openai" / "tiny.en.pt"))
    assert_same(model, beside(small, expected))
    assert (model.name, model.source) == ("tiny.en", str(tmp_path / "openai" / "tiny.en.pt"))


def provided(monkeypatch, answer):
    """Let the hub provide a folder, or raise an error; return a list of the repositories that were asked for."""
    asked = []

    def snapshot_download(name, revision, allow_patterns):
        assert (revision, allow_patterns) == ("main", ["tokenizer.json", "generation_config.json"])
        asked.append(name)
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


REPOSITORIES = {51864: "openai/whisper-tiny.en", 51865: "openai/whisper-tiny", 51866: "openai/whisper-large-v3"}


@pytest.mark.parametrize("size", REPOSITORIES)
def test_the_vocabulary_of_openai_comes_from_the_hub(whole, beside, utterances, tmp_path, monkeypatch, size):
    source, snapshot = whole(size), tmp_path / "snapshot"
    expected = write_openai(tmp_path / "openai" / "some.pt", source)
    snapshot.mkdir()
    for name in ("tokenizer.json", "generation_config.json"):
        shutil.copy(source / name, snapshot)
    asked = provided(monkeypatch, snapshot)
    model, reference = load_model(tmp_path / "openai" / "some.pt"), beside(source, expected)
    assert asked == [REPOSITORIES[size]]
    assert_same(model, reference)
    features = model.features(utterances[1].audio())
    assert model.detects_language == (size > 51864)
    for direction in ("en", "it", "it-en") if model.multilingual else ("en",):
        (found,), (other,) = (each.generate(features[None], direction) for each in (model, reference))
        assert torch.equal(found, other) and len(found) > 1
    stated = model.network.generation_config
    assert stated.suppress_tokens[:4] == [*SUPPRESSED, size - 1501] and stated.begin_suppress_tokens == FIRST
    assert not hasattr(stated, "alignment_heads")  # the repository's are those of its own weights
    (snapshot / "generation_config.json").unlink()
    other = load_model(tmp_path / "openai" / "some.pt")
    assert other.network.generation_config.begin_suppress_tokens == [220, 50256 + (size > 51864)]
    assert other.weights_hash != model.weights_hash


def test_a_faster_whisper_folder_without_a_tokenizer_takes_openais(whole, tmp_path, monkeypatch):
    write_ctranslate2(tmp_path / "faster", whole(51865))
    expected = load_model(tmp_path / "faster")
    (tmp_path / "faster" / "tokenizer.json").unlink()
    asked = provided(monkeypatch, whole(51865))
    model = load_model(tmp_path / "faster")
    assert asked == ["openai/whisper-tiny"] and model.weights_hash == expected.weights_hash
    assert model.network.generation_config.to_dict() == expected.network.generation_config.to_dict()


@pytest.mark.parametrize("size", REPOSITORIES)
def test_vocab_json_and_merges_beside_a_checkpoint_are_read(whole, tmp_path, monkeypatch, size):
    """They have no special tokens but the end; those follow in OpenAI's order."""
    asked = provided(monkeypatch, OSError("no network"))
    write_openai(tmp_path / "openai" / "some.pt", whole(size))
    text, special = whole_vocabulary(size)
    for names in ([*text, special[0]], text):
        ids = {token: i for i, token in enumerate(names)}
        (tmp_path / "openai" / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
        lines = "\n".join(["#version: 0.2", *MERGES, ""])
        (tmp_path / "openai" / "merges.txt").write_text(lines, encoding="utf-8")
        model = load_model(tmp_path / "openai" / "some.pt")
        stamps = [f"<|{0.02 * step:.2f}|>" for step in range(1501)]
        expected = {token: i for i, token in enumerate([*text, *special, *stamps])}
        assert model.tokenizer.get_vocab() == expected and len(expected) == size and not asked
        assert model.tokens(model.token_ids("the")) == ["▁the", "<|endoftext|>"]
    (tmp_path / "openai" / "merges.txt").unlink()
    with pytest.raises(ValueError) as error:
        load_model(tmp_path / "openai" / "some.pt")
    start = f"{tmp_path / 'openai' / 'vocab.json'} does not describe a vocabulary (FileNotFoundError: [Errno 2] No such"
    assert str(error.value).startswith(start) and "\n" not in str(error.value)


def test_without_a_generation_config_tokens_are_suppressed_as_in_openais_package(whole, tmp_path):
    """Marks that are one token, the first token of notes, dashes before a word, and tokens of the prompt."""
    write_openai(tmp_path / "openai" / "tiny.pt", whole(51865))
    shutil.copy(whole(51865) / "tokenizer.json", tmp_path / "openai")
    stated = load_model(tmp_path / "openai" / "tiny.pt").network.generation_config
    text, special = whole_vocabulary(51865)
    tokens = [*'"#()*+/:;<=>@[\\]^_`{|}~', "Ġ-", "--", "Ġ'", "âĻ", "ĠâĻ"]
    expected = [text.index(token) for token in tokens]
    expected += [len(text) + special.index(token) for token in ("<|startoftranscript|>", *TASKS)]
    assert stated.suppress_tokens == [*sorted(expected), *range(51865 - 1501, 51865)]
    assert stated.begin_suppress_tokens == [text.index("Ġ"), 50257] == [220, 50257]


def test_a_generation_config_beside_the_vocabulary_can_leave_lists_out(small, tmp_path):
    write_openai(tmp_path / "openai" / "tiny.pt", small)
    shutil.copy(small / "tokenizer.json", tmp_path / "openai")
    path = tmp_path / "openai" / "generation_config.json"
    path.write_text('{"suppress_tokens": [3]}')
    stated = load_model(tmp_path / "openai" / "tiny.pt").network.generation_config
    assert stated.suppress_tokens == [3, *range(296, 397)]
    assert stated.begin_suppress_tokens[-1] == 0 and len(stated.begin_suppress_tokens) == 2
    path.write_text('{"suppress_tokens": [-1]}')
    sentence = f"suppress_tokens in {path} is not a list of token ids from 0 to 396: download it again."
    refused(tmp_path / "openai" / "tiny.pt", sentence)


def test_without_any_vocabulary_the_sentence_says_which_file_is_missing(small, whole, tmp_path, monkeypatch):
    asked = provided(monkeypatch, OSError("We couldn't connect to 'https://huggingface.co'.\nCheck your connection."))
    path = tmp_path / "openai" / "some.pt"
    write_openai(path, small)
    refused(
        path,
        f"There is no vocabulary beside {path}, and its 397 tokens are not those of OpenAI's models: put the model's "
        "tokenizer.json into the same folder.",
        FileNotFoundError,
    )
    assert not asked
    for size, name in REPOSITORIES.items():
        write_openai(path, whole(size))
        start = f"There is no vocabulary beside {path}, and the Hugging Face hub does not provide that of {name}"
        end = f"put the tokenizer.json of {name} into the same folder."
        provided(monkeypatch, OSError("We couldn't connect to 'https://huggingface.co'.\nCheck your connection."))
        refused(path, f"{start} (We couldn't connect to 'https://huggingface.co'): {end}", FileNotFoundError)
        provided(monkeypatch, tmp_path)
        refused(path, f"{start} ({tmp_path} has no tokenizer.json): {end}", FileNotFoundError)


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


LAYOUT = (
    "give the same model as a folder, in the layout of transformers or faster-whisper, or its id on the Hugging Face "
    "hub, such as openai/whisper-tiny.en."
)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["dims", "model_state_dict"])
def test_nothing_pickled_is_executed(small, tmp_path, zipped, place):
    write_openai(tmp_path / "openai" / "tiny.pt", small)
    content = torch.load(tmp_path / "openai" / "tiny.pt", weights_only=True)
    content[place]["n_more"] = Touch(tmp_path / "sprung")
    torch.save(content, tmp_path / "openai" / "tiny.pt", _use_new_zipfile_serialization=zipped)
    refused(
        tmp_path / "openai" / "tiny.pt",
        f"{tmp_path / 'openai' / 'tiny.pt'} is a checkpoint file: convert it with `python -m "
        f"xattn.models.convert.fairseq` if FBK-fairseq wrote it; otherwise, {LAYOUT}",
    )
    assert not (tmp_path / "sprung").exists()


def test_a_checkpoint_of_openai_cut_short_is_refused(small, tmp_path):
    path = tmp_path / "openai" / "tiny.pt"
    write_openai(path, small)
    whole = path.read_bytes()

    @settings(max_examples=30, deadline=None)
    @given(st.integers(0, len(whole) - 1))
    def at_any_byte(end):
        path.write_bytes(whole[:end])
        refused(path, f"{path} is cut short: download it again.")

    for end in (0, 3, 4, 100, len(whole) // 2, len(whole) - 1):
        at_any_byte.hypothesis.inner_test(end)
    at_any_byte()


@pytest.mark.parametrize(
    "change",
    [
        {"n_text_state": 32},
        {"n_vocab": None},
        {"n_mels": 0},
        {"n_audio_layer": "2"},
        {"n_text_head": True},
    ],
)
def test_dims_that_are_not_whispers_are_refused(small, tmp_path, change):
    path = tmp_path / "openai" / "tiny.pt"
    write_openai(path, small, **change)
    refused(path, f"The contents of {path} are not those of a Whisper model: download it again.")


def missing(state):
    del state["decoder.ln.bias"]


def renamed(state):
    state["decoder.ln.offset"] = state.pop("decoder.ln.bias")


def turned(state):
    state["encoder.blocks.1.mlp.0.weight"] = state["encoder.blocks.1.mlp.0.weight"].T.contiguous()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (missing, "model.decoder.layer_norm.bias is missing and should be [16]"),
        (renamed, "model.decoder.layer_norm.bias is missing and should be [16]"),
        (turned, "model.encoder.layers.1.fc1.weight is [16, 64] and should be [64, 16]"),
        (lambda state: state.update(more=torch.zeros(2)), "model.more is [2] and should be missing"),
    ],
)
def test_tensors_that_do_not_fit_the_dims_are_refused(small, tmp_path, change, reason):
    path = tmp_path / "openai" / "tiny.pt"
    write_openai(path, small)
    shutil.copy(small / "tokenizer.json", path.parent)
    content = torch.load(path, weights_only=True)
    change(content["model_state_dict"])
    torch.save(content, path)
    refused(path, f"{path} is not a complete Whisper model, because {reason}: download it again.")


def test_something_else_than_tensors_is_refused(small, tmp_path):
    path = tmp_path / "tiny.pt"
    for state in ({"decoder.ln.bias": [1.0]}, [torch.zeros(2)], None):
        torch.save({"dims": {"n_vocab": 5}, "model_state_dict": state}, path)
        refused(path, f"The contents of {path} are not those of a Whisper model: download it again.")


def test_a_checkpoint_of_openai_in_a_model_folder_is_read(small, tmp_path):
    copy = shutil.copytree(small, tmp_path / "whisper-tiny")
    write_openai(copy / "tiny.pt", small, torch.float32)
    assert load_model(copy / "tiny.pt").name == "tiny"
    assert load_model(copy).weights_hash == load_model(small).weights_hash
