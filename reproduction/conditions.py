"""Conditions: a model in a direction, such as "base/en". Their stored maps and correlations, with progress."""

import json
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import xarray as xr

from xattn.analysis.correlation import correlate_all
from xattn.store import INDEX, load_maps

QUIET, INTERVAL = 3.0, 20.0  # seconds before the first line of progress, and between two lines

Item = TypeVar("Item")


def progress(items: Iterable[Item], what: str, total: int | None = None) -> Iterator[Item]:
    """Yield items and, if the loop is slow, print how many are done and how much time is left.

    Nothing is printed in the first and in the last three seconds. Whole lines suit notebooks that run side by side and
    share a terminal.

    Args:
        what: the start of each line.
        total: the number of items, if they have no length.
    """
    total = len(items) if total is None and isinstance(items, Collection) else total
    started = time.monotonic()
    due = started + QUIET
    for done, item in enumerate(items):
        now = time.monotonic()
        left = (now - started) / done * (total - done) if done else 0.0
        if now > due and left >= QUIET:
            print(f"{what}: {done} of {total}, about {left:.0f} s left", flush=True)
            due = now + max(INTERVAL, (now - started) / 10)
        yield item


def load_condition(folder: str | Path, condition: str) -> Iterator[xr.Dataset]:
    """Read the maps of a condition from a folder, one utterance at a time, with progress.

    Errors: see `xattn.load_maps`.
    """
    model, direction = condition.split("/")
    stored = load_maps(folder, model, direction)
    index = json.loads(Path(folder, model, direction, INDEX).read_text(encoding="utf-8"))
    return progress(stored, f"Utterances of {condition}", len(index))


def correlate_conditions(
    folder: str | Path, conditions: Sequence[str], reduction: str = "2d_max"
) -> dict[str, xr.Dataset]:
    """`xattn.analysis.correlation.correlate_all` for the stored maps of each condition, by condition."""
    slow = progress(conditions, "Correlations of conditions")
    return {each: correlate_all(load_condition(folder, each), reduction) for each in slow}


def estimator_of(folder: str | Path, condition: str) -> str:
    """The estimator of the stored maps of a condition."""
    return next(load_condition(folder, condition)).estimator
