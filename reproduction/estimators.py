"""How many masks a map needs: estimators compared on blocks of stored masks."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from reproduction.conditions import load_condition
from xattn.analysis.intervals import mean_interval
from xattn.analysis.reliability import attenuation_factor


def first_of_models(conditions: Sequence[str], number: int) -> list[str]:
    """The first condition of each of the first `number` models."""
    first = {}
    for condition in conditions:
        first.setdefault(condition.split("/")[0], condition)
    return list(first.values())[:number]


def convergence_table(parts: pd.DataFrame) -> pd.DataFrame:
    """How well maps from few masks reproduce those from all of them, as measured and without noise.

    Args:
        parts: rows of `xattn.analysis.reliability.convergence` with the columns condition and utterance.

    Returns:
        A long table: condition, saliency, estimator, masks, quantity, value, spread, low, high, n. Quantities are r
        (with the map from all masks), measured and reported (the error of rho, averaged over utterances, against rho
        from all masks without noise) and reliability. value is a mean over disjoint blocks of masks, spread their
        standard deviation, low and high the 95 % interval of the mean, n the number of blocks with a value.
    """
    keys = ["condition", "saliency", "linear", "estimator", "masks"]
    blocks = parts.groupby([*keys, "block"], sort=False).mean(numeric_only=True).drop(columns="linear", errors="ignore")
    blocks = blocks.reset_index()
    blocks["limit"] = blocks.everything / attenuation_factor(blocks.everything, blocks.half, blocks.linear)
    first = blocks.groupby(["condition", "saliency"], sort=False).head(1)  # the map from all masks
    few = blocks.drop(index=first.index)
    reference = few.merge(first[["condition", "saliency", "limit"]], on=["condition", "saliency"])["limit_y"].to_numpy()
    few = few.assign(measured=few.everything - reference, reported=few.limit - reference)
    quantities = ["r", "measured", "reported", "reliability"]
    long = few.melt(keys, quantities, var_name="quantity").dropna(subset="value")
    grouped = long.groupby([*keys, "quantity"], sort=False).value
    columns = ["value", "low", "high"]
    means = grouped.apply(lambda values: pd.Series(mean_interval(values), columns)).unstack()
    means = means.assign(spread=grouped.std(), n=grouped.size()).reset_index().drop(columns="linear")
    return means[["condition", "saliency", "estimator", "masks", "quantity", "value", "spread", "low", "high", "n"]]


def arranged_convergence(table: pd.DataFrame) -> pd.DataFrame:
    """`convergence_table` as text, value ± spread, estimators side by side."""
    text = table.assign(text=table.value.map("{:z.3f}".format) + table.spread.map(" ± {:.3f}".format))
    keys = {"index": ["condition", "saliency", "masks"], "columns": ["quantity", "estimator"]}
    return text.pivot(**keys, values="text").fillna("").reindex(columns=["r", "measured", "reported"], level=0)


def largest_scores(folder: str | Path, conditions: Sequence[str]) -> pd.DataFrame:
    """The largest score of SM^X over the mean score of all masks: median over tokens, then mean over utterances."""
    rows = {}
    for condition in conditions:
        scores = (item.input_scores for item in load_condition(folder, condition))
        ratios = [(each.max("input_mask") / each.mean("input_mask")).median().item() for each in scores]
        rows[condition] = {"largest score / mean score": np.mean(ratios)}
    return pd.DataFrame.from_dict(rows, orient="index").round(1)
