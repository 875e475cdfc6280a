"""What regularised attention is measured by: values of utterances, intervals over utterances and seeds, verdicts."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from conftest import tiny_network, write_corpus
from scipy import stats

import xattn
from reproduction import regularisation as code
from reproduction.regularisation import (
    BETTER,
    COLUMNS,
    CONTROL,
    START,
    answer,
    crossed_interval,
    deletion_areas,
    entropy,
    error_rates,
    evaluate,
    exchanged,
    measure,
    measure_model,
    pseudo_values,
    summary,
    values_of,
    verdicts,
)
from reproduction.tables import ROOT
from xattn.analysis.intervals import mean_interval
from xattn.data.utterance import Utterance
from xattn.models import load_model

FEW = xattn.Occlusion(input_masks=40, encoder_masks=40, precision="float32", reliability=1.0)


def corpus_of(*texts, snr=(0.0, 10.0)):
    return [
        Utterance(f"u{number}", None, "en", 1.0, transcript=text, snr=snr[number % len(snr)])
        for number, text in enumerate(texts)
    ]


def test_pseudo_values_of_a_mean_are_the_values():
    values = np.array([3.0, 1.0, 7.0, 2.0])
    np.testing.assert_allclose(pseudo_values(lambda rows: values[rows].mean(), 4), values)


def test_interval_of_a_single_seed_is_students():
    values = np.random.default_rng(0).standard_normal((1, 9))
    assert crossed_interval(values) == pytest.approx(mean_interval(values[0]))
    value, low, high = crossed_interval(np.array([[2.0]]))
    assert value == 2 and np.isnan([low, high]).all()
    assert crossed_interval(np.full((3, 4), 5.0)) == (5, 5, 5)


def test_interval_over_seeds_and_utterances_by_hand():
    # Means of utterances 2 and 6, with variance 8 / 2; means of seeds 3 and 5, with variance 2 / 2.
    value, low, high = crossed_interval(np.array([[1.0, 5.0], [3.0, 7.0]]))
    half = stats.t.ppf(0.975, 1) * np.sqrt(4 + 1)
    assert (value, low, high) == pytest.approx((4, 4 - half, 4 + half))


@pytest.mark.parametrize(("seed_effect", "residual"), [(0.0, 1.0), (0.5, 0.2), (0.05, 0.1)])
def test_interval_covers_the_true_mean(seed_effect, residual):
    rng, covered = np.random.default_rng(0), []
    for _ in range(400):
        values = seed_effect * rng.standard_normal((3, 1)) + rng.standard_normal(40)
        _, low, high = crossed_interval(values + residual * rng.standard_normal((3, 40)))
        covered.append(low <= 0 <= high)
    assert np.mean(covered) > 0.93


def test_entropy_of_uniform_and_sharp_rows():
    rows = xr.DataArray([[0.25] * 4, [1.0, 0, 0, 0]], dims=("token", "step"))
    assert entropy(rows) == pytest.approx(0.5)


def test_error_rates_by_snr():
    corpus = corpus_of("a dog sleeps here", "the cat", "the bird sings", "it is so")
    texts = {"u0": "a dog sleeps", "u1": "the cat", "u2": "a bird sings", "u3": "it is"}
    table = pd.DataFrame(error_rates(texts, corpus), columns=["measure", "utterance", "value"])
    assert table.groupby("measure").utterance.agg(list).to_dict() == {
        "WER": ["u0", "u1", "u2", "u3"],
        "WER, 0 dB": ["u0", "u2"],
        "WER, 10 dB": ["u1", "u3"],
    }
    errors, words = np.array([1, 0, 1, 1]), np.array([4, 2, 3, 3])
    rate = 100 * errors.sum() / words.sum()
    others = [100 * np.delete(errors, row).sum() / np.delete(words, row).sum() for row in range(4)]
    assert table[table.measure == "WER"].value.tolist() == pytest.approx([4 * rate - 3 * each for each in others])


def test_area_of_deletion_starts_with_what_the_model_writes():
    corpus = corpus_of("a dog sleeps here", "the bird sings now", "it is cold today")
    right = {each.id: each.transcript for each in corpus}
    halfway = {"u0": "a dog", "u1": "the bird", "u2": "it is"}
    # 5 points: 0 % and the next one are right, 50 % has half the words, the last two none.
    utterances = {id: {"texts": [right[id], halfway[id], "", ""]} for id in right}
    rows = deletion_areas({"texts": right, "utterances": utterances}, corpus, step=25)
    assert [(name, id) for name, id, _ in rows] == [("deletion, WER", f"u{number}") for number in range(3)]
    # Trapezia of 0, 0, 50, 100, 100 at distances of a quarter.
    assert [value for *_, value in rows] == pytest.approx([50.0] * 3)
    worse = {"u0": "a dog sleeps", "u1": "the bird sings", "u2": "it is cold"}
    rows = deletion_areas({"texts": worse, "utterances": utterances}, corpus, step=25)
    # Trapezia of 0, -25, 25, 75, 75: the first of the points above 25.
    assert [value for *_, value in rows] == pytest.approx([(-12.5 + 0 + 50 + 75) / 4] * 3)


def maps_of(seed, reliability=0.8):
    rng = np.random.default_rng(seed)
    maps = {name: rng.standard_normal((4, 6)).tolist() for name in ("attention", "upper", "SM^X", "SM^H")}
    measures = {f"reliability, {name}": reliability for name in ("SM^X", "SM^H")}
    return {"maps": maps, "measures": measures, "texts": ["a", ""]}


def test_maps_of_two_models_are_exchanged():
    own, start = maps_of(0, 0.5), maps_of(1, 0.8)
    rows = {name: value for name, _, value in exchanged({"utterances": {"u": own}}, {"utterances": {"u": start}})}

    def r(first, second):
        return np.corrcoef(np.ravel(first), np.ravel(second))[0, 1]

    mine, theirs = own["maps"], start["maps"]
    assert rows == pytest.approx(
        {
            "attention, similarity to base's": r(mine["attention"], theirs["attention"]),
            "SM^X, similarity to base's": r(mine["SM^X"], theirs["SM^X"]) / np.sqrt(0.4),
            "SM^H, similarity to base's": r(mine["SM^H"], theirs["SM^H"]) / np.sqrt(0.4),
            "rho, base's SM^X": r(mine["attention"], theirs["SM^X"]),
            "rho, base's SM^H": r(mine["attention"], theirs["SM^H"]),
            "rho of base's attention, SM^X": r(theirs["attention"], mine["SM^X"]),
            "rho of base's attention, SM^H": r(theirs["attention"], mine["SM^H"]),
        }
    )


def made_values():
    """Values of three utterances and two seeds: `word_times-high` has better word times, and a worse WER."""
    rng, rows = np.random.default_rng(0), []
    level = {
        "WER": {START: 14, CONTROL: 13, "entropy-low": 13, "word_times-high": 20},
        "start of word": {START: 0.06, CONTROL: 0.05, "entropy-low": 0.05, "word_times-high": 0.01},
        "rho, SM^X": {START: 0.5, CONTROL: 0.5, "entropy-low": 0.5, "word_times-high": 0.5},
    }
    for measured, levels in level.items():
        utterances = rng.standard_normal(12)
        for variant, mean in levels.items():
            for seed in ("",) if variant == START else ("0", "1"):
                values = mean * (1 + 0.3 * utterances + 0.01 * rng.standard_normal(12))
                rows += [(variant, seed, measured, f"u{number}", value) for number, value in enumerate(values)]
    return pd.DataFrame(rows, columns=["variant", "seed", "measure", "utterance", "value"])


def test_summary_has_every_seed_and_paired_differences():
    values = made_values()
    table = summary(values)
    assert table.columns.tolist() == COLUMNS and (table.n == 12).all()
    indexed = table.set_index(["variant", "measure", "minus", "seed"]).sort_index()
    own = values[(values.variant == CONTROL) & (values.measure == "WER")]
    for seed in ("0", "1"):
        row = indexed.loc[CONTROL, "WER", "", seed]
        assert tuple(row[["value", "low", "high"]]) == pytest.approx(mean_interval(own[own.seed == seed].value))
    assert indexed.value[CONTROL, "WER", "", "all"] == pytest.approx(own.value.mean())
    assert indexed.loc[START, "WER"].index.tolist() == [("", "all")]
    other = values[(values.variant == "word_times-high") & (values.measure == "WER")]
    difference = indexed.loc["word_times-high", "WER", CONTROL, "all"]
    assert difference.value == pytest.approx(other.value.mean() - own.value.mean())
    # Utterances differ much more than paired differences do.
    assert difference.high - difference.low < 0.7 * (indexed.high - indexed.low)["word_times-high", "WER", "", "all"]
    assert indexed.value[CONTROL, "WER", START, "0"] == pytest.approx(
        own[own.seed == "0"].value.mean() - values[(values.variant == START) & (values.measure == "WER")].value.mean()
    )


def test_an_utterance_without_a_value_is_left_out_everywhere():
    values = made_values()
    gone = (values.variant == "entropy-low") & (values.seed == "1") & (values.utterance == "u3")
    table = summary(values[~gone]).set_index(["variant", "measure", "minus", "seed"]).sort_index()
    assert (table.n.loc["entropy-low"] == 11).all() and (table.n.loc[CONTROL] == 12).all()


def test_verdicts_and_the_answer_follow_from_the_differences():
    table = summary(made_values())
    found = verdicts(table)
    assert found.columns.tolist() == [*BETTER]
    assert found.loc["word_times-high", ["WER", "start of word", "rho, SM^X"]].tolist() == ["worse", "better", ""]
    assert (found.loc["entropy-low"] == "").all()
    single = verdicts(table[~(table.variant.eq("word_times-high") & table.seed.isin(["1", "2"]))])
    assert single.index.tolist() == [each for each in found.index if each != "word_times-high"]
    assert verdicts(table[~table.seed.eq("1")]).empty
    lines = answer(table).splitlines()
    assert lines[:2] == ["WER: worse with word_times-high.", "rho, SM^X: no difference from the control."]
    assert "start of word: better with word_times-high." in lines and len(lines) == len(BETTER)


@pytest.fixture(scope="module")
def data(tmp_path_factory, tiny_folder):
    """A corpus, a tiny `base` and two tiny models in the place of regularised ones."""
    data = tmp_path_factory.mktemp("regularised") / "data"
    texts = ("the dog sleeps", "a cat sees the bird", "yes it is")
    write_corpus(data, [(f"en-test-{number}", "test", "en", text, "sì") for number, text in enumerate(texts)])
    folder = data / "train" / "regularised"
    for seed, path in enumerate((data / "models" / START, folder / f"{CONTROL}-0", folder / "word_times-low-0")):
        tiny_network(seed, max_target_positions=64).save_pretrained(path)
        shutil.copy(tiny_folder / "spm.model", path)
    (folder / "gradients").mkdir()
    (folder / "gradients" / "word_times.json").write_text(json.dumps({"key": "", "norms": {"loss": 2.0}}))
    (folder / "targets.csv").write_text("id,input_reliability,encoder_reliability\na,0.8,0.7\nb,0.9,0.9\n")
    return data


def test_measures_of_an_utterance_are_those_of_the_library(data):
    model = load_model(data / "models" / START)
    utterance = xattn.load_corpus(data, language="en", split="test")[1]
    found = measure(model, utterance, FEW, step=50)
    maps = xattn.explain(model, utterance, text=utterance.transcript, occlusion=FEW, progress=False)
    measures, upper = found["measures"], maps.cross_attention.isel(layer=slice(1, None))
    for name, saliency in (("SM^X", maps.input_saliency), ("SM^H", maps.encoder_saliency)):
        rho = float(xattn.correlate(maps.cross_attention, saliency).overall)
        assert measures[f"rho, {name}"] == pytest.approx(rho, abs=1e-5)
        half = float(xattn.correlate(upper, saliency).overall)
        assert measures[f"rho, {name}, upper half"] == pytest.approx(half, abs=1e-5)
        shape = np.shape(found["maps"][name])
        assert shape == np.shape(found["maps"]["attention"]) == (maps.sizes["token"] - 1, maps.sizes["step"])
    reliability = maps.encoder_reliability
    if reliability > 0:
        expected = measures["rho, SM^H"] / np.sqrt(reliability)
        assert measures["rho, SM^H, without noise"] == pytest.approx(expected, rel=1e-5)
    words = xattn.word_times(maps)
    errors = abs(words.start.to_numpy() - [word.start for word in utterance.words])
    assert measures["start of word"] == pytest.approx(np.median(errors))
    assert len(found["texts"]) == 2 and 0 < measures["entropy"] <= 1


def test_stored_numbers_are_read_unless_the_weights_have_changed(data, tmp_path, monkeypatch):
    corpus = xattn.load_corpus(data, language="en", split="test")
    made = []
    monkeypatch.setattr(
        code, "measure", lambda model, utterance, occlusion: made.append((utterance.id, occlusion.seed)) or {"value": 1}
    )
    model = load_model(data / "models" / START)
    first = measure_model(model, corpus, tmp_path, FEW, explained=2)
    assert [id for id, _ in made] == ["en-test-0", "en-test-1"] and [*first["texts"]] == [u.id for u in corpus]
    assert measure_model(model, corpus, tmp_path, FEW, explained=2) == first and len(made) == 2
    measure_model(model, corpus, tmp_path, FEW, explained=3)
    assert [id for id, _ in made[2:]] == ["en-test-2"]
    model.weights_hash = "other"
    measure_model(model, corpus, tmp_path, FEW, explained=1)
    assert [id for id, _ in made[3:]] == ["en-test-0"]
    other = load_model(data / "train" / "regularised" / f"{CONTROL}-0")
    measure_model(other, corpus, tmp_path, FEW, explained=1)
    assert len({seed for _, seed in made}) == 2  # models do not share their masks


def test_the_table_is_written_with_its_provenance(data, monkeypatch):
    monkeypatch.setattr(code, "OCCLUSION", FEW)
    table = evaluate(data, explained=2)
    written = pd.read_csv(data / "regularised" / "regularisation.csv", keep_default_na=False, dtype={"seed": str})
    assert written.columns.tolist() == COLUMNS and len(written) == len(table)
    assert set(written.variant) == {START, CONTROL, "word_times-low"} and set(written.seed) == {"all", "0"}
    own = written[written.minus.eq("") & written.seed.eq("all")].set_index(["measure", "variant"]).n
    assert own["WER"].to_dict() == dict.fromkeys((START, CONTROL, "word_times-low"), 3)
    assert own["rho, base's SM^X"].to_dict() == dict.fromkeys((CONTROL, "word_times-low"), 2)
    record = json.loads((data / "regularised" / "provenance.json").read_text())
    assert [*record["weights"]] == [START, f"{CONTROL}-0", "word_times-low-0"]
    assert record["training"]["explained utterances"] == 2
    assert record["training"]["mean reliability"] == {"input_reliability": 0.85, "encoder_reliability": 0.8}
    assert record["training"]["norms of gradients"] == {"word_times": {"loss": 2.0}}


def test_without_a_control_there_is_no_table(tmp_path):
    with pytest.raises(
        SystemExit, match="^There is no finished control-none in .*: run `make data train-regularised`.$"
    ):
        evaluate(tmp_path)


def test_values_hold_the_exchange_for_all_but_the_starting_model():
    corpus = corpus_of("a dog", "the cat")
    start = {"texts": {"u0": "a dog", "u1": "a cat"}, "utterances": {"u0": maps_of(0), "u1": maps_of(1)}}
    other = start | {"utterances": {"u0": maps_of(2), "u1": maps_of(3)}}
    for own in [*start["utterances"].values(), *other["utterances"].values()]:
        own["texts"] = ["a dog"] * 4 + [""]
    values = values_of({(START, ""): start, (CONTROL, "0"): other}, corpus)
    exchanged_measures = values[values.measure.str.contains("base")]
    assert set(exchanged_measures.variant) == {CONTROL} and exchanged_measures.measure.nunique() == 7
    assert set(values[values.variant == START].measure) == {"WER", "deletion, WER"} | {
        f"reliability, {name}" for name in ("SM^X", "SM^H")
    }


def notebook_code(data):
    """The code of the notebook, reading the table of this data folder."""
    path = ROOT / "notebooks" / "beyond" / "45_regularisation.ipynb"
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    return "\n".join(["".join(each["source"]) for each in cells]).replace('data = "data"', f"data = {str(data)!r}")


def test_the_notebook_shows_the_table(data, tmp_path, monkeypatch, capsys):
    values = made_values()
    more = [
        values[values.measure == "WER"].assign(measure=name)
        for name in (*code.SHOWN, *code.USED, "WER, 0 dB", "WER, 20 dB")
        if name not in set(values.measure)
    ]
    table = summary(pd.concat([values, *more]))
    folder = tmp_path / "regularised"
    folder.mkdir()
    table.to_csv(folder / "regularisation.csv", index=False)
    shutil.copy(data / "regularised" / "provenance.json", folder)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(notebook_code(tmp_path), "notebook", "exec"), names)
    printed = capsys.readouterr().out
    assert printed.startswith(
        "`make data train-regularised` made these numbers: 2 models, trained with the attention of 2"
    )
    assert "0.85 (input), 0.80 (encoder)" in printed and "start of word: better with word_times-high." in printed
    assert {path.name for path in (tmp_path / "figures" / "lab").iterdir()} >= {
        "regularisation.csv",
        "regularisation.png",
    }
    assert names["table"].equals(table.reset_index(drop=True))
    assert names["noise"].measure.unique().tolist() == ["WER, 0 dB", "WER, 20 dB"]


def test_the_notebook_says_how_to_make_the_table(tmp_path):
    with pytest.raises(
        FileNotFoundError, match="regularisation.csv: run `make data train-regularised`, which takes hours"
    ):
        exec(compile(notebook_code(tmp_path), "notebook", "exec"), {})
