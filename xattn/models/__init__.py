"""Speech-to-text models behind one face."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from textwrap import shorten
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
    L decoder layers, H heads, I decoder positions, V vocabulary. Features are unpadded, and so are states but for
    Whisper's, whose first `steps(T)` hold the recording. A setting is one of the paper's: "en", the transcript of
    English, or "en-it", its translation.
    """

    name: str
    source: str  # what it was loaded from
    weights_hash: str
    languages: tuple[str, ...]  # that it writes, the default first; none where its files do not say
    device: torch.device
    frame_seconds: float  # from one frame to the next
    first_frame: float  # seconds at which the first frame's window is centred
    band_centres: np.ndarray  # (F,), Hz
    subsampling: int  # input frames an encoder step covers
    lead: int  # frames by which the first step's window begins before the first frame; 0 but for Seamless
    padding_safe: bool  # whether outputs stay the same when the input is padded

    def features(self, audio: np.ndarray) -> Tensor:
        """16 kHz mono audio (samples,) to the model's input (T, F)."""

    def prompt(self, setting: str) -> Tensor:
        """The decoder's first tokens in a setting, shape (P,)."""

    def steps(self, frames: int) -> int:
        """How many encoder steps hold the recording, for features of `frames` frames."""

    def without_cells(self, features: Tensor, keep: Tensor) -> Tensor:
        """Features (T, F) with cells hidden where keep (B, T, F) is 0: a batch for `encode` and `generate`."""

    def encode(self, features: Tensor) -> Tensor:
        """Features (B, T, F) to encoder states (B, S, D)."""

    def decode(self, states: Tensor, decoder_input_ids: Tensor) -> Tensor:
        """Teacher-forced log-probabilities (B, I, V) of states (B, S, D) and one row of decoder inputs (I,)."""

    def decoder_without_steps(self, states: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Of one utterance's states (1, S, D), a function of keep (B, S or fewer), 0 where a step is hidden and 1
        elsewhere, and decoder inputs (I,), that equals `decode(states * keep[..., None], inputs)`."""

    def cross_attention(self, states: Tensor, decoder_input_ids: Tensor) -> Tensor:
        """Attention weights (L, H, I, S) of the forced decoding of one utterance, states (1, S, D)."""

    def generate(self, features: Tensor, setting: str, attention_mask: Tensor | None = None) -> list[Tensor]:
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
    "whisper": ("whisper", "WhisperModel"),
    "speech_to_text": ("speech_to_text", "SpeechToTextModel"),
    "seamless_m4t_v2": ("seamless", "SeamlessModel"),
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
        ValueError: it is of no model that the kit knows, its files do not fit each other, or there is no such device.
        OSError: the hub does not give the model.
    """
    try:
        torch.empty(0, device=device)
    except Exception as error:  # of many kinds, by device and build of torch
        raise ValueError(
            f"There is no {'CUDA device' if str(device) == 'cuda' else f'device {device!r}'} here that torch can use "
            f"({shorten(_line(error), 90)}): set device to cpu, or run this where there is one."
        ) from error
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


def _line(error: Exception) -> str:
    """The first line of what a library says, without its full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _fetched(name: str, revision: str) -> Path:
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=FETCHED))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise OSError(
            f"There is no model folder {name}, and the Hugging Face hub does not give it at revision {revision} "
            f"({_line(error)}): check the name and the network, or give a local folder."
        ) from error


def folder_hash(folder: Path) -> str:
    """Hash of a model folder's tensors, however its files lay them out, of its configuration and its vocabulary."""
    tensors = {
        name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }
    names = ("config.json", "spm.model", "sentencepiece.bpe.model", "vocab.json")
    return hash_of(tensors, [folder / name for name in names if (folder / name).is_file()])


def hash_of(tensors: dict[str, Tensor], files: Iterable[Path]) -> str:
    """Hash of tensors and their names, in whatever order, and of the contents of files."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
