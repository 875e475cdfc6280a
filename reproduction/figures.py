"""Pictures of the paper's tables. Every function takes a long table and returns a Figure."""

import re
from collections.abc import Sequence
from itertools import pairwise

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from reproduction.tables import MEAN
from xattn.figures import STYLE

RHO_COLOURS = sns.light_palette("#1f5a8c", as_cmap=True)


def heads_and_layers(table: pd.DataFrame, title: str) -> Figure:
    """Draw the correlation of every layer and head as in the paper's Table 3, one panel for each kind of saliency.

    table: long, with columns source ("input" and possibly "encoder"), layer, head (numbers and "mean"), rho, low, high.
    """
    sources = {"input": r"$\rho$(CA, SM$^X$)", "encoder": r"$\rho$(CA, SM$^H$)"}
    sources = {source: name for source, name in sources.items() if source in table.source.values}
    rows, columns = _labels(table["layer"].unique()), _labels(table["head"].unique())
    low, high = min(0.0, table.rho[table.source.isin(sources)].min()), table.rho[table.source.isin(sources)].max()
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(
            1,
            len(sources),
            figsize=(1.6 + 0.75 * len(sources) * len(columns), 1.2 + 0.46 * len(rows)),
            layout="constrained",
            sharey=True,
            squeeze=False,
        )
        for axis, (source, name) in zip(axes[0], sources.items(), strict=True):
            part = table[table.source == source]
            part = part.assign(text=[_two_lines(row) for row in part.itertuples()])
            grids = [part.pivot(index="layer", columns="head", values=v).loc[rows, columns] for v in ("rho", "text")]
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
            axis.set(title=name, xlabel="head", ylabel="decoder layer" if axis is axes[0, 0] else "")
            axis.tick_params(length=0, labelrotation=0)
        figure.suptitle(title, fontsize=9)
    return figure


def _two_lines(row) -> str:
    interval = f"\n{row.low:z.2f} to {row.high:z.2f}" if np.isfinite(row.low) else ""
    return f"{row.rho:z.2f}{interval}"


def _labels(labels: Sequence) -> list:
    return [*sorted(label for label in labels if label != MEAN), MEAN]


def intervals(
    table: pd.DataFrame, rows: str | list[str], panels: str, title: str, names: dict[str, str] | None = None
) -> Figure:
    """Draw values with their 95 % intervals, one panel for each quantity, up to four side by side.

    table: long, with value, low, high, n, the column `panels` and the column or columns `rows`; a panel has the rows of
    its quantity. names: titles of panels, if they differ from the quantities' names.
    """
    columns = [rows] if isinstance(rows, str) else rows
    table = table.assign(label=table[columns].astype(str).agg(" ".join, axis=1).str.replace("_", " "))
    quantities = list(dict.fromkeys(table[panels]))
    shared = bool(table.groupby("label")[panels].nunique().eq(len(quantities)).all())
    wide = min(4, len(quantities))
    tall = -(-len(quantities) // wide)
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
            axis.hlines(heights, part.low, part.high, color="#1f5a8c", linewidth=2, alpha=0.5)
            axis.plot(part.value, heights, "o", color="#1f5a8c", markersize=4)
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
        figure.suptitle(f"{title} (n utterances; bars: 95 % intervals)", fontsize=9)
    return figure


def convergence(table: pd.DataFrame, title: str) -> Figure:
    """Draw how maps from few masks agree with a reference: r above, bias below.

    table: long, with pair (the condition), source ("input", "encoder"), estimator, perturbations (the number of masks),
    quantity ("r", "bias"), value, low and high. There is one column for each pair and source.
    """
    symbols, goals = {"input": "SM$^X$", "encoder": "SM$^H$"}, {"r": (0.98, 1.0), "bias": (-0.01, 0.01)}
    columns = list(dict.fromkeys(zip(table.pair, table.source, strict=True)))
    estimators = list(dict.fromkeys(table.estimator))
    lines = table.set_index(["pair", "source", "quantity", "estimator"]).sort_index()
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(
            2, len(columns), figsize=(1.6 + 2.2 * len(columns), 4.6), sharex=True, sharey="row", squeeze=False,
            layout="constrained",
        )  # fmt: skip
        for row, (quantity, goal) in zip(axes, goals.items(), strict=True):
            for axis, (pair, source) in zip(row, columns, strict=True):
                axis.axhspan(*goal, color="0.9", zorder=0)
                for estimator, colour in zip(estimators, sns.color_palette("colorblind"), strict=False):
                    part = lines.loc[[(pair, source, quantity, estimator)]].sort_values("perturbations")
                    axis.plot(part.perturbations, part.value, "o-", color=colour, markersize=3, label=estimator)
                    bounds = part.low.astype(float), part.high.astype(float)
                    axis.fill_between(part.perturbations, *bounds, color=colour, alpha=0.15)
                axis.set_xscale("log")
                axis.grid(axis="y", linewidth=0.3)
        numbers = sorted(table.perturbations.unique())
        for axis, (pair, source) in zip(axes[0], columns, strict=True):
            axis.set_title(f"{pair}, {symbols[source]}")
        for axis in axes[1]:
            axis.set_xticks(numbers, numbers)
            axis.minorticks_off()
            axis.set_xlabel("masks")
        axes[0, 0].set_ylabel("r with the reference")
        axes[1, 0].set_ylabel("bias of $\\rho$")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, loc="outside right center")
        figure.suptitle(title, fontsize=9)
    return figure


def layer_lines(table: pd.DataFrame, title: str) -> Figure:
    """Draw the correlation of layer averages, one panel for each model, one line for each direction.

    The mean of all layers is at the right of each panel.

    table: long, with model, setting (the direction), layer (numbers and "mean"), rho, low, high and n.
    """
    models, settings = list(dict.fromkeys(table.model)), list(dict.fromkeys(table.setting))
    colours = dict(zip(settings, sns.color_palette("colorblind", len(settings)), strict=True))
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(
            1, len(models), figsize=(1.6 + 2.9 * len(models), 3.4), sharey=True, squeeze=False, layout="constrained"
        )
        for axis, model in zip(axes[0], models, strict=True):
            own = table[table.model == model]
            last = max(label for label in own.layer if label != MEAN)
            groups = list(own.groupby("setting", sort=False))
            offsets = 0.045 * (last + 2) * (np.arange(len(groups)) - (len(groups) - 1) / 2)
            middle = last + 1 + 0.08 * (last + 2)
            for offset, (setting, part) in zip(offsets, groups, strict=True):
                lines = part[part.layer != MEAN].sort_values("layer")
                layers = lines.layer.astype(int)
                axis.plot(layers, lines.rho, "o-", color=colours[setting], markersize=3, label=setting)
                bounds = lines.low.astype(float), lines.high.astype(float)
                axis.fill_between(layers, *bounds, color=colours[setting], alpha=0.12)
                mean = part[part.layer == MEAN].iloc[0]
                error = [[mean.rho - mean.low], [mean.high - mean.rho]]
                axis.errorbar(middle + offset, mean.rho, error, fmt="s", markersize=4, color=colours[setting])
            axis.set_xticks([*range(1, last + 1), middle], [*range(1, last + 1), MEAN])
            axis.set(xlabel="decoder layer", title=model)
            axis.grid(axis="y", linewidth=0.3)
        axes[0, 0].set_ylabel(r"Pearson's $\rho$")
        handles = {line.get_label(): line for axis in axes[0] for line in axis.lines if line.get_label() in settings}
        figure.legend(handles.values(), handles, frameon=False, loc="outside right center")
        figure.suptitle(f"{title} (mean of {_counts(table)} utterances; bands and bars: 95 % intervals)", fontsize=9)
    return figure


def deletion(points: pd.DataFrame, summary: pd.DataFrame, title: str) -> Figure:
    """Draw the score against the percentage of deleted cells, one line for each map, with its area in the legend.

    points, summary: from `xattn.analysis.faithfulness.areas`.
    """
    with matplotlib.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(7, 3.6), layout="constrained")
        colours = dict(zip(summary["map"], sns.color_palette("colorblind", len(summary)), strict=True))
        for row in summary.sort_values("area", ascending=False).itertuples():
            part = points[points["map"] == row.map]
            name = re.sub(r"\^(\w)", r"$^\1$", row.map.replace("_", " "))
            label = f"{name}: {row.area:.1f} ({row.low:.1f} to {row.high:.1f})"
            axis.plot(part.percent, part.score, "o-", markersize=2.5, color=colours[row.map], label=label)
        axis.set(xlabel="cells deleted (%)", ylabel=f"{summary.metric.iloc[0]} (%)", title=title, ylim=(0, None))
        axis.grid(linewidth=0.3)
        axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), title="area under the curve (95 %)")
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
