"""Sanity of maps: do they depend on what a model has learnt, and do they find what is known to matter?

Randomising layers is the test of Adebayo et al. (2018, arXiv 1810.03292).
"""

import copy
import re
from collections.abc import Sequence

import numpy as np
import torch
from scipy import stats

from xattn.attribution.estimators import estimate
from xattn.attribution.occlusion import Masks, Partition
from xattn.attribution.segments import partition
from xattn.audio import FRAME_SECONDS
from xattn.files import hash_value
from xattn.models import S2TModel


def layers_from_output(model: S2TModel) -> list[str]:
    """Names of a network's layers from the output to the input: those of the decoder, then those of the encoder."""
    found = {}
    for name, module in model.network.named_modules():
        part = re.search(r"(decoder|encoder)\.\w*layers$", name)
        if part and isinstance(module, torch.nn.ModuleList):
            names = [f"{name}.{number}" for number in range(len(module))]
            found[part[1]] = max(found.get(part[1], []), names, key=len)
    return [*reversed(found["decoder"]), *reversed(found["encoder"])]


def randomised(model: S2TModel, layers: Sequence[str], seed: int = 0) -> S2TModel:
    """A copy of a model in which every weight tensor of the named layers is shuffled.

    Shuffling keeps the distribution of the weights, so that the network's activations stay in their range.
    """
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers:
            for weights in changed.network.get_submodule(layer).parameters():
                order = torch.randperm(weights.numel(), generator=generator).to(weights.device)
                weights.copy_(weights.flatten()[order].view_as(weights))
    changed.weights_hash = hash_value([model.weights_hash, list(layers), seed], 16)
    return changed


def planted_map(
    features: np.ndarray, truth: np.ndarray, kind: str, number: int, estimator: str = "mean", p: float = 0.5
) -> np.ndarray:
    """The map (time, mel) of an imitated model that depends on planted cells only.

    The imitated model scores a perturbation by the square of the share of these cells that it hides.

    Args:
        features: (time, mel), which superpixels are made of, at 100 frames a second.
        truth: bool (time, mel), the planted cells.
        kind, number, estimator: the partition, the number of perturbations and the estimator of the map.
        p: the probability that a perturbation hides a unit.
    """
    masks = Masks(Partition.of(partition(features, kind, FRAME_SECONDS)), number, p, 0, "planted")
    levels, hidden = masks.draw(0, number)
    labels = masks.partition.labels[:, truth]  # (level, cells)
    shares = [hidden[row, labels[level]].mean() for row, level in enumerate(levels)]
    return estimate(np.square(shares)[:, None], masks, estimator).cells(masks.partition.labels)[0]


def roc_area(cells: np.ndarray, truth: np.ndarray) -> float:
    """The area under the ROC curve of a map: the probability that a true cell has a higher value than another one.

    cells, truth: any shape, float and bool. 0.5 is chance.
    """
    return float(stats.mannwhitneyu(cells[truth], cells[~truth]).statistic / (truth.sum() * (~truth).sum()))


def planted_auc(features: np.ndarray, truth: np.ndarray, kind: str, number: int, estimator: str = "mean") -> float:
    """`roc_area` of `planted_map`, which takes the same arguments."""
    return roc_area(planted_map(features, truth, kind, number, estimator), truth)
