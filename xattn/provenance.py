"""What a result depends on: hashes of values and files, and the versions of packages."""

import hashlib
import json
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


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


def versions() -> dict[str, str]:
    """Installed version of every package that pyproject.toml declares: any of them may move a number."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return {name: version(name) for name in (re.match(r"[\w-]+", line)[0] for line in project["dependencies"])}
