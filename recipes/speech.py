"""Make the corpus of real recordings that the profile `whisper` explains.

`python -m recipes.speech LibriSpeech italian.csv` writes the utterances of recipes/speech.csv, in its order, to
data/speech, as FLAC files at 16 kHz with a manifest.csv. Each argument is a corpus that `xattn.load_corpus` reads;
together they need to hold all these utterances, or all of one language.
"""

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

from reproduction.tables import ROOT
from xattn.audio import SAMPLE_RATE
from xattn.data.corpus import load_corpus
from xattn.data.manifest import claim, write_audio, write_manifest
from xattn.data.utterance import Utterance

LIST, CORPUS = ROOT / "recipes" / "speech.csv", ROOT / "data" / "speech"
SPLIT = "test"


def chosen(utterances: Sequence[Utterance]) -> list[Utterance]:
    """The utterances of recipes/speech.csv, in its order. ValueError: some of a language are missing, or all are."""
    known = {utterance.id: utterance for utterance in utterances}
    with LIST.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    found = [known[row["id"]] for row in rows if row["id"] in known]
    languages = {utterance.language for utterance in found}
    missing = [row["id"] for row in rows if row["id"] not in known and row["language"] in languages or not found]
    if missing:
        raise ValueError(
            f"{len(missing)} utterances of {LIST} are in none of these corpora, such as {missing[0]}: give the corpora "
            "that it names."
        )
    return found


def write_corpus(utterances: Sequence[Utterance], folder: Path) -> None:
    """Write audio and manifest.csv. ValueError: the folder holds other files, or a recording cannot be read."""
    claim(folder, LIST.name)
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
                "source": LIST.name,
            }
        )
    write_manifest(folder, rows)


def main() -> int:
    """Run the command. Exit code 2: a corpus cannot be read or lacks utterances."""
    parser = argparse.ArgumentParser(prog="python -m recipes.speech", description=__doc__.splitlines()[0])
    parser.add_argument("corpora", nargs="+", type=Path, help="LibriSpeech, or a table of Italian recordings")
    try:
        utterances = chosen([each for corpus in parser.parse_args().corpora for each in load_corpus(corpus)])
        write_corpus(utterances, CORPUS)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{CORPUS / 'manifest.csv'}: {len(utterances)} utterances.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
