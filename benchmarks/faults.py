"""Kill a run of a profile at random moments, many times: `make faults`, or `python -m benchmarks.faults 50`.

A copy of the repository runs the profile once undisturbed, then under SIGKILL of all its processes (Linux); whenever it
is through, it starts anew. No finished utterance may be computed again or lost, and the tables must come out the same
to the last byte.
"""

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def finished(figures: Path) -> dict[Path, int]:
    """The utterances in the store, each with when it was written."""
    return {path.relative_to(figures): path.stat().st_mtime_ns for path in (figures / "maps").rglob("*.zarr.zip")}


def kill_all(pid: int) -> None:
    """Kill a process and everything it started: kernels have sessions of their own and would live on for a while."""
    children = []
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)  # lest it starts another meanwhile
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # a thread that has just ended
            children += task.read_text().split()
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    for child in children:
        kill_all(int(child))


def require_same(expected: dict[str, bytes], figures: Path, kills: int) -> None:
    found = {path.name: path.read_bytes() for path in figures.glob("*.csv")}
    different = sorted(name for name in expected | found if found.get(name) != expected.get(name))
    if different:
        sys.exit(f"the tables differ after {kills} kills: {', '.join(different)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kills", type=int, nargs="?", default=50)
    parser.add_argument("--profile", default="mini")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    moments = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        copy, errors = Path(folder, "xattn"), Path(folder, "stderr")
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
        longest, kills = 20 + 2 * length / arguments.kills, 0
        while kills < arguments.kills:
            before = finished(figures)
            with errors.open("w") as stderr:
                process = subprocess.Popen(command, cwd=copy, stdout=subprocess.DEVNULL, stderr=stderr)
            try:
                process.wait(moments.uniform(5, longest))
            except subprocess.TimeoutExpired:
                kill_all(process.pid)
                process.wait()
            if process.returncode not in (0, -signal.SIGKILL):
                sys.exit(f"the run failed by itself after {kills} kills:\n{errors.read_text()}")
            kills += process.returncode != 0
            after = finished(figures)
            lost = [path for path, written in before.items() if after.get(path) != written]
            if lost:
                sys.exit(f"kill {kills}: {len(lost)} finished utterances lost or computed again: {lost[0]}")
            print(f"kill {kills}: {len(after)} utterances are finished", flush=True)
            if process.returncode == 0:
                require_same(expected, figures, kills)
                shutil.rmtree(figures)
        subprocess.run(command, cwd=copy, check=True, stdout=subprocess.DEVNULL)
        require_same(expected, figures, kills)
        print(f"{len(expected)} tables are the same to the last byte after {kills} kills.")


if __name__ == "__main__":
    main()
