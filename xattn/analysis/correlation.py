"""Correlation of attention with saliency (paper, section 3.3)."""

from collections.abc import Iterable

import numpy as np
import xarray as xr
from scipy import stats

from xattn.analysis.normalisation import standardise, standardise_over_tokens
from xattn.maps import SALIENCIES, drop_special_tokens, on_steps


def normalised_attention(attention: xr.DataArray) -> xr.DataArray:
    """Attention (..., token, step) as it is compared: special tokens dropped, each step standardised over tokens."""
    attention = drop_special_tokens(attention).transpose(..., "token", "step")
    return attention.copy(data=standardise_over_tokens(attention.values))


def normalised_saliency(
    saliency: xr.DataArray, steps: xr.DataArray | xr.Dataset, reduction: str = "2d_max"
) -> xr.DataArray:
    """Saliency as it is compared: special tokens dropped, each token's map standardised, then reduced to steps.

    saliency, steps, reduction: see `xattn.maps.on_steps`. Returns (token, step).
    """
    saliency = drop_special_tokens(saliency).transpose("token", ...)
    return on_steps(saliency.copy(data=standardise(saliency.values)), steps, reduction)


def correlate(attention: xr.DataArray, saliency: xr.DataArray, reduction: str = "2d_max") -> xr.Dataset:
    """Correlate attention with saliency: rho of every layer and head, and of their averages.

    rho is Pearson's correlation of the two flattened token x step matrices. Special tokens are dropped, attention is
    standardised over tokens and saliency per token first (paper, section 3.3).

    Args:
        attention: (layer, head, token, step) such as `maps.cross_attention`; layer and head can be missing.
        saliency: (token, time, mel) such as `maps.input_saliency`, or (token, step) such as `maps.encoder_saliency`.
        reduction: how cells are reduced to steps; see `xattn.maps.reduce_to_steps`.

    Returns:
        by_layer_and_head (layer, head); by_layer (layer), for attention averaged over heads; by_head (head), for
        attention averaged over layers; overall (), averaged over both. Averages over a missing axis are left out.

    Raises:
        ValueError: the arrays explain different tokens, share fewer than two or no step, or one of them is constant.
    """
    if not ("token" in attention.dims and "token" in saliency.dims):
        raise ValueError("rho compares several tokens, but an array has no axis token: select several tokens.")
    if not np.array_equal(attention.token.values, saliency.token.values):
        raise ValueError("The two arrays explain different tokens: select the same tokens in both.")
    found = normalised_saliency(saliency, attention, reduction)
    if found.sizes["token"] < 2:
        raise ValueError("The maps have fewer than two tokens besides </s>: rho needs two or more.")
    found = found.sel(step=np.isin(found.step.values, attention.step.values))
    attention = attention.sel(step=np.isin(attention.step.values, found.step.values))
    if not found.sizes["step"]:
        raise ValueError("The two arrays share no step: select the same stretch of time in both.")
    if not found.values.any():
        raise ValueError("The saliency is the same everywhere: explain the utterance again with more masks.")
    axes = [axis for axis in ("layer", "head") if axis in attention.dims]
    kept_axes = {"overall": [], **{f"by_{axis}": [axis] for axis in axes}}
    if len(axes) == 2:
        kept_axes["by_layer_and_head"] = axes
    rho = {}
    for name, kept in kept_axes.items():
        averaged = attention
        for axis in reversed(axes):  # heads first, as rounding depends on the order
            averaged = averaged if axis in kept else averaged.mean(axis)
        rho[name] = _rho(normalised_attention(averaged), found)
    return xr.Dataset(rho)


def _rho(attention: xr.DataArray, saliency: xr.DataArray) -> xr.DataArray:
    """Pearson's correlation of (..., token, step) with (token, step): (...)."""
    flat = attention.values.reshape(*attention.shape[:-2], -1)
    constant = ~flat.any(axis=-1)
    if constant.any():
        where = attention.isel(token=0, step=0)[tuple(np.argwhere(constant)[0])]
        place = ", ".join(f"{axis} {where[axis].item()}" for axis in attention.dims[:-2]) or "all heads together"
        raise ValueError(
            f"The attention of {place} never changes, so it correlates with nothing: check the model, or leave out the "
            "utterance."
        )
    rho = stats.pearsonr(flat, saliency.values.reshape(*[1] * (flat.ndim - 1), -1), axis=-1).statistic
    return attention.isel(token=0, step=0, drop=True).copy(data=rho)


def correlate_all(maps: Iterable[xr.Dataset], reduction: str = "2d_max") -> xr.Dataset:
    """`correlate` for every utterance of a model and direction, with both kinds of saliency and their difference.

    Args:
        maps: datasets of `xattn.explain` or `xattn.load_maps`, of one model and direction.

    Returns:
        The variables of `correlate` with the dimensions saliency and utterance in front. saliency is "input" (SM^X),
        "encoder" (SM^H) and "difference" (encoder minus input), or "input" alone for maps without SM^H. The variable
        `reliability` (saliency, utterance) is the stored one, which holds for "2d_max"; the difference has none (NaN).
    """
    rows = []
    for item in maps:
        try:
            rho = {name: correlate(item.cross_attention, item[name], reduction) for name in saliencies_of(item)}
        except ValueError as error:
            raise ValueError(f"{item.model}, {item.setting}, {item.utterance}: {error}") from error
        rho = {name.removesuffix("_saliency"): each for name, each in rho.items()}
        rho = {name: each.assign(reliability=item.attrs[f"{name}_reliability"]) for name, each in rho.items()}
        if len(rho) == len(SALIENCIES):
            rho["difference"] = (rho["encoder"] - rho["input"]).assign(reliability=np.nan)
        row = xr.concat(rho.values(), xr.DataArray([*rho], dims="saliency", name="saliency"))
        rows.append(row.expand_dims(utterance=[item.utterance]))
    joined = xr.concat(rows, "utterance").transpose("saliency", "utterance", "layer", "head")
    return joined.assign_attrs(model=item.model, setting=item.setting, estimator=item.estimator)


def saliencies_of(maps: xr.Dataset) -> list[str]:
    """The saliency variables that the maps hold; those of other tools may lack encoder_saliency."""
    return [name for name in SALIENCIES if name in maps]
