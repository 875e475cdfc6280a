"""How faithful and how compact a map is: deletion, insertion and size (paper, definitions)."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import xarray as xr
from scipy.integrate import trapezoid

from xattn import store
from xattn.compare import lead_of, mean_interval, mean_std, min_max, reduce_to_steps
from xattn.models import S2TModel
from xattn.quality import RESAMPLES, Metric, bleu, edits, normalise

PERCENT = np.arange(0, 101, 5)
THRESHOLDS = np.linspace(0, 1, 21)
VERSION = 1  # of the deleted inputs: raise it with any change that moves them, so that stored texts are decoded again


def sentence_map(saliency: np.ndarray) -> np.ndarray:
    """One map for the whole output: each token's map normalised, then averaged over tokens.

    Mean-std, then min-max, then the mean, which is the order of the reference's documented deletion; averaging z-scores
    instead would rank about a tenth of the top cells differently. saliency: (token, time, mel), the row of </s>
    included as in the reference; returns (time, mel).
    """
    return min_max(mean_std(saliency)[0])[0].mean(axis=0)


def spread(steps: np.ndarray, frames: int, mels: int, window: int, lead: int = 0) -> np.ndarray:
    """A map (token, step) given to all frames and bands of each encoder step: (token, time, mel).

    Windows as in `reduce_to_steps`; frames past the last one take its value.
    """
    own = np.minimum((np.arange(frames) + lead) // window, steps.shape[1] - 1)
    return np.broadcast_to(steps[:, own, None], (len(steps), frames, mels))


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


def sentence_maps(maps: xr.Dataset, kinds: Sequence[str]) -> dict[str, np.ndarray]:
    """Sentence-level maps (time, mel) of one utterance, of the kinds asked for.

    "CA": attention averaged over layers and heads; "SM^H"; "SM^X", at full resolution; "SM^X 2d_max" and so on, reduced
    to encoder steps. Maps on the encoder's axis are spread back over the frames of each step and all bands. Three
    baselines: "random", "random steps", and "energy" (louder is more relevant). CA takes SPES's normalisation here, as
    the frame-wise one makes every step's mean over tokens 0.
    """
    frames, mels, window, lead = maps.sizes["time"], maps.sizes["mel"], maps.subsampling, lead_of(maps)
    found = {}
    for kind in kinds:
        name, _, reduction = kind.partition(" ")
        rng = np.random.default_rng([maps.seed, *maps.utterance.encode()])
        if kind == "random":
            found[kind] = rng.random((frames, mels))
        elif kind == "random steps":
            found[kind] = spread(rng.random((1, maps.sizes["step"])), frames, mels, window, lead)[0]
        elif kind == "energy":
            found[kind] = maps.features.values
        elif kind == "SM^X":
            found[kind] = sentence_map(maps.input_saliency.values)
        elif name == "SM^X":
            cells = mean_std(maps.input_saliency.values)[0]
            steps = reduce_to_steps(cells, maps.sizes["step"], window, reduction, lead)
            found[kind] = sentence_map(spread(steps, frames, mels, window, lead))
        elif kind in ("CA", "SM^H"):
            steps = maps.encoder_saliency if kind == "SM^H" else maps.cross_attention.mean(["layer", "head"])
            found[kind] = sentence_map(spread(steps.values, frames, mels, window, lead))
        else:
            raise ValueError(
                f"There is no map {kind!r}: choose CA, SM^X, 'SM^X 2d_max', SM^H, energy, random or 'random steps'."
            )
    return found


def deletion_curves(
    model: S2TModel, stored: Iterable[xr.Dataset], kinds: Sequence[str], folder: Path, insertion: bool = False
) -> pd.DataFrame:
    """Decode every utterance again at every percentage of PERCENT, its cells deleted in the order of each map.

    Args:
        model: whose maps `stored` are.
        stored: datasets of one setting.
        kinds: of maps, see `sentence_maps`.
        folder: for the outputs, one file an utterance and map; what is there is not decoded again.
        insertion: keep the top cells and delete the others instead.

    Returns:
        long table: utterance, map, percent, reference, hypothesis.
    """
    rows, name = [], "insertion" if insertion else "deletion"
    for maps in stored:
        key = store.key_of({"maps": maps.attrs[store.KEY], "insertion": insertion, "version": VERSION})
        paths = {kind: folder / maps.model / maps.setting / f"{maps.utterance}-{name}-{kind}.json" for kind in kinds}
        texts = {kind: store.load_texts(path, key) for kind, path in paths.items()}
        missing = [kind for kind in kinds if texts[kind] is None]
        for kind, sentence in sentence_maps(maps, missing).items():
            features = torch.from_numpy(maps.features.values).to(model.device)
            keep = masked_inputs(torch.ones(features.shape), ranking(sentence), insertion).to(model.device)
            outputs = model.generate(model.without_cells(features, keep), maps.setting)
            texts[kind] = [model.text(ids) for ids in outputs]
            store.save_texts(texts[kind], paths[kind], key)
        rows += [
            (maps.utterance, kind, int(percent), maps.reference, text)
            for kind in kinds
            for percent, text in zip(PERCENT, texts[kind], strict=True)
        ]
    return pd.DataFrame(rows, columns=["utterance", "map", "percent", "reference", "hypothesis"])


def areas(
    curves: pd.DataFrame,
    metric: str,
    language: str,
    differences: Sequence[tuple[str, str]] = (),
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Score `deletion_curves` with a metric of METRICS: the curves, and the area under each with its interval.

    Texts are normalised as for the WER (`language` is the output's), except for BLEU. Deletion is better the higher
    the area of a WER and the lower that of BLEU.

    Args:
        differences: pairs of maps, the area of the first minus that of the second in the same resampled utterances.

    Returns:
        long tables: map, percent, score; and map, minus (the subtracted map, empty where none is), metric, area, low,
        high (95 % bootstrap over utterances), n.
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
        rng, n = np.random.default_rng(0), len(references)  # every map meets the same resamples
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
    """Area under a score's curve against the percentage, divided by 100: from 0 to 100 for a score from 0 to 100."""
    return float(trapezoid(scores, percent)) / 100


def _corpus_capped(counts: np.ndarray) -> float:
    errors, words = counts.sum(axis=0)
    return min(100.0, 100.0 * errors / words) if words else 0.0


def _utterance_capped(counts: np.ndarray) -> float:
    errors, words = counts.T
    return float(np.minimum(100.0, np.divide(100.0 * errors, words, out=np.zeros(len(words)), where=words > 0)).mean())


# Words are split at white space and compared as they are; no reference words at all give 0. The first is capped at 100
# as a whole, which is what the reference code calls wer_max, and so the paper; the second in each utterance.
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
    """Size of SM^X over utterances, min-max-normalised: one row with metric, value, low, high (95 % interval) and n."""
    areas = [size(min_max(maps.input_saliency.values)[0])[1] for maps in stored]
    value, low, high = mean_interval(areas)
    return pd.DataFrame([("size", value, low, high, len(areas))], columns=["metric", "value", "low", "high", "n"])
