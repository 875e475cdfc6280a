"""Checkpoints of transformers' own speech-to-text models, with their feature extractors and tokenizers."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from xattn.audio import FRAME_SECONDS, SAMPLE_RATE, checked
from xattn.models.interface import Decoding
from xattn.models.seq2seq import Seq2SeqModel
from xattn.models.weights import hash_weights, load_network


class PretrainedModel(Seq2SeqModel):
    """A model of transformers with the interface of `S2TModel`.

    Subclasses name their classes and add prompt, languages and what differs in their features.
    """

    NETWORK: type
    EXTRACTOR: type
    TOKENIZER: type
    frame_seconds = FRAME_SECONDS

    def __init__(self, network: PreTrainedModel, extractor, tokenizer, source: str, weights_hash: str):
        super().__init__(network, source, weights_hash)
        self.extractor, self.tokenizer = extractor, tokenizer
        # `generate` here is given max_length, which max_new_tokens would overrule, and a cache; it returns ids alone.
        stated = network.generation_config
        self.new_tokens, stated.max_new_tokens = stated.max_new_tokens, None
        stated.cache_implementation, stated.return_dict_in_generate = None, False

    @classmethod
    def from_folder(cls, folder: str | Path, device: str = "cpu") -> "PretrainedModel":
        """Load a folder written by `save_pretrained` or downloaded from the hub."""
        folder = Path(folder)
        network = load_network(cls.NETWORK, folder)
        try:
            extractor = cls.EXTRACTOR.from_pretrained(folder, local_files_only=True)
            tokenizer = cls.load_tokenizer(folder)
        except Exception as error:  # a damaged file can raise anything
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"The feature extractor or the tokenizer of {folder} cannot be read ({reason}): download the complete "
                "model."
            ) from error
        files = sorted(file for file in folder.iterdir() if file.suffix in (".json", ".model", ".txt"))
        files = [file for file in files if ".index." not in file.name]  # an index says how weights are split into files
        weights_hash = hash_weights(network.state_dict(), files)
        return cls(network.to(device), extractor, tokenizer, str(folder), weights_hash)

    @classmethod
    def load_tokenizer(cls, folder: Path):
        """Load the tokenizer in a model folder."""
        return cls.TOKENIZER.from_pretrained(folder, local_files_only=True)

    @property
    def decoding(self) -> Decoding:
        """The settings of the checkpoint's generation_config.json; without them, a greedy search."""
        own, limit = self.network.generation_config, self.output_limit
        longest = own.max_length or limit
        if self.new_tokens:
            longest = self.new_tokens + len(self.prompt(next(iter(self.languages), "en")))
        return Decoding(own.num_beams or 1, min(longest, limit), own.no_repeat_ngram_size or 0)

    def extract(self, audio: np.ndarray) -> dict[str, np.ndarray]:
        """Run the model's own feature extractor on 16 kHz mono audio (samples,): arrays with a batch axis.

        ValueError: see `xattn.audio.log_mel`; or the features are not finite.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            inputs = self.extractor(checked(audio), sampling_rate=SAMPLE_RATE, return_tensors="np")
        if not np.isfinite(inputs["input_features"]).all():
            raise ValueError(
                f"The features of the recording are not finite for {self.name}: it is too short, or some band never "
                "changes; use another one."
            )
        return inputs

    def encode(self, features: Tensor) -> Tensor:
        """Return encoder states (B, S, D) for unpadded features (B, T, F)."""
        unpadded = torch.ones(features.shape[:2], dtype=torch.long, device=features.device)
        return self.network.get_encoder()(**self.network_inputs(features, unpadded)).last_hidden_state

    def token_ids(self, text: str) -> Tensor:
        """Return the ids (I,) that the model would write for `text`, ending with </s>."""
        ids = self.tokenizer(text, add_special_tokens=False).input_ids
        return torch.tensor([*ids, self.config.eos_token_id], device=self.device)

    def tokens(self, ids: Tensor) -> list[str]:
        """Return the subword strings of token ids (I,)."""
        return self.tokenizer.convert_ids_to_tokens(ids.tolist())

    def text(self, ids: Tensor) -> str:
        """Return the text that token ids (I,) spell, without special tokens."""
        return self.tokenizer.decode(ids.tolist(), skip_special_tokens=True).strip()
