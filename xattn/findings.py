"""The paper's findings as statistics with intervals, and the rule that says whether they hold here."""

from collections.abc import Iterator

import numpy as np
import pandas as pd
import xarray as xr
from scipy import stats

from xattn.attention import MEAN
from xattn.compare import SOURCES, corrected_for_noise, mean_interval
from xattn.tables import PUBLISHED

Range = tuple[float, float]
POSITIVE: Range = (0.0, np.inf)
HALF: Range = (0.45, 0.64)  # from the paper's usual range, 0.45 to 0.55, to its best aggregate, 0.639
MIXING: Range = (0.03, 0.18)
ENCODER_SHARE: Range = (0.52, 0.75)
LITTLE: Range = (-0.06, 0.06)  # the paper's own three models differ by 0.006 to 0.051
SCALES = [("base", "small"), ("base", "large"), ("small", "large")]  # each with a larger one
SCALES += [tuple(PUBLISHED.get(model, model) for model in pair) for pair in SCALES]
NOTHING = (np.nan, np.nan, np.nan)  # the value and interval of what is not available
BEST_REDUCTION = "2D max is the best reduction"  # from tab1
DELETION = {  # from tab6, by the maps whose difference it is
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
    heads = rho.sel(source="input").drop_sel(layer=MEAN, head=MEAN).stack(single=["layer", "head"])
    layers = rho.sel(source="input", head=MEAN).drop_sel(layer=MEAN)
    overall, corrected = rho.sel(layer=MEAN, head=MEAN), corrected_for_noise(rho)
    everything, by_layer = overall.sel(source="input"), layers.mean("layer")
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
        best = _best(rho.sel(source=source, head=MEAN))
        yield finding, f"rho(CA, {symbol}) of the best layer or overall average", best, expected
        statistic = f"the same over the root of the reliability of {symbol}"
        noiseless = corrected.sel(source=source, head=MEAN, layer=best.layer.item())
        yield f"{finding}, corrected for noise", statistic, noiseless, expected
    mixing = "rho(CA, SM^H) minus rho(CA, SM^X)"
    more, noiseless = overall.sel(source="difference"), corrected.sel(source="difference", layer=MEAN, head=MEAN)
    yield "encoder saliency correlates more", mixing, more, POSITIVE
    yield "encoder saliency correlates more, corrected for noise", f"{mixing}, each corrected", noiseless, POSITIVE
    yield "context mixing is 0.03 to 0.18", mixing, more, MIXING


def _best(averages: xr.DataArray, along: str = "layer") -> xr.DataArray:
    """Those of the layers, or single heads, that have the highest mean over utterances."""
    return averages.isel({along: int(averages.mean("utterance").fillna(-1).argmax(along))})


def _between(samples: dict[str, xr.DataArray]) -> Iterator[tuple]:
    """Findings that compare settings of a model, or models in a setting."""
    place = {"source": "input", "layer": MEAN, "head": MEAN}
    overall = {pair: rho.sel(place) for pair, rho in samples.items()}
    corrected = {pair: corrected_for_noise(rho).sel(place) for pair, rho in samples.items()}
    english = "English recognition above other settings"
    for pair, values in overall.items():
        model, setting = pair.split("/")
        for finding, each in ((english, overall), (f"{english}, corrected for noise", corrected)):
            if setting != "en" and f"{model}/en" in each:
                where, statistic = f"{model}, en and {setting}", f"rho(CA, SM^X) of en minus {setting}"
                interval = _difference(each[f"{model}/en"], each[pair], same_audio=setting.startswith("en-"))
                yield _row(finding, where, statistic, interval, values.size, POSITIVE)
        for smaller, larger in SCALES:
            if model == smaller and f"{larger}/{setting}" in overall:
                where, statistic = f"{model} and {larger}, {setting}", f"rho(CA, SM^X) of {larger} minus {model}"
                interval = _difference(overall[f"{larger}/{setting}"], values, same_audio=True)
                yield _row("scale matters little", where, statistic, interval, values.size, LITTLE)


def _difference(first: xr.DataArray, second: xr.DataArray, same_audio: bool) -> tuple[float, float, float]:
    """Difference of two means and its 95 % bootstrap interval, paired where both are of the same utterances.

    same_audio: whether equal names are of the same recordings; other tools number those of every language from 0.
    """
    if first.isnull().any() or second.isnull().any():
        return NOTHING
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
        if "deletion" not in set(tables["tab1"].quantity):  # there was no model to decode with: rho speaks alone
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
