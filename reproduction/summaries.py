"""What the notebooks compute and arrange: long tables with every number, and tables of text as in the paper."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure
from scipy import stats
from scipy.ndimage import convolve1d

from reproduction.conditions import estimator_of, load_condition
from reproduction.tables import (
    MEAN,
    NOISY,
    correlation_table,
    format_interval,
    format_reported,
    paper_values,
    reported_interval,
    save,
    without_noise,
)
from xattn import figures
from xattn.analysis.correlation import normalised_attention, normalised_saliency
from xattn.analysis.faithfulness import areas, deletion_curves, sizes
from xattn.analysis.intervals import chosen_on_others, jackknife_interval, mean_interval
from xattn.analysis.normalisation import standardise
from xattn.analysis.quality import chrf
from xattn.analysis.reliability import ENOUGH, too_noisy
from xattn.files import write_whole
from xattn.maps import REDUCTIONS, drop_special_tokens, on_steps
from xattn.models import S2TModel
from xattn.store import load_maps

CONDITION = ["model", "direction"]
LOWER_IS_BETTER = (  # metrics of Table 2
    *("WER", "deletion, BLEU", "size"),
    *("insertion, corpus-capped WER", "insertion, utterance-capped WER"),
)


def write(
    stem: str | Path,
    *,
    numbers: pd.DataFrame | None = None,
    figure: Figure | None = None,
    text: pd.DataFrame | None = None,
    caption: str = "",
) -> None:
    """Write what is given: numbers to stem.csv, a figure to stem.png, a table of text below its caption to stem.md."""
    if numbers is not None:
        write_whole(Path(f"{stem}.csv"), numbers.to_csv(index=False, float_format="%.6f").encode())
    if figure is not None:
        figures.save(figure, stem)
    if text is not None:
        save(text, f"{stem}.md", caption)


def readable(table: pd.DataFrame, digits: int = 3) -> pd.DataFrame:
    """A long table for the eye: rounded, rows numbered anew."""
    return table.round(digits).reset_index(drop=True)


def overall(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of a `correlation_table` for attention averaged over all layers and heads."""
    return table[(table["layer"] == MEAN) & (table["head"] == MEAN)]


def differences(table: pd.DataFrame, value: str, digits: int) -> pd.DataFrame:
    """The rows of a long table that hold differences, with the difference and its interval as text, or "too noisy"."""
    rows = table[table.minus != ""]
    rows = rows.assign(difference=format_interval(rows, value, digits).mask(is_noisy(rows, value), NOISY))
    columns = [name for name in ("quantity", "metric", "reduction", "map", "minus", "difference") if name in rows]
    return rows[columns].reset_index(drop=True)


def imported(folder: str | Path, model: str, directions: Sequence[str]) -> pd.DataFrame:
    """Imported maps: direction, utterance, tokens, dropped (tokens), masks and hypothesis, a row for each utterance."""
    rows = [
        (
            direction,
            item.utterance,
            item.sizes["token"],
            len(item.attrs.get("left_out", [])),
            item.attrs.get("input_masks"),
            item.hypothesis,
        )
        for direction in directions
        for item in load_condition(folder, f"{model}/{direction}")
    ]
    return pd.DataFrame(rows, columns=["direction", "utterance", "tokens", "dropped", "masks", "hypothesis"])


def is_noisy(table: pd.DataFrame, value: str = "value") -> pd.Series:
    """Whether the maps behind a row are too noisy to say anything, or the value is unknown for that reason."""
    return table[value].isna() | (table.reliability < ENOUGH)


# Deletion and insertion


def faithfulness(
    model: S2TModel,
    folder: str | Path,
    condition: str,
    kinds: Sequence[str],
    metrics: Sequence[str],
    differences: Sequence[tuple[str, str]] = (),
    *,
    step: int,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Deletion and insertion of the stored maps of a condition.

    Args:
        kinds: of maps, see `xattn.analysis.faithfulness.sentence_maps`.
        metrics, differences: see `xattn.analysis.faithfulness.areas`.
        step: per cent between two points of a curve.

    Returns:
        Two long tables as from `areas`, with metrics such as "deletion, BLEU" and "insertion, BLEU". Those of several
        metrics are joined; the curves are those of the first metric.
    """
    points, summaries = [], []
    for test in ("deletion", "insertion"):
        stored = load_condition(folder, condition)
        curves = deletion_curves(model, stored, kinds, Path(folder, "deletion"), test == "insertion", step)
        language = condition.split("/")[1].rpartition("-")[2]
        found = {metric: areas(curves, metric, language, differences) for metric in metrics}
        points.append(found[metrics[0]][0].assign(metric=f"{test}, {metrics[0]}"))
        summaries += [table.assign(metric=f"{test}, {metric}") for metric, (_, table) in found.items()]
    return pd.concat(points, ignore_index=True), pd.concat(summaries, ignore_index=True)


# Table 1: reductions


def reductions(rho: dict[str, xr.Dataset], decoded: pd.DataFrame | None = None) -> pd.DataFrame:
    """Compare the reductions of SM^X, and 2D max with each of the others.

    Args:
        rho: the result of `correlate_all` for each of REDUCTIONS.
        decoded: `faithfulness` of the reduced maps ("SM^X 2d_max" and so on) with their differences from 2D max, if
            there is a model to decode with.

    Returns:
        A long table: reduction, minus (the one that is subtracted, or empty), quantity ("deletion", "insertion", "rho",
        or "reported", which is rho without noise), value, low, high, reliability, n, model, direction, estimator. There
        are no differences of rho as measured, because reductions are affected by noise unequally.
    """
    best, *others = REDUCTIONS
    chosen = {name: each.sel(saliency=["input"]) for name, each in rho.items()}
    values = {name: each.overall.sel(saliency="input", masks="all").values for name, each in chosen.items()}
    limits = {name: without_noise(each, "input", values[name]) for name, each in chosen.items()}
    reliability = {name: float(each.reliability.mean()) for name, each in chosen.items()}
    n, about = len(values[best]), rho[best].attrs
    rows = [(name, "", "rho", *mean_interval(values[name]), reliability[name]) for name in REDUCTIONS]
    rows += [
        (name, "", "reported", *reported_interval(rho[name], "input", values[name]), reliability[name])
        for name in REDUCTIONS
    ]
    for name in others:
        interval = jackknife_interval(lambda rows, name=name: limits[best](rows) - limits[name](rows), n)
        rows.append((best, name, "reported", *map(float, interval), min(reliability[best], reliability[name])))
    columns = ["reduction", "minus", "quantity", "value", "low", "high", "reliability"]
    table = pd.DataFrame(rows, columns=columns).assign(n=n)
    noisy = [name for name, each in chosen.items() if bool(too_noisy(each).any())]
    unknown = (table.minus != "") & (table.reduction.isin(noisy) | table.minus.isin(noisy))
    table.loc[unknown, ["value", "low", "high"]] = np.nan
    if decoded is not None:
        decoded = decoded.rename(columns={"map": "reduction", "area": "value"})
        decoded = decoded.assign(quantity=decoded.metric.str.partition(",")[0])
        for column in ("reduction", "minus"):
            decoded[column] = decoded[column].str.removeprefix("SM^X ")
        table = pd.concat([decoded, table], ignore_index=True)[[*columns, "n"]]
    return table.assign(model=about["model"], direction=about["setting"], estimator=about["estimator"])


def arranged_reductions(table: pd.DataFrame) -> pd.DataFrame:
    """`reductions` as text, one row for each; the paper's values are not available."""
    single = table[table.minus == ""]
    noisy = is_noisy(single) & (single.quantity != "rho")
    text = single.assign(text=format_interval(single, "value").mask(noisy, NOISY))
    wide = text.pivot(index="reduction", columns="quantity", values="text").loc[list(REDUCTIONS)]
    wide = wide[[name for name in ("deletion", "insertion", "rho", "reported") if name in wide]]
    reliability = single[single.quantity == "rho"].set_index("reduction").reliability
    wide["reliability"] = reliability.map("{:.2f}".format, na_action="ignore")
    return wide.assign(n=single.n.iloc[0], paper="")


def correlations_if_reduced_first(maps: Iterable[xr.Dataset]) -> np.ndarray:
    """rho(CA, SM^X) of each utterance if SM^X is reduced to steps before it is standardised per token."""
    found = []
    for item in maps:
        attention = normalised_attention(item.cross_attention.mean(["layer", "head"])).values
        reduced = on_steps(drop_special_tokens(item).input_saliency, item).values
        found.append(stats.pearsonr(attention.ravel(), standardise(reduced).ravel()).statistic)
    return np.array(found)


# Table 2: quality


def explanation_quality(folder: str | Path, condition: str, model: S2TModel | None, step: int) -> pd.DataFrame:
    """Faithfulness and size of SM^X for a condition.

    Args:
        model: the one that the maps explain; without one, or without references, faithfulness is not measured: None.
        step: see `faithfulness`.

    Returns:
        A long table: metric, value, low, high, reliability, n, model, direction, estimator.
    """
    name, direction = condition.split("/")
    parts = []
    if model is not None:
        metrics = ["BLEU"] if "-" in direction else ["corpus-capped WER", "utterance-capped WER"]
        _, decoded = faithfulness(model, folder, condition, ["SM^X"], metrics, step=step)
        parts.append(decoded.rename(columns={"area": "value"}))
    parts.append(sizes(load_condition(folder, condition)))
    return pd.concat(parts).assign(model=name, direction=direction, estimator=estimator_of(folder, condition))


def quality(models: list[pd.DataFrame], explanations: list[pd.DataFrame]) -> pd.DataFrame:
    """Join tables of `quality_table` and `explanation_quality`."""
    columns = ["model", "direction", "estimator", "metric", "value", "low", "high", "reliability", "n"]
    return pd.concat([*models, *explanations])[columns]


def metric_titles(table: pd.DataFrame) -> dict[str, str]:
    """The title of each metric's panel, which says which side is better."""
    titles = {}
    for metric in dict.fromkeys(table.metric):
        unit = " (%)" if "WER" in metric or metric == "size" else ""
        titles[metric] = f"{metric}{unit}\n{'lower' if metric in LOWER_IS_BETTER else 'higher'} is better"
    return titles


def arranged_quality(table: pd.DataFrame) -> pd.DataFrame:
    """`quality` as text, with the paper's values beside ours, one row for each model, direction and metric.

    Metrics that only the paper reports have rows too, unless models could not be measured at all.
    """
    paper = paper_values("tab2")[["metric", *CONDITION, "value"]].rename(columns={"value": "paper"})
    paper["paper"] = paper.paper.map("{:g}".format)
    if set(table.metric) == {"size"}:  # no model to decode with
        paper = paper[paper.metric == "size"]
    ours = format_interval(table, "value", 1) + np.where(table.reliability < ENOUGH, f" ({NOISY})", "")
    both = table.assign(ours=ours).merge(paper, "left", on=["metric", *CONDITION])
    only_paper = paper[~paper.metric.isin(table.metric)]
    both = pd.concat([both, table[CONDITION].drop_duplicates().merge(only_paper, "inner")])
    both = both[[*CONDITION, "metric", "ours", "n", "paper"]]
    both["n"] = both.n.map("{:.0f}".format, na_action="ignore")
    return both.sort_values(CONDITION, key=lambda column: column.map({v: i for i, v in enumerate(column.unique())}))


# Tables 3 and 4: heads, layers, models and tasks


def arranged_heads(table: pd.DataFrame) -> pd.DataFrame:
    """rho(CA, SM^X) of a `correlation_table` as text, layers by heads."""
    own = table[table.saliency == "input"]
    text = own.assign(text=format_reported(own))
    grid = text.pivot(index="layer", columns="head", values="text")
    grid = grid.loc[list(dict.fromkeys(table["layer"])), list(dict.fromkeys(table["head"]))]
    return grid.add_prefix("head ").rename_axis(columns=None)


def single_heads_and_averages(rho: xr.Dataset) -> pd.DataFrame:
    """Single heads against averages, without noise, as text: one row for each kind of saliency.

    The best head and the best layer are chosen for each half of the utterances on the other half.
    """
    rows = {}
    for saliency, symbol in (("input", "rho(CA, SM^X)"), ("encoder", "rho(CA, SM^H)")):
        if saliency in rho.saliency:
            own = rho.sel(saliency=saliency, masks="all")
            layers = own.by_layer.values
            heads = own.by_layer_and_head.values.reshape(len(layers), -1)
            values = {
                "single heads, mean": heads.mean(axis=1),
                "best single head": chosen_on_others(heads),
                "layer averages, mean": layers.mean(axis=1),
                "best layer average": chosen_on_others(layers),
                "average of everything": own.overall.values,
            }
            rows[symbol] = {name: _without_noise_text(rho, saliency, each) for name, each in values.items()}
    return pd.DataFrame.from_dict(rows, orient="index")


def _without_noise_text(rho: xr.Dataset, saliency: str, values: np.ndarray, digits: int = 3) -> str:
    """The limit of correlations (n,) with its interval as text, or "too noisy"."""
    value, low, high = reported_interval(rho, saliency, values)
    return NOISY if np.isnan(value) else f"{value:z.{digits}f} ({low:z.{digits}f} to {high:z.{digits}f})"


def best_aggregate(rho: xr.Dataset, paper: pd.DataFrame) -> pd.DataFrame:
    """The highest rho(CA, SM^X) among layer averages, head averages and the average of everything, and the paper's.

    It is chosen for each half of the utterances on the other half; `chosen` is the one with the highest mean.
    """
    own = rho.sel(saliency="input", masks="all")
    candidates = np.column_stack([own.by_layer, own.by_head, own.overall])
    names = [f"layer {each}" for each in own.layer.values]
    names += [*(f"head {each}" for each in own["head"].values), "everything"]
    row = {
        "ours, without noise": _without_noise_text(rho, "input", chosen_on_others(candidates)),
        "ours, measured": round(float(chosen_on_others(candidates).mean()), 3),
        "reliability": round(float(rho.reliability.sel(saliency="input").mean()), 3),
        "chosen": names[candidates.mean(axis=0).argmax()],
        "paper": paper.value.squeeze() if len(paper) else None,
    }
    return pd.DataFrame([row], index=["best aggregate of rho(CA, SM^X)"])


def layer_averages(rho: dict[str, xr.Dataset]) -> pd.DataFrame:
    """`correlation_table` of all conditions for attention averaged over heads, without the column head."""
    without_heads = [each.isel(head=slice(0)) for each in rho.values()]  # single heads would take most of the time
    return pd.concat([correlation_table(each) for each in without_heads], ignore_index=True).drop(columns="head")


def arranged_layers(table: pd.DataFrame, rho: dict[str, xr.Dataset]) -> pd.DataFrame:
    """rho(CA, SM^X) of `layer_averages` as text, layers by conditions, with the paper's best aggregate.

    Layers and their mean are without noise; "best, ours" is the highest of them, chosen for each half of the utterances
    on the other half.
    """
    text = table.assign(text=format_reported(table))
    wide = text.pivot(index="layer", columns=CONDITION, values="text")[[tuple(each.split("/")) for each in rho]]
    wide = wide.loc[[*sorted(label for label in wide.index if label != MEAN), MEAN]]
    mean = table[table["layer"] == MEAN].set_index(CONDITION)
    paper = paper_values("tab4").dropna(subset="model").set_index(CONDITION).value
    wide.loc["mean, measured"] = format_interval(mean, "rho")
    wide.loc["reliability"] = mean.reliability.map("{:.2f}".format, na_action="ignore")
    for condition, each in rho.items():
        own = each.sel(saliency="input", masks="all")
        best = chosen_on_others(np.column_stack([own.by_layer, own.overall]))
        wide.loc["best, ours", tuple(condition.split("/"))] = _without_noise_text(each, "input", best, 2)
    wide.loc["best, paper"] = paper.reindex(wide.columns).map("{:.3f}".format, na_action="ignore")
    if "padding" in mean:
        wide.loc["attention on padding"] = mean.padding.map("{:.0%}".format, na_action="ignore")
    wide.loc["n"] = mean.n.astype(str)
    return wide.fillna("").rename_axis(columns=["model", "direction"])


def typical_range() -> str:
    """The paper's typical range of rho(CA, SM^X), as text."""
    held = paper_values("tab4").set_index("metric").value
    return " to ".join(f"{held[f'rho(CA SM^X) typical {end}']}" for end in ("low", "high"))


# Table 5: context mixing


def arranged_mixing(table: pd.DataFrame, conditions: Sequence[str]) -> pd.DataFrame:
    """Both correlations without noise, their difference, and the paper's ranges as text, one row for a condition.

    table: the rows of `layer_averages` for all layers.
    """
    kinds = ["input", "encoder", "difference"]
    texts = table.assign(
        reported=format_reported(table, 3).mask((table.saliency == "difference") & table.reported.isna(), NOISY),
        measured=format_interval(table, "rho", 3),
        reliability=table.reliability.map("{:.2f}".format, na_action="ignore"),
    ).pivot(index=CONDITION, columns="saliency", values=["reported", "measured", "reliability"])
    limit = table.pivot(index=CONDITION, columns="saliency", values="reported")
    share = (limit.difference / limit.encoder).map("{:z.1%}".format, na_action="ignore").astype(object)
    wide = texts.reported[kinds].assign(share=share).join(texts.measured[kinds[:2]].add_suffix(", measured"))
    wide["reliabilities"] = texts.reliability.input + " / " + texts.reliability.encoder
    wide["n"] = table.groupby(CONDITION).n.first().astype(str)
    wide = wide.loc[[tuple(each.split("/")) for each in conditions]]
    held = paper_values("tab5").set_index("metric").value
    ranges = {
        "input": f"{typical_range()}, usually",
        "encoder": f"{held['encoder share low']} to {held['encoder share high']}",
        "difference": f"{held['difference low']} to {held['difference high']}",
    }
    for kind, text in ranges.items():
        wide.loc[("paper, range", ""), kind] = text
    wide.columns = wide.columns.str.replace("input", "rho(CA, SM^X)").str.replace("encoder", "rho(CA, SM^H)")
    return wide.fillna("").rename_axis(["model", "direction"]).rename_axis(columns=None)


def widened_differences(folder: str | Path, conditions: Sequence[str]) -> pd.DataFrame:
    """rho(CA, SM^H) minus rho(CA, SM^X), with SM^H as it is and with SM^H widened over neighbouring steps.

    Widening gives a step half of its own value and a quarter of each neighbour's.
    """
    rows = {}
    for condition in conditions:
        found = []
        for item in load_condition(folder, condition):
            attention = normalised_attention(item.cross_attention.mean(["layer", "head"])).values.ravel()
            saliency, sharp = (
                normalised_saliency(item[name], item.cross_attention).values
                for name in ("input_saliency", "encoder_saliency")
            )
            wide = standardise(convolve1d(sharp, [0.25, 0.5, 0.25], axis=1, mode="constant"))
            rho = [np.corrcoef(attention, each.ravel())[0, 1] for each in (saliency, sharp, wide)]
            found.append((rho[1] - rho[0], rho[2] - rho[0]))
        rows[condition] = [number for each in zip(*found, strict=True) for number in mean_interval(each)]
    columns = pd.MultiIndex.from_product([["difference", "difference, SM^H widened"], ["mean", "low", "high"]])
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).round(3)


# Table 6: deletion


def arranged_deletion(table: pd.DataFrame, kinds: Sequence[str], condition: str) -> pd.DataFrame:
    """Areas of the maps `kinds` as text, with the paper's values for deletion beside ours."""
    model, direction = condition.split("/")
    single = table[table.minus == ""]
    noisy = np.where(single.reliability < ENOUGH, f" ({NOISY})", "")
    text = single.assign(text=format_interval(single, "area", 1) + noisy)
    wide = text.pivot(index="map", columns="metric", values="text").loc[list(kinds), list(single.metric.unique())]
    wide["reliability"] = single.groupby("map").reliability.first().map("{:.2f}".format, na_action="ignore")
    held = paper_values("tab6").query("model == @model and direction == @direction").set_index("metric").value
    paper = [f"{held[kind]:.1f}" if kind in held else "" for kind in kinds]
    return wide.fillna("").assign(n=table.n.iloc[0], paper=paper).rename_axis(columns=None)


# Figure 2: which utterance to show


def median_utterance(folder: str | Path, condition: str) -> xr.Dataset:
    """The maps of the utterance whose hypothesis has the median number of tokens."""
    lengths = sorted((item.sizes["token"], item.utterance) for item in load_maps(folder, *condition.split("/")))
    return utterance_of(folder, condition, lengths[len(lengths) // 2][1])


def utterance_of(folder: str | Path, condition: str, utterance: str) -> xr.Dataset:
    """The maps of one utterance. ValueError: there are none."""
    for item in load_maps(folder, *condition.split("/")):
        if item.utterance == utterance:
            return item
    raise ValueError(f"There are no maps of the utterance {utterance} in {folder} for {condition}: choose another.")


def least_in_order(folder: str | Path, condition: str) -> tuple[xr.Dataset, float, float]:
    """The maps of the translation whose attention follows the audio least in order.

    The order is Spearman's correlation between the position of a token and the step that it attends to most.
    Translations with a sentence chrF below 70 are considered only if there are no better ones.

    Returns:
        The maps, their correlation, and the highest correlation of the translations that were considered.
    """
    found = []
    for item in load_condition(folder, condition):
        peaks = normalised_attention(item.cross_attention.mean(["layer", "head"])).values.argmax(axis=1)
        poor = chrf([item.reference], [item.hypothesis]) < 70
        found.append((poor, stats.spearmanr(range(len(peaks)), peaks).statistic, item.utterance))
    poor, lowest, utterance = min(found)
    highest = max(order for other, order, _ in found if other == poor)
    return utterance_of(folder, condition, utterance), lowest, highest
