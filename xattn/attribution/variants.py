"""Occlusion beyond the two saliency maps: of words, for a contrast, and of previous tokens."""

from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr

from xattn.attribution.estimators import estimate
from xattn.attribution.forced import Forced
from xattn.attribution.occlusion import Masks, Partition, divergence_from, kl_divergence, occlude


@torch.inference_mode()
def occlude_input(
    forced: Forced,
    maps: xr.Dataset,
    levels: np.ndarray,
    number: int,
    p: float = 0.5,
    estimator: str = "sqrt_ridge",
    foils: torch.Tensor | None = None,
) -> xr.DataArray:
    """Saliency of the input from masks over any units: (token, time, mel).

    Args:
        levels: (level, time, mel), the unit of each cell, from 0 at every level, such as `word_units`.
        number, p, estimator: perturbations, the probability with which each hides a unit, and how they become a map.
        foils: explain why each token was written instead of another one, ids (I,). The score is then the drop of the
            log-ratio of the two instead of the divergence of the whole distribution; it can be negative, so the
            estimator has to be "mean" or "ridge".

    Raises:
        ValueError: the estimator takes square roots of scores that can be negative.
    """
    if foils is not None and estimator.startswith("sqrt_"):
        raise ValueError(f"A contrast has negative scores, and {estimator} takes their roots: choose mean or ridge.")
    model, rows = forced.model, forced.rows
    log_p = model.decode(forced.encode(forced.features), forced.decoder_inputs)
    divergence, whole = divergence_from(log_p[0, rows]), forced.values(log_p, foils)

    def score(keep: torch.Tensor) -> torch.Tensor:
        perturbed = model.decode(model.encode(model.mask_input(forced.features, keep)), forced.decoder_inputs)
        return divergence(perturbed[:, rows]) if foils is None else whole - forced.values(perturbed, foils)

    masks = Masks(Partition.of(levels), number, p, int(maps.seed), f"{maps.utterance}/units")
    scores = occlude(score, masks, batch_size=model.batch_size, device=forced.features.device)
    cells = estimate(scores, masks, estimator).cells(masks.partition.labels)
    return maps.input_saliency.copy(data=cells).rename("occlusion").assign_attrs({})


def word_units(maps: xr.Dataset, times: Sequence[tuple[float, float]]) -> np.ndarray:
    """Units that follow words: one for each word and for each gap between two, over all bands, int32 (1, time, mel).

    times: start and end of each word in seconds, such as `word_times(maps)[["start", "end"]].values`.
    """
    edges = np.unique(np.concatenate([np.ravel(times), [-np.inf]]))
    units = np.unique(np.searchsorted(edges, maps.time.values, side="right"), return_inverse=True)[1]
    return np.repeat(units.astype(np.int32)[None, :, None], maps.sizes["mel"], axis=2)


def runners_up(forced: Forced) -> torch.Tensor:
    """The most probable other token at each position, ids (I,): the natural foil of a contrast."""
    with torch.no_grad():  # gradients can use the ids, unlike those of an inference mode
        log_p = forced.model.decode(forced.encode(forced.features), forced.decoder_inputs)[0, forced.rows]
        return log_p.scatter(1, forced.ids[:, None], -torch.inf).argmax(dim=1)


def foils_of(forced: Forced, text: str) -> tuple[int, torch.Tensor]:
    """The token at which a text departs from the hypothesis, and foils (I,) that hold the text's token there.

    Before that token both are the same, and after it they have different pasts, so only this row of a contrast answers
    "why this and not that". ValueError: the text is empty, or begins like the whole hypothesis.
    """
    if not text.strip():
        raise ValueError("The text is empty: give one that departs from the hypothesis.")
    other, ids = forced.model.token_ids(text).to(forced.ids), forced.ids
    both = min(len(ids), len(other))
    apart = (ids[:both] != other[:both]).nonzero()
    if not len(apart):
        raise ValueError(f"The text {text!r} does not differ from the hypothesis: give one with another word.")
    first = int(apart[0])
    foils = ids.clone()
    foils[first] = other[first]
    return first, foils


@torch.inference_mode()
def previous_tokens(forced: Forced, maps: xr.Dataset) -> xr.DataArray:
    """How much each token depends on each token before it: (token, previous), the other half of SPES.

    The embedding of one previous token is set to 0 at a time, and the score is the KL divergence in nats. (SPES draws
    random sets instead; leaving out one at a time needs few enough passes.) A token's own cell and later ones are 0.

    Returns:
        An array with the attributes `audio` and `text`: the mean divergence over tokens, without </s>, if the whole
        input is hidden, and if all previous tokens are.
    """
    model, rows, first = forced.model, forced.rows, forced.rows.start
    states = forced.encode(forced.features)
    inputs, number = forced.decoder_inputs, len(forced.ids)
    keep = torch.ones(number, len(inputs), device=states.device)
    for previous in range(number - 1):
        keep[previous, first + 1 + previous] = 0
    keep[-1, first + 1 :] = 0  # all of them; the prompt stays
    log_p = model.decode(states, inputs)[0, rows]
    found = [
        kl_divergence(log_p, model.decode_without(states.expand(len(part), -1, -1), inputs, part)[:, rows])
        for part in keep.split(model.batch_size)
    ]
    scores = torch.cat(found)
    hidden = model.encode(model.mask_input(forced.features, torch.zeros_like(forced.features)[None]))
    audio = kl_divergence(log_p, model.decode(hidden, inputs)[0, rows])
    each = torch.cat([scores[:-1], torch.zeros_like(scores[:1])]).T.tril(-1)  # (token, previous)
    attributes = {"audio": float(audio[:-1].mean()), "text": float(scores[-1, :-1].mean())}
    labels = {"token": maps.token, "word": maps.word}
    return xr.DataArray(
        each.cpu().numpy(),
        dims=("token", "previous"),
        coords=labels,
        name="previous_saliency",
        attrs=attributes,
    )
