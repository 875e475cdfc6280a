"""What a path holds: a model in one of the formats that the kit reads, or something else, and what to do about it."""

import json
import warnings
import zipfile
from pathlib import Path

import torch

LAYOUT = (
    "give the same model as a folder, in the layout of transformers or faster-whisper, or its id on the Hugging Face "
    "hub, such as openai/whisper-tiny.en."
)
MODEL = (
    "give a model folder, such as data/models/base, or the id of a model on the Hugging Face hub, such as "
    "openai/whisper-tiny.en."
)
LOADED = (".bin", ".json", ".model", ".safetensors", ".txt")  # suffixes of weights, configuration and vocabulary


def check_format(path: Path) -> None:
    """Raise an error if an existing path, other than a checkpoint of OpenAI, is not a model folder.

    The sentence says what the path is and what to do. PermissionError: the folder or a file in it cannot be read.
    """
    for kind, test, sentence in FORMATS:
        if found := test(path):
            raise kind(sentence.format(path=path, found=found))


def is_openai(path: Path) -> bool:
    """Whether a path is a checkpoint of OpenAI's whisper package; nothing pickled in it is executed."""
    if not path.is_file():
        return False
    try:
        with warnings.catch_warnings(action="ignore"):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {"dims", "model_state_dict"} <= content.keys()
    except Exception:  # other files raise anything
        return False


def is_ctranslate2(path: Path) -> bool:
    """Whether a path is a folder whose weights are in CTranslate2's file, as for faster-whisper."""
    return (path / "model.bin").is_file() and not any(path.glob("*.safetensors"))


def _head(path: Path) -> bytes:
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        return file.read(64)


def _pointer(path: Path) -> Path | None:
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.suffix in LOADED)
    return next((file for file in files if _head(file).startswith(b"version https://git-lfs")), None)


def _cut_short(path: Path) -> bool:
    """Whether a path is only the start of a file of torch.save, a ZIP archive with its table of contents at the end."""
    if not path.is_file() or path.suffix != ".pt" or zipfile.is_zipfile(path):
        return False
    return b"PK\x03\x04".startswith(_head(path)[:4])  # an empty file too


def _folder_of(path: Path) -> Path | None:
    return path.parent if path.is_file() and (path.parent / "config.json").is_file() else None


def _adapted(path: Path) -> str | None:
    """The base model of a PEFT adapter."""
    file = path / "adapter_config.json"
    if not file.is_file():
        return None
    try:
        stated = json.loads(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError):
        stated = None
    return stated or "a model that it does not name"


def _inside(path: Path) -> str:
    """The model folders in a folder that is not one, such as the hub's cache of a model, if there are at most three."""
    if (path / "config.json").exists():
        return ""
    folders = sorted({file.parent for inner in ("*", "snapshots/*") for file in path.glob(f"{inner}/config.json")})
    return " or ".join(map(str, folders)) if len(folders) <= 3 else ""


# The error, a test of a path, and the sentence for whatever the first successful test returns.
FORMATS = (
    (
        ValueError,
        _pointer,
        "{found} is a Git LFS pointer and not the file itself: run `git lfs pull` in its folder, or download the model "
        "again.",
    ),
    (
        ValueError,
        lambda path: _head(path)[:4] in (b"ggml", b"lmgg", b"GGUF"),
        f"{{path}} is a ggml or GGUF file, the formats of whisper.cpp, which the kit does not read: {LAYOUT}",
    ),
    (
        ValueError,
        lambda path: path.is_file() and path.suffix == ".nemo",
        f"{{path}} is a NeMo file, which the kit does not read: {MODEL}",
    ),
    (ValueError, _cut_short, "{path} is cut short: download it again."),
    (ValueError, _folder_of, "{path} is a file in a model folder: give the folder, {found}."),
    (
        ValueError,
        lambda path: path.is_file() and path.suffix == ".pt",
        "{path} is a checkpoint file: convert it with `python -m xattn.models.convert.fairseq` if FBK-fairseq wrote "
        f"it; otherwise, {LAYOUT}",
    ),
    (ValueError, Path.is_file, f"{{path}} is a file and not a model folder: {MODEL}"),
    (
        ValueError,
        _adapted,
        "{path} holds a PEFT adapter (adapter_config.json) of {found}: merge it into that model with PEFT's "
        "`merge_and_unload`, write the result with `save_pretrained` to a new folder, and give that folder.",
    ),
    (FileNotFoundError, lambda path: not any(path.iterdir()), f"The folder {{path}} is empty: {MODEL}"),
    (FileNotFoundError, _inside, "The folder {path} has no config.json of its own: give {found}."),
)
