"""Committed numbers against a fresh run: `python -m reproduction.verify PROFILE.yaml ... [--accept]`.

The fresh run goes to figures/fresh/<profile> and leaves the committed files alone. Every table is compared with the
committed one, row by row, within a tolerance, and so are the hashes of corpus and models. --accept replaces the
committed files with the fresh ones.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from reproduction.pipeline import AT_ONCE, CHANGED, NotebookFailed, leave_interrupted, plan, run
from reproduction.profiles import load_profile, without_absent
from reproduction.tables import ROOT

FRESH = "figures/fresh"
# Largest absolute differences that another machine's arithmetic may cause: correlations lie between -1 and 1; areas,
# sizes, WER and BLEU between 0 and 100. All other numbers have to be equal.
CORRELATION, PERCENTAGE = 0.01, 2.0
MEASURED = ("rho", "value", "spread", "area", "low", "high", "corrected_low", "corrected_high", "reliability")
WITHOUT_NOISE = 0.1  # for correlations that were divided by a possibly small number
PERCENTAGES = ("deletion", "insertion", "WER", "BLEU", "chrF", "size")  # names of quantities that are percentages
HASHES = ("data", "models")  # of the provenance


def differences(committed: pd.DataFrame, fresh: pd.DataFrame) -> list[str]:
    """Where a fresh table differs from the committed one by more than its tolerance."""
    if list(committed.columns) != list(fresh.columns) or len(committed) != len(fresh):
        return [f"{len(fresh)} rows of {', '.join(fresh)} instead of {len(committed)} of {', '.join(committed)}"]
    described = (
        committed[[c for c in ("quantity", "metric", "statistic") if c in committed]].astype(str).agg(" ".join, 1)
    )
    percentages = described.str.contains("|".join(PERCENTAGES)).to_numpy()
    # All correlations of findings are without noise, and so is the reference of the errors of rho.
    divided = described.isin(["measured", "reported"]).to_numpy() | ("statistic" in committed)
    tolerance = np.select([percentages, divided], [PERCENTAGE, WITHOUT_NOISE], CORRELATION)
    found = []
    for column in committed.columns.drop("verdict", errors="ignore"):  # follows from the numbers
        old, new = committed[column], fresh[column]
        if pd.api.types.is_float_dtype(old) and pd.api.types.is_float_dtype(new):
            allowed = tolerance if column in MEASURED else WITHOUT_NOISE if column.startswith("reported") else 0.0
            if column.endswith(("low", "high")) and "n" in committed:
                # Student's interval multiplies a change of the standard deviation.
                n = np.maximum(committed.n.fillna(2), 2)
                allowed = allowed * (1 + stats.t.ppf(0.975, n - 1) / np.sqrt(n - 1))
            wrong = ~np.isclose(old, new, rtol=0, atol=allowed, equal_nan=True)
        else:
            wrong = (old.astype(object).fillna("").astype(str) != new.astype(object).fillna("").astype(str)).to_numpy()
        found += [f"row {row + 2}, {column}: {new[row]} instead of {old[row]}" for row in np.flatnonzero(wrong)]
    return found


def compare(committed: Path, fresh: Path) -> list[str]:
    """All differences between the tables of two folders, each with its file."""
    names = sorted({path.name for folder in (committed, fresh) for path in folder.glob("*.csv")})
    if not (names and (committed / "provenance.json").is_file()):
        return [f"there are no tables in {committed}: make them with `make accept`"]
    found = []
    for name in names:
        if not ((committed / name).is_file() and (fresh / name).is_file()):
            found.append(f"{name}: only in {committed if (committed / name).is_file() else fresh}")
        else:
            found += [f"{name}: {text}" for text in differences(*(pd.read_csv(d / name) for d in (committed, fresh)))]
    old, new = (json.loads((folder / "provenance.json").read_text(encoding="utf-8")) for folder in (committed, fresh))
    return found + [f"provenance.json: another hash of {name}" for name in HASHES if old[name] != new[name]]


def accept(committed: Path, fresh: Path) -> None:
    """Replace the committed tables, pictures and provenance with the fresh ones."""
    for path in (path for path in fresh.iterdir() if path.is_file()):
        committed.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, committed / path.name)


def forget_changed(profile: dict) -> None:
    """Delete an earlier fresh run whose maps are out of date: the keys of stored maps do not include the code."""
    jobs = plan(without_absent(profile, ROOT), figures=FRESH)
    if any(job.source.stem == "10_maps" and job.stale == CHANGED for job in jobs):
        shutil.rmtree(ROOT / FRESH / profile["profile"])


def main() -> int:
    """Run the command. Exit code 0: all agree or were accepted; 1: some differ or a notebook failed; 2: wrong input."""
    parser = argparse.ArgumentParser(prog="python -m reproduction.verify", description=__doc__.splitlines()[0])
    parser.add_argument("profiles", type=Path, nargs="+", help="the YAML files of profiles")
    parser.add_argument("--accept", action="store_true", help="replace the committed files with the fresh ones")
    arguments = parser.parse_args()
    agree = True
    for path in arguments.profiles:
        try:
            profile = load_profile(path)
            forget_changed(profile)
            run(path, figures=FRESH, at_once=AT_ONCE)
        except (ValueError, OSError, NotebookFailed) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1 if isinstance(error, NotebookFailed) else 2
        except KeyboardInterrupt:
            leave_interrupted()
        name = profile["profile"]
        committed, fresh = ROOT / "figures" / name, ROOT / FRESH / name
        if arguments.accept:
            accept(committed, fresh)
            print(f"figures/{name} now holds the fresh run; commit it if the change is intended.")
            continue
        found = compare(committed, fresh)
        agree = agree and not found
        print("\n".join(found), end="\n" if found else "")
        verdict = "agrees with a fresh run."
        if found:
            verdict = f"differs in the {len(found)} places above: fix the cause, or update with `make accept`."
        print(f"figures/{name} {verdict}", flush=True)
    return 0 if agree else 1


if __name__ == "__main__":
    sys.exit(main())
