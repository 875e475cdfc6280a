"""Whisper (Radford et al., arXiv 2212.04356), which always processes 30 s, whatever the length of the recording.

Every input is padded to 30 s and the decoder attends to all 1,500 encoder steps, as in training. Maps, masks and
correlations cover only the frames and steps of the recording.

Letters in shapes: B batch, T input frames, F mel bands, I tokens, P tokens of the prompt.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy, deepcopy

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationMixin, WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizer
from transformers.audio_utils import hertz_to_mel, mel_to_hertz
from transformers.convert_slow_tokenizer import bytes_to_unicode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from xattn.models.errors import NothingToExplain
from xattn.models.interface import Decoding
from xattn.models.pretrained import PretrainedModel

# The input is (log10 of the energy + 4) / 4. Cells more than 80 dB below the loudest one are raised to that level;
# digital silence has energy 1e-10.
RANGE, SILENCE = 8 / 4, (-10 + 4) / 4
MULTILINGUAL = 51865  # tokens that a multilingual model has at least; English-only models have one less, tags included
SEARCHED_AT_ONCE = 4  # utterances: keys and values of 1,500 steps for five beams each take 0.6 GB in whisper-small


def attention_by_head(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float, **_
) -> tuple[Tensor, None]:
    """Compute attention between all steps, query, key and value (B, H, S, D), one head at a time: (B, S, H, D).

    The weights of one head fit a processor's cache. In bfloat16 on a CPU, this takes 60 % of the time of torch's fused
    attention (benchmarks/README.md).
    """
    attended = torch.empty_like(query)
    for row, own in enumerate(zip(query * scaling, key, value, strict=True)):
        for head, (q, k, v) in enumerate(zip(*own, strict=True)):
            attended[row, head] = (q @ k.T).softmax(dim=-1) @ v
    return attended.transpose(1, 2).contiguous(), None


BY_HEAD = "by_head"
ALL_ATTENTION_FUNCTIONS.register(BY_HEAD, attention_by_head)


class WhisperNetwork(WhisperForConditionalGeneration):
    """With the search of all models here; Whisper's own splits recordings and can fall back on sampling."""

    generate = GenerationMixin.generate


class WhisperModel(PretrainedModel):
    """A Whisper checkpoint with the interface of `S2TModel`."""

    NETWORK, EXTRACTOR, TOKENIZER = WhisperNetwork, WhisperFeatureExtractor, WhisperTokenizer
    first_frame = 0.0  # windows are centred on multiples of 10 ms
    subsampling = 2
    attention_arrays = 0  # fused attention

    def __init__(self, *parts):
        super().__init__(*parts)
        generation, vocabulary = self.network.generation_config, self.tokenizer.get_vocab()
        last = vocabulary.get("<|notimestamps|>", len(vocabulary))  # the last one before the time stamps
        if last >= len(vocabulary) or vocabulary.get("<|startoftranscript|>") != self.config.decoder_start_token_id:
            raise ValueError(
                f"The tokenizer of {self.source} is incomplete or not the model's: download the complete model."
            )
        stated = getattr(generation, "is_multilingual", None)
        self.multilingual = self.detects_language = self.config.vocab_size >= MULTILINGUAL if stated is None else stated
        known = tuple(language for language in LANGUAGES if f"<|{language}|>" in vocabulary)  # English first
        self.languages = known if self.multilingual else known[:1]
        timestamps = range(last + 1, self.config.vocab_size)
        generation.suppress_tokens = sorted({*(generation.suppress_tokens or ()), *timestamps})

    @property
    def batch_size(self) -> int:
        """See Seq2SeqModel; on a CPU, the activations of more passes over 30 s do not fit its cache."""
        return super().batch_size if self.device.type == "cuda" else 2

    @property
    def decoder_factor(self) -> int:
        """See S2TModel."""
        return 1 if self.device.type == "cuda" else 4

    @property
    def band_centres(self) -> np.ndarray:
        """Centre of each band in Hz, (F,): equidistant on Slaney's Mel scale from 0 to 8,000 Hz."""
        bands = self.config.num_mel_bins
        edges = np.linspace(*(hertz_to_mel(edge, mel_scale="slaney") for edge in (0.0, 8000.0)), bands + 2)
        return mel_to_hertz(edges[1:-1], mel_scale="slaney")

    def features(self, audio: np.ndarray) -> Tensor:
        """Return the frames of the model's input whose windows overlap 16 kHz mono audio (samples,), shape (T, F).

        The other frames of the 30 s are silent and all have one level. NothingToExplain: the audio is longer than 30 s.
        """
        extractor = self.extractor
        if len(audio) > extractor.n_samples:
            raise NothingToExplain(
                f"The recording lasts {len(audio) / extractor.sampling_rate:.1f} s, but {self.name} takes at most "
                f"{extractor.chunk_length} s: cut it with xattn.cut_at_pauses."
            )
        frames = math.ceil((len(audio) + extractor.n_fft // 2) / extractor.hop_length)
        whole = self.extract(audio)["input_features"][0].T  # (3000, F)
        return torch.from_numpy(whole[:frames].copy()).to(self.device)

    def encoded_steps(self, frames: int) -> int:
        """See Seq2SeqModel: 30 s, whatever the length."""
        return self.config.max_source_positions

    def padded(self, features: Tensor) -> Tensor:
        """Extend features (T, F) with silence to the model's complete input (3000, F)."""
        level = max(float(features.detach().max()) - RANGE, SILENCE)
        whole = features.new_full((self.extractor.nb_max_frames, features.shape[1]), level)
        whole[: len(features)] = features
        return whole

    def mask_input(self, features: Tensor, keep: Tensor) -> Tensor:
        """Return the complete input (B, 3000, F), its first frames (T, F) set to 0 where keep (B, T, F) is 0.

        The paper sets cells of features with mean 0 and variance 1 to 0. Whisper's features are scaled so that 0 is
        about the mean of its training data (Radford et al., section 2.2). So 0 again removes what is special about a
        cell, whereas silence, the lowest value, would stand out in speech.
        """
        whole = self.padded(features).repeat(len(keep), 1, 1)
        whole[:, : len(features)] *= keep
        return whole

    def network_inputs(self, features: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """See Seq2SeqModel; takes features of the recording or the complete input."""
        frames = attention_mask.sum(dim=1).tolist()
        whole = [self.padded(row[:own]) for row, own in zip(features, frames, strict=True)]
        inputs = torch.stack(whole).transpose(1, 2)  # (B, F, 3000)
        everything = torch.ones_like(inputs[:, 0], dtype=torch.long)
        return {"input_features": inputs.to(self.network.dtype), "attention_mask": everything}

    def prompt(self, direction: str) -> Tensor:
        """Return the decoder's first tokens (P,): start, spoken language, task, no time stamps.

        ValueError: the model does not support the language, or the target is neither that language nor English.
        """
        spoken, target = direction.partition("-")[0], self.target(direction)
        if spoken not in self.languages:
            raise ValueError(
                f"The model {self.name} does not support {spoken!r}; choose one of {', '.join(self.languages)}."
            )
        if target not in (spoken, "en"):
            raise ValueError(f"{self.name} translates only into English, not into {target!r}: leave out translate_to.")
        task = [f"<|{spoken}|>", "<|transcribe|>" if target == spoken else "<|translate|>"] if self.multilingual else []
        tokens = ["<|startoftranscript|>", *task, "<|notimestamps|>"]
        return torch.tensor(self.tokenizer.convert_tokens_to_ids(tokens), device=self.device)

    @contextmanager
    def perturbing(self, precision: str) -> Iterator["WhisperModel"]:
        """See S2TModel. Weights in bfloat16 are faster than autocast, which converts float32 ones in every pass."""
        passes = copy(self)
        if precision == "bfloat16":
            passes.network = deepcopy(self.network).to(torch.bfloat16)
            if self.device.type == "cpu":
                config = deepcopy(self.config)
                config._attn_implementation = BY_HEAD
                for layer in passes.network.get_encoder().layers:
                    layer.self_attn.config = config
        yield passes

    @torch.inference_mode()
    def detect_language(self, features: Tensor) -> str:
        """Return the most probable language of features (T, F): the token that follows the start token."""
        tokens = self.tokenizer.convert_tokens_to_ids([f"<|{language}|>" for language in self.languages])
        start = torch.tensor([self.config.decoder_start_token_id], device=self.device)
        log_p = self.decode(self.encode(features[None]), start)[0, 0]  # (V,)
        return self.languages[int(log_p[tokens].argmax())]

    def generate(
        self,
        features: Tensor,
        direction: str,
        attention_mask: Tensor | None = None,
        decoding: Decoding | None = None,
    ) -> list[Tensor]:
        """See Seq2SeqModel; without time stamps and with the checkpoint's own lists of suppressed tokens."""
        if attention_mask is None:
            attention_mask = torch.ones(features.shape[:2], dtype=torch.long, device=features.device)
        search = super().generate
        parts = zip(features.split(SEARCHED_AT_ONCE), attention_mask.split(SEARCHED_AT_ONCE), strict=True)
        return [ids for part, mask in parts for ids in search(part, direction, mask, decoding)]

    def token_ids(self, text: str) -> Tensor:
        """Return the ids (I,) that the model would write for `text`, ending with <|endoftext|>."""
        return super().token_ids(f" {text.strip()}")  # Whisper starts every output with a space

    def tokens(self, ids: Tensor) -> list[str]:
        """Return the subword strings of token ids (I,); ▁ stands for a space before a word.

        A token can hold a part of a character, whose bytes are written as in SentencePiece: <0xF0>. Ids that the
        tokenizer lacks become <id>.
        """
        added, pieces = self.tokenizer.added_tokens_decoder, self.tokenizer.convert_ids_to_tokens(ids.tolist())
        byte_of = {character: byte for byte, character in bytes_to_unicode().items()}

        def subword(token: int, piece: str | None) -> str:
            if token in added or piece is None or not byte_of.keys() >= set(piece):
                return piece or f"<{token}>"
            text = bytes(byte_of[character] for character in piece).decode(errors="surrogateescape")
            return re.sub("[\udc80-\udcff]", lambda byte: f"<0x{ord(byte[0]) - 0xDC00:02X}>", text)

        return [subword(*pair).replace(" ", "▁") for pair in zip(ids.tolist(), pieces, strict=True)]
