"""Pictures of the paper's tables. Every function takes a long table and returns a Figure.

Titles can contain formulas, so names in them have to pass through `xattn.figures.literal`.
"""

import io
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image

from reproduction.tables import MEAN
from xattn.analysis.reliability import ENOUGH
from xattn.figures import STYLE, literal
from xattn.files import write_whole

RHO_COLOURS = sns.light_palette("#1f5a8c", as_cmap=True)
BLUE, GREY = "#1f5a8c", "0.55"
NOISY = "grey: too noisy for a conclusion"  # part of titles


def shrink(path: Path) -> None:
    """Reduce a PNG file to 256 colours, which saves more than half of its size in the repository."""
    with Image.open(path) as image:
        dpi = image.info["dpi"]
        reduced = image.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    content = io.BytesIO()
    reduced.save(content, "PNG", optimize=True, dpi=dpi)
    write_whole(path, content.getvalue())


def heads_and_layers(table: pd.DataFrame, title: str) -> Figure:
    """Draw the correlation of every layer and head as in the paper's Table 3, one panel for each kind of saliency.

    Cells are without noise. If the maps are too noisy for that, a panel is hatched and has rho as measured.

    table: from `correlation_table`.
    """
    names = {"input": r"$\rho$(CA, SM$^X$)", "encoder": r"$\rho$(CA, SM$^H$)"}
    table = shown(table[table.saliency.isin(names)])
    names = {saliency: name for saliency, name in names.items() if saliency in table.saliency.values}
    rows, columns = _labels(table["layer"].unique()), _labels(table["head"].unique())
    low, high = min(0.0, table.value.min()), table.value.max()
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(
            1,
            len(names),
            figsize=(1.6 + 0.75 * len(names) * len(columns), 1.2 + 0.46 * len(rows)),
            layout="constrained",
            sharey=True,
            squeeze=False,
        )
        for axis, (saliency, name) in zip(axes[0], names.items(), strict=True):
            part = table[table.saliency == saliency]
            part = part.assign(text=[_two_lines(row) for row in part.itertuples()])
            grids = [part.pivot(index="layer", columns="head", values=v).loc[rows, columns] for v in ("value", "text")]
            sns.heatmap(
                grids[0],
                annot=grids[1],
                fmt="",
                annot_kws={"size": 6.5},
                cmap=RHO_COLOURS,
                vmin=low,
                vmax=high,
                cbar=axis is axes[0, -1],
                cbar_kws={"label": r"Pearson's $\rho$"},
                linewidths=0.5,
                ax=axis,
            )
            known = grids[0].notna().to_numpy().ravel()  # unknown cells have no text
            for text, colour in zip(axis.texts, axis.collections[0].get_facecolors()[known], strict=True):
                text.set_color("white" if sns.utils.relative_luminance(colour) < 0.18 else "black")
            axis.axhline(len(rows) - 1, color="black", linewidth=1)
            axis.axvline(len(columns) - 1, color="black", linewidth=1)
            if part.noisy.any():
                extent = Rectangle((0, 0), 1, 1, transform=axis.transAxes, fill=False, hatch="//", edgecolor=GREY)
                axis.add_patch(extent)
                name += "\nas measured; hatched: too noisy for a conclusion"
            axis.set(title=name, xlabel="head", ylabel="decoder layer" if axis is axes[0, 0] else "")
            axis.tick_params(length=0, labelrotation=0)
        figure.suptitle(title, fontsize=9)
    return figure


def _two_lines(row) -> str:
    interval = f"\n{row.low:z.2f} to {row.high:z.2f}" if np.isfinite(row.low) else ""
    return f"{row.value:z.2f}{interval}"


def shown(table: pd.DataFrame) -> pd.DataFrame:
    """What is drawn of a `correlation_table`: value, low and high, reported or, if noisy is True, as measured."""
    noisy = table.reported.isna()
    bounds = {name: table[f"reported_{name}"].where(~noisy, table[name]) for name in ("low", "high")}
    return table.assign(value=table.reported.where(~noisy, table.rho), **bounds, noisy=noisy)


def _labels(labels: Sequence) -> list:
    return [*sorted(label for label in labels if label != MEAN), MEAN]


def intervals(
    table: pd.DataFrame,
    rows: str | list[str],
    panels: str,
    title: str,
    names: dict[str, str] | None = None,
    counted: str = "utterances",
) -> Figure:
    """Draw values with their 95 % intervals, one panel for each quantity, up to four side by side.

    table: long, with value, low, high, n, the column `panels` and the column or columns `rows`; a panel has the rows of
    its quantity. Rows whose column `reliability` is low, or whose column `noisy` is True, are grey. names: titles of
    panels, if they differ from the quantities' names. counted: what n counts. An empty table gives an empty figure.
    """
    table = table[table.value.notna()]
    if "noisy" not in table:
        table = table.assign(noisy=table.reliability < ENOUGH)
    columns = [rows] if isinstance(rows, str) else rows
    table = table.assign(label=table[columns].astype(str).agg(" ".join, axis=1).map(literal))
    quantities = list(dict.fromkeys(table[panels]))
    shared = bool(table.groupby("label")[panels].nunique().eq(len(quantities)).all())
    wide = max(1, min(4, len(quantities)))
    tall = max(1, -(-len(quantities) // wide))
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(
            tall,
            wide,
            # A single panel is as wide as two; the title would not fit otherwise.
            figsize=(1.2 + 2.9 * max(2, wide), 0.5 + tall * (0.7 + 0.32 * table.label.nunique())),
            sharey=shared,
            squeeze=False,
            layout="constrained",
        )
        for axis, quantity in zip(axes.flat, quantities, strict=False):
            part = table[table[panels] == quantity]
            labels = list(dict.fromkeys(table.label if shared else part.label))
            heights = [labels.index(label) for label in part.label]
            digits = 3 if part.value.abs().max() < 1 else 1
            colours = np.where(part.noisy, GREY, BLUE)
            axis.hlines(heights, part.low, part.high, color=colours, linewidth=2, alpha=0.5)
            axis.scatter(part.value, heights, c=colours, s=16, zorder=2)
            for height, value in zip(heights, part.value, strict=True):
                text = f"{value:z.{digits}f}"
                axis.annotate(text, (value, height), (0, 4), textcoords="offset points", ha="center", size=7)
            axis.set(title=(names or {}).get(quantity, quantity), ylim=(len(labels) - 0.4, -0.8))
            axis.set_xlabel(f"n = {_counts(part)}")
            axis.set_yticks(range(len(labels)), labels)
            axis.margins(x=0.15)
            axis.locator_params(axis="x", nbins=6)
            axis.grid(axis="x", linewidth=0.3)
            if axis.get_xlim()[0] < 0 < axis.get_xlim()[1]:
                axis.axvline(0, color="black", linewidth=0.8, zorder=0)
        for axis in axes.flat[len(quantities) :]:
            axis.axis("off")
        note = f"; {NOISY}" if table.noisy.any() else ""
        figure.suptitle(f"{title} (n {counted}; bars: 95 % intervals{note})", fontsize=9)
    return figure


def convergence(table: pd.DataFrame, title: str) -> Figure:
    """Draw how maps from few masks agree with a reference: r, the error of rho as measured, and of rho as reported.

    table: from `reproduction.estimators.convergence_table`. There is one column for each condition and saliency.
    """
    symbols = {"input": "SM$^X$", "encoder": "SM$^H$"}
    quantities = {"r": "r with the reference", "measured": r"error of $\rho$" "\nas measured"}
    quantities["reported"] = r"error of $\rho$" "\nas reported"
    columns = list(dict.fromkeys(zip(table.condition, table.saliency, strict=True)))
    estimators = list(dict.fromkeys(table.estimator))
    lines = table.set_index(["condition", "saliency", "quantity", "estimator"]).sort_index()
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(
            3, len(columns), figsize=(1.6 + 2.2 * len(columns), 6.2), sharex=True, sharey="row", squeeze=False,
            layout="constrained",
        )  # fmt: skip
        for row, quantity in zip(axes, quantities, strict=True):
            for axis, (condition, saliency) in zip(row, columns, strict=True):
                for estimator, colour in zip(estimators, sns.color_palette("colorblind"), strict=False):
                    key = (condition, saliency, quantity, estimator)
                    if key not in lines.index:  # the reference has no limit, or no block has one
                        continue
                    part = lines.loc[[key]].sort_values("masks")
                    axis.plot(part.masks, part.value, "o-", color=colour, markersize=3, label=estimator)
                    spread = part.value - part.spread, part.value + part.spread
                    axis.fill_between(part.masks, *spread, color=colour, alpha=0.15)
                if quantity != "r":
                    axis.axhline(0, color="black", linewidth=0.8, zorder=0)
                axis.set_xscale("log")
                axis.grid(axis="y", linewidth=0.3)
        for axis in axes[2]:
            axis.set_ylim(-0.2, 0.2)  # an estimate from few masks can be arbitrarily large
        numbers = sorted(table.masks.unique())
        for axis, (condition, saliency) in zip(axes[0], columns, strict=True):
            axis.set_title(f"{literal(condition)}, {symbols[saliency]}")
        for axis in axes[-1]:
            axis.set_xticks(numbers, numbers)
            axis.minorticks_off()
            axis.set_xlabel("masks")
        for axis, name in zip(axes[:, 0], quantities.values(), strict=True):
            axis.set_ylabel(name)
        figure.legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, loc="outside right center")
        figure.suptitle(title, fontsize=9)
    return figure


def layer_lines(table: pd.DataFrame, title: str) -> Figure:
    """Draw the correlation of layer averages, one panel for each model, one line for each direction.

    The mean of all layers is at the right of each panel. Directions whose maps are too noisy are grey and dashed.

    table: from `reproduction.summaries.layer_averages`, for one kind of saliency.
    """
    table = shown(table)
    models, directions = list(dict.fromkeys(table.model)), list(dict.fromkeys(table.direction))
    colours = dict(zip(directions, sns.color_palette("colorblind", len(directions)), strict=True))
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(models), figsize=(1.6 + 2.9 * len(models), 3.4), sharey=True, squeeze=False, layout="constrained"
        )
        for axis, model in zip(axes[0], models, strict=True):
            own = table[table.model == model]
            last = max(label for label in own.layer if label != MEAN)
            groups = list(own.groupby("direction", sort=False))
            offsets = 0.045 * (last + 2) * (np.arange(len(groups)) - (len(groups) - 1) / 2)
            middle = last + 1 + 0.08 * (last + 2)
            for offset, (direction, part) in zip(offsets, groups, strict=True):
                noisy = part.noisy.any()
                colour, label = (GREY, f"{direction}, too noisy") if noisy else (colours[direction], direction)
                lines = part[part.layer != MEAN].sort_values("layer")
                layers = lines.layer.astype(int)
                axis.plot(layers, lines.value, "o--" if noisy else "o-", color=colour, markersize=3, label=label)
                bounds = lines.low.astype(float), lines.high.astype(float)
                axis.fill_between(layers, *bounds, color=colour, alpha=0.12)
                mean = part[part.layer == MEAN].iloc[0]
                error = [[mean.value - mean.low], [mean.high - mean.value]]
                axis.errorbar(middle + offset, mean.value, error, fmt="s", markersize=4, color=colour)
            axis.set_xticks([*range(1, last + 1), middle], [*range(1, last + 1), MEAN])
            axis.set(xlabel="decoder layer", title=literal(model))
            axis.grid(axis="y", linewidth=0.3)
        axes[0, 0].set_ylabel(r"Pearson's $\rho$")
        handles = {}
        for axis in axes[0]:
            handles |= dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
        figure.legend(handles.values(), handles, frameon=False, loc="outside right center")
        figure.suptitle(f"{title} (mean of {_counts(table)} utterances; bands and bars: 95 % intervals)", fontsize=9)
    return figure


def deletion(points: pd.DataFrame, summary: pd.DataFrame, title: str) -> Figure:
    """Draw the score against the percentage of cells, one panel for each test, one line for each map.

    The area of each line is in the legend. Maps that are too noisy are dashed.

    points, summary: from `reproduction.summaries.faithfulness`, with the same metrics.
    """
    kinds, tests = list(dict.fromkeys(summary["map"])), list(dict.fromkeys(points.metric))
    colours = dict(zip(kinds, sns.color_palette("colorblind", len(kinds)), strict=True))
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(tests), 1, figsize=(7.6, 0.4 + 3.2 * len(tests)), squeeze=False, layout="constrained"
        )
        for axis, metric in zip(axes[:, 0], tests, strict=True):
            test, _, score = metric.partition(", ")
            own = summary[summary.metric == metric]
            for row in own.sort_values("area", ascending=test == "insertion").itertuples():
                part = points[(points["map"] == row.map) & (points.metric == metric)]
                name = re.sub(r"\^(\w)", r"$^\1$", row.map.replace("_", " "))
                noisy = row.reliability < ENOUGH
                label = f"{name}: {row.area:.1f} ({row.low:.1f} to {row.high:.1f}){', too noisy' if noisy else ''}"
                style = {"linestyle": "--" if noisy else "-", "color": colours[row.map]}
                axis.plot(part.percent, part.score, marker="o", markersize=2.5, label=label, **style)
            axis.set(xlabel=f"cells {'deleted' if test == 'deletion' else 'kept'} (%)", ylabel=f"{score} (%)")
            axis.set(title=test, ylim=(0, None))
            axis.grid(linewidth=0.3)
            axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), title="area under the curve (95 %)")
        figure.suptitle(title, fontsize=9)
    return figure


def randomisation(table: pd.DataFrame, title: str) -> Figure:
    """Draw how maps change while more and more layers are randomised.

    table: from `reproduction.sanity.randomisation`.
    """
    with matplotlib.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
        for (name, part), colour in zip(
            table.groupby("map", sort=False), sns.color_palette("colorblind"), strict=False
        ):
            label = re.sub(r"\^(\w)", r"$^\1$", name)
            axis.plot(part.randomised, part.value, "o-", color=colour, markersize=3, label=label)
            axis.fill_between(part.randomised, part.low, part.high, color=colour, alpha=0.15)
        decoder = table.layer.str.contains("decoder").groupby(table.randomised).first().sum()
        axis.axvline(decoder + 0.5, color="0.6", linewidth=0.8)
        axis.text(decoder + 0.6, 1, "encoder", va="top", color="0.4")
        axis.text(decoder + 0.4, 1, "decoder", va="top", ha="right", color="0.4")
        axis.axhline(0, color="black", linewidth=0.8, zorder=0)
        axis.set(xlabel="randomised layers, from the output", ylabel="r with the original map")
        axis.set_xticks(sorted(table.randomised.unique()))
        axis.grid(axis="y", linewidth=0.3)
        figure.legend(frameon=False, loc="outside right center")
        figure.suptitle(f"{title} (mean of {_counts(table)} utterances; bands: 95 % intervals)", fontsize=9)
    return figure


def _counts(table: pd.DataFrame) -> str:
    low, high = table.n.min(), table.n.max()
    return f"{low}" if low == high else f"{low} to {high}"


def coverage() -> Figure:
    """Draw which part of the model each map covers (the paper's Figure 1, drawn anew)."""
    boxes = {  # left edge, width, text, colour
        "spectrogram": (0.0, 1.5, "spectrogram\nX  (time × mel)", "#dfe7ee"),
        "encoder": (2.2, 1.5, "encoder", "#c3d4e3"),
        "states": (4.4, 1.5, "encoder output\nH  (step × width)", "#dfe7ee"),
        "decoder": (6.6, 1.7, "decoder\nwith cross-attention", "#c3d4e3"),
        "tokens": (9.0, 1.4, "output tokens", "#dfe7ee"),
    }
    spans = [  # from, to, height, text, colour
        (4.4, 8.3, 1.55, "CA: softmax(QK$^\\mathsf{T}$/√d), one map for each layer and head", "#b5502d"),
        (4.4, 10.4, 2.25, "SM$^H$: mask steps of H, run the decoder again", "#6a4c93"),
        (0.0, 10.4, 2.95, "SM$^X$: mask superpixels of X, run the whole model again", "#1f5a8c"),
    ]
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(9, 3.2), layout="constrained")
        for left, width, text, colour in boxes.values():
            axes.add_patch(FancyBboxPatch((left, 0), width, 1, "round,pad=0.05", facecolor=colour, edgecolor="#445"))
            axes.text(left + width / 2, 0.5, text, ha="center", va="center")
        edges = [(left, left + width) for left, width, *_ in boxes.values()]
        for (_, end), (start, _) in pairwise(edges):
            axes.annotate("", (start - 0.06, 0.5), (end + 0.06, 0.5), arrowprops={"arrowstyle": "->", "color": "#445"})
        for start, end, height, text, colour in spans:
            axes.annotate("", (start, height), (end, height), arrowprops={"arrowstyle": "<->", "color": colour})
            axes.text((start + end) / 2, height + 0.06, text, ha="center", va="bottom", color=colour)
        axes.set(xlim=(-0.2, 10.6), ylim=(-0.15, 3.45))
        axes.axis("off")
    return figure
