"""Weights on disk: loading a network, and hashes that identify it."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from textwrap import shorten

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

# Files with weights that are not read, and the sentence for a folder that has no others.
OTHER_WEIGHTS = (
    (
        ("pytorch_model*.bin",),
        "{folder} has its weights only in a pickle file ({file}), which is not read because it can execute code: call "
        "transformers.AutoModelForSpeechSeq2Seq.from_pretrained(folder, weights_only=True).save_pretrained(folder) "
        "once, which reads only tensors from it and writes model.safetensors.",
    ),
    (
        ("flax_model*.msgpack", "tf_model*.h5"),
        "{folder} has its weights only for Flax or TensorFlow ({file}): use a revision that has model.safetensors, or "
        "convert them with transformers 4 (from_pretrained with from_flax=True or from_tf=True, then save_pretrained).",
    ),
)
# Entries of config.json that are not followed: implementations of attention that need further packages or would be
# fetched from the hub, outputs as tuples, and sub-configurations, which the architectures of the kit do not have.
IGNORED = (
    *("attn_implementation", "_attn_implementation", "return_dict"),
    *("decoder", "generator", "text_config", "text_encoder"),
)


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
    """Load a folder's safetensors files into a network in float32 and evaluation mode, its weights frozen.

    FileNotFoundError: there are none. ValueError: they are damaged, incomplete or do not fit config.json.
    """
    if not any(folder.glob("model*.safetensors")):
        for patterns, sentence in OTHER_WEIGHTS:
            files = sorted(file.name for pattern in patterns for file in folder.glob(pattern))
            if files:
                raise FileNotFoundError(sentence.format(folder=folder, file=files[0]))
        raise FileNotFoundError(
            f"The model folder {folder} has no model.safetensors: use a revision that has it, because weights in "
            "pickle files are not read."
        )
    _check_generation(folder / "generation_config.json")
    logging.disable_progress_bar()  # it would stay in executed notebooks as a stuck widget
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # the sentences below replace transformers' printed table
    try:
        network, report = kind.from_pretrained(
            folder,
            config=_configuration(kind, folder),
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
    return network.eval().requires_grad_(False)  # gradients are those of inputs and attention


def _check_generation(file: Path) -> None:
    """Raise ValueError if a file is damaged: transformers would silently use its defaults instead."""
    if not file.is_file():
        return
    try:
        complete = isinstance(json.loads(file.read_text(encoding="utf-8")), dict)
    except ValueError:
        complete = False
    if not complete:
        raise ValueError(f"{file} is damaged, because it is not a JSON object: download it again.")


def _configuration(kind: type[PreTrainedModel], folder: Path) -> PreTrainedConfig:
    """Read config.json without IGNORED; transformers then takes "sdpa" attention if the class has it, else "eager"."""
    stated, _ = kind.config_class.get_config_dict(folder, local_files_only=True)
    return kind.config_class.from_dict({name: value for name, value in stated.items() if name not in IGNORED})


def _first(items: list[str], separator: str) -> str:
    more = f" and {len(items) - 3} more" if items[3:] else ""
    return separator.join(items[:3]) + more
