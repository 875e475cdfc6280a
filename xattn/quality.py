"""How good a model's output is: word error rate after Whisper's text normaliser, BLEU, chrF and, where it is, COMET."""

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
from torch import Tensor
from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer

from xattn.compare import mean_interval
from xattn.corpus import Utterance
from xattn.explain import NothingToExplain
from xattn.models import S2TModel

RESAMPLES = 200  # of the utterances, for the intervals of corpus scores


@cache
def _normaliser(language: str):
    return EnglishTextNormalizer() if language == "en" else BasicTextNormalizer()


def normalise(text: str, language: str) -> str:
    """Text as Whisper's evaluation compares it: lower case, no punctuation, English numbers as digits."""
    return _normaliser(language)(text).strip()


def edits(references: Sequence[str], hypotheses: Sequence[str]) -> np.ndarray:
    """Word edits (substitutions, deletions, insertions together) and reference words of each pair: (n, 2)."""
    return np.array([_edits(*pair) for pair in zip(references, hypotheses, strict=True)]).reshape(-1, 2)


def _edits(reference: str, hypothesis: str) -> tuple[int, int]:
    said, written = reference.split(), hypothesis.split()
    if not (said and written):
        return len(said) + len(written), len(said)
    counts = jiwer.process_words(" ".join(said), " ".join(written))
    return counts.substitutions + counts.deletions + counts.insertions, len(said)


@dataclass(frozen=True)
class Metric:
    """A score of a corpus that depends on each pair of texts through a row of counts only.

    A bootstrap over utterances then reads the texts once and draws rows.

    counts: references and hypotheses to counts (n, k); score: counts to a number from 0 to 100 (a WER can exceed it).
    """

    counts: Callable[[Sequence[str], Sequence[str]], np.ndarray]
    score: Callable[[np.ndarray], float]

    def __call__(self, references: Sequence[str], hypotheses: Sequence[str]) -> float:
        return float(self.score(self.counts(references, hypotheses)))


def _sacrebleu(scorer: sacrebleu.metrics.base.Metric) -> Metric:
    """One of sacrebleu's metrics at its defaults, by the two steps that its own bootstrap takes."""
    return Metric(
        lambda references, hypotheses: np.array(scorer._extract_corpus_statistics(hypotheses, [references])),
        lambda counts: scorer._aggregate_and_compute(counts.tolist()).score,
    )


bleu, chrf = _sacrebleu(sacrebleu.BLEU()), _sacrebleu(sacrebleu.CHRF())
word_error_rate = Metric(edits, lambda counts: 100.0 * counts[:, 0].sum() / counts[:, 1].sum())


def wer(references: Sequence[str], hypotheses: Sequence[str], language: str) -> float:
    """Corpus word error rate in percent after Whisper's normaliser (paper, settings), for `language` ("en", "it").

    Pairs whose reference has no words then, such as "(Applause)", are left out, and a printed line says so. Raises
    ValueError where the lists differ in length or no pair is left.
    """
    return word_error_rate(*normalised(references, hypotheses, language))


def normalised(references: Sequence[str], hypotheses: Sequence[str], language: str) -> tuple[list[str], list[str]]:
    """Both normalised for a WER, without the pairs that `wer` leaves out; raises as it does."""
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references came with {len(hypotheses)} hypotheses: give one for each.")
    said = {row: text for row, each in enumerate(references) if (text := normalise(each, language))}
    if not said:
        raise ValueError(
            f"None of the {len(references)} references has words after normalisation: give transcripts of what is said."
        )
    if len(said) < len(references):
        silent = dict.fromkeys(repr(text) for row, text in enumerate(references) if row not in said)
        print(
            f"Left out of the WER: {len(references) - len(said)} of {len(references)} references, which have no words "
            f"after normalisation ({', '.join(silent)})."
        )
    return [*said.values()], [normalise(hypotheses[row], language) for row in said]


def comet(sources: list[str], references: list[str], hypotheses: list[str]) -> list[float] | None:
    """COMET of each segment (Unbabel/wmt22-comet-da) by its own command, `comet-score`; None where it is not installed.

    The library's versions of numpy and transformers exclude ours, so it lives in an environment of its own
    (`pipx install unbabel-comet`); at its first call it fetches its model.
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
                f"comet-score failed ({result.stderr.strip().splitlines()[-1:]}): mend it or take it off the PATH."
            )
        (segments,) = json.loads(output.read_text(encoding="utf-8")).values()
        return [segment["COMET"] for segment in segments]


def transcribe(model: S2TModel, features: Sequence[Tensor], setting: str, batch_size: int = 16) -> list[str]:
    """Beam-search output of many utterances in a setting, features (T, F) each, on any device.

    Batches hold utterances of similar length, or of equal length where padding would change a model's output.
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
        outputs = model.generate(padded.to(model.device), setting, mask.to(model.device))
        texts |= {row: model.text(ids) for row, ids in zip(rows, outputs, strict=True)}
    return [texts[row] for row in range(len(features))]


def quality_table(model: S2TModel, utterances: Sequence[Utterance], setting: str) -> pd.DataFrame:
    """Decode utterances and score the output: WER for recognition; BLEU, chrF and COMET for translation ("en-it").

    Recordings that the model cannot hear, as they are too long for it, are left out, and a printed line names each.

    Returns a long table with the columns model, setting, metric, value, low, high (95 % bootstrap over utterances) and
    n, the number that were scored. ValueError: there are none.
    """
    target, features = setting.rpartition("-")[2], {}
    for row, utterance in enumerate(utterances):
        try:
            features[row] = model.features(utterance.audio()).cpu()  # a device holds one batch of them at a time
        except NothingToExplain as error:
            print(f"{utterance.id} is left out: {error}")
    if not features:
        raise ValueError(f"{model.name} hears none of the {len(utterances)} recordings: give it others.")
    utterances = [utterances[row] for row in features]
    hypotheses = transcribe(model, [*features.values()], setting)
    references = [utterance.reference(setting) for utterance in utterances]
    translated = "-" in setting
    texts = (references, hypotheses) if translated else normalised(references, hypotheses, target)
    rng, n = np.random.default_rng(0), len(texts[0])
    resampled = rng.integers(n, size=(RESAMPLES, n))
    rows = []
    for name, metric in ({"BLEU": bleu, "chrF": chrf} if translated else {"WER": word_error_rate}).items():
        counts = metric.counts(*texts)
        low, high = np.percentile([metric.score(counts[sample]) for sample in resampled], [2.5, 97.5])
        rows.append((model.name, setting, name, metric.score(counts), low, high, n))
    segments = comet([u.transcript for u in utterances], references, hypotheses) if translated else None
    if segments is not None:
        rows.append((model.name, setting, "COMET", *mean_interval(segments), n))
    return pd.DataFrame(rows, columns=["model", "setting", "metric", "value", "low", "high", "n"])
