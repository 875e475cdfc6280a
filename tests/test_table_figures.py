"""Pictures of tables: every number is drawn where the table says."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from conftest import drawn
from PIL import Image

from reproduction import method
from reproduction.figures import (
    BLUE,
    GREY,
    convergence,
    coverage,
    deletion,
    heads_and_layers,
    intervals,
    layer_lines,
    randomisation,
    shown,
    shrink,
)
from reproduction.tables import MEAN
from xattn.figures import save


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def with_reported(table, by=0.05):
    """Add what `correlation_table` reports: rho plus `by`, with narrower intervals."""
    reported = table.rho + by
    return table.assign(reported=reported, reported_low=reported - 0.02, reported_high=reported + 0.03)


def as_measured(table, noisy):
    """Drop what is reported of the rows that are too noisy."""
    columns = ["reported", "reported_low", "reported_high"]
    return table.assign(**{name: table[name].mask(noisy) for name in columns})


def layers_and_heads(seed=0):
    """A long table of rho for four layers, three heads and their averages, in random order."""
    rng = np.random.default_rng(seed)
    labels = [(layer, head) for layer in (1, 2, 10, MEAN) for head in (1, 2, 3, MEAN)]
    rows = [(saliency, *label, rng.uniform(-0.1, 0.7)) for saliency in ("input", "encoder") for label in labels]
    table = pd.DataFrame(rows, columns=["saliency", "layer", "head", "rho"]).sample(frac=1, random_state=seed)
    return with_reported(table.assign(low=table.rho - 0.1, high=table.rho + 0.1))


def long_table():
    """Two models of unequal depth, two directions of the second one, and a metric for each task."""
    rows = []
    for model, direction, layers in (("base", "en", 2), ("small", "en", 3), ("small", "en-it", 3)):
        rows += [(model, direction, "rho", layer, 0.1 * layer) for layer in range(1, layers + 1)]
        rows.append((model, direction, "rho", MEAN, 0.4))
        rows.append((model, direction, "BLEU" if "-" in direction else "WER", MEAN, 50.0))
    table = pd.DataFrame(rows, columns=["model", "direction", "quantity", "layer", "value"])
    return table.assign(low=table.value - 0.05, high=table.value + 0.05, reliability=0.8, n=16)


def rho_of_layers():
    return with_reported(long_table().query("quantity == 'rho'").rename(columns={"value": "rho"}))


def few_masks():
    """r and errors of two estimators at two numbers of masks, for two kinds of saliency."""
    rows = [
        ("tiny/en", saliency, estimator, number, quantity, number / 400 - 0.01 * (estimator == "ridge"))
        for saliency in ("input", "encoder")
        for estimator in ("mean", "ridge")
        for number in (40, 20)
        for quantity in ("r", "measured", "reported", "reliability")
        if (saliency, estimator, quantity) != ("input", "ridge", "reported")  # no block has a limit
    ]
    table = pd.DataFrame(rows, columns=["condition", "saliency", "estimator", "masks", "quantity", "value"])
    return table.assign(low=table.value - 0.02, high=table.value + 0.02, spread=0.05)


def curves():
    """The points and the summary of deletion and insertion with two maps, one of which is noisy."""
    metrics = ["deletion, corpus-capped WER", "insertion, corpus-capped WER"]
    points = pd.DataFrame(
        [
            (metric, name, percent, slope * percent)
            for metric in metrics
            for name, slope in (("CA", 0.5), ("SM^X 2d_max", 0.9))
            for percent in (0, 50)
        ],
        columns=["metric", "map", "percent", "score"],
    )
    rows = [(m, *each) for m in metrics for each in (("CA", 25.0, np.nan), ("SM^X 2d_max", 45.0, 0.3))]
    summary = pd.DataFrame(rows, columns=["metric", "map", "area", "reliability"])
    return points, summary.assign(low=summary.area - 1, high=summary.area + 2)


def random_layers():
    """Maps of a model with two decoder and two encoder layers."""
    layers = ["", "decoder.layers.1", "decoder.layers.0", "encoder.layers.1", "encoder.layers.0"]
    rows = [(n, layer, name, 1 - n / 5) for n, layer in enumerate(layers) for name in ("CA", "SM^X")]
    table = pd.DataFrame(rows, columns=["randomised", "layer", "map", "value"])
    return table.assign(low=table.value - 0.1, high=table.value + 0.1, n=4)


# A name, and how it is drawn.
NAME, SHOWN = "_my_$5_a$6\\日", "_my_$5_a$6\\[U+65E5]"
FIGURES = {
    "heads_and_layers": lambda: heads_and_layers(layers_and_heads(), "tiny, en"),
    "coverage": coverage,
    "intervals": lambda: intervals(long_table(), ["model", "direction"], "quantity", "made"),
    "layer_lines": lambda: layer_lines(rho_of_layers(), "made"),
    "convergence": lambda: convergence(few_masks(), "made"),
    "deletion": lambda: deletion(*curves(), "made"),
    "randomisation": lambda: randomisation(random_layers(), "made"),
}


@pytest.mark.parametrize("name", FIGURES)
def test_files_have_the_same_bytes_each_time(tmp_path, name):
    plt.close("all")
    for stem in ("first", "second"):
        save(FIGURES[name](), tmp_path / stem, formats=("png", "svg"))
    assert plt.get_fignums() == []
    for suffix, start in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        written = (tmp_path / f"first{suffix}").read_bytes()
        assert written.startswith(start) and len(written) > 5000
        assert written == (tmp_path / f"second{suffix}").read_bytes()
    assert len(plt.imread(tmp_path / "first.png")) > 300


def test_reported_values_are_drawn_and_measured_ones_if_there_are_none():
    table = as_measured(rho_of_layers(), [False, True] * 5 + [False])
    found = shown(table)
    assert found.noisy.tolist() == [False, True] * 5 + [False]
    for name in ("low", "high"):
        np.testing.assert_allclose(found[name], np.where(found.noisy, table[name], table[f"reported_{name}"]))
    np.testing.assert_allclose(found.value, np.where(found.noisy, table.rho, table.rho + 0.05))


def test_cells_of_a_table_hold_its_numbers():
    table = layers_and_heads()
    figure = heads_and_layers(table, "tiny, en")
    assert figure.get_suptitle() == "tiny, en"
    reported = table.set_index(["saliency", "layer", "head"]).reported
    for axes, saliency in zip(figure.axes[:2], ("input", "encoder"), strict=True):
        rows = [label.get_text() for label in figure.axes[0].get_yticklabels()]
        columns = [label.get_text() for label in axes.get_xticklabels()]
        assert (rows, columns) == (["1", "2", "10", "mean"], ["1", "2", "3", "mean"])
        assert len(axes.texts) == 16 and not [patch for patch in axes.patches if patch.get_hatch()]
        for text in axes.texts:
            x, y = (int(place) for place in text.get_position())
            label = tuple(int(name) if name != MEAN else name for name in (rows[y], columns[x]))
            value = reported[(saliency, *label)]
            assert text.get_text() == f"{value:z.2f}\n{value - 0.02:z.2f} to {value + 0.03:z.2f}"
    assert [axes.get_title() for axes in figure.axes[:2]] == ["$\\rho$(CA, SM$^X$)", "$\\rho$(CA, SM$^H$)"]
    colours = [axes.collections[0].get_clim() for axes in figure.axes[:2]]
    assert colours[0] == colours[1] == (min(0, table.reported.min()), table.reported.max())
    table.loc[table.index[0], ["rho", "reported"]] = np.nan
    assert sum(len(axes.texts) for axes in heads_and_layers(table, "tiny, en").axes[:2]) == 31


def test_noisy_panel_is_hatched_and_has_the_measured_numbers():
    table = layers_and_heads()
    noisy = as_measured(table, table.saliency == "input")
    first, second = heads_and_layers(noisy, "tiny, en").axes[:2]
    assert first.get_title() == "$\\rho$(CA, SM$^X$)\nas measured; hatched: too noisy for a conclusion"
    assert [patch.get_hatch() for patch in first.patches] == ["//"] and not second.patches
    assert second.get_title() == "$\\rho$(CA, SM$^H$)"
    corner = table.set_index(["saliency", "layer", "head"]).rho["input", MEAN, MEAN]
    assert first.texts[-1].get_text() == f"{corner:z.2f}\n{corner - 0.1:z.2f} to {corner + 0.1:z.2f}"


def test_panels_of_intervals_hold_their_quantities():
    table = long_table().query("layer == 'mean'")
    figure = intervals(table, ["model", "direction"], "quantity", "made", {"rho": "correlation"})
    assert figure.get_suptitle() == "made (n utterances; bars: 95 % intervals)"
    used = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in used] == ["correlation", "WER", "BLEU"]
    assert {axes.get_xlabel() for axes in used} == {"n = 16"}
    labels = [[label.get_text() for label in axes.get_yticklabels()] for axes in used]
    assert labels == [["base en", "small en", "small en-it"], ["base en", "small en"], ["small en-it"]]
    for axes, value in zip(used, (0.4, 50.0, 50.0), strict=True):
        bars, points = axes.collections
        assert points.get_offsets()[:, 0].tolist() == [value] * len(axes.get_yticklabels())
        np.testing.assert_allclose(bars.get_segments()[0][:, 0], [value - 0.05, value + 0.05])
        assert {text.get_text() for text in axes.texts} == {"0.400" if value < 1 else "50.0"}
        assert {*map(tuple, points.get_facecolors())} == {matplotlib.colors.to_rgba(BLUE)}


@pytest.mark.parametrize("column", ["reliability", "noisy"])
def test_noisy_rows_are_grey(column):
    table = long_table().query("layer == 'mean' and quantity == 'rho'")
    noisy = {"reliability": [0.49, 0.5, np.nan], "noisy": [True, False, False]}
    figure = intervals(table.assign(**{column: noisy[column]}), ["model", "direction"], "quantity", "made")
    assert figure.get_suptitle().endswith("95 % intervals; grey: too noisy for a conclusion)")
    bars, points = figure.axes[0].collections
    expected = [matplotlib.colors.to_rgba(colour) for colour in (GREY, BLUE, BLUE)]
    np.testing.assert_allclose(points.get_facecolors(), expected)
    np.testing.assert_allclose(bars.get_colors()[:, :3], np.array(expected)[:, :3])


def test_models_can_have_unequal_depths():
    figure = layer_lines(rho_of_layers(), "made")
    assert [axes.get_title() for axes in figure.axes] == ["base", "small"]
    assert [label.get_text() for label in figure.axes[1].get_xticklabels()] == ["1", "2", "3", "mean"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["en", "en-it"]
    np.testing.assert_allclose(figure.axes[0].lines[0].get_xydata(), [[1, 0.15], [2, 0.25]])
    assert figure.get_suptitle() == "made (mean of 16 utterances; bands and bars: 95 % intervals)"


def test_noisy_direction_is_grey_and_dashed():
    table = rho_of_layers()
    figure = layer_lines(as_measured(table, table.direction == "en-it"), "made")
    line, noisy = (figure.axes[1].lines[number] for number in (0, 2))  # each is followed by its mean
    assert (line.get_linestyle(), noisy.get_linestyle(), noisy.get_color()) == ("-", "--", GREY)
    np.testing.assert_allclose(noisy.get_ydata(), [0.1, 0.2, 0.3])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["en", "en-it, too noisy"]


def test_a_table_without_encoder_saliency_has_one_panel():
    table = layers_and_heads().query("saliency == 'input'")
    assert [axis.get_title() for axis in heads_and_layers(table, "tiny").axes if axis.get_title()] == [
        "$\\rho$(CA, SM$^X$)"
    ]


def test_few_masks_are_drawn_against_their_number():
    figure = convergence(few_masks(), "made")
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["tiny/en, SM$^X$", "tiny/en, SM$^H$", *[""] * 4]
    labels = [axes.get_ylabel() for axes in figure.axes[::2]]
    assert labels == ["r with the reference", "error of $\\rho$\nas measured", "error of $\\rho$\nas reported"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["mean", "ridge"]
    for number, axes in enumerate(figure.axes):
        shifts = (0,) if number == 4 else (0, 0.01)  # a line is missing
        lines = [line.get_xydata() for line in axes.lines if line.get_marker() == "o"]
        np.testing.assert_allclose(lines, [[[20, 0.05 - shift], [40, 0.1 - shift]] for shift in shifts])
        heights = axes.collections[0].get_paths()[0].vertices[:, 1]  # the band
        assert (heights.min(), heights.max()) == pytest.approx((0.0, 0.15))
        assert [label.get_text() for label in figure.axes[4].get_xticklabels()] == ["20", "40"]
    assert figure.axes[5].get_ylim() == (-0.2, 0.2)


def test_curves_of_deletion_and_insertion_are_labelled_with_their_areas():
    figure = deletion(*curves(), "made")
    assert figure.get_suptitle() == "made"
    assert [axes.get_title() for axes in figure.axes] == ["deletion", "insertion"]
    assert [axes.get_xlabel() for axes in figure.axes] == ["cells deleted (%)", "cells kept (%)"]
    labels = ["SM$^X$ 2d max: 45.0 (44.0 to 47.0), too noisy", "CA: 25.0 (24.0 to 27.0)"]
    drawn = [[0.0, 45.0], [0.0, 25.0]]
    for axes, order in zip(figure.axes, (1, -1), strict=True):  # the most faithful first
        assert [text.get_text() for text in axes.get_legend().get_texts()] == labels[::order]
        assert [line.get_ydata().tolist() for line in axes.lines] == drawn[::order]
        assert [line.get_linestyle() for line in axes.lines] == ["--", "-"][::order]
        assert axes.get_ylabel() == "corpus-capped WER (%)" and axes.get_ylim()[0] == 0
    colours = [{line.get_label()[:2]: line.get_color() for line in axes.lines} for axes in figure.axes]
    assert colours[0] == colours[1] and len(set(colours[0].values())) == 2


def test_randomised_layers_of_decoder_and_encoder_are_apart():
    (axes,) = randomisation(random_layers(), "made").axes
    first, second, border, zero = axes.lines
    for line, label in ((first, "CA"), (second, "SM$^X$")):
        assert line.get_label() == label
        np.testing.assert_allclose(line.get_xydata(), [[n, 1 - n / 5] for n in range(5)])
    assert list(border.get_xdata()) == [2.5, 2.5] and list(zero.get_ydata()) == [0, 0]
    assert {text.get_text(): text.get_position()[0] for text in axes.texts} == {"encoder": 2.6, "decoder": 2.4}
    assert axes.figure.get_suptitle() == "made (mean of 4 utterances; bands: 95 % intervals)"


def test_a_single_panel_is_as_wide_as_its_title():
    table = long_table().query("layer == 'mean' and quantity == 'rho'")
    title = "Reductions with a long name (mean estimator) to steps"
    figure = intervals(table, ["model", "direction"], "quantity", title)
    figure.canvas.draw()
    assert len(figure.axes) == 1
    title = figure._suptitle.get_window_extent()
    assert title.x0 >= 0 and title.x1 <= figure.bbox.width


@pytest.mark.filterwarnings("error")
def test_names_of_models_are_drawn_as_they_are(tmp_path):
    rows = long_table().query("layer == 'mean'").replace({"model": {"small": NAME}})
    assert f"{SHOWN} en-it" in drawn(intervals(rows, ["model", "direction"], "quantity", "made"), tmp_path)
    layers = rho_of_layers().replace({"model": {"small": NAME}})
    assert SHOWN in drawn(layer_lines(layers, "made"), tmp_path)
    masks = few_masks().replace({"condition": {"tiny/en": f"{NAME}/en"}})
    titles = [text for text in drawn(convergence(masks, "made"), tmp_path) if text.startswith(SHOWN)]
    assert sorted(titles) == [f"{SHOWN}/en, SM{place}" for place in "HX"]


@pytest.mark.filterwarnings("error")
def test_tokens_are_drawn_as_they_are(made, tmp_path):
    maps = made.scored()
    maps = maps.assign_coords(token=[f"▁{NAME}", *maps.token.values[1:]])
    maps["input_scores"][:, 0] += maps.input_scores.max()  # the first token has the highest scores
    assert f"▁{SHOWN}" in drawn(method.one_mask(maps), tmp_path)
    assert any(text.startswith(f"SM of the token ▁{SHOWN} (") for text in drawn(method.more_masks(maps), tmp_path))


def test_pictures_are_reduced_to_256_colours(tmp_path):
    figure, axes = plt.subplots()
    axes.imshow(np.random.default_rng(0).random((40, 60)), cmap="magma")
    axes.set_title("A title")
    save(figure, tmp_path / "picture")
    path = tmp_path / "picture.png"
    with Image.open(path) as image:
        before, dpi, size = np.asarray(image.convert("RGB"), int), image.info["dpi"], path.stat().st_size
    shrink(path)
    with Image.open(path) as image:
        assert image.mode == "P" and image.info["dpi"] == dpi
        after = np.asarray(image.convert("RGB"), int)
    assert np.abs(after - before).max() < 12
    assert path.stat().st_size < 0.6 * size
    shrink(path)
    with Image.open(path) as image:
        assert np.array_equal(image.convert("RGB"), after)


def test_without_rows_the_figure_is_empty():
    table = pd.DataFrame(columns=["cue", "target", "value", "low", "high", "n"]).assign(noisy=False)
    figure = intervals(table, rows="cue", panels="target", title="Cues")
    assert not any(axes.axison for axes in figure.axes) and "Cues" in figure.get_suptitle()
