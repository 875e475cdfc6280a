"""Loading speech-to-text models: from a folder or from the Hugging Face hub."""

import json
import re
from collections.abc import Callable
from os import PathLike
from os.path import expanduser
from pathlib import Path
from textwrap import shorten

import huggingface_hub
import torch

from xattn.models.errors import HUB_ERRORS, first_line
from xattn.models.formats import MODEL, check_format, is_ctranslate2, is_openai
from xattn.models.interface import Decoding, S2TModel

__all__ = ["HUB_ID", "Decoding", "S2TModel", "load_model"]

HUB_ID = re.compile(r"(?P<name>\w[\w.-]*/(?P<own>\w[\w.-]*))(@(?P<revision>\w[\w./-]*))?")  # owner/name@revision
# Configuration, weights (model.bin is CTranslate2's) and vocabulary; never code or pickles, such as pytorch_model.bin.
FETCHED = ("*.json", "*.safetensors", "model.bin", "*.model", "*.txt")
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
        name_or_path: one of:
            - a folder in transformers' layout;
            - a folder of faster-whisper, that is, a Whisper model of CTranslate2 (model.bin), quantised or not;
            - a Whisper checkpoint of OpenAI (.pt). Its vocabulary is the tokenizer.json, or vocab.json and merges.txt,
              in the same folder. Without them, OpenAI's is downloaded from the hub.
            - the id of a model in one of the two layouts on the Hugging Face hub, such as "FBK-MT/fama-small" or
              "Systran/faster-whisper-tiny.en". It is downloaded once into the hub's cache. "owner/name@revision"
              selects a branch, tag or commit; the commit that was loaded is in the model's `source`.
            None of a model's code runs, and nothing pickled is executed.
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
            f"({shorten(first_line(error), 90)}): set device to cpu, or run this where there is one."
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
        model = _loader_for(folder)(folder, device)
    except PermissionError as error:
        raise PermissionError(
            f"The permission to read {error.filename} is denied: change the permissions of the file or of its folder."
        ) from error
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


def _loader_for(path: Path) -> Callable[[Path, str], S2TModel]:
    """Return a function of path and device. Only its module is imported: each brings its own part of transformers."""
    if is_openai(path):
        from xattn.models.convert.openai import load

        return load
    check_format(path)
    if is_ctranslate2(path):
        from xattn.models.convert.ctranslate2 import load

        return load
    match _architecture(path):
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
    return Model.from_folder


def _fetched(name: str, revision: str) -> Path:
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=FETCHED))
    except HUB_ERRORS as error:
        raise OSError(
            f"There is no model folder {name}, and the Hugging Face hub does not provide it at revision {revision} "
            f"({first_line(error)}): check the name and the network, or give a local folder."
        ) from error
