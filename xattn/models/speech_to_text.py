"""Speech2Text (Wang et al., arXiv 2010.05171), the Transformers of fairseq S2T, for recognition or translation.

They use the same features as the paper's models: Kaldi's filterbank, normalised over the utterance.
"""

import numpy as np
import torch
from torch import Tensor
from transformers import Speech2TextFeatureExtractor, Speech2TextForConditionalGeneration, Speech2TextTokenizer

from xattn.audio import SAMPLE_RATE, WINDOW_SECONDS, mel_centres
from xattn.models.pretrained import PretrainedModel


class SpeechToTextModel(PretrainedModel):
    """A Speech2Text checkpoint with the interface of `S2TModel`.

    A checkpoint for a single language does not say which one it writes, so `languages` is empty and every direction is
    accepted; one for several languages (MuST-C) starts its output with the language's tag.
    """

    NETWORK, EXTRACTOR = Speech2TextForConditionalGeneration, Speech2TextFeatureExtractor
    TOKENIZER = Speech2TextTokenizer
    first_frame = WINDOW_SECONDS / 2
    padding_safe = False  # the second convolution reads the first one's output on padding

    def __init__(self, *parts):
        super().__init__(*parts)
        self.languages = tuple(self.tokenizer.lang_code_to_id)
        self.subsampling = 2**self.config.num_conv_layers
        self.band_centres = mel_centres(SAMPLE_RATE, self.config.input_feat_per_channel)

    def features(self, audio: np.ndarray) -> Tensor:
        """Return normalised log-mel features (T, F), the model's input, for 16 kHz mono audio (samples,)."""
        return torch.from_numpy(self.extract(audio)["input_features"][0]).to(self.device)

    def prompt(self, direction: str) -> Tensor:
        """Return the decoder's first tokens: the start token and, for several languages, the target's tag."""
        target = self.target(direction)
        tag = [self.tokenizer.lang_code_to_id[target]] if self.languages else []
        return torch.tensor([self.config.decoder_start_token_id, *tag], device=self.device)
