"""The engine of both saliency maps: hide random parts of an input and score the change of the output.

A partition divides an input into units: the superpixels of a spectrogram for SM^X, the encoder steps for SM^H. Each
perturbation hides every unit of one level with probability p. Its score for a token is the KL divergence from the
original output distribution to the perturbed one (paper, section 3). Only scores are kept; xattn.attribution.estimators
computes maps from them. Masks are drawn again whenever they are needed. (The published implementation keeps dense
(token, time, mel) sums instead.)

Letters in shapes: N perturbations, B of them in a batch, G levels, K units of all levels, I tokens, V vocabulary;
"cells" stands for (time, mel) or (step,).
"""

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

CHECKPOINT_SECONDS = 10.0
FIRST_CHECK = 60  # perturbations, before which a reliability is hardly more than noise
CACHED = 2**19  # numbers that fit a processor's cache
LOG_TINY = math.log(torch.finfo(torch.float32).tiny)
NO_MEMORY = ("you tried to allocate", "STATUS_ALLOC_FAILED")  # torch's messages on a CPU, and from cuBLAS or cuDNN


@dataclass(frozen=True)
class Partition:
    """The units of an input.

    labels: (G, *cells), the unit of each cell at each level; numbers continue from level to level.
    bounds: (G + 1,), the first number of each level, and the number of units.
    """

    labels: np.ndarray
    bounds: np.ndarray

    @classmethod
    def of(cls, levels: np.ndarray) -> "Partition":
        """Make a partition from labels (G, *cells) that start at 0 at every level."""
        bounds = np.concatenate([[0], np.cumsum([level.max() + 1 for level in levels])])
        return cls(levels + bounds[:-1].reshape(-1, *[1] * (levels.ndim - 1)), bounds)

    @property
    def units(self) -> int:
        return int(self.bounds[-1])


@dataclass(frozen=True)
class Masks:
    """`number` perturbations of an input, each hiding every unit of its level with probability p.

    Perturbation n belongs to level n modulo G and depends only on (seed, name, n), so batches, workers and
    interruptions do not change it. (The reference draws from the global random state, in blocks of one level, and drops
    the remainder if N is not a multiple of G.)
    """

    partition: Partition
    number: int
    p: float
    seed: int
    name: str

    def draw(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw perturbations start..stop - 1: the level of each (B,), and whether it hides a unit, bool (B, K)."""
        bounds, depth = self.partition.bounds, len(self.partition.labels)
        levels = np.arange(start, stop) % depth
        hidden = np.zeros((stop - start, self.partition.units), dtype=bool)
        for level in range(depth):
            rows = np.flatnonzero(levels == level)
            if len(rows):
                key = hashlib.sha256(f"{self.seed}/{self.name}/{level}".encode()).digest()[:16]
                units = bounds[level + 1] - bounds[level]
                width = -(-units // 8) * 8  # one step of Philox's counter yields 8 numbers of 32 bits
                counter = (start + rows[0]) // depth * (width // 8)
                generator = np.random.Generator(np.random.Philox(key=np.frombuffer(key, np.uint64), counter=counter))
                numbers = generator.random((len(rows), width), dtype=np.float32)[:, :units]
                hidden[rows, bounds[level] : bounds[level + 1]] = numbers < self.p
        return levels, hidden


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(P || Q) in nats along the last axis, from log-probabilities (..., V).

    A zero of P contributes nothing; a zero of Q counts as the smallest normal float32. (The reference computes it from
    probabilities, and a single zero turns a token's map into NaN or infinity.)
    """
    log_q = log_q.masked_fill(log_q == -math.inf, LOG_TINY)
    difference = (log_p - log_q).masked_fill(log_p == -math.inf, 0.0)
    return (log_p.exp() * difference).sum(dim=-1)


def divergence_from(log_p: Tensor) -> Callable[[Tensor], Tensor]:
    """Return `kl_divergence` from fixed distributions log_p (I, V) as a function of log_q (B, I, V).

    It multiplies by the fixed P in blocks of rows that fit a processor's cache, which avoids a second array of the size
    of log_q and is several times faster for a vocabulary of 8,000.
    """
    p, rows = log_p.exp(), max(1, CACHED // log_p.numel())

    def divergence(log_q: Tensor) -> Tensor:
        with torch.autocast(log_q.device.type, enabled=False):  # it would round the product to bfloat16
            scores = torch.cat([torch.einsum("iv,biv->bi", p, log_p - part) for part in log_q.split(rows)])
        return scores if scores.isfinite().all() else kl_divergence(log_p, log_q)  # a probability is exactly 0

    return divergence


def occlude(
    score: Callable[[Tensor], Tensor],
    masks: Masks,
    *,
    batch_size: int,
    device: torch.device | str = "cpu",
    done: np.ndarray | None = None,
    checkpoint: Callable[[np.ndarray], None] | None = None,
    enough: Callable[[np.ndarray], bool] | None = None,
    until: float | None = None,
    progress: Callable[[int], object] | None = None,
) -> np.ndarray:
    """Score every perturbation: float32 (N, I).

    Args:
        score: maps keep (B, *cells), 1 where the input stays and 0 where it is hidden, to scores (B, I).
        batch_size: perturbations scored at once; halved when memory runs out. It affects only rounding.
        done: scores of the first perturbations, from an interrupted run.
        checkpoint: called with all scores so far every CHECKPOINT_SECONDS.
        enough: called with all scores so far after FIRST_CHECK perturbations and each time they have grown by half;
            stops early when it returns True.
        until: stops early at this time of `time.monotonic`, but not before one batch.
        progress: called with the number of perturbations scored so far.

    Raises:
        FloatingPointError: a score is not finite. MemoryError: there is not enough even for one perturbation.
    """
    if masks.number < 1:
        raise ValueError("The number of masks is 0: set it to 1 or more.")
    labels = torch.from_numpy(masks.partition.labels).to(device)
    count, saved = 0 if done is None else len(done), time.monotonic()
    # One array from the start: small arrays kept from every batch would fragment memory and make the process grow.
    scores = None if done is None else np.resize(done, (masks.number, done.shape[1]))
    for stop in _stops(masks.number) if enough else [masks.number]:
        while count < stop:
            following = min(count + batch_size, stop)
            try:
                found = score(_keep(masks, labels, count, following)).float().cpu()
            except (MemoryError, RuntimeError) as error:
                if not _out_of_memory(error):
                    raise
                if batch_size == 1:
                    raise MemoryError(
                        "There is not enough memory to score a single perturbation: use a shorter recording, a "
                        "smaller model, or a device with more memory."
                    ) from error
                batch_size //= 2
                continue
            if not found.isfinite().all():
                raise FloatingPointError(
                    "The model gave a score that is not finite: check its weights and the recording."
                )
            if scores is None:
                scores = np.empty((masks.number, found.shape[1]), dtype=np.float32)
            scores[count:following] = found.numpy()
            count = following
            if progress is not None:
                progress(count)
            now = time.monotonic()
            if checkpoint is not None and now - saved > CHECKPOINT_SECONDS:
                checkpoint(scores[:count])
                saved = now
            if until is not None and now > until:
                return scores[:count]
        if stop < masks.number and enough(scores[:stop]):
            return scores[:stop]  # scores of an interrupted run can go beyond it
    return scores[:count]


def _out_of_memory(error: Exception) -> bool:
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or any(words in str(error) for words in NO_MEMORY)


def _keep(masks: Masks, labels: Tensor, start: int, stop: int) -> Tensor:
    """Perturbations start..stop - 1 as factors of the input (B, *cells), on the device of `labels`."""
    levels, hidden = masks.draw(start, stop)
    kept = torch.from_numpy(~hidden).to(labels.device).float()
    keep = torch.empty(len(kept), *labels.shape[1:], device=labels.device)
    for level in np.unique(levels):
        rows = torch.from_numpy(np.flatnonzero(levels == level)).to(labels.device)
        keep[rows] = kept[rows][:, labels[level]]
    return keep


def _stops(number: int) -> list[int]:
    stops = [FIRST_CHECK]
    while stops[-1] < number:
        stops.append(stops[-1] * 3 // 2)
    return [*stops[:-1], number]
