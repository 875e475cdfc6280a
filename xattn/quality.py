"""How good a model's output is: word error rate after Whisper's text normaliser, BLEU, chrF and, where it is, COMET."""

import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache, partial
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
from xattn.models import S2TModel


@cache
def _normaliser(language: str):
    return EnglishTextNormalizer() if language == "en" else BasicTextNormalizer()


def normalise(text: str, language: str) -> str:
    """Text as Whisper's evaluation compares it: lower case, no punctuation, English numbers as digits."""
    return _normaliser(language)(text).strip()


def wer(references: list[str], hypotheses: list[str], language: str) -> float:
    """Corpus word error rate in percent after Whisper's normaliser (paper, settings), for `language` ("en", "it").

    Raises ValueError where the lists differ in length or a reference has no words.
    """
    if len(references) != len(hypotheses):
        raise ValueError(f"{len(references)} references came with {len(hypotheses)} hypotheses: give one for each.")
    references = [normalise(text, language) for text in references]
    if not all(references):
        raise ValueError(
            f"Reference {references.index('')} has no words after normalisation: leave this utterance out of the WER."
        )
    return 100.0 * jiwer.wer(references, [normalise(text, language) for text in hypotheses])


def bleu(references: list[str], hypotheses: list[str]) -> float:
    """Corpus BLEU, 0 to 100, by sacrebleu's defaults; one reference for each hypothesis."""
    return sacrebleu.corpus_bleu(hypotheses, [references]).score


def chrf(references: list[str], hypotheses: list[str]) -> float:
    """Corpus chrF, 0 to 100, by sacrebleu's defaults; one reference for each hypothesis."""
    return sacrebleu.corpus_chrf(hypotheses, [references]).score


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


def transcribe(model: S2TModel, features: Sequence[Tensor], language: str, batch_size: int = 16) -> list[str]:
    """Beam-search output in `language` of many utterances, features (T, F) each, in batches of similar length."""
    order = sorted(range(len(features)), key=lambda index: len(features[index]))
    texts = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        frames = torch.tensor([len(features[row]) for row in rows])
        padded = torch.nn.utils.rnn.pad_sequence([features[row] for row in rows], batch_first=True)
        mask = (torch.arange(padded.shape[1]) < frames[:, None]).long().to(padded.device)
        texts |= {row: model.text(ids) for row, ids in zip(rows, model.generate(padded, language, mask), strict=True)}
    return [texts[row] for row in range(len(features))]


def quality_table(model: S2TModel, utterances: Sequence[Utterance], setting: str) -> pd.DataFrame:
    """Decode utterances and score the output: WER for recognition; BLEU, chrF and COMET for translation ("en-it").

    Returns a long table with the columns model, setting, metric, value, low, high (95 % bootstrap over utterances) and
    n.
    """
    target = setting.rpartition("-")[2]
    hypotheses = transcribe(model, [model.features(utterance.audio()) for utterance in utterances], target)
    references = [utterance.reference(setting) for utterance in utterances]
    metrics = {"BLEU": bleu, "chrF": chrf} if "-" in setting else {"WER": partial(wer, language=target)}
    rng, n = np.random.default_rng(0), len(utterances)
    resampled = [rng.integers(n, size=n) for _ in range(200)]
    rows = []
    for metric, score in metrics.items():
        scores = [score([references[i] for i in sample], [hypotheses[i] for i in sample]) for sample in resampled]
        low, high = np.percentile(scores, [2.5, 97.5])
        rows.append((model.name, setting, metric, score(references, hypotheses), low, high, n))
    segments = comet([u.transcript for u in utterances], references, hypotheses) if "-" in setting else None
    if segments is not None:
        rows.append((model.name, setting, "COMET", *mean_interval(segments), n))
    return pd.DataFrame(rows, columns=["model", "setting", "metric", "value", "low", "high", "n"])
