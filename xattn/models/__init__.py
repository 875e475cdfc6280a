"""Speech-to-text models behind one face."""

import hashlib
import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor


class S2TModel(Protocol):
    """What the kit asks of an encoder-decoder speech-to-text model.

    Letters in shapes: B batch, T input frames, F mel bands, S encoder steps (T' in the paper), D model width,
    L decoder layers, H heads, I decoder positions, V vocabulary. Features and states are unpadded.
    """

    name: str
    source: str  # what it was loaded from
    weights_hash: str
    languages: tuple[str, ...]
    device: torch.device
    frame_seconds: float
    subsampling: int  # input frames an encoder step covers

    def features(self, audio: np.ndarray) -> Tensor:
        """16 kHz mono audio (samples,) to the model's input (T, F)."""

    def prompt(self, language: str) -> Tensor:
        """The decoder's first tokens for output in `language`, shape (P,)."""

    def encode(self, features: Tensor) -> Tensor:
        """Features (B, T, F) to encoder states (B, S, D)."""

    def decode(self, states: Tensor, decoder_input_ids: Tensor) -> Tensor:
        """Teacher-forced log-probabilities (B, I, V) of states (B, S, D) and one row of decoder inputs (I,)."""

    def decoder_without_steps(self, states: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Of one utterance's states (1, S, D), a function of keep (B, S), 0 where a step is hidden and 1 elsewhere, and
        decoder inputs (I,), that equals `decode(states * keep[..., None], inputs)`."""

    def cross_attention(self, states: Tensor, decoder_input_ids: Tensor) -> Tensor:
        """Attention weights (L, H, I, S) of the forced decoding of one utterance, states (1, S, D)."""

    def generate(self, features: Tensor, language: str, attention_mask: Tensor | None = None) -> list[Tensor]:
        """Beam search over (B, T, F): for each utterance the tokens after the prompt, with the final </s>, (I,)."""

    def tokens(self, ids: Tensor) -> list[str]:
        """Subword strings of token ids (I,)."""

    def text(self, ids: Tensor) -> str:
        """The text that token ids (I,) spell."""


# By the model_type of a folder's config.json: a module of this package and its class, imported when asked for.
ARCHITECTURES = {"xattn_conformer": ("conformer", "ConformerModel")}


def load_model(name_or_path: str | Path, device: str = "cpu") -> S2TModel:
    """Load a model from a local folder, ready to be explained (float32, evaluation mode)."""
    folder = Path(name_or_path)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no model folder {name_or_path}: give the path of one, such as data/models/base."
        )
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"The model folder {folder} has no config.json: give the folder of a trained model, "
            "such as data/models/base."
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'config.json'} names no model_type: fetch or train the model again.") from error
    if kind not in ARCHITECTURES:
        raise ValueError(f"{folder / 'config.json'} is of a {kind!r} model: give one of {', '.join(ARCHITECTURES)}.")
    module, name = ARCHITECTURES[kind]
    return getattr(import_module(f"xattn.models.{module}"), name).from_folder(folder, device)


def folder_hash(folder: Path) -> str:
    """Hash of a model folder's tensors, however the file lays them out, of its configuration and its vocabulary."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(folder / "model.safetensors").items()):
        digest.update(name.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    for name in ("config.json", "spm.model"):
        digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:16]
