"""Maps of the profile `smoke` from SLURM jobs, some of which are cancelled: `python tests/slurm/check.py`.

Needs a cluster (`cluster.sh`), SLURM_CONF, and the results of `make verify PROFILE=smoke`. The check computes the maps
and the tables that only read maps a second time, with WORKERS=slurm:2, in a copy of the repository. When `base` has its
first utterance, the job that explains the second one is cancelled; when `small` has its first one, both jobs are
cancelled. The run must go on by itself, explain every utterance once, give identical maps and tables, and leave no job
and no file behind.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from distributed import Client

from xattn.store import load

ROOT = Path(__file__).resolve().parents[2]
FRESH = Path("figures/fresh/smoke")
AGAIN = ("10_maps-base-en", "10_maps-small-en", "23_heads_and_layers", "24_models_and_tasks")
MAPS, TABLES = ("base", "small"), ("tab3", "tab4")
CANCELLED = {"base/en": 1, "small/en-it": 2}  # jobs, after the first utterance is stored
SECONDS = 600  # to wait for any event; all together take two minutes on two cores


class Run:
    """A run of `reproduction.verify` in a copy of the repository, and what it has stored so far."""

    def __init__(self, copy: Path, environment: dict[str, str], log: Path):
        self.stored, self.maps, self.log = {}, copy / FRESH / "maps", log
        command = [sys.executable, "-m", "reproduction.verify", "notebooks/profiles/smoke.yaml"]
        with log.open("w") as file:
            self.process = subprocess.Popen(command, cwd=copy, env=environment, stdout=file, stderr=subprocess.STDOUT)

    def until(self, condition, what: str):
        """Wait for a true value of the condition and return it; stop with an error if the run ends before."""
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            for path in (path for model in MAPS for path in self.maps.glob(f"{model}/*/*.zarr.zip")):
                file = path.stat()
                if self.stored.setdefault(path, (file.st_ino, file.st_mtime_ns)) != (file.st_ino, file.st_mtime_ns):
                    self.fail(f"{path.name} was stored twice")
            ended = self.process.poll() is not None
            if value := condition():
                return value
            if ended:
                self.fail(f"the run ended before {what}")
            time.sleep(0.1)
        self.fail(f"{what}: not within {SECONDS} s")

    def fail(self, message: str):
        """Stop the run and its jobs, print what it printed, and exit."""
        self.process.kill()
        slurm("scancel", *jobs()) if jobs() else None
        sys.exit(f"{self.log.read_text()}\nerror: {message}")


def slurm(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def jobs() -> list[str]:
    """The ids of the running jobs."""
    return slurm("squeue", "--noheader", "--format=%i", "--states=RUNNING").split()


def cancel(run: Run, condition: str, number: int) -> list[str]:
    """Cancel jobs, the busy one first, as soon as a condition has one utterance; return their ids."""
    model = condition.partition("/")[0]
    run.until(lambda: f"10_maps-{model}-" in run.log.read_text(), f"the maps of {model} started")
    first = run.until(lambda: len(jobs()) == 2 and jobs(), f"two jobs for {condition} ran")[0]
    # Dask's scheduler knows which job is busy; the jobs have its address.
    address = re.search(r"tcp://\S+", slurm("scontrol", "write", "batch_script", first, "-")).group()
    with Client(address) as client:
        run.until(lambda: len(client.processing()) == 2, f"two workers for {condition} came")
        names = client.run(os.getenv, "SLURM_JOB_ID")
        run.until(lambda: list(run.maps.glob(f"{condition}/*.zarr.zip")), f"an utterance of {condition} was stored")

        def one_busy():
            found = [names[worker] for worker, tasks in client.processing().items() if tasks]
            return found if len(found) == 1 else None

        busy = run.until(one_busy, f"one job of {condition} was left busy")
    chosen = sorted(names.values(), key=lambda job: job not in busy)[:number]
    slurm("scancel", *chosen)
    return chosen


def copy_repository(copy: Path) -> None:
    """Copy the repository and its run of smoke, without what has to be computed again."""
    ignored = shutil.ignore_patterns(".*", "figures", "train", "europarl-st", "released", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=ignored)
    for name in ("smoke", "full"):
        shutil.copytree(
            ROOT / "figures" / name, copy / "figures" / name, ignore=shutil.ignore_patterns("maps", "notebooks")
        )
    shutil.copytree(ROOT / FRESH, copy / FRESH)
    for model in MAPS:
        shutil.rmtree(copy / FRESH / "maps" / model)
    for name in AGAIN:
        (copy / FRESH / "notebooks" / f"{name}.ipynb").unlink()
    for name in TABLES:
        (copy / FRESH / f"{name}.csv").unlink()


def files(folder: Path) -> set[Path]:
    """The files of a folder other than results and compiled modules."""
    found = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
    return {path for path in found if FRESH not in path.parents and "__pycache__" not in path.parts}


def differences(copy: Path) -> list[str]:
    """The maps and tables that are not those of the run without SLURM."""
    reference, found = ROOT / FRESH, copy / FRESH
    paths = sorted(path.relative_to(reference) for model in MAPS for path in reference.glob(f"maps/{model}/*/*.zip"))
    different = []
    for path in paths:
        one, two = (load(folder / path).assign_attrs(seconds=None) for folder in (reference, found))
        different += [] if one.identical(two) else [str(path)]
    for name in TABLES:
        one, two = ((folder / f"{name}.csv").read_bytes() for folder in (reference, found))
        different += [] if one == two else [f"{name}.csv"]
    return different


def main() -> None:
    if not (ROOT / FRESH / "provenance.json").is_file():
        sys.exit(f"error: there is no {FRESH} to compare with: run `make verify PROFILE=smoke` first")
    # As many threads as the run without SLURM had, because their number affects rounding.
    threads = max(1, (os.cpu_count() or 1) // 2)
    with tempfile.TemporaryDirectory() as folder:
        copy, cache = Path(folder, "xattn"), Path(folder, "cache")
        copy_repository(copy)
        before = files(copy)
        environment = os.environ | {
            "WORKERS": "slurm:2",
            "DASK_CONFIG": str(copy / "tests/slurm/jobqueue.yaml"),
            "DASK_JOBQUEUE__SLURM__JOB_CPU": str(threads),
            "OMP_NUM_THREADS": str(threads),
            "PYTHONPATH": str(copy),
            "XDG_CACHE_HOME": str(cache),  # for the logs of the jobs
        }
        run = Run(copy, environment, Path(folder, "log"))
        cancelled = [job for condition, number in CANCELLED.items() for job in cancel(run, condition, number)]
        run.until(lambda: run.process.poll() is not None, "the end")
        lines = re.findall(r"^(\S+ \S+) \d+/\d+ (\S+): explained;", run.log.read_text(), re.MULTILINE)
        problems = {
            "exit code": run.process.returncode,
            "explained more or less than once": sorted(lines) if len(lines) != 4 or len(set(lines)) != 4 else [],
            "jobs left behind": jobs(),
            "files left behind": sorted(map(str, files(copy) ^ before)),
            "no log of a job": not list(cache.rglob("dask-worker-*.out")),
        }
        if any(problems.values()):
            run.fail(", ".join(f"{name}: {value}" for name, value in problems.items() if value))
        if different := differences(copy):
            run.fail(f"not as without SLURM: {', '.join(different)}")
    print(f"SLURM: maps and tables are identical after {len(cancelled)} of the jobs were cancelled.")


if __name__ == "__main__":
    main()
