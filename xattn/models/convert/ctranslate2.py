"""Reads Whisper models of CTranslate2, the format of faster-whisper, without CTranslate2.

model.bin holds the version of the format (u32), the model's class and its revision, variables and aliases, all little
endian. A variable has a name, a rank (u8), its dimensions (u32 each), a type (u8), a number of bytes (u32) and those
bytes. A name has its length (u16) before it and a zero byte at its end, which the length includes. Weights in int8 have
a scale for each row, those in int16 one for the tensor; both are divided by it.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from xattn.models.convert.whisper import build, load_tokenizer, read_json, token_list
from xattn.models.whisper import WhisperModel

VERSION, CLASS, REVISION = 6, "WhisperSpec", 3
TYPES = ("float32", "int8", "int16", "int32", "float16", "uint16")  # uint16 holds bfloat16, which NumPy lacks
# Settings with the only value that Whisper has; 3 is GELU.
SETTINGS = {
    "decoder/activation": 3,
    "decoder/alibi": 0,
    "decoder/pre_norm": 1,
    "decoder/scale_embeddings": 0,
    "decoder/start_from_zero_embedding": 0,
}

NORM = {"gamma": "weight", "beta": "bias"}
LINEAR = {"weight": "weight", "bias": "bias"}
# Parts of a layer in CTranslate2 and in transformers; several names are stacked along the rows of one tensor.
SELF_ATTENTION = {
    "self_attention/layer_norm": ("self_attn_layer_norm",),
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
}
CROSS_ATTENTION = {
    "attention/layer_norm": ("encoder_attn_layer_norm",),
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
}
FEED_FORWARD = {"ffn/layer_norm": ("final_layer_norm",), "ffn/linear_0": ("fc1",), "ffn/linear_1": ("fc2",)}
LAYER = {"encoder": SELF_ATTENTION | FEED_FORWARD, "decoder": SELF_ATTENTION | CROSS_ATTENTION | FEED_FORWARD}


class Variable(NamedTuple):
    """An array on disk, and the scale to divide it by."""

    stored: np.ndarray
    scale: np.ndarray | None


class Variables(dict[str, Variable]):
    """The variables of a model.bin by name; an alias names the same object as its target."""

    def __init__(self, path: Path):
        """Read a file; its arrays stay on disk. ValueError: it is damaged, or no Whisper model of this version."""
        self.path, self.position = path, 0
        self.content = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)
        if (version := self._number(4)) != VERSION:
            raise ValueError(
                f"{path} has version {version} of CTranslate2's format, or another format, and not version {VERSION}: "
                "convert the original model with CTranslate2 4."
            )
        found, revision = self._text(), self._number(4)
        if found != CLASS:
            raise ValueError(f"{path} is a {found} of CTranslate2 and not a {CLASS}: give a Whisper model.")
        if revision != REVISION:
            raise ValueError(
                f"{path} has revision {revision} of {CLASS} and not {REVISION}: convert the original model with "
                "CTranslate2 4."
            )
        arrays = dict(self._array() for _ in range(self._number(4)))
        scales = {name for name in arrays if name.endswith("_scale") and name.removesuffix("_scale") in arrays}
        super().__init__({name: Variable(arrays[name], arrays.get(f"{name}_scale")) for name in arrays.keys() - scales})
        for _ in range(self._number(4)):
            alias, target = self._text(), self._text()
            self[alias] = self[target]

    def __missing__(self, name: str) -> Variable:
        raise ValueError(f"{self.path} lacks {name}: give a complete Whisper model.")

    def shape(self, name: str, rank: int) -> tuple[int, ...]:
        """Return the shape of an array. ValueError: it has another rank."""
        shape = self[name].stored.shape
        if len(shape) != rank:
            raise ValueError(f"{self.path} has {name} of shape {[*shape]}: give a complete Whisper model.")
        return shape

    def number(self, name: str) -> int | float:
        """Return a number. ValueError: it is an array."""
        self.shape(name, 0)
        return self[name].stored.item()

    def floats(self, name: str) -> np.ndarray:
        """Return an array in float32, in memory. ValueError: it is a number, or stored in an unknown way."""
        stored, scale = self[name]
        if not stored.ndim:
            raise ValueError(f"{self.path} has a number for {name}: give a complete Whisper model.")
        if stored.dtype == np.uint16:  # bfloat16 is the upper half of a float32
            wide = stored.astype(np.uint32)
            wide <<= 16
            return wide.view(np.float32)
        if stored.dtype.kind == "i" and (scale is None or scale.size not in (1, *stored.shape[:1])):
            raise ValueError(
                f"{self.path} has {name} in {stored.dtype} with {0 if scale is None else scale.size} scales: convert "
                "the original model with CTranslate2 4."
            )
        floats = stored.astype(np.float32)
        if scale is not None:
            floats /= scale.astype(np.float32).reshape(-1, *[1] * (floats.ndim - 1))
        return floats

    def _take(self, size: int) -> np.ndarray:
        start, self.position = self.position, self.position + size
        if self.position > len(self.content):
            raise ValueError(
                f"{self.path} is cut short, because it ends at byte {len(self.content)} and not after "
                f"{self.position}: download it again."
            )
        return self.content[start : self.position]

    def _number(self, size: int) -> int:
        return int.from_bytes(self._take(size).tobytes(), "little")

    def _text(self) -> str:
        start, text = self.position, self._take(self._number(2)).tobytes().rstrip(b"\0").decode("latin-1")
        if not (text.isascii() and text.isprintable()):
            raise ValueError(f"{self.path} is damaged, because there is no name at byte {start}: download it again.")
        return text

    def _array(self) -> tuple[str, np.ndarray]:
        name = self._text()
        shape = [self._number(4) for _ in range(self._number(1))]
        kind, size = self._number(1), self._number(4)
        if kind >= len(TYPES) or math.prod(shape) * np.dtype(TYPES[kind]).itemsize != size:
            raise ValueError(
                f"{self.path} is damaged, because {name} has the type {kind}, the shape {shape} and {size} bytes: "
                "download it again."
            )
        return name, self._take(size).view(np.dtype(TYPES[kind]).newbyteorder("<")).reshape(shape)


def load(folder: Path, device: str = "cpu") -> WhisperModel:
    """Load a faster-whisper folder in float32 and evaluation mode.

    The vocabulary is that of tokenizer.json, or OpenAI's. config.json has the tokens to suppress and the heads whose
    cross-attention follows the recording (`generation_config.alignment_heads`).

    FileNotFoundError: a file is missing. ValueError: the files are damaged, do not fit each other, or hold another
    model.
    """
    variables, config = Variables(folder / "model.bin"), folder / "config.json"
    dimensions = dimensions_of(variables)
    size, positions = dimensions["vocab_size"], dimensions["max_source_positions"]
    tokenizer, files = load_tokenizer(variables.path, size, positions)
    check_vocabulary(folder, tokenizer.get_vocab())
    settings = {
        "suppress_tokens": token_list(config, "suppress_ids", size),
        "begin_suppress_tokens": token_list(config, "suppress_ids_begin", size),
        "alignment_heads": alignment_heads(config, dimensions),
    }
    return build(folder, dimensions, state_dict(variables), tokenizer, [config, *files], device, **settings)


def dimensions_of(variables: Variables) -> dict:
    """Return arguments of WhisperConfig. ValueError: a variable is missing, or the model is not Whisper's."""
    for name, value in SETTINGS.items():
        if name in variables and variables.number(name) != value:
            raise ValueError(
                f"{variables.path} has {variables.number(name)} for {name}, where Whisper has {value}: give a Whisper "
                "model."
            )
    dimensions = {}
    for side, limit in (("encoder", "max_source_positions"), ("decoder", "max_target_positions")):
        dimensions |= {
            limit: variables.shape(f"{side}/position_encodings/encodings", 2)[0],
            f"{side}_layers": layers(variables, side),
            f"{side}_ffn_dim": variables.shape(f"{side}/layer_0/ffn/linear_0/weight", 2)[0],
            f"{side}_attention_heads": variables.number(f"{side}/num_heads"),
        }
    size, width = variables.shape("decoder/embeddings/weight", 2)
    return dimensions | {
        "vocab_size": size,
        "d_model": width,
        "num_mel_bins": variables.shape("encoder/conv1/weight", 3)[1],
        "tie_word_embeddings": variables["decoder/projection/weight"] is variables["decoder/embeddings/weight"],
    }


def layers(variables: Variables, side: str) -> int:
    """Return the number of layers of the "encoder" or "decoder"."""
    parts = [name.split("/") for name in variables]
    return len({part[1] for part in parts if part[0] == side and len(part) > 3})


def state_dict(variables: Variables) -> dict[str, Tensor]:
    """Return float32 tensors under transformers' names. ValueError: a variable is missing, or there is another one.

    Biases of keys are left out: Whisper has none, and CTranslate2 fills in 0.
    """
    tensors, read = {}, set()

    def add(name: str, ours: tuple[str, ...], kinds: dict[str, str]) -> None:
        for kind, our_kind in kinds.items():
            read.add(f"{name}/{kind}")
            parts = np.array_split(variables.floats(f"{name}/{kind}"), len(ours))
            for our, part in zip(ours, parts, strict=True):
                if not (our.endswith("k_proj") and our_kind == "bias"):
                    tensors[f"{our}.{our_kind}"] = torch.from_numpy(part.copy() if len(ours) > 1 else part)

    for conv in ("conv1", "conv2"):
        add(f"encoder/{conv}", (f"model.encoder.{conv}",), LINEAR)
    for side, parts in LAYER.items():
        for layer in range(layers(variables, side)):
            for part, ours in parts.items():
                names = tuple(f"model.{side}.layers.{layer}.{our}" for our in ours)
                add(f"{side}/layer_{layer}/{part}", names, NORM if part.endswith("norm") else LINEAR)
        add(f"{side}/layer_norm", (f"model.{side}.layer_norm",), NORM)
        add(f"{side}/position_encodings", (f"model.{side}.embed_positions",), {"encodings": "weight"})
    add("decoder/embeddings", ("model.decoder.embed_tokens",), {"weight": "weight"})
    if variables["decoder/projection/weight"] is not variables["decoder/embeddings/weight"]:
        add("decoder/projection", ("proj_out",), {"weight": "weight"})
    read.add("decoder/projection/weight")
    for name in sorted(variables.keys() - read):
        if variables[name].stored.ndim:
            raise ValueError(f"{variables.path} has {name}, which Whisper lacks: give a Whisper model.")
    return tensors


def check_vocabulary(folder: Path, ids: dict[str, int]) -> None:
    """Raise ValueError if vocabulary.json or vocabulary.txt, if there is one, has other ids than the tokenizer."""
    for file in (folder / "vocabulary.json", folder / "vocabulary.txt"):
        if not file.is_file():
            continue
        try:
            text = file.read_text(encoding="utf-8")
            tokens = json.loads(text) if file.suffix == ".json" else text.removesuffix("\n").split("\n")
            # A token can have a new name in a newer tokenizer, such as <|nospeech|>.
            fits = len(tokens) == len(ids) and all(ids.get(token, i) == i for i, token in enumerate(tokens))
        except (ValueError, TypeError):
            fits = False
        if not fits:
            raise ValueError(
                f"{file} does not have the tokens of the tokenizer: use the tokenizer.json of the same model."
            )


def alignment_heads(config: Path, dimensions: dict) -> list[list[int]] | None:
    """Return the pairs of layer and head in config.json, if any. ValueError: the model has no such heads."""
    found = read_json(config).get("alignment_heads")
    limits = dimensions["decoder_layers"], dimensions["decoder_attention_heads"]
    try:
        fits = found is None or all(layer in range(limits[0]) and head in range(limits[1]) for layer, head in found)
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError(
            f"alignment_heads in {config} are not pairs of one of {limits[0]} layers and one of {limits[1]} heads: "
            "download it again."
        )
    return found
