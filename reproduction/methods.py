"""Every attribution on one table: the methods, and the measures that judge them.

A method is a function from an `Explained` utterance to a labelled array over (token, ...), larger where a token depends
more on the input. To add one, write the function and give it a row in METHODS.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr

from xattn.attribution.attention import (
    attention_times_gradient,
    by_entropy,
    by_norm,
    norm_weighted,
    of_heads,
    rollout,
)
from xattn.attribution.estimators import estimate
from xattn.attribution.forced import Forced
from xattn.attribution.gradients import gradient, gradient_times_input, integrated_gradients, masked_gradients
from xattn.attribution.segments import partition
from xattn.attribution.variants import occlude_input, runners_up, word_units
from xattn.data.utterance import Utterance
from xattn.maps import masks_of
from xattn.models import S2TModel
from xattn.words import word_times

WINDOWS, WORDS = 300, 100  # masks of the occlusion of windows and of words
POINTS = 8  # inputs that integrated and masked gradients average over
REGRESSED = 4000  # masks of a regression, whose time grows with their third power


@dataclass(frozen=True)
class Explained:
    """An utterance with its maps.

    layer, head: the best layer, and the best pair of layer and head, on other utterances.
    seed: another one gives other masks.
    """

    maps: xr.Dataset
    forced: Forced
    utterance: Utterance
    layer: int
    head: tuple[int, int]
    seed: int = 0

    @property
    def attention(self) -> xr.DataArray:
        return self.maps.cross_attention

    @property
    def seeded(self) -> xr.Dataset:
        """The maps with the seed, from which masks are drawn."""
        return self.maps.assign_attrs(seed=self.seed)


Method = Callable[[Explained], xr.DataArray]


def _alignment_heads(each: Explained) -> xr.DataArray:
    pairs = each.forced.model.network.generation_config.alignment_heads
    return of_heads(each.attention, [(layer + 1, head + 1) for layer, head in pairs])


def _stored(place: str, estimator: str) -> Method:
    """The map of a place from the first REGRESSED of the stored scores, by another estimator."""

    def method(each: Explained) -> xr.DataArray:
        masks, scores = masks_of(each.maps, place), each.maps[f"{place}_scores"].values[:REGRESSED]
        cells = estimate(scores, masks, estimator).cells(masks.partition.labels)
        return each.maps[f"{place}_saliency"].copy(data=cells)

    return method


def _windows(each: Explained) -> xr.DataArray:
    levels = partition(each.maps.features.values, "windows", each.forced.model.frame_seconds)
    return occlude_input(each.forced, each.seeded, levels, WINDOWS)


def _words(each: Explained) -> xr.DataArray:
    """Occlusion of words, at their known times or else at those that attention gives."""
    times = [(word.start, word.end) for word in each.utterance.words] or word_times(each.maps)[["start", "end"]].values
    return occlude_input(each.forced, each.seeded, word_units(each.maps, times), WORDS)


def _contrast(each: Explained) -> xr.DataArray:
    return integrated_gradients(each.forced, each.maps, foils=runners_up(each.forced), steps=POINTS)


def _magnitude(method: Callable, place: str, **options) -> Method:
    return lambda each: abs(method(each.forced, each.seeded, place, **options))


def _for_all_tokens(steps: np.ndarray, each: Explained) -> xr.DataArray:
    """The same values (step,) or (token, step) for all tokens, as an array (token, step)."""
    labels = each.maps.encoder_saliency
    return labels.copy(data=np.broadcast_to(steps, labels.shape).astype(np.float64))


def _energy(each: Explained) -> xr.DataArray:
    cells = each.maps.features.values
    return each.maps.input_saliency.copy(data=np.broadcast_to(cells, each.maps.input_saliency.shape))


def _random(each: Explained) -> xr.DataArray:
    rng = np.random.default_rng([each.seed, *each.maps.utterance.encode()])
    return _for_all_tokens(rng.random(each.maps.encoder_saliency.shape), each)


def _reading_order(each: Explained) -> xr.DataArray:
    """As if all tokens lasted equally long: nearness to the token's place on the diagonal."""
    tokens, steps = each.maps.encoder_saliency.shape
    centres = (np.arange(tokens) + 0.5)[:, None] / tokens
    return _for_all_tokens(-abs((np.arange(steps) + 0.5) / steps - centres), each)


@torch.inference_mode()
def _ctc(each: Explained) -> xr.DataArray:
    """The probability of each token at each step, by the model's CTC head on the encoder's output."""
    network, features = each.forced.model.network, each.forced.features
    logits = network.ctc_logits(network.encoder(features[None]).hidden_states)[-1][0]  # (S, V)
    return _for_all_tokens(logits.softmax(dim=-1).T[each.forced.ids].cpu().numpy(), each)


METHODS: dict[str, Method] = {
    "attention: all heads": lambda each: each.attention.mean(["layer", "head"]),
    "attention: last layer": lambda each: each.attention.isel(layer=-1, drop=True).mean("head"),
    "attention: best layer": lambda each: each.attention.sel(layer=each.layer, drop=True).mean("head"),
    "attention: best head": lambda each: of_heads(each.attention, [each.head]),
    "attention: low entropy": lambda each: by_entropy(each.attention),
    "attention: large norm": lambda each: by_norm(each.attention),
    "attention: alignment heads": _alignment_heads,
    "attention: norm of values": lambda each: norm_weighted(each.forced, each.maps).mean(["layer", "head"]),
    "attention x gradient": lambda each: attention_times_gradient(each.forced, each.maps).mean(["layer", "head"]),
    "attention rollout": lambda each: rollout(each.forced, each.maps),
    "gradient": _magnitude(gradient, "input"),
    "gradient x input": _magnitude(gradient_times_input, "input"),
    "integrated gradients": _magnitude(integrated_gradients, "input", steps=POINTS),
    "masked gradients": _magnitude(masked_gradients, "input", masks=POINTS),
    "integrated gradients, contrast": lambda each: abs(_contrast(each)),
    "gradient, encoder": _magnitude(gradient, "encoder"),
    "gradient x input, encoder": _magnitude(gradient_times_input, "encoder"),
    "integrated gradients, encoder": _magnitude(integrated_gradients, "encoder", steps=POINTS),
    "masked gradients, encoder": _magnitude(masked_gradients, "encoder", masks=POINTS),
    "SM^X": lambda each: each.maps.input_saliency,
    "SM^X, regression": _stored("input", "sqrt_ridge"),
    "windows": _windows,
    "words": _words,
    "SM^H": lambda each: each.maps.encoder_saliency,
    "SM^H, regression": _stored("encoder", "sqrt_ridge"),
    "CTC": _ctc,
    "reading order": _reading_order,
    "energy": _energy,
    "random": _random,
}
STORED = ("SM^X", "SM^X, regression", "SM^H", "SM^H, regression")  # from scores that are stored with the maps
RANDOM = ("masked gradients", "masked gradients, encoder", "windows", "words", "random")  # depend on a seed
BASELINES = ("reading order", "energy", "random")


def methods_of(model: S2TModel, maps: xr.Dataset) -> list[str]:
    """The methods that a model and its maps allow."""
    missing = set() if hasattr(model.network, "ctc_logits") else {"CTC"}
    if getattr(model.network.generation_config, "alignment_heads", None) is None:
        missing.add("attention: alignment heads")
    if maps.partition == "windows":
        missing |= {"windows", "SM^X, regression", "SM^H, regression"}  # SM^X is the first of these
    return [name for name in METHODS if name not in missing]
