"""What Whisper checkpoints in other layouts than transformers' have in common: vocabulary, network and settings."""

import json
from collections.abc import Iterable
from pathlib import Path
from textwrap import shorten

import huggingface_hub
import torch
from torch import Tensor
from transformers import AddedToken, GenerationConfig, WhisperConfig, WhisperFeatureExtractor, WhisperTokenizer
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from xattn.models.errors import HUB_ERRORS, first_line
from xattn.models.weights import hash_weights
from xattn.models.whisper import WhisperModel, WhisperNetwork

# Repositories with OpenAI's vocabularies, by the number of tokens.
VOCABULARIES = {51864: "openai/whisper-tiny.en", 51865: "openai/whisper-tiny", 51866: "openai/whisper-large-v3"}
END, START, LAST = "<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"  # time stamps follow LAST
TASKS = ("<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", LAST)
STAMP_SECONDS = 0.02  # from one time stamp to the next, as from one encoder step to the next


def build(
    path: Path,
    dimensions: dict,
    tensors: dict[str, Tensor],
    tokenizer: WhisperTokenizer,
    files: Iterable[Path],
    device: str,
    **settings,
) -> WhisperModel:
    """Return the model of float32 tensors under transformers' names; the network takes them without a copy.

    Args:
        path: the file or folder that the model is named after.
        dimensions: arguments of WhisperConfig.
        files: files that the model's hash covers besides the tensors.
        settings: arguments of GenerationConfig, such as the tokens to suppress.

    Raises:
        ValueError: no network has these dimensions, or the tensors do not fit them.
    """
    ids = tokenizer.get_vocab()
    special = {"decoder_start_token_id": ids[START]}
    special |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), ids[END])
    try:
        with torch.device("meta"):  # allocates no memory
            network = WhisperNetwork(WhisperConfig(**dimensions, **special))
    except Exception as error:  # invalid dimensions raise anything
        raise ValueError(
            f"No network can be built from the dimensions in {path} ({shorten(first_line(error), 200)}): download the "
            "model again."
        ) from error
    if network.config.tie_word_embeddings:
        tensors["proj_out.weight"] = tensors.get("model.decoder.embed_tokens.weight")
    expected, found = ({name: [*t.shape] for name, t in each.items()} for each in (network.state_dict(), tensors))
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"{path} is not a complete Whisper model, because {name} is {found.get(name, 'missing')} and should be "
                f"{expected.get(name, 'missing')}: download it again."
            )
    network.load_state_dict(tensors, assign=True)
    network.tie_weights()
    network.generation_config = GenerationConfig(**special, **settings)
    config = network.config
    heads = torch.tensor([config.encoder_attention_heads, config.decoder_attention_heads])  # no shape shows them
    weights_hash = hash_weights(network.state_dict() | {"heads": heads}, files)
    seconds = round(STAMP_SECONDS * config.max_source_positions)
    extractor = WhisperFeatureExtractor(feature_size=config.num_mel_bins, chunk_length=seconds)
    return WhisperModel(network.to(device).eval().requires_grad_(False), extractor, tokenizer, str(path), weights_hash)


def load_tokenizer(path: Path, size: int, positions: int) -> tuple[WhisperTokenizer, list[Path]]:
    """Return the tokenizer for the weights in a file, and the files that it was read from.

    It is read from tokenizer.json, or vocab.json and merges.txt, in the same folder. Without them, it is OpenAI's with
    as many tokens, whose tokenizer.json and generation_config.json are downloaded from the hub.

    Args:
        path: the file with the weights.
        size: number of tokens.
        positions: number of encoder steps; there is one time stamp more.

    Raises:
        FileNotFoundError: there is no vocabulary.
        ValueError: the vocabulary is damaged or does not fit the weights.
    """
    folder = path.parent
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        folder = _download(path, size)
    if (folder / "tokenizer.json").is_file():
        files = [folder / "tokenizer.json"]
    else:
        files = [folder / "vocab.json", folder / "merges.txt"]
    try:
        tokenizer, ids = _tokenizer(files, size, positions)
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(
            f"{files[0]} does not describe a vocabulary ({type(error).__name__}: {shorten(first_line(error), 200)}): "
            "download it again."
        ) from error
    absent = [token for token in (END, START, LAST) if token not in ids]
    if absent:
        raise ValueError(f"{files[0]} lacks the token {absent[0]}: use the vocabulary of a Whisper model.")
    if sorted(ids.values()) != [*range(size)] or tokenizer.get_vocab() != ids:
        raise ValueError(
            f"{files[0]} does not have the tokens 0 to {size - 1} of {path}: use the tokenizer.json of the same model."
        )
    return tokenizer, files


def read_json(path: Path) -> dict:
    """Read a JSON object. FileNotFoundError: there is no such file. ValueError: it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no {path}: download the complete model.") from error
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged, because it is not a JSON object: download it again.")
    return content


def token_list(file: Path, key: str, size: int) -> list[int] | None:
    """Return a list of token ids in a JSON file, None if the file lacks it. ValueError: other values are in it."""
    found = read_json(file).get(key)
    if found is None or isinstance(found, list) and all(type(token) is int and 0 <= token < size for token in found):
        return found
    raise ValueError(f"{key} in {file} is not a list of token ids from 0 to {size - 1}: download it again.")


def _download(path: Path, size: int) -> Path:
    """Return a folder with the tokenizer.json of OpenAI's vocabulary of this size."""
    name, files = VOCABULARIES.get(size), ["tokenizer.json", "generation_config.json"]
    if not name:
        raise FileNotFoundError(
            f"There is no vocabulary beside {path}, and its {size} tokens are not those of OpenAI's models: put the "
            "model's tokenizer.json into the same folder."
        )
    try:
        folder = Path(huggingface_hub.snapshot_download(name, revision="main", allow_patterns=files))
        if not (folder / files[0]).is_file():
            raise FileNotFoundError(f"{folder} has no {files[0]}")
    except HUB_ERRORS as error:
        raise FileNotFoundError(
            f"There is no vocabulary beside {path}, and the Hugging Face hub does not provide that of {name} "
            f"({first_line(error)}): put the tokenizer.json of {name} into the same folder."
        ) from error
    return folder


def _tokenizer(files: list[Path], size: int, positions: int) -> tuple[WhisperTokenizer, dict[str, int]]:
    """Return the tokenizer of tokenizer.json, or vocab.json and merges.txt, and the ids that its tokens should have."""
    if files[0].name == "tokenizer.json":
        stored = read_json(files[0])
        vocabulary, merges = stored["model"]["vocab"], stored["model"]["merges"]
        added = [(token["id"], token["content"], token["special"]) for token in stored["added_tokens"]]
    else:
        vocabulary, lines = read_json(files[0]), files[1].read_text(encoding="utf-8").split("\n")
        merges = [line for line in lines if line and not line.startswith("#version")]
        first = vocabulary.get(END, len(vocabulary))
        languages = size - first - len((END, START, *TASKS)) - (positions + 1)
        # OpenAI's order; newer models have more languages, at the end of the list.
        tags = [f"<|{language}|>" for language in [*LANGUAGES][: max(languages, 0)]]
        added = [(first + i, token, True) for i, token in enumerate((END, START, *tags, *TASKS))]
    ids = vocabulary | {token: token_id for token_id, token, _ in added}
    stamps = range(positions + 1) if LAST in ids else ()
    for token_id, token in ((ids[LAST] + 1 + step, f"<|{STAMP_SECONDS * step:.2f}|>") for step in stamps):
        if token not in ids:
            ids[token] = token_id
            added.append((token_id, token, False))
    tokenizer = WhisperTokenizer(
        vocab=vocabulary, merges=[tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges]
    )
    tokens = [AddedToken(token, special=special, normalized=False) for _, token, special in sorted(added)]
    tokenizer.add_tokens(tokens)  # in the order of their ids
    tokenizer.add_special_tokens({"additional_special_tokens": [token for token in tokens if token.special]})
    return tokenizer, ids
