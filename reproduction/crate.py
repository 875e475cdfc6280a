"""The provenance of a run as RO-Crate metadata, which catalogues and workflow tools read.

The metadata follow RO-Crate 1.1 and the profile Process Run Crate 0.5
(https://www.researchobject.org/workflow-run-crate/profiles/0.5/process_run_crate). They describe one CreateAction: the
pipeline, at a commit, made tables and figures from models, a corpus and settings. The agent is left out, because the
pipeline does not know it.
"""

import json
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import xattn
from xattn.files import hash_file

METADATA = "ro-crate-metadata.json"
SPECIFICATION = "https://w3id.org/ro/crate/1.1"
PROFILE = "https://w3id.org/ro/wfrun/process/0.5"
CONTEXT = [f"{SPECIFICATION}/context", "https://w3id.org/ro/terms/workflow-run/context"]
FORMATS = {".csv": "text/csv", ".md": "text/markdown", ".png": "image/png", ".json": "application/json"}
CODE = ("xattn", "reproduction", "notebooks", "data", "requirements.txt")  # what a run depends on


def pipeline_version(root: Path) -> tuple[str, str]:
    """The version of the code in a repository.

    Returns:
        The version of xattn with the commit as local version (PEP 440), such as 0.1.0+g08bff22..., which ends in
        .changed if code, notebooks or data differ from the commit; and the commit's hash, or "" if there is none or
        they differ.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True).stdout

    with suppress(OSError, subprocess.CalledProcessError):  # without git, or not a repository
        prefix, commit = git("rev-parse", "--show-prefix", "HEAD").splitlines()
        if not prefix:  # otherwise the repository is that of a folder above
            changed = git("status", "--porcelain", "--", *CODE)
            return f"{xattn.__version__}+g{commit}{'.changed' if changed else ''}", "" if changed else commit
    return xattn.__version__, ""


def crate(profile: dict, jobs: list, facts: dict, output: Path, root: Path) -> dict:
    """The metadata of a run.

    Args:
        jobs: from `reproduction.pipeline.plan`, after all have run.
        facts: from `reproduction.provenance.provenance`.
        output: the folder with the results, which is the crate.
    """
    copies = [json.loads(job.copy.read_text(encoding="utf-8"))["metadata"]["papermill"] for job in jobs]
    start, end = min(_time(copy["start_time"]) for copy in copies), max(_time(copy["end_time"]) for copy in copies)
    notebooks = {file.name: job.source.stem for job in jobs for file in job.outputs if file.suffix in FORMATS}
    origins = {name: f"written by the notebook {notebook}" for name, notebook in notebooks.items()}
    origins["provenance.json"] = "versions, machine, hashes, parameters and seconds of the run"
    version, commit = pipeline_version(root)
    software = {"python": facts["python"], **facts["packages"]}
    name = profile["profile"]
    files = [_file(output / each, origin) for each, origin in sorted(origins.items())]
    used = list(_used(profile, facts))
    pipeline = {
        "@id": "#pipeline",
        "@type": "SoftwareApplication",
        "name": "xattn, reproduction.pipeline",
        "softwareVersion": version,
        "softwareRequirements": [f"{each}=={number}" for each, number in software.items()],
    }
    if commit:
        pipeline["identifier"] = f"swh:1:rev:{commit}"  # a Software Heritage identifier contains the hash that git uses
    action = {
        "@id": "#run",
        "@type": "CreateAction",
        "name": f"The profile {name}",
        "description": f"make reproduce PROFILE={name}, on {facts['platform']}, {facts['processor']}, threads for each "
        f"notebook: {facts['threads']}. The times are those of the first and the last notebook.",
        "startTime": start,
        "endTime": end,
        "instrument": {"@id": "#pipeline"},
        "object": _references(used),
        "result": _references(files),
    }
    crate_of_run = {
        "@id": "./",
        "@type": "Dataset",
        "name": f"Results of the profile {name}",
        "description": "Tables and figures that reproduce 'Cross-Attention is Half Explanation in Speech-to-Text "
        f"Models' (arXiv:2509.18010) with the profile {name} of xattn",
        "datePublished": end,
        "license": {"@id": "https://spdx.org/licenses/Apache-2.0"},
        "conformsTo": {"@id": PROFILE},
        "hasPart": _references(files),
        "mentions": {"@id": "#run"},
    }
    descriptor = {
        "@id": METADATA,
        "@type": "CreativeWork",
        "conformsTo": {"@id": SPECIFICATION},
        "about": {"@id": "./"},
    }
    conforms = {"@id": PROFILE, "@type": "CreativeWork", "name": "Process Run Crate", "version": "0.5"}
    licence = {"@id": "https://spdx.org/licenses/Apache-2.0", "@type": "CreativeWork", "name": "Apache License 2.0"}
    graph = [descriptor, crate_of_run, conforms, licence, action, pipeline, *used, *files]
    return {"@context": CONTEXT, "@graph": graph}


def entities(path: Path) -> dict[str, dict]:
    """The entities of a metadata file by @id; {} if there is no such file."""
    if not path.is_file():
        return {}
    return {entity["@id"]: entity for entity in json.loads(path.read_text(encoding="utf-8"))["@graph"]}


def _time(text: str) -> str:
    """A time without fractions of a second, which some validators refuse."""
    return datetime.fromisoformat(text).isoformat(timespec="seconds")


def _references(listed: list[dict]) -> list[dict]:
    return [{"@id": entity["@id"]} for entity in listed]


def _used(profile: dict, facts: dict) -> Iterator[dict]:
    """The corpus, the models and the settings of a run; they lie outside the crate."""
    for kind, folder, digest in (
        ("corpus", profile["data"], facts["data"]),
        *(("model", profile["models"][name], facts["models"][name]) for name in profile["models"]),
    ):
        # A model on the hub has its id and commit instead.
        hashed = {"description": "The identifier is the SHA-256 of its files' names and contents."}
        yield {
            "@id": f"#{kind}-{Path(folder).name}",
            "@type": "CreativeWork",
            "name": f"The {kind} {folder}",
            **({"identifier": digest} if len(digest) != 64 else hashed | {"identifier": f"sha256:{digest}"}),
        }
    for key, value in profile.items():
        value = value if isinstance(value, str | int | float) else json.dumps(value)
        yield {"@id": f"#setting-{key}", "@type": "PropertyValue", "name": key, "value": value}


def _file(path: Path, description: str) -> dict:
    return {
        "@id": path.name,
        "@type": "File",
        "name": path.name,
        "description": description,
        "encodingFormat": FORMATS[path.suffix],
        "contentSize": str(path.stat().st_size),
        "sha256": hash_file(path),
    }
