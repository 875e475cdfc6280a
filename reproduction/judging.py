"""Judge attributions by the same measures: faithfulness, localisation, stability, compactness, cost, sanity."""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import xarray as xr

from reproduction.conditions import progress
from reproduction.methods import BASELINES, METHODS, RANDOM, STORED, Explained, methods_of
from xattn.analysis.correlation import correlate, normalised_saliency
from xattn.analysis.faithfulness import COLUMNS, areas, curve_rows, sentence_map, size, texts_without
from xattn.analysis.forced_faithfulness import MASKS, effects, infidelity, on_cells, probability_area
from xattn.analysis.intervals import mean_interval
from xattn.analysis.localisation import mass_inside, peak_distances, token_kinds, token_times
from xattn.analysis.normalisation import min_max, standardise_over_tokens
from xattn.analysis.sanity import layers_from_output, randomised
from xattn.attribution.attention import cross_attention
from xattn.attribution.forced import Forced
from xattn.attribution.variants import previous_tokens
from xattn.data.utterance import Utterance
from xattn.files import hash_value, write_whole
from xattn.maps import drop_special_tokens, on_steps, word_numbers
from xattn.models import S2TModel
from xattn.words import word_times

VERSION = 2  # of the numbers: raise it with any change that moves them
INAUDIBLE = -40.0  # dB: the level of the noise that should not change a map, relative to the speech
STANDARDISED = ", standardised"  # what follows a method's name if its steps are standardised over tokens
REFERENCES = ("SM^X", "SM^H", "windows", "words", "integrated gradients", "masked gradients")  # for rho
PLAIN = "attention: all heads"  # the paper's average
PREVIOUS = "previous tokens"  # no map of the input: nats without the audio, and without the text before a token
WITHIN = (0.02, 0.05, 0.1, 0.2)  # seconds
MEANS = ["method", "measure", "value", "low", "high", "n"]  # columns
DIFFERENCES = ["method", "measure", "minus", "value", "low", "high", "n"]


def steps_of(attribution: xr.DataArray, maps: xr.Dataset, name: str) -> xr.DataArray:
    """An attribution on steps, (token, step) without </s>, and standardised over tokens if the name says so."""
    steps = drop_special_tokens(on_steps(attribution, maps)).transpose("token", "step")
    return steps.copy(data=standardise_over_tokens(steps.values)) if name.endswith(STANDARDISED) else steps


def localisation(steps: xr.DataArray, maps: xr.Dataset, utterance: Utterance) -> dict[str, float]:
    """How well an attribution finds the spoken words; empty if their times are unknown or it is a translation."""
    if not utterance.words or "-" in maps.setting:
        return {}
    times = token_times(steps, utterance.words, maps.setting)
    known = ~np.isnan(times[:, 0])
    if not known.any():
        return {}
    return {
        "peak inside word": float(np.mean(peak_distances(steps, times)[known] == 0)),
        "mass inside word": float(mass_inside(steps, times)[known].mean()),
    }


def boundaries(found: np.ndarray, times: np.ndarray, name: str) -> dict[str, float]:
    """Errors of starts and ends (n, 2) in seconds: medians, and the shares of starts within some limits."""
    errors = abs(found - times)
    measures = {f"start of word, {name}": np.median(errors[:, 0]), f"end of word, {name}": np.median(errors[:, 1])}
    measures |= {f"start within {1000 * limit:.0f} ms, {name}": np.mean(errors[:, 0] <= limit) for limit in WITHIN}
    return {measure: float(value) for measure, value in measures.items()}


def word_boundaries(attribution: xr.DataArray, maps: xr.Dataset, utterance: Utterance) -> dict[str, float]:
    """Errors of word times from an attribution: with dynamic time warping, and from the peak of each word alone."""
    if not utterance.words or "-" in maps.setting:
        return {}
    spoken = steps_of(attribution, maps, STANDARDISED)
    numbers = word_numbers(spoken.token.values)
    numbers[~np.isin(token_kinds(spoken.token.values), ("word start", "continuation"))] = -1  # `word_times` skips these
    words, first = (each[1:] if numbers.min() < 0 else each for each in np.unique(numbers, return_index=True))
    truth = token_times(spoken, utterance.words, maps.setting)[first]
    known = ~np.isnan(truth[:, 0])
    if not known.any():
        return {}
    warped = word_times(maps, on_steps(attribution, maps))[["start", "end"]].values
    around = np.array([_around_peak(spoken.values[numbers == word].mean(axis=0), spoken) for word in words])
    return boundaries(warped[known], truth[known], "warped") | boundaries(around[known], truth[known], "peak")


def _around_peak(row: np.ndarray, steps: xr.DataArray) -> tuple[float, float]:
    """Start and end in seconds of the steps around the highest one that are at least half as high."""
    peak, low = int(row.argmax()), row < row.max() / 2
    before, after = np.flatnonzero(low[:peak]), np.flatnonzero(low[peak:])
    first = before[-1] + 1 if len(before) else 0
    last = peak + after[0] - 1 if len(after) else len(row) - 1
    return float(steps.step_start[first]), float(steps.step_end[last])


def explained_with(each: Explained, forced: Forced) -> Explained:
    """The same utterance with another model or input that is forced to write the same tokens."""
    with torch.inference_mode():
        states = forced.encode(forced.features)
        weights = cross_attention(forced.model, states, forced.decoder_inputs)[:, :, forced.rows]
    attention = each.attention.copy(data=weights[..., : each.attention.sizes["step"]])
    features = each.maps.features.copy(data=forced.features.cpu().numpy())
    return replace(each, forced=forced, maps=each.maps.assign(cross_attention=attention, features=features))


def noisy(each: Explained) -> Explained:
    """The same utterance with white noise that is INAUDIBLE."""
    audio = each.utterance.audio()
    rng = np.random.default_rng([1, *each.maps.utterance.encode()])
    level = np.sqrt(np.mean(audio**2)) * 10 ** (INAUDIBLE / 20)
    features = each.forced.model.features(audio + level * rng.standard_normal(len(audio)).astype(np.float32))
    return explained_with(each, replace(each.forced, features=features))


def similarity(first: np.ndarray, second: np.ndarray) -> float:
    """Pearson's correlation of two attributions of the same tokens, 0 if one is constant."""
    return float(np.corrcoef(first, second)[0, 1]) if np.ptp(first) and np.ptp(second) else 0.0


def compared(attribution: xr.DataArray, maps: xr.Dataset) -> np.ndarray:
    """All values of an attribution, as it is compared with attention: (cells,)."""
    return normalised_saliency(attribution, maps).values.ravel()


def judge(each: Explained, names: Sequence[str], step: int, check: bool, timed: bool) -> dict:
    """Measure the methods on one utterance.

    Args:
        step: per cent of the cells between two points of deletion with decoding.
        check: also explain the utterance with noise, other masks and a randomised model.
        timed: also measure the costs, which explains it once more.

    Returns:
        measures: those of each method, by name; similarity: of all pairs, a matrix; texts: what the model writes as
        cells are deleted in the order of each map, for all percentages but 0.
    """
    maps, forced, measures, texts = each.maps, each.forced, {}, {}
    hidden, changes = effects(forced, maps)
    found = {name: METHODS[name](each) for name in progress(names, f"Attributions of {maps.utterance}")}
    flat = {name: compared(attribution, maps) for name, attribution in found.items()}
    blank = texts_without(forced.model, maps, None)
    for name, attribution in progress(found.items(), f"Measures of {maps.utterance}"):
        measures[name] = {
            "completeness error": attribution.attrs.get("completeness_error", np.nan),
            "size": size(min_max(drop_special_tokens(attribution).values)[0])[1],
            "infidelity": infidelity(attribution, maps, hidden, changes),
            "probability, deletion": probability_area(forced, attribution, maps),
            "probability, insertion": probability_area(forced, attribution, maps, insertion=True),
            **word_boundaries(attribution, maps, each.utterance),
        }
        sentence = sentence_map(on_cells(attribution, maps))
        texts[name] = [*texts_without(forced.model, maps, sentence, step=step), *blank]
        for variant in (name, name + STANDARDISED):
            steps, judged = steps_of(attribution, maps, variant), measures.setdefault(variant, {})
            judged |= localisation(steps, maps, each.utterance)
            # Standardised over tokens, this is the paper's rho.
            values = steps.values.ravel() if variant.endswith(STANDARDISED) else flat[name]
            judged |= {f"rho, {other}": similarity(values, flat[other]) for other in REFERENCES if other in flat}
    for own in ([checks(each, found)] if check else []) + ([costs(each, names)] if timed else []):
        for name, values in own.items():
            measures[name] |= values
    similar = [[similarity(a, b) for b in flat.values()] for a in flat.values()]
    return {"measures": measures, "similarity": similar, "texts": texts}


def checks(each: Explained, found: dict[str, xr.DataArray]) -> dict[str, dict[str, float]]:
    """Similarity of each map to those with inaudible noise, with other masks and of a model with random weights.

    Maps from stored scores have only the reliability of their masks, and baselines nothing to check.
    """
    maps, model = each.maps, each.forced.model
    others = {
        "stability: noise": noisy(each),
        "similarity to a random model": explained_with(
            each, replace(each.forced, model=randomised(model, layers_from_output(model)))
        ),
        "stability: masks": replace(each, seed=each.seed + 1),
    }
    measures = {}
    for name, attribution in progress(found.items(), f"Checks of {maps.utterance}"):
        if name in STORED:
            place = "input" if name.startswith("SM^X") else "encoder"
            measures[name] = {"stability: masks": maps.attrs[f"{place}_reliability"]}
        elif name not in BASELINES:
            chosen = {key: one for key, one in others.items() if key != "stability: masks" or name in RANDOM}
            values = compared(attribution, maps)
            measures[name] = {
                key: similarity(values, compared(METHODS[name](one), maps)) for key, one in chosen.items()
            }
    return measures


def costs(each: Explained, names: Sequence[str]) -> dict[str, dict[str, float]]:
    """Seconds that each method takes, in units of one decoding by beam search.

    Maps from stored scores are not computed again: SM^X costs its passes, and SM^H is left out, as passes of the
    decoder alone are much cheaper.
    """
    maps, forced = each.maps, each.forced
    searching = _seconds(lambda: forced.model.generate(forced.features[None], maps.setting))
    passing = _seconds(lambda: effects(forced, maps)) / MASKS
    measures = {}
    for name in progress(names, f"Costs of {maps.utterance}"):
        if name not in STORED:
            measures[name] = {"cost": _seconds(lambda name=name: METHODS[name](each)) / searching}
        elif name.startswith("SM^X"):
            measures[name] = {"cost": len(maps.input_scores) * passing / searching}
    return measures


def _seconds(function: Callable) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def best_on_others(stored: Sequence[xr.Dataset]) -> list[tuple[int, tuple[int, int]]]:
    """For each utterance the layer and the pair of layer and head with the largest mean rho on every second one.

    Utterances with even numbers get the choice of the odd ones and the reverse, so nobody is judged on a choice that
    was made with it. rho is the one with SM^X.
    """
    rho = xr.concat([correlate(maps.cross_attention, maps.input_saliency) for maps in stored], "utterance")
    chosen = []
    for parity in (0, 1):
        others = rho.isel(utterance=slice(1 - parity, None, 2) if len(stored) > 1 else slice(None)).mean("utterance")
        head = others.by_layer_and_head.stack(pair=["layer", "head"]).idxmax().item()
        chosen.append((int(others.by_layer.idxmax()), tuple(map(int, head))))
    return [chosen[number % 2] for number in range(len(stored))]


def compare_methods(
    model: S2TModel,
    stored: Iterable[xr.Dataset],
    corpus: Iterable[Utterance],
    folder: Path,
    step: int,
    checked: int,
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Judge all methods on the maps of one condition.

    Args:
        folder: for the numbers of each utterance, so that an interrupted call resumes.
        step: per cent of the cells between two points of deletion with decoding.
        checked: the number of utterances, the first ones, that are explained again for `checks` and `costs`. Costs are
            those of one utterance if it is 0.

    Returns:
        Three long tables. The methods: model, condition (a direction), method, measure, value (the mean over
        utterances, or an area of the corpus), low, high (95 %), n. Differences on the same utterances from the best
        method of each measure and from PLAIN: the same columns and minus, the subtracted method. The mean similarity
        of all pairs: model, condition, first, second, value, n.
    """
    stored, utterances = list(stored), {each.id: each for each in corpus}
    names, rows, matrices, curves = methods_of(model, stored[0]), [], [], []
    for number, (maps, (layer, head)) in enumerate(zip(stored, best_on_others(stored), strict=True)):
        each = Explained(maps, Forced.of(model, maps), utterances[maps.utterance], layer, head)
        check, timed = number < checked, number < max(checked, 1)
        key = hash_value([maps.attrs["key"], list(names), layer, head, step, check, VERSION], 16)
        path = folder / maps.model / maps.setting / f"{maps.utterance}.json"
        numbers = stored_numbers(path, key, lambda own=each, again=(check, timed): judge(own, names, step, *again))
        measures = numbers["measures"] | {
            PREVIOUS: {f"without {what}": value for what, value in previous_tokens(each.forced, maps).attrs.items()}
        }
        rows += [(method, name, number, value) for method, own in measures.items() for name, value in own.items()]
        matrices.append(numbers["similarity"])
        if maps.reference:
            for name, texts in numbers["texts"].items():
                curves += curve_rows(maps, name, np.nan, [maps.hypothesis, *texts], step)
        print(f"{maps.model} {maps.setting} {number + 1}/{len(stored)} {maps.utterance}", flush=True)
    values = pd.DataFrame(rows, columns=["method", "measure", "utterance", "value"]).dropna()
    table, differences = _means(values)
    if curves:
        of_areas = _areas(pd.DataFrame(curves, columns=COLUMNS), stored[0].setting)
        table, differences = (
            pd.concat(pair, ignore_index=True) for pair in zip((table, differences), of_areas, strict=True)
        )
    condition = {"model": stored[0].model, "condition": stored[0].setting}
    mean = np.mean(matrices, axis=0)
    pairs = [(a, b, mean[i, j], len(stored)) for i, a in enumerate(names) for j, b in enumerate(names)]
    similar = pd.DataFrame(pairs, columns=["first", "second", "value", "n"])
    return tuple(each.assign(**condition)[[*condition, *each.columns]] for each in (table, differences, similar))


def stored_numbers(path: Path, key: str, compute: Callable[[], dict]) -> dict:
    """Read the numbers that were stored at a path under a key, or compute and store them."""
    if path.is_file():
        numbers = json.loads(path.read_text(encoding="utf-8"))
        if numbers["key"] == key:
            return numbers
    numbers = {"key": key} | compute()
    write_whole(path, json.dumps(numbers).encode())
    return numbers


def _means(values: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Means over utterances, and differences of means, from method, measure, utterance and value."""
    found = [
        (*key, *mean_interval(part.value), len(part)) for key, part in values.groupby(["method", "measure"], sort=False)
    ]
    differences = []
    for measure, part in values.groupby("measure", sort=False):
        wide = part.pivot(index="utterance", columns="method", values="value")[part.method.unique()]
        for name, minus in _pairs(measure, wide.mean()):
            difference = (wide[name] - wide[minus]).dropna()
            differences.append((name, measure, minus, *mean_interval(difference), len(difference)))
    return pd.DataFrame(found, columns=MEANS), pd.DataFrame(differences, columns=DIFFERENCES)


def _areas(curves: pd.DataFrame, direction: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Areas under the WER (or BLEU, for translations) of deletion, and their differences."""
    metric, language = "BLEU" if "-" in direction else "corpus-capped WER", direction.rpartition("-")[2]
    measure, single = f"deletion, {metric}", areas(curves, metric, language)[1]
    pairs = _pairs(measure, single.set_index("map").area)
    summary = areas(curves, metric, language, pairs)[1].rename(columns={"map": "method", "area": "value"})
    summary = summary.assign(measure=measure)
    return summary.loc[summary.minus.eq(""), MEANS], summary.loc[summary.minus.ne(""), DIFFERENCES]


def _pairs(measure: str, means: pd.Series) -> list[tuple[str, str]]:
    """The methods that are compared by a measure: each with the best one, and each with PLAIN."""
    if measure not in BETTER:
        return []
    subtracted = dict.fromkeys((_best(measure, means), PLAIN))
    return [(name, minus) for minus in subtracted if minus in means for name in means.index.drop(minus)]


def _best(measure: str, means: pd.Series) -> str:
    """The best method, without the baselines, by a measure of BETTER."""
    return (means[~is_baseline(means.index)] * BETTER[measure]).idxmax()


def is_baseline(methods: pd.Index) -> np.ndarray:
    """Whether each method, standardised or not, is one of BASELINES."""
    return methods.str.removesuffix(STANDARDISED).isin(BASELINES)


# Whether more is better (1) or less (-1); for rho it is neither, as another map is no truth.
BETTER = {
    "deletion, corpus-capped WER": 1,
    "deletion, BLEU": -1,
    "probability, deletion": -1,
    "probability, insertion": 1,
    "infidelity": -1,
    "peak inside word": 1,
    "mass inside word": 1,
    "start of word, warped": -1,
    "end of word, warped": -1,
    "start of word, peak": -1,
    "end of word, peak": -1,
    "stability: noise": 1,
    "stability: masks": 1,
    "similarity to a random model": -1,
    "size": -1,
    "cost": -1,
}
SHOWN = (  # in the figure
    *("probability, deletion", "infidelity", "peak inside word", "start of word, warped"),
    *("stability: noise", "similarity to a random model", "rho, SM^X", "rho, SM^H"),
)


def winners(table: pd.DataFrame, differences: pd.DataFrame) -> pd.DataFrame:
    """The best method by each measure and condition, and those whose difference from it may be 0; no baselines.

    table, differences: see `compare_methods`.
    """
    keys, rows = ["model", "condition", "measure"], []
    others = dict(iter(differences[~is_baseline(pd.Index(differences.method))].groupby(keys)))
    for key, part in table[table.measure.isin(BETTER)].groupby(keys, sort=False):
        means = part.set_index("method").value
        best = _best(key[2], means)
        if key in others:
            other = others[key][others[key].minus.eq(best)].dropna(subset="low")  # one utterance decides nothing
            close = other.method[(other.low <= 0) & (other.high >= 0)]
            if len(other):
                rows.append((*key, best, means[best], "; ".join(close)))
    return pd.DataFrame(rows, columns=[*keys, "best", "value", "not distinguishable"])


def arranged_methods(table: pd.DataFrame) -> pd.DataFrame:
    """One row for each condition and method, with the measures side by side."""
    columns = [name for name in (*BETTER, "rho, SM^X", "rho, SM^H") if name in set(table.measure)]
    table = table[table.measure.isin(columns)]
    wide = table.pivot_table(index=["model", "condition", "method"], columns="measure", values="value", sort=False)
    return wide[columns].round(3).reset_index()
