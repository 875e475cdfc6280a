"""Heatmaps and tables in one style. Every function takes arrays and returns a Figure; `save` writes it."""

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from xattn.attention import MEAN
from xattn.compare import frame_wise, lead_of, mean_std, saliency_on_steps, sources_of, spoken_tokens
from xattn.corpus import Word

MAP_COLOURS = "magma"
RHO_COLOURS = sns.light_palette("#1f5a8c", as_cmap=True)
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "axes.titlesize": 9,
    "axes.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 100,
    "savefig.dpi": 160,
    "svg.hashsalt": "xattn",
    "svg.fonttype": "none",
}
SATURATION = 4.0  # standard deviations at which the colour scale of maps ends
SPECTROGRAM = {"origin": "lower", "interpolation": "none", "cmap": "Greys", "vmin": -1.5, "vmax": 3}
TITLES = {"CA": "Cross-attention, CA", "SM^X": "Input saliency, SM$^X$", "SM^H": "Encoder saliency, SM$^H$"}


def save(figure: Figure, stem: str | Path, formats: Sequence[str] = ("png",)) -> None:
    """Write a figure as stem.png (and stem.svg), the same bytes for the same content, and close it."""
    Path(stem).parent.mkdir(parents=True, exist_ok=True)
    for suffix in formats:
        with matplotlib.rc_context(STYLE):
            metadata = {"Date": None} if suffix == "svg" else {"Software": None}
            figure.savefig(f"{stem}.{suffix}", bbox_inches="tight", metadata=metadata)
    plt.close(figure)


def heatmaps(maps: xr.Dataset, words: Sequence[Word] = (), reduction: str = "2d_max") -> Figure:
    """CA, SM^X and SM^H of one utterance side by side, tokens against seconds, under the spectrogram.

    Maps of other tools may lack SM^H and the spectrogram, which are then left out.

    CA (mean over layers and heads) is normalised frame-wise, SM^X and SM^H per token, and SM^X is reduced to encoder
    steps, as for the correlation. Then every row is drawn in standard deviations above its own mean, so that one colour
    scale serves all three panels.

    Args:
        maps: a dataset of `xattn.explain`.
        words: spoken words with their times, drawn as boundaries; none where they are not known.
        reduction: see `xattn.compare.reduce_to_steps`.
    """
    maps = spoken_tokens(maps)
    panels = {
        "CA": frame_wise(maps.cross_attention.mean(["layer", "head"]).values),
        "SM^X": saliency_on_steps(maps, "input", reduction),
    }
    if "encoder" in sources_of(maps):
        panels["SM^H"] = saliency_on_steps(maps, "encoder")
    tokens = maps.token.values
    heights = [1.1, 0.19 * len(tokens)] if "features" in maps else [0.19 * len(tokens)]
    above = 8 + 4.5 * max((len(word.word) for word in words if "features" in maps), default=0)  # points
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(heights),
            len(panels),
            figsize=(1 + 3 * len(panels), 1.3 + sum(heights)),
            sharex=True,
            squeeze=False,
            gridspec_kw={"height_ratios": heights, "hspace": 0.04, "wspace": 0.04},
            layout="constrained",
        )
        for column, (name, panel) in enumerate(panels.items()):
            if "features" in maps:
                _spectrogram(axes[0, column], maps, words)
                axes[0, column].set_ylabel("" if column else "Mel band")
            axes[0, column].set_title(TITLES[name], pad=above)
            image = _map(axes[-1, column], mean_std(panel)[0], maps, words)
            axes[-1, column].set_yticks(range(len(tokens)), tokens)
            axes[-1, column].set_ylabel("" if column else "token of the hypothesis")
            axes[-1, column].set_xlabel("time (s)")
        for axis in axes[:, 1:].flat:
            axis.set_yticks([])
        bar = figure.colorbar(image, ax=axes[-1], extend="both", pad=0.01, aspect=30)
        bar.set_label("standard deviations\nabove the row's mean")
        figure.suptitle(f"{maps.model}, {maps.setting}, {maps.utterance}", fontsize=9)
    return figure


def _map(axes: Axes, panel: np.ndarray, maps: xr.Dataset, words: Sequence[Word]):
    start, hop = _time_axis(maps)
    width = maps.subsampling * hop  # seconds a step covers
    left = start - lead_of(maps) * hop
    image = axes.imshow(
        panel,
        aspect="auto",
        interpolation="none",  # a vector file then holds the cells themselves, not their enlargement
        cmap=MAP_COLOURS,
        norm=Normalize(0, SATURATION),
        extent=(left, left + width * panel.shape[1], len(panel) - 0.5, -0.5),
    )
    axes.set_xlim(start, start + hop * maps.sizes["time"])
    for edge in _edges(words):
        axes.axvline(edge, color="white", linewidth=0.5, alpha=0.6)
    return image


def _time_axis(maps: xr.Dataset) -> tuple[float, float]:
    """Seconds at which the first frame's cell begins, drawn about its centre, and how long a cell lasts."""
    hop = float(np.diff(maps.time.values[:2])[0])
    return float(maps.time.values[0]) - hop / 2, hop


def _edges(words: Sequence[Word]) -> list[float]:
    """Where words begin and end, each time once."""
    return sorted({time for word in words for time in (word.start, word.end)})


def _spectrogram(axes: Axes, maps: xr.Dataset, words: Sequence[Word]) -> None:
    features = maps.features.values
    start, hop = _time_axis(maps)
    axes.imshow(
        features.T,
        aspect="auto",
        extent=(start, start + hop * len(features), 0, features.shape[1]),
        **SPECTROGRAM,
    )
    for edge in _edges(words):
        axes.axvline(edge, color="#1f5a8c", linewidth=0.6)
    for word in words:
        axes.text(
            (word.start + word.end) / 2, features.shape[1] + 3, word.word, rotation=90, ha="center", va="bottom", size=7
        )


def heads_and_layers(table: pd.DataFrame, title: str) -> Figure:
    """Correlation of every layer and head in the paper's arrangement, one panel a saliency source.

    table: long, with columns source ("input" and, where it is there, "encoder"), layer, head (numbers and "mean"), rho,
    low and high.
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
            known = grids[0].notna().to_numpy().ravel()  # others have no text
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
    """Values with their 95 % intervals, one panel a quantity, up to four side by side, and one row an item.

    table: long, with value, low, high, n, the column named by `panels` and the column or columns named by `rows`; each
    panel has the rows that have its quantity. names: titles of panels, where the quantity's own name will not do.
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
            # a panel alone is as wide as two, or the title would overhang it
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
    """How maps of few perturbations agree with a reference: a column a pair and source, r above, bias below.

    table: long, with pair, source ("input", "encoder"), estimator, perturbations, quantity ("r", "bias"), value, low
    and high.
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
            axis.set_xlabel("perturbations")
        axes[0, 0].set_ylabel("r with the reference")
        axes[1, 0].set_ylabel("bias of $\\rho$")
        figure.legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, loc="outside right center")
        figure.suptitle(title, fontsize=9)
    return figure


def layer_lines(table: pd.DataFrame, title: str) -> Figure:
    """Correlation of layer averages, a panel a model and a line a setting; at the right the mean of all layers.

    table: long, with model, setting, layer (numbers and "mean"), rho, low, high and n.
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
    """Score against the percentage of deleted cells, one line a map, its area in the legend.

    points: map, percent, score; summary: map, area, low, high, as from `xattn.faithfulness.areas`.
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


def superpixels(features: np.ndarray, pyramids: dict[str, np.ndarray]) -> Figure:
    """Where superpixels meet on a stretch of spectrogram, a row a pyramid and a column a granularity.

    features: (time, mel); pyramids: by name, of the same cells, the labels of `xattn.segments.slic_pyramid`.
    """
    columns, (frames, bands) = len(next(iter(pyramids.values()))), features.shape
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(pyramids),
            columns,
            figsize=(1 + 2.6 * columns, 0.8 + 2.6 * len(pyramids) * bands / frames),
            sharex=True,
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for row, (name, levels) in zip(axes, pyramids.items(), strict=True):
            for granularity, (axis, labels) in enumerate(zip(row, levels, strict=True), start=1):
                axis.imshow(features.T, **SPECTROGRAM)
                time, mel = np.nonzero(labels[1:] != labels[:-1])
                axis.vlines(time + 0.5, mel - 0.5, mel + 0.5, color="#b5502d", linewidth=0.8)
                time, mel = np.nonzero(labels[:, 1:] != labels[:, :-1])
                axis.hlines(mel + 0.5, time - 0.5, time + 0.5, color="#b5502d", linewidth=0.8)
                axis.set_title(f"{name}, granularity {granularity}: {len(np.unique(labels))} in view")
            row[0].set_ylabel("Mel band")
        for axis in axes[-1]:
            axis.set_xlabel("frame of the stretch")
    return figure


def _counts(table: pd.DataFrame) -> str:
    low, high = table.n.min(), table.n.max()
    return f"{low}" if low == high else f"{low} to {high}"


def coverage() -> Figure:
    """The paper's first figure in our own drawing: which part of the model each map covers."""
    boxes = {  # left edge, width, text, colour
        "spectrogram": (0.0, 1.5, "spectrogram\nX  (time × mel)", "#dfe7ee"),
        "encoder": (2.2, 1.5, "encoder", "#c3d4e3"),
        "states": (4.4, 1.5, "encoder output\nH  (step × width)", "#dfe7ee"),
        "decoder": (6.6, 1.7, "decoder\nwith cross-attention", "#c3d4e3"),
        "tokens": (9.0, 1.4, "output tokens", "#dfe7ee"),
    }
    spans = [  # from, to, height, text, colour
        (4.4, 8.3, 1.55, "CA: softmax(QK$^\\mathsf{T}$/√d), one map a layer and head", "#b5502d"),
        (4.4, 10.4, 2.25, "SM$^H$: hide steps of H, run the decoder again", "#6a4c93"),
        (0.0, 10.4, 2.95, "SM$^X$: hide superpixels of X, run the whole model again", "#1f5a8c"),
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
