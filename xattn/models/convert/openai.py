"""Reads checkpoints of OpenAI's whisper package (.pt) without executing anything pickled in them."""

from pathlib import Path

import torch
from transformers import WhisperTokenizer

from xattn.models.convert.whisper import END, START, TASKS, build, load_tokenizer, token_list
from xattn.models.whisper import WhisperModel

# Dimensions with the names that transformers gives them; both sides have the same width.
DIMENSIONS = {
    "n_vocab": "vocab_size",
    "n_mels": "num_mel_bins",
    "n_audio_ctx": "max_source_positions",
    "n_audio_state": "d_model",
    "n_audio_head": "encoder_attention_heads",
    "n_audio_layer": "encoder_layers",
    "n_text_ctx": "max_target_positions",
    "n_text_head": "decoder_attention_heads",
    "n_text_layer": "decoder_layers",
}
# Parts of a tensor's name with their names in transformers.
PARTS = {
    "blocks": "layers",
    "attn": "self_attn",
    "attn_ln": "self_attn_layer_norm",
    "cross_attn": "encoder_attn",
    "cross_attn_ln": "encoder_attn_layer_norm",
    "query": "q_proj",
    "key": "k_proj",
    "value": "v_proj",
    "out": "out_proj",
    "mlp_ln": "final_layer_norm",
    "ln": "layer_norm",
    "ln_post": "layer_norm",
    "token_embedding": "embed_tokens",
    "positional_embedding": "embed_positions.weight",
}

# Marks of speakers, sounds and music. Each is suppressed, alone and after a space, if it is one token; notes are
# suppressed by their first token in any case.
MARKS = (
    *'"#()*+/:;<=>@[\\]^_`{|}~「」『』',
    *("<<", ">>", "<<<", ">>>", "--", "---", "-(", "-[", "('", '("', "((", "))", "(((", ")))", "[[", "]]", "{{", "}}"),
    *("♪♪", "♪♪♪"),
)
NOTES = "♩♪♫♬♭♮♯"
DASHES = (" -", " '")  # before a word; inside of one, both are allowed


def load(path: Path, device: str = "cpu") -> WhisperModel:
    """Load a .pt file in float32 and evaluation mode.

    The vocabulary is the one in the same folder, or OpenAI's. Tokens are suppressed as generation_config.json beside
    the vocabulary says; without it, as OpenAI's package does.

    FileNotFoundError: there is no vocabulary. ValueError: the file is incomplete or does not fit the vocabulary.
    """
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    dims, stored = checkpoint["dims"], checkpoint["model_state_dict"]
    try:
        sizes = [dims[name] for name in (*DIMENSIONS, "n_text_state")]
        whole = all(type(size) is int and size > 0 for size in sizes)
        complete = whole and sizes[-1] == dims["n_audio_state"] and all(map(torch.is_tensor, stored.values()))
    except (AttributeError, KeyError, TypeError):
        complete = False
    if not complete:
        raise ValueError(f"The contents of {path} are not those of a Whisper model: download it again.")
    dimensions = {ours: dims[name] for name, ours in DIMENSIONS.items()}
    dimensions |= dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 4 * dims["n_audio_state"])
    size = dimensions["vocab_size"]
    tokenizer, files = load_tokenizer(path, size, dimensions["max_source_positions"])
    settings = {"suppress_tokens": non_speech_tokens(tokenizer), "begin_suppress_tokens": blank_tokens(tokenizer)}
    generation = files[0].with_name("generation_config.json")
    if generation.is_file():
        stated = {name: token_list(generation, name, size) for name in settings}
        settings |= {name: tokens for name, tokens in stated.items() if tokens is not None}
        files = [*files, generation]
    tensors = {transformers_name(name): tensor.to(torch.float32, copy=True) for name, tensor in stored.items()}
    model = build(path, dimensions, tensors, tokenizer, files, device, **settings)
    model.name = path.stem
    return model


def transformers_name(name: str) -> str:
    """Return the name in transformers of a tensor in OpenAI's package."""
    parts = name.replace("mlp.0", "fc1").replace("mlp.2", "fc2").split(".")
    return ".".join(["model", *(PARTS.get(part, part) for part in parts)])


def non_speech_tokens(tokenizer: WhisperTokenizer) -> list[int]:
    """Return the tokens that OpenAI's package never writes: MARKS, NOTES, DASHES, the start token and the tasks.

    Source: `non_speech_tokens` in whisper/tokenizer.py and `_get_suppress_tokens` in whisper/decoding.py.
    """
    vocabulary = tokenizer.get_vocab()

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    marks = [ids(text) for mark in MARKS for text in (mark, f" {mark}")]
    first = [ids(text)[0] for text in (*DASHES, *NOTES, *(f" {note}" for note in NOTES))]
    # Older vocabularies call <|nospeech|> <|nocaptions|>; <|notimestamps|> is part of the prompt.
    special = [vocabulary[token] for token in (START, *TASKS[:-1], "<|nocaptions|>") if token in vocabulary]
    return sorted({*(mark[0] for mark in marks if len(mark) == 1), *first, *special})


def blank_tokens(tokenizer: WhisperTokenizer) -> list[int]:
    """Return the tokens with which OpenAI's package never starts an output: a lone space and the end."""
    return [*tokenizer(" ", add_special_tokens=False).input_ids, tokenizer.get_vocab()[END]]
