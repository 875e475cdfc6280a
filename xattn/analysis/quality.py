"""Quality of a model's output: word error rate after Whisper's text normaliser, BLEU, chrF and, if installed, COMET."""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path

import jiwer
import numpy as np
import pandas as pd
import sacrebleu
import torch
from sacrebleu.metrics.helpers import extract_all_char_ngrams
from torch import Tensor
from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

from xattn.analysis.intervals import jackknife_interval, mean_interval, rate_interval
from xattn.data.utterance import Utterance
from xattn.models import S2TModel
from xattn.models.errors import NothingToExplain

CHRF_ORDER = 6  # longest character n-grams of chrF


@cache
def _normaliser(language: str):
    return EnglishTextNormalizer() if language == "en" else BasicTextNormalizer()


def normalise(text: str, language: str) -> str:
    """Normalise text as Whisper's evaluation does: lower case, no punctuation, English numbers as digits."""
    return _normaliser(language)(text).strip()


def edits(references: Sequence[str], hypotheses: Sequence[str]) -> np.ndarray:
    """Word edits (substitutions, deletions and insertions) and reference words of each pair: (n, 2)."""
    return np.array([_edits(*pair) for pair in zip(references, hypotheses, strict=True)]).reshape(-1, 2)


def _edits(reference: str, hypothesis: str) -> tuple[int, int]:
    said, written = reference.split(), hypothesis.split()
    if not (said and written):
        return len(said) + len(written), len(said)
    counts = jiwer.process_words(" ".join(said), " ".join(written))
    return counts.substitutions + counts.deletions + counts.insertions, len(said)


@dataclass(frozen=True)
class Metric:
    """A corpus score that depends on the texts only through a row of counts for each pair.

    A jackknife over utterances can then count once and leave out rows.

    counts: maps references and hypotheses to counts (n, k); score: maps counts to a number from 0 to 100 (a WER can
    exceed it).
    """

    counts: Callable[[Sequence[str], Sequence[str]], np.ndarray]
    score: Callable[[np.ndarray], float]

    def __call__(self, references: Sequence[str], hypotheses: Sequence[str]) -> float:
        return float(self.score(self.counts(references, hypotheses)))


def _bleu_counts(references: Sequence[str], hypotheses: Sequence[str]) -> np.ndarray:
    """Lengths, matching n-grams and n-grams of each pair: (n, 2 + 4 + 4)."""
    scorer = sacrebleu.BLEU()
    scores = [scorer.corpus_score([written], [[said]]) for said, written in zip(references, hypotheses, strict=True)]
    return np.array([[score.sys_len, score.ref_len, *score.counts, *score.totals] for score in scores])


def _bleu(counts: np.ndarray) -> float:
    written, said, *ngrams = counts.sum(axis=0).tolist()
    return sacrebleu.BLEU.compute_bleu(ngrams[:4], ngrams[4:], written, said, smooth_method="exp").score


def _chrf_counts(references: Sequence[str], hypotheses: Sequence[str]) -> np.ndarray:
    """Character n-grams of the hypothesis, of the reference and in both, for each order: (n, 6 x 3)."""

    def row(said: str, written: str) -> list[int]:
        orders = zip(*(extract_all_char_ngrams(text, CHRF_ORDER) for text in (said, written)), strict=True)
        # As in sacrebleu, an order that the reference lacks counts for neither side.
        return [n for a, b in orders for n in (b.total() if a else 0, a.total(), (a & b).total())]

    return np.array([row(*pair) for pair in zip(references, hypotheses, strict=True)])


def _chrf(counts: np.ndarray) -> float:
    """F2 of the precision and recall that are averaged over the orders present (Popović 2015)."""
    written, said, matching = counts.sum(axis=0).reshape(CHRF_ORDER, 3).T
    present = (written > 0) & (said > 0)
    if not matching[present].any():
        return 0.0
    precision = (matching[present] / written[present]).mean()
    recall = (matching[present] / said[present]).mean()
    return float(100 * 5 * precision * recall / (4 * precision + recall))


def score_interval(metric: Metric, references: Sequence[str], hypotheses: Sequence[str]) -> tuple[float, float, float]:
    """A corpus score with its 95 % jackknife interval over utterances: value, low, high."""
    counts = metric.counts(references, hypotheses)
    return tuple(float(each) for each in jackknife_interval(lambda rows: metric.score(counts[rows]), len(counts)))


bleu, chrf = Metric(_bleu_counts, _bleu), Metric(_chrf_counts, _chrf)  # with the defaults of sacrebleu
word_error_rate = Metric(edits, lambda counts: 100.0 * counts[:, 0].sum() / counts[:, 1].sum())


def wer(references: Sequence[str], hypotheses: Sequence[str], language: str) -> float:
    """Corpus word error rate in percent after Whisper's normaliser (paper, section 4), for `language` ("en", "it").

    Pairs whose normalised reference has no words, such as "(Applause)", are skipped, and a printed line says so.
    ValueError: the lists differ in length, or no pair is left.
    """
    return word_error_rate(*normalised(references, hypotheses, language))


def normalised(references: Sequence[str], hypotheses: Sequence[str], language: str) -> tuple[list[str], list[str]]:
    """Normalise both for a WER, without the pairs that `wer` skips. ValueError: see `wer`."""
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references came with {len(hypotheses)} hypotheses: give as many.")
    said = {row: text for row, each in enumerate(references) if (text := normalise(each, language))}
    if not said:
        raise ValueError(
            f"None of the {len(references)} references has words after normalisation: give transcripts of what is said."
        )
    if len(said) < len(references):
        silent = dict.fromkeys(repr(text) for row, text in enumerate(references) if row not in said)
        print(
            f"Skipped in the WER: {len(references) - len(said)} of {len(references)} references without words after "
            f"normalisation ({', '.join(silent)})."
        )
    return [*said.values()], [normalise(hypotheses[row], language) for row in said]


def comet(sources: list[str], references: list[str], hypotheses: list[str]) -> list[float] | None:
    """COMET of each segment (Unbabel/wmt22-comet-da) from its own command `comet-score`; None if it is not installed.

    The library needs other versions of numpy and transformers than the kit, so it belongs in an environment of its own
    (`pipx install unbabel-comet`). Its first call downloads the model.
    """
    command = shutil.which("comet-score")
    if command is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for flag, texts in (("-s", sources), ("-t", hypotheses), ("-r", references)):
            files[flag] = Path(folder, f"texts{flag}")
            files[flag].write_text("".join(" ".join(text.split()) + "\n" for text in texts), encoding="utf-8")
        output = Path(folder, "scores.json")
        arguments = [str(part) for item in files.items() for part in item]
        result = subprocess.run(
            [
                *(command, *arguments, "--quiet", "--gpus", str(int(torch.cuda.is_available()))),
                *("--model", "Unbabel/wmt22-comet-da", "--to_json", str(output)),
            ],
            capture_output=True,
            text=True,
        )
        if result.returncode or not output.is_file():
            raise RuntimeError(
                f"comet-score failed ({result.stderr.strip().splitlines()[-1:]}): repair it or remove it from the PATH."
            )
        (segments,) = json.loads(output.read_text(encoding="utf-8")).values()
        return [segment["COMET"] for segment in segments]


def transcribe(model: S2TModel, features: Sequence[Tensor], direction: str, batch_size: int = 16) -> list[str]:
    """Decode many utterances, features (T, F) each, in batches of similar length.

    If padding would change a model's output, batches have equal length.
    """
    lengths = [len(item) for item in features]
    order = sorted(range(len(features)), key=lengths.__getitem__)
    groups = [order] if model.padding_safe else [list(rows) for _, rows in groupby(order, key=lengths.__getitem__)]
    batches = [group[start : start + batch_size] for group in groups for start in range(0, len(group), batch_size)]
    texts = {}
    for rows in batches:
        frames = torch.tensor([len(features[row]) for row in rows])
        padded = torch.nn.utils.rnn.pad_sequence([features[row] for row in rows], batch_first=True)
        mask = (torch.arange(padded.shape[1]) < frames[:, None]).long()
        outputs = model.generate(padded.to(model.device), direction, mask.to(model.device))
        texts |= {row: model.text(ids) for row, ids in zip(rows, outputs, strict=True)}
    return [texts[row] for row in range(len(features))]


def quality_table(model: S2TModel, utterances: Sequence[Utterance], direction: str) -> pd.DataFrame:
    """Decode utterances and score the output: WER for recognition; BLEU, chrF and COMET for translation ("en-it").

    Recordings that are too long for the model are skipped, and a printed line names each.

    Returns:
        A long table with the columns model, direction, metric, value, low, high (95 % interval over utterances) and n,
        the number of utterances scored. COMET is NaN if it is not installed.

    Raises:
        ValueError: no recording is short enough.
    """
    target, features = direction.rpartition("-")[2], {}
    for row, utterance in enumerate(utterances):
        try:
            features[row] = model.features(utterance.audio()).cpu()  # the device holds only one batch of them at a time
        except NothingToExplain as error:
            print(f"{utterance.id} is skipped: {error}")
    if not features:
        raise ValueError(f"All {len(utterances)} recordings are too long for {model.name}: give it others.")
    utterances = [utterances[row] for row in features]
    hypotheses = transcribe(model, [*features.values()], direction)
    references = [utterance.reference(direction) for utterance in utterances]
    translated = "-" in direction
    texts = (references, hypotheses) if translated else normalised(references, hypotheses, target)
    n = len(texts[0])
    if translated:
        found = {name: score_interval(metric, *texts) for name, metric in {"BLEU": bleu, "chrF": chrf}.items()}
        segments = comet([u.transcript for u in utterances], references, hypotheses)
        found["COMET"] = (np.nan, np.nan, np.nan) if segments is None else mean_interval(segments)
    else:
        found = {"WER": tuple(100 * each for each in rate_interval(edits(*texts)))}
    rows = [(model.name, direction, name, *interval, n) for name, interval in found.items()]
    return pd.DataFrame(rows, columns=["model", "direction", "metric", "value", "low", "high", "n"])
