"""Convert checkpoints of FBK-fairseq (.pt) without executing anything pickled in them.

`python -m xattn.models.convert.fairseq checkpoint.pt my_model` writes a folder for
`xattn.load_model`. The SentencePiece model and its dictionary lie beside the checkpoint.
"""

import argparse
import json
import re
import shutil
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor

from xattn.models.conformer import read_pieces
from xattn.models.fama import completed, conformer, language_ids

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # the first ids of every dictionary; its file omits them
ADDED = re.compile(r"<.+>|madeupword\d+")  # entries that are no pieces: tags, and padding to a round size

# fairseq's options with another name in transformers.
OPTIONS = {
    "encoder_embed_dim": "d_model",
    "decoder_ffn_embed_dim": "decoder_ffn_dim",
    "share_decoder_input_output_embed": "tie_word_embeddings",
    "activation_fn": "activation_function",
}


class Stored:
    """Holds the attributes of a pickled object of any class; it has no behaviour."""

    def __setstate__(self, state: dict):
        self.__dict__.update(state)


class Unread:
    """Replaces an object that no model needs, such as a NumPy number; its contents are dropped."""

    def __init__(self, *_):
        pass

    def __setstate__(self, _):
        pass


# The only names that a checkpoint may use besides tensors, and their replacements; the real classes are never loaded.
ALLOWED = {
    "argparse.Namespace": Stored,
    "omegaconf.dictconfig.DictConfig": Stored,
    "omegaconf.listconfig.ListConfig": Stored,
    "omegaconf.nodes.AnyNode": Stored,
    "omegaconf.base.Metadata": Stored,
    "omegaconf.base.ContainerMetadata": Stored,
    "typing.Any": Stored,
    "builtins.dict": Stored,
    "builtins.list": Stored,
    "collections.defaultdict": lambda *_: {},
    # NumPy numbers and arrays, such as validation scores.
    **{f"numpy.{core}.multiarray.{name}": Unread for core in ("core", "_core") for name in ("scalar", "_reconstruct")},
    **dict.fromkeys(("numpy.ndarray", "numpy.dtype"), Unread),
    **{f"builtins.{name}": Unread for name in ("bool", "bytes", "float", "frozenset", "int", "range", "slice", "str")},
}


def contents(value):
    """The dictionary, list or plain value inside a stored namespace or configuration."""
    if not isinstance(value, Stored):
        return value
    held = vars(value)
    key = next((key for key in ("_content", "_val") if key in held), None)  # OmegaConf's containers and nodes
    return contents(held[key]) if key else held


def read_checkpoint(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """Read the model's options, under transformers' names, and its tensors.

    ValueError: the file names a class or function that is not in ALLOWED, is damaged, or holds no such model.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint {path}: check the path.")
    allowed = [(stand_in, name) for name, stand_in in ALLOWED.items()]
    with torch.serialization.safe_globals(allowed), warnings.catch_warnings(action="ignore"):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged or malicious file may raise anything
            refused = re.search(r"GLOBAL ([\w.]+)", str(error))
            if refused:
                raise ValueError(
                    f"{path} was not read, because it needs {refused[1]}, which is not known to be harmless: get the "
                    "checkpoint from a source that you trust, or save it again with only its args or cfg and model."
                ) from error
            if "Unsupported operand" in str(error):
                raise ValueError(
                    f"{path} was not read, because its pickle protocol is not 2: save it again with torch.save's "
                    "default protocol."
                ) from error
            raise ValueError(
                f"{path} is damaged or no checkpoint ({type(error).__name__}): download it again."
            ) from error
    try:
        namespace = state.get("args") or contents(contents(state["cfg"])["model"])
        options = {OPTIONS.get(name, name): contents(value) for name, value in contents(namespace).items()}
        options["conv_kernel_sizes"] = [int(size) for size in options["conv_kernel_sizes"].split(",")]
        tensors = {name: tensor for name, tensor in state["model"].items() if isinstance(tensor, Tensor)}
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} holds no Conformer of FBK-fairseq ({type(error).__name__}: {error}): give such a checkpoint."
        ) from error
    return options, tensors


def read_vocabulary(spm: Path) -> tuple[Path, list[str]]:
    """Read the dictionary beside a SentencePiece model (same name, or dict.txt): its path and pieces in id order.

    ValueError: a line is not "piece count", or the SentencePiece model lacks a piece.
    """
    candidates = (spm.with_suffix(".txt"), spm.with_name("dict.txt"))
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None or not spm.is_file():
        raise FileNotFoundError(
            f"{spm} or its dictionary, {' or '.join(each.name for each in candidates)}, is missing: put both in one "
            "folder."
        )
    lines = [line.rstrip().rpartition(" ") for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    pieces = [*SPECIAL, *(piece for piece, _, _ in lines)]
    processor = read_pieces(spm)
    known = {processor.id_to_piece(token) for token in range(len(processor))}
    for piece, _, count in lines:
        if not (piece and count.isdecimal()):
            raise ValueError(f"{path} has the line {f'{piece} {count}'.strip()!r}, which is not a piece and a count.")
        if piece not in known and not ADDED.fullmatch(piece):
            raise ValueError(
                f"{path} has the piece {piece!r}, but {spm.name} does not: give files that belong together."
            )
    if len(set(pieces)) < len(pieces):
        raise ValueError(f"{path} has a piece twice: download it again.")
    return path, pieces


def convert(checkpoint: Path, folder: Path, spm: Path | None = None, language: str | None = None) -> None:
    """Convert a checkpoint into a new folder with config.json, model.safetensors, spm.model and vocab.json.

    Args:
        spm: the decoder's SentencePiece model with its dictionary beside it; by default the one in the checkpoint's
            folder.
        language: the language that the model writes, if its vocabulary has no language tags.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: one sentence says what is wrong; nothing is written.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists already: give a new folder.")
    options, tensors = read_checkpoint(checkpoint)
    network = conformer(options, tensors, checkpoint)
    found = [spm] if spm else sorted(checkpoint.parent.glob("*.model"))
    if len(found) != 1:
        raise ValueError(
            f"There are {len(found)} SentencePiece models beside {checkpoint}: give the decoder's with --spm."
        )
    path, pieces = read_vocabulary(found[0])
    pieces = completed(pieces, network.config.vocab_size, path)
    network.config.language_ids = language_ids(pieces) or {language: None}
    if None in network.config.language_ids:
        raise ValueError(
            f"{path} has no language tags such as <lang:en>: give the language that the model writes with --language."
        )
    if language and language not in network.config.language_ids:
        raise ValueError(f"{path} has tags only for {', '.join(network.config.language_ids)}: leave out --language.")
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    network.save_pretrained(partial)
    shutil.copyfile(found[0], partial / "spm.model")
    ids = {piece: token for token, piece in enumerate(pieces)}
    (partial / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False, indent=0), encoding="utf-8")
    partial.rename(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--spm", type=Path, help="the decoder's SentencePiece model, if the folder has several")
    parser.add_argument("--language", help="the language the model writes, if its vocabulary has no language tags")
    arguments = parser.parse_args()
    try:
        convert(arguments.checkpoint, arguments.folder, arguments.spm, arguments.language)
    except (OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
