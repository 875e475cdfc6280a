"""SeamlessM4T v2 (Barrault et al., arXiv 2312.05187), from speech to text: a w2v-BERT Conformer and an adapter.

The network reads 80 bands of two frames of 10 ms as one vector of 160. Here `features` are the frames themselves,
(T, 80) with T even, so that superpixels are of a spectrogram and the axes mean what they mean elsewhere; `encode` joins
them. An encoder step covers the adapter's window, eight vectors or 160 ms, which for the first step begins half a
window before the recording.
"""

from pathlib import Path

import numpy as np
import sentencepiece
import torch
from torch import Tensor
from transformers import GenerationMixin, SeamlessM4TFeatureExtractor, SeamlessM4Tv2ForSpeechToText

from xattn.audio import SAMPLE_RATE, WINDOW_SECONDS, mel_centres
from xattn.models.pretrained import PretrainedModel

# EuroParl-ST's languages by the two letters that name them in corpora and settings; others go by their three letters.
CODES = {
    "deu": "de", "eng": "en", "fra": "fr", "ita": "it", "nld": "nl", "pol": "pl", "por": "pt", "ron": "ro", "spa": "es"
}  # fmt: skip
VOCABULARY = "sentencepiece.bpe.model"


class SeamlessNetwork(SeamlessM4Tv2ForSpeechToText):
    """With the search that all models here have, as Seamless's own sets the prompt, and without the other tasks."""

    generate = GenerationMixin.generate
    _keys_to_ignore_on_load_unexpected = ["text_encoder", "t2u_model", "vocoder"]


class SeamlessModel(PretrainedModel):
    """A SeamlessM4T v2 checkpoint as the kit uses it; the face is described in xattn.models.S2TModel."""

    NETWORK, EXTRACTOR = SeamlessNetwork, SeamlessM4TFeatureExtractor
    first_frame = WINDOW_SECONDS / 2
    padding_safe = False  # the adapter's convolution sees what the encoder makes of padding

    def __init__(self, *parts):
        super().__init__(*parts)
        generation, stride, window = self.network.generation_config, self.extractor.stride, self.config.adaptor_stride
        tags = getattr(generation, "text_decoder_lang_to_code_id", None)
        if not tags:
            raise ValueError(f"No generation_config.json of {self.source} tells its languages: fetch the model whole.")
        self.tags = {CODES.get(code, code): tag for code, tag in tags.items()}
        self.names = {tag: f"__{code}__" for code, tag in tags.items()} | {0: "<pad>"}  # a piece's id is one up
        self.languages = tuple(sorted(self.tags, key=lambda language: language != "en"))  # English first
        self.subsampling, self.lead = stride * window, stride * (window // 2)
        self.band_centres = mel_centres(SAMPLE_RATE, self.extractor.num_mel_bins)
        generation.max_new_tokens = None  # instead of which max_length is given

    @classmethod
    def load_tokenizer(cls, folder: Path) -> sentencepiece.SentencePieceProcessor:
        """The checkpoint's SentencePiece model, which transformers' own class would read with a further library."""
        return sentencepiece.SentencePieceProcessor(model_file=str(folder / VOCABULARY))

    @property
    def max_length(self) -> int:
        """Of an output, its prompt included."""
        return 2 + self.config.max_new_tokens

    def steps(self, frames: int) -> int:
        """How many encoder steps features of `frames` frames give: what is left of the adapter's convolution."""
        kernel, stride = self.config.adaptor_kernel_size, self.config.adaptor_stride
        return (frames // self.extractor.stride + 2 * (stride // 2) - kernel) // stride + 1

    def features(self, audio: np.ndarray) -> Tensor:
        """16 kHz mono audio (samples,) to normalised log-mel features (T, 80), T even.

        An odd last frame is left out. transformers pads it and masks the pair, which the adapter's convolution still
        sees: states would depend on padding.
        """
        joined = self.extract(audio)
        whole = joined["input_features"][0][joined["attention_mask"][0] == 1]  # (T / 2, 160)
        return torch.from_numpy(whole.reshape(-1, self.extractor.num_mel_bins)).to(self.device)

    def network_inputs(self, features: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """As in Seq2SeqModel, frames joined."""
        stride = self.extractor.stride
        joined = features.reshape(len(features), -1, stride * features.shape[2])
        return {"input_features": joined, "attention_mask": attention_mask[:, stride - 1 :: stride]}

    def prompt(self, setting: str) -> Tensor:
        """The decoder's first tokens in a setting (2,): start, and the tag of the language that is written."""
        return torch.tensor([self.config.decoder_start_token_id, self.tags[self.target(setting)]], device=self.device)

    def tokens(self, ids: Tensor) -> list[str]:
        """Subword strings of token ids (I,), numbers in <> where the checkpoint names no piece."""
        size = self.tokenizer.get_piece_size()
        return [
            self.names.get(token) or (self.tokenizer.id_to_piece(token - 1) if token <= size else f"<{token}>")
            for token in ids.tolist()
        ]

    def text(self, ids: Tensor) -> str:
        """The text that token ids (I,) spell, special tokens left out."""
        pieces = [token - 1 for token in ids.tolist() if 0 < token <= self.tokenizer.get_piece_size()]
        return self.tokenizer.decode([piece for piece in pieces if not self.tokenizer.is_control(piece)])
