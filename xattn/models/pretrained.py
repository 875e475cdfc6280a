"""Checkpoints of transformers' own speech-to-text models, with the feature extractor and the tokenizer beside them."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from xattn.audio import FRAME_SECONDS, SAMPLE_RATE, checked
from xattn.models import hash_of
from xattn.models.seq2seq import Seq2SeqModel, load_network


class PretrainedModel(Seq2SeqModel):
    """One of transformers' own models as the kit uses it; the face is described in xattn.models.S2TModel.

    Families name their classes and add prompt, languages and what differs in their features.
    """

    NETWORK: type
    EXTRACTOR: type
    TOKENIZER: type
    frame_seconds = FRAME_SECONDS

    def __init__(self, network: PreTrainedModel, extractor, tokenizer, source: str, weights_hash: str):
        super().__init__(network, source, weights_hash)
        self.extractor, self.tokenizer = extractor, tokenizer

    @classmethod
    def from_folder(cls, folder: str | Path, device: str = "cpu") -> "PretrainedModel":
        """Load a folder as `save_pretrained` writes it or the hub has it; nothing is fetched."""
        folder = Path(folder)
        network = load_network(cls.NETWORK, folder)
        try:
            extractor = cls.EXTRACTOR.from_pretrained(folder, local_files_only=True)
            tokenizer = cls.load_tokenizer(folder)
        except Exception as error:  # whatever flipped bits make of them
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"The feature extractor or the tokenizer of {folder} cannot be read ({reason}): fetch the model whole."
            ) from error
        files = sorted(file for file in folder.iterdir() if file.suffix in (".json", ".model", ".txt"))
        files = [file for file in files if ".index." not in file.name]  # how weights are spread over files
        weights_hash = hash_of(network.state_dict(), files)
        return cls(network.to(device), extractor, tokenizer, str(folder), weights_hash)

    @classmethod
    def load_tokenizer(cls, folder: Path):
        """The tokenizer beside the weights."""
        return cls.TOKENIZER.from_pretrained(folder, local_files_only=True)

    def extract(self, audio: np.ndarray) -> dict[str, np.ndarray]:
        """What the model's own feature extractor makes of 16 kHz mono audio (samples,): arrays with a batch axis.

        ValueError: as `xattn.audio.log_mel`, or it makes nothing of it.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            inputs = self.extractor(checked(audio), sampling_rate=SAMPLE_RATE, return_tensors="np")
        if not np.isfinite(inputs["input_features"]).all():
            raise ValueError(
                f"The features that {self.name} takes of the recording are not finite: it is too short for them, or "
                "does not change in some band; use another one."
            )
        return inputs

    @torch.inference_mode()
    def encode(self, features: Tensor) -> Tensor:
        """Unpadded features (B, T, F) to encoder states (B, S, D)."""
        whole = torch.ones(features.shape[:2], dtype=torch.long, device=features.device)
        return self.network.get_encoder()(**self.network_inputs(features, whole)).last_hidden_state

    def tokens(self, ids: Tensor) -> list[str]:
        """Subword strings of token ids (I,)."""
        return self.tokenizer.convert_ids_to_tokens(ids.tolist())

    def text(self, ids: Tensor) -> str:
        """The text that token ids (I,) spell, special tokens left out."""
        return self.tokenizer.decode(ids.tolist(), skip_special_tokens=True).strip()
