"""Kill a run of a profile at random moments until it is through: `make faults`, or `python -m benchmarks.faults 50`.

A copy of the repository runs the profile once undisturbed and once under SIGKILL. No finished utterance may be computed
again or lost, and the tables must come out the same to the last byte.
"""

import argparse
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def finished(figures: Path) -> dict[Path, int]:
    """The utterances in the store, each with when it was written."""
    return {path.relative_to(figures): path.stat().st_mtime_ns for path in figures.glob("maps/*/*/*.zarr.zip")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kills", type=int, nargs="?", default=50)
    parser.add_argument("--profile", default="mini")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    moments = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "xattn")
        ignored = shutil.ignore_patterns(".git", ".venv", "figures", "train", "__pycache__")
        shutil.copytree(ROOT, copy, ignore=ignored)
        command = [sys.executable, "-m", "xattn.reproduce", f"notebooks/profiles/{arguments.profile}.yaml"]
        figures = copy / "figures" / arguments.profile
        started = time.monotonic()
        subprocess.run(command, cwd=copy, check=True, stdout=subprocess.DEVNULL)
        length = time.monotonic() - started
        expected = {path.name: path.read_bytes() for path in figures.glob("*.csv")}
        shutil.rmtree(figures)
        print(f"undisturbed: {length:.0f} s, {len(expected)} tables", flush=True)
        # A start costs about ten seconds before anything can be lost; the run has to get on all the same.
        longest = 20 + 2 * length / arguments.kills
        for kill in range(1, arguments.kills + 1):
            before = finished(figures)
            process = subprocess.Popen(command, cwd=copy, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                process.wait(moments.uniform(5, longest))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
            time.sleep(2)  # kernels notice that their parent is gone
            after = finished(figures)
            lost = [path for path, written in before.items() if after.get(path) != written]
            if lost:
                sys.exit(f"kill {kill}: {len(lost)} finished utterances lost or computed again: {lost[0]}")
            print(f"kill {kill}: {len(after)} utterances are finished", flush=True)
        subprocess.run(command, cwd=copy, check=True, stdout=subprocess.DEVNULL)
        found = {path.name: path.read_bytes() for path in figures.glob("*.csv")}
        different = sorted(name for name in expected if found.get(name) != expected[name])
        if different or set(found) != set(expected):
            sys.exit(f"the tables differ after {arguments.kills} kills: {', '.join(different)}")
        print(f"{len(found)} tables are the same to the last byte after {arguments.kills} kills.")


if __name__ == "__main__":
    main()
