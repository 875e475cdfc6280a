"""Cross-attention of a forced decoding."""

import numpy as np
import torch

from xattn.models import S2TModel


def cross_attention(model: S2TModel, states: torch.Tensor, decoder_input_ids: torch.Tensor) -> np.ndarray:
    """Attention weights of every decoder layer and head over the encoder steps (paper, section 3: CA).

    They come from one teacher-forced pass over the hypothesis, because the weights seen during beam search belong to
    other beams.

    Args:
        states: encoder states of one utterance, (1, step, width).
        decoder_input_ids: the prompt and the hypothesis without its last token, (token,).

    Returns:
        float32 (layer, head, token, step); each row sums to 1.

    Raises:
        RuntimeError: rows do not sum to 1, so the model does not return attention weights.
    """
    weights = model.cross_attention(states, decoder_input_ids).float().cpu()
    error = (weights.sum(dim=-1) - 1).abs().max()
    if not error < 1e-3:
        raise RuntimeError(
            f"The cross-attention rows of {model.name} sum to 1 only within {error:.2g}: the model class has to return "
            "softmax weights."
        )
    return weights.numpy()
