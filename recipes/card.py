"""Decode the test set with a trained model and write its model card: `python -m recipes.card base`."""

import argparse
import time
from pathlib import Path

import pandas as pd
import torch

from recipes.synthesise import PUNCTUATION
from recipes.train import OTHER, SHIPPED, Recipe, select_recipes
from xattn.analysis.quality import bleu, chrf, transcribe, wer
from xattn.data.corpus import load_corpus
from xattn.models import load_model

CARD = """# mini-{name}

A miniature Conformer {task}, trained on the synthetic corpus in this repository.
{origin}
It is made to be explained, not to be used: it knows only the {types} word types of that corpus.

| | |
|---|---|
| architecture | {encoder_layers} Conformer encoder layers and {decoder_layers} Transformer decoder layers, \
{heads} heads, width {d_model}, subsampling 4, {parameters:.2f} M parameters |
| output | {languages}; SentencePiece unigram, {vocabulary} tokens; the first decoder token is the language tag |
| training data | {sentences:,} sentences, {hours:.1f} h (`make data`) |
| objective | label-smoothed cross-entropy ({label_smoothing}) + {intermediate_ctc} CTC after encoder \
layer {ctc_layer} + {final_ctc} CTC on the encoder output; SpecAugment |
| command | `python -m recipes.train {name}` ({steps:,} steps, seed {seed}; {minutes:.0f} minutes on {cores} cores, \
torch {torch}) |
| weights | stored in float16, computed in float32; hash {weights} |
| licence | Apache-2.0 |

`training_log.csv` holds the losses during training and, at some steps, WER and BLEU on dev.

## Quality on test

Beam search with 5 beams and no repeated 5-gram. The voices and sentences are not in the training data. WER is in
percent, after Whisper's text normaliser; BLEU and chrF are computed with sacrebleu. {decoding}

{tables}
"""


def write_card(recipe: Recipe, data: Path) -> None:
    """Decode the test set and write data/models/<name>/README.md.

    The card has the WER of each language, in total, by SNR and by voice, and BLEU and chrF of each translation.

    data: folder of the corpus, with its training tables and models.
    """
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
        tables += [error_rates(table, column, language) for column in ("language", "SNR (dB)", "voice")]
        if translated:
            texts_of_pair = [u.translation for u in corpus], outputs[OTHER[language]]
            scores = f"{bleu(*texts_of_pair):.1f} | {chrf(*texts_of_pair):.1f}"
            line = f"| {language}-{OTHER[language]} | {len(corpus)} | {scores} |"
            tables.append(f"| translation | utterances | BLEU | chrF |\n|---|---|---|---|\n{line}")
    card = CARD.format(
        **vars(recipe) | {"languages": ", ".join(recipe.languages), "steps": recipe.steps},
        task="speech recogniser and translator" if translated else "speech recogniser",
        origin="It was trained from scratch."
        if recipe.encoder_from is None
        else f"Its encoder started from that of mini-{recipe.encoder_from}, with every layer repeated; its decoder was "
        "trained from scratch.",
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


def error_rates(table: pd.DataFrame, column: str, language: str) -> str:
    """Return a Markdown table with the corpus WER (percent) for each value of a column.

    table: one row for each utterance, with the columns reference, hypothesis and `column`.
    language: of the texts, for the normaliser.
    """
    lines = [f"| {column} | utterances | WER |", "|---|---|---|"]
    for value, part in table.groupby(column):
        value = f"{value:g}" if isinstance(value, float) else value
        lines.append(f"| {value} | {len(part)} | {wer(list(part.reference), list(part.hypothesis), language):.1f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=SHIPPED, help=f"names of recipes; default: {' '.join(SHIPPED)}")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the corpus; default: data")
    arguments = parser.parse_args()
    for recipe in select_recipes(arguments.models, parser):
        write_card(recipe, arguments.data)


if __name__ == "__main__":
    main()
