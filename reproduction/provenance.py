"""What a result depends on: hashes of inputs and code, versions of packages, and the record of a run."""

import ast
import json
import os
import platform
import re
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache

from reproduction.tables import ROOT
from xattn.attribution.settings import resolve_precision
from xattn.files import hash_file, hash_value
from xattn.models import HUB_ID


def digest_files(folder: Path, pattern: str) -> str:
    """SHA-256 of the names and contents of a folder's files; times and .md files do not count."""
    files = sorted(p for p in folder.glob(pattern) if p.is_file() and p.suffix != ".md")
    return hash_value([(p.relative_to(folder).as_posix(), hash_file(p)) for p in files])


def digest_model(root: Path, model: str) -> str:
    """`digest_files` of a model's folder; for a hub model, which may not be downloaded yet, its id and revision."""
    return digest_files(root / model, "**/*") if (root / model).is_dir() else model


def used_model(root: Path, model: str) -> str:
    """`digest_model` after a run; for a hub model, its id and the commit in the hub's cache."""
    hub = None if (root / model).is_dir() else HUB_ID.fullmatch(model)
    found = hub and try_to_load_from_cache(hub["name"], "config.json", revision=hub["revision"])
    # A snapshot's folder is named after its commit; a file that is not in the cache yields None or a mark, not a path.
    return f"{hub['name']}@{Path(found).parent.name}" if isinstance(found, str) else digest_model(root, model)


# `import xattn` imports the explorer, which shows results and changes none.
VIEWS = ("xattn/explorer.py",)


def digest_code(source: str, root: Path) -> str:
    """SHA-256 of the modules of this repository that a notebook's code imports, directly or through other modules.

    Comments, docstrings and layout do not count, nor do VIEWS. SyntaxError: the code or a module is not valid Python.

    source: the code; lines that start with % or ! are commands of IPython and ignored.
    """
    source = "\n".join(line for line in source.splitlines() if not line.lstrip().startswith(("%", "!")))
    hashes, waiting = {}, list(_imports(ast.parse(source, "notebook"), root))
    while waiting:
        file = waiting.pop()
        if file not in hashes and file.relative_to(root).as_posix() not in VIEWS:
            hashes[file], imports = _parsed(file.read_text(encoding="utf-8"), file, root)
            waiting += imports
    return hash_value([(file.relative_to(root).as_posix(), hashes[file]) for file in sorted(hashes)])


@cache
def _parsed(text: str, file: Path, root: Path) -> tuple[str, tuple[Path, ...]]:
    """A hash of a module's code, and the files of this repository that it imports."""
    tree = ast.parse(text, str(file))
    imports = tuple(_imports(tree, root))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return hash_value(ast.dump(tree)), imports


def _imports(tree: ast.Module, root: Path) -> Iterator[Path]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            for end in range(1, len(parts) + 1):  # importing a module also runs its packages' __init__
                path = root.joinpath(*parts[:end])
                for file in (path.with_suffix(".py"), path / "__init__.py"):
                    if file.is_file():
                        yield file


def cells(path: Path) -> list[tuple[str, str]]:
    """Type and source of each cell of a notebook; metadata and outputs do not count."""
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        return [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    except FileNotFoundError:
        raise FileNotFoundError(f"The notebook {path} of a step does not exist; restore it.") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is not a Jupyter notebook; restore it.") from None


def versions() -> dict[str, str]:
    """Installed version of each package that a run can use, as pyproject.toml declares them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [*project["dependencies"], *project["optional-dependencies"]["reproduction"]]
    return {name: version(name) for name in (re.match(r"[\w-]+", line)[0] for line in declared)}


def recorded(copy: Path) -> dict:
    """What an executed notebook records about its run: the hash of its inputs and its seconds; {} if there is none."""
    with suppress(FileNotFoundError, ValueError, KeyError):
        return json.loads(copy.read_text(encoding="utf-8"))["metadata"]["xattn"]
    return {}


def processor(device: torch.device) -> str:
    """The name of the processor or, for a GPU, of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with suppress(OSError):  # only Linux has this file
        names = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
        if names:
            return names[0]
    return platform.processor()


def provenance(profile: dict, jobs: list, root: Path) -> dict:
    """What produced the numbers: versions, machine, hashes of inputs and tables, parameters.

    jobs: from `reproduction.pipeline.plan`, after all have run.
    """
    tables = sorted({file for job in jobs for file in job.outputs if file.suffix == ".csv"})
    device = torch.device(profile.get("device", "cpu"))
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(device),
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "precision": resolve_precision(profile["precision"], device) if "precision" in profile else "",
        "packages": versions(),
        "data": digest_files(root / profile["data"], "*"),
        "models": {name: used_model(root, path) for name, path in profile["models"].items()}
        | dict.fromkeys(profile["not_run"], "not run"),
        "notebooks": {job.source.name: hash_value(cells(job.source)) for job in jobs},
        "tables": {file.name: hash_file(file) for file in tables},
        "steps": {job.name: {"parameters": job.parameters, "seconds": recorded(job.copy)["seconds"]} for job in jobs},
    }
