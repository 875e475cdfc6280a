"""The paper's findings as statistics with intervals, and the rule that decides whether they hold here."""

from collections.abc import Iterator

import numpy as np
import pandas as pd
import xarray as xr

from reproduction.tables import MEAN, PUBLISHED
from xattn.analysis.intervals import difference_interval, mean_interval
from xattn.analysis.reliability import corrected_for_noise

Range = tuple[float, float]
POSITIVE: Range = (0.0, np.inf)
HALF: Range = (0.45, 0.64)  # from the paper's usual range, 0.45 to 0.55, to its best aggregate, 0.639
MIXING: Range = (0.03, 0.18)
ENCODER_SHARE: Range = (0.52, 0.75)
LITTLE: Range = (-0.06, 0.06)  # the paper's own three models differ by 0.006 to 0.051
SCALES = [("base", "small"), ("base", "large"), ("small", "large")]  # a smaller and a larger model
SCALES += [tuple(PUBLISHED.get(model, model) for model in models) for models in SCALES]
NOTHING = (np.nan, np.nan, np.nan)  # value and interval if something is not available
BEST_REDUCTION = "2D max is the best reduction"  # from tab1
DELETION = {  # from tab6, by the two maps of the difference
    ("SM^X 2d_max", "CA"): "SM^X reduced beats CA",
    ("SM^X", "SM^X 2d_max"): "full resolution beats reduced",
}


def verdict(low: float, high: float, expected: Range) -> str:
    """ "holds" if the interval lies in the expected range, "does not hold" if it lies outside it, else "undecided"."""
    if expected[0] <= low and high <= expected[1]:
        return "holds"
    if high < expected[0] or low > expected[1]:
        return "does not hold"
    return "undecided"


def judge(samples: dict[str, xr.Dataset], tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Judge every finding of the paper that the given results can speak to.

    Args:
        samples: results of `xattn.analysis.correlation.correlate_all` by condition, such as "base/en".
        tables: "tab1" (reductions) and "tab6" (deletion) as their notebooks write them, if they could run.

    Returns:
        A long table: finding, where, statistic, value, low, high (95 % interval), n, expected_low, expected_high and
        verdict. The verdict is "not available" if maps, reliabilities or tables that the finding needs are missing.
    """
    rows = []
    for condition, rho in samples.items():
        for finding, statistic, values, expected in _within(rho.reindex(saliency=["input", "encoder", "difference"])):
            interval = mean_interval(values.values) if values.notnull().all() else NOTHING
            rows.append(_row(finding, condition, statistic, interval, values.size, expected))
    rows += [*_between(samples), *_from_tables(tables)]
    columns = ["finding", "where", "statistic", "value", "low", "high", "n", "expected_low", "expected_high", "verdict"]
    return pd.DataFrame(rows, columns=columns)


def changed(table: pd.DataFrame, other: pd.DataFrame) -> tuple[pd.DataFrame, int]:
    """The rows of `judge` whose verdict differs in another result, and the number of rows that both have."""
    keys = ["finding", "where", "statistic"]
    both = table.merge(other, on=keys, suffixes=("", " there"))
    different = both[both.verdict != both["verdict there"]]
    return different[[*keys, "value", "value there", "verdict", "verdict there"]], len(both)


def _row(finding: str, where: str, statistic: str, interval: tuple[float, float, float], n: int, expected: Range):
    said = "not available" if np.isnan(interval[0]) else verdict(*interval[1:], expected)
    return finding, where, statistic, *interval, n, *expected, said


def _within(rho: xr.Dataset) -> Iterator[tuple[str, str, xr.DataArray, Range]]:
    """Findings about one condition: finding, statistic, its value for every utterance, expected range."""
    heads = rho.by_layer_and_head.sel(saliency="input").stack(single=["layer", "head"])
    layers, overall, corrected = rho.by_layer.sel(saliency="input"), rho.overall, corrected_for_noise(rho)
    everything, by_layer = overall.sel(saliency="input"), layers.mean("layer")
    for finding, statistic, values in (
        ("averaging over heads helps", "layer averages minus single heads", by_layer - heads.mean("single")),
        ("averaging over layers helps", "overall average minus layer averages", everything - by_layer),
        ("averages beat single heads", "overall average minus best head", everything - _best(heads, "single")),
    ):
        yield finding, statistic, values, POSITIVE
    if layers.sizes["layer"] > 1:
        earlier = layers.sizes["layer"] - max(1, layers.sizes["layer"] // 3)
        last, others = (_best(layers.isel(layer=part)) for part in (slice(earlier, None), slice(earlier)))
        yield "the last layers are best", "best layer of the last third minus best other", last - others, POSITIVE
    for source, symbol, finding, expected in (
        ("input", "SM^X", "about half of the input's relevance", HALF),
        ("encoder", "SM^H", "52 to 75 % of the encoder's saliency", ENCODER_SHARE),
    ):
        best = _best(_averages(rho).sel(saliency=source))
        yield finding, f"rho(CA, {symbol}) of the best layer or overall average", best, expected
        statistic = f"the same over the root of the reliability of {symbol}"
        noiseless = _averages(corrected).sel(saliency=source, layer=best.layer.item())
        yield f"{finding}, corrected for noise", statistic, noiseless, expected
    mixing = "rho(CA, SM^H) minus rho(CA, SM^X)"
    more, noiseless = (each.overall.sel(saliency="difference") for each in (rho, corrected))
    yield "encoder saliency correlates more", mixing, more, POSITIVE
    yield "encoder saliency correlates more, corrected for noise", f"{mixing}, each corrected", noiseless, POSITIVE
    yield "context mixing is 0.03 to 0.18", mixing, more, MIXING


def _averages(rho: xr.Dataset) -> xr.DataArray:
    """The layer averages and, as layer "mean", the average of everything."""
    return xr.concat([rho.by_layer, rho.overall.expand_dims(layer=[MEAN])], "layer")


def _best(averages: xr.DataArray, along: str = "layer") -> xr.DataArray:
    """The layer, or single head, with the highest mean over utterances."""
    return averages.isel({along: int(averages.mean("utterance").fillna(-1).argmax(along))})


def _between(samples: dict[str, xr.Dataset]) -> Iterator[tuple]:
    """Findings that compare directions of a model, or models in a direction."""
    overall = {name: rho.overall.sel(saliency="input") for name, rho in samples.items()}
    corrected = {name: corrected_for_noise(rho).overall.sel(saliency="input") for name, rho in samples.items()}
    english = "English recognition above other settings"
    for condition, values in overall.items():
        model, direction = condition.split("/")
        for finding, each in ((english, overall), (f"{english}, corrected for noise", corrected)):
            if direction != "en" and f"{model}/en" in each:
                where, statistic = f"{model}, en and {direction}", f"rho(CA, SM^X) of en minus {direction}"
                interval = _difference(each[f"{model}/en"], each[condition], same_audio=direction.startswith("en-"))
                yield _row(finding, where, statistic, interval, values.size, POSITIVE)
        for smaller, larger in SCALES:
            if model == smaller and f"{larger}/{direction}" in overall:
                where, statistic = f"{model} and {larger}, {direction}", f"rho(CA, SM^X) of {larger} minus {model}"
                interval = _difference(overall[f"{larger}/{direction}"], values, same_audio=True)
                yield _row("scale matters little", where, statistic, interval, values.size, LITTLE)


def _difference(first: xr.DataArray, second: xr.DataArray, same_audio: bool) -> tuple[float, float, float]:
    """Difference of two means and its 95 % interval, paired if both come from the same utterances.

    same_audio: whether equal names mean equal recordings; other tools number those of every language from 0.
    """
    if first.isnull().any() or second.isnull().any():
        return NOTHING
    if same_audio and np.array_equal(first.utterance, second.utterance):
        return mean_interval((first - second).values)
    return difference_interval(first.values, second.values)


def _from_tables(tables: dict[str, pd.DataFrame]) -> Iterator[tuple]:
    """Findings about reductions and deletion, from the rows of the tables with paired differences."""
    for name, findings in {"tab1": [BEST_REDUCTION], "tab6": DELETION.values()}.items():
        if name not in tables:
            yield from (_row(finding, "", f"needs {name}", NOTHING, 0, POSITIVE) for finding in findings)
    if "tab1" in tables:
        if "deletion" not in set(tables["tab1"].quantity):  # without a model to decode with, only rho is available
            yield _row(BEST_REDUCTION, "", "needs deletion in tab1", NOTHING, 0, POSITIVE)
        for row in tables["tab1"].dropna(subset="minus").itertuples():
            where, statistic = f"{row.model}/{row.setting}", f"{row.quantity}, {row.reduction} minus {row.minus}"
            yield _row(BEST_REDUCTION, where, statistic, (row.value, row.low, row.high), row.n, POSITIVE)
    if "tab6" in tables:
        for row in tables["tab6"].query("metric == 'corpus-capped WER'").dropna(subset="minus").itertuples():
            where, statistic = f"{row.model}/{row.setting}", f"deletion area, {row.map} minus {row.minus}"
            if (row.map, row.minus) in DELETION:
                interval = row.area, row.low, row.high
                yield _row(DELETION[row.map, row.minus], where, statistic, interval, row.n, POSITIVE)
