"""The paper's findings as statistics with intervals, and the rule that says whether they hold here."""

from collections.abc import Iterator

import numpy as np
import pandas as pd
import xarray as xr
from scipy import stats

from xattn.attention import MEAN
from xattn.compare import SOURCES, mean_interval
from xattn.tables import PUBLISHED

Range = tuple[float, float]
POSITIVE: Range = (0.0, np.inf)
HALF: Range = (0.45, 0.64)  # from the paper's usual range, 0.45 to 0.55, to its best aggregate, 0.639
MIXING: Range = (0.03, 0.18)
ENCODER_SHARE: Range = (0.52, 0.75)
LITTLE: Range = (-0.05, 0.05)  # the paper's own three models differ by 0.006 to 0.051
LARGER = {"small": "large", PUBLISHED["small"]: PUBLISHED["large"]}  # of two scales of one architecture
NOTHING = (np.nan, np.nan, np.nan)  # the value and interval of what is not available
BEST_REDUCTION = "2D max is the best reduction"  # from tab1
DELETION = {"SM^X 2d_max": "SM^X reduced beats CA", "SM^X": "full resolution beats reduced"}  # from tab6, by its maps


def verdict(low: float, high: float, expected: Range) -> str:
    """ "holds" if the interval lies in the expected range, "does not hold" if it lies outside it, else "undecided"."""
    if expected[0] <= low and high <= expected[1]:
        return "holds"
    if high < expected[0] or low > expected[1]:
        return "does not hold"
    return "undecided"


def judge(samples: dict[str, xr.DataArray], tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Judge every finding of the paper that the given results can speak to.

    Args:
        samples: `xattn.compare.correlations` of each model and setting, named as "base/en".
        tables: "tab1" (reductions) and "tab6" (deletion) as their notebooks write them, where they could run.

    Returns:
        finding, where, statistic, value, low, high (95 % interval), n, expected_low, expected_high, verdict, which is
        "not available" where maps, reliabilities or tables that a finding needs are not there.
    """
    rows = []
    for pair, rho in samples.items():
        for finding, statistic, values, expected in _within(rho.reindex(source=[*SOURCES, "difference"])):
            interval = mean_interval(values.values) if values.notnull().all() else NOTHING
            rows.append(_row(finding, pair, statistic, interval, values.size, expected))
    rows += [*_between(samples), *_from_tables(tables)]
    columns = ["finding", "where", "statistic", "value", "low", "high", "n", "expected_low", "expected_high", "verdict"]
    return pd.DataFrame(rows, columns=columns)


def _row(finding: str, where: str, statistic: str, interval: tuple[float, float, float], n: int, expected: Range):
    said = "not available" if np.isnan(interval[0]) else verdict(*interval[1:], expected)
    return finding, where, statistic, *interval, n, *expected, said


def _within(rho: xr.DataArray) -> Iterator[tuple[str, str, xr.DataArray, Range]]:
    """Findings about one model and setting: finding, statistic, its value for every utterance, expected range."""
    single = rho.sel(source="input").drop_sel(layer=MEAN, head=MEAN).mean(["layer", "head"])
    layers = rho.sel(source="input", head=MEAN).drop_sel(layer=MEAN)
    overall = rho.sel(layer=MEAN, head=MEAN)
    half = layers.sizes["layer"] // 2
    later = layers.isel(layer=slice(half, None)).mean("layer") - layers.isel(layer=slice(half)).mean("layer")
    yield (
        "averages beat single heads",
        "overall average minus mean single head",
        overall.sel(source="input") - single,
        POSITIVE,
    )
    yield "later layers are best", "second half of the layers minus first half", later, POSITIVE
    for source, symbol, finding, expected in (
        ("input", "SM^X", "about half of the input's relevance", HALF),
        ("encoder", "SM^H", "52 to 75 % of the encoder's saliency", ENCODER_SHARE),
    ):
        averages = rho.sel(source=source, head=MEAN)
        best = averages.isel(layer=int(averages.mean("utterance").fillna(-1).argmax("layer")))
        yield finding, f"rho(CA, {symbol}) of the best layer or overall average", best, expected
        reliability = rho.reliability.sel(source=source)
        corrected = best / np.sqrt(reliability.where(reliability > 0))
        statistic = f"the same over the root of the reliability of {symbol}"
        yield f"{finding}, corrected for noise", statistic, corrected, expected
    mixing = overall.sel(source="difference")
    yield "encoder saliency correlates more", "rho(CA, SM^H) minus rho(CA, SM^X)", mixing, POSITIVE
    yield "context mixing is 0.03 to 0.18", "rho(CA, SM^H) minus rho(CA, SM^X)", mixing, MIXING


def _between(samples: dict[str, xr.DataArray]) -> Iterator[tuple]:
    """Findings that compare settings of a model, or models in a setting."""
    overall = {pair: rho.sel(source="input", layer=MEAN, head=MEAN) for pair, rho in samples.items()}
    for pair, values in overall.items():
        model, setting = pair.split("/")
        larger = LARGER.get(model)
        english, large = overall.get(f"{model}/en"), overall.get(f"{larger}/{setting}")
        if english is not None and setting != "en":
            where, statistic = f"{model}, en and {setting}", f"rho(CA, SM^X) of en minus {setting}"
            interval = _difference(english, values, same_audio=setting.startswith("en-"))
            yield _row("English recognition above other settings", where, statistic, interval, values.size, POSITIVE)
        if large is not None:
            where, statistic = f"{model} and {larger}, {setting}", f"rho(CA, SM^X) of {larger} minus {model}"
            interval = _difference(large, values, same_audio=True)
            yield _row("scale matters little", where, statistic, interval, values.size, LITTLE)


def _difference(first: xr.DataArray, second: xr.DataArray, same_audio: bool) -> tuple[float, float, float]:
    """Difference of two means and its 95 % bootstrap interval, paired where both are of the same utterances.

    same_audio: whether equal names are of the same recordings; other tools number those of every language from 0.
    """
    if same_audio and np.array_equal(first.utterance, second.utterance):
        return mean_interval((first - second).values)
    result = stats.bootstrap(
        (first.values, second.values),
        lambda a, b, axis: a.mean(axis=axis) - b.mean(axis=axis),
        n_resamples=2000,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return float(first.mean() - second.mean()), *map(float, result.confidence_interval)


def _from_tables(tables: dict[str, pd.DataFrame]) -> Iterator[tuple]:
    """Findings about reductions and deletion, from the rows of the tables that hold paired differences."""
    for name, findings in {"tab1": [BEST_REDUCTION], "tab6": DELETION.values()}.items():
        if name not in tables:
            yield from (_row(finding, "", f"needs {name}", NOTHING, 0, POSITIVE) for finding in findings)
    if "tab1" in tables:
        for row in tables["tab1"].dropna(subset="minus").itertuples():
            where, statistic = f"{row.model}/{row.setting}", f"{row.quantity}, {row.reduction} minus {row.minus}"
            yield _row(BEST_REDUCTION, where, statistic, (row.value, row.low, row.high), row.n, POSITIVE)
    if "tab6" in tables:
        for row in tables["tab6"].query("metric == 'corpus-capped WER'").dropna(subset="minus").itertuples():
            where, statistic = f"{row.model}/{row.setting}", f"deletion area, {row.map} minus {row.minus}"
            yield _row(DELETION[row.map], where, statistic, (row.area, row.low, row.high), row.n, POSITIVE)
