"""How faithful and how compact a map is: deletion, insertion and size (paper, section 4)."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import xarray as xr
from scipy.integrate import trapezoid

from xattn.analysis.intervals import mean_interval
from xattn.analysis.normalisation import min_max, standardise
from xattn.analysis.quality import RESAMPLES, Metric, bleu, edits, normalise
from xattn.files import hash_value, write_whole
from xattn.maps import expand_to_frames, frames_of_steps, reduce_to_steps
from xattn.models import S2TModel

PERCENT = np.arange(0, 101, 5)
THRESHOLDS = np.linspace(0, 1, 21)
VERSION = 1  # of the deleted inputs: raise it with any change that moves them, so that stored texts are decoded again


def sentence_map(saliency: np.ndarray) -> np.ndarray:
    """One map for the whole output: each token's map scaled to 0..1, then averaged over tokens.

    This is the order of the reference's documented deletion command, whose standardisation before the scaling cancels
    out. Averaging standardised maps instead would rank about a tenth of the top cells differently.

    saliency: (token, ...), the row of </s> included as in the reference; returns (...).
    """
    return min_max(saliency)[0].mean(axis=0)


def ranking(sentence: np.ndarray) -> np.ndarray:
    """Flat indices of the cells from least to most salient, (cells,); among equal cells the later one ranks higher.

    The reference's sort is not stable, so its order among equal cells cannot be reproduced; maps that are constant over
    blocks have many of them.
    """
    return np.argsort(sentence, axis=None, kind="stable")


def masked_inputs(features: torch.Tensor, order: np.ndarray, insertion: bool = False) -> torch.Tensor:
    """The input at every percentage of PERCENT: (21, T, F).

    Deletion sets the top p percent of the cells to 0, insertion all others; the number of cells is rounded down.

    order: see `ranking`.
    """
    copies = features.repeat(len(PERCENT), 1, 1)
    flat = copies.view(len(PERCENT), -1)
    for row, percent in zip(flat, PERCENT, strict=True):
        kept = len(order) - len(order) * int(percent) // 100
        row[torch.from_numpy(order[:kept] if insertion else order[kept:])] = 0.0
    return copies


def sentence_maps(maps: xr.Dataset, kinds: Sequence[str]) -> dict[str, np.ndarray]:
    """Sentence-level maps (time, mel) of one utterance.

    Args:
        kinds: "CA" (attention averaged over layers and heads), "SM^H", "SM^X" (at full resolution), "SM^X 2d_max" and
            so on (reduced to steps), or a baseline: "random", "random steps", "energy" (louder is more relevant).

    Maps on encoder steps are expanded to all frames and bands of each step. CA is scaled per token like the others,
    because standardising over tokens would make every step's mean over tokens 0.
    """
    frames, bands = maps.sizes["time"], maps.sizes["mel"]
    step_frames = frames_of_steps(maps, maps.time.values)

    def expanded(steps: np.ndarray) -> np.ndarray:
        return expand_to_frames(steps, step_frames, frames, bands)

    found = {}
    for kind in kinds:
        name, _, reduction = kind.partition(" ")
        rng = np.random.default_rng([maps.seed, *maps.utterance.encode()])
        if kind == "random":
            found[kind] = rng.random((frames, bands))
        elif kind == "random steps":
            found[kind] = expanded(rng.random((1, maps.sizes["step"])))[0]
        elif kind == "energy":
            found[kind] = maps.features.values
        elif kind == "SM^X":
            found[kind] = sentence_map(maps.input_saliency.values)
        elif name == "SM^X":
            cells = standardise(maps.input_saliency.values)
            found[kind] = sentence_map(expanded(reduce_to_steps(cells, step_frames, reduction)))
        elif kind in ("CA", "SM^H"):
            steps = maps.encoder_saliency if kind == "SM^H" else maps.cross_attention.mean(["layer", "head"])
            found[kind] = sentence_map(expanded(steps.values))
        else:
            raise ValueError(
                f"There is no map {kind!r}: choose CA, SM^X, 'SM^X 2d_max', SM^H, energy, random or 'random steps'."
            )
    return found


def deletion_curves(
    model: S2TModel, stored: Iterable[xr.Dataset], kinds: Sequence[str], folder: Path, insertion: bool = False
) -> pd.DataFrame:
    """Decode every utterance again at every percentage of PERCENT, with its cells deleted in the order of each map.

    Args:
        model: the model that the maps explain.
        stored: datasets of one direction, from `xattn.load_maps`.
        kinds: of maps, see `sentence_maps`.
        folder: for the outputs, one file for each utterance and map; outputs that are there are not decoded again.
        insertion: keep the top cells and delete the others instead.

    Returns:
        A long table: utterance, map, percent, reference, hypothesis.
    """
    rows, name = [], "insertion" if insertion else "deletion"
    for maps in stored:
        key = hash_value({"maps": maps.attrs["key"], "insertion": insertion, "version": VERSION}, 16)
        paths = {kind: folder / maps.model / maps.setting / f"{maps.utterance}-{name}-{kind}.json" for kind in kinds}
        texts = {kind: load_texts(path, key) for kind, path in paths.items()}
        missing = [kind for kind in kinds if texts[kind] is None]
        for kind, sentence in sentence_maps(maps, missing).items():
            features = torch.from_numpy(maps.features.values).to(model.device)
            keep = masked_inputs(torch.ones(features.shape), ranking(sentence), insertion).to(model.device)
            outputs = model.generate(model.mask_input(features, keep), maps.setting)
            texts[kind] = [model.text(ids) for ids in outputs]
            save_texts(texts[kind], paths[kind], key)
        rows += [
            (maps.utterance, kind, int(percent), maps.reference, text)
            for kind in kinds
            for percent, text in zip(PERCENT, texts[kind], strict=True)
        ]
    return pd.DataFrame(rows, columns=["utterance", "map", "percent", "reference", "hypothesis"])


def save_texts(texts: list[str], path: Path, key: str) -> None:
    """Write decoded texts under a key."""
    write_whole(path, json.dumps({"key": key, "texts": texts}, ensure_ascii=False).encode())


def load_texts(path: Path, key: str) -> list[str] | None:
    """Read the texts stored under `key`; None if there are none. ValueError: the file is damaged."""
    if not path.is_file():
        return None
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return stored["texts"] if stored["key"] == key else None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no readable texts ({error}): delete it and run this again.") from error


def areas(
    curves: pd.DataFrame,
    metric: str,
    language: str,
    differences: Sequence[tuple[str, str]] = (),
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Score `deletion_curves` with a metric of METRICS: the curves, and the area under each with its interval.

    Texts are normalised as for the WER, except for BLEU. A higher area of a WER means a more faithful map, a lower one
    for BLEU.

    Args:
        language: of the output.
        differences: pairs of maps; the area of the second is subtracted from that of the first in the same resamples.

    Returns:
        Two long tables: map, percent, score; and map, minus (the subtracted map, or empty), metric, area, low, high (95
        % bootstrap over utterances), n.
    """
    points, summary, resampled = [], [], {}
    score = METRICS[metric].score
    for kind, part in curves.groupby("map", sort=False):
        hypotheses = part.pivot(index="utterance", columns="percent", values="hypothesis")
        references = part.groupby("utterance").reference.first().loc[hypotheses.index].tolist()
        columns = [hypotheses[percent].tolist() for percent in PERCENT]
        if metric != "BLEU":
            references = [normalise(text, language) for text in references]
            columns = [[normalise(text, language) for text in column] for column in columns]
        counts = [METRICS[metric].counts(references, column) for column in columns]
        everything = [score(rows) for rows in counts]
        rng, n = np.random.default_rng(0), len(references)  # the same resamples for every map
        samples = rng.integers(n, size=(RESAMPLES, n))
        resampled[kind] = np.array([area([score(rows[sample]) for rows in counts]) for sample in samples])
        points += [(kind, int(percent), value) for percent, value in zip(PERCENT, everything, strict=True)]
        summary.append((kind, "", metric, area(everything), *np.percentile(resampled[kind], [2.5, 97.5]), n))
    single = {row[0]: row[3] for row in summary}
    for first, second in differences:
        interval = np.percentile(resampled[first] - resampled[second], [2.5, 97.5])
        summary.append((first, second, metric, single[first] - single[second], *interval, n))
    return (
        pd.DataFrame(points, columns=["map", "percent", "score"]),
        pd.DataFrame(summary, columns=["map", "minus", "metric", "area", "low", "high", "n"]),
    )


def area(scores: Sequence[float], percent: np.ndarray = PERCENT) -> float:
    """Area under a score's curve against the percentage, divided by 100: 0 to 100 for a score from 0 to 100."""
    return float(trapezoid(scores, percent)) / 100


def _corpus_capped(counts: np.ndarray) -> float:
    errors, words = counts.sum(axis=0)
    return min(100.0, 100.0 * errors / words) if words else 0.0


def _utterance_capped(counts: np.ndarray) -> float:
    errors, words = counts.T
    return float(np.minimum(100.0, np.divide(100.0 * errors, words, out=np.zeros(len(words)), where=words > 0)).mean())


# Words are split at white space; without any reference words a WER is 0. The first caps the corpus WER at 100, as the
# reference code's `wer_max` and therefore the paper does; the second caps it in each utterance.
METRICS = {
    "corpus-capped WER": Metric(edits, _corpus_capped),
    "utterance-capped WER": Metric(edits, _utterance_capped),
    "BLEU": bleu,
}


def size(saliency: np.ndarray) -> tuple[np.ndarray, float]:
    """Compactness of a normalised map: percentage of cells at or above each of THRESHOLDS, and the area under it.

    saliency: (token, ...), values of all tokens pooled. Returns (21,) and the area, 0 to 100; lower is more compact.
    """
    shares = np.array([100.0 * np.mean(saliency >= threshold) for threshold in THRESHOLDS])
    return shares, float(trapezoid(shares, THRESHOLDS))


def sizes(stored: Iterable[xr.Dataset]) -> pd.DataFrame:
    """Mean size of SM^X, scaled to 0..1, over utterances: one row with metric, value, low, high (95 %) and n."""
    areas = [size(min_max(maps.input_saliency.values)[0])[1] for maps in stored]
    value, low, high = mean_interval(areas)
    return pd.DataFrame([("size", value, low, high, len(areas))], columns=["metric", "value", "low", "high", "n"])
