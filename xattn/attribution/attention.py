"""Cross-attention of a forced decoding, and what is made of its heads.

Functions that take `attention` expect (layer, head, token, step), such as `maps.cross_attention`, and leave it to the
comparison to standardise over tokens. Weights that a model spends on padding are not part of maps.
"""

from collections.abc import Iterable

import numpy as np
import torch
import xarray as xr
from scipy import stats

from xattn.attribution.forced import Forced
from xattn.models import S2TModel

HEADS = 10  # that `by_norm` chooses


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
    weights = torch.stack(model.attentions(states, decoder_input_ids).cross)[:, 0].float().cpu()
    error = (weights.sum(dim=-1) - 1).abs().max()
    if not error < 1e-3:
        raise RuntimeError(
            f"The cross-attention rows of {model.name} sum to 1 only within {error:.2g}: the model class has to return "
            "softmax weights."
        )
    return weights.numpy()


def entropies(attention: xr.DataArray) -> xr.DataArray:
    """Entropy of each head's weights, averaged over tokens: (layer, head), 0 to 1.

    Weights are scaled to a sum of 1 over the steps at hand, and the entropy is divided by that of uniform weights.
    """
    values = stats.entropy(attention.transpose("layer", "head", "token", "step").values, axis=-1)
    labels = attention.isel(token=0, step=0, drop=True)
    return labels.copy(data=values.mean(axis=-1) / np.log(attention.sizes["step"])).rename("entropy")


def by_entropy(attention: xr.DataArray) -> xr.DataArray:
    """Average all heads, weighted by 1 - `entropies`, so that focused heads count more: (token, step).

    This follows the idea of LEAF-X (Kumar et al. 2026, arXiv 2606.14647) that heads with a low entropy matter most; the
    weights are ours.
    """
    return attention.weighted(1 - entropies(attention)).mean(["layer", "head"])


def by_norm(attention: xr.DataArray, heads: int = HEADS) -> xr.DataArray:
    """Average the heads whose weights have the largest norms in this utterance: (token, step).

    A head's score is the sum over steps of the norm over tokens, plus the sum over tokens of the norm over steps: it is
    high for heads that are focused and cover the recording. Each step of a chosen head is divided by its norm over
    tokens first (Yeh et al. 2025, arXiv 2509.09987, without their characters and median filter).
    """
    columns, rows = (np.sqrt((attention**2).sum(axis)) for axis in ("token", "step"))
    scores = (columns.sum("step") + rows.sum("token")).stack(pair=["layer", "head"])
    chosen = scores.pair.values[np.argsort(-scores.values, kind="stable")[:heads]]
    columns = columns.where(columns > 0, 1)
    return of_heads(attention / columns, chosen)


def of_heads(attention: xr.DataArray, pairs: Iterable[tuple[int, int]]) -> xr.DataArray:
    """Average the heads with these numbers of layer and head, which count from 1: (token, step)."""
    layers, heads = (xr.DataArray([*numbers], dims="pair") for numbers in zip(*pairs, strict=True))
    return attention.sel(layer=layers, head=heads).mean("pair")


def norm_weighted(forced: Forced, maps: xr.Dataset) -> xr.DataArray:
    """Attention times the norm of what each step contributes through it (Kobayashi et al. 2020, arXiv 2004.10102).

    A small weight on a large value can matter more than a large weight on a small one. Returns (layer, head, token,
    step).
    """
    with torch.no_grad():
        norms = forced.model.value_norms(forced.encode(forced.features)).float().cpu().numpy()
    attention = maps.cross_attention
    return (attention * norms[:, :, None, : attention.sizes["step"]]).rename("attention_norm")


def attention_times_gradient(forced: Forced, maps: xr.Dataset, foils: torch.Tensor | None = None) -> xr.DataArray:
    """Attention times its gradient, where both raise a token's log-probability: (layer, head, token, step).

    The gradient is the one of each token's log-probability with respect to its own row of weights, and negative
    products become 0 (Chefer et al. 2021, arXiv 2103.15679, equation 5, without the rules for other layers).

    foils: see `xattn.attribution.gradients.gradient`.
    """
    with torch.enable_grad():
        states = forced.encode(forced.features).detach().requires_grad_()
        attentions = forced.model.attentions(states, forced.decoder_inputs)
        values = forced.values(attentions.log_p[None], foils)[0]
        products, first = [], forced.rows.start
        for row, value in enumerate(values):
            gradients = torch.autograd.grad(value, attentions.cross, retain_graph=True)
            pairs = zip(attentions.cross, gradients, strict=True)
            products.append(torch.stack([(a * g)[0, :, first + row].clamp(min=0) for a, g in pairs]))
    found = torch.stack(products, dim=2).detach().float().cpu().numpy()  # (L, H, I, S)
    attention = maps.cross_attention
    return attention.copy(data=found[..., : attention.sizes["step"]]).rename("attention_times_gradient")


def rollout(forced: Forced, maps: xr.Dataset) -> xr.DataArray:
    """Attention rolled out over the decoder's layers (Abnar and Zuidema 2020, arXiv 2005.00928): (token, step).

    Heads are averaged, and half of every attention layer's output is its residual. What a token takes from earlier
    tokens carries their shares of the encoder steps along. The encoder itself is not rolled out, as its convolutions
    mix steps without any weights to follow.
    """
    with torch.no_grad():
        attentions = forced.model.attentions(forced.encode(forced.features), forced.decoder_inputs)
        shares = torch.zeros_like(attentions.cross[0][0, 0])  # (positions, S)
        for own, cross in zip(attentions.own, attentions.cross, strict=True):
            shares = (own[0].mean(dim=0) @ shares + shares) / 2
            shares = (cross[0].mean(dim=0) + shares) / 2
    labels = maps.cross_attention.isel(layer=0, head=0, drop=True)
    found = shares[forced.rows, : labels.sizes["step"]].float().cpu().numpy()
    return labels.copy(data=found).rename("rollout")
