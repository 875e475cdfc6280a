"""Measure a trained model on the test set and write its card: `python -m recipes.card base`."""

import argparse
import time
from pathlib import Path

import pandas as pd
import torch

from recipes.synthesise import PUNCTUATION
from recipes.train import OTHER, SHIPPED, Recipe, named_recipes
from xattn.corpus import load_corpus
from xattn.models import load_model
from xattn.quality import bleu, chrf, transcribe, wer

CARD = """# mini-{name}

A Conformer {task} in miniature, trained {origin} on the synthetic corpus beside it. It exists to be
explained, not to be used: it knows the {types} word types of that corpus and no others.

| | |
|---|---|
| architecture | {encoder_layers} Conformer and {decoder_layers} Transformer decoder layers, {heads} heads, \
width {d_model}, subsampling 4, {parameters:.2f} M parameters |
| output | {languages}; SentencePiece unigram, {vocabulary} tokens; the language tag is the first decoder token |
| training data | {sentences:,} sentences, {hours:.1f} h (`make data`) |
| objective | label-smoothed cross-entropy ({label_smoothing}) + {intermediate_ctc} CTC after encoder \
layer {ctc_layer} + {final_ctc} CTC on the encoder output; SpecAugment |
| command | `python -m recipes.train {name}` ({steps:,} steps, seed {seed}; {minutes:.0f} minutes on {cores} cores, \
torch {torch}) |
| weights | float16, computed with in float32; hash {weights} |
| licence | Apache-2.0 |

`training_log.csv` has the losses along the way and, where they were measured, WER and BLEU on dev.

## Quality on test

Beam search with 5 beams and no repeated 5-gram; voices and sentences are not in the training data. WER in percent,
after Whisper's text normaliser; BLEU and chrF by sacrebleu. {decoding}

{tables}
"""


def write_card(recipe: Recipe, data: Path) -> None:
    """Decode the test set and write data/models/<name>/README.md with WER overall, by SNR and by voice."""
    folder = data / "models" / recipe.name
    model = load_model(folder)
    log = pd.read_csv(folder / "training_log.csv")
    training = pd.concat(pd.read_csv(data / "train" / f"{language}.csv") for language in recipe.languages)
    texts = [*training.transcript, *(training.translation if recipe.translation_from is not None else [])]
    tables, seconds, utterances, translated = [], 0.0, 0, recipe.translation_from is not None
    for language in recipe.languages:
        corpus = load_corpus(data, language=language, split="test")
        features = [model.features(utterance.audio()) for utterance in corpus]
        targets = [language, OTHER[language]] if translated else [language]
        started = time.monotonic()
        outputs = {target: transcribe(model, features, target) for target in targets}
        seconds += time.monotonic() - started
        utterances += len(corpus) * len(targets)
        table = pd.DataFrame(
            {"reference": u.transcript, "hypothesis": h, "voice": u.voice, "SNR (dB)": u.snr, "language": u.language}
            for u, h in zip(corpus, outputs[language], strict=True)
        )
        tables += [by(table, column, language) for column in ("language", "SNR (dB)", "voice")]
        if translated:
            pair = [u.translation for u in corpus], outputs[OTHER[language]]
            line = f"| {language}-{OTHER[language]} | {len(corpus)} | {bleu(*pair):.1f} | {chrf(*pair):.1f} |"
            tables.append(f"| translation | utterances | BLEU | chrF |\n|---|---|---|---|\n{line}")
    card = CARD.format(
        **vars(recipe) | {"languages": ", ".join(recipe.languages), "steps": recipe.steps},
        task="speech recogniser and translator" if translated else "speech recogniser",
        origin="from scratch"
        if recipe.encoder_from is None
        else f"(the decoder from scratch, the encoder from that of mini-{recipe.encoder_from}, its layers repeated)",
        types=len({word.strip(PUNCTUATION).lower() for text in texts for word in text.split()}),
        parameters=sum(parameter.numel() for parameter in model.network.parameters()) / 1e6,
        sentences=len(training),
        hours=training.frames.sum() / 360_000,
        ctc_layer=model.config.ctc_encoder_layer,
        minutes=log.seconds.iloc[-1] / 60,
        cores=torch.get_num_threads(),
        torch=torch.__version__,
        weights=model.weights_hash,
        decoding=f"Decoding {utterances} outputs took {seconds:.0f} s.",
        tables="\n\n".join(tables),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    print(f"{recipe.name}: card written to {folder / 'README.md'}", flush=True)


def by(table: pd.DataFrame, column: str, language: str) -> str:
    """WER of each value of a column, as a Markdown table."""
    lines = [f"| {column} | utterances | WER |", "|---|---|---|"]
    for value, part in table.groupby(column):
        value = f"{value:g}" if isinstance(value, float) else value
        lines.append(f"| {value} | {len(part)} | {wer(list(part.reference), list(part.hypothesis), language):.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=SHIPPED, help="the shipped ones by default")
    parser.add_argument("--data", type=Path, default=Path("data"))
    arguments = parser.parse_args()
    for recipe in named_recipes(arguments.models, parser):
        write_card(recipe, arguments.data)


if __name__ == "__main__":
    main()
