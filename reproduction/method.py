"""Pictures of the method, drawn from maps: one mask with its effect, and a map from more and more masks.

Every function returns a Figure that pyplot has closed, so that a notebook shows it once.
"""

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from xattn.analysis.normalisation import standardise
from xattn.attribution.estimators import estimate
from xattn.figures import MAP_COLOURS, SATURATION, SPECTROGRAM, STYLE, literal
from xattn.maps import WORD_START, masks_of

NUMBERS = (10, 100)


def one_mask(maps: xr.Dataset, number: int = 0) -> Figure:
    """Draw one perturbation of the spectrogram, with its masked cells, and the score that it gives each token."""
    masks = masks_of(maps, "input")
    (level,), (hidden,) = masks.draw(number, number + 1)
    masked = hidden[masks.partition.labels[level]]  # (time, mel)
    tokens, scores = [literal(token) for token in maps.token.values], maps.input_scores.values[number]
    with matplotlib.rc_context(STYLE):
        size = 9, max(2.2, 0.6 + 0.15 * len(tokens))
        figure, (left, right) = plt.subplots(1, 2, figsize=size, width_ratios=[3, 1], layout="constrained")
        _spectrogram(left, maps)
        shade = np.ma.masked_where(~masked, masked).T
        left.imshow(shade, aspect="auto", origin="lower", extent=_extent(maps), cmap=ListedColormap(["#b5502d"]))
        left.set(title=f"Mask {number + 1}: {masked.mean():.0%} of the cells set to 0", xlabel="time (s)")
        right.barh(range(len(tokens)), scores, color="#1f5a8c")
        right.set_yticks(range(len(tokens)), tokens)
        right.invert_yaxis()
        right.set(title="Score of each token", xlabel="KL divergence (nats)")
    plt.close(figure)
    return figure


def more_masks(maps: xr.Dataset) -> Figure:
    """Draw SM^X of one token from its first 10 and 100 masks, and from all.

    The token is the one with the highest mean score among those that begin a word.
    """
    scores, masks = maps.input_scores, masks_of(maps, "input")
    begins = np.char.startswith(maps.token.values, WORD_START)
    chosen, total = int(scores.mean("input_mask").where(begins, -np.inf).argmax("token")), scores.sizes["input_mask"]
    rows = {f"{total:,} masks": maps.input_saliency.values[[chosen]]}
    for number in sorted((each for each in NUMBERS if each < total), reverse=True):
        units = estimate(scores.values[:, [chosen]], masks, maps.estimator, np.arange(total) < number)
        rows[f"{number:,} masks"] = units.cells(masks.partition.labels)
    with matplotlib.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(rows) + 1, 1, figsize=(9, 0.8 + 1.15 * (len(rows) + 1)), sharex=True, layout="constrained"
        )
        _spectrogram(axes[0], maps)
        axes[0].set_title("Spectrogram")
        for axis, (title, cells) in zip(axes[1:], reversed(rows.items()), strict=True):
            colours = {"cmap": MAP_COLOURS, "vmin": 0, "vmax": SATURATION, "interpolation": "none"}
            image = axis.imshow(standardise(cells)[0].T, aspect="auto", origin="lower", extent=_extent(maps), **colours)
            axis.set(title=title, ylabel="Mel band")
        axes[-1].set_xlabel("time (s)")
        bar = figure.colorbar(image, ax=axes[1:], extend="both", pad=0.01, aspect=40)
        bar.set_label("standard deviations above the mean")
        token = literal(maps.token.values[chosen])
        figure.suptitle(f"SM$^X$ of the token {token} ({maps.estimator} estimator)", fontsize=9)
    plt.close(figure)
    return figure


def _spectrogram(axis, maps: xr.Dataset) -> None:
    axis.imshow(maps.features.values.T, aspect="auto", extent=_extent(maps), **SPECTROGRAM)
    axis.set_ylabel("Mel band")


def _extent(maps: xr.Dataset) -> tuple[float, float, float, float]:
    """Left, right, bottom and top of the cells, in seconds and bands."""
    first, hop = float(maps.time[0]), float(maps.time[1] - maps.time[0])
    return first - hop / 2, first - hop / 2 + hop * maps.sizes["time"], 0, maps.features.shape[1]
