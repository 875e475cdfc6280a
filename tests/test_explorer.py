"""The explorer: what Python packs, against the maps, and what a browser shows of it."""

import base64
import html
import json
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import xattn
from xattn import store
from xattn.analysis.correlation import normalised_attention
from xattn.analysis.faithfulness import VERSION, masked_inputs, ranking, save_texts, sentence_maps
from xattn.explorer import Explorer, explore
from xattn.explorer_record import differences, quantised, stretches
from xattn.files import hash_value
from xattn.maps import on_steps, padding_share

ROOT = Path(__file__).parents[1]
TEXTS = [f"A bank {'should' if i < 6 else 'may'} receive poverty {i}." for i in range(1, 20)]
STANDARDISED = "Cross-attention (CA), standardised over tokens"
WEIGHTS = "Cross-attention (CA), weights"
MAGMA = matplotlib.colormaps["magma"](np.arange(256), bytes=True)[:, :3].astype(int)


@pytest.fixture(scope="module")
def utterance():
    return xattn.load_corpus(ROOT / "data", language="en", split="test")[0]


@pytest.fixture(scope="module")
def maps(utterance):
    """Maps of the base model from few masks, with superpixels."""
    model = xattn.load_model(ROOT / "data" / "models" / "base")
    occlusion = xattn.Occlusion(40, 40, partition="superpixels")
    return xattn.explain(model, utterance, occlusion=occlusion, progress=False).assign_attrs(key="these")


@pytest.fixture(scope="module")
def deletions(maps, tmp_path_factory):
    """Stored texts in steps of 5 % for SM^X, and the text without any cell."""
    folder = tmp_path_factory.mktemp("deletion")
    stem = folder / maps.model / maps.setting / maps.utterance
    names = {"maps": "these", "version": VERSION}
    save_texts(["Nothing."], Path(f"{stem}-blank.json"), hash_value(names, 16))
    key = hash_value(names | {"insertion": False, "step": 5}, 16)
    save_texts(TEXTS, Path(f"{stem}-deletion-SM^X.json"), key)
    return folder


@pytest.fixture(scope="module")
def explorer(maps, utterance, deletions):
    return explore(maps, utterance, deletions=deletions)


def index_of(document):
    return json.loads(re.search(r'id="index">(.*?)</script>', document, re.S)[1])


def unpacked(document, name):
    """The header of a chunk, with arrays in the place of what stands for them."""
    packed = base64.b64decode(re.search(rf'id="{name}">(.*?)</script>', document)[1])
    content = zlib.decompress(packed, -15)
    begin = 4 + int.from_bytes(content[:4], "little")

    def array(item):
        if not {"at", "type", "shape"} <= set(item):
            return item
        values = np.frombuffer(content, item["type"], int(np.prod(item["shape"])), begin + item["at"])
        return values.reshape(item["shape"])

    return json.loads(content[4:begin], object_hook=array)


def record_of(document, utterance=0, record=0):
    entry = index_of(document)["utterances"][utterance]["records"][record]
    return unpacked(document, entry["chunk"])


def dequantised(levels, scale):
    low, high, steps = (scale[name][..., None].astype(float) for name in ("low", "high", "steps"))
    return low + levels / steps * (high - low)


# What Python packs


@settings(max_examples=200, deadline=None)
@given(
    arrays(float, (3, 7), elements=st.floats(-1e6, 1e6, width=32).filter(lambda x: x == 0 or abs(x) > 1e-6)),
    st.sampled_from([32, 128]),
)
def test_quantised_values_are_within_a_255th_of_the_range(values, least):
    levels, scale = quantised(values, least)
    rounding = 1e-7 * np.abs(values).max()  # of float32
    assert np.abs(dequantised(levels, scale) - values).max() <= np.ptp(values) / 255 + rounding
    assert (levels <= scale["steps"][:, None]).all() and (scale["steps"] >= least).all()


def test_a_row_with_a_small_range_keeps_its_colours():
    rows = np.stack([np.linspace(0, 1000, 200), np.linspace(0, 1, 200)])
    levels, scale = quantised(rows, 32)
    assert scale["steps"].tolist() == [128, 32]
    assert len(np.unique(levels[1])) == 33


def shortest(row, starts, ends):
    """`stretches` of one row by trying all pairs of columns."""
    above = np.maximum(row - row.mean(), 0)
    pairs = [(i, j) for i in range(len(row)) for j in range(i, len(row)) if ends[j] - starts[i] >= 0.2 - 1e-9]
    enough = [(i, j) for i, j in pairs if above[i : j + 1].sum() >= above.sum() / 2 - 1e-9]
    return min(enough, key=lambda pair: (round(ends[pair[1]] - starts[pair[0]], 6), pair[0]))


def test_a_stretch_is_the_shortest_with_half_of_the_row():
    rng, starts = np.random.default_rng(0), 0.04 * np.arange(30)
    ends, lengths = starts + 0.04, []
    for row in rng.exponential(size=(40, 30)) ** 4:
        (found,) = stretches(row[None], starts, ends)
        assert tuple(found) == shortest(row, starts, ends)
        lengths.append(found[1] - found[0])
    assert min(lengths) < 6 < max(lengths)  # some are held at 0.2 s, others are not


def test_a_constant_row_has_the_stretch_of_all_columns():
    edges = 0.04 * np.arange(31)
    assert stretches(np.full((1, 30), 0.1), edges[:-1], edges[1:]).tolist() == [[0, 29]]
    assert stretches(np.eye(3), edges[:3], edges[1:4]).tolist() == [[0, 2]] * 3  # shorter than 0.2 s


@pytest.mark.parametrize(
    "before, after, expected",
    [
        ("The Council should", "A council should", [("-", "The"), ("+", "A"), ("", "council"), ("", "should")]),
        ("a b", "a x b", [("", "a"), ("+", "x"), ("", "b")]),
        ("a b c", "a C.", [("", "a"), ("-", "b"), ("", "C.")]),
        ("", "a", [("+", "a")]),
        ("twenty – dogs", "20 – dogs", [("", "20"), ("", "–"), ("", "dogs")]),
    ],
)
def test_differences_are_words_that_the_wer_counts(before, after, expected):
    assert differences(before.split(), after.split(), "en") == expected


def test_the_page_holds_the_maps(maps, explorer):
    record = record_of(explorer.page())
    assert record["tokens"] == maps.token.values.tolist()
    standardised, attention, cells, states = record["attributions"]
    assert [each["name"] for each in record["attributions"]] == [
        "standardised_attention",
        "cross_attention",
        "input_saliency",
        "encoder_saliency",
    ]
    ca = maps.cross_attention
    for expected, found in (
        (ca.values, dequantised(attention["values"], attention)[:-1, :-1]),
        (ca.mean("head").values, dequantised(attention["values"], attention)[:-1, -1]),
        (ca.mean("layer").values, dequantised(attention["values"], attention)[-1, :-1]),
        (ca.mean(["layer", "head"]).values, dequantised(attention["values"], attention)[-1, -1]),
        (on_steps(maps.input_saliency, maps).values, dequantised(cells["values"], cells)[0, 0]),
        (maps.encoder_saliency.values, dequantised(states["values"], states)[0, 0]),
    ):
        allowed = np.ptp(ca.values if expected.shape[-2:] == ca.shape[-2:] and expected.max() <= 1 else expected)
        assert np.abs(found - expected).max() <= allowed / 255 + 1e-4
    stored = cells["cells"]
    numbers = unpacked(explorer.page(), stored["which"])["numbers"]
    found = dequantised(stored["values"], stored)[:, numbers]
    saliency = maps.input_saliency.values
    assert np.abs(found - saliency).max() <= np.ptp(saliency) / 255 + 1e-4
    features = unpacked(explorer.page(), record["features"])
    found = features["low"] + features["values"] / 128 * (features["high"] - features["low"])
    assert np.abs(found - maps.features.values).max() <= np.ptp(maps.features.values) / 255


def test_standardised_attention_is_that_of_the_heatmaps(maps, explorer):
    found = record_of(explorer.page())["attributions"][0]
    *spoken, last = dequantised(found["values"], found)[0, 0]
    expected = normalised_attention(maps.cross_attention.mean("head").mean("layer")).values
    assert maps.token.values[-1] == "</s>" and np.ptp(last) == 0
    assert np.abs(np.array(spoken) - expected).max() <= np.ptp(expected) / 255 + 1e-6
    rho = xattn.correlate(maps.cross_attention, maps.input_saliency).overall
    assert found["rho"].shape == (1, 1) and found["rho"][0, 0] == pytest.approx(float(rho), rel=1e-6)


def test_maps_of_one_token_are_not_standardised(made):
    found = record_of(explore(made.maps().isel(token=[1, 4])).page())["attributions"]
    assert [each["name"] for each in found] == ["cross_attention", "input_saliency", "encoder_saliency"]


def test_a_word_has_the_stretch_of_the_mean_of_its_tokens(made):
    maps = made.maps(tokens=("▁sh", "ould", ",", "▁–", "</s>"), frames=120)
    record = record_of(explore(maps).page())
    assert [word["content"] for word in record["words"]] == [[0, 1], [3], [4]]  # a lone dash counts for itself
    assert [word["stretch"] for word in record["words"]] == [5, 3, 4]  # after those of the five tokens, or its token's
    first, more = record["attributions"][1]["stretches"][1, 2, 5]
    mean = maps.cross_attention.values[1, 2, :2].mean(axis=0)
    assert (first, first + more) == shortest(mean, maps.step_start.values, maps.step_end.values)


def test_a_selected_layer_and_head_are_named_with_their_rho(opened, maps):
    page = opened(explore(maps.sel(layer=5, head=1)))
    rho = xattn.correlate(maps.cross_attention, maps.input_saliency).by_layer_and_head.sel(layer=5, head=1)
    shown = f"rho with SM^X of this utterance, as measured: {float(rho):.2f}".replace("-", "−")
    for title in (STANDARDISED, WEIGHTS):
        choose(page, title)
        assert page.inner_text("h2 >> nth=1") == f"{title}, layer 5, head 1: tokens against time"
        assert shown in page.inner_text(".caption")


def test_rho_on_the_page_is_that_of_correlate(maps, explorer):
    rho, found = xattn.correlate(maps.cross_attention, maps.input_saliency), record_of(explorer.page())
    found = found["attributions"][1]["rho"]
    assert found.shape == (7, 5)
    np.testing.assert_allclose(found[:-1, :-1], rho.by_layer_and_head, rtol=1e-6)
    np.testing.assert_allclose(found[:-1, -1], rho.by_layer, rtol=1e-6)
    np.testing.assert_allclose(found[-1, :-1], rho.by_head, rtol=1e-6)
    assert found[-1, -1] == pytest.approx(float(rho.overall), rel=1e-6)


def test_captions_give_reliability_and_padding(made, maps, explorer):
    facts = [each["facts"] for each in record_of(explorer.page())["attributions"]]
    assert facts[1] == [] and facts[2][0].startswith(f"Reliability {maps.input_reliability:.2f}")
    noisy = made.maps().assign_attrs(input_reliability=0.1, encoder_reliability=np.nan, partition="windows")
    share = np.random.default_rng(1).random((2, 3, 5))
    noisy = noisy.assign(padding_attention=(("layer", "head", "token"), share))
    standardised, attention, cells, states = record_of(explore(noisy).page())["attributions"]
    assert standardised["padding"][0, 0] == pytest.approx(padding_share(noisy))
    assert cells["facts"][0] == "Reliability 0.10, mostly noise." and "windows" in cells["facts"][1]
    assert states["facts"] == ["Reliability unknown."]
    assert attention["padding"][-1, -1] == pytest.approx(padding_share(noisy))
    np.testing.assert_allclose(attention["padding"][:-1, :-1], share[:, :, :-1].mean(axis=-1), rtol=1e-6)


def test_deleted_cells_are_those_of_the_curve(maps, explorer):
    (curve,) = record_of(explorer.page())["deletions"]
    assert curve["kind"] == "SM^X" and curve["percent"] == [*range(0, 101, 5)]
    (sentence,) = sentence_maps(maps, ["SM^X"]).values()
    kept = masked_inputs(torch.ones(sentence.shape), ranking(sentence))
    for i in range(1, 21):
        np.testing.assert_array_equal(curve["rank"] <= i, kept[i].numpy() == 0)
    texts = [" ".join(word for sign, word in text if sign != "-") for text in curve["texts"]]
    assert texts == [maps.hypothesis, *TEXTS, "Nothing."]


def test_texts_of_other_maps_are_not_shown(maps, deletions):
    other = explore(maps.assign_attrs(key="others"), deletions=deletions)
    assert record_of(other.page())["deletions"] == []


def test_a_selection_has_no_deletions(maps, deletions):
    for part in (maps.isel(layer=[0]), maps.isel(token=slice(3)), maps.isel(time=slice(50))):
        record = record_of(explore(part, deletions=deletions).page())
        assert record["deletions"] == [] and "Stored deletions are not shown" in record["notes"][-1]


def test_further_variables_are_attributions(made):
    maps = made.maps()
    rng = np.random.default_rng(0)
    maps = maps.assign(
        gradients=-maps.input_saliency,
        attention_norm=maps.cross_attention * rng.random(maps.cross_attention.shape),
        loudness=(("token", "time"), rng.random((5, 22))),
        entropy=(("layer", "head", "token"), rng.random((2, 3, 5))),
    )
    found = {each["name"]: each for each in record_of(explore(maps).page())["attributions"]}
    assert [*found][4:] == ["gradients", "attention_norm", "loudness"]
    assert found["loudness"]["values"].shape == (1, 1, 5, 22)
    assert found["attention_norm"]["rho"].shape == (3, 4)
    assert found["gradients"]["low"].min() < 0


@pytest.mark.parametrize("windows", [False, True])
def test_cells_are_stored_only_if_bands_differ(made, windows):
    maps = made.maps()
    if windows:
        maps = maps.assign(input_saliency=maps.input_saliency.isel(mel=[0] * 8).drop_vars("mel"))
    assert (record_of(explore(maps).page())["attributions"][2]["cells"] is None) == windows


def test_a_page_of_one_utterance_is_small(explorer):
    assert 50_000 < len(explorer.page().encode()) < 400_000


def test_the_page_refers_to_nothing_outside(explorer):
    document = explorer.page()
    assert not re.search(r"""https?://|src=["']|href=|@import|\beval\(|import\(""", document)
    assert "default-src 'none'" in document


def test_maps_of_a_folder_share_features_and_sound(made, tmp_path, utterances):
    audio = utterances[0].audio()
    for model in ("first", "second"):
        for direction in ("en", "en-it"):
            maps = made.maps(utterance=utterances[0].id).assign_attrs(model=model, setting=direction)
            store.save(maps, store.path_of(tmp_path, model, direction, utterances[0].id), "key")
            store.save_index({utterances[0].id: "key"}, tmp_path, model, direction)
    document = explore(tmp_path, utterances).page()
    (entry,) = index_of(document)["utterances"]
    labels = [record["label"] for record in entry["records"]]
    assert labels == ["first, en", "first, en-it", "second, en", "second, en-it"]
    assert entry["sound"] and entry["message"] == "" and len(audio)
    assert len({record_of(document, 0, i)["features"] for i in range(4)}) == 1


def test_maps_of_one_condition_are_told_apart(made):
    (entry,) = index_of(explore([made.maps(), made.maps(1)]).page())["utterances"]
    assert [record["label"] for record in entry["records"]] == ["tiny, en", "tiny, en (2)"]


# Sound


def entry_of(maps, audio=None):
    return index_of(explore(maps, audio).page())["utterances"][0]


def test_sound_is_found_by_id_path_samples_and_recorded_path(maps, utterance, tmp_path):
    for audio in (utterance, [utterance], utterance.audio_path, utterance.audio()):
        if isinstance(audio, np.ndarray):
            audio = 16_000, audio
        assert entry_of(maps, audio)["sound"]
    assert entry_of(maps.assign_attrs(recording=str(utterance.audio_path)))["sound"]
    gone = entry_of(maps.assign_attrs(recording=str(tmp_path / "gone.wav")))
    assert gone["sound"] is None and "gone.wav is not there or has changed" in gone["message"]


def test_without_sound_the_page_says_so(maps, utterance):
    entry = entry_of(maps)
    assert entry["sound"] is None and entry["message"].startswith("There is no sound for this utterance")
    other = maps.assign_attrs(utterance="another")
    first, second = index_of(explore([maps, other], [utterance]).page())["utterances"]
    assert first["sound"] and first["message"] == ""
    assert second["sound"] is None and second["message"].endswith("because audio holds no utterance another.")
    with pytest.raises(
        ValueError, match=r"^audio holds no utterance another, nor any other that the maps explain: .*\.$"
    ):
        explore(other, [utterance])


def test_a_part_of_a_recording_keeps_its_times(made, tmp_path, utterances):
    maps = made.maps(frames=40)
    part = replace(utterances[1], id="made-1", manifest=None, start=0.05, end=0.5)
    shifted = maps.assign_coords(time=maps.time + 0.05, step=maps.step + 0.05)
    assert entry_of(shifted, part)["start"] == 0.05


def test_explain_records_the_path(model, utterances):
    maps = xattn.explain(model, utterances[0].audio_path, occlusion=xattn.Occlusion(20, 20), progress=False)
    assert maps.recording == str(utterances[0].audio_path)
    assert entry_of(maps)["sound"]


# Errors


def test_wrong_maps_are_refused_in_one_sentence(made, tmp_path):
    maps = made.maps()
    for wrong, kind, message in (
        ([], ValueError, "There are no maps to explore"),
        (tmp_path, ValueError, "holds no finished run of xattn.explain_corpus"),
        (tmp_path / "gone", FileNotFoundError, "is no folder"),
        (maps.drop_vars("cross_attention"), ValueError, "has no cross_attention, so it holds no maps"),
        (maps.drop_attrs(), ValueError, "has no model, setting, utterance"),
        (maps.cross_attention, TypeError, "maps is of type DataArray: "),
        ([maps.cross_attention], TypeError, "maps holds an object of type DataArray: "),
        (maps.isel(token=[]), ValueError, "have no token left"),
        (3, TypeError, "maps is of type int: "),
        (maps.isel(time=0), ValueError, "have lost their axis time"),
        (maps.isel(mel=3), ValueError, "The maps of made-1 have lost their axis mel"),
        (maps.isel(mel=[]), ValueError, "have no mel left"),
        (maps.isel(time=slice(None, None, -1)), ValueError, "The axis time of the maps of made-1 does not ascend"),
        (maps.isel(step=slice(None, None, -1)), ValueError, "The axis step of the maps of made-1 does not ascend"),
        (maps.assign(odd=maps.encoder_saliency * np.nan), ValueError, "odd of made-1 holds values that are not finite"),
    ):
        with pytest.raises(kind, match=re.escape(message)) as raised:
            explore(wrong)
        assert str(raised.value).endswith(".") and "\n" not in str(raised.value)


def test_a_folder_that_is_too_deep_names_the_one_to_give(made, tmp_path):
    folder = tmp_path / "maps"
    store.save(made.maps(), store.path_of(folder, "base", "en", "made-1"), "key")
    store.save_index({"made-1": "key"}, folder, "base", "en")
    assert len(index_of(explore(folder).page())["utterances"]) == 1
    for deep in (folder / "base", folder / "base" / "en"):
        with pytest.raises(
            ValueError, match=f"^{re.escape(str(deep))} holds only a part of the maps: give {re.escape(str(folder))}.$"
        ):
            explore(deep)


def test_a_folder_of_deletions_must_exist(made, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone is no folder: give the folder that deletion_curves wrote .*\.$"):
        explore(made.maps(), deletions=tmp_path / "gone")


def test_audio_of_another_utterance_is_refused(made, maps, utterance, utterances):
    other = replace(utterances[1], id=utterance.id)
    for audio in (other, [other], utterances[1].audio_path):
        with pytest.raises(ValueError, match="is not what the maps of en-test-0001 explain: give their recording"):
            explore(maps, audio)
    with pytest.raises(ValueError, match="audio is one recording, but the maps explain several utterances"):
        explore([made.maps(), made.maps(utterance="made-2")], utterances[1])
    with pytest.raises(ValueError, match="is not what the maps of made-1 explain"):
        explore(made.maps(frames=200), utterances[0])  # longer than the sound


# The notebook, files, the wheel


def test_a_notebook_gets_the_page_and_a_picture(explorer):
    bundle = explorer._repr_mimebundle_()
    page = html.unescape(re.search(r'srcdoc="(.*?)"', bundle["text/html"], re.S)[1])
    assert page == explorer.page() and bundle["text/html"] == explorer._repr_html_()
    assert base64.b64decode(bundle["image/png"]).startswith(b"\x89PNG") and bundle["text/plain"] == "Explorer()"


def test_saving_writes_the_page(explorer, tmp_path):
    explorer.save(str(tmp_path / "new" / "x.html"))
    assert (tmp_path / "new" / "x.html").read_text(encoding="utf-8") == explorer.page()
    with pytest.raises(OSError, match="could not be written, because it is a folder"):
        explorer.save(tmp_path / "new")


def test_the_module_is_part_of_a_wheel(tmp_path):
    shutil.copytree(ROOT / "xattn", tmp_path / "xattn", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    pip = [
        sys.executable,
        "-m",
        "pip",
        "-q",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(tmp_path),
    ]
    subprocess.run([*pip, str(tmp_path)], check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("xattn-*.whl"))) as wheel:
        assert wheel.read("xattn/explorer.js") == (ROOT / "xattn" / "explorer.js").read_bytes()


# The browser


@pytest.fixture
def opened(browser, tmp_path):
    """Opens explorers, or HTML, offline; in the end no page has written to the console or asked for anything."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True)
    context.set_default_timeout(10_000)  # milliseconds
    messages, requests = [], []
    context.on("console", lambda message: messages.append(message.text))
    context.on("weberror", lambda error: messages.append(str(error.error)))
    context.on("request", lambda request: requests.append(request.url))

    def open_page(explorer, width=1280):
        page = context.new_page()
        page.set_viewport_size({"width": width, "height": 900})
        file = tmp_path / f"page-{len(context.pages)}.html"
        file.write_text(explorer.page() if isinstance(explorer, Explorer) else explorer, encoding="utf-8")
        page.goto(file.as_uri())
        if isinstance(explorer, Explorer):
            page.wait_for_selector("main[data-ready]")
        return page

    yield open_page
    pages = [page.url for page in context.pages]
    context.close()
    assert messages == []
    assert pages and [url for url in requests if not url.startswith("blob:")] == pages


def colour(page, panel, share_x, share_y):
    """The colour (red, green, blue, alpha) of a panel's canvas at shares of its width and height."""
    script = """([panel, x, y]) => {
        const canvas = document.querySelector(`canvas[data-panel=${panel}]`);
        const place = [Math.floor(x * canvas.width), Math.floor(y * canvas.height)];
        const copy = new OffscreenCanvas(1, 1).getContext("2d");
        copy.drawImage(canvas, ...place, 1, 1, 0, 0, 1, 1);
        return [...copy.getImageData(0, 0, 1, 1).data];
    }"""
    return page.evaluate(script, [panel, share_x, share_y])


def selected(page, view=0):
    return page.locator(".view").nth(view).locator(".token[aria-pressed=true]").inner_text()


def choose(page, attribution, view=0):
    page.locator(".view").nth(view).get_by_label("Attribution").select_option(label=attribution)


def sound(page):
    return page.evaluate("[sound.dataset.from, sound.dataset.to, sound.currentTime, sound.paused].map(Number)")


def wait_until(page, condition):
    """Wait for a condition; Playwright's own waiting needs eval, which the page forbids."""
    for _ in range(200):
        if page.evaluate(condition):
            return
        page.wait_for_timeout(25)
    pytest.fail(f"{condition} did not come true.")


def shares(maps, rows, columns, panel_rows):
    """Where the middle of a cell lies on a panel."""
    start = float(maps.time[0]) - 0.005
    middle = float(maps.step[columns])
    return (middle - start) / (0.01 * maps.sizes["time"]), (rows + 0.5) / panel_rows


@pytest.mark.parametrize("title, name", [(WEIGHTS, "cross_attention"), ("Input saliency (SM^X)", "input")])
def test_cells_have_the_colours_of_their_values(opened, explorer, maps, title, name):
    page = opened(explorer)
    choose(page, title)
    values = maps.cross_attention.mean(["layer", "head"]) if name != "input" else on_steps(maps.input_saliency, maps)
    values, checked = values.values, set()
    for row in range(len(values)):
        for column in (1, int(values[row].argmax()), int(values[row].argmin()), 30):
            *rgb, alpha = colour(page, "attribution", *shares(maps, row, column, len(values)))
            share = (values[row, column] - values[row].min()) / np.ptp(values[row])
            nearest = np.abs(MAGMA - rgb).sum(axis=1).argmin()
            assert alpha == 255 and MAGMA[nearest].tolist() == rgb
            assert abs(nearest / 255 - share) <= 1 / 60, (row, column)  # half of one of 32 levels, and rounding
            checked.add(nearest)
    assert len(checked) > 5


def test_pointing_at_a_cell_reads_its_value(opened, explorer, maps):
    page = opened(explorer)
    choose(page, "Encoder saliency (SM^H)")
    values = maps.encoder_saliency.values
    row, column = np.unravel_index(values.argmax(), values.shape)
    canvas = page.locator("canvas[data-panel=attribution]")
    box, (x, y) = canvas.bounding_box(), shares(maps, row, column, len(values))
    canvas.hover(position={"x": x * box["width"], "y": y * box["height"]})
    time, token, value = re.match(r"([\d.]+) s, (.+), ([−\d.]+) √nat", page.inner_text(".readout")).groups()
    assert abs(float(time) - float(maps.step[column])) < 0.02 and token == maps.token.values[row]
    assert abs(float(value) - values.max()) <= np.ptp(values) / 255 + 0.005  # three digits are shown
    canvas = page.locator("canvas[data-panel=spectrogram]")
    canvas.hover(position={"x": 5, "y": 1})
    assert f", {maps.mel.values[-1]:,.0f} Hz, log-mel feature" in page.inner_text(".readout")


def test_a_click_on_a_token_plays_its_stretch(opened, explorer, maps):
    page = opened(explorer)
    choose(page, "Encoder saliency (SM^H)")
    page.locator(".token").nth(2).click()
    edges = maps.step_start.values, maps.step_end.values
    first, last = shortest(maps.encoder_saliency.values[2], *edges)
    begun = sound(page)
    assert begun[0] == pytest.approx(edges[0][first], abs=1e-6)
    assert begun[1] == pytest.approx(edges[1][last], abs=1e-6)
    wait_until(page, "sound.paused && sound.currentTime > 0")
    assert begun[1] - 0.02 < sound(page)[2] < begun[1] + 0.3  # it stops at the end, up to a frame of the screen
    assert selected(page) == maps.token.values[2]
    assert page.inner_text("[role=status]").startswith(f"Token 3 of {maps.sizes['token']}: {maps.token.values[2]}")


def test_a_word_highlights_what_it_plays(opened, explorer, maps):
    page = opened(explorer)
    word = next(word for word in record_of(explorer.page())["words"] if len(word["content"]) > 1)
    rows = word["content"]
    page.locator(".word").nth([*dict.fromkeys(maps.word.values)].index(word["text"])).click()
    mean = normalised_attention(maps.cross_attention.mean("head").mean("layer")).values[rows].mean(axis=0)
    first, last = shortest(mean, maps.step_start.values, maps.step_end.values)
    expected = float(maps.step_start[first]), float(maps.step_end[last])
    assert sound(page)[:2] == pytest.approx(expected, abs=1e-6)
    box = page.locator(".rows .stretch").evaluate("({ style }) => [style.left, style.width, style.top, style.height]")
    left, width, top, height = (float(each.removesuffix("%")) / 100 for each in box)
    start, length = float(maps.time[0]) - 0.005, 0.01 * maps.sizes["time"]
    assert (left * length + start, width * length) == pytest.approx((expected[0], expected[1] - expected[0]), abs=1e-3)
    tokens = maps.sizes["token"]
    assert (top * tokens, height * tokens) == pytest.approx((rows[0], len(rows)), abs=1e-3)


def test_enter_plays_after_a_click_on_a_row(opened, explorer, maps):
    page, tokens = opened(explorer), maps.sizes["token"]
    canvas = page.locator("canvas[data-panel=attribution]")
    canvas.click(position={"x": 50, "y": 2.5 * canvas.bounding_box()["height"] / tokens})
    assert selected(page) == maps.token.values[2]
    page.evaluate("sound.dataset.from = ''")
    page.keyboard.press("Enter")
    first, _ = shortest(
        normalised_attention(maps.cross_attention.mean("head").mean("layer")).values[2],
        maps.step_start.values,
        maps.step_end.values,
    )
    assert float(page.get_attribute("#sound", "data-from")) == pytest.approx(float(maps.step_start[first]), abs=1e-6)


def test_arrows_move_between_tokens_after_a_choice(opened, explorer, maps):
    page = opened(explorer)
    page.get_by_label("Attribution").focus()
    choose(page, WEIGHTS)
    page.keyboard.press("ArrowRight")
    assert selected(page) == maps.token.values[1]
    assert page.get_by_label("Attribution").input_value() == "1"


def test_a_drag_can_end_outside_the_panel(opened, explorer, maps):
    page = opened(explorer)
    box = page.locator("canvas[data-panel=spectrogram]").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] + 15, box["y"] + box["height"] + 200, steps=5)
    page.mouse.up()
    label = page.get_attribute("canvas[data-panel=spectrogram]", "aria-label")
    start, end = map(float, re.search(r"from ([\d.]+) s to ([\d.]+) s", label).groups())
    first, length = float(maps.time[0]) - 0.005, 0.01 * maps.sizes["time"]
    assert start == pytest.approx(first + length / 2, abs=0.02) and end == pytest.approx(first + length, abs=0.02)


def test_keys_move_zoom_and_play(opened, explorer, maps):
    page, tokens = opened(explorer), maps.token.values.tolist()
    press = page.keyboard.press
    for key, token in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1), ("ArrowLeft", 0), ("ArrowLeft", 0)):
        press(key)
        assert selected(page) == tokens[token]
    for key, chosen in (
        ("ArrowDown", "1"),
        ("ArrowDown", "2"),
        ("ArrowDown", "3"),
        ("ArrowDown", "3"),
        ("ArrowUp", "2"),
    ):
        press(key)
        assert page.get_by_label("Attribution").input_value() == chosen
    shown = lambda: page.get_attribute("canvas[data-panel=spectrogram]", "aria-label")  # noqa: E731
    whole = shown()
    press("+")
    assert shown() != whole
    press("Home")
    assert shown() == whole
    press("Space")
    wait_until(page, "!sound.paused && sound.currentTime > 0.05")
    press("Space")
    assert sound(page)[3] == 1
    press("?")
    assert page.locator("dialog").is_visible()
    press("Escape")
    assert not page.locator("dialog").is_visible()
    press("Enter")  # on the token
    assert sound(page)[0] >= 0


def test_the_table_of_heads_is_there_from_the_start(opened, explorer):
    page = opened(explorer)
    heads = page.locator(".heads button")
    assert heads.count() == 7 * 5 and STANDARDISED in page.inner_text("h2 >> nth=1")
    assert page.locator(".heads [aria-pressed=true]").get_attribute("data-head") == "6 4"  # both averages
    heads.nth(5 * 3 + 1).click()
    assert page.inner_text("h2 >> nth=1").startswith(f"{WEIGHTS}, layer 4, head 2")
    assert page.locator(".heads [aria-pressed=true]").get_attribute("data-head") == "3 1"


def test_a_head_is_chosen_in_the_table(opened, explorer, maps):
    page = opened(explorer)
    choose(page, WEIGHTS)
    rho = xattn.correlate(maps.cross_attention, maps.input_saliency).by_layer_and_head.values
    heads = page.locator(".heads button")
    assert heads.count() == 7 * 5
    shown = [[heads.nth(5 * layer + head).inner_text() for head in range(4)] for layer in range(6)]
    expected = [
        [f"{value:.2f}".replace("0.", ".").replace("-.00", ".00").replace("-", "−") for value in row] for row in rho
    ]
    assert shown == expected
    heads.nth(5 * 3 + 1).click()
    assert "layer 4, head 2" in page.inner_text("h2 >> nth=1")
    assert f"rho with SM^X of this utterance, as measured: {rho[3, 1]:.2f}".replace("-", "−") in page.inner_text(
        ".caption"
    )
    values = maps.cross_attention.values[3, 1]
    row, column = np.unravel_index(values.argmax(), values.shape)
    place = shares(maps, row, column, len(values))
    assert colour(page, "attribution", *place)[:3] == MAGMA[255].tolist()
    page.keyboard.press("ArrowRight")
    assert "layer 4, head 3" in page.inner_text("h2 >> nth=1")
    page.keyboard.press("ArrowUp")
    assert "layer 3, head 3" in page.inner_text("h2 >> nth=1")


def test_two_views_share_utterance_time_and_token(opened, maps, utterance):
    page = opened(explore([maps, maps.assign_attrs(model="other")], utterance))
    page.get_by_text("Compare two").click()
    page.wait_for_selector(".view >> nth=1")
    second = page.locator(".view").nth(1)
    assert second.get_by_label("Attribution").input_value() == "2"  # SM^X
    assert (
        page.locator(".words:visible").count() == 1
        and page.locator("canvas[data-panel=spectrogram]:visible").count() == 1
    )
    second.get_by_label("Model and direction").select_option(label="other, en")
    choose(page, "Encoder saliency (SM^H)", view=1)
    second.locator(".token").nth(3).click()
    assert selected(page, 0) == selected(page, 1) == maps.token.values[3]
    assert page.locator(".words:visible").count() == 2
    boxes = [page.locator("canvas[data-panel=attribution]").nth(i).bounding_box() for i in range(2)]
    assert [boxes[0][side] for side in ("x", "width")] == [boxes[1][side] for side in ("x", "width")]
    page.keyboard.press("+")
    labels = {page.locator("canvas[data-panel=spectrogram]").nth(i).get_attribute("aria-label") for i in range(2)}
    assert len(labels) == 1
    page.get_by_text("Compare two").click()
    assert page.locator(".view").count() == 1


def test_the_slider_deletes_cells_and_shows_the_text(opened, explorer, maps):
    page = opened(explorer)
    assert page.locator(".written del, .written ins").count() == 0
    page.get_by_label("Share of the cells deleted").fill("8")
    assert page.inner_text(".deletion output") == "40 %"
    assert page.locator(".written del").all_inner_texts()
    written = page.evaluate("[...document.querySelectorAll('.written > ins')].map((node) => node.textContent)")
    assert "may" in written and TEXTS[7] == "A bank may receive poverty 8."
    (sentence,) = sentence_maps(maps, ["SM^X"]).values()
    kept = masked_inputs(torch.ones(sentence.shape), ranking(sentence))[8].numpy()
    frames, bands = kept.shape
    rng = np.random.default_rng(0)
    for frame, band in zip(rng.integers(0, frames, 60), rng.integers(0, bands, 60), strict=True):
        *_, alpha = colour(page, "spectrogram", (frame + 0.5) / frames, 1 - (band + 0.5) / bands)
        assert alpha == 255 * kept[frame, band]
    page.get_by_label("Share of the cells deleted").fill("0")
    assert colour(page, "spectrogram", 0.5, 0.5)[3] == 255


def test_words_that_differ_from_the_reference_have_a_sign(opened, maps):
    words = [word for word in dict.fromkeys(maps.word.values.tolist()) if word != "</s>"]
    page = opened(explore(maps.assign_attrs(reference=" ".join(["Other", *words[1:]]))))
    buttons = page.locator(".word")
    assert buttons.nth(0).get_attribute("aria-label") == f"{words[0]}, differs from the reference"
    assert page.locator(".word.differs").count() == 1
    sign = "(node) => getComputedStyle(node, '::before').content"
    assert "≠" in buttons.nth(0).evaluate(sign) and "≠" not in buttons.nth(1).evaluate(sign)
    assert page.locator(".reference .differs").all_inner_texts() == ["Other"]


def test_markup_in_texts_is_text(opened, made):
    evil = "</script><img src=x onerror=alert(1)>$chunks"
    maps = made.maps(tokens=(f"▁{evil}", "▁<!--", "▁<script>", "</s>"))
    hypothesis = f"{evil} <!-- <script>"
    maps = maps.assign_attrs(hypothesis=hypothesis, reference=hypothesis, model=evil, utterance=f"{evil}\u2028")
    page = opened(explore(maps))
    assert page.locator(".word").all_inner_texts() == [evil, "<!--", "<script>", "</s>"]
    assert page.locator("img").count() == 0
    assert evil in page.get_by_label("Model and direction").inner_text()


def test_without_sound_everything_else_works(opened, made):
    page = opened(explore(made.maps()))
    assert page.get_by_label("Play or pause the recording").is_disabled()
    assert "There is no sound for this utterance" in page.inner_text(".bar >> nth=0")
    page.locator(".token").nth(1).click()
    page.keyboard.press("Space")
    assert selected(page) == "▁dog"


SELECTIONS = {
    "tokens": lambda maps: maps.isel(token=[1, 2]),
    "one token": lambda maps: maps.isel(token=1),
    "one layer": lambda maps: maps.sel(layer=2),
    "heads": lambda maps: maps.isel(head=[0, 2]),
    "a stretch": lambda maps: maps.sel(time=slice(0.05, 0.15)),
    "no layers": lambda maps: maps.drop_vars("padding_attention", errors="ignore").mean("layer", keep_attrs=True),
    "no SM^X": lambda maps: maps.drop_vars(["input_saliency", "encoder_saliency"]),
    "no features": lambda maps: maps.drop_vars("features"),
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_selections_are_shown(opened, made, name):
    maps = made.scored().assign_attrs(hypothesis="the dog sleeps", reference="the dog sleeps")
    page = opened(explore(SELECTIONS[name](maps)))
    for attribution in page.get_by_label("Attribution").locator("option").all_inner_texts():
        if name != "no SM^X":  # with one attribution there is no choice
            choose(page, attribution)
        page.locator(".token").last.click()
        assert colour(page, "attribution", 0.5, 0.5)[3] == 255
    if name == "a stretch":
        assert "Spectrogram from 0.05 s to 0.15 s" in page.get_attribute("canvas[data-panel=spectrogram]", "aria-label")
    assert ("These tokens are not the whole hypothesis" in page.inner_text(".note")) == ("token" in name)


@pytest.mark.parametrize("width", [320, 500, 600])
def test_a_narrow_page_needs_no_horizontal_scrolling(opened, explorer, width):
    page = opened(explorer, width=width)
    for pressed in ("false", "true"):
        assert page.get_by_text("Compare two").get_attribute("aria-pressed") == pressed
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.get_by_text("Compare two").click()
    assert page.locator("canvas[data-panel=attribution]").nth(0).bounding_box()["width"] > 0.6 * width


def test_two_maps_fit_on_the_screen(opened, explorer, maps):
    page = opened(explorer, width=1200)
    choose(page, WEIGHTS)
    page.get_by_text("Compare two").click()
    page.wait_for_selector(".view >> nth=1")
    wait_until(page, "document.querySelectorAll('.view canvas[data-panel=attribution]')[1].clientHeight > 0")
    first, second = (page.locator("canvas[data-panel=attribution]").nth(i).bounding_box() for i in range(2))
    heads = page.locator(".heads:visible").first.bounding_box()
    assert first["height"] == second["height"] == 13 * maps.sizes["token"]
    assert 0 < second["y"] - first["y"] - first["height"] < 150  # only the axis, a readout, pickers and a title between
    assert second["y"] + second["height"] < min(900, heads["y"])
    background = "(node) => getComputedStyle(node).backgroundColor"
    assert page.get_by_text("Compare two").evaluate(background) != page.get_by_text(
        "Whole recording", exact=True
    ).evaluate(background)


def test_no_key_reaches_the_notebook(opened, explorer):
    host = "<script>keys = 0; addEventListener('keydown', () => keys++, true)</script>" + explorer._repr_html_()
    page = opened(f"<!DOCTYPE html><meta charset=utf-8>{host}")
    frame = page.frame_locator("iframe")
    frame.locator("main[data-ready]").wait_for()
    page.wait_for_function("!document.querySelector('img')")  # the page has removed the picture
    frame.get_by_label("Attribution").select_option(label=WEIGHTS)
    for target in (".heads button >> nth=1", "canvas[data-panel=attribution]", ".caption", ".token >> nth=1"):
        frame.locator(target).first.click()
        for key in ("a", "b", "d", "Enter", "ArrowRight", "ArrowDown", "Space", "Home", "Shift+ArrowLeft"):
            page.keyboard.press(key)
    assert page.evaluate("keys") == 0
    page.evaluate("document.body.tabIndex = 0; document.body.focus()")
    page.keyboard.press("a")
    assert page.evaluate("keys") == 1  # the host does hear keys outside the frame
