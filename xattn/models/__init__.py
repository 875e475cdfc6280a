"""Speech-to-text models behind one face."""

import hashlib
import json
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Protocol

import huggingface_hub
import numpy as np
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
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
    padding_safe: bool  # whether outputs stay the same when the input is padded

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


# By a class that a folder's config.json names, or by its model_type: a module of this package and its class, imported
# when asked for.
ARCHITECTURES = {
    "xattn_conformer": ("conformer", "ConformerModel"),
    "ConformerEncoderDecoderForConditionalGeneration": ("fama", "FamaModel"),
}

HUB_ID = re.compile(r"(?P<name>\w[\w.-]*/(?P<own>\w[\w.-]*))(@(?P<revision>\w[\w./-]*))?")  # owner/name@revision
FETCHED = ("*.json", "*.safetensors", "*.model", "*.txt")  # configuration, weights, vocabulary; never code or pickles


def load_model(name_or_path: str | Path, device: str = "cpu") -> S2TModel:
    """Load a model, ready to be explained (float32, evaluation mode).

    Args:
        name_or_path: a local folder, or the id of a model of the Hugging Face hub, such as "FBK-MT/fama-small", whose
            files are fetched once and kept in the hub's cache; none of its code is run. "owner/name@revision" pins a
            branch, a tag or, for good, a commit; the commit that was loaded is in the model's `source`.
        device: of torch, such as "cuda".

    Raises:
        FileNotFoundError: there is no such folder, or a file is missing from it.
        ValueError: it is of no model that the kit knows, or its files do not fit each other.
        OSError: the hub does not give the model.
    """
    folder = Path(name_or_path)
    hub = None if folder.exists() else HUB_ID.fullmatch(str(name_or_path))
    if hub:
        folder = _fetched(hub["name"], hub["revision"] or "main")
    elif folder.suffix == ".pt" and folder.is_file():
        raise ValueError(f"{folder} is a checkpoint: make a folder of it with `python -m xattn.models.fairseq` first.")
    elif not folder.is_dir():
        raise FileNotFoundError(
            f"There is no model folder {name_or_path}: give the path of one, such as data/models/base, or the id of a "
            "model of the Hugging Face hub, such as FBK-MT/fama-small."
        )
    try:
        configuration = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kinds = [*(configuration.get("architectures") or []), configuration.get("model_type")]
        kind = next((each for each in kinds if each in ARCHITECTURES), kinds[-1])
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"The model folder {folder} has no config.json: give the folder of a trained model, "
            "such as data/models/base."
        ) from error
    except (ValueError, AttributeError, TypeError):
        kind = None
    if not kind:
        raise ValueError(f"{folder / 'config.json'} names no model_type: fetch or train the model again.")
    if kind not in ARCHITECTURES:
        raise ValueError(f"{folder / 'config.json'} is of a {kind!r} model: give one of {', '.join(ARCHITECTURES)}.")
    module, name = ARCHITECTURES[kind]
    model = getattr(import_module(f"xattn.models.{module}"), name).from_folder(folder, device)
    if hub:
        model.name = hub["own"]
        model.source = f"{hub['name']}@{folder.name}"  # the folder of a snapshot is named by its commit
    return model


def _fetched(name: str, revision: str) -> Path:
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=FETCHED))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise OSError(
            f"There is no model folder {name}, and the Hugging Face hub does not give it at revision {revision} "
            f"({str(error).strip().splitlines()[0]}): check the name and the network, or give a local folder."
        ) from error


def folder_hash(folder: Path) -> str:
    """Hash of a model folder's tensors, however its files lay them out, of its configuration and its vocabulary."""
    digest = hashlib.sha256()
    files = sorted(folder.glob("*.safetensors"))
    for name, tensor in sorted(item for file in files for item in load_file(file).items()):
        digest.update(name.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    for name in ("config.json", "spm.model", "sentencepiece.bpe.model", "vocab.json"):
        if (folder / name).is_file():
            digest.update((folder / name).read_bytes())
    return digest.hexdigest()[:16]
