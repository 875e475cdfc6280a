"""How faithful and how compact a map is: deletion, insertion and size (paper, definitions)."""

import jiwer
import numpy as np
import torch
from scipy.integrate import trapezoid

from xattn.compare import mean_std, min_max

PERCENT = np.arange(0, 101, 5)
THRESHOLDS = np.linspace(0, 1, 21)


def sentence_map(saliency: np.ndarray) -> np.ndarray:
    """One map for the whole output: each token's map normalised, then averaged over tokens.

    Mean-std, then min-max, then the mean, which is the order of the reference's documented deletion; averaging z-scores
    instead would rank about a tenth of the top cells differently. saliency: (token, time, mel), the row of </s>
    included as in the reference; returns (time, mel).
    """
    return min_max(mean_std(saliency)[0])[0].mean(axis=0)


def spread(steps: np.ndarray, frames: int, mels: int, window: int) -> np.ndarray:
    """A map on the encoder's time axis (token, step), given to all frames and bands of each step: (token, time, mel)."""
    return np.broadcast_to(np.repeat(steps, window, axis=1)[:, :frames, None], (len(steps), frames, mels))


def ranking(sentence: np.ndarray) -> np.ndarray:
    """Flat indices of the cells from least to most salient, (cells,); among equal cells the later one ranks higher.

    The reference's sort is not stable, so that its order among equal cells cannot be reproduced; maps that are constant
    over blocks are full of them.
    """
    return np.argsort(sentence, axis=None, kind="stable")


def masked_inputs(features: torch.Tensor, order: np.ndarray, insertion: bool = False) -> torch.Tensor:
    """The input at every percentage of PERCENT: (21, T, F).

    Deletion sets the top p percent of the cells to 0, insertion all the others; the number of cells rounds down.
    """
    steps = features.repeat(len(PERCENT), 1, 1)
    flat = steps.view(len(PERCENT), -1)
    for row, percent in zip(flat, PERCENT, strict=True):
        kept = len(order) - len(order) * int(percent) // 100
        row[torch.from_numpy(order[:kept] if insertion else order[kept:])] = 0.0
    return steps


def area(scores: np.ndarray, percent: np.ndarray = PERCENT) -> float:
    """Area under a score's curve against the percentage, divided by 100: from 0 to 100 for a score from 0 to 100."""
    return float(trapezoid(scores, percent)) / 100


def corpus_capped_wer(references: list[str], hypotheses: list[str]) -> float:
    """Corpus WER in percent, capped at 100 as a whole: what the reference code calls wer_max, and so the paper.

    Words are split at white space and compared as they are; no reference words at all give 0.
    """
    edits, words = _edits(references, hypotheses)
    return min(100.0, 100.0 * sum(edits) / sum(words)) if sum(words) else 0.0


def utterance_capped_wer(references: list[str], hypotheses: list[str]) -> float:
    """Mean over utterances of the WER in percent, each capped at 100."""
    pairs = zip(*_edits(references, hypotheses), strict=True)
    return float(np.mean([min(100.0, 100.0 * edits / words) if words else 0.0 for edits, words in pairs]))


def _edits(references: list[str], hypotheses: list[str]) -> tuple[list[int], list[int]]:
    edits, words = [], []
    for reference, hypothesis in zip(references, hypotheses, strict=True):
        said, written = reference.split(), hypothesis.split()
        words.append(len(said))
        if said and written:
            counts = jiwer.process_words(" ".join(said), " ".join(written))
            edits.append(counts.substitutions + counts.deletions + counts.insertions)
        else:
            edits.append(len(said) + len(written))
    return edits, words


def size(saliency: np.ndarray) -> tuple[np.ndarray, float]:
    """Compactness of a normalised map: percentage of cells at or above each of THRESHOLDS, and the area under it.

    saliency: (token, ...), values of all tokens pooled. Returns (21,) and the area, 0 to 100; lower is more compact.
    """
    shares = np.array([100.0 * np.mean(saliency >= threshold) for threshold in THRESHOLDS])
    return shares, float(trapezoid(shares, THRESHOLDS))
