"""Pictures of tables: every number is drawn where the table says."""

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from reproduction.figures import convergence, coverage, deletion, heads_and_layers, intervals, layer_lines
from reproduction.tables import MEAN
from xattn.figures import save


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def layers_and_heads(seed=0):
    """A long table of rho for four layers, three heads and their averages, in random order."""
    rng = np.random.default_rng(seed)
    labels = [(layer, head) for layer in (1, 2, 10, MEAN) for head in (1, 2, 3, MEAN)]
    rows = [(source, *label, rng.uniform(-0.1, 0.7)) for source in ("input", "encoder") for label in labels]
    table = pd.DataFrame(rows, columns=["source", "layer", "head", "rho"]).sample(frac=1, random_state=seed)
    return table.assign(low=table.rho - 0.1, high=table.rho + 0.1)


def long_table():
    """Two models of unequal depth, two directions of the second one, and a metric for each task."""
    rows = []
    for model, setting, layers in (("base", "en", 2), ("small", "en", 3), ("small", "en-it", 3)):
        rows += [(model, setting, "rho", layer, 0.1 * layer) for layer in range(1, layers + 1)]
        rows.append((model, setting, "rho", MEAN, 0.4))
        rows.append((model, setting, "BLEU" if "-" in setting else "WER", MEAN, 50.0))
    table = pd.DataFrame(rows, columns=["model", "setting", "quantity", "layer", "value"])
    return table.assign(low=table.value - 0.05, high=table.value + 0.05, n=16)


def rho_of_layers():
    return long_table().query("quantity == 'rho'").rename(columns={"value": "rho"})


def agreement():
    """r and bias of two estimators at two numbers of perturbations, for two kinds of saliency."""
    rows = [
        ("tiny/en", source, estimator, number, quantity, number / 100 - 0.01 * (estimator == "ridge"))
        for source in ("input", "encoder")
        for estimator in ("mean", "ridge")
        for number in (40, 20)
        for quantity in ("r", "bias")
    ]
    table = pd.DataFrame(rows, columns=["pair", "source", "estimator", "perturbations", "quantity", "value"])
    return table.assign(low=table.value - 0.02, high=table.value + 0.02)


def curves():
    """The points and the summary of deletion with two maps."""
    points = pd.DataFrame(
        [
            (name, percent, slope * percent)
            for name, slope in (("CA", 0.5), ("SM^X 2d_max", 0.9))
            for percent in (0, 50)
        ],
        columns=["map", "percent", "score"],
    )
    summary = pd.DataFrame({"map": ["CA", "SM^X 2d_max"], "metric": "corpus-capped WER", "area": [25.0, 45.0]})
    return points, summary.assign(low=summary.area - 1, high=summary.area + 2)


FIGURES = {
    "heads_and_layers": lambda: heads_and_layers(layers_and_heads(), "tiny, en"),
    "coverage": coverage,
    "intervals": lambda: intervals(long_table(), ["model", "setting"], "quantity", "made"),
    "layer_lines": lambda: layer_lines(rho_of_layers(), "made"),
    "convergence": lambda: convergence(agreement(), "made"),
    "deletion": lambda: deletion(*curves(), "made"),
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


def test_cells_of_a_table_hold_its_numbers():
    table = layers_and_heads()
    figure = heads_and_layers(table, "tiny, en")
    assert figure.get_suptitle() == "tiny, en"
    rho = table.set_index(["source", "layer", "head"]).rho
    for axes, source in zip(figure.axes[:2], ("input", "encoder"), strict=True):
        rows = [label.get_text() for label in figure.axes[0].get_yticklabels()]
        columns = [label.get_text() for label in axes.get_xticklabels()]
        assert (rows, columns) == (["1", "2", "10", "mean"], ["1", "2", "3", "mean"])
        assert len(axes.texts) == 16
        for text in axes.texts:
            x, y = (int(place) for place in text.get_position())
            label = tuple(int(name) if name != MEAN else name for name in (rows[y], columns[x]))
            value = rho[(source, *label)]
            assert text.get_text() == f"{value:z.2f}\n{value - 0.1:z.2f} to {value + 0.1:z.2f}"
    assert "X" in figure.axes[0].get_title() and "H" in figure.axes[1].get_title()
    table.loc[table.index[0], "rho"] = np.nan
    assert sum(len(axes.texts) for axes in heads_and_layers(table, "tiny, en").axes[:2]) == 31
    table = layers_and_heads()
    colours = [axes.collections[0].get_clim() for axes in figure.axes[:2]]
    assert colours[0] == colours[1] == (min(0, table.rho.min()), table.rho.max())


def test_panels_of_intervals_hold_their_quantities():
    table = long_table().query("layer == 'mean'")
    figure = intervals(table, ["model", "setting"], "quantity", "made", {"rho": "correlation"})
    assert figure.get_suptitle() == "made (n utterances; bars: 95 % intervals)"
    used = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in used] == ["correlation", "WER", "BLEU"]
    assert {axes.get_xlabel() for axes in used} == {"n = 16"}
    labels = [[label.get_text() for label in axes.get_yticklabels()] for axes in used]
    assert labels == [["base en", "small en", "small en-it"], ["base en", "small en"], ["small en-it"]]
    for axes, value in zip(used, (0.4, 50.0, 50.0), strict=True):
        assert axes.lines[0].get_xdata().tolist() == [value] * len(axes.get_yticklabels())
        np.testing.assert_allclose(axes.collections[0].get_segments()[0][:, 0], [value - 0.05, value + 0.05])
        assert {text.get_text() for text in axes.texts} == {"0.400" if value < 1 else "50.0"}


def test_models_can_have_unequal_depths():
    figure = layer_lines(long_table().query("quantity == 'rho'").rename(columns={"value": "rho"}), "made")
    assert [axes.get_title() for axes in figure.axes] == ["base", "small"]
    assert [label.get_text() for label in figure.axes[1].get_xticklabels()] == ["1", "2", "3", "mean"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["en", "en-it"]
    np.testing.assert_allclose(figure.axes[0].lines[0].get_xydata(), [[1, 0.1], [2, 0.2]])


def test_a_table_without_encoder_saliency_has_one_panel():
    table = layers_and_heads().query("source == 'input'")
    assert [axis.get_title() for axis in heads_and_layers(table, "tiny").axes if axis.get_title()] == [
        "$\\rho$(CA, SM$^X$)"
    ]


def test_agreement_is_drawn_against_the_number_of_perturbations():
    figure = convergence(agreement(), "made")
    assert [axes.get_title() for axes in figure.axes] == ["tiny/en, SM$^X$", "tiny/en, SM$^H$", "", ""]
    assert [axes.get_ylabel() for axes in figure.axes] == ["r with the reference", "", "bias of $\\rho$", ""]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["mean", "ridge"]
    for axes in figure.axes:
        lines = [line.get_xydata().tolist() for line in axes.lines]
        assert lines == [[[20, pytest.approx(0.2 - shift)], [40, pytest.approx(0.4 - shift)]] for shift in (0, 0.01)]
        assert [label.get_text() for label in figure.axes[2].get_xticklabels()] == ["20", "40"]


def test_curves_of_deletion_are_labelled_with_their_areas():
    figure = deletion(*curves(), "made")
    (axes,) = figure.axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["SM$^X$ 2d max: 45.0 (44.0 to 47.0)", "CA: 25.0 (24.0 to 27.0)"]  # the largest area first
    assert [line.get_ydata().tolist() for line in axes.lines] == [[0.0, 45.0], [0.0, 25.0]]
    assert axes.get_ylabel() == "corpus-capped WER (%)" and axes.get_title() == "made"


def test_a_single_panel_is_as_wide_as_its_title():
    table = long_table().query("layer == 'mean' and quantity == 'rho'")
    figure = intervals(table, ["model", "setting"], "quantity", "Reductions with a long name (mean estimator) to steps")
    figure.canvas.draw()
    assert len(figure.axes) == 1
    title = figure._suptitle.get_window_extent()
    assert title.x0 >= 0 and title.x1 <= figure.bbox.width
