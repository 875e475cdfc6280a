"""Heatmaps of maps in one style. Functions return a Figure; `save` writes it."""

from collections.abc import Collection, Sequence
from functools import cache
from io import BytesIO
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font

from xattn.analysis.correlation import normalised_attention, normalised_saliency
from xattn.analysis.normalisation import standardise
from xattn.analysis.reliability import LOW
from xattn.data.utterance import Word
from xattn.files import replacing
from xattn.maps import SALIENCIES, drop_special_tokens, padding_share

MAP_COLOURS = "magma"
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
    "text.parse_math": True,
    "text.usetex": False,  # `literal` escapes for mathtext only
}
# Leaves out the time and the version, which would change the bytes of a file.
METADATA = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
SATURATION = 4.0  # standard deviations at which the colour scale of maps ends
SPECTROGRAM = {"origin": "lower", "interpolation": "none", "cmap": "Greys", "vmin": -1.5, "vmax": 3}
TITLES = {
    "cross_attention": "Cross-attention, CA",
    "input_saliency": "Input saliency, SM$^X$",
    "encoder_saliency": "Encoder saliency, SM$^H$",
}


@cache
def _drawable() -> Collection[int]:
    """Code points for which the font of figures, which comes with matplotlib, has glyphs."""
    return get_font(findfont(STYLE["font.family"])).get_charmap().keys()


def literal(text: str) -> str:
    """Prepare text from outside, such as a token or a name, so that a figure shows it as it is.

    Dollars are escaped; they would start a formula. Characters that the font lacks become their code points, such as
    [U+65E5], because the machine's fonts would make pictures differ between machines.
    """
    shown = (each if ord(each) in _drawable() else f"[U+{ord(each):04X}]" for each in text)
    return "".join(shown).replace("$", r"\$")


class Picture(Figure):
    """A figure that a notebook shows once if it is the value of a cell; it would show one of pyplot twice."""

    def _repr_png_(self) -> bytes:
        content = BytesIO()
        with matplotlib.rc_context(STYLE):
            self.savefig(content, format="png", bbox_inches="tight")
        return content.getvalue()


def save(figure: Figure, stem: str | Path, formats: Sequence[str] = ()) -> None:
    """Write a figure and close it. PNG, PDF and SVG files have the same bytes for the same content.

    Args:
        stem: the file's name. A suffix such as ".pdf" selects the format; without one that matplotlib knows, .png is
            appended.
        formats: formats to write instead, one file each, such as ("png", "svg").

    Raises:
        ValueError: matplotlib cannot write one of the formats. OSError: a file could not be written.
    """
    stem, known = Path(stem), figure.canvas.get_supported_filetypes()
    if stem.suffix[1:].lower() in known:
        stem, formats = stem.with_suffix(""), formats or (stem.suffix[1:],)
    for each in formats:
        if each.lower() not in known:
            raise ValueError(f"Figures cannot be saved in the format {each!r}: choose one of {', '.join(known)}.")
    for each in formats or ("png",):
        with matplotlib.rc_context(STYLE), replacing(Path(f"{stem}.{each}")) as temporary:
            figure.savefig(temporary, format=each, bbox_inches="tight", metadata=METADATA.get(each.lower()))
    plt.close(figure)


def heatmaps(maps: xr.Dataset, words: Sequence[Word] = (), reduction: str = "2d_max") -> Figure:
    """Draw CA, SM^X and SM^H of one utterance side by side, tokens against seconds, under the spectrogram.

    Maps of other tools can lack SM^H and the spectrogram. Selections of layers, heads, tokens or a stretch of time are
    drawn as they are, and the title names them.

    CA, averaged over layers and heads, is standardised over tokens, SM^X and SM^H per token, and SM^X is reduced to
    encoder steps, as for the correlation. Then every row is drawn in standard deviations above its own mean, so that
    one colour scale serves all panels.

    Args:
        maps: a dataset of `xattn.explain`.
        words: spoken words with their times, drawn as boundaries.
        reduction: see `xattn.maps.reduce_to_steps`.
    """
    if "token" not in maps.dims:
        maps = maps.expand_dims("token")
        if "features" in maps:  # they do not depend on the token
            maps = maps.assign(features=maps.features.isel(token=0, drop=True))
    maps, words = drop_special_tokens(maps), [word._replace(word=literal(word.word)) for word in words]
    attention = maps.cross_attention.mean([axis for axis in ("layer", "head") if axis in maps.cross_attention.dims])
    panels = {"cross_attention": normalised_attention(attention)}
    panels |= {name: normalised_saliency(maps[name], attention, reduction) for name in SALIENCIES if name in maps}
    tokens = [literal(token) for token in maps.token.values]
    heights = [1.1, 0.19 * len(tokens)] if "features" in maps else [0.19 * len(tokens)]
    letters = max((len(word.word) for word in words if "features" in maps), default=0)
    above = 8 + 4.5 * letters  # points
    # Long names enlarge the figure, by about an em for each letter. They would leave no room for the maps otherwise.
    width = 1 + 3 * len(panels) + max(0, max(map(len, tokens), default=0) - 16) / 9
    height = 1.3 + sum(heights) + max(0, letters - 11) / 8
    with matplotlib.rc_context(STYLE):
        figure = Picture(figsize=(width, height), layout="constrained")
        axes = figure.subplots(
            len(heights),
            len(panels),
            sharex=True,
            squeeze=False,
            gridspec_kw={"height_ratios": heights, "hspace": 0.04, "wspace": 0.04},
        )
        for column, (name, panel) in enumerate(panels.items()):
            if "features" in maps:
                _spectrogram(axes[0, column], maps, words)
                axes[0, column].set_ylabel("" if column else "Mel band")
            axes[0, column].set_title(_title(maps, name), pad=above)
            image = _map(axes[-1, column], panel, maps, words)
            axes[-1, column].set_yticks(range(len(tokens)), tokens)
            axes[-1, column].set_ylabel("" if column else "token of the hypothesis")
            axes[-1, column].set_xlabel("time (s)")
        for axis in axes[:, 1:].flat:
            axis.set_yticks([])
        bar = figure.colorbar(image, ax=axes[-1], extend="both", pad=0.01, aspect=30)
        bar.set_label("standard deviations\nabove the row's mean")
        names = [literal(name) for name in (maps.model, maps.setting, maps.utterance)]
        figure.suptitle(", ".join([*names, *_selection(maps)]), fontsize=9)
    return figure


def _title(maps: xr.Dataset, name: str) -> str:
    """A panel's title with what is known of its map: reliability, windows, attention on the padding."""
    title, place = TITLES[name], name.removesuffix("_saliency")
    if name == "cross_attention" and "padding_attention" in maps:
        title += f"\n{padding_share(maps):.0%} of it on the padding"
    if place == "input" and maps.attrs.get("partition") == "windows":
        title += " of windows"
    reliability = maps.attrs.get(f"{place}_reliability", np.nan)
    if np.isnan(reliability):
        return title
    return f"{title}\nreliability {reliability:.2f}{', mostly noise' if reliability < LOW else ''}"


def _selection(maps: xr.Dataset) -> list[str]:
    """The layers, heads and the stretch of time that `sel` has left, if it has left less than all."""
    chosen = []
    for axis in ("layer", "head"):
        if axis not in maps.coords:  # averaged over
            continue
        labels = np.atleast_1d(maps[axis].values).tolist()
        if len(labels) < maps[axis].attrs.get("total", len(labels)):
            chosen.append(f"{axis}{'s' * (len(labels) > 1)} {', '.join(map(str, labels))}")
    if maps.sizes["time"] < maps.time.attrs.get("total", 0):
        start, hop = _time_axis(maps)
        chosen.append(f"{start:.2f} to {start + hop * maps.sizes['time']:.2f} s")
    return chosen


def _map(axes: Axes, panel: xr.DataArray, maps: xr.Dataset, words: Sequence[Word]):
    left, right = float(panel.step_start[0]), float(panel.step_end[-1])
    image = axes.imshow(
        standardise(panel.values),
        aspect="auto",
        interpolation="none",  # a vector file then holds the cells themselves, not their enlargement
        cmap=MAP_COLOURS,
        norm=Normalize(0, SATURATION),
        extent=(left, right, panel.sizes["token"] - 0.5, -0.5),
    )
    start, hop = _time_axis(maps)
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
    end = start + hop * len(features)
    axes.imshow(features.T, aspect="auto", extent=(start, end, 0, features.shape[1]), **SPECTROGRAM)
    for edge in _edges(words):
        axes.axvline(edge, color="#1f5a8c", linewidth=0.6)
    for word in words:
        middle = (word.start + word.end) / 2
        if start <= middle <= end:
            axes.text(middle, features.shape[1] + 3, word.word, rotation=90, ha="center", va="bottom", size=7)


def superpixels(features: np.ndarray, partitions: dict[str, np.ndarray]) -> Figure:
    """Draw the borders of units on a stretch of spectrogram, one row for each partition, one column for each level.

    features: (time, mel); partitions: by name, the labels (level, time, mel) of the same cells.
    """
    columns, (frames, bands) = len(next(iter(partitions.values()))), features.shape
    with matplotlib.rc_context(STYLE):
        size = 1 + 2.6 * columns, 0.8 + 2.6 * len(partitions) * bands / frames
        figure = Picture(figsize=size, layout="constrained")
        axes = figure.subplots(len(partitions), columns, sharex=True, sharey=True, squeeze=False)
        for row, (name, levels) in zip(axes, partitions.items(), strict=True):
            for level, (axis, labels) in enumerate(zip(row, levels, strict=True), start=1):
                axis.imshow(features.T, **SPECTROGRAM)
                time, mel = np.nonzero(labels[1:] != labels[:-1])
                axis.vlines(time + 0.5, mel - 0.5, mel + 0.5, color="#b5502d", linewidth=0.8)
                time, mel = np.nonzero(labels[:, 1:] != labels[:, :-1])
                axis.hlines(mel + 0.5, time - 0.5, time + 0.5, color="#b5502d", linewidth=0.8)
                axis.set_title(f"{literal(name)}, level {level}: {len(np.unique(labels))} in view")
            row[0].set_ylabel("Mel band")
        for axis in axes[-1]:
            axis.set_xlabel("frame of the stretch")
    return figure
