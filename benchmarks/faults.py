"""Kill a run of a profile many times, at random moments: `make faults`, or `python -m benchmarks.faults 50`.

The profile runs in a copy of the repository: first without interruption, then with SIGKILL sent to all its processes
(Linux) again and again. A finished run starts over. The command fails if a finished utterance is lost or computed
again, or if the tables differ by a single byte from those of the uninterrupted run.
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
    """Return the files of stored utterances with their modification times (ns)."""
    return {path.relative_to(figures): path.stat().st_mtime_ns for path in (figures / "maps").rglob("*.zarr.zip")}


def kill_all(pid: int) -> None:
    """Kill a process and all its descendants; notebook kernels have their own sessions and would survive otherwise."""
    children = []
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGSTOP)  # so that it starts no further process
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # the thread has just ended
            children += task.read_text().split()
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    for child in children:
        kill_all(int(child))


def require_same(expected: dict[str, bytes], figures: Path, kills: int) -> None:
    """Exit with an error if the tables differ from the expected contents, by file name."""
    found = {path.name: path.read_bytes() for path in figures.glob("*.csv")}
    different = sorted(name for name in expected | found if found.get(name) != expected.get(name))
    if different:
        sys.exit(f"error: tables differ after {kills} kills: {', '.join(different)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kills", type=int, nargs="?", default=50, help="default: 50")
    parser.add_argument("--profile", default="mini", help="default: mini")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; default: 0")
    arguments = parser.parse_args()
    moments = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        copy, errors = Path(folder, "xattn"), Path(folder, "stderr")
        ignored = shutil.ignore_patterns(".git", ".venv", "figures", "train", "__pycache__")
        shutil.copytree(ROOT, copy, ignore=ignored)
        command = [sys.executable, "-m", "reproduction.pipeline", f"notebooks/profiles/{arguments.profile}.yaml"]
        figures = copy / "figures" / arguments.profile
        started = time.monotonic()
        subprocess.run(command, cwd=copy, check=True, stdout=subprocess.DEVNULL)
        length = time.monotonic() - started
        expected = {path.name: path.read_bytes() for path in figures.glob("*.csv")}
        shutil.rmtree(figures)
        print(f"without interruption: {length:.0f} s, {len(expected)} tables", flush=True)
        # Starting takes about ten seconds; the intervals leave the run enough time to make progress.
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
                sys.exit(f"error: the run failed after {kills} kills:\n{errors.read_text()}")
            kills += process.returncode != 0
            after = finished(figures)
            lost = [path for path, written in before.items() if after.get(path) != written]
            if lost:
                sys.exit(
                    f"error: kill {kills} lost {len(lost)} finished utterances, or they ran again, such as {lost[0]}"
                )
            print(f"kill {kills}: {len(after)} utterances are finished", flush=True)
            if process.returncode == 0:
                require_same(expected, figures, kills)
                shutil.rmtree(figures)
        subprocess.run(command, cwd=copy, check=True, stdout=subprocess.DEVNULL)
        require_same(expected, figures, kills)
        print(f"{len(expected)} tables are identical after {kills} kills.")


if __name__ == "__main__":
    main()
