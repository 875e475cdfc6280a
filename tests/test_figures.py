import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from scipy.stats import zscore

from xattn.attention import MEAN
from xattn.corpus import Word
from xattn.figures import SATURATION, coverage, heads_and_layers, heatmaps, intervals, layer_lines, save, superpixels

WORDS = (Word("the", 0.0, 0.05), Word("dog", 0.05, 0.12), Word("sleeps", 0.12, 0.2))

SPECTROGRAM = np.random.default_rng(0).standard_normal((12, 8)).astype(np.float32)
BLOCKS = np.arange(12)[:, None] // 4 * 2 + np.arange(8) // 4  # 3 by 2 superpixels of 4 by 4 cells
HALVES = np.stack([np.tile(np.arange(8) // 4, (12, 1)), np.zeros((12, 8), dtype=int)])  # two of 12 by 4 cells, and one


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def correlations(seed=0):
    rng = np.random.default_rng(seed)
    labels = [(layer, head) for layer in (1, 2, 10, MEAN) for head in (1, 2, 3, MEAN)]
    rows = [(source, *label, rng.uniform(-0.1, 0.7)) for source in ("input", "encoder") for label in labels]
    table = pd.DataFrame(rows, columns=["source", "layer", "head", "rho"]).sample(frac=1, random_state=seed)
    return table.assign(low=table.rho - 0.1, high=table.rho + 0.1)


def long_table():
    """Two models of unequal depth, two settings of the second, and a quantity that one setting lacks."""
    rows = []
    for model, setting, layers in (("base", "en", 2), ("small", "en", 3), ("small", "en-it", 3)):
        rows += [(model, setting, "rho", layer, 0.1 * layer) for layer in range(1, layers + 1)]
        rows.append((model, setting, "rho", MEAN, 0.4))
        rows.append((model, setting, "BLEU" if "-" in setting else "WER", MEAN, 50.0))
    table = pd.DataFrame(rows, columns=["model", "setting", "quantity", "layer", "value"])
    return table.assign(low=table.value - 0.05, high=table.value + 0.05, n=16)


FIGURES = {
    "heatmaps": lambda made: heatmaps(made.maps(), WORDS),
    "heads_and_layers": lambda made: heads_and_layers(correlations(), "tiny, en"),
    "coverage": lambda made: coverage(),
    "superpixels": lambda made: superpixels(SPECTROGRAM, {"one": np.stack([BLOCKS, BLOCKS]), "two": HALVES}),
    "intervals": lambda made: intervals(long_table(), ["model", "setting"], "quantity", "made"),
    "layer_lines": lambda made: layer_lines(
        long_table().query("quantity == 'rho'").rename(columns={"value": "rho"}), "made"
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_files_are_written_alike_each_time(made, tmp_path, name):
    for stem in ("first", "second"):
        save(FIGURES[name](made), tmp_path / stem, formats=("png", "svg"))
    assert plt.get_fignums() == []
    for suffix, start in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        written = (tmp_path / f"first{suffix}").read_bytes()
        assert written.startswith(start) and len(written) > 5000
        assert written == (tmp_path / f"second{suffix}").read_bytes()
    assert len(plt.imread(tmp_path / "first.png")) > 300


def test_only_the_formats_asked_for_are_written(tmp_path):
    save(coverage(), tmp_path / "fig1")
    assert [path.name for path in tmp_path.iterdir()] == ["fig1.png"]


def panels(figure):
    """Axes of the spectrograms and of the maps, from left to right."""
    return figure.axes[:3], figure.axes[3:6]


def steps_of(maps):
    """SM^X of the spoken tokens as it is correlated: z-score of a token's map, then the maximum of each step."""
    saliency = maps.input_saliency.values[:-1]
    normalised = zscore(saliency.reshape(len(saliency), -1), axis=1, ddof=1).reshape(saliency.shape)
    return np.stack([normalised[:, 4 * step : 4 * step + 4].max(axis=(1, 2)) for step in range(6)], axis=1)


def test_panels_show_the_normalised_maps(made):
    maps = made.maps()
    spectrograms, maps_axes = panels(heatmaps(maps, WORDS))
    attention = maps.cross_attention.values[:, :, :-1].astype(np.float64).mean(axis=(0, 1))
    expected = (zscore(attention, axis=0, ddof=1), steps_of(maps), maps.encoder_saliency.values[:-1])
    for axes, values in zip(maps_axes, expected, strict=True):
        (image,) = axes.images
        # The rows of every panel are drawn in their own standard deviations.
        np.testing.assert_allclose(image.get_array(), zscore(values, axis=1, ddof=1), rtol=1e-4, atol=1e-5)
        assert image.get_clim() == (0, SATURATION)
        assert image.get_extent() == pytest.approx((0.0075, 0.2475, 3.5, -0.5))  # six steps of 40 ms
    for axes in spectrograms:
        (image,) = axes.images
        assert np.array_equal(image.get_array(), maps.features.values.T)
        assert image.get_extent() == pytest.approx((0.0075, 0.2275, 0, 8)) and image.origin == "lower"


def test_the_reduction_is_the_one_asked_for(made):
    maps = made.maps()
    shown = [panels(heatmaps(maps, reduction=how))[1][1].images[0].get_array() for how in ("2d_max", "2d_avg")]
    assert np.abs(shown[0] - shown[1]).max() > 0.1


def test_labels_are_the_tokens_and_the_words(made):
    figure = heatmaps(made.maps(), WORDS)
    spectrograms, maps_axes = panels(figure)
    assert [label.get_text() for label in maps_axes[0].get_yticklabels()] == ["▁the", "▁dog", "▁sleep", "s"]
    assert maps_axes[0].get_yticks().tolist() == [0, 1, 2, 3]
    assert [axes.get_title() for axes in spectrograms] == [
        "Cross-attention, CA",
        "Input saliency, SM$^X$",
        "Encoder saliency, SM$^H$",
    ]
    for axes in spectrograms:
        assert [(text.get_text(), text.get_position()[0]) for text in axes.texts] == [
            ("the", pytest.approx(0.025)),
            ("dog", pytest.approx(0.085)),
            ("sleeps", pytest.approx(0.16)),
        ]
    for axes in (*spectrograms, *maps_axes):
        assert [line.get_xdata()[0] for line in axes.lines] == [0.0, 0.05, 0.12, 0.2]
    assert not panels(heatmaps(made.maps()))[0][0].texts


def test_what_maps_of_other_tools_lack_is_left_out(made):
    maps = made.maps()
    whole, bare = heatmaps(maps), heatmaps(maps.drop_vars(["features", "encoder_saliency"]), WORDS)
    *axes, bar = bare.axes
    assert [axis.get_title() for axis in axes] == ["Cross-attention, CA", "Input saliency, SM$^X$"]
    for axis, expected in zip(axes, panels(whole)[1], strict=False):
        np.testing.assert_array_equal(axis.images[0].get_array(), expected.images[0].get_array())
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["▁the", "▁dog", "▁sleep", "s"]
    table = correlations().query("source == 'input'")
    assert [axis.get_title() for axis in heads_and_layers(table, "tiny").axes if axis.get_title()] == [
        "$\\rho$(CA, SM$^X$)"
    ]


def test_numbers_of_a_table_are_where_they_belong():
    table = correlations()
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
    table = correlations()
    colours = [axes.collections[0].get_clim() for axes in figure.axes[:2]]
    assert colours[0] == colours[1] == (min(0, table.rho.min()), table.rho.max())


def test_intervals_are_drawn_where_they_belong():
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


def test_layers_of_models_of_unequal_depth():
    figure = layer_lines(long_table().query("quantity == 'rho'").rename(columns={"value": "rho"}), "made")
    assert [axes.get_title() for axes in figure.axes] == ["base", "small"]
    assert [label.get_text() for label in figure.axes[1].get_xticklabels()] == ["1", "2", "3", "mean"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["en", "en-it"]
    np.testing.assert_allclose(figure.axes[0].lines[0].get_xydata(), [[1, 0.1], [2, 0.2]])


def test_lines_are_drawn_where_superpixels_meet():
    figure = superpixels(SPECTROGRAM, {"one": np.stack([BLOCKS, BLOCKS]), "two": HALVES})
    assert [axes.get_title() for axes in figure.axes] == [
        "one, granularity 1: 6 in view",
        "one, granularity 2: 6 in view",
        "two, granularity 1: 2 in view",
        "two, granularity 2: 1 in view",
    ]
    upright, flat = (lines.get_segments() for lines in figure.axes[0].collections)
    assert sorted({segment[0, 0] for segment in upright}) == [3.5, 7.5] and len(upright) == 2 * 8
    assert {segment[0, 1] for segment in flat} == {3.5} and len(flat) == 12
    upright, flat = (lines.get_segments() for lines in figure.axes[2].collections)
    assert len(upright) == 0 and sorted(segment[0, 0] for segment in flat) == [time - 0.5 for time in range(12)]
    assert all(len(lines.get_segments()) == 0 for lines in figure.axes[3].collections)
    (image,) = figure.axes[3].images
    assert np.array_equal(image.get_array(), SPECTROGRAM.T) and image.origin == "lower"


def test_a_panel_alone_is_as_wide_as_its_title():
    table = long_table().query("layer == 'mean' and quantity == 'rho'")
    figure = intervals(table, ["model", "setting"], "quantity", "Reductions of a long name (mean estimator) to steps")
    figure.canvas.draw()
    assert len(figure.axes) == 1
    title = figure._suptitle.get_window_extent()
    assert title.x0 >= 0 and title.x1 <= figure.bbox.width
