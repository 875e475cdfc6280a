"""The engine behind both saliency maps: occlude random parts of an input, score the output, credit what was hidden.

A partition divides an input into units: the superpixels of a spectrogram for SM^X, the encoder steps for SM^H. Every
perturbation hides each unit of one level of the partition with probability p, and the model's output distribution of
each token is compared with the original by its KL divergence. A unit's saliency is the mean score of the
perturbations that hid it (paper, definitions).

Scores are summed for each unit, and become cells of the input only on request: one matrix product a batch where the
published implementation keeps dense (token, time, mel) sums.

Letters in shapes: N perturbations, B of them in a batch, G levels, K units of all levels together, I tokens,
V vocabulary; "cells" stands for (time, mel) or (step,).
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from torch import Tensor

LOG_TINY = math.log(torch.finfo(torch.float32).tiny)


@dataclass(frozen=True)
class Partition:
    """The units of an input. labels: (G, *cells), each cell's unit at each level, numbered on from level to level;
    bounds: (G + 1,), where each level's numbers start and the last one ends."""

    labels: np.ndarray
    bounds: np.ndarray

    @classmethod
    def of(cls, levels: np.ndarray) -> "Partition":
        """From labels (G, *cells) that start at 0 at every level."""
        bounds = np.concatenate([[0], np.cumsum([level.max() + 1 for level in levels])])
        return cls(levels + bounds[:-1].reshape(-1, *[1] * (levels.ndim - 1)), bounds)

    @property
    def units(self) -> int:
        return int(self.bounds[-1])


@dataclass(frozen=True)
class UnitScores:
    """What a run of perturbations gave. sums: float64 (I, K), summed scores of the perturbations that hid each unit;
    counts: int64 (K,), how many there were; each: float32 (N, I), the scores one by one, in the order of the masks."""

    sums: np.ndarray
    counts: np.ndarray
    each: np.ndarray | None = None

    def cells(self, labels: np.ndarray) -> np.ndarray:
        """The map: mean score over the perturbations that hid a cell, at whichever level, 0 where none did.

        labels: (G, *cells) of the partition; returns float64 (I, *cells).
        """
        counts = self.counts[labels].sum(axis=0)  # (*cells)
        sums = np.zeros((len(self.sums), *labels.shape[1:]))
        for level in labels:
            sums += self.sums[:, level]
        return np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0)


def expand(maps: xr.Dataset) -> xr.Dataset:
    """Add SM^X per cell, input_saliency (token, time, mel), to maps that hold its compact form."""
    scores = UnitScores(maps.segment_score.values, maps.segment_count.values)
    return maps.assign(input_saliency=(("token", "time", "mel"), scores.cells(maps.segmentation.values)))


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(P || Q) in nats along the last axis, from log-probabilities (..., V).

    The reference computes it from probabilities, where a single zero in P or Q turns a token's map into NaN or
    infinity. Here a zero of P contributes nothing, and a zero of Q counts as the smallest normal float32.
    """
    log_q = log_q.masked_fill(log_q == -math.inf, LOG_TINY)
    difference = (log_p - log_q).masked_fill(log_p == -math.inf, 0.0)
    return (log_p.exp() * difference).sum(dim=-1)


def draw_masks(partition: Partition, number: int, p: float, seed: int, name: str) -> Iterator[tuple[int, np.ndarray]]:
    """Draw perturbations one by one: the level, and for each of the level's units whether it is hidden (bool).

    Perturbation n belongs to level n modulo G and depends on (seed, name, n) alone, so neither batches nor workers
    nor interruptions change it. (The reference draws from the global random state, in blocks of one level, and drops
    the remainder where N is no multiple of G.)
    """
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    key = np.frombuffer(digest[:16], dtype=np.uint64)
    for index in range(number):
        level = index % len(partition.labels)
        units = partition.bounds[level + 1] - partition.bounds[level]
        generator = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, index, 0]))
        yield level, generator.random(units) < p


def occlude(
    score: Callable[[Tensor], Tensor],
    partition: Partition,
    masks: Iterator[tuple[int, np.ndarray]],
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
) -> UnitScores:
    """Score perturbations and sum up, for every unit, the scores of those that hid it.

    Args:
        score: takes keep (B, *cells), 1 where the input stays and 0 where it is hidden, and returns (B, I).
        masks: level and hidden units of each perturbation, as from `draw_masks`.
        batch_size: perturbations scored at once; it affects rounding only.
    """
    labels = torch.from_numpy(partition.labels).to(device)
    # Everything stays in torch: numpy's matrix product has threads of its own, which would fight the model's.
    sums, counts, each = None, torch.zeros(partition.units, dtype=torch.float64, device=device), []
    batch: list[tuple[int, np.ndarray]] = []

    def flush() -> None:
        nonlocal sums
        bits = np.zeros((len(batch), partition.units), dtype=bool)
        for row, (level, units) in enumerate(batch):
            bits[row, partition.bounds[level] : partition.bounds[level + 1]] = units
        hidden = torch.from_numpy(bits).to(device)
        keep = torch.stack([~hidden[row][labels[level]] for row, (level, _) in enumerate(batch)])  # (B, *cells)
        scores = score(keep.float()).double()  # (B, I)
        if not scores.isfinite().all():
            raise FloatingPointError("The model gave a score that is not finite: check its weights and the recording.")
        each.append(scores.float().cpu().numpy())
        hidden = hidden.double()
        sums = scores.T @ hidden + (0.0 if sums is None else sums)
        counts.add_(hidden.sum(dim=0))

    for mask in masks:
        batch.append(mask)
        if len(batch) == batch_size:
            flush()
            batch.clear()
    if batch:
        flush()
    if sums is None:
        raise ValueError("No perturbation was asked for: set the number of masks to 1 or more.")
    return UnitScores(sums.cpu().numpy(), counts.cpu().numpy().astype(np.int64), np.concatenate(each))
