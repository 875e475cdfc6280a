"""How good a model's output is: word error rate after Whisper's text normaliser, BLEU and chrF."""

from functools import cache

import jiwer
import sacrebleu
from whisper_normalizer.basic import BasicTextNormalizer
from whisper_normalizer.english import EnglishTextNormalizer


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
