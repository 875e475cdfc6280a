"""Attribution by gradients of each token's log-probability, with respect to the input or to the encoder's output.

All functions take maps of `xattn.explain` and return a labelled array with signs: (token, time, mel) for the input,
(token, step) for the encoder's output. The reference point is the one of the kit's occlusion: an input, or encoder
states, of zeros.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from xattn.attribution.forced import Forced

STEPS = 16  # points of a path, or random masks
PLACES = ("input", "encoder")
MASKED = 0.5  # share of the cells, or steps, that a random mask hides


def gradient(forced: Forced, maps: xr.Dataset, place: str = "input", foils: Tensor | None = None) -> xr.DataArray:
    """The magnitude of the gradient (Simonyan et al. 2014, arXiv 1312.6034): how sensitive a token is to each cell.

    Args:
        place: "input" or "encoder"; the magnitude of a step of the encoder's output is the norm over its width.
        foils: explain why each token was written instead of another one: ids (I,), see `Forced.values`.
    """
    function, point = _function(forced, place, foils)
    found = _jacobian(function, point)
    return _labelled(found.abs() if place == "input" else found.norm(dim=-1), maps, place, "gradient")


def gradient_times_input(
    forced: Forced, maps: xr.Dataset, place: str = "input", foils: Tensor | None = None
) -> xr.DataArray:
    """Gradient times input (Shrikumar et al. 2017, arXiv 1704.02685): the effect of each cell to first order."""
    function, point = _function(forced, place, foils)
    return _labelled(_contribution(function, [point], point), maps, place, "gradient_times_input")


def integrated_gradients(
    forced: Forced, maps: xr.Dataset, place: str = "input", foils: Tensor | None = None, steps: int = STEPS
) -> xr.DataArray:
    """Integrated gradients (Sundararajan et al. 2017, arXiv 1703.01365) along the line from zeros to the input.

    Args:
        steps: points of the midpoint rule.

    Returns:
        An array with the attribute `completeness_error`: by how much the sum over all cells misses the change of the
        log-probability, relative to that change, both summed over tokens.
    """
    function, point = _function(forced, place, foils)
    found = _contribution(function, ((index + 0.5) / steps * point for index in range(steps)), point)
    with torch.no_grad():
        change = function(point) - function(torch.zeros_like(point))  # (I,)
    missed = found.flatten(1).sum(dim=1) - change
    array = _labelled(found, maps, place, "integrated_gradients")
    return array.assign_attrs(completeness_error=float(missed.abs().sum() / change.abs().sum()))


def masked_gradients(
    forced: Forced, maps: xr.Dataset, place: str = "input", foils: Tensor | None = None, masks: int = STEPS
) -> xr.DataArray:
    """Gradient times input, averaged over inputs in which a random half of the cells, or of the steps, is 0.

    A gradient at the input itself describes an infinitesimal change; occlusion looks at points like these.
    """
    function, point = _function(forced, place, foils)
    rng = np.random.default_rng([maps.seed, *maps.utterance.encode()])
    shape = point.shape if place == "input" else (*point.shape[:-1], 1)
    keeps = (torch.from_numpy(rng.random(shape) >= MASKED).to(point) for _ in range(masks))
    found = sum(_contribution(function, [point * keep], point * keep) for keep in keeps) / masks
    return _labelled(found, maps, place, "masked_gradients")


def _function(forced: Forced, place: str, foils: Tensor | None) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """The values (I,) as a function of the features (T, F) or of the encoder states (1, S, D), and their point."""

    def of_states(states: Tensor) -> Tensor:
        return forced.values(forced.model.decode(states, forced.decoder_inputs), foils)[0]

    if place not in PLACES:
        raise ValueError(f"There is no place {place!r}: choose one of {', '.join(PLACES)}.")
    if place == "encoder":
        with torch.no_grad():
            return of_states, forced.encode(forced.features)
    return lambda features: of_states(forced.encode(features)), forced.features


def _jacobian(function: Callable[[Tensor], Tensor], point: Tensor) -> Tensor:
    """Gradients of all values at a point: (I, *point.shape)."""
    with torch.enable_grad():
        point = point.detach().clone().requires_grad_()
        values = function(point)
        last = len(values) - 1
        return torch.stack(
            [torch.autograd.grad(value, point, retain_graph=row < last)[0] for row, value in enumerate(values)]
        )


def _contribution(function: Callable[[Tensor], Tensor], points: Iterable[Tensor], factor: Tensor) -> Tensor:
    """The mean gradient over points, times a factor: (I, T, F), or (I, 1, S), summed over the width, for states."""
    gradients = [_jacobian(function, point) for point in points]
    found = sum(gradients) / len(gradients) * factor
    return found if found.ndim == 3 else found.sum(dim=-1)


def _labelled(found: Tensor, maps: xr.Dataset, place: str, name: str) -> xr.DataArray:
    """Give an array (I, T, F) the labels of input_saliency, and (I, 1, S) those of encoder_saliency."""
    labels = maps[f"{place}_saliency"]
    values = found.cpu().numpy() if place == "input" else found[:, 0, : labels.sizes["step"]].cpu().numpy()
    return labels.copy(data=values.astype(np.float64)).rename(name).assign_attrs({})
