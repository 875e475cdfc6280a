"""Make the corpora of real recordings that the profiles `whisper` and `timit` explain.

`python -m recipes.speech LibriSpeech italian.csv` writes the utterances of recipes/speech.csv, in its order, to
data/speech, as FLAC files at 16 kHz with a manifest.csv and the times of their words where these are known. Each
argument is a corpus that `xattn.load_corpus` reads; together they need to hold all these utterances, or all of one
language. `python -m recipes.speech --corpus timit TIMIT` does the same with recipes/timit.csv and data/timit.
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

from reproduction.tables import ROOT
from xattn.audio import SAMPLE_RATE
from xattn.data.corpus import load_corpus
from xattn.data.manifest import claim, write_audio, write_manifest, write_words
from xattn.data.utterance import Utterance

LISTS = {name: ROOT / "recipes" / f"{name}.csv" for name in ("speech", "timit")}
SPLIT = "test"


def chosen(utterances: Sequence[Utterance], table: Path) -> list[Utterance]:
    """The utterances that a table lists, in its order. ValueError: some of a language are missing, or all are."""
    known = {utterance.id: utterance for utterance in utterances}
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    found = [known[row["id"]] for row in rows if row["id"] in known]
    languages = {utterance.language for utterance in found}
    missing = [row["id"] for row in rows if row["id"] not in known and row["language"] in languages or not found]
    if missing:
        raise ValueError(
            f"{len(missing)} utterances of {table} are in none of these corpora, such as {missing[0]}: give the "
            "corpora that it names."
        )
    return found


def write_corpus(utterances: Sequence[Utterance], folder: Path, source: str) -> None:
    """Write audio, manifest.csv and, if the times of words are known, words.csv.

    source: the name of the list that the utterances are from. ValueError: the folder holds other files, or a recording
    cannot be read.
    """
    claim(folder, source)
    rows = []
    for utterance in utterances:
        audio, name = utterance.audio(), f"audio/{utterance.id}.flac"
        write_audio(folder / name, audio, utterance.id)
        rows.append(
            {
                "id": utterance.id,
                "split": SPLIT,
                "language": utterance.language,
                "audio": name,
                "duration": len(audio) / SAMPLE_RATE,
                "transcript": utterance.transcript,
                "translation": utterance.translation,
                "target_language": utterance.target_language,
                "source": source,
            }
        )
    write_manifest(folder, rows)
    words = {utterance.id: utterance.words for utterance in utterances if utterance.words}
    if words:
        write_words(folder, words)


def main() -> int:
    """Run the command. Exit code 2: a corpus cannot be read or lacks utterances."""
    parser = argparse.ArgumentParser(prog="python -m recipes.speech", description=__doc__.splitlines()[0])
    parser.add_argument("corpora", nargs="+", type=Path, help="LibriSpeech, TIMIT, or a table of Italian recordings")
    parser.add_argument("--corpus", choices=LISTS, default="speech", help="the corpus to make; default: speech")
    arguments = parser.parse_args()
    table, folder = LISTS[arguments.corpus], ROOT / "data" / arguments.corpus
    try:
        known = [each for corpus in arguments.corpora for each in load_corpus(corpus)]
        utterances = chosen(known, table)
        write_corpus(utterances, folder, table.name)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{folder / 'manifest.csv'}: {len(utterances)} utterances.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
