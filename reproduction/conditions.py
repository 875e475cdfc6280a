"""Conditions: a model in a direction, such as "base/en". Their stored maps and correlations, with progress."""

import json
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

import xarray as xr

from reproduction.profiles import OCCLUSION, load_profile
from reproduction.tables import ROOT
from xattn.analysis.correlation import correlate_all
from xattn.data.corpus import load_corpus
from xattn.explain import Occlusion
from xattn.models import load_model
from xattn.runs import explain_corpus
from xattn.store import INDEX, load_maps

DEFAULT = "mini"  # profile
LAB, FIRST = "figures/lab/maps", 8  # maps of notebooks that are opened by hand; 8 utterances allow a verdict
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


def load_condition(folder: str | Path, condition: str, first: int | None = None) -> Iterator[xr.Dataset]:
    """Read the maps of a condition from a folder, one utterance at a time, with progress.

    first: how many utterances; by default all. Errors: see `xattn.load_maps`.
    """
    model, direction = condition.split("/")
    stored = islice(load_maps(folder, model, direction), first)
    index = json.loads(Path(folder, model, direction, INDEX).read_text(encoding="utf-8"))
    return progress(stored, f"Utterances of {condition}", len(index) if first is None else min(first, len(index)))


def find_maps(folder: str, conditions: Sequence[str]) -> str:
    """The folder of maps that a notebook reads: the one given or, if it is empty, the best one for exploring.

    That is the default profile's, if it holds all conditions; otherwise figures/lab/maps, where the first few
    utterances are explained with the default profile's settings if they are not there yet.
    """
    if folder:
        return folder
    mini = load_profile(ROOT / "notebooks" / "profiles" / f"{DEFAULT}.yaml")
    finished = f"figures/{DEFAULT}/maps"
    if all(Path(finished, condition, INDEX).is_file() for condition in conditions):
        print(f"Maps: {finished}")
        return finished
    print(f"Maps: {LAB} ({FIRST} utterances; `make reproduce` makes more)", flush=True)
    for condition in conditions:
        if not Path(LAB, condition, INDEX).is_file():
            model, direction = condition.split("/")
            if model not in mini["models"]:
                raise ValueError(
                    f"There are no maps of {condition}, and the profile {DEFAULT} has no model {model}: run "
                    "`make reproduce` for its profile and set maps to their folder."
                )
            language, _, target = direction.partition("-")
            corpus = load_corpus(mini["data"], language=language, split=mini["split"])[:FIRST]
            occlusion = Occlusion(**{key: mini[key] for key in OCCLUSION})
            s2t = load_model(mini["models"][model])
            explain_corpus(s2t, corpus, LAB, translate_to=target or None, occlusion=occlusion)
    return LAB


def correlate_conditions(
    folder: str | Path, conditions: Sequence[str], reduction: str = "2d_max"
) -> dict[str, xr.Dataset]:
    """`xattn.analysis.correlation.correlate_all` for the stored maps of each condition, by condition."""
    slow = progress(conditions, "Correlations of conditions")
    return {each: correlate_all(load_condition(folder, each), reduction) for each in slow}


def estimator_of(folder: str | Path, condition: str) -> str:
    """The estimator of the stored maps of a condition."""
    return next(load_condition(folder, condition)).estimator
