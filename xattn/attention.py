"""Cross-attention of a forced decoding, and its means over layers and heads."""

import numpy as np
import torch
import xarray as xr

from xattn.models import S2TModel

MEAN = "mean"  # label of the mean over an axis


def cross_attention(model: S2TModel, states: torch.Tensor, decoder_input_ids: torch.Tensor) -> np.ndarray:
    """Attention weights of every decoder layer and head over the encoder steps (paper, definitions: CA).

    One teacher-forced pass over the hypothesis, because the weights seen during beam search belong to other beams.

    Args:
        states: encoder states of one utterance, (1, step, width).
        decoder_input_ids: the prompt and the hypothesis without its last token, (token,).

    Returns:
        float32 (layer, head, token, step); each row sums to 1.

    Raises:
        RuntimeError: the model's rows do not sum to 1, so they are not attention weights.
    """
    weights = model.cross_attention(states, decoder_input_ids).float().cpu()
    error = (weights.sum(dim=-1) - 1).abs().max()
    if not error < 1e-3:
        raise RuntimeError(
            f"The cross-attention rows of {model.name} sum to 1 only within {error:.2g}: "
            "load the model with eager attention."
        )
    return weights.numpy()


def with_means(attention: xr.DataArray) -> xr.DataArray:
    """Append the plain means over heads, over layers and over both to (layer, head, token, step).

    The result has layers 1..L and "mean", heads 1..H and "mean": (layer, mean) is the mean of a layer's heads, (mean,
    head) that of one head index over all layers, and (mean, mean) that of everything (paper, definitions).
    """
    for axis in ("head", "layer"):
        mean = attention.mean(axis).assign_coords({axis: MEAN}).expand_dims(axis)
        labels = [*attention[axis].values.tolist(), MEAN]
        attention = xr.concat([attention.assign_coords({axis: labels[:-1]}), mean], dim=axis)
        attention = attention.assign_coords({axis: np.array(labels, dtype=object)})
    return attention.transpose("layer", "head", "token", "step")
