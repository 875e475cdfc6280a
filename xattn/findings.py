"""The paper's findings as statistics with intervals, and the rule that says whether they hold here."""

from collections.abc import Iterable

import numpy as np
import pandas as pd
import xarray as xr
from scipy import stats

from xattn.attention import MEAN
from xattn.compare import correlate, mean_interval


def correlations(maps: Iterable[xr.Dataset]) -> xr.DataArray:
    """rho of every utterance of a model and setting: (source, utterance, layer, head) with the labels "mean"."""
    values = []
    for item in maps:
        both = [correlate(item, source).expand_dims(source=[source]) for source in ("input", "encoder")]
        values.append(xr.concat(both, "source").expand_dims(utterance=[item.utterance]))
    return xr.concat(values, "utterance").transpose("source", "utterance", "layer", "head")


POSITIVE = (0.0, np.inf)


def verdict(low: float, high: float, expected: tuple[float, float]) -> str:
    """ "holds" if the interval lies in the expected range, "does not hold" if it lies outside it, else "undecided"."""
    if expected[0] <= low and high <= expected[1]:
        return "holds"
    if high < expected[0] or low > expected[1]:
        return "does not hold"
    return "undecided"


def judge(samples: dict[str, xr.DataArray], tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Judge every finding of the paper that the given results can speak to.

    Args:
        samples: `correlations` of each model and setting, named as "base/en".
        tables: "tab1" (reductions) and "tab6" (deletion) as their notebooks write them.

    Returns:
        finding, where, statistic, value, low, high (95 % interval), n, expected_low, expected_high, verdict.
    """
    rows = []
    for pair, rho in samples.items():
        n = rho.sizes["utterance"]
        single = rho.sel(source="input").drop_sel(layer=MEAN, head=MEAN)  # (utterance, layer, head)
        layers = rho.sel(source="input", head=MEAN).drop_sel(layer=MEAN)
        overall = rho.sel(layer=MEAN, head=MEAN)  # (source, utterance)
        gain = overall.sel(source="input") - single.mean(["layer", "head"])
        rows.append(
            _row(
                "averages beat single heads",
                pair,
                "overall average minus mean single head",
                _mean_over_utterances(gain),
                n,
                POSITIVE,
            )
        )
        half = layers.sizes["layer"] // 2
        later = layers.isel(layer=slice(half, None)).mean("layer") - layers.isel(layer=slice(half)).mean("layer")
        rows.append(
            _row(
                "later layers are best",
                pair,
                "second half of the layers minus first half",
                _mean_over_utterances(later),
                n,
                POSITIVE,
            )
        )
        best = layers.isel(layer=int(layers.mean("utterance").argmax("layer")))
        typical = (0.45, 0.64)  # from the paper's usual range, 0.45 to 0.55, to its best aggregate, 0.639
        statistic = "rho(CA, SM^X) of the best layer or overall average"
        strongest = max((best, overall.sel(source="input")), key=lambda values: float(values.mean()))
        rows.append(
            _row("about half of the input's relevance", pair, statistic, _mean_over_utterances(strongest), n, typical)
        )
        mixing = overall.sel(source="encoder") - overall.sel(source="input")
        statistic = "rho(CA, SM^H) minus rho(CA, SM^X)"
        rows.append(
            _row("encoder saliency correlates more", pair, statistic, _mean_over_utterances(mixing), n, POSITIVE)
        )
        rows.append(
            _row("context mixing is 0.03 to 0.18", pair, statistic, _mean_over_utterances(mixing), n, (0.03, 0.18))
        )
        share = rho.sel(source="encoder", head=MEAN).drop_sel(layer=MEAN)
        share = share.isel(layer=int(share.mean("utterance").argmax("layer")))
        strongest = max((share, overall.sel(source="encoder")), key=lambda values: float(values.mean()))
        statistic = "rho(CA, SM^H) of the best layer or overall average"
        rows.append(
            _row(
                "52 to 75 % of the encoder's saliency",
                pair,
                statistic,
                _mean_over_utterances(strongest),
                n,
                (0.52, 0.75),
            )
        )
    rows += _between(samples)
    rows += _from_tables(tables)
    columns = ["finding", "where", "statistic", "value", "low", "high", "n", "expected_low", "expected_high", "verdict"]
    return pd.DataFrame(rows, columns=columns)


def _row(
    finding: str,
    where: str,
    statistic: str,
    interval: tuple[float, float, float],
    n: int,
    expected: tuple[float, float],
) -> tuple:
    return finding, where, statistic, *interval, n, *expected, verdict(*interval[1:], expected)


def _mean_over_utterances(values: xr.DataArray) -> tuple[float, float, float]:
    return mean_interval(values.values)


def _between(samples: dict[str, xr.DataArray]) -> list[tuple]:
    """Findings that compare settings of a model, or models in a setting."""
    overall = {pair: rho.sel(source="input", layer=MEAN, head=MEAN) for pair, rho in samples.items()}
    rows = []
    for pair, values in overall.items():
        model, setting = pair.split("/")
        english = overall.get(f"{model}/en")
        if english is not None and setting != "en":
            interval = _difference(english.values, values.values)
            where, statistic = f"{model}, en and {setting}", f"rho(CA, SM^X) of en minus {setting}"
            finding = "English recognition above other settings"
            rows.append(_row(finding, where, statistic, interval, values.size, POSITIVE))
        large = overall.get(f"large/{setting}")
        if model == "small" and large is not None:
            where, statistic = f"small and large, {setting}", "rho(CA, SM^X) of large minus small"
            rows.append(
                _row(
                    "scale matters little",
                    where,
                    statistic,
                    _mean_over_utterances(large - values),
                    values.size,
                    (-0.05, 0.05),
                )
            )
    return rows


def _difference(first: np.ndarray, second: np.ndarray) -> tuple[float, float, float]:
    """Difference of two means and its 95 % bootstrap interval, for unpaired samples."""
    result = stats.bootstrap(
        (first, second),
        lambda a, b, axis: a.mean(axis=axis) - b.mean(axis=axis),
        n_resamples=2000,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return float(first.mean() - second.mean()), *map(float, result.confidence_interval)


def _from_tables(tables: dict[str, pd.DataFrame]) -> list[tuple]:
    """Findings about deletion; an interval of a difference is bounded by the ends of both intervals, which is safe."""
    reductions = tables["tab1"].query("quantity == 'deletion'").set_index("reduction").rename(columns={"value": "area"})
    maps = tables["tab6"].query("metric == 'corpus-capped WER'").set_index("map")
    rival = reductions.drop("2d_max").area.idxmax()
    comparisons = [
        ("2D max is the best reduction", reductions.loc["2d_max"], reductions.loc[rival], f"2d_max minus {rival}"),
        ("SM^X reduced beats CA", maps.loc["SM^X 2d_max"], maps.loc["CA"], "SM^X 2d_max minus CA"),
        ("full resolution beats reduced", maps.loc["SM^X"], maps.loc["SM^X 2d_max"], "SM^X minus SM^X 2d_max"),
    ]
    rows = []
    for finding, better, worse, statistic in comparisons:
        interval = (better.area - worse.area, better.low - worse.high, better.high - worse.low)
        where, what = f"{better.model}/{better.setting}", f"deletion area, {statistic}"
        rows.append(_row(finding, where, what, interval, int(better.n), POSITIVE))
    return rows
