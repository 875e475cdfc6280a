import argparse
import io
import os
import pickle
import shutil
import sys
import types
import typing
import zipfile
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from conftest import SENTENCES

from xattn.models import load_model
from xattn.models.convert.fairseq import convert, main, read_checkpoint

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
TEXT = "the dog sì"


def options(config, **changes):
    """The options of a model with this configuration, under fairseq's names."""
    own = {
        "encoder_embed_dim": config.d_model,
        "encoder_layers": config.encoder_layers,
        "encoder_attention_heads": config.encoder_attention_heads,
        "decoder_layers": config.decoder_layers,
        "decoder_attention_heads": config.decoder_attention_heads,
        "decoder_ffn_embed_dim": config.decoder_ffn_dim,
        "feed_forward_expansion_factor": config.encoder_ffn_dim // config.d_model,
        "conv_channels": config.conv_channels,
        "conv_kernel_sizes": "5,5",
        "max_target_positions": config.max_target_positions,
        "share_decoder_input_output_embed": config.tie_word_embeddings,
        "ctc_encoder_layer": config.ctc_encoder_layer,
        "ctc_compress_strategy": "none",
        "decoder_normalize_before": True,
        "adaptive_softmax_cutoff": None,
    }
    return argparse.Namespace(**own | changes)


def train_pieces(folder, name="spm", tags=("<lang:en>", "<lang:it>")):
    """Train a SentencePiece model and return its pieces in the order of its ids."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(text for texts in SENTENCES.values() for text in texts),
        model_prefix=str(folder / name),
        vocab_size=34,
        user_defined_symbols=list(tags),
        minloglevel=2,
    )
    (folder / f"{name}.vocab").unlink()
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / f"{name}.model"))
    return [processor.id_to_piece(token) for token in range(len(processor))]


@pytest.fixture
def released(made, tmp_path):
    """A function that makes a released model: checkpoint, SentencePiece model, and dictionary in another order."""

    def make(state=None, tags=("<lang:en>", "<lang:it>"), blank=False, **network_options):
        folder = tmp_path / "released"
        folder.mkdir(exist_ok=True)
        own = [piece for piece in train_pieces(folder, tags=tags) if piece not in SPECIAL]
        dictionary = own[::-1]
        (folder / "spm.txt").write_text("".join(f"{piece} {len(piece)}\n" for piece in dictionary), encoding="utf-8")
        pieces = [*SPECIAL, *dictionary, *(["<ctc_blank>"] if blank else [])]
        settings = {"vocab_size": len(pieces), "encoder_ffn_dim": 64, "final_ctc": False, "max_target_positions": 16}
        network = made.network(**settings | network_options)
        weights = network.state_dict() | {
            "encoder.conformer_layers.0.attention.positional_encoding.pe": torch.zeros(1, 8, 16),
            "decoder.version": torch.tensor([3.0]),
            "decoder.embed_positions._float_tensor": torch.zeros(1),
        }
        content = {"args": options(network.config), "model": weights, "extra_state": {"epoch": 3}}
        torch.save(content | (state or {}), folder / "model.pt")
        return folder / "model.pt", network, pieces

    return make


def logits(network):
    features = torch.randn(1, 50, 80, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        return network(features, decoder_input_ids=torch.tensor([[2, 4, 9, 8]]), use_cache=False).logits


def test_a_converted_checkpoint_gives_the_same_model(released, tmp_path):
    checkpoint, network, pieces = released()
    convert(checkpoint, tmp_path / "mine")
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == [
        *("config.json", "generation_config.json", "model.safetensors", "spm.model", "vocab.json")
    ]
    model = load_model(tmp_path / "mine")
    assert torch.equal(logits(model.network), logits(network))
    assert model.name == "mine" and model.config.ctc_encoder_layer == 1
    hidden = model.network.encoder(torch.ones(1, 30, 80)).hidden_states
    assert torch.equal(model.network.ctc_logits(hidden)[0], network.encoder.ctc_fc(hidden[0]))


def test_ids_come_from_the_dictionary_and_not_from_the_sentencepiece_model(released, tmp_path):
    checkpoint, _, pieces = released()
    convert(checkpoint, tmp_path / "mine")
    model = load_model(tmp_path / "mine")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "mine" / "spm.model"))
    assert model.tokens(torch.arange(len(pieces))) == pieces
    ids = [pieces.index(piece) for piece in processor.encode(TEXT, out_type=str)]
    assert ids != processor.encode(TEXT)
    assert model.token_ids(TEXT).tolist() == [*ids, 2]
    assert model.token_ids("x").tolist()[-2] == pieces.index("<unk>")
    english, italian = (pieces.index(f"<lang:{language}>") for language in ("en", "it"))
    assert model.text(torch.tensor([2, english, *ids, 2])) == TEXT
    assert model.languages == ("en", "it")
    assert model.prompt("en").tolist() == [2, english] and model.prompt("it").tolist() == [2, italian]


def test_a_search_starts_from_the_prompt_and_does_not_return_it(released, tmp_path):
    convert(released()[0], tmp_path / "mine")
    model = load_model(tmp_path / "mine")
    features = torch.randn(1, 60, 80, generator=torch.Generator().manual_seed(3))
    for language in model.languages:
        (ids,) = model.generate(features, language)
        assert 0 < len(ids) <= 14 and ids[-1] == 2 and (ids == 2).sum() == 1
        forced = torch.cat([model.prompt(language), ids])
        best = model.decode(model.encode(features), forced[:-1])[0, 1:].gather(1, ids[:, None]).sum()
        others = model.generate(features, next(each for each in model.languages if each != language))[0]
        there = torch.cat([model.prompt(language), others])
        worse = model.decode(model.encode(features), there[:-1])[0, 1:].gather(1, others[:, None]).sum()
        assert best / len(ids) >= worse / len(others)


def test_the_blank_of_joint_models_has_an_id(released, tmp_path):
    checkpoint, network, pieces = released(blank=True)
    convert(checkpoint, tmp_path / "mine")
    model = load_model(tmp_path / "mine")
    assert model.tokens(torch.tensor([network.config.vocab_size - 1])) == ["<ctc_blank>"]


def test_a_vocabulary_without_tags_needs_the_language(released, tmp_path):
    checkpoint, _, _ = released(tags=())
    with pytest.raises(ValueError, match="spm.txt has no language tags such as <lang:en>: give the language that"):
        convert(checkpoint, tmp_path / "mine")
    convert(checkpoint, tmp_path / "mine", language="de")
    model = load_model(tmp_path / "mine")
    assert model.languages == ("de",) and model.prompt("de").tolist() == [2]
    assert model.generate(torch.zeros(1, 40, 80), "de")[0][-1] == 2


@pytest.mark.parametrize("zipped", [True, False])
def test_what_training_left_in_a_checkpoint_is_ignored(released, tmp_path, zipped):
    """NumPy's numbers and arrays, under the names of its versions 1 and 2, and plain types."""
    own = [np.float64(1.5), np.int32(3), np.arange(4.0), np.array([[True]]), np.array(["a", None], dtype=object)]
    own += [np.dtype("f4"), np.array([b"", b"b"]), np.str_("x"), b"", b"ab", slice(1, 2), range(3), int, frozenset([1])]
    left = {"val_loss": own[0], "best": own, "metrics": {own[1]: own[2]}}
    checkpoint, network, _ = released({"extra_state": left, "optimizer_history": [{"lr": np.float32(1e-3)}]})
    _, expected = read_checkpoint(checkpoint)
    torch.save(torch.load(checkpoint, weights_only=False), checkpoint, _use_new_zipfile_serialization=zipped)
    assert b"numpy._core.multiarray" in checkpoint.read_bytes()
    for old, new in ((b"numpy._core", b"numpy.core"), (b"", b"")):
        path = tmp_path / "other.pt"
        path.write_bytes(renamed(checkpoint, old, new, zipped))
        options, tensors = read_checkpoint(path)
        assert options["d_model"] == 16 and tensors.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())
    convert(checkpoint, tmp_path / "mine")
    assert torch.equal(logits(load_model(tmp_path / "mine").network), logits(network))


def renamed(checkpoint, old, new, zipped):
    """The bytes of a checkpoint with the name `old` replaced by `new` in its pickle."""
    if not zipped:
        return checkpoint.read_bytes().replace(old, new)
    content = io.BytesIO()
    with zipfile.ZipFile(checkpoint) as source, zipfile.ZipFile(content, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            target.writestr(name, data.replace(old, new) if name.endswith("data.pkl") else data)
    return content.getvalue()


def test_another_pickle_protocol_raises(released, tmp_path):
    checkpoint, _, _ = released()
    state = torch.load(checkpoint, weights_only=False)
    torch.save(state, tmp_path / "model.pt", pickle_protocol=4)
    with pytest.raises(ValueError, match="model.pt was not read, because its pickle protocol is not 2: save it again"):
        read_checkpoint(tmp_path / "model.pt")


class Touch:
    """Creates a file when it is unpickled, with the function of this name."""

    def __init__(self, path, name):
        calls = {
            "posix.system": (os.system, (f"touch {path}",)),
            "eval": (eval, (f"open({str(path)!r}, 'w').close()",)),
            "shutil.copyfile": (shutil.copyfile, (__file__, str(path))),
            "getattr": (Path(path).touch, ()),
        }
        self.call = calls[name]

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", ["args", "model", "extra_state"])
@pytest.mark.parametrize("name", ["posix.system", "eval", "shutil.copyfile", "getattr"])
def test_a_malicious_checkpoint_is_rejected_and_does_not_run(released, tmp_path, name, place, zipped):
    trap, checkpoint = tmp_path / "sprung", tmp_path / "released" / "evil.pt"
    _, network, _ = released()
    content = {"args": options(network.config), "model": network.state_dict(), "extra_state": {}}
    if place == "args":
        content["args"].lr = Touch(trap, name)
    else:
        content[place] |= {"harmless": Touch(trap, name)}
    torch.save(content, checkpoint, _use_new_zipfile_serialization=zipped)
    torch.load(checkpoint, weights_only=False)
    assert trap.exists()  # it works if it is allowed to
    trap.unlink()
    with pytest.raises(ValueError, match=f"evil.pt was not read, because it needs {name}, which is not known"):
        convert(checkpoint, tmp_path / "mine")
    assert not trap.exists() and not (tmp_path / "mine").exists()


def test_an_omegaconf_configuration_is_read_without_its_classes(made, tmp_path, monkeypatch):
    network, touched = made.network(encoder_ffn_dim=64, final_ctc=False), []
    assert "omegaconf" not in sys.modules
    monkeypatch.setitem(sys.modules, "omegaconf", types.ModuleType("omegaconf"))

    def stored(name, **state):
        """An object of a class with this name that records when it is unpickled."""
        module, _, own = name.rpartition(".")
        if module not in sys.modules:
            monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
        if not hasattr(sys.modules[module], own):
            record = {"__module__": module, "__setstate__": lambda self, _: touched.append(self)}
            setattr(sys.modules[module], own, type(own, (), record))
        made = getattr(sys.modules[module], own)()
        made.__dict__.update(state)
        return made

    def node(value):
        metadata = stored("omegaconf.base.Metadata", object_type=dict, resolver_cache=defaultdict(dict))
        return stored("omegaconf.nodes.AnyNode", _val=value, _metadata=metadata)

    metadata = stored("omegaconf.base.ContainerMetadata", ref_type=typing.Any, object_type=list)
    rates = stored("omegaconf.listconfig.ListConfig", _content=[node(1e-3)], _metadata=metadata)
    cfg = stored("omegaconf.dictconfig.DictConfig", _content={"model": node(options(network.config)), "lr": rates})
    rates.__dict__["_parent"] = cfg
    torch.save({"cfg": cfg, "args": None, "model": network.state_dict()}, tmp_path / "model.pt")
    torch.load(tmp_path / "model.pt", weights_only=False)
    assert len(touched) == 7
    allowed = set(torch.serialization.get_safe_globals())
    found, tensors = read_checkpoint(tmp_path / "model.pt")
    assert len(touched) == 7 and set(torch.serialization.get_safe_globals()) == allowed
    assert found["d_model"] == 16 and found["conv_kernel_sizes"] == [5, 5] and found["tie_word_embeddings"] is True
    assert tensors.keys() == network.state_dict().keys()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is damaged or no checkpoint"),
        (b"PK\x03\x04 not a checkpoint", "is damaged or no checkpoint"),
        (pickle.dumps([1], protocol=2), "is damaged or no checkpoint"),
        ({"model": {}}, "holds no Conformer of FBK-fairseq"),
        ({"args": argparse.Namespace(arch="wav2vec2"), "model": {}}, "holds no Conformer of FBK-fairseq"),
        ([1, 2], "holds no Conformer of FBK-fairseq"),
    ],
)
def test_a_file_that_is_not_such_a_checkpoint_raises(tmp_path, content, sentence):
    path = tmp_path / "model.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ValueError, match=f"model.pt {sentence}"):
        read_checkpoint(path)


def test_nothing_is_written_if_something_does_not_fit(released, tmp_path):
    checkpoint, _, pieces = released()
    folder, text = checkpoint.parent, (checkpoint.parent / "spm.txt").read_text(encoding="utf-8")

    def refused(kind, sentence, dictionary=text):
        (folder / "spm.txt").write_text(dictionary, encoding="utf-8")
        with pytest.raises(kind, match=sentence):
            convert(checkpoint, tmp_path / "mine")
        assert not list(tmp_path.glob("*mine*"))

    refused(
        ValueError, f"spm.txt has {len(pieces) + 1} pieces, but the model has {len(pieces)}", text + "madeupword0 1\n"
    )
    refused(ValueError, "spm.txt has a piece twice", text.replace("▁dorme", "▁bird"))
    refused(ValueError, "spm.txt has the piece 'zebra', but spm.model does not", text.replace("▁dorme", "zebra"))
    refused(
        ValueError,
        "spm.txt has the line '▁dorme x', which is not a piece and a count",
        text.replace("▁dorme 6", "▁dorme x"),
    )
    (folder / "spm.txt").unlink()
    with pytest.raises(FileNotFoundError, match="spm.model or its dictionary, spm.txt or dict.txt, is missing"):
        convert(checkpoint, tmp_path / "mine")
    (folder / "dict.txt").write_text(text, encoding="utf-8")
    convert(checkpoint, tmp_path / "mine")
    with pytest.raises(FileExistsError, match="mine exists already: give a new folder"):
        convert(checkpoint, tmp_path / "mine")
    train_pieces(folder, "source")
    with pytest.raises(ValueError, match="There are 2 SentencePiece models beside .*model.pt: give the decoder's"):
        convert(checkpoint, tmp_path / "other")
    convert(checkpoint, tmp_path / "other", spm=folder / "spm.model")
    (folder / "source.txt").write_text(text, encoding="utf-8")
    (folder / "source.model").write_bytes(b"no model")
    with pytest.raises(ValueError, match="source.model is damaged or no SentencePiece model"):
        convert(checkpoint, tmp_path / "third", spm=folder / "source.model")
    with pytest.raises(ValueError, match="dict.txt has tags only for it, en: leave out --language"):
        convert(checkpoint, tmp_path / "third", spm=folder / "spm.model", language="fr")


def test_the_command_reports_errors_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fairseq", str(tmp_path / "no.pt"), str(tmp_path / "mine")])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == f"There is no checkpoint {tmp_path / 'no.pt'}: check the path."
    (tmp_path / "no.pt").write_bytes(b"\x80\2}.")
    with pytest.raises(ValueError, match="no.pt is a checkpoint file: convert it with `python -m xattn.models.conv"):
        load_model(tmp_path / "no.pt")
