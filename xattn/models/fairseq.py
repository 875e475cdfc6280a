"""Original checkpoints of FBK-fairseq (.pt), read without running anything that is pickled in them.

`python -m xattn.models.fairseq checkpoint.pt my_model` writes a folder for `xattn.load_model`. The SentencePiece model
and its dictionary lie beside the checkpoint.
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

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")  # the first ids of every dictionary, which its file leaves out
ADDED = re.compile(
    r"<.+>|madeupword\d+"
)  # what a dictionary may have besides pieces: tags, and padding to a round size

# fairseq's options that have another name in transformers.
OPTIONS = {
    "encoder_embed_dim": "d_model",
    "decoder_ffn_embed_dim": "decoder_ffn_dim",
    "share_decoder_input_output_embed": "tie_word_embeddings",
    "activation_fn": "activation_function",
}


class Stored:
    """The attributes of a pickled object, whatever its class; it does nothing."""

    def __setstate__(self, state: dict):
        self.__dict__.update(state)


class Unread:
    """Stands for an object that no model needs, such as a number of NumPy; what it is made of is dropped."""

    def __init__(self, *_):
        pass

    def __setstate__(self, _):
        pass


# All that a checkpoint may name besides tensors and what stands in for it; the classes themselves are never touched.
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
    # Validation scores and the like, as NumPy numbers and arrays.
    **{f"numpy.{core}.multiarray.{name}": Unread for core in ("core", "_core") for name in ("scalar", "_reconstruct")},
    **dict.fromkeys(("numpy.ndarray", "numpy.dtype"), Unread),
    **{f"builtins.{name}": Unread for name in ("bool", "bytes", "float", "frozenset", "int", "range", "slice", "str")},
}


def contents(value):
    """What a stored namespace, configuration or node of one holds: a dictionary, a list or a plain value."""
    if not isinstance(value, Stored):
        return value
    held = vars(value)
    key = next((key for key in ("_content", "_val") if key in held), None)  # of OmegaConf's containers and nodes
    return contents(held[key]) if key else held


def read_checkpoint(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """The model's options, under transformers' names of them, and its tensors.

    ValueError: the file names a class or function that is not in ALLOWED, is damaged, or is of no model.
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
                    f"{path} was not read, because it asks for {refused[1]}, which is not known to be harmless: "
                    "get one from a source that you trust, or save it there with its args or cfg and model alone."
                ) from error
            if "Unsupported operand" in str(error):
                raise ValueError(
                    f"{path} was not read, because its pickle protocol is not 2: save it again with torch.save, whose "
                    "default that is."
                ) from error
            raise ValueError(f"{path} is damaged or no checkpoint ({type(error).__name__}): fetch it again.") from error
    try:
        namespace = state.get("args") or contents(contents(state["cfg"])["model"])
        options = {OPTIONS.get(name, name): contents(value) for name, value in contents(namespace).items()}
        options["conv_kernel_sizes"] = [int(size) for size in options["conv_kernel_sizes"].split(",")]
        tensors = {name: tensor for name, tensor in state["model"].items() if isinstance(tensor, Tensor)}
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{path} is not of a Conformer of FBK-fairseq ({type(error).__name__}: {error}): give one of those."
        ) from error
    return options, tensors


def read_vocabulary(spm: Path) -> tuple[Path, list[str]]:
    """The dictionary beside a SentencePiece model, of the same name or dict.txt, and its pieces in the order of ids.

    ValueError: a line is not "piece count", or a piece is not of the model.
    """
    candidates = (spm.with_suffix(".txt"), spm.with_name("dict.txt"))
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None or not spm.is_file():
        raise FileNotFoundError(
            f"{spm} or its dictionary, {' or '.join(each.name for each in candidates)}, is not there: put them beside "
            "each other."
        )
    lines = [line.rstrip().rpartition(" ") for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
    pieces = [*SPECIAL, *(piece for piece, _, _ in lines)]
    processor = read_pieces(spm)
    known = {processor.id_to_piece(token) for token in range(len(processor))}
    for piece, _, count in lines:
        if not (piece and count.isdecimal()):
            raise ValueError(f"{path} has a line {f'{piece} {count}'.strip()!r} that is not a piece and a count.")
        if piece not in known and not ADDED.fullmatch(piece):
            raise ValueError(
                f"{path} has the piece {piece!r}, which {spm.name} has not: give those that belong together."
            )
    if len(set(pieces)) < len(pieces):
        raise ValueError(f"{path} has a piece twice: fetch it again.")
    return path, pieces


def convert(checkpoint: Path, folder: Path, spm: Path | None = None, language: str | None = None) -> None:
    """Write a checkpoint as a new folder with config.json, model.safetensors, spm.model and vocab.json.

    Args:
        spm: the SentencePiece model of the decoder's language, its dictionary beside it; by default the one that lies
            beside the checkpoint.
        language: that the model writes, where its vocabulary has no tags of languages.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: with what is wrong, in one sentence; nothing is written then.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} is there already: give a new folder.")
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
        raise ValueError(f"{path} has no language tags such as <lang:en>: say with --language what the model writes.")
    if language and language not in network.config.language_ids:
        raise ValueError(f"{path} has tags of {', '.join(network.config.language_ids)} only: leave --language out.")
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
    parser.add_argument("--spm", type=Path, help="the decoder's SentencePiece model, where several lie there")
    parser.add_argument("--language", help="what the model writes, where its vocabulary has no tags of languages")
    arguments = parser.parse_args()
    try:
        convert(arguments.checkpoint, arguments.folder, arguments.spm, arguments.language)
    except (OSError, ValueError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
