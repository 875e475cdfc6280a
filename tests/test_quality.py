"""Word error rate, BLEU, chrF and COMET against counts by hand and other libraries; intervals of corpus scores."""

import sys
from collections import Counter
from dataclasses import replace

import jiwer
import numpy as np
import pandas as pd
import pytest
import sacrebleu
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.integrate import trapezoid

from xattn.analysis.faithfulness import areas, percentages
from xattn.analysis.quality import (
    bleu,
    chrf,
    comet,
    normalise,
    quality_table,
    score_interval,
    transcribe,
    wer,
    word_error_rate,
)


@pytest.mark.parametrize(
    ("reference", "hypothesis", "percent"),
    [
        ("the dog sleeps here", "the dog sleeps here", 0.0),
        ("the dog sleeps here", "the cat sleeps here", 25.0),  # one substitution
        ("the dog sleeps here", "the dog here", 25.0),  # one deletion
        ("the dog sleeps here", "the big dog sleeps here", 25.0),  # one insertion
        ("the dog sleeps here", "", 100.0),
        ("the dog", "a very large cat indeed", 250.0),  # two substitutions and three insertions
    ],
)
def test_word_error_rate_counted_by_hand(reference, hypothesis, percent):
    assert wer([reference], [hypothesis], "en") == pytest.approx(percent)


def test_word_error_rate_is_a_corpus_rate_not_a_mean_of_rates():
    references = ["yes", "the dog sleeps in the house"]
    assert wer(references, ["no", "the dog sleeps in the house"], "en") == pytest.approx(100 / 7)


def test_normalisation_of_english():
    assert normalise("  Mr. Smith, whose colour is grey: twenty-one! ", "en") == "mister smith whose color is gray 21"
    assert normalise("I can't (really) say", "en") == normalise("i can not say", "en")
    assert wer(["Twenty-one dogs, please."], ["21 dogs please"], "en") == 0


def test_normalisation_of_italian_keeps_accents():
    assert normalise("Perché no? È così!", "it") == "perché no è così"
    assert wer(["perché no"], ["perche no"], "it") == 50.0
    assert wer(["Perche\u0301 no"], ["perch\u00e9 no"], "it") == 0.0  # decomposed and composed
    assert normalise("ventuno", "it") == "ventuno"


@pytest.mark.parametrize("silent", ["", "  ", "?!", "(Applause)", "[Laughter]"])
def test_reference_without_words_is_skipped_and_reported(silent, capsys):
    found = wer(["a dog", silent, "the cat", silent], ["a dog", "a cat", "the dog", ""], "en")
    assert found == 25.0
    message = f"Skipped in the WER: 2 of 4 references without words after normalisation ({silent!r}).\n"
    assert capsys.readouterr().out == message
    with pytest.raises(ValueError, match="None of the 2 references has words after normalisation: give transcripts"):
        wer([silent, "!"], ["a dog", "a cat"], "en")


def test_table_scores_only_utterances_with_words(model, utterances, capsys):
    applause = replace(utterances[0], id="applause", transcript="(Applause)")
    table = quality_table(model, [*utterances, applause], "en").set_index("metric").loc["WER"]
    assert "1 of 3 references" in capsys.readouterr().out
    expected = quality_table(model, utterances, "en").set_index("metric").loc["WER"]
    assert table.n == 2 and table.equals(expected) and capsys.readouterr().out == ""
    assert quality_table(model, [*utterances, applause], "en-it").n.tolist() == [3, 3, 3]


def test_only_one_batch_of_features_is_on_the_device(model, utterances, monkeypatch):
    inputs = [model.features(utterance.audio()).to("meta") for utterance in utterances]  # a device without memory
    batches = []

    def generate(batch, direction, mask):
        batches.append((batch.device.type, mask.device.type))
        return [torch.tensor([2])] * len(batch)

    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: torch.zeros(tensor.shape, device=device))
    monkeypatch.setattr(model, "generate", generate)
    assert transcribe(model, inputs, "en", batch_size=1) == ["", ""] and batches == [("cpu", "cpu")] * 2


def test_lists_of_unequal_length_are_an_error():
    with pytest.raises(ValueError, match="2 references came with 1 hypotheses"):
        wer(["a", "b"], ["a"], "en")


def test_bleu_counted_by_hand():
    # Of 6, 5, 4 and 3 n-grams, 5, 4, 3 and 2 are in the reference.
    assert bleu(["a b c d e f"], ["a b c d e g"]) == pytest.approx(100 * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)
    assert bleu(["a b c d e f", "x y z"], ["a b c d e f", "x y z"]) == pytest.approx(100)


def test_chrf_counted_by_hand():
    reference, hypothesis = "il cane dorme", "il gatto dorme"
    precisions, recalls = [], []
    for size in range(1, 7):
        grams = [
            Counter(text[start : start + size] for start in range(len(text) - size + 1))
            for text in (reference.replace(" ", ""), hypothesis.replace(" ", ""))
        ]
        matches = (grams[0] & grams[1]).total()
        recalls.append(matches / grams[0].total())
        precisions.append(matches / grams[1].total())
    p, r = sum(precisions) / 6, sum(recalls) / 6
    assert chrf([reference], [hypothesis]) == pytest.approx(100 * 5 * p * r / (4 * p + r))


words = st.lists(st.sampled_from(["il", "cane", "non", "dorme,", "mai", "."]), max_size=6).map(" ".join)


@given(st.lists(st.tuples(words.filter(bool), words), min_size=1, max_size=6), st.data())
def test_score_of_drawn_counts_is_the_score_of_their_texts(pairs, data):
    rows = data.draw(st.lists(st.integers(0, len(pairs) - 1), min_size=1, max_size=6))
    references, hypotheses = ([pairs[row][side] for row in rows] for side in (0, 1))
    for metric, oracle in (
        (bleu, sacrebleu.corpus_bleu(hypotheses, [references]).score),
        (chrf, sacrebleu.corpus_chrf(hypotheses, [references]).score),
        (word_error_rate, 100 * jiwer.wer(references, hypotheses)),
    ):
        counts = metric.counts(*zip(*pairs, strict=True))
        assert metric.score(counts[rows]) == pytest.approx(oracle)


REFERENCES = ("a dog", "the cat sleeps in the house", "yes", "we see the bird in a tree", "no", "the end")
HYPOTHESES = ("a dog", "the cat sleeps in", "no", "we see the bird in tree", "no", "an end")


def jackknife(score):
    """score(references, hypotheses) of all pairs, and Student's margin of its pseudo-values."""
    pairs, n = list(zip(REFERENCES, HYPOTHESES, strict=True)), len(REFERENCES)
    value = score(*map(list, zip(*pairs, strict=True)))
    others = [score(*map(list, zip(*pairs[:row], *pairs[row + 1 :], strict=True))) for row in range(n)]
    pseudo_values = [n * value - (n - 1) * other for other in others]
    return value, np.ptp(stats.ttest_1samp(pseudo_values, 0).confidence_interval()) / 2


@pytest.fixture
def table_of_texts(model, utterances, monkeypatch):
    """The table of a direction for utterances with REFERENCES, of which the model makes HYPOTHESES."""
    monkeypatch.setattr("xattn.analysis.quality.transcribe", lambda *_: list(HYPOTHESES))
    spoken = [
        replace(utterances[0], id=str(row), transcript=text, translation=text) for row, text in enumerate(REFERENCES)
    ]
    return lambda direction: quality_table(model, spoken, direction).set_index("metric")


def test_a_word_error_rate_has_the_jackknife_interval_of_its_logarithm(table_of_texts):
    row = table_of_texts("en").loc["WER"]
    words = sum(len(text.split()) for text in REFERENCES)
    assert row.value == pytest.approx(100 * 5 / words)

    def log_rate(references, hypotheses):
        words = sum(len(text.split()) for text in references)
        return np.log(jiwer.wer(references, hypotheses) + 0.5 / words)

    value, margin = jackknife(log_rate)
    assert (row.low, row.high) == pytest.approx((100 * np.exp(value - margin), 100 * np.exp(value + margin)))
    assert 0 < row.low < row.value < row.high and row.n == 6


@pytest.mark.parametrize(
    ("metric", "oracle"),
    [
        ("BLEU", lambda references, hypotheses: sacrebleu.corpus_bleu(hypotheses, [references]).score),
        ("chrF", lambda references, hypotheses: sacrebleu.corpus_chrf(hypotheses, [references]).score),
    ],
)
def test_translation_scores_have_the_jackknife_interval(table_of_texts, metric, oracle):
    row = table_of_texts("en-it").loc[metric]
    value, margin = jackknife(oracle)
    assert (row.low, row.value, row.high) == pytest.approx((value - margin, value, value + margin))
    assert margin > 5
    assert score_interval({"BLEU": bleu, "chrF": chrf}[metric], REFERENCES, HYPOTHESES) == pytest.approx(
        (value, value - margin, value + margin)
    )


def test_tables_name_the_direction(table_of_texts):
    for direction in ("en", "en-it"):
        table = table_of_texts(direction).reset_index()
        assert table.columns.tolist() == ["metric", "model", "direction", "value", "low", "high", "n"]
        assert set(table.direction) == {direction} and set(table.model) == {"tiny"}


def test_comet_has_a_row_whether_or_not_it_is_installed(table_of_texts, monkeypatch):
    segments = [0.9, 0.7, 0.2, 0.6, 0.8, 0.4]
    for installed in (False, True):
        monkeypatch.setattr("xattn.analysis.quality.comet", lambda *_, found=installed: segments if found else None)
        table = table_of_texts("en-it")
        assert table.index.tolist() == ["BLEU", "chrF", "COMET"]
        assert table_of_texts("en").index.tolist() == ["WER"]
        expected = stats.ttest_1samp(segments, 0).confidence_interval() if installed else (np.nan, np.nan)
        found = table.loc["COMET", ["low", "high", "value"]].tolist()
        assert found == pytest.approx([*expected, 0.6 if installed else np.nan], nan_ok=True)
        assert np.isfinite(table.drop("COMET")[["value", "low", "high"]].to_numpy(float)).all()


def test_a_deletion_area_has_the_jackknife_interval():
    """Hypotheses stay as they are up to 40 % of deleted cells and are empty from 45 % on."""
    percent = percentages()
    rows = [
        (str(row), "CA", np.nan, each, reference, hypothesis if each <= 40 else "")
        for row, (reference, hypothesis) in enumerate(zip(REFERENCES, HYPOTHESES, strict=True))
        for each in percent
    ]
    curves = pd.DataFrame(rows, columns=["utterance", "map", "reliability", "percent", "reference", "hypothesis"])

    def area(references, hypotheses):
        words = min(100.0, 100 * jiwer.wer(references, hypotheses))
        return trapezoid(np.where(percent <= 40, words, 100.0), percent) / 100

    value, margin = jackknife(area)
    _, summary = areas(curves, "corpus-capped WER", "en")
    assert summary[["low", "area", "high"]].values[0] == pytest.approx([value - margin, value, value + margin])
    assert margin > 5


COMET_SCORE = """#!{python}
# The command line and output file of unbabel-comet 2.2; the score is the share of equal words.
import argparse, json, pathlib
parser = argparse.ArgumentParser()
for flag in ("-s", "-t", "-r", "--model", "--gpus", "--to_json"):
    parser.add_argument(flag, required=True)
parser.add_argument("--quiet", action="store_true")
a = parser.parse_args()
assert a.model == "Unbabel/wmt22-comet-da"
src, mt, ref = (pathlib.Path(p).read_text().splitlines() for p in (a.s, a.t, a.r))
assert src == ["the dog", "the cat sleeps"]
scores = [sum(x == y for x, y in zip(m.split(), r.split())) / len(r.split()) for m, r in zip(mt, ref, strict=True)]
rows = [dict(src=s, mt=m, ref=r, COMET=c) for s, m, r, c in zip(src, mt, ref, scores, strict=True)]
pathlib.Path(a.to_json).write_text(json.dumps({{a.t: rows}}))
"""


def test_comet_runs_as_a_separate_command(tmp_path, monkeypatch):
    texts = ["the dog", "the\ncat sleeps"], ["il cane", "il gatto dorme"], ["il cane", "il cane dorme"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert comet(*texts) is None
    command = tmp_path / "comet-score"
    command.write_text(COMET_SCORE.format(python=sys.executable))
    command.chmod(0o755)
    assert comet(*texts) == pytest.approx([1.0, 2 / 3])
    command.write_text("#!/bin/sh\necho no such model >&2\nexit 1\n")
    with pytest.raises(RuntimeError, match=r"comet-score failed \(\['no such model'\]\): repair it or remove it"):
        comet(*texts)
