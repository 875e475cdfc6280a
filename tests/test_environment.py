"""Packages: pyproject.toml, requirements.txt, environment.yml, docs/dependencies.md, installed versions and imports.

The Makefile: what it gives to Python.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from xattn.workers import ENVIRONMENT

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LINES = {"library": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
DECLARED = {group: [Requirement(line) for line in lines] for group, lines in LINES.items()}
ALL_DECLARED = sum(DECLARED.values(), start=[])
LOCK_LINES = [line for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines() if line[0] != "#"]
LOCK = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in LOCK_LINES}
OURS = {"xattn", "reproduction", "recipes", "benchmarks", *(path.stem for path in (ROOT / "tests").glob("*.py"))}


def imported(folder: Path) -> dict[str, str]:
    """Return the top-level modules that the sources and notebooks of a folder import, each with one importing file."""
    modules = {}
    for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.ipynb")]):
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".ipynb":
            code = [cell["source"] for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
            lines = "\n".join("".join(source) for source in code).splitlines()
            text = "\n".join(line for line in lines if not line.lstrip().startswith(("%", "!")))
        for node in ast.walk(ast.parse(text, str(path))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            modules.update({name.split(".")[0]: str(path.relative_to(ROOT)) for name in names})
    return modules


def test_lock_is_sorted_exact_and_holds_every_declared_package():
    assert sorted(LOCK_LINES) == LOCK_LINES and len(LOCK) == len(LOCK_LINES) > len(ALL_DECLARED) > 20
    for line in LOCK_LINES:
        (pin,) = Requirement(line).specifier
        assert pin.operator == "==" and not Version(pin.version).local, f"{line} is not one public version"
    for requirement in ALL_DECLARED:
        pin = LOCK.get(canonicalize_name(requirement.name))
        assert pin and pin in requirement.specifier, f"requirements.txt pins {requirement.name} to {pin}"


def test_conda_installs_the_locked_packages():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    *conda, pip = environment["dependencies"]
    assert pip == {"pip": ["-r requirements.txt"]} and conda == ["python=3.11", "make", "pip"]
    python = Version(conda[0].split("=")[1])
    assert python in Requirement(f"python{PROJECT['requires-python']}").specifier


def test_installed_versions_are_the_locked_ones():
    installed = {name: Version(version(name)).public for name in LOCK}
    assert installed == LOCK, "run `make setup`, or activate the right environment"


@pytest.mark.parametrize(
    ("folder", "groups"),
    [
        ("xattn", ["library", "cluster", "datasets"]),
        ("reproduction", ["library", "reproduction"]),
        ("notebooks", ["library", "reproduction"]),
        ("recipes", ["library", "recipes"]),
        ("benchmarks", ["library", "reproduction"]),
        ("tests", list(DECLARED)),
    ],
)
def test_imports_are_declared(folder, groups):
    modules = imported(ROOT / folder)
    assert modules, f"{folder} imports nothing: does it exist?"
    declared = {canonicalize_name(requirement.name) for group in groups for requirement in DECLARED[group]}
    providers = packages_distributions()
    for module, path in modules.items():
        if module not in sys.stdlib_module_names and module not in OURS:
            names = {canonicalize_name(name) for name in providers.get(module, [])}
            assert names & declared, f"{path} imports {module}, which is not declared in {' or '.join(groups)}"


def test_documentation_states_why_each_package_is_needed():
    table = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| ([\w-]+) \| (.+) \|$", table, re.M))
    assert rows.pop("package") == "why"
    reasons = dict(re.findall(r'^    "([\w-]+)[^"]*",  # (.+)$', (ROOT / "pyproject.toml").read_text("utf-8"), re.M))
    assert list(reasons) == [requirement.name for requirement in ALL_DECLARED]
    assert rows == reasons


@pytest.fixture
def make(tmp_path):
    """Run a target in a folder of an awkward name, with a Python that prints its path, its arguments and a variable."""
    folder = tmp_path / "a $HOME $(pwd) `b` {x} #1 'c' \"d\" %e 雪"
    (folder / "notebooks" / "profiles").mkdir(parents=True)
    (folder / "notebooks" / "profiles" / "mini.yaml").touch()
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    call = """printf '%s|' "$0" "$@" "$GOMP_SPINCOUNT"; echo"""
    python.write_text(f"#!/bin/sh\n[ $1 = -c ] || {{ {call}; }} >> called\n")
    python.chmod(0o755)
    environment = {name: each for name, each in os.environ.items() if name not in (*ENVIRONMENT, "CONDA_PREFIX")}

    def run(target, **variables):
        command = ["make", target, f"PYTHON={sys.executable}"]
        given = {**environment, "VIRTUAL_ENV": "", **variables}
        result = subprocess.run(command, cwd=folder, env=given, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return folder, (folder / "called").read_text(encoding="utf-8").splitlines()

    return run


def test_lab_opens_in_a_folder_of_any_name(make):
    folder, (*_, call) = make("lab")
    expected = (
        f"-m|jupyterlab|--ServerApp.root_dir={folder}|--LabApp.default_url=/lab/tree/notebooks/paper/00_overview.ipynb|"
        "--ServerApp.kernel_manager_class=reproduction.lab.KernelsInRoot|--LabApp.app_settings_dir=notebooks/settings|"
        "1000|"
    )
    assert call == f".venv/bin/python|{expected}"


def test_active_environment_can_have_any_name(make):
    folder, _ = make("lab")
    folder, (*_, call) = make("reproduce", VIRTUAL_ENV=f"{folder}/.venv", GOMP_SPINCOUNT="7")
    assert call == f"{folder}/.venv/bin/python|-m|reproduction.pipeline|notebooks/profiles/mini.yaml|7|"


def test_library_is_installed_by_a_path_without_braces_and_dollars(make):
    """setuptools takes them for variables."""
    _, calls = make("setup")
    (call,) = (call.split("|") for call in calls if "|-e|" in call)
    assert call[0].endswith("/venv/bin/python") and not set(call[0]) & set("${}")
    assert call[1:4] == ["-m", "pip", "install"] and not Path(call[0]).exists()


def test_makefile_sets_the_environment_of_workers():
    found = re.findall(r"^export (\w+) \?= (\d+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert dict(found) == ENVIRONMENT
