"""The engine behind both saliency maps: occlude random parts of an input, score the output, credit what was hidden.

A partition divides an input into units: the superpixels of a spectrogram for SM^X, the encoder steps for SM^H. Every
perturbation hides each unit of one level of the partition with probability p, and the model's output distribution of
each token is compared with the original by its KL divergence. A unit's saliency is the mean score of the
perturbations that hid it (paper, definitions).

Masks are drawn whenever they are needed and never stored: a perturbation leaves its scores alone behind, from which the
sums of all units follow, and cells of the input on request. The published implementation keeps dense (token, time,
mel) sums.

Letters in shapes: N perturbations, B of them in a batch, G levels, K units of all levels together, I tokens,
V vocabulary; "cells" stands for (time, mel) or (step,).
"""

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from torch import Tensor

CHECKPOINT_SECONDS = 10.0
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
class Masks:
    """Perturbations of an input: `number` of them, each hiding every unit of its level with probability p.

    Perturbation n belongs to level n modulo G and depends on (seed, name, n) alone, so neither batches nor workers nor
    interruptions change it. (The reference draws from the global random state, in blocks of one level, and drops the
    remainder where N is no multiple of G.)
    """

    partition: Partition
    number: int
    p: float
    seed: int
    name: str

    def draw(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Perturbations start..stop - 1: the level of each (B,), and whether it hides a unit, bool (B, K)."""
        bounds, depth = self.partition.bounds, len(self.partition.labels)
        levels = np.arange(start, stop) % depth
        hidden = np.zeros((stop - start, self.partition.units), dtype=bool)
        for level in range(depth):
            rows = np.flatnonzero(levels == level)
            if len(rows):
                key = hashlib.sha256(f"{self.seed}/{self.name}/{level}".encode()).digest()[:16]
                units = bounds[level + 1] - bounds[level]
                width = -(-units // 8) * 8  # a step of Philox's counter gives 8 numbers of 32 bits
                counter = (start + rows[0]) // depth * (width // 8)
                generator = np.random.Generator(np.random.Philox(key=np.frombuffer(key, np.uint64), counter=counter))
                numbers = generator.random((len(rows), width), dtype=np.float32)[:, :units]
                hidden[rows, bounds[level] : bounds[level + 1]] = numbers < self.p
        return levels, hidden


@dataclass(frozen=True)
class UnitScores:
    """What perturbations say of units. sums: float64 (I, K), summed scores of the perturbations that hid each unit;
    counts: int64 (K,), how many there were."""

    sums: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, scores: np.ndarray, masks: Masks) -> "UnitScores":
        """From the scores (N, I) of all perturbations, summed in float64."""
        bounds, units = masks.partition.bounds, masks.partition.units
        sums, counts = torch.zeros(scores.shape[1], units, dtype=torch.float64), np.zeros(units, dtype=np.int64)
        for start in range(0, len(scores), 1024):
            levels, hidden = masks.draw(start, min(start + 1024, len(scores)))
            for level in np.unique(levels):
                rows, own = np.flatnonzero(levels == level), slice(bounds[level], bounds[level + 1])
                # In torch, as numpy's matrix product has threads of its own, which would fight the model's.
                sums[:, own] += (
                    torch.from_numpy(scores[start + rows]).double().T @ torch.from_numpy(hidden[rows, own]).double()
                )
                counts[own] += hidden[rows, own].sum(axis=0)
        return cls(sums.numpy(), counts)

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


def divergence_from(log_p: Tensor) -> Callable[[Tensor], Tensor]:
    """`kl_divergence` from one distribution a token, log_p (I, V), to many: a function of log_q (B, I, V).

    A product with the fixed P takes fewer passes over log_q, which is most of what is left to do after a decoding.
    """
    p = log_p.exp()

    def divergence(log_q: Tensor) -> Tensor:
        with torch.autocast(log_q.device.type, enabled=False):  # which would round the product to bfloat16
            scores = -torch.einsum("iv,biv->bi", p, log_q - log_p)
        return scores if scores.isfinite().all() else kl_divergence(log_p, log_q)  # probabilities of exactly 0

    return divergence


def occlude(
    score: Callable[[Tensor], Tensor],
    masks: Masks,
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
    done: np.ndarray | None = None,
    checkpoint: Callable[[np.ndarray], None] | None = None,
) -> np.ndarray:
    """Score every perturbation: float32 (N, I).

    Args:
        score: takes keep (B, *cells), 1 where the input stays and 0 where it is hidden, and returns (B, I).
        batch_size: perturbations scored at once; it affects rounding only.
        done: scores of the first perturbations, from an interrupted run.
        checkpoint: is given all scores so far every CHECKPOINT_SECONDS.
    """
    if masks.number < 1:
        raise ValueError("No perturbation was asked for: set the number of masks to 1 or more.")
    labels = torch.from_numpy(masks.partition.labels).to(device)
    batches, saved = [] if done is None else [done], time.monotonic()
    for start in range(0 if done is None else len(done), masks.number, batch_size):
        levels, hidden = masks.draw(start, min(start + batch_size, masks.number))
        kept = torch.from_numpy(~hidden).to(device).float()
        keep = torch.empty(len(kept), *labels.shape[1:], device=device)
        for level in np.unique(levels):
            rows = torch.from_numpy(np.flatnonzero(levels == level)).to(device)
            keep[rows] = kept[rows][:, labels[level]]
        scores = score(keep).float()
        if not scores.isfinite().all():
            raise FloatingPointError("The model gave a score that is not finite: check its weights and the recording.")
        batches.append(scores.cpu().numpy())
        if checkpoint is not None and time.monotonic() - saved > CHECKPOINT_SECONDS:
            checkpoint(np.concatenate(batches))
            saved = time.monotonic()
    return np.concatenate(batches)
