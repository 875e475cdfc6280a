"""Explanation files of SPES, written by h5py alone or by the reference, and released maps that contain them."""

import json
import os
import re
import shutil
import tempfile
from contextlib import chdir
from pathlib import Path

import h5py
import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import xarray as xr
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from reproduction.pipeline import check_parameters, plan, steps_of
from reproduction.profiles import load_profile
from xattn import released, store
from xattn.analysis.correlation import correlate_all
from xattn.analysis.faithfulness import sizes
from xattn.analysis.reliability import converged, too_noisy
from xattn.explain import Occlusion, explain_directions

ROOT = Path(__file__).parents[1]
GOLDEN = Path(os.environ.get("XATTN_GOLDEN") or Path(__file__).parent / "golden")
MAPS = ["cross_attention", "encoder_saliency", "input_saliency"]
TOKENS = ["▁the", "▁dog", "s", "▁sing", "</s>"]  # of the utterances below, one for each row


def spes(path: Path, utterances: dict[str, dict]) -> None:
    """Write a file as SPES does."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, held in utterances.items():
            for key, values in held.items():
                text = key.endswith("text")
                file.create_dataset(f"{name}/{key}", data=values, dtype=h5py.string_dtype() if text else None)


def explanation(seed=0, tokens=TOKENS, cells=(22, 8), **changes) -> dict:
    rng = np.random.default_rng(seed)
    inputs = ["</s>", *tokens[:-1]]
    return {
        "fbank_heatmap": rng.exponential(size=(len(tokens), *cells)).astype(np.float32),
        "tgt_embed_heatmap": np.zeros((len(tokens), len(tokens), 1), dtype=np.float32),
        "tgt_text": inputs,
        "n_masks": np.int64(19998),
    } | changes


def attention(seed=0, rows=5, steps=6) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.ones(steps), (2, 3, rows)).astype(np.float32)


def release(folder: Path, names=("0", "2", "10"), **changes) -> Path:
    """Write released maps; `changes` replace what a file holds for some utterances, and None removes an utterance."""
    files = {
        "input_saliency": {name: explanation(int(name)) for name in names},
        "encoder_saliency": {name: explanation(100 + int(name), cells=(6, 1)) for name in names},
        "cross_attention": {name: attention(int(name)) for name in names},
    }
    for file, held in files.items():
        held |= changes.get(file, {})
        held = {name: each for name, each in held.items() if each is not None}
        if file == "cross_attention":
            with h5py.File(folder / f"{file}.h5", "w") as opened:
                for name, each in held.items():
                    opened[name] = each
        else:
            spes(folder / f"{file}.h5", held)
    return folder


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "released" / "base" / "en"


def contents(path: Path) -> dict:
    """Every array and text of a file, with its type."""
    found = {}
    with h5py.File(path) as file:
        file.visititems(lambda name, each: found.update({name: each}) if isinstance(each, h5py.Dataset) else None)
        return {name: (each.dtype, each.shape, each[()]) for name, each in found.items()}


def assert_same_contents(first: Path, second: Path) -> None:
    expected, actual = contents(first), contents(second)
    assert list(expected) == list(actual) and len(expected) > 0
    for name, (dtype, shape, values) in expected.items():
        assert actual[name][:2] == (dtype, shape), name
        np.testing.assert_array_equal(actual[name][2], values, err_msg=name)


def test_a_file_of_the_reference_is_unchanged_after_reading_and_writing(tmp_path):
    path = GOLDEN / "G8_explanations.h5"
    with np.load(path.with_suffix(".npz"), allow_pickle=False) as file:
        golden = dict(file)
    read = list(released.read_explanations(path))
    assert [maps.utterance for maps in read] == [str(number) for number in golden["ids"]] and len(read) >= 3
    for maps in read:
        name = maps.utterance
        assert maps.token.values.tolist() == golden[f"{name}_target_tokens"].tolist()
        assert maps.input_saliency.dtype == np.float32 and maps.input_saliency.dims == ("token", "time", "mel")
        np.testing.assert_array_equal(maps.input_saliency, golden[f"{name}_fbank_heatmap"])
        np.testing.assert_array_equal(maps.previous_saliency, golden[f"{name}_tgt_embed_heatmap"][..., 0])
        assert maps.input_masks == golden[f"{name}_n_masks"]
        assert maps.source_text == golden[f"{name}_src_text"]
    released.write_explanations(read, tmp_path / "again.h5")
    assert_same_contents(path, tmp_path / "again.h5")


def test_rows_have_the_token_that_they_explain(tmp_path):
    held = explanation(tokens=["▁il", "▁caff", "è", "</s>"])
    assert held["tgt_text"] == ["</s>", "▁il", "▁caff", "è"]
    spes(tmp_path / "maps.h5", {"7": held | {"src_text": "the coffee"}})
    (maps,) = released.read_explanations(tmp_path / "maps.h5")
    assert maps.token.values.tolist() == ["▁il", "▁caff", "è", "</s>"]
    np.testing.assert_array_equal(maps.input_saliency.isel(token=1), held["fbank_heatmap"][1])
    assert maps.attrs == {
        "utterance": "7",
        "hypothesis": "il caffè",
        "estimator": "mean",
        "input_masks": 19998,
        "source_text": "the coffee",
    }
    assert "previous_saliency" not in maps  # it is 0 everywhere, because previous tokens were not hidden


def test_a_file_merged_from_two_runs_has_no_number_of_masks(tmp_path):
    held = explanation()
    del held["n_masks"]
    spes(tmp_path / "merged.h5", {"0": held})
    (maps,) = released.read_explanations(tmp_path / "merged.h5")
    assert "input_masks" not in maps.attrs
    released.write_explanations([maps], tmp_path / "again.h5")
    assert_same_contents(tmp_path / "merged.h5", tmp_path / "again.h5")


texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)
values = {"elements": st.floats(width=32, allow_subnormal=False)}  # the reference also writes NaN and infinity


@settings(max_examples=50, deadline=None)
@given(
    st.data(), st.lists(texts, max_size=4), st.integers(1, 5), st.integers(1, 3), st.sampled_from([np.float32, float])
)
def test_maps_are_read_back_exactly(data, tokens, frames, mels, dtype):
    tokens = [*tokens, "</s>"]
    count = len(tokens)
    array = lambda *shape: data.draw(hnp.arrays(dtype, shape, **values))  # noqa: E731
    edges = {"step_start": ("step", np.arange(frames) / 3), "step_end": ("step", 1 + np.arange(frames) / 3)}
    maps = xr.Dataset(
        {
            "input_saliency": (("token", "time", "mel"), array(count, frames, mels)),
            "encoder_saliency": (("token", "step"), array(count, frames)),
        },
        coords={"token": np.array(tokens, dtype=str), "time": np.arange(frames) / 7, "mel": 50.0 + np.arange(mels)}
        | edges,
        attrs={"utterance": data.draw(texts), "hypothesis": "", "estimator": "ridge", "seed": 3, "reference": "sì"},
    )
    previous = np.tril(data.draw(hnp.arrays(np.float32, (count, count), elements=st.floats(0, 1, width=32))))
    if previous.any():
        maps["previous_saliency"] = (("token", "previous"), previous)
    with tempfile.TemporaryDirectory() as folder:
        for saliency, other in (("input_saliency", "encoder_saliency"), ("encoder_saliency", "input_saliency")):
            path = Path(folder, f"{saliency}.h5")
            released.write_explanations([maps], path, saliency)
            (read,) = released.read_explanations(path, saliency)
            expected = maps.drop_vars(other).drop_vars(["time", "mel"] if saliency == "encoder_saliency" else [])
            xr.testing.assert_identical(read, expected)
            assert read[saliency].dtype == dtype and read.token.dtype.kind == "U"
            with h5py.File(path) as file:
                (group,) = file.values()  # with the utterance's name if that is a number
                spes_own, ours = {"fbank_heatmap", "tgt_embed_heatmap", "tgt_text"}, {"time", "mel", *edges}
                assert set(group) == spes_own | ours


@pytest.fixture(scope="module")
def explained(model, utterances):
    """Maps of the tiny model, by direction."""
    occlusion = Occlusion(30, 20, precision="float32", estimator="mean", partition="superpixels")
    made = [explain_directions(model, utterance, ["en", "en-it"], occlusion) for utterance in utterances]
    return dict(zip(("en", "en-it"), map(list, zip(*made, strict=True)), strict=True))


def test_maps_of_a_model_are_read_back_exactly_and_with_the_same_correlations(explained, tmp_path):
    for direction, originals in explained.items():
        folder = tmp_path / "released" / "tiny" / direction
        released.write_released(originals, folder)
        for read, original in zip(released.read_released(folder), originals, strict=True):
            xr.testing.assert_identical(read, original[MAPS])
        released.import_released(folder, tmp_path / "maps")
        imported = list(store.load_maps(tmp_path / "maps", "tiny", direction))
        assert [maps.utterance for maps in imported] == ["en-test-0", "en-test-1"]
        found, expected = correlate_all(imported), correlate_all(originals)
        assert found.attrs == expected.attrs | {"without_scores": ["input", "encoder"]}
        for name in ("by_layer_and_head", "by_layer", "by_head", "overall"):
            xr.testing.assert_identical(found[name].sel(masks="all"), expected[name].sel(masks="all"))
            assert expected[name].notnull().all() and found[name].sel(masks="half").isnull().all()
            np.testing.assert_array_equal(converged(found)[name], found[name].sel(masks="all"))  # noise is unknown
        assert expected.reliability.notnull().all() and found.reliability.isnull().all()
        assert not too_noisy(found).any()


def test_maps_of_the_reference_are_imported(folder, tmp_path, capsys):
    release(folder)
    released.import_released(folder, tmp_path / "maps")
    assert capsys.readouterr().out == "base en: 3 utterances\n"
    stored = list(store.load_maps(tmp_path / "maps", "base", "en"))
    assert [maps.utterance for maps in stored] == ["0", "2", "10"]  # HDF5 lists 10 before 2
    for maps in stored:
        seed = int(maps.utterance)
        np.testing.assert_array_equal(maps.cross_attention, attention(seed))
        np.testing.assert_array_equal(
            maps.encoder_saliency, explanation(100 + seed, cells=(6, 1))["fbank_heatmap"][..., 0]
        )
        np.testing.assert_allclose(maps.step[:5], 0.0275 + 0.04 * np.arange(5))
        assert (maps.step[5].item(), maps.time[-1].item()) == (pytest.approx(0.2175), pytest.approx(0.2225))
        np.testing.assert_allclose(maps.step_end - maps.step_start, 0.04)
        assert (maps.model, maps.setting, maps.hypothesis) == ("base", "en", "the dogs sing")
    rho = correlate_all(stored).overall.sel(saliency="encoder", masks="all")
    spoken = [attention(2)[:, :, :4].mean(axis=(0, 1)), explanation(102, cells=(6, 1))["fbank_heatmap"][:4, :, 0]]
    zscores = stats.zscore(spoken[0], axis=0, ddof=1), stats.zscore(spoken[1], axis=1, ddof=1)
    assert rho.sel(utterance="2").item() == pytest.approx(np.corrcoef(*(each.ravel() for each in zscores))[0, 1])


@pytest.mark.parametrize("lead", [0, 2])
def test_files_of_earlier_versions_are_read(made, folder, lead):
    """They had the attributes subsampling and lead instead of step edges."""
    folder = folder.parents[1] / "tiny" / "en"
    maps = made.maps()
    released.write_released([maps], folder)
    for name in released.FILES.values():
        with h5py.File(folder / name, "a") as file:
            for group in file.values():
                attributes = json.loads(group.attrs[released.OURS]) | {"subsampling": 4, "lead": lead}
                group.attrs[released.OURS] = json.dumps(attributes)
                del group["step_start"], group["step_end"]
    (read,) = released.read_released(folder)
    np.testing.assert_allclose(read.step_start, 0.0075 + 0.01 * (4 * np.arange(6) - lead))
    np.testing.assert_allclose(read.step_end, read.step_start + 0.04)
    for name in MAPS:
        np.testing.assert_array_equal(read[name], maps[name])


def test_encoder_saliency_is_optional(folder):
    (release(folder) / "encoder_saliency.h5").unlink()
    for maps in released.read_released(folder):
        assert set(maps.data_vars) == {"input_saliency", "cross_attention"}


def test_attention_in_half_precision_becomes_single_precision(folder):
    release(folder, ["2"], cross_attention={"2": attention(2).astype(np.float16)})
    (maps,) = released.read_released(folder)
    assert maps.cross_attention.dtype == np.float32
    np.testing.assert_array_equal(maps.cross_attention, attention(2).astype(np.float16))


def with_rows(held: dict, rows: dict) -> dict:
    """An explanation with some rows of its map set to a value, except in the first cell."""
    saliency = held["fbank_heatmap"].copy()
    for row, value in rows.items():
        saliency.reshape(len(saliency), -1)[row, 1:] = value
    return held | {"fbank_heatmap": saliency}


def test_tokens_whose_maps_are_not_finite_are_dropped_and_reported(folder, tmp_path, capsys):
    damaged = {"2": with_rows(explanation(2), {1: np.nan}), "10": with_rows(explanation(10), {0: 1.0, 3: np.inf})}
    steps = {"2": with_rows(explanation(102, cells=(6, 1)), {2: np.nan})}
    release(folder, input_saliency=damaged, encoder_saliency=steps)
    released.import_released(folder, tmp_path / "maps")
    assert capsys.readouterr().out.splitlines() == [
        "base en, utterance 2: dropped ▁dog (row 1), s (row 2), because their maps are not finite",
        "base en, utterance 10: dropped ▁sing (row 3), because their maps are not finite",
        "base en: 3 utterances",
    ]
    stored = {maps.utterance: maps for maps in store.load_maps(tmp_path / "maps", "base", "en")}
    assert {name: maps.token.values.tolist() for name, maps in stored.items()} == {
        "0": TOKENS,
        "2": ["▁the", "▁sing", "</s>"],
        "10": ["▁the", "▁dog", "s", "</s>"],
    }
    assert stored["2"].left_out == ["▁dog (row 1)", "s (row 2)"] and stored["2"].hypothesis == "the dogs sing"
    np.testing.assert_array_equal(stored["2"].cross_attention, attention(2)[:, :, [0, 3, 4]])
    np.testing.assert_array_equal(stored["2"].input_saliency, explanation(2)["fbank_heatmap"][[0, 3, 4]])
    rho = correlate_all(stored.values()).drop_vars("reliability").sel(masks="all")
    assert all(variable.notnull().all() for variable in rho.values())


def test_an_utterance_with_fewer_than_two_tokens_is_skipped(folder, tmp_path, capsys):
    release(folder, input_saliency={"2": with_rows(explanation(2), {0: np.nan, 1: np.nan, 3: np.nan})})
    released.import_released(folder, tmp_path / "maps")
    assert [maps.utterance for maps in store.load_maps(tmp_path / "maps", "base", "en")] == ["0", "10"]
    assert "base en, utterance 2: skipped, because it has fewer than two tokens\n" in capsys.readouterr().out
    release(folder, names=["4"], input_saliency={"4": with_rows(explanation(), dict.fromkeys(range(4), np.nan))})
    with pytest.raises(ValueError, match="base/en has no utterance with two or more tokens, so there is nothing to"):
        released.import_released(folder, tmp_path / "maps")


def test_a_leading_language_tag_is_dropped(folder):
    tagged = explanation(5, tokens=["<lang:it>", *TOKENS])
    steps = explanation(6, tokens=["<lang:it>", *TOKENS], cells=(6, 1))
    release(
        folder, [], input_saliency={"5": tagged}, encoder_saliency={"5": steps}, cross_attention={"5": attention(5, 6)}
    )
    (maps,) = released.read_released(folder)
    assert maps.token.values.tolist() == TOKENS and maps.hypothesis == "the dogs sing"
    np.testing.assert_array_equal(maps.input_saliency, tagged["fbank_heatmap"][1:])
    np.testing.assert_array_equal(maps.cross_attention, attention(5, 6)[:, :, 1:])
    assert "left_out" not in maps.attrs


def test_references_come_from_the_table_of_the_data_set(folder):
    release(folder, ["0", "2"])
    lines = ["id\taudio\tn_frames\ttgt_text", 'a\t-\t22\tthe "dogs" sing', "b\t-\t9\tno", "c\t-\t21\tNA"]
    table = folder / "manifest.tsv"
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert [maps.reference for maps in released.read_released(folder)] == ['the "dogs" sing', "NA"]
    table.write_text("\n".join(lines[:2]) + "\n", encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"manifest\.tsv has 1 rows and none for utterance 2: give the data set's complete"
    ):
        list(released.read_released(folder))
    table.write_text("\n".join([*lines[:3], "c\t-\t40\tyes"]) + "\n", encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"gives utterance 2 40 frames, but its map has 22: give the table of the data"
    ):
        list(released.read_released(folder))
    table.write_text("id\ttext\na\tb\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"manifest\.tsv has no column tgt_text: give the data set's table"):
        list(released.read_released(folder))
    table.write_bytes(b"id\ttgt_text\n\xff\n")
    with pytest.raises(ValueError, match=r"manifest\.tsv is not a tab-separated table in UTF-8 \(.*\): copy it again"):
        list(released.read_released(folder))


def changed(name: str, **changes):
    return lambda folder: release(
        folder, **{name: {"2": explanation(2, cells=(6, 1) if name[0] == "e" else (22, 8), **changes)}}
    )


def put(name: str, values):
    return lambda folder: release(folder, **{name: {"2": values}})


def cut(name: str):
    def change(folder):
        path = release(folder) / f"{name}.h5"
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return change


def without(name: str):
    return lambda folder: (release(folder) / f"{name}.h5").unlink()


rows = np.ones((4, 22, 8), dtype=np.float32)
unlike = ["</s>", "▁the", "▁cat", "s", "▁sing"]
WRONG = {
    "no maps": (without("input_saliency"), r"There is no .*input_saliency\.h5: put it there \(docs/released\.md says"),
    "no attention": (without("cross_attention"), r"There is no .*cross_attention\.h5: put it there"),
    "cut short": (cut("input_saliency"), r"input_saliency\.h5 is not an HDF5 file, or is incomplete \(.*\): copy it"),
    "attention cut": (cut("cross_attention"), r"cross_attention\.h5 is not an HDF5 file, or is incomplete"),
    "empty": (lambda folder: release(folder, []), r"cross_attention\.h5 holds no utterance: copy it again"),
    "maps only": (
        put("cross_attention", None),
        r"Utterance 2 is in .*input_saliency\.h5, but not in cross_attention\.h5",
    ),
    "attention only": (
        put("input_saliency", None),
        r"Utterance 2 is in .*cross_attention\.h5, but not in input_saliency",
    ),
    "no SM^H of one": (
        put("encoder_saliency", None),
        r"Utterance 2 is in .*, but not in encoder_saliency\.h5 beside it",
    ),
    "no map": (
        put("input_saliency", {"tgt_text": ["</s>"], "n_masks": 3}),
        r"input_saliency\.h5, utterance 2: it lacks fbank_heatmap, so it is not an explanation of SPES",
    ),
    "no text": (put("input_saliency", {"fbank_heatmap": rows}), r"utterance 2: it lacks tgt_text, so it is not"),
    "an array": (
        lambda folder: attention_as_maps(folder),
        r"utterance 0: the group cannot be read \(it is an array",
    ),
    "fewer rows": (
        changed("input_saliency", fbank_heatmap=rows),
        r"utterance 2: fbank_heatmap is float32 4 x 22 x 8, not the 5 tokens of tgt_text x frames x bands",
    ),
    "two dimensions": (
        changed("input_saliency", fbank_heatmap=np.ones((5, 22))),
        r"heatmap is float64 5 x 22, not the 5",
    ),
    "counts": (changed("input_saliency", fbank_heatmap=np.ones((5, 22, 8), int)), r"is int64 5 x 22 x 8, not the 5"),
    "a text as map": (changed("input_saliency", fbank_heatmap=3.0), r"fbank_heatmap is float64 scalar, not the 5"),
    "no frames": (changed("input_saliency", fbank_heatmap=np.ones((5, 0, 8))), r"is float64 5 x 0 x 8, not the 5"),
    "numbers as text": (put("input_saliency", explanation() | {"tgt_text": "abc"}), r"not the 3 tokens of tgt_text"),
    "previous tokens": (
        changed("input_saliency", tgt_embed_heatmap=np.ones((5, 4, 1), dtype=np.float32)),
        r"utterance 2: tgt_embed_heatmap is float32 5 x 4 x 1, not 5 x 5 tokens of tgt_text x 1",
    ),
    "outputs as text": (
        changed("input_saliency", tgt_text=TOKENS),
        r"utterance 2: tgt_text starts with '▁the' instead of the </s> that SPES puts first",
    ),
    "masks": (changed("input_saliency", n_masks=[1, 2]), r"utterance 2: the group cannot be read"),
    "SM^H of cells": (
        changed("encoder_saliency", fbank_heatmap=np.ones((5, 6, 2))),
        r"encoder_saliency\.h5, utterance 2: fbank_heatmap is float64 5 x 6 x 2, not the 5 tokens of tgt_text x step",
    ),
    "SM^H of others": (
        changed("encoder_saliency", tgt_text=unlike),
        r"utterance 2: encoder_saliency\.h5 beside it has 5 tokens and 6 steps, or other tokens: all must bel",
    ),
    "SM^H of fewer steps": (
        changed("encoder_saliency", fbank_heatmap=np.ones((5, 5, 1))),
        r"5 tokens and 5 steps, or other tokens: all must belong to one output, here 5 and 6\.",
    ),
    "attention to fewer tokens": (
        put("cross_attention", attention(2, rows=4)),
        r"utterance 2: it is float32 2 x 3 x 4 x 6, not layers x heads x the 5 tokens \(with </s>\) of input_saliency",
    ),
    "one head": (
        put("cross_attention", attention(2)[0]),
        r"utterance 2: it is float32 3 x 5 x 6, not layers x heads x",
    ),
    "empty attention": (
        put("cross_attention", h5py.Empty("f")),
        r"cross_attention\.h5, utterance 2: the array cannot be read",
    ),
    "logits": (
        put("cross_attention", 2 * attention(2)),
        r"utterance 2: its rows sum to 1 only within 1: give attention w",
    ),
    "NaN attention": (put("cross_attention", np.nan * attention(2)), r"utterance 2: its rows sum to 1 only within nan"),
    "fewer steps": (
        put("cross_attention", attention(2, steps=5)),
        r"utterance 2: 5 encoder steps do not fit the 22 frames of input_saliency\.h5: give the model's own subsam",
    ),
}


def attention_as_maps(folder: Path) -> None:
    release(folder)
    (folder / "cross_attention.h5").replace(folder / "input_saliency.h5")
    release(folder.with_name("it"))
    (folder.with_name("it") / "cross_attention.h5").replace(folder / "cross_attention.h5")


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_raise_one_sentence(folder, tmp_path, case):
    change, sentence = WRONG[case]
    change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as error:
        released.import_released(folder, tmp_path / "maps")
    text = str(error.value)
    assert "\n" not in text and text.endswith(".") and "base/en" in text
    with pytest.raises(FileNotFoundError):  # nothing counts as imported
        store.load_maps(tmp_path / "maps", "base", "en")


def test_a_flipped_bit_gives_numbers_or_one_sentence(folder):
    release(folder, ["0"])
    paths = sorted(folder.glob("*.h5"))
    refused = 0
    for number in range(90):
        path = paths[number % 3]
        whole = path.read_bytes()
        flipped = bytearray(whole)
        place = int(np.random.default_rng(number).integers(0, len(whole)))
        flipped[place] ^= 1 << number % 8
        path.write_bytes(flipped)
        try:
            list(released.read_released(folder))
        except ValueError as error:
            assert "\n" not in str(error) and str(error).endswith(".")
            refused += 1
        path.write_bytes(whole)
    assert refused > 5


def test_maps_in_the_wrong_folder_raise(made, folder):
    released.write_released([made.maps()], folder)
    with pytest.raises(ValueError, match=r"base/en holds maps of tiny/en: move them to a folder with that name"):
        list(released.read_released(folder))


def test_only_changed_maps_are_stored_again(folder, tmp_path):
    maps = tmp_path / "maps"
    release(folder)
    released.import_released(folder, maps)
    before = {path.name: path.stat().st_mtime_ns for path in (maps / "base" / "en").glob("*.zip")}
    assert len(before) == 3
    os.utime(folder / "input_saliency.h5")
    released.import_released(folder, maps)
    assert {path.name: path.stat().st_mtime_ns for path in (maps / "base" / "en").glob("*.zip")} == before
    release(folder, cross_attention={"2": attention(99)})
    released.import_released(folder, maps)
    after = {path.name: path.stat().st_mtime_ns for path in (maps / "base" / "en").glob("*.zip")}
    assert {name for name in before if before[name] != after[name]} == {"2.zarr.zip"}
    np.testing.assert_array_equal(list(store.load_maps(maps, "base", "en"))[1].cross_attention, attention(99))


def test_names_that_cannot_be_file_names_raise(made, tmp_path):
    folder = tmp_path / "tiny" / "en"
    for names in (["../made"], ["made", "made"]):
        released.write_released([made.maps(utterance=name) for name in names], folder)
        with pytest.raises(ValueError, match=rf"utterance {names[0]}: its name is repeated or cannot be a file name"):
            released.import_released(folder, tmp_path / "maps")


def test_a_file_is_written_completely_or_not_at_all(made, tmp_path):
    path = tmp_path / "maps.h5"
    released.write_explanations([made.maps()], path)
    before = path.read_bytes()
    endless = made.maps(tokens=("▁the", "▁dog"))
    with pytest.raises(ValueError, match="Utterance made-1 ends in '▁dog', but SPES needs </s> there"):
        released.write_explanations([made.maps(), endless], path)
    twice = [made.maps(utterance="1"), made.maps(utterance="one"), made.maps(utterance="1")]
    with pytest.raises(ValueError, match="A second utterance would have the number 1 of one: rename one"):
        released.write_explanations(twice, path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["maps.h5"]


def test_an_error_in_the_maps_is_not_reported_as_a_writing_error(tmp_path):
    def gone():
        raise FileNotFoundError("There are no maps: run 10_maps first.")
        yield

    with pytest.raises(FileNotFoundError, match="^There are no maps: run 10_maps first.$"):
        released.write_released(gone(), tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.fixture
def root(tmp_path, explained, made):
    """A repository whose profile starts from the tiny model's released maps in two directions."""
    (tmp_path / "notebooks" / "profiles").mkdir(parents=True)
    for each in ("paper", "beyond"):
        shutil.copytree(ROOT / "notebooks" / each, tmp_path / "notebooks" / each)
    profile = {"profile": "tiny", "data": "data", "released": "released", "directions": {"tiny": ["en", "en-it"]}}
    (tmp_path / "notebooks/profiles/tiny.yaml").write_text(yaml.safe_dump(profile))
    made.corpus(tmp_path / "data", [("en-test-0", "test", "en", "the dog sleeps", "il cane dorme")])
    (tmp_path / "data/paper.csv").write_bytes((ROOT / "data/paper.csv").read_bytes())
    for direction, maps in explained.items():
        released.write_released(maps, tmp_path / "released" / "tiny" / direction)
    return tmp_path


def run_cells(job) -> dict:
    """Run the cells of a notebook in this process, much faster than in a kernel, and return their variables."""
    check_parameters(job)
    shown = {"display": lambda *_: None}
    for cell in json.loads(job.source.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), shown)
            if "parameters" in cell["metadata"].get("tags", []):
                shown |= job.parameters
    plt.close("all")
    for path in job.outputs:
        assert path.exists(), path
    return shown


REDUCED = {  # windows (token, frame, band)
    "2d_max": lambda window: window.max(axis=(1, 2)),
    "2d_avg": lambda window: window.mean(axis=(1, 2)),
    "1d_max_1d_avg": lambda window: window.max(axis=2).mean(axis=1),
}


def overall_rho(maps: xr.Dataset, reduction: str) -> float:
    """rho(CA, SM^X) of the attention averaged over layers and heads, from numpy and scipy alone."""
    spoken = maps.isel(token=maps.token.values != "</s>")
    cells = spoken.input_saliency.values.astype(np.float64)
    cells = stats.zscore(cells.reshape(len(cells), -1), axis=1, ddof=1).reshape(cells.shape)
    window, steps = 4, maps.sizes["step"]
    cells = np.pad(cells, ((0, 0), (0, steps * window - cells.shape[1]), (0, 0)), mode="edge")
    reduced = [REDUCED[reduction](cells[:, step * window : (step + 1) * window]) for step in range(steps)]
    attention = stats.zscore(spoken.cross_attention.mean(["layer", "head"]).values, axis=0, ddof=1)
    return stats.pearsonr(np.stack(reduced, axis=1).ravel(), attention.ravel()).statistic


@pytest.mark.parametrize("complete", [True, False], ids=["with SM^H", "without"])
def test_the_notebooks_run_from_released_files(root, explained, complete, monkeypatch):
    if not complete:
        for path in root.glob("released/tiny/*/encoder_saliency.h5"):
            path.unlink()
    paper = root / "data/paper.csv"
    paper.write_text(paper.read_text(encoding="utf-8") + "tab2,WER,tiny,en,9.5,\n", encoding="utf-8")
    monkeypatch.setattr("reproduction.tables.PAPER", paper)
    profile = load_profile(root / "notebooks/profiles/tiny.yaml")
    jobs = plan(profile, root, steps_of(profile, root))
    assert [job.name for job in jobs] == [
        "11_released-tiny-en",
        "22_quality",
        "21_reduction",
        "23_heads_and_layers",
        "24_models_and_tasks",
        *(["25_context_mixing"] if complete else []),
        "30_heatmaps",
        "40_agreement",
        "90_findings",
    ]
    assert all("device" not in job.parameters for job in jobs)
    figures = root / "figures/tiny"
    with chdir(root):
        figures.mkdir(parents=True)
        ran = {job.name: run_cells(job) for job in jobs}
    tab4 = pd.read_csv(figures / "tab4.csv").query("layer == 'mean'").set_index("direction")
    for direction, maps in explained.items():
        expected = correlate_all(maps).overall.sel(saliency="input", masks="all").mean().item()
        assert tab4.rho[direction] == pytest.approx(expected, abs=1e-6) and tab4.n[direction] == 2
    np.testing.assert_array_equal(tab4.reported, tab4.rho)  # the noise of released maps is unknown
    assert tab4.reliability.isna().all()

    tab1 = pd.read_csv(figures / "tab1.csv", keep_default_na=False)
    assert set(tab1.quantity) == {"rho", "reported"} and set(tab1.direction) == {"en"} and set(tab1.n) == {2}
    rho = {name: np.mean([overall_rho(maps, name) for maps in explained["en"]]) for name in REDUCED}
    rivals = [name for name in REDUCED if name != "2d_max"]
    expected = {(name, "", quantity): value for name, value in rho.items() for quantity in ("rho", "reported")}
    expected |= {("2d_max", name, "reported"): rho["2d_max"] - rho[name] for name in rivals}
    found = tab1.set_index(["reduction", "minus", "quantity"]).value.to_dict()
    assert found == pytest.approx(expected, abs=2e-6)
    tab2 = pd.read_csv(figures / "tab2.csv")
    assert set(tab2.metric) == {"size"} and tab2.direction.tolist() == list(explained)
    measured = pd.concat(sizes(maps) for maps in explained.values())[["value", "low", "high", "n"]]
    np.testing.assert_allclose(tab2[["value", "low", "high", "n"]], measured, atol=1e-6)
    headers = {"tab1": "reduction rho reported reliability n paper", "tab2": "model direction metric ours n paper"}
    for name, notebook in {"tab1": "21_reduction", "tab2": "22_quality"}.items():
        caption, header, _, *rows = (
            (figures / f"{name}.md").read_text(encoding="utf-8").replace("\n\n", "\n").splitlines()
        )
        assert header.replace("|", "").split() == headers[name].split() and len(rows) == {"tab1": 3, "tab2": 2}[name]
        assert not re.search("deletion|quality", caption, re.IGNORECASE)
        panels = ran[notebook]["figure"].axes
        assert len(panels) == {"tab1": 2, "tab2": 1}[name] and all(axes.has_data() for axes in panels)

    findings = pd.read_csv(figures / "findings.csv").set_index("finding")
    for name in ("full resolution beats reduced", "SM^X reduced beats CA"):
        assert findings.verdict[name] == "not available"
    best = findings.loc["2D max is the best reduction"].set_index("statistic")
    assert best.verdict["needs deletion in tab1"] == "not available" and len(best) == 3
    for name in rivals:
        row = best.loc[f"reported, 2d_max minus {name}"]
        assert row.value == pytest.approx(rho["2d_max"] - rho[name], abs=2e-6)
        assert row.verdict == "too noisy"  # two utterances decide nothing
    mixing = findings.verdict[["52 to 75 % of the encoder's saliency", "encoder saliency correlates more"]]
    assert (mixing == "not available").all() != complete and findings.value["the last layers are best"].notna().all()


def test_changed_released_files_make_their_steps_stale(root):
    profile = load_profile(root / "notebooks/profiles/tiny.yaml")
    steps = steps_of(profile, root)
    before = [job.inputs for job in plan(profile, root, steps)]
    assert [job.inputs for job in plan(profile, root, steps)] == before
    release(root / "released" / "tiny" / "en")
    after = [job.inputs for job in plan(profile, root, steps)]
    assert all(one != other for one, other in zip(before, after, strict=True))
