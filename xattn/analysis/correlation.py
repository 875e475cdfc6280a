"""Correlation of attention with saliency (paper, section 3.3)."""

from collections.abc import Iterable

import numpy as np
import xarray as xr
from scipy import stats

from xattn.analysis.normalisation import standardise, standardise_over_tokens
from xattn.analysis.reliability import halves_of, is_linear, split_half_reliability
from xattn.maps import SALIENCIES, drop_special_tokens, on_steps, padding_share


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
        ValueError: the first array is not over steps, the second not over steps or time; the arrays explain different
            tokens, share fewer than two or no step; or one of them is constant.
    """
    if not ("token" in attention.dims and "token" in saliency.dims):
        raise ValueError("rho compares several tokens, but an array has no axis token: select several tokens.")
    if "step" not in attention.dims:
        raise ValueError("The first array has no axis step: give attention first and saliency second.")
    if not {"step", "time"} & set(saliency.dims):
        raise ValueError("The second array has no axis step or time: give a saliency of the input or of the encoder.")
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
    return _correlate_normalised(_averages(attention), found)


def _averages(attention: xr.DataArray) -> dict[str, xr.DataArray]:
    """The attention and its averages, normalised, by the names of the variables of `correlate`."""
    axes = [axis for axis in ("layer", "head") if axis in attention.dims]
    kept_axes = {"overall": [], **{f"by_{axis}": [axis] for axis in axes}}
    if len(axes) == 2:
        kept_axes["by_layer_and_head"] = axes
    found = {}
    for name, kept in kept_axes.items():
        averaged = attention
        for axis in reversed(axes):  # heads first, as rounding depends on the order
            averaged = averaged if axis in kept else averaged.mean(axis)
        found[name] = normalised_attention(averaged)
    return found


def _correlate_normalised(averages: dict[str, xr.DataArray], saliency: xr.DataArray) -> xr.Dataset:
    """`correlate` with arrays that are normalised already and have the same steps; saliency: (token, step)."""
    return xr.Dataset({name: _rho(attention, saliency) for name, attention in averages.items()})


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
    """`correlate` for every utterance of a model and direction, with both kinds of saliency.

    Args:
        maps: datasets of `xattn.explain` or `xattn.load_maps`, of one model and direction.
        reduction: see `correlate`.

    Returns:
        The variables of `correlate` with the dimensions saliency, masks and utterance in front. saliency is "input"
        (SM^X) and "encoder" (SM^H), or "input" alone for maps without SM^H. masks is "all" or "half": the mean of rho
        with the maps from the two disjoint halves of the masks, from which `xattn.analysis.reliability.converged`
        estimates rho without noise; it is NaN for maps without halves. The variable `reliability` (saliency, utterance)
        holds for the reduction. `padding` (utterance) is the share of the attention that falls on padding, for models
        that pad. The attribute `linear` lists the saliencies whose map is linear in the scores,
        `without_scores` those whose noise is unknown, because their maps came without scores.
    """
    rows = []
    for item in maps:
        try:
            rho = {name: _all_and_half(item, name, reduction) for name in saliencies_of(item)}
        except ValueError as error:
            raise ValueError(f"{item.model}, {item.setting}, {item.utterance}: {error}") from error
        names = [name.removesuffix("_saliency") for name in rho]
        row = xr.concat(rho.values(), xr.DataArray(names, dims="saliency", name="saliency"))
        if "padding_attention" in item:
            row["padding"] = padding_share(item)
        rows.append(row.expand_dims(utterance=[item.utterance]))
    joined = xr.concat(rows, "utterance").transpose("saliency", "masks", "utterance", "layer", "head")
    about = {name: item.attrs[name] for name in ("model", "setting", "estimator")}
    unknown = [name for name in joined.saliency.values.tolist() if f"{name}_scores" not in item]
    linear = [place for place in ("input", "encoder") if is_linear(item, place, reduction)]
    return joined.assign_attrs(about, linear=linear, without_scores=unknown)


def _all_and_half(maps: xr.Dataset, saliency: str, reduction: str) -> xr.Dataset:
    """`correlate` for the map of all masks and, on average, for those of the two halves; with their reliability."""
    rho = correlate(maps.cross_attention, maps[saliency], reduction)
    half, halves = xr.full_like(rho, np.nan), halves_of(maps, saliency, reduction)
    if halves is not None:
        halves = drop_special_tokens(halves)
        averages = _averages(maps.cross_attention)
        half = xr.concat([_correlate_normalised(averages, each) for each in halves], "half").mean("half")
    both = xr.concat([rho, half], xr.DataArray(["all", "half"], dims="masks", name="masks"))
    return both.assign(reliability=split_half_reliability(None if halves is None else halves.values))


def saliencies_of(maps: xr.Dataset) -> list[str]:
    """The saliency variables that the maps hold; those of other tools may lack encoder_saliency."""
    return [name for name in SALIENCIES if name in maps]
