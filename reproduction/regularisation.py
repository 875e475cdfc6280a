"""Does attention that is trained to explain do so? `python -m reproduction.regularisation`.

Measures the models of `recipes.regularise` and `base` on the test set, and writes data/regularised/regularisation.csv
and provenance.json. All models are forced to write the transcript, so that they explain the same tokens and their maps
can be exchanged. The numbers of each utterance are stored in data/train/regularised/measures. Run the command again to
resume, or when there are more models.
"""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import xarray as xr
from scipy import stats

import xattn
from reproduction.conditions import progress
from reproduction.judging import localisation, similarity, steps_of, stored_numbers, word_boundaries
from reproduction.provenance import versions
from xattn.analysis.correlation import normalised_attention, normalised_saliency
from xattn.analysis.faithfulness import METRICS, area, percentages, sentence_map, texts_without
from xattn.analysis.forced_faithfulness import on_cells, probability_area
from xattn.analysis.intervals import mean_interval
from xattn.analysis.quality import edits, normalised, transcribe
from xattn.attribution.forced import Forced
from xattn.data.utterance import Utterance
from xattn.files import hash_value, write_whole
from xattn.models import S2TModel

LANGUAGE = "en"
START, CONTROL = "base", "control-none"  # the model that training continues, and the runs without a loss on attention
OCCLUSION = xattn.Occlusion(input_masks=200, encoder_masks=400, precision="float32", reliability=1.0)
EXPLAINED = 40  # utterances of the test set; all of it counts for the WER
STEP = 20  # per cent of the cells between two points of deletion with decoding
DIGITS = 3  # of stored maps, which are standardised
VERSION = 1  # of the numbers: raise it with any change that moves them
SALIENCIES = {"SM^X": "input", "SM^H": "encoder"}
WORD_TIMES = {
    "start of word, warped": "start of word",
    "start within 50 ms, warped": "start within 50 ms",
    "start of word, peak": "start of word, peak alone",
}
# Whether models use what they are taught to look at: rho, rho after an exchange of maps with base, and similarities.
USED = (
    *("rho, SM^X", "rho, base's SM^X", "rho of base's attention, SM^X", "SM^X, similarity to base's"),
    *("rho, SM^H", "rho, base's SM^H", "rho of base's attention, SM^H", "SM^H, similarity to base's"),
    "attention, similarity to base's",
)
# Whether more is better (1) or less (-1).
BETTER = {
    "WER": -1,
    "rho, SM^X": 1,
    "rho, SM^H": 1,
    "peak inside word": 1,
    "start of word": -1,
    "deletion, WER": 1,
    "deletion, probability": -1,
}
SHOWN = (*BETTER, "entropy")  # in the figure
COMMAND = "`make data train-regularised`"
COLUMNS = ["variant", "seed", "measure", "minus", "value", "low", "high", "n"]


def measure(model: S2TModel, utterance: Utterance, occlusion: xattn.Occlusion, step: int = STEP) -> dict:
    """Measure the attention of a model on one utterance, with the transcript forced.

    Args:
        occlusion: its seed should differ between models; otherwise their maps share the noise of the masks.
        step: per cent of the cells between two points of deletion with decoding.

    Returns:
        measures: numbers by name; texts: what the model writes as cells are deleted in the order of attention, for all
        percentages but 0; maps: attention, "upper" (its upper half of the layers), SM^X and SM^H, standardised as for
        rho, lists (token, step).
    """
    maps = xattn.explain(model, utterance, text=utterance.transcript, occlusion=occlusion, progress=False)
    forced, layers = Forced.of(model, maps), maps.sizes["layer"]
    averages = {
        "attention": maps.cross_attention.mean(["layer", "head"]),
        "upper": maps.cross_attention.isel(layer=slice(layers // 2, None)).mean(["layer", "head"]),
    }
    saliencies = {name: maps[f"{place}_saliency"] for name, place in SALIENCIES.items()}
    compared = {name: normalised_attention(each).values for name, each in averages.items()}
    compared |= {name: normalised_saliency(each, maps).values for name, each in saliencies.items()}
    found = {
        "entropy": entropy(steps_of(averages["upper"], maps, "")),
        "entropy, all layers": entropy(steps_of(averages["attention"], maps, "")),
    }
    for name, place in SALIENCIES.items():
        reliability = maps.attrs[f"{place}_reliability"]
        rho = similarity(compared["attention"].ravel(), compared[name].ravel())
        found |= {f"reliability, {name}": reliability, f"rho, {name}": rho}
        found[f"rho, {name}, without noise"] = rho / np.sqrt(reliability) if reliability > 0 else np.nan
        found[f"rho, {name}, upper half"] = similarity(compared["upper"].ravel(), compared[name].ravel())
    found |= localisation(steps_of(averages["upper"], maps, ""), maps, utterance)
    for name, each in saliencies.items():
        own = localisation(steps_of(each, maps, ""), maps, utterance)
        found |= {f"{measure}, {name}": value for measure, value in own.items()}
    times = word_boundaries(averages["upper"], maps, utterance)
    found |= {new: times[old] for old, new in WORD_TIMES.items() if old in times}
    attention = averages["attention"]
    found["deletion, probability"] = probability_area(forced, attention, maps)
    found["deletion, probability, SM^X"] = probability_area(forced, saliencies["SM^X"], maps)
    texts = texts_without(model, maps, sentence_map(on_cells(attention, maps)), step=step)
    return {
        "measures": {name: float(value) for name, value in found.items()},
        "texts": [*texts, *texts_without(model, maps, None)],
        "maps": {name: each.round(DIGITS).tolist() for name, each in compared.items()},
    }


def entropy(steps: xr.DataArray) -> float:
    """Mean entropy of the rows of an attribution (token, step), relative to that of uniform rows: 0 to 1."""
    return float(stats.entropy(steps.values, axis=1).mean() / np.log(steps.sizes["step"]))


def measure_model(
    model: S2TModel,
    corpus: Sequence[Utterance],
    folder: Path,
    occlusion: xattn.Occlusion = OCCLUSION,
    explained: int = EXPLAINED,
) -> dict:
    """Measure a model on a corpus, or read what is stored below `folder`.

    Returns texts, what the model writes, by the id of the utterance; and utterances, the results of `measure` for the
    first `explained` ones, also by id.
    """
    ids = [each.id for each in corpus]

    def decode() -> dict:
        features = [model.features(each.audio()).cpu() for each in corpus]
        return {"texts": dict(zip(ids, transcribe(model, features, LANGUAGE), strict=True))}

    texts = stored_numbers(
        folder / model.name / "texts.json", hash_value([model.weights_hash, ids, VERSION], 16), decode
    )
    occlusion = replace(occlusion, seed=int(hash_value(model.name, 7), 16))
    key = hash_value([model.weights_hash, asdict(occlusion), STEP, VERSION], 16)
    found = {}
    for utterance in progress(corpus[:explained], f"Utterances of {model.name}"):
        path = folder / model.name / f"{utterance.id}.json"
        found[utterance.id] = stored_numbers(path, key, lambda own=utterance: measure(model, own, occlusion))
    return {"texts": texts["texts"], "utterances": found}


def pseudo_values(statistic: Callable[[np.ndarray], float], n: int) -> np.ndarray:
    """Jackknife pseudo-values (n,) of a statistic of utterances, which can then be averaged like the values of a mean.

    statistic: of the utterances with the given indices, (m,).
    """
    rows = np.arange(n)
    others = np.array([statistic(np.delete(rows, left_out)) for left_out in rows])
    return n * statistic(rows) - (n - 1) * others


def error_rates(texts: dict[str, str], corpus: Sequence[Utterance]) -> list[tuple[str, str, float]]:
    """Word error rates in per cent, for all utterances and by SNR, as pseudo-values: (measure, utterance, value)."""
    counts = edits(*normalised([each.transcript for each in corpus], [texts[each.id] for each in corpus], LANGUAGE))
    snr, rows = np.array([each.snr for each in corpus], dtype=float), []
    groups = {"WER": np.ones(len(corpus), dtype=bool)}
    groups |= {f"WER, {level:g} dB": snr == level for level in np.unique(snr[~np.isnan(snr)])}
    for name, members in groups.items():
        own = counts[members]
        if len(own) > 1:
            values = pseudo_values(lambda used, own=own: 100 * own[used, 0].sum() / own[used, 1].sum(), len(own))
            utterances = [each.id for each, member in zip(corpus, members, strict=True) if member]
            rows += [(name, *pair) for pair in zip(utterances, values.tolist(), strict=True)]
    return rows


def deletion_areas(found: dict, corpus: Sequence[Utterance], step: int = STEP) -> list[tuple[str, str, float]]:
    """The area under the rise of the WER with deletion by attention, as pseudo-values: (measure, utterance, value).

    The rise starts at the WER with nothing deleted; otherwise a worse model would seem to have more faithful attention.
    """
    metric = METRICS["corpus-capped WER"]
    used = [each for each in corpus if each.id in found["utterances"]]
    texts = [[found["texts"][each.id], *found["utterances"][each.id]["texts"]] for each in used]
    references = [each.transcript for each in used]
    counts = [metric.counts(*normalised(references, column, LANGUAGE)) for column in zip(*texts, strict=True)]
    percent = percentages(step)

    def rise(rows: np.ndarray) -> float:
        scores = np.array([metric.score(each[rows]) for each in counts])
        return area(scores - scores[0], percent)

    values = pseudo_values(rise, len(used))
    return [("deletion, WER", *pair) for pair in zip([each.id for each in used], values.tolist(), strict=True)]


def exchanged(found: dict, start: dict) -> list[tuple[str, str, float]]:
    """Compare the maps of a model with those of the starting model: (measure, utterance, value).

    Similarities of saliency maps are divided by the square root of both reliabilities.
    """
    rows = []
    for id, own in found["utterances"].items():
        other = start["utterances"][id]
        mine, theirs = ({name: np.ravel(each) for name, each in one["maps"].items()} for one in (own, other))
        rows.append(("attention, similarity to base's", id, similarity(mine["attention"], theirs["attention"])))
        for name in SALIENCIES:
            product = own["measures"][f"reliability, {name}"] * other["measures"][f"reliability, {name}"]
            alike = similarity(mine[name], theirs[name]) / np.sqrt(product) if product > 0 else np.nan
            rows.append((f"{name}, similarity to base's", id, alike))
            rows.append((f"rho, base's {name}", id, similarity(mine["attention"], theirs[name])))
            rows.append((f"rho of base's attention, {name}", id, similarity(theirs["attention"], mine[name])))
    return rows


def values_of(found: dict[tuple[str, str], dict], corpus: Sequence[Utterance]) -> pd.DataFrame:
    """All values of utterances: variant, seed, measure, utterance, value.

    found: results of `measure_model` by variant and seed, with those of the starting model under (START, "").
    """
    rows = []
    for (variant, seed), own in found.items():
        values = error_rates(own["texts"], corpus) + deletion_areas(own, corpus)
        values += [(name, id, each) for id, one in own["utterances"].items() for name, each in one["measures"].items()]
        if variant != START:
            values += exchanged(own, found[START, ""])
        rows += [(variant, seed, *each) for each in values]
    return pd.DataFrame(rows, columns=["variant", "seed", "measure", "utterance", "value"])


def crossed_interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean of (seed, utterance) with a 95 % interval over both: value, low, high.

    Its half width is the root of the summed squares of the half widths of two Student intervals, one over the means of
    utterances and one over the means of seeds. It is rather too wide, as the residual counts twice. Satterthwaite's
    degrees of freedom gave intervals that covered only 90 % in a simulation with three seeds that differ. With a single
    seed it is Student's interval over utterances; a single utterance has none.
    """
    value = float(values.mean())
    if values.shape[1] < 2:
        return value, np.nan, np.nan
    means = [values.mean(axis=1 - axis) for axis, size in enumerate(values.shape) if size > 1]
    half = float(np.sqrt(sum((mean_interval(each)[2] - each.mean()) ** 2 for each in means)))
    return value, value - half, value + half


def summary(values: pd.DataFrame) -> pd.DataFrame:
    """Means over utterances, for each seed and for all: the table with COLUMNS.

    `minus` names the model whose values on the same utterances, with the same seed, are subtracted: CONTROL, and START
    for CONTROL itself. low, high: a 95 % interval over utterances and, for "all" of several seeds, over seeds.
    """
    rows = []
    wide = values.pivot_table(index=["variant", "measure", "seed"], columns="utterance", values="value", sort=False)
    for variant, measure in dict.fromkeys(wide.index.droplevel("seed")):
        own = wide.loc[variant, measure].dropna(axis="columns")
        rows += _rows(variant, measure, "", own)
        other = {START: None, CONTROL: START}.get(variant, CONTROL)
        if other and (other, measure) in wide.index.droplevel("seed"):
            others = wide.loc[other, measure].dropna(axis="columns")
            if other == START:  # it has no seeds
                others = pd.DataFrame([others.iloc[0]] * len(own), index=own.index)
            difference = (own - others).dropna(how="all").dropna(axis="columns")
            rows += _rows(variant, measure, other, difference)
    return pd.DataFrame(rows, columns=COLUMNS)


def _rows(variant: str, measure: str, minus: str, values: pd.DataFrame) -> list[tuple]:
    """Rows of `summary` from values (seed, utterance)."""
    parts = {seed: values.loc[[seed]] for seed in values.index if seed} | {"all": values}
    return [
        (variant, seed, measure, minus, *crossed_interval(part.to_numpy()), part.shape[1])
        for seed, part in parts.items()
        if part.size
    ]


def against_control(table: pd.DataFrame, measures: Sequence[str]) -> pd.DataFrame:
    """The rows with differences from the control over all seeds, in the order of the measures."""
    rows = table[table.minus.eq(CONTROL) & table.seed.eq("all") & table.measure.isin(measures)]
    return rows.sort_values("measure", key=lambda names: names.map([*measures].index), kind="stable")


def verdicts(table: pd.DataFrame) -> pd.DataFrame:
    """Each variant against the control: a row for each variant, a column for each measure of BETTER.

    A cell is "better" or "worse" if the 95 % interval of the difference over utterances and seeds excludes 0, and ""
    otherwise. Variants with a single seed are left out, as the interval of a single seed is too narrow.
    """
    rows = against_control(table, [*BETTER])
    seeds = table[table.seed.ne("all")].groupby("variant").seed.nunique()
    rows = rows[rows.variant.map(seeds) > 1]
    sign = rows.measure.map(BETTER).astype(float)  # also without any rows
    low, high = np.minimum(rows.low * sign, rows.high * sign), np.maximum(rows.low * sign, rows.high * sign)
    verdict = np.where(low > 0, "better", np.where(high < 0, "worse", ""))
    wide = rows.assign(verdict=verdict).pivot(index="variant", columns="measure", values="verdict")
    return wide.reindex(index=rows.variant.unique(), columns=[*BETTER], fill_value="").fillna("")


def answer(table: pd.DataFrame) -> str:
    """What improves and what gets worse against the control, a sentence for each measure."""
    found, sentences = verdicts(table), []
    for measure in BETTER:
        parts = []
        for verdict in ("better", "worse"):
            variants = found.index[found[measure] == verdict]
            if len(variants):
                parts.append(f"{verdict} with {', '.join(variants)}")
        sentences.append(f"{measure}: {'; '.join(parts) or 'no difference from the control'}.")
    return "\n".join(sentences)


def read_table(data: str | Path) -> pd.DataFrame:
    """Read the table that `evaluate` wrote. FileNotFoundError: there is none."""
    path = _written(data, "regularisation.csv")
    return pd.read_csv(path, keep_default_na=False, na_values={"value": "", "low": "", "high": ""}, dtype={"seed": str})


def origin(data: str | Path) -> str:
    """How the table was made, in a few sentences. FileNotFoundError: there is no record of it."""
    record = json.loads(_written(data, "provenance.json").read_text(encoding="utf-8"))
    training, explained, masks = record["training"], record["test"]["explained utterances"], record["test"]["occlusion"]
    reliability = ", ".join(f"{value:.2f} ({place})" for place, value in training["mean reliability"].items())
    return (
        f"{COMMAND} made these numbers: {len(record['weights']) - 1} models, trained with the attention of "
        f"{training['explained utterances']} utterances, and {START}. Mean reliability of the maps in training: "
        f"{reliability.replace('_reliability', '')}. Maps of {explained} test utterances, with {masks['input_masks']} "
        f"masks of the input and {masks['encoder_masks']} of the encoder."
    )


def _written(data: str | Path, name: str) -> Path:
    path = Path(data, "regularised", name)
    if not path.is_file():
        raise FileNotFoundError(f"There is no {path}: run {COMMAND}, which takes hours.")
    return path


def finished_models(folder: Path) -> list[Path]:
    """The folders of finished models, <variant>-<weight>-<seed>, in alphabetical order after the control."""
    models = [path.parent for path in folder.glob("*-*-*/model.safetensors")]
    return sorted(models, key=lambda path: (not path.name.startswith(CONTROL), path.name))


def evaluate(data: Path, device: str = "cpu", explained: int = EXPLAINED) -> pd.DataFrame:
    """Measure all finished models and write data/regularised/regularisation.csv and provenance.json.

    SystemExit: there is no finished model of the control.
    """
    folder = data / "train" / "regularised"
    paths = finished_models(folder)
    if not any(path.name.startswith(f"{CONTROL}-") for path in paths):
        raise SystemExit(f"There is no finished {CONTROL} in {folder}: run {COMMAND}.")
    corpus = xattn.load_corpus(data, language=LANGUAGE, split="test")
    found, weights = {}, {}
    for path in (data / "models" / START, *paths):
        model = xattn.load_model(path, device)
        variant, _, seed = (START, "", "") if model.name == START else model.name.rpartition("-")
        found[variant, seed] = measure_model(model, corpus, folder / "measures", explained=explained)
        weights[model.name] = model.weights_hash
    table = summary(values_of(found, corpus))
    gradients = {path.stem: json.loads(path.read_text()) for path in sorted((folder / "gradients").glob("*.json"))}
    targets = pd.read_csv(folder / "targets.csv")
    record = {
        "weights": weights,
        "training": {
            "explained utterances": len(targets),
            "mean reliability": targets.mean(numeric_only=True).round(3).to_dict(),
            "norms of gradients": {name: each["norms"] for name, each in gradients.items()},
        },
        "test": {"explained utterances": min(explained, len(corpus)), "occlusion": asdict(OCCLUSION)},
        "device": device,
        "versions": versions(),
    }
    output = data / "regularised"
    write_whole(output / "regularisation.csv", table.to_csv(index=False, float_format="%.6f").encode())
    write_whole(output / "provenance.json", (json.dumps(record, indent=1) + "\n").encode())
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of corpus and models; default: data")
    parser.add_argument("--device", default="cpu", help="a torch device; default: cpu")
    parser.add_argument("--utterances", type=int, default=EXPLAINED, help=f"to explain; default: {EXPLAINED}")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="default: the number of cores")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(answer(evaluate(arguments.data, arguments.device, arguments.utterances)))


if __name__ == "__main__":
    main()
