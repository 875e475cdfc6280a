"""What all architectures share: forced decoding, cross-attention and beam search through transformers.

Letters in shapes: B batch, T input frames, F mel bands, S encoder steps, D model width, H heads, I decoder positions,
V vocabulary, L decoder layers.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict
from itertools import chain
from os.path import abspath
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from xattn.models.interface import Attentions, Decoding

CROSS_ATTENTION = ("encoder_attn", "cross_attention")  # names of the modules in transformers' decoders


class SharedMemoryCache(EncoderDecoderCache):
    """A beam search's cache that reorders only the decoder's own keys and values.

    All beams of an utterance share its encoder states; reordering those too would take a sixth of the time for nothing.
    """

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.self_attention_cache.reorder_cache(beam_idx)


class Seq2SeqModel:
    """A transformers encoder-decoder with the interface of `S2TModel`.

    Subclasses add features, prompt, token_ids, encode, tokens, text and the attributes of the interface, and set
    `subsampling` (frames per encoder step) and, if the first step starts before the first frame, `lead` (frames).
    """

    lead = 0
    attention_arrays = 4  # of float32 (H, S, S) that an encoder layer holds at once, measured; 0 if it holds none
    decoder_factor = 1
    detects_language = False
    padding_safe = True

    def __init__(self, network: PreTrainedModel, source: str, weights_hash: str):
        self.network, self.source, self.weights_hash = network, source, weights_hash
        self.name, self.config = Path(abspath(source)).name, network.config  # a symbolic link keeps its own name

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def batch_size(self) -> int:
        """Perturbed passes at once: enough to keep the device busy."""
        return 128 if self.device.type == "cuda" else 32

    @property
    def decoding(self) -> Decoding:
        """The paper's settings (section 4): 5 beams, no repeated 5-gram."""
        return Decoding(5, self.config.max_target_positions, 5)

    @property
    def output_limit(self) -> int:
        """Tokens of an output, prompt and </s> included, that the decoder has positions for."""
        return self.config.max_target_positions

    def target(self, direction: str) -> str:
        """Return the language that is written in a direction. ValueError: the model does not write it."""
        target = direction.rpartition("-")[2]
        if self.languages and target not in self.languages:
            raise ValueError(
                f"The model {self.name} does not write {target!r}; choose one of {', '.join(self.languages)}."
            )
        return target

    def pass_bytes(self, frames: int, tokens: int) -> int:
        """See S2TModel. The factors are rounded up from the peaks of passes over 10 to 120 s, with 30 tokens."""
        config, steps = self.config, self.encoded_steps(frames)
        attention = self.attention_arrays * config.num_attention_heads * steps**2
        return 4 * (attention + 16 * steps * config.hidden_size + 4 * tokens * config.vocab_size)

    def encoded_steps(self, frames: int) -> int:
        """Return how many steps the encoder computes, padding included."""
        return self.steps(frames)

    def steps(self, frames: int) -> int:
        """Return how many encoder steps cover a recording of `frames` frames."""
        return -(-frames // self.subsampling)

    def step_frames(self, frames: int) -> np.ndarray:
        """Return the first frame and the frame after the last one of each encoder step, int (S, 2)."""
        first = self.subsampling * np.arange(self.steps(frames)) - self.lead
        return np.stack([first, first + self.subsampling], axis=1)

    def mask_input(self, features: Tensor, keep: Tensor) -> Tensor:
        """Set features (T, F) to 0 where keep (B, T, F) is 0: (B, T, F)."""
        return features * keep

    def network_inputs(self, features: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Turn features (B, T, F) and their mask (B, T) into arguments of the network."""
        return {"input_features": features, "attention_mask": attention_mask}

    @contextmanager
    def perturbing(self, precision: str) -> Iterator["Seq2SeqModel"]:
        """See S2TModel."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            yield self

    def decode(self, states: Tensor, decoder_input_ids: Tensor) -> Tensor:
        """Return teacher-forced log-probabilities (B, I, V): row i is the distribution that follows decoder input i.

        states: (B, S, D); decoder_input_ids: (I,), the same for every row of the batch.
        """
        return _forced(self.network, states, decoder_input_ids).logits.float().log_softmax(dim=-1)

    def masked_decoder(self, states: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Return a function of keep (B, S) and decoder inputs (I,) equal to `decode(states * keep[..., None], inputs)`.

        Keys and values are projected once, because a hidden step has the projections of zero whatever its neighbours
        are. Steps past the end of a shorter keep stay visible.
        """
        any_token = torch.zeros(1, dtype=torch.long, device=self.device)  # keys and values do not depend on the tokens
        visible, hidden = (
            _forced(self.network, some, any_token, use_cache=True).past_key_values.cross_attention_cache.layers
            for some in (states, torch.zeros_like(states[:, :1]))
        )

        def decode(keep: Tensor, decoder_input_ids: Tensor) -> Tensor:
            kept = functional.pad(keep, (0, states.shape[1] - keep.shape[1]), value=1.0)[:, None, :, None].bool()
            memory = DynamicCache(
                (torch.where(kept, a.keys, b.keys), torch.where(kept, a.values, b.values))
                for a, b in zip(visible, hidden, strict=True)
            )
            output = _forced(
                self.network,
                states.expand(len(keep), -1, -1),
                decoder_input_ids,
                use_cache=True,
                past_key_values=EncoderDecoderCache(DynamicCache(), memory),
            )
            return output.logits.float().log_softmax(dim=-1)

        return decode

    def attentions(self, states: Tensor, decoder_input_ids: Tensor) -> Attentions:
        """Return the attention weights of one utterance's forced decoding, states (1, S, D), and its outputs."""
        network = _sharing_tensors(self.network)
        network.set_attn_implementation("eager")  # no other attention returns weights
        output = _forced(network, states, decoder_input_ids, output_attentions=True)
        log_p = output.logits[0].float().log_softmax(dim=-1)
        return Attentions(output.cross_attentions, output.decoder_attentions, log_p)

    def decode_without(self, states: Tensor, decoder_input_ids: Tensor, keep: Tensor) -> Tensor:
        """See S2TModel."""
        network = _sharing_tensors(self.network)
        embeddings = network.get_decoder().get_input_embeddings()
        embeddings.register_forward_hook(lambda module, inputs, embedded: embedded * keep[..., None])
        return _forced(network, states, decoder_input_ids).logits.float().log_softmax(dim=-1)

    def value_norms(self, states: Tensor) -> Tensor:
        """See S2TModel."""
        found = []
        for name, module in self.network.get_decoder().named_modules():
            if name.rpartition(".")[2] in CROSS_ATTENTION:
                heads, size = module.num_heads, module.head_dim
                values = module.v_proj(states.to(self.network.dtype))[0].unflatten(-1, (heads, size))  # (S, H, D / H)
                outputs = module.out_proj.weight.unflatten(-1, (heads, size))  # (D, H, D / H)
                found.append(torch.stack([(values[:, h] @ outputs[:, h].T).norm(dim=-1) for h in range(heads)]))
        return torch.stack(found)

    @torch.inference_mode()
    def generate(
        self,
        features: Tensor,
        direction: str,
        attention_mask: Tensor | None = None,
        decoding: Decoding | None = None,
    ) -> list[Tensor]:
        """Decode a batch of features (B, T, F) by beam search.

        Args:
            attention_mask: (B, T), 1 on frames of the utterance and 0 on padding; needed if utterances are padded.
            decoding: what differs from the model's own `decoding`.

        Returns:
            For each utterance the tokens after the prompt, up to </s>, shape (I,).

        Raises:
            ValueError: padding was given to a model that is not `padding_safe`, or max_length is out of its range.
        """
        if attention_mask is None:
            attention_mask = torch.ones(features.shape[:2], dtype=torch.long, device=features.device)
        if not (self.padding_safe or attention_mask.all()):
            raise ValueError(
                f"The outputs of {self.name} depend on how much its input is padded: give it one utterance at a time, "
                "or several of equal length."
            )
        given = {name: value for name, value in asdict(decoding or Decoding()).items() if value is not None}
        settings = asdict(self.decoding) | given
        prompt, end = self.prompt(direction), self.config.eos_token_id
        if not len(prompt) < settings["max_length"] <= self.output_limit:
            raise ValueError(
                f"max_length is {settings['max_length']}: give a number from {len(prompt) + 1} to {self.output_limit} "
                f"for {self.name}."
            )
        sequences = self.network.generate(
            **self.network_inputs(features, attention_mask),
            decoder_input_ids=prompt.expand(len(features), -1),
            decoder_start_token_id=int(prompt[0]),  # transformers would put its default, </s>, before the prompt
            forced_eos_token_id=end,
            num_beams=settings["beams"],
            no_repeat_ngram_size=settings["no_repeat_ngram"],
            max_length=settings["max_length"],
            do_sample=False,
            past_key_values=SharedMemoryCache(DynamicCache(), DynamicCache()),
        )
        sequences = [row[len(prompt) :] for row in sequences]
        return [row[: int((row == end).nonzero()[0]) + 1] if (row == end).any() else row for row in sequences]


def _sharing_tensors(network: PreTrainedModel) -> PreTrainedModel:
    """A copy that shares all tensors, so that it can be changed without changing the network of other threads."""
    return deepcopy(network, {id(tensor): tensor for tensor in chain(network.parameters(), network.buffers())})


def _forced(
    network: PreTrainedModel, states: Tensor, decoder_input_ids: Tensor, use_cache: bool = False, **keywords
) -> Seq2SeqLMOutput:
    return network(
        encoder_outputs=BaseModelOutput(last_hidden_state=states.to(network.dtype)),
        decoder_input_ids=decoder_input_ids.expand(len(states), -1),
        use_cache=use_cache,
        **keywords,
    )
