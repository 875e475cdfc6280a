"""Lessons: as they are, their checks give hints; with the solutions, their checks pass."""

import ast
import json
import math
import time

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from recipes import lessons as recipe
from recipes.lessons import RECORDINGS
from reproduction import lessons
from reproduction.tables import ROOT
from xattn.analysis.correlation import correlate_all
from xattn.attribution.forced import Forced
from xattn.attribution.occlusion import kl_divergence
from xattn.data.corpus import load_corpus
from xattn.data.utterance import Utterance, Word
from xattn.explain import Occlusion, explain
from xattn.figures import heatmaps
from xattn.models import load_model
from xattn.runs import explain_corpus
from xattn.store import load, load_maps, save

NOTEBOOKS = sorted((ROOT / "notebooks" / "lessons").glob("*.ipynb"))
LINES = 15  # of code that a student sees in a lesson
BYTES = 400_000  # of all shipped maps
SETTINGS = {"precision": "float32", "estimator": "sqrt_mean", "partition": "superpixels", "reliability": 1.0}
UTTERANCES, MASKS = 6, Occlusion(240, 160, **SETTINGS)
NAMES = (
    *("check_masks", "check_planted_for_windows", "check_sink", "check_normalisation", "check_chance"),
    *("check_unused_attention", "check_used_sound", "check_reliable", "check_prediction"),
    *("check_winner", "check_expected", "check_layers", "check_ranking", "check_ranking_without_model"),
    *("check_variance", "check_without_noise", "check_interval", "check_attention_wrong", "check_attention_right"),
)


def failing(*_):
    raise ZeroDivisionError("of the student\n  in two lines")


NONSENSE = (
    *(None, "nonsense", object(), [], {}, math.nan, math.inf, True, -3, 10**9, (1, 2, 3), ("windows",), [[1], [2, 3]]),
    *(("windows", "many"), ("superpixels", None), ["a", "b"], np.zeros((2, 2, 2)), {"layer": 1}, len, failing),
    *(lambda given: None, lambda given: "text", lambda given: np.zeros(3), lambda given: given * np.nan),
)


def cells(path):
    """The cells of a notebook, each with its source as one string and its tags."""
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [{**each, "source": "".join(each["source"]), "tags": each["metadata"].get("tags", [])} for each in found]


def code_cells(path):
    return [each for each in cells(path) if each["cell_type"] == "code"]


@pytest.fixture(scope="module")
def base():
    return load_model(ROOT / "data" / "models" / "base")


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    """Maps of the shipped base model, with fewer masks than the default profile has."""
    folder = tmp_path_factory.mktemp("maps")
    corpus = load_corpus(ROOT / "data", language="en", split="test")[:UTTERANCES]
    explain_corpus(base, corpus, folder, occlusion=MASKS, progress=False)
    return folder


@pytest.fixture(scope="module")
def stored(folder):
    return [*load_maps(folder, "base", "en")]


def run(path, parameters, solved, capsys):
    """Run a lesson in a plain namespace: what its checks print, and the pictures that it shows.

    parameters: replace those of the same names. solved: whether the solutions take the places of the exercises.
    """
    names, printed, pictures = {}, [], []
    for cell in code_cells(path):
        left_out = "exercise" if solved else "solution"
        if left_out in cell["tags"]:
            continue
        tree = ast.parse(cell["source"])
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, path.name, "exec"), names)
        if "parameters" in cell["tags"]:
            names |= {name: value for name, value in parameters.items() if name in names}
        capsys.readouterr()
        shown = eval(compile(ast.Expression(last.value), path.name, "eval"), names) if last else None
        if isinstance(shown, Figure | Axes):
            figure = shown if isinstance(shown, Figure) else shown.figure
            figure.draw_without_rendering()
            pictures.append(figure)
        if {"exercise", "solution"} & set(cell["tags"]):
            printed.append(capsys.readouterr().out)
    plt.close("all")
    return printed, pictures


@pytest.mark.parametrize("solved", [False, True], ids=["as it is", "solved"])
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_checks_pass_with_the_solutions_only(path, solved, folder, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    started = time.monotonic()
    printed, pictures = run(path, {"maps": str(folder)}, solved, capsys)
    print(f"{path.stem}, {'solved' if solved else 'as it is'}: {time.monotonic() - started:.1f} s", *printed, sep="\n")
    assert len(pictures) == 1
    assert len(printed) in (2, 3)
    for line in printed:
        assert line.count("\n") == 1
        assert line.startswith("Passed: " if solved else ("Not yet: ", "Nothing to measure yet: ")), line


@pytest.mark.parametrize("recording", RECORDINGS)
def test_the_last_lesson_works_for_every_shipped_recording(recording, capsys):
    printed, _ = run(NOTEBOOKS[-1], {"shipped": recording}, True, capsys)
    assert [line.partition(":")[0] for line in printed] == ["Passed", "Passed"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_short_and_its_solutions_are_folded(path):
    visible = [each for each in code_cells(path) if "solution" not in each["tags"]]
    assert sum(bool(line.strip()) for each in visible for line in each["source"].splitlines()) <= LINES
    everything = cells(path)
    exercises = [number for number, each in enumerate(everything) if "exercise" in each["tags"]]
    assert len(exercises) in (2, 3)
    for number in exercises:
        heading, solution = everything[number + 1 : number + 3]
        assert heading["source"] == "Solution (unfold)"
        assert solution["metadata"] == {"jupyter": {"source_hidden": True}, "tags": ["solution"]}
    assert sum("solution" in each["tags"] for each in everything) == len(exercises)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_ready_for_version_control(path):
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    assert text == json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    assert len({cell["id"] for cell in notebook["cells"]}) == len(notebook["cells"])
    assert notebook["cells"][0]["source"][0].startswith("# ")
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    for cell in code_cells(path):
        assert cell["outputs"] == [] and cell["execution_count"] is None


def test_there_are_eight_lessons_and_their_checks_are_all_tested():
    assert [path.stem[:2] for path in NOTEBOOKS] == [f"{number}_" for number in range(1, 9)]
    assert sorted(NAMES) == sorted(name for name in vars(lessons) if name.startswith("check_"))


@pytest.fixture(scope="module")
def given(base, stored):
    """What each check needs beside an answer."""
    corpus = load_corpus(ROOT / "data", language="en", split="test")
    words, rho = {each.id: each for each in corpus}, correlate_all(stored)
    features, voice = stored[0].features, lessons.explained(shipped=RECORDINGS[0])
    heads, encoder = rho.by_layer_and_head.sel(masks="all"), rho.overall.sel(masks="all", saliency="encoder")
    others = {
        "check_masks": (lessons.planted_cells(features), features),
        "check_planted_for_windows": (features,),
        "check_sink": (stored[0],),
        **dict.fromkeys(("check_normalisation", "check_chance"), (stored[:2], words)),
        **dict.fromkeys(("check_unused_attention", "check_used_sound"), (voice,)),
        **dict.fromkeys(("check_attention_wrong", "check_attention_right"), (voice,)),
        **dict.fromkeys(("check_reliable", "check_prediction"), (base, corpus[1])),
        **dict.fromkeys(("check_winner", "check_expected"), (heads.sel(saliency="input"),)),
        "check_layers": (stored, heads.sel(saliency="input")),
        **dict.fromkeys(("check_ranking", "check_ranking_without_model"), (base, stored[:1])),
        "check_variance": (stored,),
        "check_without_noise": (rho,),
        "check_interval": (encoder,),
    }
    return {name: (getattr(lessons, name), others[name]) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_check_answers_nonsense_in_one_line(name, given, capsys):
    check, others = given[name]
    for answer in NONSENSE:
        check(answer, *others)
        line = capsys.readouterr().out.rstrip("\n")
        assert "\n" not in line and line.endswith((".", "?")), line
        assert line.startswith(("Nothing to measure yet: ", "Not yet: ")), (answer, line)


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("check_masks", (4, 0.5)),
        ("check_sink", 1.0),
        ("check_normalisation", lambda attention: attention - attention.mean(axis=0)),
        ("check_chance", 0.3),
        ("check_unused_attention", (2, 0.69)),  # "meeting" uses what it attends to
        ("check_unused_attention", (7, 3.5)),  # "not" does not attend to the end
        ("check_used_sound", (13, 3.4)),  # the full stop uses no sound
        ("check_attention_wrong", 9),
        ("check_attention_right", 7),
        ("check_reliable", ("spread", 12)),
        ("check_prediction", 0.0),
        ("check_winner", (1, 2)),
        ("check_expected", 0.0),
        ("check_layers", [1, 2]),
        ("check_ranking", lambda maps: -maps.features),
        ("check_variance", 0.9),
        ("check_without_noise", 0.99),
        ("check_interval", (-1, 1)),
        ("check_interval", (0.9, 0.95)),
    ],
)
def test_a_wrong_answer_gets_the_measurement_and_a_hint(name, answer, given, capsys):
    check, others = given[name]
    check(answer, *others)
    assert " Hint: " in capsys.readouterr().out.removeprefix("Not yet: ")


def test_the_hit_rate_counts_peaks_inside_the_spoken_word(made):
    maps = made.maps(tokens=("▁the", "▁dog", "</s>")).assign_attrs(utterance="u", setting="en")
    attention = np.zeros((2, 6))
    attention[0, 1], attention[1, 0] = 1, 1  # the second token looks at the word of the first
    words = Word("the", 0.0, 0.1), Word("dog", 0.16, 0.24)
    corpus = {"u": Utterance("u", None, "en", 0.24, words=words)}
    assert lessons.hit_rate(lambda given: attention, [maps], corpus) == 0.5
    assert lessons.hit_rate(lambda given: attention[::-1], [maps], corpus) == 0.5
    attention[1] = np.eye(6)[5]
    assert lessons.hit_rate(lambda given: attention, [maps], corpus) == 1


def heads(values):
    """rho of two heads in one layer, from (utterance, head)."""
    coordinates = {"layer": [1], "head": [1, 2]}
    return xr.DataArray(np.array(values)[:, None], dims=("utterance", "layer", "head"), coords=coordinates)


def test_the_winner_of_one_half_is_measured_on_the_other(capsys):
    rho = heads([[0.9, 0.2], [0.1, 0.3], [0.1, 0.3], [0.1, 0.3]])
    lessons.check_winner((1, 1), rho)
    assert "rho is 0.500 on the first half, where the best head has 0.500, and 0.100 on" in capsys.readouterr().out
    lessons.check_expected(0.225, rho)  # (0.1 + 3 * (0.2 + 0.3 + 0.3) / 3) / 4
    line = capsys.readouterr().out
    assert line.startswith("Passed: the winner of one utterance has a rho of 0.450 there and of 0.225 on the others")


def test_layers_and_variance_are_those_of_the_correlations(stored, given, capsys):
    rho = correlate_all(stored).sel(masks="all")
    check, others = given["check_layers"]
    check([3], *others)
    expected = float(rho.by_layer.sel(saliency="input", layer=3)[len(stored) // 2 :].mean())
    assert f"have a rho of {expected:.3f} on the second half" in capsys.readouterr().out
    check, others = given["check_variance"]
    check(0.0, *others)
    expected = float((rho.overall.sel(saliency="encoder") ** 2).mean())
    assert f"a straight line explains {expected:.1%} of the variance" in capsys.readouterr().out


def test_deletion_starts_at_0_and_ends_where_nothing_is_left(base, stored):
    loud, quiet = (lessons.deletion_curve(lambda maps, s=s: s * maps.features, base, stored[:1]) for s in (1, -1))
    assert loud.index.tolist() == [*range(0, 101, 10)]
    assert loud[0] == quiet[0] == 0
    assert loud[100] == pytest.approx(quiet[100]) and loud[50] < quiet[50]


def test_what_is_hidden_around_a_time_lasts_015_s(base, stored):
    maps = stored[0]
    forced = Forced.of(base, maps)
    times = xr.DataArray([0.5, 1.2], dims="step")
    found = lessons.divergence_when_hidden(forced, maps, times)
    assert found.dims == ("token", "step") and found.sizes["token"] == maps.sizes["token"]

    def distributions(features):
        with torch.inference_mode():
            return base.decode(base.encode(features[None]), forced.decoder_inputs)[0, forced.rows]

    for column, seconds in enumerate(times.values):
        changed = forced.features.clone()
        changed[(maps.time.values > seconds - 0.075) & (maps.time.values < seconds + 0.075)] = 0
        expected = kl_divergence(distributions(forced.features), distributions(changed))
        np.testing.assert_allclose(found[:, column], expected, atol=1e-4)
        voice = lessons.Explained(None, maps, forced)
        assert lessons.effect(voice, 1, seconds) == pytest.approx(float(expected[1]), abs=1e-4)


def test_own_recordings_are_explained_once_and_found_beside_the_lessons(
    tiny_folder, corpus_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JPY_SESSION_NAME", str(tmp_path / "notebooks" / "lessons" / "8_your_own_voice.ipynb"))
    (tmp_path / "notebooks" / "lessons").mkdir(parents=True)
    recording = tmp_path / "notebooks" / "lessons" / "me.flac"
    recording.write_bytes((corpus_folder / "audio" / "en-test-0.flac").read_bytes())
    first = lessons.explained(str(tiny_folder), "me.flac")
    assert "Reliability" in capsys.readouterr().out
    again = lessons.explained(str(tiny_folder), "me.flac")
    assert "Reliability" not in capsys.readouterr().out
    xr.testing.assert_equal(first.maps, again.maps)
    assert lessons.effect(again, 0, 0.2) >= 0


def test_errors_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="^Only one of model and recording is set: set both, or leave both empty"):
        lessons.explained(model="some/model")
    with pytest.raises(ValueError, match="^There are no shipped maps of 'other': choose one of en-dev-0010, "):
        lessons.explained(shipped="other")


def test_the_recipe_keeps_what_the_lessons_read(model, utterances, tmp_path, monkeypatch):
    full = explain(model, utterances[0], occlusion=Occlusion(60, 60, precision="float32"), progress=False)
    full["padding_attention"] = full.cross_attention.sum("step")
    monkeypatch.setattr(recipe, "explain", lambda *args, **options: full)
    save(recipe.small_maps(model, utterances[0]), tmp_path / "small.zarr.zip", "key")
    small = load(tmp_path / "small.zarr.zip")
    np.testing.assert_allclose(small.cross_attention[0, 0], full.cross_attention.mean(["layer", "head"]), atol=1e-3)
    np.testing.assert_allclose(small.input_saliency, full.input_saliency, rtol=0.01, atol=1e-3)
    pd.testing.assert_frame_equal(lessons.peaks(small), lessons.peaks(full))
    forced = lessons.Explained(utterances[0], full, Forced.of(model, full))
    shipped = lessons.Explained(utterances[0], small, None)
    assert lessons.effect(shipped, 1, float(full.step[4])) == pytest.approx(
        lessons.effect(forced, 1, float(full.step[4])), rel=0.01, abs=1e-3
    )
    heatmaps(small)


def test_shipped_maps_are_small_reliable_and_listed():
    stored = [*load_maps(ROOT / lessons.SHIPPED, "faster-whisper-tiny.en", "en")]
    assert [maps.utterance for maps in stored] == list(RECORDINGS)
    assert all(min(maps.input_reliability, maps.encoder_reliability) >= 0.8 for maps in stored)
    assert sum(path.stat().st_size for path in (ROOT / lessons.SHIPPED).rglob("*")) < BYTES
    text = (ROOT / lessons.SHIPPED / "README.md").read_text(encoding="utf-8")
    assert all(maps.weights in text and maps.utterance in text for maps in stored)
