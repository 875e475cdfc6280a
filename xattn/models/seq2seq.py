"""What the models of all architectures share: forced decoding, cross-attention and beam search through transformers.

Letters in shapes: B batch, T input frames, F mel bands, S encoder steps, D model width, H heads, I decoder positions,
V vocabulary, L decoder layers.
"""

from collections.abc import Callable
from pathlib import Path
from textwrap import shorten

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.utils import logging


class SharedMemoryCache(EncoderDecoderCache):
    """Keys and values of a beam search, which reorders those of the output alone.

    An utterance's beams share its encoder states: reordering those too would cost a sixth of the time for nothing.
    """

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.self_attention_cache.reorder_cache(beam_idx)


def load_network(kind: type[PreTrainedModel], folder: Path) -> PreTrainedModel:
    """Weights in a folder's safetensors files as a network in float32 and evaluation mode.

    FileNotFoundError: there are none. ValueError: they are damaged or incomplete, or config.json is not theirs.
    """
    if not any(folder.glob("model*.safetensors")):
        raise FileNotFoundError(
            f"The model folder {folder} has no model.safetensors: fetch a revision that has it, as weights in pickle "
            "files are not read."
        )
    logging.disable_progress_bar()  # it outlives the call as a stuck widget in executed notebooks
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # what does not fit is in the sentences below, and not in a printed table
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
        raise ValueError(f"A safetensors file of {folder} is damaged ({error}): fetch or train it again.") from error
    except Exception as error:  # whatever is made of values that no configuration has
        raise ValueError(
            f"No network can be made of {folder / 'config.json'} ({type(error).__name__}: {shorten(str(error), 200)}): "
            "fetch or train the model again."
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    other = [f"{name} is {[*stored]} and not {[*ours]}" for name, stored, ours in sorted(report["mismatched_keys"])]
    if other:
        raise ValueError(
            f"The safetensors files of {folder} do not fit its config.json ({_first(other, '; ')}): fetch or train the "
            "model again."
        )
    absent = sorted(report["missing_keys"])
    if absent:
        raise ValueError(f"The safetensors files of {folder} lack {_first(absent, ', ')}: fetch or train them again.")
    unused = sorted(report["unexpected_keys"])
    if unused:  # which released checkpoints may have from older versions of their architectures
        print(f"The network of {folder / 'config.json'} has no place for {_first(unused, ', ')}: these are not used.")
    return network.eval()


def _first(items: list[str], separator: str) -> str:
    more = f" and {len(items) - 3} more" if items[3:] else ""
    return separator.join(items[:3]) + more


class Seq2SeqModel:
    """An encoder-decoder of transformers as the kit uses it; the face is described in xattn.models.S2TModel.

    Architectures add features, prompt, encode, tokens, text and the attributes that these need.
    """

    lead = 0
    padding_safe = True

    def __init__(self, network: PreTrainedModel, source: str, weights_hash: str):
        self.network, self.source, self.weights_hash = network, source, weights_hash
        self.name, self.config = Path(source).name, network.config

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def max_length(self) -> int:
        """Of an output, its prompt included."""
        return self.config.max_target_positions

    def target(self, setting: str) -> str:
        """The language that is written in a setting. ValueError: it is none of the model's, where these are known."""
        target = setting.rpartition("-")[2]
        if self.languages and target not in self.languages:
            raise ValueError(
                f"The model {self.name} does not write {target!r}; choose one of {', '.join(self.languages)}."
            )
        return target

    def steps(self, frames: int) -> int:
        """How many encoder steps hold the recording, for features of `frames` frames."""
        return -(-frames // self.subsampling)

    def without_cells(self, features: Tensor, keep: Tensor) -> Tensor:
        """Features (T, F) set to 0 where keep (B, T, F) is 0: (B, T, F)."""
        return features * keep

    def network_inputs(self, features: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """Features (B, T, F) and their mask (B, T) as arguments of the network."""
        return {"input_features": features, "attention_mask": attention_mask}

    @torch.inference_mode()
    def decode(self, states: Tensor, decoder_input_ids: Tensor) -> Tensor:
        """Teacher-forced log-probabilities (B, I, V): row i is the distribution that follows decoder input i.

        states: (B, S, D); decoder_input_ids: (I,), the same for every row of the batch.
        """
        return self._forced(states, decoder_input_ids).logits.float().log_softmax(dim=-1)

    @torch.inference_mode()
    def decoder_without_steps(self, states: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """A function of keep (B, S) and decoder inputs (I,) that equals `decode(states * keep[..., None], inputs)`.

        Keys and values are projected once: a hidden step has the projections of zero, whoever its neighbours are. Steps
        past the end of a shorter keep stay.
        """
        anything = torch.zeros(1, dtype=torch.long, device=self.device)  # keys and values do not depend on the tokens
        whole, hidden = (
            self._forced(some, anything, use_cache=True).past_key_values.cross_attention_cache.layers
            for some in (states, torch.zeros_like(states[:, :1]))
        )

        @torch.inference_mode()
        def decode(keep: Tensor, decoder_input_ids: Tensor) -> Tensor:
            kept = functional.pad(keep, (0, states.shape[1] - keep.shape[1]), value=1.0)[:, None, :, None].bool()
            memory = DynamicCache(
                (torch.where(kept, a.keys, b.keys), torch.where(kept, a.values, b.values))
                for a, b in zip(whole, hidden, strict=True)
            )
            output = self._forced(
                states.expand(len(keep), -1, -1),
                decoder_input_ids,
                use_cache=True,
                past_key_values=EncoderDecoderCache(DynamicCache(), memory),
            )
            return output.logits.float().log_softmax(dim=-1)

        return decode

    @torch.inference_mode()
    def cross_attention(self, states: Tensor, decoder_input_ids: Tensor) -> Tensor:
        """Cross-attention (L, H, I, S) of the forced decoding of one utterance, states (1, S, D)."""
        usual = self.config._attn_implementation
        self.network.set_attn_implementation("eager")  # the faster ones do not compute weights
        try:
            weights = self._forced(states, decoder_input_ids, output_attentions=True).cross_attentions
        finally:
            self.network.set_attn_implementation(usual)
        return torch.stack(weights)[:, 0]

    def _forced(
        self, states: Tensor, decoder_input_ids: Tensor, use_cache: bool = False, **keywords
    ) -> Seq2SeqLMOutput:
        return self.network(
            encoder_outputs=BaseModelOutput(last_hidden_state=states),
            decoder_input_ids=decoder_input_ids.expand(len(states), -1),
            use_cache=use_cache,
            **keywords,
        )

    @torch.inference_mode()
    def generate(self, features: Tensor, setting: str, attention_mask: Tensor | None = None) -> list[Tensor]:
        """Beam search (5 beams, no repeated 5-gram: paper, settings) over a batch of features (B, T, F).

        attention_mask: (B, T), 1 on frames of the utterance; needed where utterances are padded. Returns for each
        utterance the output tokens after the prompt, with the final </s>, shape (I,). ValueError: padding given to a
        model that is not `padding_safe`.
        """
        if attention_mask is None:
            attention_mask = torch.ones(features.shape[:2], dtype=torch.long, device=features.device)
        if not (self.padding_safe or attention_mask.all()):
            raise ValueError(
                f"The outputs of {self.name} depend on how much its input is padded: give it one utterance at a time, "
                "or several of equal length."
            )
        prompt = self.prompt(setting)
        sequences = self.network.generate(
            **self.network_inputs(features, attention_mask),
            decoder_input_ids=prompt.expand(len(features), -1),
            decoder_start_token_id=int(prompt[0]),  # transformers would put its default, </s>, before the prompt
            forced_eos_token_id=self.config.eos_token_id,
            num_beams=5,
            no_repeat_ngram_size=5,
            max_length=self.max_length,
            do_sample=False,
            past_key_values=SharedMemoryCache(DynamicCache(), DynamicCache()),
        )
        end = self.config.eos_token_id
        sequences = [row[len(prompt) :] for row in sequences]
        return [row[: int((row == end).nonzero()[0]) + 1] if (row == end).any() else row for row in sequences]
