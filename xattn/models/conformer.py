"""The paper's Conformer speech-to-text model, with the interface of `S2TModel`.

Two stride-2 convolutions, a Conformer encoder, transformers' own Speech2Text decoder, and CTC heads for training.
Parameters have the names of FBK's reference implementation, so its weights load without a translation table.

Letters in shapes: B batch, T input frames, F mel bands, S encoder steps (T' in the paper), D model width,
H heads, I decoder positions, V vocabulary, L decoder layers.
"""

import json
import math
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationMixin, PreTrainedModel, Speech2TextConfig
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput
from transformers.models.speech_to_text.modeling_speech_to_text import Speech2TextDecoder

from xattn.audio import FRAME_SECONDS, WINDOW_SECONDS, cmvn, log_mel, mel_centres
from xattn.models.seq2seq import Seq2SeqModel
from xattn.models.weights import folder_hash, load_network

BLANK = "<ctc_blank>"  # the reference's joint CTC models append it to their vocabulary
NEVER_WRITTEN = ("<s>", "<pad>", "<unk>", BLANK)
SUBSAMPLING = 4  # input frames per encoder step: two convolutions of stride 2


class ConformerConfig(Speech2TextConfig):
    """transformers' Speech2Text configuration with the options of a Conformer.

    conformer_conv_kernel_size: width of the depthwise convolution (31 in the paper).
    ctc_encoder_layer: the encoder layer (from 1) whose output feeds the intermediate CTC head; None for no head.
    ctc_vocab_size: rows of that head if its vocabulary is not the decoder's.
    final_ctc: whether the encoder output feeds a second CTC head.
    batch_unsafe_relative_shift: shift relative scores over the padded length, as the released FAMA models do; such a
        model is exact only on unpadded input.
    language_ids: token id of each target language's tag, the first decoder input; None for a language without a tag.
    starts_with_eos: whether the decoder input starts with </s> before the tag, as in FBK's reference implementation.
    """

    model_type = "xattn_conformer"

    conformer_conv_kernel_size: int = 31
    ctc_encoder_layer: int | None = 1
    ctc_vocab_size: int | None = None
    final_ctc: bool = False
    batch_unsafe_relative_shift: bool = False
    language_ids: dict | None = None
    starts_with_eos: bool = False


def subsampled(lengths):
    """Return the number of encoder steps for `lengths` frames (int or Tensor), after both convolutions."""
    for _ in range(2):
        lengths = (lengths - 1) // 2 + 1
    return lengths


def relative_shift(scores: Tensor, lengths: list[int] | None) -> Tensor:
    """Shift position scores (B, H, S, S) so that column j of row i holds the score of distance i - j.

    Without `lengths`, the usual pad-and-view covers the whole matrix. With them, it covers each utterance's own leading
    square, so that scores do not depend on padding.
    """
    if lengths is None:
        padded = functional.pad(scores, (1, 0))  # (B, H, S, S + 1)
        batch, heads, steps, _ = scores.shape
        return padded.view(batch, heads, steps + 1, steps)[:, :, 1:]
    shifted = torch.zeros_like(scores)
    for length in set(lengths):
        rows = [row for row, own in enumerate(lengths) if own == length]
        shifted[rows, :, :length, :length] = relative_shift(scores[rows, :, :length, :length].contiguous(), None)
    return shifted


class Subsampler(nn.Module):
    """Two convolutions of stride 2, each followed by a gated linear unit: (B, T, F) -> (B, S, D)."""

    def __init__(self, config: ConformerConfig):
        super().__init__()
        channels = (config.conv_channels // 2, config.d_model)
        inputs = (config.input_feat_per_channel, config.conv_channels // 2)
        self.conv_layers = nn.ModuleList(
            nn.Conv1d(size_in, 2 * size_out, kernel, stride=2, padding=kernel // 2)
            for size_in, size_out, kernel in zip(inputs, channels, config.conv_kernel_sizes, strict=True)
        )

    def forward(self, features: Tensor, lengths: Tensor | None) -> Tensor:
        hidden = features.transpose(1, 2)
        for conv in self.conv_layers:
            hidden = functional.glu(conv(hidden), dim=1)  # (B, channels, about half the frames)
            if lengths is not None:
                lengths = (lengths - 1) // 2 + 1
                hidden = hidden * (torch.arange(hidden.shape[2], device=hidden.device) < lengths[:, None])[:, None]
        return hidden.transpose(1, 2)


class FeedForward(nn.Module):
    def __init__(self, config: ConformerConfig):
        super().__init__()
        self.layernorm = nn.LayerNorm(config.d_model)
        self.first_linear = nn.Linear(config.d_model, config.encoder_ffn_dim)
        self.second_linear = nn.Linear(config.encoder_ffn_dim, config.d_model)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.dropout(self.second_linear(functional.silu(self.first_linear(self.layernorm(hidden)))))


class RelativeAttention(nn.Module):
    """Self-attention with Transformer-XL's relative positions over one sinusoid table of positions 0..S-1."""

    def __init__(self, config: ConformerConfig):
        super().__init__()
        size, self.heads = config.d_model, config.encoder_attention_heads
        self.query_proj = nn.Linear(size, size)
        self.key_proj = nn.Linear(size, size)
        self.value_proj = nn.Linear(size, size)
        self.pos_proj = nn.Linear(size, size, bias=False)
        self.out_proj = nn.Linear(size, size)
        self.u_bias = nn.Parameter(torch.zeros(self.heads, size // self.heads))
        self.v_bias = nn.Parameter(torch.zeros(self.heads, size // self.heads))
        self.dropout = nn.Dropout(config.attention_dropout)

    def forward(self, hidden: Tensor, positions: Tensor, padding: Tensor | None, lengths: list[int] | None) -> Tensor:
        batch, steps, size = hidden.shape

        def split(projected: Tensor) -> Tensor:
            return projected.view(-1, steps, self.heads, size // self.heads).transpose(1, 2)  # (B, H, S, D / H)

        query = split(self.query_proj(hidden))
        key, value = split(self.key_proj(hidden)), split(self.value_proj(hidden))
        position = split(self.pos_proj(positions))
        # The reference divides by the square root of the model's width, not the head's.
        query = query / math.sqrt(size)
        u_bias, v_bias = self.u_bias[:, None] / math.sqrt(size), self.v_bias[:, None] / math.sqrt(size)
        scores = (query + u_bias) @ key.transpose(2, 3)
        # Softmax in bfloat16 would be less exact and, on a CPU, slower.
        scores = (scores + relative_shift((query + v_bias) @ position.transpose(2, 3), lengths)).float()
        if padding is None:
            weights = scores.softmax(dim=-1)
        else:
            masked = padding[:, None, None, :] | padding[:, None, :, None]
            weights = scores.masked_fill(masked, torch.finfo(scores.dtype).min).softmax(dim=-1).masked_fill(masked, 0.0)
        mixed = self.dropout(weights) @ value
        return self.out_proj(mixed.transpose(1, 2).reshape(batch, steps, size))


class AttentionModule(nn.Module):
    def __init__(self, config: ConformerConfig):
        super().__init__()
        self.layer_norm = nn.LayerNorm(config.d_model)
        self.attention = RelativeAttention(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: Tensor, *context) -> Tensor:
        return self.dropout(self.attention(self.layer_norm(hidden), *context))


class ConvolutionModule(nn.Module):
    def __init__(self, config: ConformerConfig):
        super().__init__()
        size, kernel = config.d_model, config.conformer_conv_kernel_size
        self.layernorm = nn.LayerNorm(size)
        self.first_pointwise_conv1d = nn.Conv1d(size, 2 * size, 1)
        self.depthwise_conv1d = nn.Conv1d(size, size, kernel, padding=kernel // 2, groups=size, bias=False)
        self.batchnorm = nn.BatchNorm1d(size)
        self.second_pointwise_conv1d = nn.Conv1d(size, size, 1)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, hidden: Tensor, padding: Tensor | None) -> Tensor:
        def zero_padding(values: Tensor) -> Tensor:
            return values if padding is None else values.masked_fill(padding[..., None], 0.0)

        def pointwise(values: Tensor, conv: nn.Conv1d) -> Tensor:
            return functional.linear(values, conv.weight[..., 0], conv.bias)

        hidden = zero_padding(functional.glu(pointwise(self.layernorm(hidden), self.first_pointwise_conv1d)))
        # On a CPU, a 2-D convolution with channels last in memory is many times faster than a 1-D convolution.
        image = hidden.transpose(1, 2)[:, :, None]  # (B, D, 1, S)
        kernel = self.depthwise_conv1d.weight[:, :, None]
        image = functional.conv2d(image, kernel, padding=(0, kernel.shape[-1] // 2), groups=len(kernel))
        hidden = zero_padding(image[:, :, 0].transpose(1, 2))  # (B, S, D)
        hidden = zero_padding(self.batchnorm(hidden.flatten(0, 1)).view_as(hidden))
        return self.dropout(zero_padding(pointwise(functional.silu(hidden), self.second_pointwise_conv1d)))


class ConformerLayer(nn.Module):
    def __init__(self, config: ConformerConfig):
        super().__init__()
        self.first_feed_forward = FeedForward(config)
        self.attention = AttentionModule(config)
        self.conv_module = ConvolutionModule(config)
        self.second_feed_forward = FeedForward(config)
        self.layernorm = nn.LayerNorm(config.d_model)

    def forward(self, hidden: Tensor, positions: Tensor, padding: Tensor | None, lengths: list[int] | None) -> Tensor:
        hidden = hidden + 0.5 * self.first_feed_forward(hidden)
        hidden = hidden + self.attention(hidden, positions, padding, lengths)
        hidden = hidden + self.conv_module(hidden, padding)
        hidden = hidden + 0.5 * self.second_feed_forward(hidden)
        return self.layernorm(hidden)


class ConformerEncoder(nn.Module):
    """Encodes log-mel features (B, T, F) as states (B, S, D)."""

    main_input_name = "input_features"

    def __init__(self, config: ConformerConfig):
        super().__init__()
        self.config = config
        self.subsample = Subsampler(config)
        self.dropout = nn.Dropout(config.dropout)
        self.conformer_layers = nn.ModuleList(ConformerLayer(config) for _ in range(config.encoder_layers))
        if config.ctc_encoder_layer is not None:
            self.ctc_fc = nn.Linear(config.d_model, config.ctc_vocab_size or config.vocab_size)
        if config.final_ctc:
            self.final_ctc_fc = nn.Linear(config.d_model, config.vocab_size)

    def positions(self, steps: int, like: Tensor) -> Tensor:
        """Return sinusoids of positions 0..steps-1, sine on even and cosine on odd columns: (steps, D)."""
        size = self.config.d_model
        rates = torch.exp(torch.arange(0, size, 2, device=like.device) * (-math.log(10000.0) / size))
        angles = torch.arange(steps, device=like.device)[:, None] * rates  # (S, D / 2)
        return torch.stack((angles.sin(), angles.cos()), dim=-1).view(steps, size).to(like.dtype)

    def forward(self, input_features: Tensor, attention_mask: Tensor | None = None, **_) -> BaseModelOutput:
        """Encode features; `attention_mask` (B, T) is 1 on frames of the utterance and 0 on padding.

        Returns:
            last_hidden_state (B, S, D), and the output of every layer in hidden_states.
        """
        frames, padding, lengths = None, None, None
        if attention_mask is not None and not bool(attention_mask.all()):
            frames = attention_mask.sum(dim=1)
            steps = subsampled(frames)
            padding = torch.arange(subsampled(input_features.shape[1]), device=frames.device) >= steps[:, None]
            lengths = None if self.config.batch_unsafe_relative_shift else steps.tolist()
        hidden = self.subsample(input_features, frames) * math.sqrt(self.config.d_model)
        hidden, positions = self.dropout(hidden), self.positions(hidden.shape[1], hidden)
        outputs = []
        for layer in self.conformer_layers:
            hidden = layer(hidden, positions, padding, lengths)
            outputs.append(hidden)
        return BaseModelOutput(last_hidden_state=hidden, hidden_states=tuple(outputs))


class ConformerDecoder(Speech2TextDecoder):
    """transformers' Speech2Text decoder with the output projection inside, as in the reference."""

    def __init__(self, config: ConformerConfig):
        super().__init__(config)
        self.output_projection = nn.Linear(config.d_model, config.vocab_size, bias=False)


class ConformerForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """The encoder-decoder, with transformers' `from_pretrained`, `save_pretrained` and `generate`."""

    config_class = ConformerConfig
    main_input_name = "input_features"
    input_modalities = ("audio",)
    _tied_weights_keys = {"decoder.output_projection.weight": "decoder.embed_tokens.weight"}

    def __init__(self, config: ConformerConfig):
        super().__init__(config)
        self.encoder = ConformerEncoder(config)
        self.decoder = ConformerDecoder(config)
        self.post_init()

    def _init_weights(self, module: nn.Module):
        # transformers' decoder has already initialised itself; only the encoder's modules are left.
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(
        self,
        input_features: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        encoder_outputs: BaseModelOutput | None = None,
        **decoder_arguments,
    ) -> Seq2SeqLMOutput:
        """Return logits (B, I, V) of a teacher-forced decoding; arguments as in transformers' Speech2Text."""
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_features, attention_mask)
        states = encoder_outputs.last_hidden_state
        if attention_mask is not None:
            steps = subsampled(attention_mask.sum(dim=1))
            attention_mask = (torch.arange(states.shape[1], device=steps.device) < steps[:, None]).long()
        keywords = ("use_cache", "past_key_values", "output_attentions")
        decoded = self.decoder(
            input_ids=decoder_input_ids,
            encoder_hidden_states=states,
            encoder_attention_mask=attention_mask,
            **{key: decoder_arguments[key] for key in keywords if key in decoder_arguments},
        )
        return Seq2SeqLMOutput(
            logits=self.decoder.output_projection(decoded.last_hidden_state),
            past_key_values=decoded.past_key_values,
            cross_attentions=decoded.cross_attentions,
            decoder_attentions=decoded.attentions,
            encoder_last_hidden_state=states,
            encoder_hidden_states=encoder_outputs.hidden_states,
        )

    def ctc_logits(self, hidden_states: tuple[Tensor, ...]) -> list[Tensor]:
        """Return the logits (B, S, V) of the intermediate and the final CTC head, if there are any."""
        heads = []
        if self.config.ctc_encoder_layer is not None:
            heads.append(self.encoder.ctc_fc(hidden_states[self.config.ctc_encoder_layer - 1]))
        if self.config.final_ctc:
            heads.append(self.encoder.final_ctc_fc(hidden_states[-1]))
        return heads


def read_pieces(path: Path) -> sentencepiece.SentencePieceProcessor:
    """Load a SentencePiece model. ValueError: the file is damaged or something else."""
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged or no SentencePiece model: download it again.") from error


class Vocabulary:
    """A SentencePiece model whose pieces have other ids, as in fairseq's dictionaries.

    It has the methods of SentencePieceProcessor that the kit uses.

    spm_file: the SentencePiece model; vocab_file: a JSON object with the id of every piece (transformers' vocab.json).
    """

    def __init__(self, spm_file: Path, vocab_file: Path):
        self.processor = read_pieces(spm_file)
        try:
            ids = json.loads(vocab_file.read_text(encoding="utf-8"))
            self.pieces = sorted(ids, key=ids.get)
        except (ValueError, AttributeError, TypeError) as error:
            raise ValueError(
                f"{vocab_file} is not a JSON object of pieces and their ids: download it again."
            ) from error
        if [ids[piece] for piece in self.pieces] != list(range(len(ids))):
            raise ValueError(f"{vocab_file} does not number its {len(ids)} pieces from 0: download it again.")

    def __len__(self) -> int:
        return len(self.pieces)

    def id_to_piece(self, token: int) -> str:
        return self.pieces[token]

    def decode(self, ids: list[int]) -> str:
        return self.processor.decode([self.pieces[token] for token in ids])

    def encode(self, text: str) -> list[int]:
        ids = {piece: token for token, piece in enumerate(self.pieces)}
        return [ids.get(piece, ids["<unk>"]) for piece in self.processor.encode(text, out_type=str)]


class ConformerModel(Seq2SeqModel):
    """A trained Conformer with the interface of `S2TModel`.

    Models that start with </s>, as the reference's do, write no special token except </s>: their authors decode with a
    penalty of 10,000 on <unk>.
    """

    frame_seconds, first_frame = FRAME_SECONDS, WINDOW_SECONDS / 2
    band_centres = mel_centres()
    subsampling = SUBSAMPLING

    def __init__(self, network: ConformerForConditionalGeneration, tokenizer, source: str, weights_hash: str):
        super().__init__(network, source, weights_hash)
        self.tokenizer, self.languages = tokenizer, tuple(self.config.language_ids or {})
        if tokenizer is not None:  # training uses the network alone
            self._check_vocabulary()
        self.padding_safe = not self.config.batch_unsafe_relative_shift

    def _check_vocabulary(self) -> None:
        size, ids, source = self.config.vocab_size, self.config.language_ids or {}, self.source
        if len(self.tokenizer) != size:
            raise ValueError(
                f"The vocabulary of {source} has {len(self.tokenizer)} pieces, but the model has {size}: give its own."
            )
        if not ids or not all(token is None or type(token) is int and 0 <= token < size for token in ids.values()):
            raise ValueError(
                f"language_ids in the config.json of {source} are {self.config.language_ids}, but languages with token "
                f"ids below {size} are needed: download or train the model again."
            )
        if self.config.starts_with_eos:
            never = {token for token in range(size) if self.tokenizer.id_to_piece(token) in NEVER_WRITTEN}
            tags = {token for token in ids.values() if token is not None}
            self.network.generation_config.suppress_tokens = sorted(never | tags)

    @classmethod
    def from_folder(cls, folder: str | Path, device: str = "cpu") -> "ConformerModel":
        """Load a folder with config.json, model.safetensors and spm.model, in float32.

        If token ids differ from those of the SentencePiece model, vocab.json holds them (see `Vocabulary`).
        """
        folder = Path(folder)
        for name in ("config.json", "model.safetensors", "spm.model"):
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"The model folder {folder} has no {name}: give the folder of a trained model, "
                    "such as data/models/base, or train one with `make train`."
                )
        network = load_network(ConformerForConditionalGeneration, folder)
        if (folder / "vocab.json").is_file():
            tokenizer = Vocabulary(folder / "spm.model", folder / "vocab.json")
        else:
            tokenizer = read_pieces(folder / "spm.model")
        return cls(network.to(device), tokenizer, str(folder), folder_hash(folder))

    def features(self, audio: np.ndarray) -> Tensor:
        """Return normalised log-mel features (T, F), the model's input, for 16 kHz mono audio (samples,)."""
        return torch.from_numpy(cmvn(log_mel(audio))).to(self.device)

    def prompt(self, direction: str) -> Tensor:
        """Return the decoder's first tokens (P,): </s> if the model starts with it, then the target language's tag."""
        first = self.config.eos_token_id if self.config.starts_with_eos else None
        prompt = [token for token in (first, self.config.language_ids[self.target(direction)]) if token is not None]
        return torch.tensor(prompt, device=self.device)

    def token_ids(self, text: str) -> Tensor:
        """Return the ids (I,) that the model would write for `text`, ending with </s>."""
        return torch.tensor([*self.tokenizer.encode(text), self.config.eos_token_id], device=self.device)

    def encode(self, features: Tensor) -> Tensor:
        """Return encoder states (B, S, D) for unpadded features (B, T, F)."""
        return self.network.encoder(features).last_hidden_state

    def tokens(self, ids: Tensor) -> list[str]:
        """Return the subword strings of token ids (I,)."""
        return [self.tokenizer.id_to_piece(int(token)) for token in ids]

    def text(self, ids: Tensor) -> str:
        """Return the text that token ids (I,) spell, without special tokens."""
        special = {self.config.eos_token_id, self.config.pad_token_id, *self.config.language_ids.values()}
        return self.tokenizer.decode([int(token) for token in ids if int(token) not in special])
