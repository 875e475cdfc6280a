"""What the notebooks compute and arrange: long tables with every number, and tables of text as in the paper.

Long tables keep the column names of the committed files: `setting` is a direction, `source` a kind of saliency. Tables
of text say direction.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.figure import Figure
from scipy import stats
from scipy.ndimage import convolve1d

from reproduction.conditions import correlate_conditions, estimator_of, load_condition
from reproduction.tables import MEAN, correlation_table, format_interval, paper_values, save
from xattn import figures
from xattn.analysis.correlation import normalised_attention, normalised_saliency
from xattn.analysis.faithfulness import areas, sizes
from xattn.analysis.intervals import mean_interval
from xattn.analysis.normalisation import standardise
from xattn.analysis.quality import chrf
from xattn.attribution.segments import PYRAMIDS, same_segment, segment_numbers, slic_pyramid
from xattn.data.utterance import Utterance
from xattn.maps import REDUCTIONS, drop_special_tokens, on_steps
from xattn.store import load_maps

CONDITION = ["model", "setting"]
LOWER_IS_BETTER = ("WER", "deletion, BLEU", "size")  # metrics of Table 2
GOAL_R, GOAL_BIAS, GOAL_MASKS = 0.98, 0.01, 1000  # what an estimator should reach, with at most so many masks


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
        Path(stem).parent.mkdir(parents=True, exist_ok=True)
        numbers.to_csv(f"{stem}.csv", index=False, float_format="%.6f")
    if figure is not None:
        figures.save(figure, stem)
    if text is not None:
        save(text, f"{stem}.md", caption)


def readable(table: pd.DataFrame, digits: int = 3) -> pd.DataFrame:
    """A long table for the eye: columns named as in the text, rounded, rows numbered anew."""
    names = {"setting": "direction", "source": "saliency", "pair": "condition", "perturbations": "masks"}
    return table.rename(columns=names).round(digits).reset_index(drop=True)


def overall(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of a `correlation_table` for attention averaged over all layers and heads."""
    return table[(table["layer"] == MEAN) & (table["head"] == MEAN)]


def differences(table: pd.DataFrame, value: str, digits: int) -> pd.DataFrame:
    """The rows of a long table that hold differences, with the difference and its interval as text."""
    rows = table[table.minus != ""]
    rows = rows.assign(difference=format_interval(rows, value, digits))
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


# Table 1: reductions


def reductions(rho: dict[str, xr.Dataset], curves: pd.DataFrame | None = None) -> pd.DataFrame:
    """Compare the reductions of SM^X, and 2D max with each of the others.

    Args:
        rho: the result of `correlate_all` for each of REDUCTIONS.
        curves: `deletion_curves` of the reduced maps ("SM^X 2d_max" and so on), if there is a model to decode with.

    Returns:
        A long table: reduction, minus (the one that is subtracted, or empty), quantity ("deletion" or "rho"), value,
        low, high, n, model, setting, estimator.
    """
    best, *others = REDUCTIONS
    values = {name: each.overall.sel(saliency="input").values for name, each in rho.items()}
    samples = [(name, "", values[name]) for name in REDUCTIONS]
    samples += [(best, name, values[best] - values[name]) for name in others]
    columns = ["reduction", "minus", "quantity", "value", "low", "high", "n"]
    rows = [(name, minus, "rho", *mean_interval(found), len(found)) for name, minus, found in samples]
    table, about = pd.DataFrame(rows, columns=columns), rho[best].attrs
    if curves is not None:
        pairs = [(f"SM^X {best}", f"SM^X {name}") for name in others]
        _, deletion = areas(curves, "corpus-capped WER", about["setting"], pairs)
        deletion = deletion.rename(columns={"map": "reduction", "area": "value"}).assign(quantity="deletion")
        for column in ("reduction", "minus"):
            deletion[column] = deletion[column].str.removeprefix("SM^X ")
        table = pd.concat([deletion, table], ignore_index=True)[columns]
    return table.assign(**about)


def arranged_reductions(table: pd.DataFrame) -> pd.DataFrame:
    """`reductions` as text, one row for each; the paper's values are not available."""
    single = table[table.minus == ""]
    text = single.assign(text=format_interval(single, "value"))
    wide = text.pivot(index="reduction", columns="quantity", values="text").loc[list(REDUCTIONS)]
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


def explanation_quality(folder: str | Path, condition: str, curves: pd.DataFrame | None = None) -> pd.DataFrame:
    """Faithfulness and size of SM^X for a condition.

    Args:
        curves: `deletion_curves` of "SM^X", if there is a model to decode with.

    Returns:
        A long table: metric, value, low, high, n, model, setting, estimator.
    """
    model, direction = condition.split("/")
    parts = []
    if curves is not None:
        metrics = ["BLEU"] if "-" in direction else ["corpus-capped WER", "utterance-capped WER"]
        deletion = pd.concat([areas(curves, metric, direction.rpartition("-")[2])[1] for metric in metrics])
        parts.append(deletion.rename(columns={"area": "value"}).assign(metric="deletion, " + deletion.metric))
    parts.append(sizes(load_condition(folder, condition)))
    return pd.concat(parts).assign(model=model, setting=direction, estimator=estimator_of(folder, condition))


def quality(models: list[pd.DataFrame], explanations: list[pd.DataFrame]) -> pd.DataFrame:
    """Join tables of `quality_table` and `explanation_quality`."""
    columns = ["model", "setting", "estimator", "metric", "value", "low", "high", "n"]
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
    both = table.assign(ours=format_interval(table, "value", 1)).merge(paper, "left", on=["metric", *CONDITION])
    only_paper = paper[~paper.metric.isin(table.metric)]
    both = pd.concat([both, table[CONDITION].drop_duplicates().merge(only_paper, "inner")])
    both = both[[*CONDITION, "metric", "ours", "n", "paper"]]
    both["n"] = both.n.map("{:.0f}".format, na_action="ignore")
    both = both.sort_values(CONDITION, key=lambda column: column.map({v: i for i, v in enumerate(column.unique())}))
    return both.rename(columns={"setting": "direction"})


# Tables 3 and 4: heads, layers, models and tasks


def arranged_heads(table: pd.DataFrame) -> pd.DataFrame:
    """rho(CA, SM^X) of a `correlation_table` as text, layers by heads."""
    text = table.assign(text=format_interval(table, "rho"))[table.source == "input"]
    grid = text.pivot(index="layer", columns="head", values="text")
    grid = grid.loc[list(dict.fromkeys(table["layer"])), list(dict.fromkeys(table["head"]))]
    return grid.add_prefix("head ").rename_axis(columns=None)


def single_heads_and_averages(table: pd.DataFrame) -> pd.DataFrame:
    """Single heads against averages in a `correlation_table`, one row for each kind of saliency."""
    heads = table[(table["layer"] != MEAN) & (table["head"] != MEAN)].groupby("source").rho
    layers = table[(table["layer"] != MEAN) & (table["head"] == MEAN)].groupby("source").rho
    summary = {
        "single heads, mean": heads.mean(),
        "best single head": heads.max(),
        "layer averages, mean": layers.mean(),
        "best layer average": layers.max(),
        "average of everything": overall(table).groupby("source").rho.mean(),
    }
    rows = {"input": "rho(CA, SM^X)", "encoder": "rho(CA, SM^H)"}
    return pd.DataFrame(summary).reindex(list(rows)).dropna().rename(rows).rename_axis(None)


def best_aggregate(table: pd.DataFrame, paper: pd.DataFrame) -> pd.DataFrame:
    """The highest rho(CA, SM^X) among layer averages, head averages and the average of everything, and the paper's."""
    averages = table[(table.source == "input") & ((table["layer"] == MEAN) | (table["head"] == MEAN))]
    best = averages.loc[averages.rho.idxmax()]
    row = {
        "ours": best.rho,
        "95 % interval": f"{best.low:.3f} to {best.high:.3f}",
        "corrected": best.corrected,
        "ceiling": best.ceiling,
        "layer": best["layer"],
        "head": best["head"],
        "paper": paper.value.squeeze() if len(paper) else None,
    }
    return pd.DataFrame([row], index=["best aggregate of rho(CA, SM^X)"]).round(3)


def layer_averages(rho: dict[str, xr.Dataset]) -> pd.DataFrame:
    """`correlation_table` of all conditions for attention averaged over heads, without the column head."""
    without_heads = [each.isel(head=slice(0)) for each in rho.values()]  # single heads would take most of the time
    return pd.concat([correlation_table(each) for each in without_heads], ignore_index=True).drop(columns="head")


def arranged_layers(table: pd.DataFrame, conditions: Sequence[str]) -> pd.DataFrame:
    """rho(CA, SM^X) of `layer_averages` as text, layers by conditions, with the paper's best aggregate."""
    text = table.assign(text=format_interval(table, "rho"))
    wide = text.pivot(index="layer", columns=CONDITION, values="text")[[tuple(each.split("/")) for each in conditions]]
    wide = wide.loc[[*sorted(label for label in wide.index if label != MEAN), MEAN]]
    mean = table[table["layer"] == MEAN].set_index(CONDITION)
    best = table.loc[table.groupby(CONDITION).rho.idxmax()].set_index(CONDITION)
    paper = paper_values("tab4").dropna(subset="model").set_index(CONDITION).value
    wide.loc["mean, corrected"] = format_interval(mean, "corrected", bounds=("corrected_low", "corrected_high"))
    wide.loc["mean, ceiling"] = mean.ceiling.map("{:.2f}".format, na_action="ignore")
    wide.loc["best, ours"] = format_interval(best, "rho")
    wide.loc["best, paper"] = paper.reindex(wide.columns).map("{:.3f}".format, na_action="ignore")
    wide.loc["n"] = best.n.astype(str)
    return wide.fillna("").rename_axis(columns=["model", "direction"])


def typical_range() -> str:
    """The paper's typical range of rho(CA, SM^X), as text."""
    held = paper_values("tab4").set_index("metric").value
    return " to ".join(f"{held[f'rho(CA SM^X) typical {end}']}" for end in ("low", "high"))


# Table 5: context mixing


def arranged_mixing(table: pd.DataFrame, conditions: Sequence[str]) -> pd.DataFrame:
    """Both correlations, their difference, noise corrections and the paper's ranges as text, one row for a condition.

    table: the rows of `layer_averages` for all layers.
    """
    corrected = format_interval(table, "corrected", bounds=("corrected_low", "corrected_high"))
    texts = table.assign(
        measured=format_interval(table, "rho", 3),
        corrected=corrected,
        ceiling=table.ceiling.map("{:.2f}".format, na_action="ignore").astype("string"),
    ).pivot(index=CONDITION, columns="source", values=["measured", "corrected", "ceiling"])
    rho = table.pivot(index=CONDITION, columns="source", values="rho")
    kinds = ["input", "encoder", "difference"]
    wide = texts.measured[kinds].assign(share=(rho.difference / rho.encoder).map("{:z.1%}".format))
    wide = wide.join(texts.corrected[kinds].add_suffix(", corrected"))
    wide["ceilings"] = texts.ceiling.input + " / " + texts.ceiling.encoder
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
    """Deletion areas of the maps `kinds` as text, with the paper's values beside ours."""
    model, direction = condition.split("/")
    text = table.assign(text=format_interval(table, "area", 1))[table.minus == ""]
    wide = text.pivot(index="map", columns="metric", values="text").loc[list(kinds)].rename_axis(columns=None)
    held = paper_values("tab6").query("model == @model and setting == @direction").set_index("metric").value
    return wide.assign(n=table.n.iloc[0], paper=[f"{held[kind]:.1f}" if kind in held else "" for kind in kinds])


# Estimators and superpixels, which the paper does not compare


def first_of_models(conditions: Sequence[str], number: int) -> list[str]:
    """The first condition of each of the first `number` models."""
    first = {}
    for condition in conditions:
        first.setdefault(condition.split("/")[0], condition)
    return list(first.values())[:number]


def convergence_intervals(table: pd.DataFrame) -> pd.DataFrame:
    """Means over utterances of `convergence` tables.

    Args:
        table: their rows, with the condition in the column pair.

    Returns:
        A long table: pair, source, estimator, perturbations, quantity ("r" or "bias"), value, low, high, n.
    """
    keys = ["pair", "source", "estimator", "perturbations"]
    grouped = table.melt(keys, ["r", "bias"], var_name="quantity").groupby([*keys, "quantity"], sort=False).value
    means = grouped.apply(lambda values: pd.Series(mean_interval(values), ["value", "low", "high"])).unstack()
    return means.assign(n=grouped.size()).reset_index()


def arranged_convergence(table: pd.DataFrame) -> pd.DataFrame:
    """`convergence_intervals` without the intervals, estimators side by side."""
    keys = {"index": ["condition", "saliency", "masks"], "columns": ["quantity", "estimator"]}
    return readable(table).pivot(**keys, values="value")


def goals_reached(table: pd.DataFrame) -> pd.DataFrame:
    """In how many rows of `convergence_intervals` with few enough masks each estimator reaches the goal."""
    few = table[table.perturbations <= GOAL_MASKS]
    wide = few.pivot(index=["pair", "source", "perturbations", "estimator"], columns="quantity", values="value")
    reached = (wide.r >= GOAL_R) & (wide.bias.abs() <= GOAL_BIAS)
    return reached.groupby("estimator").agg(["sum", "size"]).set_axis(["goal reached", "of"], axis=1)


def largest_scores(folder: str | Path, conditions: Sequence[str]) -> pd.DataFrame:
    """The largest score of SM^X over the mean score of all masks: median over tokens, then mean over utterances."""
    rows = {}
    for condition in conditions:
        scores = (item.input_scores for item in load_condition(folder, condition))
        ratios = [(each.max("input_mask") / each.mean("input_mask")).median().item() for each in scores]
        rows[condition] = {"largest score / mean score": np.mean(ratios)}
    return pd.DataFrame.from_dict(rows, orient="index").round(1)


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


def correlations_of_pyramids(folders: dict[str, str | Path], condition: str) -> pd.DataFrame:
    """rho(CA, SM^X) of all layers and heads, and the reliability of SM^X, for the maps in each folder."""
    rows = {}
    for pyramid, folder in folders.items():
        rho = correlate_conditions(folder, [condition])[condition].sel(saliency="input")
        rows[pyramid] = [*mean_interval(rho.overall.values), float(rho.reliability.mean())]
    return pd.DataFrame.from_dict(rows, orient="index", columns=["rho", "low", "high", "reliability"]).round(3)


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


# Findings


def correlation_with_noise(rho: dict[str, xr.Dataset], corpus: Iterable[Utterance]) -> pd.DataFrame:
    """Spearman's correlation of rho with the signal-to-noise ratio of the recordings, where that is known and varies.

    rho: by condition, from `correlate_all`.
    """
    snr, rows = {utterance.id: utterance.snr for utterance in corpus}, {}
    for condition, each in rho.items():
        ratios = [snr.get(name) for name in each.utterance.values]
        if None in ratios or len(set(ratios)) < 2:
            continue
        for saliency in each.saliency.values:
            found = stats.spearmanr(ratios, each.overall.sel(saliency=saliency))
            rows[condition, saliency] = {"Spearman's r": found.statistic, "p": found.pvalue, "n": len(ratios)}
    return pd.DataFrame.from_dict(rows, orient="index").round(3)
