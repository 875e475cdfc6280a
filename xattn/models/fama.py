"""FBK's published Conformers: the FAMA models on the Hugging Face hub, and what all FBK checkpoints have in common.

FBK-MT/fama-small, fama-medium, fama-small-asr and fama-medium-asr (https://arxiv.org/abs/2505.22759) come with code for
an older transformers. The kit does not run it: it reads configuration, weights and vocabulary into its own Conformer.
"The reference" is FBK-fairseq, in which they were trained.
"""

import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from xattn.models.conformer import (
    BLANK,
    ConformerConfig,
    ConformerForConditionalGeneration,
    ConformerModel,
    Vocabulary,
)
from xattn.models.weights import folder_hash

# Options that are copied under transformers' names; those in DEFAULTS are optional.
NEEDED = (
    *("d_model", "encoder_layers", "encoder_attention_heads", "decoder_layers", "decoder_attention_heads"),
    *("decoder_ffn_dim", "conv_channels", "conv_kernel_sizes", "vocab_size", "max_target_positions"),
)
DEFAULTS = {
    "conformer_conv_kernel_size": 31,
    "input_feat_per_channel": 80,
    "batch_unsafe_relative_shift": False,
    "activation_function": "relu",
    "bos_token_id": 0,
    "pad_token_id": 1,
    "eos_token_id": 2,
}
# Options with the only value that the kit's Conformer supports, which is the reference's default.
ONLY = {
    "conformer_half_step_residual": True,
    "conv_expansion_factor": 2,
    "ctc_compress_strategy": "none",
    "input_channels": 1,
    "scale_embedding": True,
    "no_scale_embedding": False,
    "decoder_normalize_before": True,
    "decoder_learned_pos": False,
    "no_token_positional_embeddings": False,
    "layernorm_embedding": False,
    "adaptive_input": False,
    "adaptive_softmax_cutoff": None,
    "distance_penalty": False,
}

# Names of the reference and of transformers' models, and ours.
RENAMED = (
    (r"^model\.", ""),
    (r"^lm_head\.", "decoder.output_projection."),
    (r"^encoder\.layers\.", "encoder.conformer_layers."),
    (r"^encoder\.conv\.", "encoder.subsample."),
)
PROJECTION = re.compile(r"(.+)\.(in|qkv|q|k|v|query|key|value)_proj[._](weight|bias)")
# Tables that are computed here, and modules for joint CTC decoding (auxiliary*, ctc*), which the kit does not support.
LEFT_OUT = re.compile(r".+\.positional_encoding\.pe|(en|de)coder\.(version|embed_positions\..+)|(auxiliary|ctc)\w*\..+")
CTC_HEAD = ("encoder.ctc_fc.weight", "encoder.ctc_fc.bias")
TIED = ("decoder.embed_tokens.weight", "decoder.output_projection.weight")

LANGUAGE_TAG = re.compile(r"<lang:(.+)>")


def renamed(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return a checkpoint's tensor under our names: three for fused projections, none if it is not needed."""
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    if LEFT_OUT.fullmatch(name):
        return {}
    projection = PROJECTION.fullmatch(name)
    if not projection:
        return {name: tensor}
    module, which, kind = projection.groups()
    ours = ("query", "key", "value") if name.startswith("encoder.") else ("q", "k", "v")
    if which in ("in", "qkv"):
        return {f"{module}.{each}_proj.{kind}": part for each, part in zip(ours, tensor.chunk(3), strict=False)}
    return {f"{module}.{ours['qkv'.index(which[0])]}_proj.{kind}": tensor}


def configuration(options: dict, source: Path) -> ConformerConfig:
    """Make a Conformer's configuration from its options under transformers' names.

    ValueError: options are missing or have values that the kit's Conformer does not support.
    """
    problems = [f"{name} is missing" for name in NEEDED if options.get(name) is None]
    problems += [
        f"{name} is {options[name]!r} and not {only!r}"
        for name, only in ONLY.items()
        if name in options and options[name] != only and (options[name] or only)
    ]
    if problems:
        raise ValueError(_no_conformer(source, "; ".join(problems)))
    given = {name: value for name, value in options.items() if name in (*NEEDED, *DEFAULTS) and value is not None}
    try:
        return ConformerConfig(
            **DEFAULTS | given,
            num_conv_layers=len(options["conv_kernel_sizes"]),
            encoder_ffn_dim=options.get("feed_forward_expansion_factor", 4) * options["d_model"],
            ctc_encoder_layer=options.get("ctc_encoder_layer"),
            ctc_vocab_size=options.get("ctc_vocab_size"),
            tie_word_embeddings=bool(options.get("tie_word_embeddings")),
            starts_with_eos=True,
        )
    except Exception as error:  # values of a wrong type raise anything
        raise ValueError(_no_conformer(source, str(error))) from error


def _no_conformer(source: Path, why: str) -> str:
    return (
        f"The configuration in {source} describes no Conformer that the kit can build ({' '.join(why.split())}): give "
        "another model."
    )


def conformer(options: dict, tensors: dict[str, Tensor], source: Path) -> ConformerForConditionalGeneration:
    """Build a Conformer from options and weights, in evaluation mode and float32.

    Each tensor is used once, and each parameter is filled. Tensors in LEFT_OUT are dropped, and so is the intermediate
    CTC head (`encoder.ctc_fc`) if the options name no layer for it, because no output depends on them.

    ValueError: something does not fit; the sentence lists everything that does not.
    """
    origins, weights, problems = {}, {}, []
    for name, tensor in tensors.items():
        for own, part in renamed(name, tensor).items():
            if own in weights:
                problems.append(f"{name} repeats {origins[own]}")
            origins[own], weights[own] = name, part
    if options.get("ctc_encoder_layer") is None or CTC_HEAD[0] not in weights:
        options = options | {"ctc_encoder_layer": None}
        weights = {name: tensor for name, tensor in weights.items() if name not in CTC_HEAD}
    else:
        options = options | {"ctc_vocab_size": len(weights[CTC_HEAD[0]])}
    embeddings = [name for name in TIED if name in weights]
    if embeddings:
        options = {"vocab_size": len(weights[embeddings[0]]), "tie_word_embeddings": len(embeddings) == 1} | options
    config = configuration(options, source)
    if config.tie_word_embeddings and len(embeddings) == 1:
        origins, weights = ({name: each[embeddings[0]] for name in TIED} | each for each in (origins, weights))
    elif config.tie_word_embeddings and embeddings and not torch.equal(*(weights[name] for name in TIED)):
        problems.append(f"{' and '.join(origins[name] for name in TIED)} should be equal")
    try:
        network = ConformerForConditionalGeneration(config)
    except Exception as error:  # for example, heads that do not divide the width
        raise ValueError(_no_conformer(source, str(error))) from error
    expected = network.state_dict()
    for name, tensor in weights.items():
        if name not in expected:
            problems.append(f"{origins[name]} is unknown")
        elif tensor.shape != expected[name].shape:
            problems.append(f"{origins[name]} is {list(tensor.shape)} and not {list(expected[name].shape)}")
    optional = {name for name in expected if name.endswith(".num_batches_tracked")}  # used only in training
    problems += [f"{name} is missing" for name in expected if name not in weights.keys() | optional]
    if problems:
        raise ValueError(
            f"The weights in {source} do not fit its configuration ({'; '.join(problems)}): download it again."
        )
    network.load_state_dict(weights, strict=False)
    return network.eval()


def completed(pieces: list[str], rows: int, source: Path) -> list[str]:
    """The pieces of all `rows` token ids of a model, completed by the CTC blank. ValueError: the numbers differ."""
    if len(pieces) == rows - 1:
        pieces = [*pieces, BLANK]
    if len(pieces) != rows:
        raise ValueError(
            f"{source} has {len(pieces)} pieces, but the model has {rows}: give the model's own vocabulary."
        )
    return pieces


def language_ids(pieces: list[str]) -> dict[str, int]:
    """Token ids of language tags such as <lang:en> among the pieces."""
    return {found[1]: token for token, piece in enumerate(pieces) if (found := LANGUAGE_TAG.fullmatch(piece))}


class FamaModel(ConformerModel):
    """A FAMA model, from a folder with the hub's config.json, weights, vocab.json and sentencepiece.bpe.model."""

    @classmethod
    def from_folder(cls, folder: str | Path, device: str = "cpu") -> "FamaModel":
        """Load the model in float32."""
        folder = Path(folder)
        files = sorted(folder.glob("*.safetensors"))
        absent = [name for name in ("sentencepiece.bpe.model", "vocab.json") if not (folder / name).is_file()]
        absent += [] if files else ["*.safetensors"]
        if absent:
            raise FileNotFoundError(f"The model folder {folder} has no {', '.join(absent)}: download it again.")
        try:
            weights_hash = folder_hash(folder)
            tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
        except SafetensorError as error:
            raise ValueError(f"The weights in {folder} are damaged ({error}): download them again.") from error
        options = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        network = conformer(options, tensors, folder)
        vocabulary = Vocabulary(folder / "sentencepiece.bpe.model", folder / "vocab.json")
        vocabulary.pieces = completed(vocabulary.pieces, network.config.vocab_size, folder / "vocab.json")
        network.config.language_ids = language_ids(vocabulary.pieces)
        if not network.config.language_ids:
            raise ValueError(f"{folder / 'vocab.json'} has no language tags such as <lang:en>: download it again.")
        return cls(network.to(device), vocabulary, str(folder), weights_hash)
