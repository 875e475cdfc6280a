"""What the kit needs from a speech-to-text model: one interface to all architectures."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Decoding:
    """How a hypothesis is searched for; None keeps the model's own default.

    beams: width of the beam search.
    max_length: tokens of the output, prompt and </s> included.
    no_repeat_ngram: length of n-grams that may occur only once; 0 allows all repetitions.

    The kit's and FBK's models default to the paper's settings (section 4: 5 beams, no repeated 5-gram), all others to
    what their checkpoint's generation_config.json says.
    """

    beams: int | None = None
    max_length: int | None = None
    no_repeat_ngram: int | None = None

    def __post_init__(self):
        for name, least in (("beams", 1), ("max_length", 2), ("no_repeat_ngram", 0)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < least):
                raise ValueError(f"{name} is {value!r}: give a whole number of at least {least}, or None.")


@dataclass(frozen=True)
class Attentions:
    """Attention weights of a decoder; letters as in S2TModel.

    cross: for each layer, over encoder steps, (1, H, I, S); own: for each layer, over decoder positions, (1, H, I, I).
    log_p: (I, V), log-probabilities of the next token, computed from these weights, so that gradients can be taken.
    """

    cross: tuple[Tensor, ...]
    own: tuple[Tensor, ...]
    log_p: Tensor


class S2TModel(Protocol):
    """An encoder-decoder speech-to-text model.

    Letters in shapes: B batch, T input frames, F mel bands, S encoder steps (T' in the paper), D model width, L decoder
    layers, H heads, I decoder positions, V vocabulary. Features and states are unpadded, except Whisper's states: their
    first `len(step_frames(T))` rows cover the recording. A direction is "en" (transcribe English) or "en-it" (translate
    English into Italian). `encode`, `decode`, `masked_decoder` and `attentions` allow gradients of their inputs.
    """

    name: str
    source: str  # the folder or hub id it was loaded from
    weights_hash: str
    languages: tuple[str, ...]  # languages it writes, the default first; empty if its files do not say
    detects_language: bool  # whether `detect_language` works
    decoding: Decoding  # its defaults
    batch_size: int  # perturbed passes that it computes at once without losing speed
    decoder_factor: int  # how many times as many passes of the decoder alone, for SM^H
    padding_safe: bool  # whether outputs stay the same when the input is padded
    frame_seconds: float  # hop from one frame to the next
    first_frame: float  # seconds at which the first frame's window is centred
    band_centres: np.ndarray  # (F,), Hz

    @property
    def device(self):
        """The torch device that holds the weights."""

    def features(self, audio: np.ndarray) -> Tensor:
        """Return the model's input (T, F) for 16 kHz mono audio (samples,)."""

    def detect_language(self, features: Tensor) -> str:
        """Return the language spoken in features (T, F)."""

    def prompt(self, direction: str) -> Tensor:
        """Return the decoder's first tokens for a direction, shape (P,)."""

    def token_ids(self, text: str) -> Tensor:
        """Return the ids (I,) that the model would write for `text`, ending with </s>."""

    def step_frames(self, frames: int) -> np.ndarray:
        """Return the first frame and the frame after the last one of each encoder step, int (S, 2).

        The first step can start before frame 0 and the last one end after frame `frames`.
        """

    def mask_input(self, features: Tensor, keep: Tensor) -> Tensor:
        """Return features (T, F) with the cells hidden where keep (B, T, F) is 0, ready for `encode` and `generate`."""

    def perturbing(self, precision: str) -> "AbstractContextManager[S2TModel]":
        """Return a context whose target is this model with passes in a precision: "float32" or "bfloat16"."""

    def encode(self, features: Tensor) -> Tensor:
        """Return encoder states (B, S, D) for features (B, T, F)."""

    def decode(self, states: Tensor, decoder_input_ids: Tensor) -> Tensor:
        """Return teacher-forced log-probabilities (B, I, V) for states (B, S, D) and one row of decoder inputs (I,)."""

    def masked_decoder(self, states: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Return a fast equivalent of `decode` on masked states (1, S, D) of one utterance.

        It takes keep (B, S or fewer), 0 where a step is hidden and 1 elsewhere, and decoder inputs (I,), and equals
        `decode(states * keep[..., None], inputs)`.
        """

    def attentions(self, states: Tensor, decoder_input_ids: Tensor) -> Attentions:
        """Return the attention weights of one utterance's forced decoding, states (1, S, D), and its outputs."""

    def decode_without(self, states: Tensor, decoder_input_ids: Tensor, keep: Tensor) -> Tensor:
        """Return `decode` with the embeddings of decoder inputs set to 0 where keep (B, I) is 0, states (B, S, D)."""

    def value_norms(self, states: Tensor) -> Tensor:
        """Return the norms (L, H, S) of what a weight of 1 on each step would add to the decoder's state.

        These are values of the cross-attention after its output projection (Kobayashi et al. 2020), for
        states (1, S, D).
        """

    def generate(
        self,
        features: Tensor,
        direction: str,
        attention_mask: Tensor | None = None,
        decoding: Decoding | None = None,
    ) -> list[Tensor]:
        """Decode a batch (B, T, F); return for each utterance the tokens after the prompt, up to </s>, shape (I,)."""

    def pass_bytes(self, frames: int, tokens: int) -> int:
        """Return roughly how many bytes one perturbed pass over so many frames takes, without the weights."""

    def tokens(self, ids: Tensor) -> list[str]:
        """Return the subword strings of token ids (I,)."""

    def text(self, ids: Tensor) -> str:
        """Return the text that token ids (I,) spell."""
