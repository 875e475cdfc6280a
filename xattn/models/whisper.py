"""Whisper (Radford et al., arXiv 2212.04356), which hears 30 s at a time, whatever the length of the recording.

Every input is padded to 30 s and the decoder attends to all 1,500 encoder steps, as the model was trained; maps, masks
and correlations are of the frames and steps that hold the recording.

Letters in shapes: B batch, T input frames, F mel bands, I tokens, P tokens of the prompt.
"""

import math

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationMixin, WhisperFeatureExtractor, WhisperForConditionalGeneration, WhisperTokenizer
from transformers.audio_utils import hertz_to_mel, mel_to_hertz
from transformers.models.whisper.tokenization_whisper import LANGUAGES

from xattn.explain import NothingToExplain
from xattn.models.pretrained import PretrainedModel

# Of the input, (log10 of the energy + 4) / 4: what is softer than the loudest cell by more than 80 dB is raised to that
# level, and digital silence is 1e-10.
RANGE, SILENCE = 8 / 4, (-10 + 4) / 4
SEARCHED_AT_ONCE = 4  # utterances: keys and values of 1,500 steps for five beams each take 0.6 GB of whisper-small


class WhisperNetwork(WhisperForConditionalGeneration):
    """With the search that all models here have; Whisper's own cuts recordings up and can fall back on sampling."""

    generate = GenerationMixin.generate


class WhisperModel(PretrainedModel):
    """A Whisper checkpoint as the kit uses it; the face is described in xattn.models.S2TModel."""

    NETWORK, EXTRACTOR, TOKENIZER = WhisperNetwork, WhisperFeatureExtractor, WhisperTokenizer
    first_frame = 0.0  # windows are centred on multiples of 10 ms, the first one on the start of the recording
    subsampling = 2

    def __init__(self, *parts):
        super().__init__(*parts)
        generation, vocabulary = self.network.generation_config, self.tokenizer.get_vocab()
        last = vocabulary.get("<|notimestamps|>", len(vocabulary))  # but for timestamps, which some tokenizers lack
        if last >= len(vocabulary) or vocabulary.get("<|startoftranscript|>") != self.config.decoder_start_token_id:
            raise ValueError(f"The tokenizer of {self.source} is not the model's, or not whole: fetch the model whole.")
        self.multilingual = getattr(generation, "is_multilingual", True)
        known = tuple(language for language in LANGUAGES if f"<|{language}|>" in vocabulary)  # English first
        self.languages = known if self.multilingual else known[:1]
        timestamps = range(last + 1, self.config.vocab_size)
        generation.suppress_tokens = sorted({*(generation.suppress_tokens or ()), *timestamps})

    @property
    def band_centres(self) -> np.ndarray:
        """(F,) in Hz: equidistant on Slaney's Mel scale from 0 to 8,000 Hz."""
        bands = self.config.num_mel_bins
        edges = np.linspace(*(hertz_to_mel(edge, mel_scale="slaney") for edge in (0.0, 8000.0)), bands + 2)
        return mel_to_hertz(edges[1:-1], mel_scale="slaney")

    def features(self, audio: np.ndarray) -> Tensor:
        """16 kHz mono audio (samples,) to the frames of the model's input whose windows reach into it, (T, F).

        The other frames of its 30 s are silent, all of one level. NothingToExplain: the audio is longer, so a corpus
        goes on without it.
        """
        extractor = self.extractor
        if len(audio) > extractor.n_samples:
            raise NothingToExplain(
                f"The recording lasts {len(audio) / extractor.sampling_rate:.1f} s, and {self.name} hears "
                f"{extractor.chunk_length} s: cut it."
            )
        frames = math.ceil((len(audio) + extractor.n_fft // 2) / extractor.hop_length)
        whole = self.extract(audio)["input_features"][0].T  # (3000, F)
        return torch.from_numpy(whole[:frames].copy()).to(self.device)

    def padded(self, features: Tensor) -> Tensor:
        """The model's whole input (3000, F) from its first frames (T, F), with no cell hidden."""
        level = max(float(features.max()) - RANGE, SILENCE)
        whole = features.new_full((self.extractor.nb_max_frames, features.shape[1]), level)
        whole[: len(features)] = features
        return whole

    def without_cells(self, features: Tensor, keep: Tensor) -> Tensor:
        """The whole input, its first frames (T, F) set to 0 where keep (B, T, F) is 0: (B, 3000, F).

        The paper sets cells to 0 where features have mean 0 and variance 1. Whisper's have neither, but are scaled such
        that 0 is about the mean of all that it was trained on (its paper, section 2.2), so that 0 again takes away what
        is special about a cell and does not stand out as silence, the lowest value, would in speech.
        """
        whole = self.padded(features).repeat(len(keep), 1, 1)
        whole[:, : len(features)] *= keep
        return whole

    def network_inputs(self, features: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        """As in Seq2SeqModel, of features of the recording alone or of the whole input."""
        frames = attention_mask.sum(dim=1).tolist()
        whole = [self.padded(row[:own]) for row, own in zip(features, frames, strict=True)]
        inputs = torch.stack(whole).transpose(1, 2)  # (B, F, 3000)
        return {"input_features": inputs, "attention_mask": torch.ones_like(inputs[:, 0], dtype=torch.long)}

    def prompt(self, setting: str) -> Tensor:
        """The decoder's first tokens in a setting (P,): start, spoken language, task, no timestamps.

        ValueError: the model does not know the language, or would translate into another one than English.
        """
        spoken, target = setting.partition("-")[0], self.target(setting)
        if spoken not in self.languages:
            raise ValueError(
                f"The model {self.name} does not hear {spoken!r}; choose one of {', '.join(self.languages)}."
            )
        if target not in (spoken, "en"):
            raise ValueError(f"{self.name} translates into English only, not into {target!r}: choose another setting.")
        task = [f"<|{spoken}|>", "<|transcribe|>" if target == spoken else "<|translate|>"] if self.multilingual else []
        tokens = ["<|startoftranscript|>", *task, "<|notimestamps|>"]
        return torch.tensor(self.tokenizer.convert_tokens_to_ids(tokens), device=self.device)

    def generate(self, features: Tensor, setting: str, attention_mask: Tensor | None = None) -> list[Tensor]:
        """As in Seq2SeqModel, without timestamps and with the checkpoint's own lists of suppressed tokens."""
        if attention_mask is None:
            attention_mask = torch.ones(features.shape[:2], dtype=torch.long, device=features.device)
        parts = zip(features.split(SEARCHED_AT_ONCE), attention_mask.split(SEARCHED_AT_ONCE), strict=True)
        return [ids for part, mask in parts for ids in super(WhisperModel, self).generate(part, setting, mask)]

    def tokens(self, ids: Tensor) -> list[str]:
        """Subword strings of token ids (I,), a space before a word written as ▁."""
        return [self.tokenizer.decode([token]).replace(" ", "▁") for token in ids.tolist()]
