"""Weights on disk: loading a network, and hashes that identify it."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from textwrap import shorten

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging


def folder_hash(folder: Path) -> str:
    """Hash a model folder: its tensors, however they are split into files, its configuration and its vocabulary."""
    tensors = {
        name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()
    }
    names = ("config.json", "spm.model", "sentencepiece.bpe.model", "vocab.json")
    return hash_weights(tensors, [folder / name for name in names if (folder / name).is_file()])


def hash_weights(tensors: dict[str, Tensor], files: Iterable[Path]) -> str:
    """Hash named tensors, in any order, and the contents of files."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def load_network(kind: type[PreTrainedModel], folder: Path) -> PreTrainedModel:
    """Load a folder's safetensors files into a network in float32 and evaluation mode.

    FileNotFoundError: there are none. ValueError: they are damaged, incomplete or do not fit config.json.
    """
    if not any(folder.glob("model*.safetensors")):
        raise FileNotFoundError(
            f"The model folder {folder} has no model.safetensors: use a revision that has it, because weights in "
            "pickle files are not read."
        )
    logging.disable_progress_bar()  # it would stay in executed notebooks as a stuck widget
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # the sentences below replace transformers' printed table
    try:
        network, report = kind.from_pretrained(
            folder,
            dtype=torch.float32,
            output_loading_info=True,
            use_safetensors=True,
            local_files_only=True,
            ignore_mismatched_sizes=True,
        )
    except SafetensorError as error:
        raise ValueError(f"A safetensors file of {folder} is damaged ({error}): download or train it again.") from error
    except Exception as error:  # invalid values in config.json raise anything
        raise ValueError(
            f"No network can be built from {folder / 'config.json'} ({type(error).__name__}: "
            f"{shorten(str(error), 200)}): download or train the model again."
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    other = [f"{name} is {[*stored]} and not {[*ours]}" for name, stored, ours in sorted(report["mismatched_keys"])]
    if other:
        raise ValueError(
            f"The safetensors files of {folder} do not fit its config.json ({_first(other, '; ')}): download or train "
            "the model again."
        )
    absent = sorted(report["missing_keys"])
    if absent:
        raise ValueError(
            f"The safetensors files of {folder} lack {_first(absent, ', ')}: download or train the model again."
        )
    unused = sorted(report["unexpected_keys"])
    if unused:  # released checkpoints can contain leftovers of older architectures
        print(f"{folder}: not used, because config.json describes no such weights: {_first(unused, ', ')}")
    return network.eval()


def _first(items: list[str], separator: str) -> str:
    more = f" and {len(items) - 3} more" if items[3:] else ""
    return separator.join(items[:3]) + more
