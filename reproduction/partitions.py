"""Partitions of the input compared: two pyramids of superpixels and windows of time."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

from reproduction.conditions import load_condition
from reproduction.tables import NOISY, format_interval, reported_interval
from xattn.analysis.correlation import correlate_all
from xattn.analysis.faithfulness import areas, deletion_curves
from xattn.analysis.intervals import mean_interval
from xattn.analysis.localisation import peak_distances, token_times
from xattn.analysis.reliability import convergence
from xattn.attribution.segments import PARTITIONS, PYRAMIDS, same_segment, segment_numbers, slic_pyramid
from xattn.data.utterance import Utterance
from xattn.maps import on_steps
from xattn.models import S2TModel

KINDS = ("SM^X", "SM^X 2d_max")  # of maps whose deletion and insertion are compared


def others(parameters: dict) -> dict[str, int]:
    """The partitions to compare a profile's own with, and their numbers of masks: `compared`, or all with its own."""
    equal = {kind: parameters["input_masks"] for kind in PARTITIONS if kind != parameters["partition"]}
    return parameters["compared"] or equal


def granularities(features: Iterable[np.ndarray]) -> pd.DataFrame:
    """Superpixels asked for and found in spectrograms (time, mel), for each pyramid and granularity.

    "agrees with the first" is the share of neighbouring cells that two segmentations both join or both separate.
    """
    rows = []
    for each in features:
        for pyramid in PYRAMIDS:
            levels, asked = slic_pyramid(each, pyramid=pyramid), segment_numbers(len(each), pyramid)
            for number, (level, wanted) in enumerate(zip(levels, asked, strict=True), start=1):
                agreement = np.mean(same_segment(level) == same_segment(levels[0]))
                seconds = len(each) / 100
                rows.append((pyramid, number, wanted / seconds, (level.max() + 1) / seconds, agreement))
    names = ["pyramid", "granularity", "asked per second", "found per second", "agrees with the first"]
    return pd.DataFrame(rows, columns=names).groupby(names[:2], sort=False).mean().round(2)


def compare_partitions(
    model: S2TModel, folders: dict[str, Path], condition: str, corpus: Iterable[Utterance], step: int
) -> pd.DataFrame:
    """Compare maps of the same utterances from different partitions.

    Args:
        folders: of maps, by partition; the first one is subtracted from the others.
        corpus: the explained utterances, for the times of their words.
        step: see `faithfulness`.

    Returns:
        A long table: partition, minus, quantity, value, low, high, reliability, n. Quantities are rho(CA, SM^X) as
        measured and as reported, deletion and insertion at full resolution and reduced to steps, the share of tokens
        whose peak lies inside their word, and the mean distance of the peaks from the words in seconds.
    """
    first, *others = folders
    utterances = {each.id: each for each in corpus}
    rows, curves = [], {test: [] for test in ("deletion", "insertion")}
    for name, folder in folders.items():
        rho = correlate_all(_explained(folder, condition, utterances)).sel(saliency=["input"])
        measured, reliability = rho.overall.sel(saliency="input", masks="all").values, float(rho.reliability.mean())
        own = {"rho": mean_interval(measured), "reported": reported_interval(rho, "input", measured)}
        own |= _peaks(folder, condition, utterances)
        rows += [(name, "", quantity, *interval, reliability, len(measured)) for quantity, interval in own.items()]
        for test, tables in curves.items():
            stored = _explained(folder, condition, utterances)
            found = deletion_curves(model, stored, KINDS, Path(folder, "deletion"), test == "insertion", step)
            tables.append(found.assign(map=name + "|" + found["map"]))
    columns = ["partition", "minus", "quantity", "value", "low", "high", "reliability", "n"]
    parts = [pd.DataFrame(rows, columns=columns)]
    pairs = [(f"{name}|{kind}", f"{first}|{kind}") for name in others for kind in KINDS]
    for test, tables in curves.items():
        found = areas(pd.concat(tables), "corpus-capped WER", condition.split("/")[1].rpartition("-")[2], pairs)[1]
        found = found.assign(
            partition=found["map"].str.partition("|")[0],
            quantity=test + ", " + found["map"].str.partition("|")[2],
            minus=found.minus.str.partition("|")[0],
            value=found.area,
        )
        parts.append(found[columns])
    return pd.concat(parts, ignore_index=True)


def _explained(folder: Path, condition: str, utterances: dict[str, Utterance]) -> Iterator[xr.Dataset]:
    """The maps of the given utterances; those that were skipped are missing from every folder."""
    return (item for item in load_condition(folder, condition, len(utterances)) if item.utterance in utterances)


def _peaks(folder: Path, condition: str, utterances: dict[str, Utterance]) -> dict[str, tuple[float, float, float]]:
    """Intervals over utterances of the share of peaks of SM^X inside their words and of the mean distance, if known."""
    found = []
    for item in _explained(folder, condition, utterances):
        times = token_times(item, utterances[item.utterance].words, condition.split("/")[1])
        distances = peak_distances(on_steps(item.input_saliency, item), times)
        distances = distances[~np.isnan(distances)]
        if len(distances):
            found.append(((distances == 0).mean(), distances.mean()))
    names = ("peak inside the word", "distance of the peak (s)")
    return {
        name: mean_interval(np.array(values)) for name, values in zip(names, zip(*found, strict=True), strict=False)
    }


def arranged_partitions(table: pd.DataFrame) -> pd.DataFrame:
    """`compare_partitions` as text, one row for each partition or difference."""
    text = table.assign(text=format_interval(table, "value", 2).mask(table.value.isna(), NOISY))
    text["row"] = text.partition + text.minus.map(lambda other: f" minus {other}" if other else "")
    wide = text.pivot(index="row", columns="quantity", values="text").loc[list(dict.fromkeys(text.row))]
    wide["reliability"] = text[text.quantity == "rho"].set_index("row").reliability.map("{:.2f}".format)
    return wide[["reliability", *dict.fromkeys(table.quantity)]].fillna("").rename_axis(index=None, columns=None)


def reliability_by_masks(folders: dict[str, Path], condition: str, numbers: list[int], first: int) -> pd.DataFrame:
    """Mean reliability of SM^X from the first few masks of stored maps: masks by partitions.

    first: how many utterances.
    """
    rows = [
        convergence(item, "input", [item.estimator], numbers, 1).query("masks in @numbers").assign(partition=name)
        for name, folder in folders.items()
        for item in load_condition(folder, condition, first)
    ]
    return pd.concat(rows).pivot_table(index="masks", columns="partition", values="reliability")[[*folders]]
