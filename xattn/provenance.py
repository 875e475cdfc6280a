"""What a result depends on: hashes of what goes in, versions of packages, and the record of a run."""

import hashlib
import json
import platform
import re
import tomllib
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from huggingface_hub import try_to_load_from_cache

from xattn.models import HUB_ID

ROOT = Path(__file__).resolve().parents[1]


def digest(value: object) -> str:
    """SHA-256 of a JSON-serialisable value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def digest_files(folder: Path, pattern: str) -> str:
    """SHA-256 of the names and contents of the files of a folder; a file's time and a .md beside it do not count."""
    files = sorted(p for p in folder.glob(pattern) if p.is_file() and p.suffix != ".md")
    return digest([(p.relative_to(folder).as_posix(), digest_file(p)) for p in files])


def digest_model(root: Path, model: str) -> str:
    """`digest_files` of a model's folder; a model of the hub has none before it is fetched: its id and revision."""
    return digest_files(root / model, "**/*") if (root / model).is_dir() else model


def used_model(root: Path, model: str) -> str:
    """`digest_model` after a run: of a model of the hub, its id and the commit that lies in the hub's cache."""
    hub = None if (root / model).is_dir() else HUB_ID.fullmatch(model)
    found = hub and try_to_load_from_cache(hub["name"], "config.json", revision=hub["revision"])
    # The folder of a snapshot is named by its commit; what is not in the cache gives None or a mark, never a path.
    return f"{hub['name']}@{Path(found).parent.name}" if isinstance(found, str) else digest_model(root, model)


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


def provenance(profile: dict, jobs: list, root: Path) -> dict:
    """What made the numbers: versions, machine, hashes of what went in and of the tables that came out, parameters.

    jobs: of xattn.reproduce.plan, all of which have run.
    """
    tables = sorted({file for job in jobs for file in job.outputs if file.suffix == ".csv"})
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions(),
        "data": digest_files(root / profile["data"], "*"),
        "models": {name: used_model(root, path) for name, path in profile["models"].items()}
        | dict.fromkeys(profile["not_run"], "not run"),
        "notebooks": {job.source.name: digest(cells(job.source)) for job in jobs},
        "tables": {file.name: digest_file(file) for file in tables},
        "steps": {job.name: {"parameters": job.parameters, "seconds": recorded(job.copy)["seconds"]} for job in jobs},
    }
