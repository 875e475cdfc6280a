"""Every table and figure of a profile: ``python -m xattn.reproduce notebooks/profiles/mini.yaml [--dry-run]``.

Runs the notebooks of STEPS with the profile's parameters and keeps the executed copies in figures/<profile>/notebooks.
A step runs again only when something it depends on has changed: cells, parameters, package, model, corpus, upstream.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import chdir
from dataclasses import dataclass, replace
from pathlib import Path

from xattn.corpus import load_corpus
from xattn.explain import Occlusion
from xattn.interop import SALIENCY
from xattn.models import load_model
from xattn.profiles import OCCLUSION, load_profile, require_inputs, without_absent
from xattn.provenance import (
    ROOT,
    cells,
    digest,
    digest_file,
    digest_files,
    digest_model,
    provenance,
    recorded,
    versions,
)
from xattn.runs import cost
from xattn.tables import PAPER

# Two notebooks of half the threads each lose less time than one with all; with workers the maps have the machine.
AT_ONCE = 1 if os.environ.get("WORKERS") else min(2, os.cpu_count() or 1)


def table(name: str) -> tuple[str, ...]:
    """The files of a table: long, in the paper's arrangement, and as a picture."""
    return f"{name}.csv", f"{name}.md", f"{name}.png"


@dataclass(frozen=True)
class Step:
    """A notebook, the parameters passed to it, the files it writes below figures/<profile>, the steps it reads from.

    `model` is the model's folder for a step that loads it, its name in the store for one that reads another's maps.
    """

    notebook: str
    parameters: tuple[str, ...]
    outputs: tuple[str, ...]  # {model} and {setting} stand for each that the step was run with
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()  # steps to wait for, without depending on what they give
    per_source: bool = False  # once for every model and source language, not only for the profile's first
    translations: tuple[str, ...] = ()  # outputs that are written where the profile has a translation


CHANGED = "something it depends on has changed"

LOAD = ("profile", "data", "model", "split", "device")
READ = ("profile", "output", "maps")
MAPS = ("10_maps",)

STEPS = (
    Step(
        "10_maps", (*LOAD, *OCCLUSION, "utterances", "maps", "settings"), ("maps/{model}/{setting}",), per_source=True
    ),
    Step("22_quality", (*READ, "data", "models", "pairs", "split", "device"), table("tab2"), needs=MAPS),
    Step("21_reduction", (*READ, "models", "pairs", "device"), table("tab1"), needs=MAPS),
    # Both decode again with the reduced map deleted; the second finds the first one's texts.
    Step("26_deletion", (*READ, "models", "pairs", "device"), table("tab6"), needs=MAPS, after=("21_reduction",)),
    Step("28_estimators", ("profile", "output", "maps", "pairs"), ("estimators.csv", "estimators.png"), needs=MAPS),
    Step(
        "29_superpixels",
        (*READ, "data", "models", "pairs", "split", "device", "utterances", *OCCLUSION[:-2]),
        ("superpixels.csv", "superpixels.png"),
        needs=MAPS,
    ),
    # Not first: the maps are, as nearly all else waits for them, and this one fills a gap.
    Step("00_overview", (*LOAD, "output"), ("fig1.png",)),
    Step("23_heads_and_layers", (*READ, "pairs"), table("tab3"), needs=MAPS),
    Step("24_models_and_tasks", (*READ, "pairs"), table("tab4"), needs=MAPS),
    Step("25_context_mixing", (*READ, "pairs"), table("tab5"), needs=MAPS),
    Step(
        "30_heatmaps",
        (*READ, "data", "pairs"),
        ("fig2.png", "fig2.svg"),
        needs=MAPS,
        translations=("fig2_translation.png", "fig2_translation.svg"),
    ),
    Step("90_findings", (*READ, "data", "pairs"), ("findings.csv",), needs=(*MAPS, "21_reduction", "26_deletion")),
)

# Where the maps come from files of other tools: no model loads, so nothing can be decoded or explained again, and
# tab1 and tab2 hold what needs maps alone.
FROM_MAPS = (
    *("22_quality", "21_reduction", "23_heads_and_layers", "24_models_and_tasks", "25_context_mixing"),
    *("30_heatmaps", "90_findings"),
)
RELEASED_STEPS = (
    Step(
        "11_released",
        ("profile", "maps", "model", "settings", "subsampling"),
        ("maps/{model}/{setting}",),
        per_source=True,
    ),
    *(
        replace(
            step,
            # such a profile has neither of the two
            parameters=tuple(name for name in step.parameters if name not in ("split", "device")),
            needs=("11_released", *(need for need in step.needs if need in FROM_MAPS)),
        )
        for step in STEPS
        if step.notebook in FROM_MAPS
    ),
)


class NotebookFailed(RuntimeError):
    """A notebook stopped at an error, or did not write what its step lists."""


@dataclass(frozen=True)
class Job:
    """One execution of a step: its parameters, the hash of all it depends on, and why it must run ("" = current)."""

    name: str
    source: Path
    copy: Path
    parameters: dict
    outputs: list[Path]
    inputs: str
    stale: str
    after: tuple[str, ...]  # names of the steps to wait for
    note: str  # put into the captions of its tables


def steps_of(profile: dict, root: Path) -> tuple[Step, ...]:
    """The steps of a profile: all, or those that can start from released files, some of which may lack SM^H."""
    if "released" not in profile:
        return STEPS
    folders = [
        root / profile["models"][model] / setting for model, each in profile["settings"].items() for setting in each
    ]
    whole = all((folder / SALIENCY["encoder"]).is_file() for folder in folders)
    return tuple(step for step in RELEASED_STEPS if whole or step.notebook != "25_context_mixing")


def plan(
    profile: dict, root: Path = ROOT, steps: tuple[Step, ...] | None = None, figures: str = "figures"
) -> list[Job]:
    """The executions a profile asks for, in order, each with what it depends on and whether it is current.

    steps: the profile's own by default.
    """
    folder = f"{figures}/{profile['profile']}"
    output = root / folder
    common = {**profile, "output": folder, "maps": f"{folder}/maps"}
    if "released" in profile:
        common["models"] = {}  # the profile's are folders of files, and nothing in them loads
    common["pairs"] = [f"{model}/{setting}" for model, settings in profile["settings"].items() for setting in settings]
    translates = any("-" in setting for settings in profile["settings"].values() for setting in settings)
    code = [digest_files(root / "xattn", "**/*.py"), versions(), digest_file(PAPER)]
    contents = {profile["data"]: digest_files(root / profile["data"], "*")}
    sources = [
        (model, [setting for setting in settings if setting.split("-")[0] == source])
        for model, settings in profile["settings"].items()
        for source in dict.fromkeys(setting.split("-")[0] for setting in settings)
    ]
    note = f"Not run: {', '.join(profile['not_run'])}." if profile.get("not_run") else ""
    jobs, hashes = [], {}
    for step in steps or steps_of(profile, root):
        path = root / "notebooks" / f"{step.notebook}.ipynb"
        for model, settings in sources if step.per_source else sources[:1]:
            folder = profile["models"][model]
            values = {"model": model if step.needs else folder, "settings": settings, "setting": settings[0]}
            parameters = {key: {**common, **values}[key] for key in step.parameters}
            if folder not in contents:
                contents[folder] = digest_model(root, folder)
            used = [contents[parameters[key]] for key in ("data", "model") if parameters.get(key) in contents]
            inputs = digest([cells(path), parameters, code, used, [hashes[need] for need in step.needs]])
            hashes.setdefault(step.notebook, []).append(inputs)
            name = f"{step.notebook}-{model}-{settings[0].split('-')[0]}" if step.per_source else step.notebook
            copy = output / "notebooks" / f"{name}.ipynb"
            names = (*step.outputs, *(step.translations if translates else ()))
            files = [file.format(model=model, setting=setting) for file in names for setting in settings]
            outputs = [output / file for file in dict.fromkeys(files)]
            missing = [file.name for file in outputs if not file.exists()]
            stale = "not run yet" if not copy.exists() else f"{missing[0]} is missing" if missing else ""
            if not stale and recorded(copy).get("inputs") != inputs:
                stale = CHANGED
            waits = (*step.needs, *step.after)
            jobs.append(Job(name, path, copy, parameters, outputs, inputs, stale, waits, note))
    return jobs


def check_parameters(job: Job) -> None:
    """Refuse what papermill only warns of: a parameter that the notebook's parameters cell does not declare."""
    import papermill

    unknown = job.parameters.keys() - papermill.inspect_notebook(str(job.source)).keys()
    if unknown:
        names = ", ".join(sorted(unknown))
        raise ValueError(f"{job.source.name} does not declare {names} in its parameters cell; declare it or drop it.")


def execute(job: Job, root: Path) -> float:
    """Run one notebook, streaming what its cells print; its copy takes its name only when whole. Returns seconds."""
    import papermill
    from traitlets.config import Config

    running, failed = job.copy.with_suffix(".running.ipynb"), job.copy.with_suffix(".failed.ipynb")
    job.copy.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as folder:
            # ports are taken by whoever binds first, another kernel among them; a socket in a folder of its own is not
            sockets = {"transport": "ipc", "connection_file": f"{folder}/kernel.json"}
            papermill.execute_notebook(
                str(job.source),
                str(running),
                job.parameters,
                kernel_name="python3",
                language="python",
                progress_bar=False,
                stdout_file=sys.stdout,
                stderr_file=sys.stderr,
                extra_arguments=["--log-level=CRITICAL"],  # a kernel is interrupted to end, and takes it for an error
                shutdown_kernel="immediate",  # all is written by then, and to take its modules down costs a second
                config=Config(KernelManager=sockets),
            )
        missing = [str(file.relative_to(root)) for file in job.outputs if not file.exists()]
        error = f"it did not write {', '.join(missing)}" if missing else None
    except Exception as raised:  # whatever stops a notebook, a dead kernel included, ends in the sentence below
        error = f"{getattr(raised, 'ename', type(raised).__name__)}: {getattr(raised, 'evalue', raised)}"
    seconds = round(time.perf_counter() - start, 1)
    if error:
        os.replace(running, failed)
        where = failed.relative_to(root)
        raise NotebookFailed(f"{job.name} failed with {' '.join(error.split())} (the traceback is in {where}).")
    for file in job.outputs:
        if job.note and file.suffix == ".md":
            caption, gap, table = file.read_text(encoding="utf-8").partition("\n\n")
            file.write_text(f"{caption} {job.note}{gap}{table}", encoding="utf-8")
    notebook = json.loads(running.read_text(encoding="utf-8"))
    notebook["metadata"]["xattn"] = {"inputs": job.inputs, "seconds": seconds}
    running.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(running, job.copy)
    failed.unlink(missing_ok=True)
    return seconds


def cost_of_maps(given: dict) -> tuple[float, float]:
    """Seconds and bytes of the maps of a step with these parameters; relative paths start in the current folder.

    A step that is given no pyramid makes maps of its own, of the profile's first pair and with the other pyramid.
    """
    occlusion = Occlusion(**{"pyramid": "spread"} | {key: given[key] for key in OCCLUSION if key in given})
    model, settings = given.get("model"), given.get("settings")
    if model is None:
        name, _, setting = given["pairs"][0].partition("/")
        model, settings = given["models"][name], [setting]
    language = settings[0].partition("-")[0]
    corpus = load_corpus(given["data"], language=language, split=given["split"])[: given["utterances"]]
    return cost(load_model(model, given["device"]), corpus, settings, occlusion)


def foretell(jobs: list[Job]) -> None:
    """Print what would run and, from a few masks of each, about what the maps would cost."""
    hours, gigabytes = 0.0, 0.0
    for job in jobs:
        line = f"{'stale' if job.stale else 'current':8} {job.name}" + (f" ({job.stale})" if job.stale else "")
        if job.stale and "input_masks" in job.parameters:
            seconds, size = cost_of_maps(job.parameters)
            hours, gigabytes = hours + seconds / 3600, gigabytes + size / 1e9
            line += f": about {seconds / 60:.1f} min and {size / 1e6:.0f} MB"
        print(line, flush=True)
    if hours:
        print(f"The maps would take about {hours:.1f} h and at most {gigabytes:.1f} GB, one after the other.")


def execute_all(jobs: list[Job], root: Path, at_once: int) -> None:
    """Run jobs in their order, up to `at_once` together, each when the steps it waits for have ended.

    The first failure is raised, after the jobs that were running by then have ended.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // at_once)))
    waiting, running, failure = list(jobs), {}, None
    pool = ThreadPoolExecutor(at_once)
    try:
        with chdir(root):
            while running or (waiting and not failure):
                unfinished = {job.source.stem for job in (*waiting, *running.values())}
                ready = [job for job in waiting if not unfinished & set(job.after)]
                for job in ready[: 0 if failure else at_once - len(running)]:
                    waiting.remove(job)
                    print(f"[{jobs.index(job) + 1}/{len(jobs)}] {job.name}: {job.stale}", flush=True)
                    running[pool.submit(execute, job, root)] = job
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    job = running.pop(future)
                    failure = failure or future.exception()
                    if not future.exception():
                        print(f"[{jobs.index(job) + 1}/{len(jobs)}] {job.name}: {future.result()} s", flush=True)
    finally:
        pool.shutdown(wait=False)  # at an interruption, notebooks may have hours to go
    if failure:
        raise failure


def run(
    path: Path,
    *,
    root: Path = ROOT,
    steps: tuple[Step, ...] | None = None,
    figures: str = "figures",
    dry_run: bool = False,
    at_once: int = 1,
) -> None:
    """Bring figures/<profile> up to date, `at_once` notebooks at a time; `steps` are the profile's own by default.

    ValueError, FileNotFoundError: wrong input; NotebookFailed: the rest.
    """
    start = time.perf_counter()
    given = load_profile(path)
    profile = without_absent(given, root)
    for model in profile["not_run"]:
        folder = given["models"][model]
        print(f"{model} is not run: there is no {folder} (docs/paper_scale.md says how to make one).", flush=True)
    require_inputs(profile, root)
    jobs = plan(profile, root, steps, figures)
    stale = [job for job in jobs if job.stale]
    output = f"{figures}/{profile['profile']}"
    if dry_run:
        with chdir(root):
            foretell(jobs)
        return
    if not stale:
        print(f"{output} is up to date ({len(jobs)} notebooks); nothing to do.")
        return
    for job in stale:
        check_parameters(job)
    execute_all(stale, root, at_once)
    text = json.dumps(provenance(profile, jobs, root), indent=2, sort_keys=True, ensure_ascii=False)
    (root / output / "provenance.json").write_text(text + "\n", encoding="utf-8")
    print(f"{output} is up to date in {time.perf_counter() - start:.0f} s:")
    for file in dict.fromkeys(file for job in jobs for file in job.outputs):
        print(f"  {file.relative_to(root).as_posix()}")


def leave_interrupted() -> None:
    """End this process without waiting for the threads of running notebooks; their kernels end with it."""
    print("Interrupted; the same command goes on from here.", file=sys.stderr, flush=True)
    os._exit(130)


def main() -> int:
    """Exit code 0: up to date; 1: a notebook failed; 2: wrong input; 130: interrupted."""
    parser = argparse.ArgumentParser(prog="python -m xattn.reproduce", description="Run the notebooks of a profile.")
    parser.add_argument("profile", type=Path, help="the YAML file of a profile")
    parser.add_argument("--dry-run", action="store_true", help="list the steps, current or stale, and run nothing")
    parser.add_argument("--at-once", type=int, default=AT_ONCE, help=f"notebooks run together; {AT_ONCE} by default")
    arguments = parser.parse_args()
    try:
        run(arguments.profile, dry_run=arguments.dry_run, at_once=max(1, arguments.at_once))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except NotebookFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        leave_interrupted()
    return 0


if __name__ == "__main__":
    sys.exit(main())
