import io
import re
import tempfile
import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
from conftest import drawn, random_maps
from hypothesis import given, settings
from hypothesis import strategies as st
from IPython.core.interactiveshell import InteractiveShell
from scipy.stats import zscore

from xattn.data.utterance import Word
from xattn.figures import SATURATION, heatmaps, literal, save, superpixels

WORDS = (Word("the", 0.0, 0.05), Word("dog", 0.05, 0.12), Word("sleeps", 0.12, 0.2))

SPECTROGRAM = np.random.default_rng(0).standard_normal((12, 8)).astype(np.float32)
BLOCKS = np.arange(12)[:, None] // 4 * 2 + np.arange(8) // 4  # 3 by 2 superpixels of 4 by 4 cells
HALVES = np.stack([np.tile(np.arange(8) // 4, (12, 1)), np.zeros((12, 8), dtype=int)])  # two of 12 by 4 cells, and one


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


STARTS = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF", "jpg": b"\xff\xd8\xff"}
# Names, and how they are drawn.
NAMES = {name: name for name in ("$$", "$\\foo$", "$5_a$6", "\\$x\\", "_a_b^{c}%\\frac{", "мирمرحباé😀")}
NAMES |= {"日本$🚀$": "[U+65E5][U+672C]$[U+1F680]$", "a\nb\x07": "a[U+000A]b[U+0007]"}
FIGURES = {
    "heatmaps": lambda made: heatmaps(made.maps(), WORDS),
    "superpixels": lambda made: superpixels(SPECTROGRAM, {"one": np.stack([BLOCKS, BLOCKS]), "two": HALVES}),
}


@pytest.mark.parametrize("name", FIGURES)
def test_files_have_the_same_bytes_each_time(made, tmp_path, name):
    for stem in ("first", "second"):
        save(FIGURES[name](made), tmp_path / stem, formats=list(STARTS))
    assert plt.get_fignums() == []
    for suffix, start in STARTS.items():
        written = (tmp_path / f"first.{suffix}").read_bytes()
        assert written.startswith(start) and len(written) > 5000 and b"CreationDate" not in written
        assert written == (tmp_path / f"second.{suffix}").read_bytes()
    assert len(plt.imread(tmp_path / "first.png")) > 300


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("stem", "formats", "files"),
    [
        ("fig", (), ["fig.png"]),
        *((f"fig.{suffix}", (), [f"fig.{suffix}"]) for suffix in STARTS),
        ("fig.PNG", (), ["fig.PNG"]),
        ("v1.5", (), ["v1.5.png"]),
        ("Ba$$in.flac", ("svg", "jpg"), ["Ba$$in.flac.jpg", "Ba$$in.flac.svg"]),
        ("fig.png", ("pdf", "svg"), ["fig.pdf", "fig.svg"]),
    ],
)
def test_the_suffix_or_the_formats_decide_which_files_are_written(tmp_path, stem, formats, files):
    save(superpixels(SPECTROGRAM, {"one": HALVES}), tmp_path / "deep" / stem, formats)
    assert sorted(path.name for path in (tmp_path / "deep").iterdir()) == files
    for name in files:
        assert (tmp_path / "deep" / name).read_bytes().startswith(STARTS[name.rpartition(".")[2].lower()])


def test_an_unknown_format_raises_before_anything_is_written(tmp_path):
    figure = superpixels(SPECTROGRAM, {"one": HALVES})
    with pytest.raises(ValueError, match=r"^Figures cannot be saved in the format 'docx': choose one of .*pdf.*\.$"):
        save(figure, tmp_path / "fig", ("png", "docx"))
    assert not list(tmp_path.iterdir())


def test_a_transparent_figure_is_white_where_a_format_has_no_transparency(tmp_path):
    with matplotlib.rc_context({"savefig.transparent": True}):
        save(superpixels(SPECTROGRAM, {"one": HALVES}), tmp_path / "fig.jpg")
    assert (plt.imread(tmp_path / "fig.jpg")[:3, :3] > 250).all()


def panels(figure):
    """The axes of the spectrograms and those of the maps, from left to right."""
    return figure.axes[:3], figure.axes[3:6]


def steps_of(maps):
    """SM^X as it is correlated: z-scores of each token's map, then the maximum of each step."""
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
        # Every row is drawn in its own standard deviations.
        np.testing.assert_allclose(image.get_array(), zscore(values, axis=1, ddof=1), rtol=1e-4, atol=1e-5)
        assert image.get_clim() == (0, SATURATION)
        assert image.get_extent() == pytest.approx((0.0075, 0.2475, 3.5, -0.5))  # six steps of 40 ms
    for axes in spectrograms:
        (image,) = axes.images
        assert np.array_equal(image.get_array(), maps.features.values.T)
        assert image.get_extent() == pytest.approx((0.0075, 0.2275, 0, 8)) and image.origin == "lower"


def test_the_reduction_can_be_chosen(made):
    maps = made.maps()
    shown = [panels(heatmaps(maps, reduction=how))[1][1].images[0].get_array() for how in ("2d_max", "2d_avg")]
    assert np.abs(shown[0] - shown[1]).max() > 0.1


def test_tokens_and_words_are_the_labels(made):
    figure = heatmaps(made.maps(), WORDS)
    spectrograms, maps_axes = panels(figure)
    assert [label.get_text() for label in maps_axes[0].get_yticklabels()] == ["▁the", "▁dog", "▁sleep", "s"]
    assert maps_axes[0].get_yticks().tolist() == [0, 1, 2, 3]
    assert [axes.get_title() for axes in spectrograms] == [
        "Cross-attention, CA",
        "Input saliency, SM$^X$\nreliability 0.64",
        "Encoder saliency, SM$^H$\nreliability 0.81",
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


def test_maps_without_encoder_saliency_and_spectrogram_are_drawn(made):
    maps = made.maps()
    whole, bare = heatmaps(maps), heatmaps(maps.drop_vars(["features", "encoder_saliency"]), WORDS)
    *axes, bar = bare.axes
    assert [axis.get_title() for axis in axes] == ["Cross-attention, CA", "Input saliency, SM$^X$\nreliability 0.64"]
    for axis, expected in zip(axes, panels(whole)[1], strict=False):
        np.testing.assert_array_equal(axis.images[0].get_array(), expected.images[0].get_array())
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["▁the", "▁dog", "▁sleep", "s"]


@pytest.mark.parametrize(
    ("partition", "reliability", "title"),
    [
        ("superpixels", 0.456, "Input saliency, SM$^X$\nreliability 0.46"),
        ("superpixels", 0.3, "Input saliency, SM$^X$\nreliability 0.30"),
        ("windows", -0.1, "Input saliency, SM$^X$ of windows\nreliability -0.10, mostly noise"),
        ("windows", np.nan, "Input saliency, SM$^X$ of windows"),
    ],
)
def test_titles_show_the_reliability_and_whether_windows_were_hidden(made, partition, reliability, title):
    maps = made.maps().assign_attrs(partition=partition, input_reliability=reliability)
    found = [axes.get_title() for axes in panels(heatmaps(maps))[0]]
    assert found == ["Cross-attention, CA", title, "Encoder saliency, SM$^H$\nreliability 0.81"]
    bare = maps.drop_attrs(deep=False).assign_attrs(model="tiny", setting="en", utterance="made-1")
    assert [axes.get_title() for axes in panels(heatmaps(bare))[0]] == [
        "Cross-attention, CA",
        "Input saliency, SM$^X$",
        "Encoder saliency, SM$^H$",
    ]


def test_the_title_names_the_selection(made):
    maps = made.maps()
    for selected, title in (
        (maps, ""),
        (maps.sel(layer=2), ", layer 2"),
        (maps.isel(head=[0, 2]), ", heads 1, 3"),
        (maps.sel(layer=1, head=2), ", layer 1, head 2"),
        (maps.isel(time=slice(4, 12)), ", 0.05 to 0.13 s"),
        (maps.isel(token=[1, 2]), ""),
        (maps.sel(layer=[1, 2]), ""),
    ):
        assert heatmaps(selected).get_suptitle() == f"tiny, en, made-1{title}"


def test_selected_layers_and_heads_are_drawn(made):
    maps = made.maps()
    attention = maps.cross_attention.values[:, :, :-1].astype(np.float64)
    for selected, values in (
        (maps.sel(layer=2), attention[1].mean(axis=0)),
        (maps.sel(layer=2, head=[3]), attention[1, 2]),
        (maps.sel(head=1), attention[:, 0].mean(axis=0)),
    ):
        shown = panels(heatmaps(selected))[1][0].images[0].get_array()
        expected = zscore(zscore(values, axis=0, ddof=1), axis=1, ddof=1)
        np.testing.assert_allclose(shown, expected, rtol=1e-4, atol=1e-5)


def test_a_stretch_of_time_is_drawn(made):
    maps = made.maps()
    part = maps.isel(time=slice(6, 18))  # half of step 1, steps 2 and 3, half of step 4
    spectrograms, maps_axes = panels(heatmaps(part, WORDS))
    edges = 0.0075 + 0.06, 0.0075 + 0.18
    for axes in (*spectrograms, *maps_axes):
        assert axes.get_xlim() == pytest.approx(edges)
    assert spectrograms[0].images[0].get_extent() == pytest.approx((*edges, 0, 8))
    assert [text.get_text() for text in spectrograms[0].texts] == ["dog", "sleeps"]
    saliency = part.input_saliency.values[:-1]
    cells = zscore(saliency.reshape(4, -1), axis=1, ddof=1).reshape(saliency.shape)
    steps = [cells[:, max(0, 4 * step - 6) : 4 * step - 2].max(axis=(1, 2)) for step in range(1, 5)]
    image = maps_axes[1].images[0]
    np.testing.assert_allclose(image.get_array(), zscore(np.stack(steps, 1), axis=1, ddof=1), rtol=1e-6)
    assert image.get_extent() == pytest.approx((0.0475, 0.2075, 3.5, -0.5))


def test_a_single_token_is_drawn(made):
    maps = made.maps()
    for selected in (maps.isel(token=1), maps.isel(token=[1])):
        spectrograms, maps_axes = panels(heatmaps(selected))
        assert np.array_equal(spectrograms[0].images[0].get_array().squeeze(), maps.features.values.T)
        assert spectrograms[0].images[0].get_extent() == pytest.approx((0.0075, 0.2275, 0, 8))
        assert [label.get_text() for label in maps_axes[0].get_yticklabels()] == ["▁dog"]
        row = zscore(maps.encoder_saliency.values[1], ddof=1)
        np.testing.assert_allclose(maps_axes[2].images[0].get_array(), row[None], rtol=1e-6)


def test_lines_separate_superpixels():
    figure = superpixels(SPECTROGRAM, {"one": np.stack([BLOCKS, BLOCKS]), "two": HALVES})
    assert [axes.get_title() for axes in figure.axes] == [
        "one, level 1: 6 in view",
        "one, level 2: 6 in view",
        "two, level 1: 2 in view",
        "two, level 2: 1 in view",
    ]
    upright, flat = (lines.get_segments() for lines in figure.axes[0].collections)
    assert sorted({segment[0, 0] for segment in upright}) == [3.5, 7.5] and len(upright) == 2 * 8
    assert {segment[0, 1] for segment in flat} == {3.5} and len(flat) == 12
    upright, flat = (lines.get_segments() for lines in figure.axes[2].collections)
    assert len(upright) == 0 and sorted(segment[0, 0] for segment in flat) == [time - 0.5 for time in range(12)]
    assert all(len(lines.get_segments()) == 0 for lines in figure.axes[3].collections)
    (image,) = figure.axes[3].images
    assert np.array_equal(image.get_array(), SPECTROGRAM.T) and image.origin == "lower"


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", NAMES)
def test_names_are_drawn_as_they_are(made, tmp_path, name):
    maps = made.maps(tokens=(f"▁{name}", "dog", name, "</s>")).assign_attrs(utterance=name, model=f"{name}.en")
    found, shown = drawn(heatmaps(maps, [Word(name, 0.0, 0.1)]), tmp_path), NAMES[name]
    assert f"▁{shown}" in found and found.count(shown) == 4  # a token, and a word above three panels
    assert f"{shown}.en, en, {shown}" in found


def test_names_of_partitions_are_drawn_as_they_are(tmp_path):
    for name, shown in NAMES.items():
        assert f"{shown}, level 1: 2 in view" in drawn(superpixels(SPECTROGRAM, {name: HALVES[:1]}), tmp_path)


@pytest.mark.parametrize("own", [{"text.usetex": True}, {"text.parse_math": False}], ids=str)
def test_settings_of_the_user_do_not_change_how_names_are_read(made, tmp_path, own):
    with matplotlib.rc_context(own):
        found = drawn(heatmaps(made.maps().assign_attrs(utterance="_a_$5_a$6")), tmp_path)
    assert "tiny, en, _a_$5_a$6" in found and "Input saliency, SMX" in found


@pytest.mark.filterwarnings("error")
def test_long_names_are_drawn_in_full(made, tmp_path):
    maps = made.maps(tokens=("▁a", "日" * 16, "</s>")).assign_attrs(utterance="x" * 250)
    found = drawn(heatmaps(maps, [Word("日" * 8, 0.0, 0.1)]), tmp_path)
    assert "[U+65E5]" * 16 in found and "[U+65E5]" * 8 in found and f"tiny, en, {'x' * 250}" in found


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(), min_size=1))
def test_no_character_of_any_text_is_lost(text):
    figure = plt.figure()
    figure.text(0, 0, literal(text))
    figure.text(0, 0, f"SM$^X$ {literal(text)}")
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("error")
        found, _ = drawn(figure, Path(folder))
    assert re.sub(r"\[U\+([0-9A-F]+)\]", lambda code: chr(int(code[1], 16)), found) == text


@settings(max_examples=8, deadline=None)
@given(*[st.text(st.characters(), max_size=8)] * 4)
def test_any_text_can_be_a_name(token, word, utterance, model):
    maps = random_maps(tokens=("▁the", token, f"▁{token}", word, "</s>"))
    figure = heatmaps(maps.assign_attrs(utterance=utterance, model=model), [Word(word, 0.0, 0.1)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.canvas.draw()
    plt.close(figure)


def test_notebooks_show_a_figure_that_is_the_value_of_a_cell(made, tmp_path):
    maps = made.maps(tokens=("▁a", "▁b", "</s>"))
    save(heatmaps(maps), tmp_path / "saved")
    shell = InteractiveShell.instance()
    shell.display_formatter.active_types = ["text/plain", "image/png"]
    data, _ = shell.display_formatter.format(heatmaps(maps))
    shown = plt.imread(io.BytesIO(data["image/png"]))
    np.testing.assert_array_equal(shown, plt.imread(tmp_path / "saved.png"))
    InteractiveShell.clear_instance()


def test_attention_that_is_averaged_already_is_drawn_the_same(made):
    maps = made.maps()
    averaged = maps.assign(cross_attention=maps.cross_attention.mean(["layer", "head"])).drop_vars(["layer", "head"])
    first, second = (plt.imread(io.BytesIO(heatmaps(each)._repr_png_())) for each in (maps, averaged))
    np.testing.assert_array_equal(first, second)
