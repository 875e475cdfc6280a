"""Training features: `python -m recipes.features CORPUS LANGUAGE` writes what `recipes.train` reads.

CORPUS is a folder with a manifest.csv, such as `python -m xattn.europarl` makes, or a table of recordings as
`xattn.utterances_from_table` reads it. Of its training part come
    data/train/<language>.npy   log-Mel energies of all utterances, one after the other, float16 (frames, 80)
    data/train/<language>.csv   which frames are whose, with transcript and translation
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import pandas as pd

from xattn.audio import N_MELS, log_mel
from xattn.corpus import Utterance, load_corpus
from xattn.sources import utterances_from_table
from xattn.store import replacing

COLUMNS = ("id", "start_frame", "frames", "transcript", "translation")


def energies(audio: np.ndarray) -> np.ndarray:
    """Log-Mel energies (frames, 80) of 16 kHz mono audio, before any normalisation, as they are stored."""
    return log_mel(audio).astype(np.float16)


def write_features(folder: Path, language: str, made: Iterable[tuple[dict, np.ndarray]], columns: Sequence[str]) -> int:
    """Write the training part of a language, whole or not at all, from rows and `energies`; the number of utterances.

    Columns are those of the table; start_frame and frames are filled in here.
    """
    rows, frames = [], 0
    with replacing(folder / f"{language}.npy") as path, open(path, "wb") as file:
        _write_header(file, 0)
        for row, features in made:
            file.write(features.tobytes())
            rows.append({**row, "start_frame": frames, "frames": len(features)})
            frames += len(features)
        _write_header(file, frames)
    write_table(folder / f"{language}.csv", pd.DataFrame(rows, columns=columns))
    return len(rows)


def told(made: Iterable, what: str, count: int) -> Iterator:
    """The same items, with a line on the time left at every thousandth and at the last of `count`."""
    started = time.monotonic()
    for number, item in enumerate(made, start=1):
        yield item
        if number % 1000 == 0 or number == count:
            elapsed = time.monotonic() - started
            left = elapsed / number * (count - number)
            print(f"{what} {number}/{count}, {elapsed:.0f} s, {left:.0f} s left", flush=True)


def in_parallel(function: Callable, items: Iterable, processes: int) -> Iterator:
    """`function` of each item, in their order."""
    with Pool(processes) as pool:
        yield from pool.imap(function, items, chunksize=8)


def write_table(path: Path, *tables: pd.DataFrame) -> None:
    joined = pd.concat([table for table in tables if len(table)]).sort_values("id", kind="stable")
    with replacing(path) as temporary:
        joined.to_csv(temporary, index=False, lineterminator="\n")


def _write_header(file, frames: int) -> None:
    # NumPy leaves room in the header for a growing first axis, so it can be written again when the size is known.
    file.seek(0)
    header = {"descr": "<f2", "fortran_order": False, "shape": (frames, N_MELS)}
    np.lib.format.write_array_header_1_0(file, header)


def training_part(corpus: Path, language: str, split: str) -> list[Utterance]:
    """The utterances of a corpus folder or table in a language and split. ValueError: there are none."""
    if corpus.is_dir():
        return load_corpus(corpus, language=language, split=split)
    found = [u for u in utterances_from_table(corpus) if (u.language, u.split) == (language, split)]
    if not found:
        raise ValueError(f"{corpus} has no utterance of language {language!r} and split {split!r}: give others.")
    return found


def utterance_features(utterance: Utterance) -> tuple[dict, np.ndarray | str]:
    """A row of the table and `energies`, or what is wrong with the recording or its transcript."""
    row = {"id": utterance.id, "transcript": utterance.transcript, "translation": utterance.translation}
    if not utterance.transcript.strip():
        return row, "it has no transcript"
    try:
        return row, energies(utterance.audio())
    except (OSError, ValueError) as error:
        return row, str(error)


def make_features(corpus: Path, language: str, split: str, data: Path, processes: int) -> None:
    """Write data/train/<language>.npy and .csv; what cannot be used is left out and named.

    ValueError, OSError: one sentence; nothing is written then.
    """
    utterances = training_part(corpus, language, split)
    made = told(in_parallel(utterance_features, utterances, processes), f"{language}: train", len(utterances))

    def usable() -> Iterator[tuple[dict, np.ndarray]]:
        some = False
        for row, features in made:
            if isinstance(features, str):
                print(f"{row['id']} is left out: {features}", flush=True)
            else:
                some = True
                yield row, features
        if not some:
            raise ValueError(f"None of the {len(utterances)} utterances of {corpus} can be used: see above.")

    number = write_features(data / "train", language, usable(), COLUMNS)
    print(f"{language}: {number} utterances written to {data / 'train'}")


def main(arguments: list[str] | None = None) -> None:
    """The command line; see the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("language")
    parser.add_argument("--split", default="train", help="of the corpus; train by default")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args(arguments)
    try:
        make_features(options.corpus, options.language, options.split, options.data, options.processes)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
