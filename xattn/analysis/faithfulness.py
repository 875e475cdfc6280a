"""How faithful and how compact a map is: deletion, insertion and size (paper, section 4)."""

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import xarray as xr
from scipy.integrate import trapezoid

from xattn.analysis.intervals import jackknife_interval, mean_interval
from xattn.analysis.normalisation import min_max, standardise
from xattn.analysis.quality import Metric, bleu, edits, normalise
from xattn.analysis.reliability import half_cells, halves_of, split_half_reliability
from xattn.files import hash_value, write_whole
from xattn.maps import expand_to_frames, frames_of_steps, masks_of, reduce_to_steps
from xattn.models import S2TModel

STEP = 5  # per cent of the cells between two points of a curve (paper, section 4)
THRESHOLDS = np.linspace(0, 1, 21)
BLANK = "blank"  # the texts of an input without any cell, which all maps share
COLUMNS = ["utterance", "map", "reliability", "percent", "reference", "hypothesis"]
VERSION = 2  # of the deleted inputs: raise it with any change that moves them, so that stored texts are decoded again


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


def percentages(step: int = STEP) -> np.ndarray:
    """The percentages 0, step, ..., 100. ValueError: 100 is not a multiple of the step."""
    if step < 1 or 100 % step:
        raise ValueError(f"The step of a deletion curve is {step}: give a whole number that divides 100.")
    return np.arange(0, 101, step)


def masked_inputs(features: torch.Tensor, order: np.ndarray, insertion: bool = False, step: int = STEP) -> torch.Tensor:
    """The input at every one of `percentages`: (points, T, F).

    Deletion sets the top p percent of the cells to 0, insertion all others; the number of cells is rounded down.

    order: see `ranking`.
    """
    percent = percentages(step)
    copies = features.repeat(len(percent), 1, 1)
    flat = copies.view(len(percent), -1)
    for row, each in zip(flat, percent, strict=True):
        kept = len(order) - len(order) * int(each) // 100
        row[torch.from_numpy(order[:kept] if insertion else order[kept:])] = 0.0
    return copies


def sentence_maps(maps: xr.Dataset, kinds: Sequence[str]) -> dict[str, np.ndarray]:
    """Sentence-level maps (time, mel) of one utterance.

    Args:
        kinds: "CA" (attention averaged over layers and heads), "SM^H", "SM^X" (at full resolution), "SM^X 2d_max" and
            so on (reduced to steps), or a baseline: "random", "energy" (louder is more relevant), "random steps" and
            "energy steps" (the mean of a step), which are the fair ones for maps on encoder steps.

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
        elif kind == "energy steps":
            found[kind] = expanded(reduce_to_steps(maps.features.values[None], step_frames, "2d_avg"))[0]
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
                f"There is no map {kind!r}: choose CA, SM^X, 'SM^X 2d_max', SM^H, energy, random, 'energy steps' or "
                "'random steps'."
            )
    return found


def sentence_reliability(maps: xr.Dataset, kind: str) -> float:
    """Split-half reliability of one of `sentence_maps`; NaN without masks (CA, baselines) or without their scores."""
    name, _, reduction = kind.partition(" ")
    if kind == "SM^X" and "input_scores" in maps:
        halves = half_cells(maps.input_scores.values, masks_of(maps, "input"), maps.estimator)
    elif name == "SM^X":
        halves = halves_of(maps, "input_saliency", reduction)
    else:
        halves = halves_of(maps, "encoder_saliency") if kind == "SM^H" else None
    if halves is None:
        return math.nan
    return split_half_reliability(np.stack([sentence_map(np.asarray(each)) for each in halves]))


def deletion_curves(
    model: S2TModel,
    stored: Iterable[xr.Dataset],
    kinds: Sequence[str],
    folder: Path,
    insertion: bool = False,
    step: int = STEP,
) -> pd.DataFrame:
    """Decode every utterance again at every one of `percentages`, with its cells deleted in the order of each map.

    Args:
        model: the model that the maps explain.
        stored: datasets of one direction, from `xattn.load_maps`.
        kinds: of maps, see `sentence_maps`.
        folder: for the outputs, one file for each utterance and map; outputs that are there are not decoded again.
        insertion: keep the top cells and delete the others instead.
        step: between two percentages.

    Returns:
        A long table: utterance, map, reliability (see `sentence_reliability`), percent, reference, hypothesis.

    Raises:
        ValueError: an utterance has no reference, so its outputs could not be scored.
    """
    rows, name = [], "insertion" if insertion else "deletion"
    for maps in stored:
        if not maps.reference:
            raise ValueError(f"{maps.utterance} has no reference for {maps.setting!r}: add it to the corpus first.")
        blank = {"maps": maps.attrs["key"], "version": VERSION}  # is the same for deletion and insertion
        keys = {BLANK: hash_value(blank, 16)}
        keys |= dict.fromkeys(kinds, hash_value(blank | {"insertion": insertion, "step": step}, 16))
        texts = {}
        for kind, key in keys.items():
            file = f"{maps.utterance}-{BLANK if kind == BLANK else f'{name}-{kind}'}.json"
            path = folder / maps.model / maps.setting / file
            texts[kind] = load_texts(path, key)
            if texts[kind] is None:
                sentence = None if kind == BLANK else sentence_maps(maps, [kind])[kind]
                texts[kind] = texts_without(model, maps, sentence, insertion, step)
                save_texts(texts[kind], path, key)
        ends = [maps.hypothesis], texts.pop(BLANK)  # with all cells, and with none
        for kind in kinds:
            first, last = reversed(ends) if insertion else ends
            rows += curve_rows(maps, kind, sentence_reliability(maps, kind), [*first, *texts[kind], *last], step)
    return pd.DataFrame(rows, columns=COLUMNS)


def curve_rows(maps: xr.Dataset, kind: str, reliability: float, texts: Sequence[str], step: int) -> list[tuple]:
    """Rows of `deletion_curves` for one utterance and map, from the texts at all percentages."""
    pairs = zip(percentages(step), texts, strict=True)
    return [(maps.utterance, kind, reliability, int(each), maps.reference, text) for each, text in pairs]


def texts_without(
    model: S2TModel, maps: xr.Dataset, sentence: np.ndarray | None, insertion: bool = False, step: int = STEP
) -> list[str]:
    """What the model writes for the inputs between 0 and 100 % of one curve.

    sentence: the map (time, mel) that orders the cells; None gives the single text of an input without any cell.
    """
    features = torch.from_numpy(maps.features.values).to(model.device)
    if sentence is None:
        keep = torch.zeros(1, *features.shape)
    else:
        keep = masked_inputs(torch.ones(features.shape), ranking(sentence), insertion, step)[1:-1]
    outputs = model.generate(model.mask_input(features, keep.to(model.device)), maps.setting)
    return [model.text(ids) for ids in outputs]


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
        differences: pairs of maps; the area of the second is subtracted from that of the first.

    Returns:
        Two long tables: map, percent, score; and map, minus (the subtracted map, or empty), metric, area, low, high (95
        % jackknife over utterances), reliability (the mean over utterances, of a difference the lower one), n.
    """
    points, summary, counted = [], [], {}
    percent = np.sort(curves.percent.unique())
    for kind, part in curves.groupby("map", sort=False):
        hypotheses = part.pivot(index="utterance", columns="percent", values="hypothesis")
        references = part.groupby("utterance").reference.first().loc[hypotheses.index].tolist()
        columns = [hypotheses[each].tolist() for each in percent]
        if metric != "BLEU":
            references = [normalise(text, language) for text in references]
            columns = [[normalise(text, language) for text in column] for column in columns]
        counted[kind] = np.stack([METRICS[metric].counts(references, column) for column in columns])  # (points, n, k)
        scores = [METRICS[metric].score(rows) for rows in counted[kind]]
        points += [(kind, int(each), value) for each, value in zip(percent, scores, strict=True)]

    def area_of(kind: str, rows: np.ndarray) -> float:
        return area([METRICS[metric].score(counts[rows]) for counts in counted[kind]], percent)

    n, reliability = curves.utterance.nunique(), curves.groupby("map").reliability.mean()
    for kind in counted:
        interval = jackknife_interval(lambda rows, kind=kind: area_of(kind, rows), n)
        summary.append((kind, "", metric, *map(float, interval), reliability[kind], n))
    for first, second in differences:
        interval = jackknife_interval(lambda rows, a=first, b=second: area_of(a, rows) - area_of(b, rows), n)
        lower = reliability[[first, second]].min()  # skips maps without masks
        summary.append((first, second, metric, *map(float, interval), lower, n))
    names = ["map", "minus", "metric", "area", "low", "high", "reliability", "n"]
    return pd.DataFrame(points, columns=["map", "percent", "score"]), pd.DataFrame(summary, columns=names)


def area(scores: Sequence[float], percent: np.ndarray) -> float:
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
    """Mean size of SM^X, scaled to 0..1, over utterances: one row with metric, value, low, high (95 %) and n.

    reliability: see `sentence_reliability`; noise makes a map look less compact.
    """
    found = [(size(min_max(maps.input_saliency.values)[0])[1], sentence_reliability(maps, "SM^X")) for maps in stored]
    areas, reliabilities = zip(*found, strict=True)
    row = ("size", *mean_interval(areas), float(np.mean(reliabilities)), len(areas))
    return pd.DataFrame([row], columns=["metric", "value", "low", "high", "reliability", "n"])
