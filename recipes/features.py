"""Compute training features: `python -m recipes.features CORPUS LANGUAGE`.

CORPUS is a folder with a manifest.csv, such as `python -m xattn.data.europarl` writes, or a table that
`xattn.utterances_from_table` can read. For its training part, the command writes the files that `recipes.train` reads:
    data/train/<language>.npy   log-Mel energies of all utterances, one after the other, float16 (frames, 80)
    data/train/<language>.csv   first frame, number of frames, transcript and translation of each utterance
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
from xattn.data.corpus import load_corpus
from xattn.data.readers import utterances_from_table
from xattn.data.utterance import Utterance
from xattn.files import replacing

COLUMNS = ("id", "start_frame", "frames", "transcript", "translation")


def energies(audio: np.ndarray) -> np.ndarray:
    """Compute log-Mel energies, float16 (frames, 80), of 16 kHz mono audio (samples,), without normalisation."""
    return log_mel(audio).astype(np.float16)


def write_features(
    folder: Path, language: str, utterances: Iterable[tuple[dict, np.ndarray]], columns: Sequence[str]
) -> int:
    """Write <language>.npy and <language>.csv; if this fails, earlier files are kept.

    Args:
        folder: where to write.
        utterances: for each utterance, its row of the table, without start_frame and frames, and its `energies`.
        columns: of the table.

    Returns:
        The number of utterances.
    """
    rows, frames = [], 0
    with replacing(folder / f"{language}.npy") as path, open(path, "wb") as file:
        _write_header(file, 0)
        for row, features in utterances:
            file.write(features.tobytes())
            rows.append({**row, "start_frame": frames, "frames": len(features)})
            frames += len(features)
        _write_header(file, frames)
    write_table(folder / f"{language}.csv", pd.DataFrame(rows, columns=columns))
    return len(rows)


def with_progress(items: Iterable, label: str, count: int) -> Iterator:
    """Yield the items unchanged; print the time left after every thousandth item and after the last of `count`."""
    started = time.monotonic()
    for number, item in enumerate(items, start=1):
        yield item
        if number % 1000 == 0 or number == count:
            elapsed = time.monotonic() - started
            left = elapsed / number * (count - number)
            print(f"{label} {number}/{count}, {elapsed:.0f} s, {left:.0f} s left", flush=True)


def in_parallel(function: Callable, items: Iterable, processes: int) -> Iterator:
    """Apply a function to each item in several processes; yield the results in the order of the items."""
    with Pool(processes) as pool:
        yield from pool.imap(function, items, chunksize=8)


def write_table(path: Path, *tables: pd.DataFrame) -> None:
    """Write tables with an `id` column as one CSV file, sorted by id."""
    joined = pd.concat([table for table in tables if len(table)]).sort_values("id", kind="stable")
    with replacing(path) as temporary:
        joined.to_csv(temporary, index=False, lineterminator="\n")


def _write_header(file, frames: int) -> None:
    # NumPy pads the header so that the first axis can grow: the header can be rewritten once the size is known.
    file.seek(0)
    header = {"descr": "<f2", "fortran_order": False, "shape": (frames, N_MELS)}
    np.lib.format.write_array_header_1_0(file, header)


def select_utterances(corpus: Path, language: str, split: str) -> list[Utterance]:
    """Load the utterances of a corpus folder or table in a language and split. ValueError: there are none."""
    if corpus.is_dir():
        return load_corpus(corpus, language=language, split=split)
    found = [u for u in utterances_from_table(corpus) if (u.language, u.split) == (language, split)]
    if not found:
        raise ValueError(
            f"{corpus} has no utterance in language {language!r} and split {split!r}: choose another language or split."
        )
    return found


def utterance_features(utterance: Utterance) -> tuple[dict, np.ndarray | str]:
    """Return a row of the table and `energies`, or instead of these the reason why the utterance cannot be used."""
    row = {"id": utterance.id, "transcript": utterance.transcript, "translation": utterance.translation}
    if not utterance.transcript.strip():
        return row, "it has no transcript"
    try:
        return row, energies(utterance.audio())
    except (OSError, ValueError) as error:
        return row, str(error)


def make_features(corpus: Path, language: str, split: str, data: Path, processes: int) -> None:
    """Write data/train/<language>.npy and .csv; skip and report utterances that cannot be used.

    ValueError, OSError: no utterance can be used, or reading or writing failed; nothing is written then.
    """
    utterances = select_utterances(corpus, language, split)
    results = in_parallel(utterance_features, utterances, processes)

    def usable() -> Iterator[tuple[dict, np.ndarray]]:
        some = False
        for row, features in with_progress(results, f"{language}: train", len(utterances)):
            if isinstance(features, str):
                print(f"{row['id']} is skipped: {features}", flush=True)
            else:
                some = True
                yield row, features
        if not some:
            raise ValueError(
                f"None of the {len(utterances)} utterances of {corpus} can be used: fix what the lines above report."
            )

    number = write_features(data / "train", language, usable(), COLUMNS)
    print(f"{language}: {number} utterances written to {data / 'train'}")


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, help="folder with a manifest.csv, or a CSV or Parquet table")
    parser.add_argument("language", help="spoken language, such as en")
    parser.add_argument("--split", default="train", help="part of the corpus; default: train")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder to write train/ to; default: data")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="default: the number of cores")
    options = parser.parse_args(arguments)
    try:
        make_features(options.corpus, options.language, options.split, options.data, options.processes)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
