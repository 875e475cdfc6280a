"""Loading speech-to-text models: from a folder or from the Hugging Face hub."""

import json
import re
from os import PathLike
from os.path import expanduser
from pathlib import Path
from textwrap import shorten

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from xattn.models.formats import MODEL, check_format
from xattn.models.interface import Decoding, S2TModel

__all__ = ["HUB_ID", "Decoding", "S2TModel", "load_model"]

HUB_ID = re.compile(r"(?P<name>\w[\w.-]*/(?P<own>\w[\w.-]*))(@(?P<revision>\w[\w./-]*))?")  # owner/name@revision
FETCHED = ("*.json", "*.safetensors", "*.model", "*.txt")  # configuration, weights, vocabulary; never code or pickles
# How config.json names the architectures: by class or by model_type.
ARCHITECTURES = (
    "xattn_conformer",
    "ConformerEncoderDecoderForConditionalGeneration",
    "whisper",
    "speech_to_text",
    "seamless_m4t_v2",
)


def load_model(name_or_path: str | Path, device: str = "cpu") -> S2TModel:
    """Load a model in float32 and evaluation mode.

    Args:
        name_or_path: a local folder, or the id of a model on the Hugging Face hub, such as "FBK-MT/fama-small". A hub
            model is downloaded once into the hub's cache; none of its code runs. "owner/name@revision" selects a
            branch, tag or commit; the commit that was loaded is in the model's `source`.
        device: a torch device, such as "cuda".

    Raises:
        FileNotFoundError: there is no such folder, or a file is missing from it.
        ValueError: the format or the architecture is unknown, the files do not fit each other, or there is no such
            device.
        PermissionError: the folder or a file in it cannot be read.
        TypeError: name_or_path is neither text nor a path.
        OSError: the hub cannot provide the model.
    """
    try:
        torch.empty(0, device=device)
    except Exception as error:  # the type depends on the device and the build of torch
        raise ValueError(
            f"There is no {'CUDA device' if str(device) == 'cuda' else f'device {device!r}'} here that torch can use "
            f"({shorten(_line(error), 90)}): set device to cpu, or run this where there is one."
        ) from error
    if not isinstance(name_or_path, str | PathLike):
        raise TypeError(f"A model cannot be loaded from an object of type {type(name_or_path).__name__}: {MODEL}")
    folder = Path(expanduser(name_or_path))
    try:
        hub = None if folder.exists() else HUB_ID.fullmatch(str(name_or_path))
        if hub:
            folder = _fetched(hub["name"], hub["revision"] or "main")
        elif not (folder.is_dir() or folder.is_file()):
            raise FileNotFoundError(
                f"There is no model folder {name_or_path}: give the path of one, such as data/models/base, or the id "
                "of a model on the Hugging Face hub, such as FBK-MT/fama-small."
            )
        check_format(folder)
        architecture = _architecture(folder)
    except PermissionError as error:
        raise PermissionError(
            f"The permission to read {error.filename} is denied: change the permissions of the file or of its folder."
        ) from error
    model = _class_for(architecture).from_folder(folder, device)
    if hub:
        model.name = hub["own"]
        model.source = f"{hub['name']}@{folder.name}"  # a snapshot's folder is named after its commit
    return model


def _architecture(folder: Path) -> str:
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
        raise ValueError(f"{folder / 'config.json'} names no model_type: download or train the model again.")
    if kind not in ARCHITECTURES:
        raise ValueError(
            f"{folder / 'config.json'} describes a {kind!r} model: give one of {', '.join(ARCHITECTURES)}."
        )
    return kind


def _class_for(architecture: str):
    """Import only the class that is needed: each brings its own part of transformers."""
    match architecture:
        case "xattn_conformer":
            from xattn.models.conformer import ConformerModel as Model
        case "ConformerEncoderDecoderForConditionalGeneration":
            from xattn.models.fama import FamaModel as Model
        case "whisper":
            from xattn.models.whisper import WhisperModel as Model
        case "speech_to_text":
            from xattn.models.speech_to_text import SpeechToTextModel as Model
        case "seamless_m4t_v2":
            from xattn.models.seamless import SeamlessModel as Model
    return Model


def _line(error: Exception) -> str:
    """The first line of a library's message, without its full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _fetched(name: str, revision: str) -> Path:
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=FETCHED))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise OSError(
            f"There is no model folder {name}, and the Hugging Face hub does not provide it at revision {revision} "
            f"({_line(error)}): check the name and the network, or give a local folder."
        ) from error
