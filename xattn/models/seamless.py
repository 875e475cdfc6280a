"""SeamlessM4T v2 (Barrault et al., arXiv 2312.05187), speech to text: a w2v-BERT Conformer and an adapter.

The network takes two frames of 80 bands (10 ms each) as one vector of 160. Here `features` are single frames, (T, 80)
with T even, so that superpixels and axes mean the same as for other models; `encode` joins them. An encoder step covers
the adapter's window of eight vectors (160 ms); the first window starts half its length before the recording.
"""

from pathlib import Path

import numpy as np
import sentencepiece
import torch
from torch import Tensor
from transformers import GenerationMixin, SeamlessM4TFeatureExtractor, SeamlessM4Tv2ForSpeechToText

from xattn.audio import SAMPLE_RATE, WINDOW_SECONDS, mel_centres
from xattn.models.pretrained import PretrainedModel

# Two-letter codes of EuroParl-ST's languages; all others keep their three letters.
CODES = {
    "deu": "de", "eng": "en", "fra": "fr", "ita": "it", "nld": "nl", "pol": "pl", "por": "pt", "ron": "ro", "spa": "es"
}  # fmt: skip
VOCABULARY = "sentencepiece.bpe.model"


class SeamlessNetwork(SeamlessM4Tv2ForSpeechToText):
    """With the search of all models here, because Seamless's own sets the prompt, and without the other tasks."""

    generate = GenerationMixin.generate
    _keys_to_ignore_on_load_unexpected = ["text_encoder", "t2u_model", "vocoder"]


class SeamlessModel(PretrainedModel):
    """A SeamlessM4T v2 checkpoint with the interface of `S2TModel`."""

    NETWORK, EXTRACTOR = SeamlessNetwork, SeamlessM4TFeatureExtractor
    first_frame = WINDOW_SECONDS / 2
    padding_safe = False  # the adapter's convolution reads the encoder's output on padding

    def __init__(self, *parts):
        super().__init__(*parts)
        generation, stride, window = self.network.generation_config, self.extractor.stride, self.config.adaptor_stride
        tags = getattr(generation, "text_decoder_lang_to_code_id", None)
        if not tags:
            raise ValueError(
                f"{self.source} has no generation_config.json with its languages: download the complete model."
            )
        self.tags = {CODES.get(code, code): tag for code, tag in tags.items()}
        self.names = {tag: f"__{code}__" for code, tag in tags.items()} | {0: "<pad>"}  # a piece's id is one up
        self.languages = tuple(sorted(self.tags, key=lambda language: language != "en"))  # English first
        self.subsampling, self.lead = stride * window, stride * (window // 2)
        self.band_centres = mel_centres(SAMPLE_RATE, self.extractor.num_mel_bins)

    @classmethod
    def load_tokenizer(cls, folder: Path) -> sentencepiece.SentencePieceProcessor:
        """Load the checkpoint's SentencePiece model; transformers' own class would need another library."""
        return sentencepiece.SentencePieceProcessor(model_file=str(folder / VOCABULARY))

    @property
    def output_limit(self) -> int:
        """Tokens of an output, prompt and </s> included."""
        return 2 + self.config.max_new_tokens

    def steps(self, frames: int) -> int:
        """Return the number of encoder steps for `frames` frames: the output length of the adapter's convolution."""
        kernel, stride = self.config.adaptor_kernel_size, self.config.adaptor_stride
        return (frames // self.extractor.stride + 2 * (stride // 2) - kernel) // stride + 1

    def features(self, audio: np.ndarray) -> Tensor:
        """Return normalised log-mel features (T, 80) with T even for 16 kHz mono audio (samples,).

        An odd last frame is dropped. transformers pads it and masks the pair, but the adapter's convolution still reads
        it, so states would depend on padding.
        """
        joined = self.extract(audio)
        whole = joined["input_features"][0][joined["attention_mask"][0] == 1]  # (T / 2, 160)
        return torch.from_numpy(whole.reshape(-1, self.extractor.num_mel_bins)).to(self.device)

    def network_inputs(self, features: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """See Seq2SeqModel; pairs of frames are joined."""
        stride = self.extractor.stride
        joined = features.reshape(len(features), -1, stride * features.shape[2])
        return {"input_features": joined, "attention_mask": attention_mask[:, stride - 1 :: stride]}

    def prompt(self, direction: str) -> Tensor:
        """Return the decoder's first tokens (2,): the start token and the target language's tag."""
        return torch.tensor([self.config.decoder_start_token_id, self.tags[self.target(direction)]], device=self.device)

    def token_ids(self, text: str) -> Tensor:
        """Return the ids (I,) that the model would write for `text`, ending with </s>."""
        ids = [piece + 1 for piece in self.tokenizer.encode(text)]  # a piece's id is one up
        return torch.tensor([*ids, self.config.eos_token_id], device=self.device)

    def tokens(self, ids: Tensor) -> list[str]:
        """Return the subword strings of token ids (I,); ids without a piece become <id>."""
        size = self.tokenizer.get_piece_size()
        return [
            self.names.get(token) or (self.tokenizer.id_to_piece(token - 1) if token <= size else f"<{token}>")
            for token in ids.tolist()
        ]

    def text(self, ids: Tensor) -> str:
        """Return the text that token ids (I,) spell, without special tokens."""
        pieces = [token - 1 for token in ids.tolist() if 0 < token <= self.tokenizer.get_piece_size()]
        return self.tokenizer.decode([piece for piece in pieces if not self.tokenizer.is_control(piece)])
