"""Every table and figure of a profile: ``python -m reproduction.pipeline notebooks/profiles/mini.yaml [--dry-run]``.

The notebooks of STEPS are executed with the profile's parameters; the executed copies are in
figures/<profile>/notebooks. A step runs again only if something it depends on has changed: its cells, its parameters,
code that it imports, a model, the corpus, or a step that it needs.
"""

import argparse
import json
import os
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import chdir
from dataclasses import dataclass, replace
from pathlib import Path

from reproduction.crate import METADATA, crate
from reproduction.figures import shrink
from reproduction.findings import COMPARED, comparison
from reproduction.kernels import (
    AGAIN,
    NotebookFailed,
    check_kernel,
    escaped,
    patched_papermill,
    reason_of,
    run_notebook,
    tmpdir,
)
from reproduction.partitions import others
from reproduction.profiles import OCCLUSION, load_profile, require_inputs, without_absent
from reproduction.provenance import cells, digest_code, digest_files, digest_model, provenance, recorded, versions
from reproduction.tables import PAPER, ROOT
from xattn.data.corpus import load_corpus
from xattn.explain import Occlusion
from xattn.files import hash_file, hash_value, write_whole, writing
from xattn.models import load_model
from xattn.released import FILES
from xattn.runs import estimate_cost
from xattn.workers import ENVIRONMENT

# Two notebooks with half the threads each are faster than one with all threads; workers need the machine for the maps.
AT_ONCE = 1 if os.environ.get("WORKERS") else min(2, os.cpu_count() or 1)


def table(name: str) -> tuple[str, ...]:
    """The files of a table: as long numbers, in the paper's arrangement, and as a picture."""
    return f"{name}.csv", f"{name}.md", f"{name}.png"


@dataclass(frozen=True)
class Step:
    """A notebook with its parameters and the files it writes below figures/<profile>.

    parameters: names; `model` is the model's folder.
    outputs: {model} and {direction} stand for each that the step runs with.
    needs: steps whose results it reads.
    after: steps to wait for without reading their results.
    per_language: run once for each model and spoken language, not once for the profile.
    translations: outputs that are only written if the profile has a translation.
    folder: of the notebook, below notebooks.
    on_request: run only if the profile's key `beyond` names the notebook.
    """

    notebook: str
    parameters: tuple[str, ...]
    outputs: tuple[str, ...]
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    per_language: bool = False
    translations: tuple[str, ...] = ()
    folder: str = "paper"
    on_request: bool = False


CHANGED = "something it depends on has changed"

LOAD = ("profile", "data", "model", "split", "device")
READ = ("profile", "output", "maps")
MAPS = ("10_maps",)
DECODE = ("models", "conditions", "device", "deletion_step")
# Of 29_partitions, which compares partitions and masks nothing in the encoder.
PERTURBATION = ("input_masks", "input_p", "seed", "precision", "estimator")

STEPS = (
    Step(
        "10_maps",
        (*LOAD, *OCCLUSION, "utterances", "maps", "directions"),
        ("maps/{model}/{direction}",),
        per_language=True,
    ),
    Step(
        "22_quality",
        (*READ, "data", "models", "conditions", "split", "device", "deletion_step"),
        table("tab2"),
        needs=MAPS,
    ),
    Step("21_reduction", (*READ, *DECODE), table("tab1"), needs=MAPS),
    # Both decode with the reduced map deleted; the second one reads the texts of the first.
    Step("26_deletion", (*READ, *DECODE), table("tab6"), needs=MAPS, after=("21_reduction",)),
    Step(
        "28_estimators", ("profile", "output", "maps", "conditions"), ("estimators.csv", "estimators.png"), needs=MAPS
    ),
    Step(
        "29_partitions",
        (*READ, *DECODE, "data", "split", "utterances", "partition", "compared", *PERTURBATION),
        ("partitions.csv", "partitions.png"),
        needs=MAPS,
        after=("21_reduction", "26_deletion"),  # reads texts of both
    ),
    # Maps start first, because most steps wait for them; the overview fills a gap.
    Step("00_overview", (*LOAD, "output"), ("fig1.png",)),
    Step("23_heads_and_layers", (*READ, "conditions"), table("tab3"), needs=MAPS),
    Step("24_models_and_tasks", (*READ, "conditions"), table("tab4"), needs=MAPS),
    Step("25_context_mixing", (*READ, "conditions"), table("tab5"), needs=MAPS),
    Step(
        "30_heatmaps",
        (*READ, "data", "conditions"),
        ("fig2.png", "fig2.svg"),
        needs=MAPS,
        translations=("fig2_translation.png", "fig2_translation.svg"),
    ),
    Step(
        "40_agreement",
        (*READ, "data", "conditions"),
        ("agreement.csv", "agreement.png"),
        needs=MAPS,
        folder="beyond",
    ),
    Step(
        "41_sanity",
        (*LOAD, "output", "utterances", "input_masks", "precision"),
        ("sanity.csv", "sanity.png"),
        folder="beyond",
    ),
    Step(
        "42_resolution",
        (*READ, "conditions"),
        ("resolution.csv", "resolution.png"),
        needs=MAPS,
        folder="beyond",
        on_request=True,
    ),
    Step(
        "43_methods",
        (*READ, *DECODE, "data", "split", "judged", "checked"),
        (*table("methods"), "methods_differences.csv", "methods_similarity.csv"),
        needs=MAPS,
        folder="beyond",
        on_request=True,
    ),
    Step(
        "44_sufficiency",
        (*READ, "data", "models", "conditions", "split", "device"),
        ("sufficiency.csv", "sufficiency.png"),
        needs=MAPS,
        folder="beyond",
        on_request=True,
    ),
    Step(
        "45_regularisation",
        ("profile", "output", "data"),
        ("regularisation.csv", "regularisation.png"),
        folder="beyond",
        on_request=True,
    ),
    Step(
        "90_findings",
        (*READ, "conditions", "reference"),
        ("findings.csv",),
        needs=(*MAPS, "21_reduction", "26_deletion"),
    ),
)

# Released maps come without models, so nothing can be decoded or explained again; tab1 and tab2 hold what needs only
# maps.
FROM_MAPS = (
    *("22_quality", "21_reduction", "23_heads_and_layers", "24_models_and_tasks", "25_context_mixing"),
    *("30_heatmaps", "40_agreement", "90_findings"),
)
RELEASED_STEPS = (
    Step(
        "11_released",
        ("profile", "maps", "model", "directions", "subsampling"),
        ("maps/{model}/{direction}",),
        per_language=True,
    ),
    *(
        replace(
            step,
            # a profile of released maps decodes nothing
            parameters=tuple(name for name in step.parameters if name not in ("split", "device", "deletion_step")),
            needs=("11_released", *(need for need in step.needs if need in FROM_MAPS)),
        )
        for step in STEPS
        if step.notebook in FROM_MAPS
    ),
)


@dataclass(frozen=True)
class Job:
    """One execution of a step: its parameters, the hash of its inputs, and why it has to run ("" if current)."""

    name: str
    source: Path
    copy: Path
    parameters: dict
    outputs: list[Path]
    inputs: str
    stale: str
    after: tuple[str, ...]  # names of the steps to wait for
    note: str  # appended to the captions of its tables


def steps_of(profile: dict, root: Path) -> tuple[Step, ...]:
    """The steps of a profile: all but those it does not request, or those that released maps allow.

    A profile without the paper's notebooks makes maps and runs what it requests.

    28_estimators compares numbers of masks, which must be the same for all utterances, so it is left out if masking
    stops early.
    """
    if "released" not in profile:
        known = [step.notebook for step in STEPS if step.on_request]
        unknown = [str(name) for name in profile["beyond"] if name not in known]
        if unknown:
            raise ValueError(
                f"The profile {profile['profile']}: beyond names {', '.join(unknown)}; choose among {', '.join(known)}."
            )
        left_out = {"28_estimators"} if profile["reliability"] < 1 else set()
        left_out |= {step.notebook for step in STEPS if step.on_request or not profile["paper"]}
        left_out -= {"10_maps", *profile["beyond"]}
        return tuple(step for step in STEPS if step.notebook not in left_out)
    folders = [root / profile["models"][model] / each for model, own in profile["directions"].items() for each in own]
    complete = all((folder / FILES["encoder_saliency"]).is_file() for folder in folders)
    return tuple(step for step in RELEASED_STEPS if complete or step.notebook != "25_context_mixing")


def plan(
    profile: dict, root: Path = ROOT, steps: tuple[Step, ...] | None = None, figures: str = "figures"
) -> list[Job]:
    """The executions that a profile needs, in order.

    steps: by default those of the profile.
    """
    folder = f"{figures}/{profile['profile']}"
    output = root / folder
    common = {**profile, "output": folder, "maps": f"{folder}/maps"}
    if "released" in profile:
        common["models"] = {}  # released maps have no models to load
    common["conditions"] = [f"{model}/{each}" for model, own in profile["directions"].items() for each in own]
    translates = any("-" in condition.rpartition("/")[2] for condition in common["conditions"])
    shared = [versions(), hash_file(PAPER)]
    contents = {profile["data"]: digest_files(root / profile["data"], "*")}
    by_language = [
        (model, [each for each in own if each.split("-")[0] == language])
        for model, own in profile["directions"].items()
        for language in dict.fromkeys(each.split("-")[0] for each in own)
    ]
    note = f"Not run: {', '.join(profile['not_run'])}." if profile.get("not_run") else ""
    jobs, hashes = [], {}
    for step in steps or steps_of(profile, root):
        path = root / "notebooks" / step.folder / f"{step.notebook}.ipynb"
        source = cells(path)
        try:
            code = digest_code("\n".join(text for kind, text in source if kind == "code"), root)
        except SyntaxError as error:
            raise ValueError(f"{path} or a module that it imports is not valid Python ({error}); correct it.") from None
        for model, directions in by_language if step.per_language else by_language[:1]:
            folder = profile["models"][model]
            values = {"model": folder, "directions": directions}
            if isinstance(profile.get("utterances"), dict):
                values["utterances"] = profile["utterances"][model]
            parameters = {key: {**common, **values}[key] for key in step.parameters}
            if folder not in contents:
                contents[folder] = digest_model(root, folder)
            used = [contents[parameters[key]] for key in ("data", "model") if parameters.get(key) in contents]
            inputs = hash_value([source, parameters, code, shared, used, [hashes[need] for need in step.needs]])
            hashes.setdefault(step.notebook, []).append(inputs)
            name = f"{step.notebook}-{model}-{directions[0].split('-')[0]}" if step.per_language else step.notebook
            copy = output / "notebooks" / f"{name}.ipynb"
            names = (*step.outputs, *(step.translations if translates else ()))
            files = [file.format(model=model, direction=each) for file in names for each in directions]
            outputs = [output / file for file in dict.fromkeys(files)]
            missing = [file.name for file in outputs if not file.exists()]
            stale = "not run yet" if not copy.exists() else f"{missing[0]} is missing" if missing else ""
            if not stale and recorded(copy).get("inputs") != inputs:
                stale = CHANGED
            waits = (*step.needs, *step.after)
            jobs.append(Job(name, path, copy, parameters, outputs, inputs, stale, waits, note))
    return jobs


def check_parameters(job: Job) -> None:
    """Raise ValueError for a parameter that the notebook does not declare; papermill would only warn."""
    unknown = job.parameters.keys() - patched_papermill().inspect_notebook(escaped(job.source)).keys()
    if unknown:
        names = ", ".join(sorted(unknown))
        raise ValueError(f"{job.source.name} does not declare {names} in its parameters cell; declare it or drop it.")


def execute(job: Job, root: Path) -> float:
    """Run a notebook, with `root` as the current folder; keep its copy only if it succeeds. Return the seconds it took.

    NotebookFailed: an error in a cell, or an output is missing. OSError: the copy could not be written.
    """
    running, failed = job.copy.with_suffix(".running.ipynb"), job.copy.with_suffix(".failed.ipynb")
    start = time.perf_counter()
    try:
        run_notebook(job.source.relative_to(root), running.relative_to(root), job.parameters)
        missing = [str(file.relative_to(root)) for file in job.outputs if not file.exists()]
        error = f"it did not write {', '.join(missing)}" if missing else None
    except Exception as raised:  # anything that stops a notebook, even a dead kernel, ends in the sentence below
        if isinstance(raised, OSError) and raised.errno is None:  # see `writing`
            raise
        error = reason_of(raised)
    seconds = round(time.perf_counter() - start, 1)
    if error:
        with writing(failed, AGAIN):
            os.replace(running, failed)
        where = failed.relative_to(root)
        raise NotebookFailed(f"{job.name} failed with {error} (the traceback is in {where}).")
    for file in job.outputs:
        if job.note and file.suffix == ".md":
            caption, gap, table = file.read_text(encoding="utf-8").partition("\n\n")
            write_whole(file, f"{caption} {job.note}{gap}{table}".encode(), AGAIN)
        elif file.suffix == ".png":
            shrink(file)
    notebook = json.loads(running.read_text(encoding="utf-8"))
    notebook["metadata"]["xattn"] = {"inputs": job.inputs, "seconds": seconds}
    write_whole(job.copy, (json.dumps(notebook, indent=1, ensure_ascii=False) + "\n").encode(), AGAIN)
    running.unlink()
    failed.unlink(missing_ok=True)
    return seconds


def cost_of_maps(given: dict) -> tuple[float, float]:
    """Estimate the seconds and bytes of the maps of a step with these parameters.

    A step without the parameter model explains up to eight utterances of the profile's first condition, with other
    partitions.
    """
    occlusion = Occlusion(**{"encoder_masks": 12, "reliability": 1.0} | {k: given[k] for k in OCCLUSION if k in given})
    model, directions, runs = given.get("model"), given.get("directions"), [occlusion]
    number = given["utterances"]
    if model is None:
        name, _, direction = given["conditions"][0].partition("/")
        model, directions, number = given["models"][name], [direction], min(8, number)
        runs = [replace(occlusion, partition=kind, input_masks=masks) for kind, masks in others(given).items()]
    language = directions[0].partition("-")[0]
    corpus = load_corpus(given["data"], language=language, split=given["split"])[:number]
    s2t = load_model(model, given["device"])
    costs = [estimate_cost(s2t, corpus, directions, each) for each in runs]
    return sum(seconds for seconds, _ in costs), sum(size for _, size in costs)


def print_estimate(jobs: list[Job]) -> None:
    """Print what would run, with estimates of the run time and disk space of the maps from a few masks each."""
    hours, gigabytes = 0.0, 0.0
    for job in jobs:
        line = f"{'stale' if job.stale else 'current':8} {job.name}" + (f" ({job.stale})" if job.stale else "")
        if job.stale and "input_p" in job.parameters:  # it makes maps
            seconds, size = cost_of_maps(job.parameters)
            hours, gigabytes = hours + seconds / 3600, gigabytes + size / 1e9
            line += f": about {seconds / 60:.1f} min and {size / 1e6:.0f} MB"
        print(line, flush=True)
    if hours:
        print(f"All maps together: about {hours:.1f} h and at most {gigabytes:.1f} GB.")


def execute_all(jobs: list[Job], root: Path, at_once: int) -> None:
    """Run jobs in order, up to `at_once` at a time, each after the steps it waits for.

    The first failure is raised after the jobs that were running have ended.
    """
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // at_once))}
    os.environ.update(ENVIRONMENT | threads | os.environ)  # kernels inherit it
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
        pool.shutdown(wait=False)  # after an interruption, notebooks could have hours to go
    if failure:
        raise failure


def write_json(path: Path, content: dict) -> None:
    """Write a record of a run."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
    write_whole(path, f"{text}\n".encode(), AGAIN)


def update_page(path: Path) -> None:
    """Write index.html of a profile, unless it is newer than the last run, and print where it is."""
    output = ROOT / "figures" / path.stem
    page, record = output / "index.html", output / "provenance.json"
    if not (page.exists() and record.exists() and page.stat().st_mtime >= record.stat().st_mtime):
        from reproduction.page import write_page  # takes seconds

        profile = load_profile(path)
        write_page(profile, steps_of(profile, ROOT), output)
    print(f"{page.relative_to(ROOT).as_posix()} has all results on one page.")


def run(
    path: Path,
    *,
    root: Path = ROOT,
    steps: tuple[Step, ...] | None = None,
    figures: str = "figures",
    dry_run: bool = False,
    at_once: int = 1,
) -> None:
    """Bring figures/<profile> up to date.

    Args:
        steps: by default those of the profile.
        figures: the folder to write to, below `root`.
        dry_run: print what would run, and an estimate of its cost.
        at_once: notebooks to run at a time.

    Raises:
        ValueError, FileNotFoundError: wrong input. OSError: a file could not be written. NotebookFailed: a notebook
            failed, or none can run.
    """
    start = time.perf_counter()
    given = load_profile(path)
    profile = without_absent(given, root)
    for model in profile["not_run"]:
        folder = given["models"][model]
        print(
            f"{model} is not run, because {folder} does not exist (docs/paper_scale.md says how to make it).",
            flush=True,
        )
    require_inputs(profile, root)
    jobs = plan(profile, root, steps, figures)
    stale = [job for job in jobs if job.stale]
    output = f"{figures}/{profile['profile']}"
    if dry_run:
        with chdir(root):
            print_estimate(jobs)
        return
    if not stale:
        print(f"{output} is up to date ({len(jobs)} notebooks); nothing to do.")
        return
    for job in stale:
        check_parameters(job)
    wanted = os.environ.get("TMPDIR")
    if wanted and os.path.abspath(wanted) != tmpdir():
        print(f"No file can be written in TMPDIR, {wanted}: temporary files go to {tmpdir()}.", flush=True)
    with chdir(root):
        check_kernel()
    execute_all(stale, root, at_once)
    facts = provenance(profile, jobs, root)
    write_json(root / output / "provenance.json", facts)
    write_json(root / output / METADATA, crate(profile, jobs, facts, root / output, root))
    print(f"{output} is up to date in {time.perf_counter() - start:.0f} s:")
    for file in dict.fromkeys(file for job in jobs for file in job.outputs):
        print(f"  {file.relative_to(root).as_posix()}")
    reference = root / profile["reference"]
    if profile["reference"] and all((reference / name).is_file() for name in COMPARED):
        print(comparison(root / output, reference, root))


def leave_interrupted() -> None:
    """End this process, and with it the kernels of running notebooks, without waiting for their threads."""
    print("Interrupted. Run the same command again to resume.", file=sys.stderr, flush=True)
    os._exit(130)


def main() -> int:
    """Run the command. Exit code 0: up to date; 1: a notebook failed; 2: wrong input; 130: interrupted."""
    parser = argparse.ArgumentParser(prog="python -m reproduction.pipeline", description="Run a profile.")
    parser.add_argument("profile", type=Path, help="the YAML file of a profile")
    parser.add_argument(
        "--dry-run", action="store_true", help="list the steps and estimate their cost without running them"
    )
    parser.add_argument("--at-once", type=int, default=AT_ONCE, help=f"notebooks to run at a time; default: {AT_ONCE}")
    arguments = parser.parse_args()
    try:
        run(arguments.profile, dry_run=arguments.dry_run, at_once=max(1, arguments.at_once))
        if not arguments.dry_run:
            update_page(arguments.profile)
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
