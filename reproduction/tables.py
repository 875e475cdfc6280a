"""Tables: long ones with our numbers, and the paper's arrangement as text with the paper's values beside ours."""

from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

from xattn.analysis.intervals import mean_interval
from xattn.analysis.reliability import corrected_for_noise, noise_ceiling

ROOT = Path(__file__).resolve().parents[1]
PAPER = ROOT / "data" / "paper.csv"
PUBLISHED = {"small": "fama-small", "large": "fama-medium"}  # the published names of the paper's models
MEAN = "mean"  # label of the average over layers or heads
KEYS = ["source", "layer", "head"]


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


def correlation_table(rho: xr.Dataset) -> pd.DataFrame:
    """Means over utterances of `xattn.analysis.correlation.correlate_all`, with their 95 % intervals.

    Returns:
        A long table with the columns model, setting, estimator, source ("input", "encoder", "difference"), layer, head,
        rho, low, high, corrected (`corrected_for_noise`, over the utterances that have it), corrected_low,
        corrected_high, ceiling (`noise_ceiling`) and n (utterances).
    """

    def summary(values: xr.Dataset, names: list[str]) -> pd.DataFrame:
        long = with_mean_labels(values).rename(saliency="source").to_series()
        rows = {key: mean_interval(group.dropna()) for key, group in long.groupby(KEYS, sort=False)}
        return pd.DataFrame.from_dict(rows, orient="index", columns=names)

    table = summary(rho, ["rho", "low", "high"])
    table = table.join(summary(corrected_for_noise(rho), ["corrected", "corrected_low", "corrected_high"]))
    table.index = pd.MultiIndex.from_tuples(table.index, names=KEYS)
    ceiling = noise_ceiling(rho.reliability).mean("utterance").to_series().rename_axis("source")
    table["ceiling"] = ceiling.reindex(table.index, level="source")
    table = table.assign(n=rho.sizes["utterance"]).reset_index()
    return table.assign(**rho.attrs)[["model", "setting", "estimator", *table.columns]]


def format_interval(
    table: pd.DataFrame, value: str, digits: int = 2, bounds: tuple[str, str] = ("low", "high")
) -> pd.Series:
    """The column `value` and its interval as text: "0.43 (0.40 to 0.47)", "0.43" without interval, "" without value."""
    number, low, high = (table[name].map(f"{{:z.{digits}f}}".format) for name in (value, *bounds))
    text = number + (" (" + low + " to " + high + ")").where(table[bounds[0]].notna(), "")
    return text.where(table[value].notna(), "")


def paper_values(table: str) -> pd.DataFrame:
    """The numbers of one of the paper's tables that we hold: metric, model, setting, value, note (data/paper.csv).

    Those of its small and large models are repeated under their published names.
    """
    held = pd.read_csv(PAPER).query("table == @table").drop(columns="table")
    own = held.assign(model=held.model.map(PUBLISHED))
    return pd.concat([held, own.dropna(subset="model")])


def save(table: pd.DataFrame, path: str | Path, caption: str) -> None:
    """Write a table of texts as Markdown below its caption; missing texts stay empty."""
    names = [*table.index.names, *table.columns] if table.index.names[0] else list(table.columns)
    rows = table.reset_index() if table.index.names[0] else table
    rows = rows.set_axis([" ".join(map(str, n)) if isinstance(n, tuple) else str(n) for n in names], axis=1)
    text = rows.fillna("").to_markdown(index=False, disable_numparse=True)
    Path(path).write_text(f"{caption}\n\n{text}\n", encoding="utf-8")
