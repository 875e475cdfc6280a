"""Every table and figure of a profile: ``python -m xattn.reproduce notebooks/profiles/mini.yaml [--dry-run]``.

Runs the notebooks of STEPS with the profile's parameters and keeps the executed copies in figures/<profile>/notebooks.
A step runs again only when something it depends on has changed: cells, parameters, package, model, corpus, upstream.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import sys
import time
import tomllib
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Step:
    """A notebook, the parameters passed to it, the files it writes below figures/<profile>, the steps it reads from.

    `model` is the model's folder for a step that loads it, its name in the store for one that reads another's maps.
    """

    notebook: str
    parameters: tuple[str, ...]
    outputs: tuple[str, ...]  # {model} and {setting} stand for each that the step was run with
    needs: tuple[str, ...] = ()
    per_source: bool = False  # once for every model and source language, not only for the profile's first


LOAD = ("profile", "data", "model", "split", "device")
READ = ("profile", "output", "maps", "data", "model", "setting")
ALL = ("profile", "output", "maps", "pairs")
DELETE = (*ALL, "models", "utterances", "device")
MASKS = ("utterances", "input_masks", "encoder_masks", "input_p", "encoder_p", "seed")
MAPS = ("10_maps",)

STEPS = (
    Step("00_overview", (*LOAD, "output"), ("fig1.png",)),
    Step("10_maps", (*LOAD, *MASKS, "maps", "settings"), ("maps/{model}/{setting}",), per_source=True),
    Step("21_reduction", DELETE, ("tab1.csv", "tab1.png"), needs=MAPS),
    Step("22_quality", (*DELETE, "data", "split"), ("tab2.csv", "tab2.png"), needs=MAPS),
    Step("23_heads_and_layers", READ, ("tab3.csv", "tab3.png"), needs=MAPS),
    Step("24_models_and_tasks", (*ALL, "data"), ("tab4.csv", "tab4.png"), needs=MAPS),
    Step("25_context_mixing", (*ALL, "data"), ("tab5.csv", "tab5.png"), needs=MAPS),
    Step("26_deletion", (*DELETE, "data"), ("tab6.csv", "tab6.png"), needs=MAPS),
    Step("30_heatmaps", READ, ("fig2.png", "fig2.svg"), needs=MAPS),
    Step("90_findings", ALL, ("findings.csv",), needs=(*MAPS, "21_reduction", "26_deletion")),
)

PROFILE_KEYS = {
    "profile": str,
    "data": str,
    "models": dict,
    "settings": dict,
    "split": str,
    "utterances": int,
    "input_masks": int,
    "encoder_masks": int,
    "input_p": float,
    "encoder_p": float,
    "seed": int,
    "device": str,
}


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


def load_profile(path: Path, root: Path = ROOT) -> dict:
    """Read and check a profile. ValueError, FileNotFoundError: one sentence naming the file and the key."""
    try:
        profile = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml"))) or "none"
        raise FileNotFoundError(f"There is no profile {path}; profiles in {path.parent}: {known}.") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML ({' '.join(str(error).split())}); correct it there.") from None
    if not isinstance(profile, dict):
        raise ValueError(f"{path} must be a mapping with the keys {', '.join(PROFILE_KEYS)}.")
    for key in [*profile, *PROFILE_KEYS]:
        if key not in PROFILE_KEYS or key not in profile:
            what = "is missing" if key in PROFILE_KEYS else "is unknown"
            raise ValueError(f"{path}: the key {key!r} {what}; a profile has exactly {', '.join(PROFILE_KEYS)}.")
    for key, kind in PROFILE_KEYS.items():
        if type(profile[key]) is not kind:
            raise ValueError(f"{path}: {key} must be of type {kind.__name__}, not {profile[key]!r}.")
    for key, least in {"utterances": 1, "input_masks": 1, "encoder_masks": 1, "seed": 0}.items():
        if profile[key] < least:
            raise ValueError(f"{path}: {key} must be at least {least}, not {profile[key]}.")
    for key in ("input_p", "encoder_p"):
        if not 0 < profile[key] < 1:
            raise ValueError(f"{path}: {key} is a masking probability between 0 and 1, not {profile[key]}.")
    if profile["profile"] != path.stem:
        raise ValueError(f"{path}: profile must be the file's own name, {path.stem!r}, not {profile['profile']!r}.")
    if not profile["models"] or set(profile["models"]) != set(profile["settings"]):
        raise ValueError(f"{path}: models and settings must name the same models, at least one.")
    for model, settings in profile["settings"].items():
        if not re.fullmatch(r"[\w.-]+", str(model)):
            raise ValueError(f"{path}: the model name {model!r} must be letters, digits, dots, dashes, underscores.")
        folder = profile["models"][model]
        if not isinstance(folder, str) or not (root / folder).is_dir():
            raise FileNotFoundError(f"{path}: the folder {folder!r} of models: {model} does not exist.")
        if Path(folder).name != model:
            raise ValueError(f"{path}: models: {model} must be called as its folder, {folder!r}.")
        valid = isinstance(settings, list) and all(re.fullmatch(r"[a-z]+(-[a-z]+)?", str(s)) for s in settings)
        if not valid or not settings or len(set(settings)) < len(settings):
            raise ValueError(f"{path}: settings: {model} must list such as en or en-it, each once, not {settings!r}.")
    if not any(p.is_file() for p in (root / profile["data"]).glob("*")):
        raise FileNotFoundError(f"{path}: the corpus folder {profile['data']!r} does not exist or holds no manifest.")
    return profile


def digest(value: object) -> str:
    """SHA-256 of a JSON-serialisable value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def digest_files(folder: Path, pattern: str) -> str:
    """SHA-256 of the names and contents of the files of a folder; a file's time and a .md beside it do not count."""
    files = sorted(p for p in folder.glob(pattern) if p.is_file() and p.suffix != ".md")
    return digest([(p.relative_to(folder).as_posix(), digest_file(p)) for p in files])


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cells(path: Path) -> list[tuple[str, str]]:
    """Type and source of each cell of a notebook; its metadata and outputs do not count."""
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        return [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    except FileNotFoundError:
        raise FileNotFoundError(f"The notebook {path} of a step does not exist; restore it.") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not a Jupyter notebook; restore it.") from None


def versions() -> dict[str, str]:
    """Installed version of every package that pyproject.toml declares: any of them may move a number."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {name: version(name) for name in (re.match(r"[\w-]+", line)[0] for line in project["dependencies"])}


def recorded(copy: Path) -> dict:
    """What an executed copy says of its own run: the hash of its inputs and its seconds; {} where there is none."""
    with suppress(FileNotFoundError, ValueError, KeyError):
        return json.loads(copy.read_text(encoding="utf-8"))["metadata"]["xattn"]
    return {}


def plan(profile: dict, root: Path = ROOT, steps: tuple[Step, ...] = STEPS, figures: str = "figures") -> list[Job]:
    """The executions a profile asks for, in order, each with what it depends on and whether it is current."""
    folder = f"{figures}/{profile['profile']}"
    output = root / folder
    common = {**profile, "output": folder, "maps": f"{folder}/maps"}
    common["pairs"] = [f"{model}/{setting}" for model, settings in profile["settings"].items() for setting in settings]
    code = [digest_files(root / "xattn", "**/*.py"), versions()]
    contents = {profile["data"]: digest_files(root / profile["data"], "*")}
    sources = [
        (model, [setting for setting in settings if setting.split("-")[0] == source])
        for model, settings in profile["settings"].items()
        for source in dict.fromkeys(setting.split("-")[0] for setting in settings)
    ]
    jobs, hashes = [], {}
    for step in steps:
        path = root / "notebooks" / f"{step.notebook}.ipynb"
        for model, settings in sources if step.per_source else sources[:1]:
            folder = profile["models"][model]
            values = {"model": model if step.needs else folder, "settings": settings, "setting": settings[0]}
            parameters = {key: {**common, **values}[key] for key in step.parameters}
            if folder not in contents:
                contents[folder] = digest_files(root / folder, "**/*")
            used = [contents[parameters[key]] for key in ("data", "model") if parameters.get(key) in contents]
            inputs = digest([cells(path), parameters, code, used, [hashes[need] for need in step.needs]])
            hashes.setdefault(step.notebook, []).append(inputs)
            name = f"{step.notebook}-{model}-{settings[0].split('-')[0]}" if step.per_source else step.notebook
            copy = output / "notebooks" / f"{name}.ipynb"
            files = [file.format(model=model, setting=setting) for file in step.outputs for setting in settings]
            outputs = [output / file for file in dict.fromkeys(files)]
            missing = [file.name for file in outputs if not file.exists()]
            stale = "not run yet" if not copy.exists() else f"{missing[0]} is missing" if missing else ""
            if not stale and recorded(copy).get("inputs") != inputs:
                stale = "something it depends on has changed"
            jobs.append(Job(name, path, copy, parameters, outputs, inputs, stale))
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

    running, failed = job.copy.with_suffix(".running.ipynb"), job.copy.with_suffix(".failed.ipynb")
    job.copy.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    try:
        papermill.execute_notebook(
            str(job.source),
            str(running),
            job.parameters,
            kernel_name="python3",
            language="python",
            cwd=str(root),
            progress_bar=False,
            stdout_file=sys.stdout,
            stderr_file=sys.stderr,
            extra_arguments=["--log-level=ERROR"],  # the kernel warns of its own transport at every start
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
    notebook = json.loads(running.read_text(encoding="utf-8"))
    notebook["metadata"]["xattn"] = {"inputs": job.inputs, "seconds": seconds}
    running.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(running, job.copy)
    failed.unlink(missing_ok=True)
    return seconds


def provenance(profile: dict, jobs: list[Job], root: Path) -> dict:
    """What made the numbers: versions, machine, hashes of what went in and of the tables that came out, parameters."""
    tables = sorted({file for job in jobs for file in job.outputs if file.suffix == ".csv"})
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions(),
        "data": digest_files(root / profile["data"], "*"),
        "models": {name: digest_files(root / path, "**/*") for name, path in profile["models"].items()},
        "notebooks": {job.source.name: digest(cells(job.source)) for job in jobs},
        "tables": {file.name: digest_file(file) for file in tables},
        "steps": {job.name: {"parameters": job.parameters, "seconds": recorded(job.copy)["seconds"]} for job in jobs},
    }


def run(
    path: Path,
    *,
    root: Path = ROOT,
    steps: tuple[Step, ...] = STEPS,
    figures: str = "figures",
    dry_run: bool = False,
) -> None:
    """Bring figures/<profile> up to date. ValueError, FileNotFoundError: wrong input; NotebookFailed: the rest."""
    start = time.perf_counter()
    profile = load_profile(path, root)
    jobs = plan(profile, root, steps, figures)
    stale = [job for job in jobs if job.stale]
    output = f"{figures}/{profile['profile']}"
    if dry_run:
        for job in jobs:
            print(f"{'stale' if job.stale else 'current':8} {job.name}" + (f" ({job.stale})" if job.stale else ""))
        return
    if not stale:
        print(f"{output} is up to date ({len(jobs)} notebooks); nothing to do.")
        return
    for job in stale:
        check_parameters(job)
    for k, job in enumerate(stale, 1):
        print(f"[{k}/{len(stale)}] {job.name}: {job.stale}", flush=True)
        print(f"[{k}/{len(stale)}] {job.name}: {execute(job, root)} s", flush=True)
    text = json.dumps(provenance(profile, jobs, root), indent=2, sort_keys=True, ensure_ascii=False)
    (root / output / "provenance.json").write_text(text + "\n", encoding="utf-8")
    print(f"{output} is up to date in {time.perf_counter() - start:.0f} s:")
    for file in dict.fromkeys(file for job in jobs for file in job.outputs):
        print(f"  {file.relative_to(root).as_posix()}")


def main() -> int:
    """Exit code 0: up to date; 1: a notebook failed; 2: wrong input; 130: interrupted."""
    parser = argparse.ArgumentParser(prog="python -m xattn.reproduce", description="Run the notebooks of a profile.")
    parser.add_argument("profile", type=Path, help="the YAML file of a profile")
    parser.add_argument("--dry-run", action="store_true", help="list the steps, current or stale, and run nothing")
    arguments = parser.parse_args()
    try:
        run(arguments.profile, dry_run=arguments.dry_run)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except NotebookFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on from here.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
