"""The paper's findings as statistics with intervals, and the rule that decides whether they hold here.

A finding has one row for each condition or comparison that it covers. All its intervals are widened for the number of
its rows (Bonferroni), so that the chance of any wrong verdict within a finding stays at 5 %.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr
from scipy import stats

from reproduction.tables import MEAN, NOISY, PUBLISHED, without_noise
from xattn.analysis.intervals import LEVEL, chosen_on_others, difference_interval, jackknife_interval
from xattn.analysis.reliability import ENOUGH

Range = tuple[float, float]
POSITIVE: Range = (0.0, np.inf)
HALF: Range = (0.45, 0.64)  # from the paper's usual range, 0.45 to 0.55, to its best aggregate, 0.639
ENCODER_SHARE: Range = (0.52, 0.75)
LITTLE: Range = (-0.06, 0.06)  # the paper's own three models differ by 0.006 to 0.051
SCALES = [("base", "small"), ("base", "large"), ("small", "large")]  # a smaller and a larger model
SCALES += [tuple(PUBLISHED.get(model, model) for model in models) for models in SCALES]
LEAST = 8  # utterances for a verdict
EQUAL = 1e-9  # difference that is only rounding
VERDICTS = ("holds", "does not hold", "undecided", NOISY, "not available")
COMPARED = ("tab5.csv", "findings.csv")  # with a longer run
BEST_REDUCTION = "2D max is the best reduction"  # from tab1
DELETION = {  # from tab6, by the two maps of the difference
    ("SM^X 2d_max", "CA"): "SM^X reduced beats CA",
    ("SM^X", "SM^X 2d_max"): "full resolution beats reduced",
}

Interval = Callable[[float], tuple[float, float, float]]  # confidence level -> value, low, high


@dataclass(frozen=True)
class Row:
    """One statistic of a finding.

    where: the condition or the comparison; interval: None if something that it needs is missing; n: utterances;
    reliability: the lowest one of the maps that it rests on.
    """

    finding: str
    where: str
    statistic: str
    interval: Interval | None
    n: int
    reliability: float
    expected: Range = POSITIVE


def verdict(low: float, high: float, expected: Range) -> str:
    """ "holds" if the interval lies in the expected range, "does not hold" if it lies outside it, else "undecided".

    An interval that is one bound of the range, as for the difference of two equal maps, is "undecided", too.
    """
    if any(abs(low - bound) < EQUAL and abs(high - bound) < EQUAL for bound in expected):
        return "undecided"
    if expected[0] <= low and high <= expected[1]:
        return "holds"
    if high < expected[0] or low > expected[1]:
        return "does not hold"
    return "undecided"


def judge(samples: dict[str, xr.Dataset], tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Judge every finding of the paper on the given results.

    Args:
        samples: results of `xattn.analysis.correlation.correlate_all` by condition, such as "base/en".
        tables: "tab1" (reductions) and "tab6" (deletion) as their notebooks write them, if they could run.

    Returns:
        A long table: finding, where, statistic, value, low, high (95 % interval), corrected_low, corrected_high (the
        interval widened for the number of the finding's rows, on which the verdict rests), n, reliability,
        expected_low, expected_high and verdict, one of VERDICTS: "too noisy" if the maps have a reliability below 0.5
        or there are fewer than 8 utterances, "not available" if something that the finding needs is missing.
    """
    rows = [row for condition, rho in samples.items() for row in _within(condition, rho)]
    rows += [*_between(samples), *_from_tables(tables)]
    sizes = pd.Series([row.finding for row in rows]).value_counts()
    judged = [_judged(row, 1 - (1 - LEVEL) / sizes[row.finding]) for row in rows]
    return pd.DataFrame(judged)


def _judged(row: Row, level: float) -> dict:
    nothing = np.nan, np.nan, np.nan
    value, low, high = row.interval(LEVEL) if row.interval else nothing
    _, corrected_low, corrected_high = row.interval(level) if row.interval else nothing
    if row.interval is None:
        decided = "not available"
    elif np.isnan([value, corrected_low]).any() or row.n < LEAST or row.reliability < ENOUGH:
        decided = NOISY
    else:
        decided = verdict(corrected_low, corrected_high, row.expected)
    return {
        "finding": row.finding,
        "where": row.where,
        "statistic": row.statistic,
        "value": float(value),
        "low": float(low),
        "high": float(high),
        "corrected_low": float(corrected_low),
        "corrected_high": float(corrected_high),
        "n": row.n,
        "reliability": row.reliability,
        "expected_low": row.expected[0],
        "expected_high": row.expected[1],
        "verdict": decided,
    }


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """How many rows of `judge` have each verdict, one line for each finding."""
    counts = pd.crosstab(table.finding, table.verdict)
    return counts.reindex(index=table.finding.unique(), columns=VERDICTS, fill_value=0).rename_axis(columns=None)


def changed(table: pd.DataFrame, reference: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """The rows of `judge` with another verdict than in a reference, and the number of rows in both."""
    keys = ["finding", "where", "statistic"]
    both = table.merge(reference, "inner", on=keys, suffixes=("", "_reference"))
    moved = both[both.verdict != both.verdict_reference]
    return moved[[*keys, "value", "value_reference", "reliability", "verdict", "verdict_reference"]], len(both)


def contradictions(moved: pd.DataFrame) -> pd.DataFrame:
    """Those of the `changed` rows that hold in one table and do not hold in the other."""
    opposite = {("holds", "does not hold"), ("does not hold", "holds")}
    verdicts = zip(moved.verdict, moved.verdict_reference, strict=True)
    return moved[[pair in opposite for pair in verdicts]]


def compare_reported(table: pd.DataFrame, reference: pd.DataFrame) -> pd.DataFrame:
    """The reported correlations of two tables of context mixing (tab5.csv), for attention averaged over all layers.

    Returns:
        A long table: model, direction, saliency, reported, reference, difference.
    """
    keys = ["model", "direction", "saliency"]
    overall = [each[(each["layer"] == MEAN) & (each.saliency != "difference")] for each in (table, reference)]
    first, second = (each[[*keys, "reported"]] for each in overall)
    both = first.merge(second.rename(columns={"reported": "reference"}), "inner", on=keys)
    return both.assign(difference=both.reported - both.reference)


def comparison(output: Path, reference: Path, root: Path) -> str:
    """How results compare with those of a longer run, as text."""
    (mixing, judged), (their_mixing, theirs) = (
        [pd.read_csv(folder / name) for name in COMPARED] for folder in (output, reference)
    )
    name = reference.relative_to(root).as_posix()
    if list(mixing.columns) != list(their_mixing.columns):
        return f"Not compared with {name}, whose tables have other columns: run its profile again."
    reported = compare_reported(mixing, their_mixing)
    largest = reported.difference.abs().max()
    moved, common = changed(judged, theirs)
    lines = [
        f"Compared with {name}:",
        reported.round(3).to_string(index=False),
        f"Largest difference of a reported rho: {largest:.3f}; too noisy: {reported.reported.isna().sum()} of "
        f"{len(reported)}.",
        f"Verdicts: {common} in both, {len(moved)} differ, {len(contradictions(moved))} contradict.",
    ]
    return "\n".join(lines)


def _within(condition: str, rho: xr.Dataset) -> Iterator[Row]:
    """Findings about one condition."""
    for saliency in ("input", "encoder"):
        if saliency not in rho.saliency or rho.overall.sel(saliency=saliency).isnull().all():
            missing = ["about half of the input's relevance"] if saliency == "input" else [
                "52 to 75 % of the encoder's saliency", "encoder saliency correlates more"
            ]  # fmt: skip
            yield from (Row(finding, condition, f"needs {saliency} saliency", None, 0, np.nan) for finding in missing)
            return
        yield from _of_saliency(condition, rho, saliency)
    of_encoder, of_input = (
        without_noise(rho, saliency, rho.overall.sel(saliency=saliency, masks="all").values)
        for saliency in ("encoder", "input")
    )

    def mixing(rows: np.ndarray) -> float:
        return of_encoder(rows) - of_input(rows)

    statistic = "rho(CA, SM^H) minus rho(CA, SM^X), both without noise"
    yield _row("encoder saliency correlates more", condition, statistic, mixing, rho)


def _of_saliency(condition: str, rho: xr.Dataset, saliency: str) -> Iterator[Row]:
    """Findings about the correlation with one kind of saliency; values are divided by its attenuation."""
    chosen = rho.sel(saliency=[saliency])  # with its axis, because `_row` takes the lowest reliability
    every = {
        name: each.sel(saliency=saliency, masks="all").values for name, each in chosen.items() if "masks" in each.dims
    }
    overall, layers = every["overall"], every["by_layer"]  # (n,), (n, L)
    heads = every["by_layer_and_head"].reshape(len(overall), -1)
    averages = np.column_stack([layers, overall])

    def row(finding: str, statistic: str, values: np.ndarray, expected: Range = POSITIVE) -> Row:
        return _row(finding, condition, statistic, without_noise(rho, saliency, values), chosen, expected)

    best = chosen_on_others(averages)
    if saliency == "encoder":
        statistic = "rho(CA, SM^H) of the best layer or overall average, without noise"
        yield row("52 to 75 % of the encoder's saliency", statistic, best, ENCODER_SHARE)
        return
    by_layer = layers.mean(axis=1)
    statistic = "rho(CA, SM^X) of the best layer or overall average, without noise"
    yield row("averaging over heads helps", "layer averages minus single heads", by_layer - heads.mean(axis=1))
    yield row("averaging over layers helps", "overall average minus layer averages", overall - by_layer)
    yield row("averages beat single heads", "overall average minus best head", overall - chosen_on_others(heads))
    if layers.shape[1] > 1:
        earlier = layers.shape[1] - max(1, layers.shape[1] // 3)
        last, others = chosen_on_others(layers[:, earlier:]), chosen_on_others(layers[:, :earlier])
        yield row("the last layers are best", "best layer of the last third minus best other", last - others)
    yield row("about half of the input's relevance", statistic, best, HALF)


def _row(finding: str, where: str, statistic: str, value: Callable, rho: xr.Dataset, expected: Range = POSITIVE) -> Row:
    """A row whose value is a statistic of utterance indices."""
    n, reliability = rho.sizes["utterance"], float(rho.reliability.mean("utterance").min())
    return Row(finding, where, statistic, lambda level: jackknife_interval(value, n, level), n, reliability, expected)


def _between(samples: dict[str, xr.Dataset]) -> Iterator[Row]:
    """Findings that compare directions of a model, or models in a direction."""
    for condition in samples:
        model, direction = condition.split("/")
        if direction != "en" and f"{model}/en" in samples:
            where, statistic = f"{model}, en and {direction}", f"rho(CA, SM^X) of en minus {direction}, without noise"
            pair = samples[f"{model}/en"], samples[condition]
            yield _difference(
                "English recognition above other directions", where, statistic, *pair, direction.startswith("en-")
            )
        for smaller, larger in SCALES:
            if model == smaller and f"{larger}/{direction}" in samples:
                where = f"{model} and {larger}, {direction}"
                statistic = f"rho(CA, SM^X) of {larger} minus {model}, without noise"
                pair = samples[f"{larger}/{direction}"], samples[condition]
                yield _difference("scale matters little", where, statistic, *pair, True, LITTLE)


def _difference(
    finding: str,
    where: str,
    statistic: str,
    first: xr.Dataset,
    second: xr.Dataset,
    same_audio: bool,
    expected: Range = POSITIVE,
) -> Row:
    """Difference of two overall correlations with SM^X, paired if both come from the same utterances.

    same_audio: whether equal names mean equal recordings; other tools number those of every language from 0.
    """
    pair = [each.sel(saliency=["input"]) for each in (first, second)]
    numbers = [each.sizes["utterance"] for each in pair]
    values = [each.overall.sel(saliency="input", masks="all").values for each in pair]
    of_first, of_second = (without_noise(each, "input", own) for each, own in zip(pair, values, strict=True))

    def paired(rows: np.ndarray) -> float:
        return of_first(rows) - of_second(rows)

    def unpaired(level: float) -> tuple[float, float, float]:
        exact = of_first(np.arange(numbers[0])) - of_second(np.arange(numbers[1]))
        pseudo = _pseudo_values(of_first, numbers[0]), _pseudo_values(of_second, numbers[1])
        found, low, high = difference_interval(*pseudo, level)
        return exact, exact + low - found, exact + high - found

    same = same_audio and np.array_equal(first.utterance, second.utterance)
    interval = (lambda level: jackknife_interval(paired, numbers[0], level)) if same else unpaired
    reliability = min(float(each.reliability.mean()) for each in pair)
    return Row(finding, where, statistic, interval, min(numbers), reliability, expected)


def _pseudo_values(statistic: Callable[[np.ndarray], float], n: int) -> np.ndarray:
    """Jackknife pseudo-values (n,) of a statistic of utterance indices."""
    everything = np.arange(n)
    others = np.array([statistic(np.delete(everything, row)) for row in everything])
    return n * statistic(everything) - (n - 1) * others


def _from_tables(tables: dict[str, pd.DataFrame]) -> Iterator[Row]:
    """Findings about reductions and deletion, from the rows of the tables with paired differences."""
    for name, findings in {"tab1": [BEST_REDUCTION], "tab6": DELETION.values()}.items():
        if name not in tables:
            yield from (Row(finding, "", f"needs {name}", None, 0, np.nan) for finding in findings)
    if "tab1" in tables:
        if "deletion" not in set(tables["tab1"].quantity):  # without a model to decode with, only rho is available
            yield Row(BEST_REDUCTION, "", "needs deletion in tab1", None, 0, np.nan)
        judged = tables["tab1"].query("quantity != 'insertion'")  # the paper's finding rests on deletion and rho
        for row in judged.dropna(subset="minus").itertuples():
            where, statistic = f"{row.model}/{row.direction}", f"{row.quantity}, {row.reduction} minus {row.minus}"
            yield Row(BEST_REDUCTION, where, statistic, _stored(row, row.value), row.n, row.reliability)
    if "tab6" in tables:
        for row in tables["tab6"].query("metric == 'deletion, corpus-capped WER'").dropna(subset="minus").itertuples():
            where, statistic = f"{row.model}/{row.direction}", f"deletion area, {row.map} minus {row.minus}"
            if (row.map, row.minus) in DELETION:
                finding = DELETION[row.map, row.minus]
                yield Row(finding, where, statistic, _stored(row, row.area), row.n, row.reliability)


def _stored(row, value: float) -> Interval:
    """An interval of a table, widened to another confidence level as Student's intervals are."""

    def interval(level: float) -> tuple[float, float, float]:
        quantiles = [stats.t.ppf((1 + each) / 2, row.n - 1) for each in (level, LEVEL)]
        half = (row.high - row.low) / 2 * quantiles[0] / quantiles[1]
        return value, value - half, value + half

    return interval
