"""Tables: long ones with our numbers, and the paper's arrangement as text with the paper's values beside ours."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

from xattn.analysis.intervals import jackknife_interval
from xattn.analysis.reliability import attenuation_of, too_noisy
from xattn.files import write_whole

ROOT = Path(__file__).resolve().parents[1]
PAPER = ROOT / "data" / "paper.csv"
PUBLISHED = {"small": "fama-small", "large": "fama-medium"}  # the published names of the paper's models
MEAN = "mean"  # label of the average over layers or heads
KEYS = ["saliency", "layer", "head"]
NOISY = "too noisy"
# An underscore inside a word, as in 2d_max, is no markup.
MARKUP = re.compile(r"[\\`*\[\]<>|$~&]|(?<![^\W_])_|_(?![^\W_])")


def with_mean_labels(rho: xr.Dataset) -> xr.DataArray:
    """One array (..., layer, head) with layers 1..L and "mean", heads 1..H and "mean", from results of `correlate`."""
    layers, heads = [*rho.layer.values.tolist(), MEAN], [*rho["head"].values.tolist(), MEAN]
    by_layer = rho.by_layer.expand_dims(head=[MEAN])
    by_head, overall = rho.by_head.expand_dims(layer=[MEAN]), rho.overall.expand_dims(layer=[MEAN], head=[MEAN])
    inside = [rho.by_layer_and_head, by_layer, by_head, overall]
    order = (*(axis for axis in rho.by_layer_and_head.dims if axis not in ("layer", "head")), "layer", "head")
    inner, right, lower, corner = (part.transpose(*order).values for part in inside)
    values = np.block([[inner, right], [lower, corner]])
    coords = {name: rho[name] for name in order[:-2]} | {
        "layer": np.array(layers, dtype=object),
        "head": np.array(heads, dtype=object),
    }
    return xr.DataArray(values, dims=order, coords=coords)


def with_difference(rho: xr.DataArray) -> xr.DataArray:
    """Append the saliency "difference", encoder minus input, if there are both."""
    if rho.sizes["saliency"] < 2:
        return rho
    difference = rho.sel(saliency="encoder") - rho.sel(saliency="input")
    return xr.concat([rho, difference.expand_dims(saliency=["difference"])], "saliency")


def _with_difference(values: np.ndarray) -> np.ndarray:
    """Append encoder minus input to (saliency, ...), if there are both."""
    return values if len(values) < 2 else np.concatenate([values, values[1:] - values[:1]])


def correlation_table(rho: xr.Dataset) -> pd.DataFrame:
    """Means over utterances of `xattn.analysis.correlation.correlate_all`, with their 95 % intervals.

    Returns:
        A long table with the columns model, direction, estimator, saliency ("input", "encoder", "difference"), layer,
        head, rho, low, high, reliability (mean over utterances; of a difference, the lower one), reported (what rho
        converges to with more masks, see `xattn.analysis.reliability.converged`; empty if the maps are too noisy),
        reported_low, reported_high and n (utterances). Intervals hold for utterances and masks alike, because every
        utterance has its own masks. For models that pad their input, a column `padding` has the mean share of the
        attention, over all layers and heads, that falls on it.
    """
    each = with_mean_labels(rho.sel(masks="all"))
    like, n = with_difference(each.mean("utterance")), rho.sizes["utterance"]
    values, factor = each.transpose("utterance", "saliency", "layer", "head").values, attenuation_of(rho)

    def measured(rows: np.ndarray) -> np.ndarray:
        return _with_difference(values[rows].mean(axis=0))

    def reported(rows: np.ndarray) -> np.ndarray:
        return _with_difference(values[rows].mean(axis=0) / factor(rows)[:, None, None])

    columns = {}
    for names, statistic in (
        (["rho", "low", "high"], measured),
        (["reported", "reported_low", "reported_high"], reported),
    ):
        columns |= dict(zip(names, jackknife_interval(statistic, n), strict=True))
    table = pd.DataFrame({name: like.copy(data=values).to_series() for name, values in columns.items()})
    reliability, noisy = rho.reliability.mean("utterance").to_series(), too_noisy(rho).to_series()
    if "difference" in like.saliency:
        reliability["difference"], noisy["difference"] = reliability.min(), noisy.any()
    unknown = noisy.reindex(table.index, level="saliency").to_numpy()
    table.loc[unknown, ["reported", "reported_low", "reported_high"]] = np.nan
    table.insert(3, "reliability", reliability.reindex(table.index, level="saliency"))
    table = table.reset_index()
    about = {"model": rho.model, "direction": rho.setting, "estimator": rho.estimator}
    table = table.assign(n=n, **about)[[*about, *table.columns, "n"]]
    return table.assign(padding=float(rho.padding.mean())) if "padding" in rho else table


def without_noise(rho: xr.Dataset, saliency: str, values: np.ndarray) -> Callable[[np.ndarray], float]:
    """Mean over utterances of correlations with one kind of saliency, over the attenuation of the same utterances.

    values: one number for each utterance of `rho`, (n,). Returns a statistic of utterance indices, for the jackknife.
    """
    factor = attenuation_of(rho.sel(saliency=[saliency]))
    return lambda rows: float(values[rows].mean() / factor(rows)[0])


def reported_interval(rho: xr.Dataset, saliency: str, values: np.ndarray) -> tuple[float, float, float]:
    """The limit of correlations (n,) with its interval, value, low and high; NaN if the maps are too noisy for it."""
    if bool(too_noisy(rho.sel(saliency=[saliency])).any()):
        return (np.nan,) * 3
    return tuple(map(float, jackknife_interval(without_noise(rho, saliency, values), len(values))))


def format_interval(
    table: pd.DataFrame, value: str, digits: int = 2, bounds: tuple[str, str] = ("low", "high")
) -> pd.Series:
    """The column `value` and its interval as text: "0.43 (0.40 to 0.47)", "0.43" without interval, "" without value."""
    number, low, high = (table[name].map(f"{{:z.{digits}f}}".format) for name in (value, *bounds))
    text = number + (" (" + low + " to " + high + ")").where(table[bounds[0]].notna(), "")
    return text.where(table[value].notna(), "")


def format_reported(table: pd.DataFrame, digits: int = 2) -> pd.Series:
    """The reported rho with its interval as text, or "too noisy (rho ...)" if there is none."""
    text = format_interval(table, "reported", digits, ("reported_low", "reported_high"))
    return text.where(table.reported.notna(), NOISY + " (rho " + table.rho.map(f"{{:z.{digits}f}}".format) + ")")


def paper_values(table: str) -> pd.DataFrame:
    """The numbers of one of the paper's tables that we hold: metric, model, direction, value, note (data/paper.csv).

    Those of its small and large models are repeated under their published names.
    """
    held = pd.read_csv(PAPER).query("table == @table").drop(columns="table")
    own = held.assign(model=held.model.map(PUBLISHED))
    return pd.concat([held, own.dropna(subset="model")])


def save(table: pd.DataFrame, path: str | Path, caption: str) -> None:
    """Write a table of texts as Markdown below its caption, both as they are; missing texts stay empty."""
    names = [*table.index.names, *table.columns] if table.index.names[0] else list(table.columns)
    rows = table.reset_index() if table.index.names[0] else table
    rows = rows.set_axis([" ".join(map(str, n)) if isinstance(n, tuple) else str(n) for n in names], axis=1)
    rows = rows.astype(object).fillna("").map(lambda cell: _plain(str(cell))).rename(columns=_plain)
    text = rows.to_markdown(index=False, disable_numparse=True)
    write_whole(Path(path), f"{_plain(caption)}\n\n{text}\n".encode())


def _plain(text: str) -> str:
    """Escape what Markdown would read as markup, so that a name such as a_b_ is shown as it is."""
    return MARKUP.sub(r"\\\g<0>", text)
