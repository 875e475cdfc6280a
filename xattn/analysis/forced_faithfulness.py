"""How faithful an attribution is to the probability of the output, with the output forced: no search is needed.

`xattn.analysis.faithfulness` decodes again at every point, as the paper does. A forced pass costs a fraction of that.
"""

from collections.abc import Iterator

import numpy as np
import torch
import xarray as xr
from scipy.integrate import trapezoid

from xattn.analysis.faithfulness import STEP, masked_inputs, percentages, ranking, sentence_map
from xattn.attribution.forced import Forced
from xattn.attribution.occlusion import Masks, Partition
from xattn.attribution.segments import partition
from xattn.maps import expand_to_frames, frames_of_steps

MASKS, HIDDEN = 100, 0.3  # of `infidelity`: perturbations, and the share of the windows that each hides


def on_cells(attribution: xr.DataArray, maps: xr.Dataset) -> np.ndarray:
    """An attribution (token, step) or (token, time, mel) as cells (token, time, mel), without labels.

    ValueError: it has other axes.
    """
    if set(attribution.dims) not in ({"token", "step"}, {"token", "time", "mel"}):
        raise ValueError(
            f"The attribution has the axes {', '.join(attribution.dims)}, but token and step, or token, time and mel "
            "are needed: average over the others, such as layer and head."
        )
    if "step" not in attribution.dims:
        return attribution.transpose("token", "time", "mel").values
    frames = frames_of_steps(attribution, maps.time.values)
    steps = attribution.transpose("token", "step").values
    return expand_to_frames(steps, frames, maps.sizes["time"], maps.sizes["mel"])


@torch.inference_mode()
def values_without(forced: Forced, keep: torch.Tensor) -> np.ndarray:
    """Log-probabilities of the forced tokens with the cells hidden where keep (B, time, mel) is 0: (B, token)."""
    found = []
    for part in keep.to(forced.features.device).split(forced.model.batch_size):
        states = forced.model.encode(forced.model.mask_input(forced.features, part))
        found.append(forced.values(forced.model.decode(states, forced.decoder_inputs)).cpu())
    return torch.cat(found).double().numpy()


def probability_area(
    forced: Forced, attribution: xr.DataArray, maps: xr.Dataset, insertion: bool = False, step: int = STEP
) -> float:
    """Area under the mean log-probability of the tokens as cells are deleted in the order of one map, in nats.

    The map is `sentence_map` of the attribution, as for deletion with decoding. Log-probabilities are relative to those
    of the whole input. A lower area of deletion means a more faithful map, and a higher one of insertion.
    """
    order = ranking(sentence_map(on_cells(attribution, maps)))
    values = values_without(forced, masked_inputs(torch.ones_like(forced.features), order, insertion, step))
    whole = values[-1 if insertion else 0]
    return float(trapezoid((values - whole).mean(axis=1), percentages(step))) / 100


def effects(forced: Forced, maps: xr.Dataset, masks: int = MASKS) -> tuple[np.ndarray, np.ndarray]:
    """What hiding random windows of time does: the hidden cells (N, time), bool, and the changes (N, token), in nats.

    Windows are those of the partition "windows", of all sizes in turn. The changes are drops of log-probabilities.
    """
    levels = partition(maps.features.values, "windows", forced.model.frame_seconds)
    drawn = Masks(Partition.of(levels), masks, HIDDEN, int(maps.seed), f"{maps.utterance}/infidelity")
    hidden = np.stack([*_hidden_frames(drawn)])
    keep = torch.from_numpy(~hidden).float()[..., None].expand(-1, -1, maps.sizes["mel"])
    whole = values_without(forced, torch.ones_like(forced.features)[None])
    return hidden, whole - values_without(forced, keep)


def _hidden_frames(masks: Masks) -> Iterator[np.ndarray]:
    """Whether each mask hides each frame, bool (time,)."""
    for level, row in zip(*masks.draw(0, masks.number), strict=True):
        yield row[masks.partition.labels[level][:, 0]]


def infidelity(attribution: xr.DataArray, maps: xr.Dataset, hidden: np.ndarray, changes: np.ndarray) -> float:
    """How badly the summed attribution of hidden cells predicts the change of each log-probability, 0 (best) to 1.

    This is the infidelity of Yeh et al. (2019, arXiv 1901.09392, definition 2.1) with the best factor for each token,
    as attributions have different units, divided by the mean square of the changes. It is averaged over tokens.

    hidden, changes: from `effects`.
    """
    predicted = hidden.astype(np.float64) @ on_cells(attribution, maps).sum(axis=2).T  # (N, token)
    products, squares, sizes = (
        (first * second).mean(axis=0)
        for first, second in ((predicted, changes), (predicted, predicted), (changes, changes))
    )
    explained = np.divide(products**2, squares * sizes, out=np.zeros_like(sizes), where=(squares > 0) & (sizes > 0))
    return float(1 - explained.mean())
