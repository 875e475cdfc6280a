"""One set of versions: pyproject.toml, requirements.txt, environment.yml, what is installed and what is imported."""

import ast
import json
import re
import sys
import tomllib
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DECLARED = [Requirement(line) for line in sum(PROJECT["optional-dependencies"].values(), start=PROJECT["dependencies"])]
LOCK_LINES = [line for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines() if line[0] != "#"]
LOCK = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in LOCK_LINES}
OURS = {"xattn", "recipes", "benchmarks", *(path.stem for path in (ROOT / "tests").glob("*.py"))}


def imported(folder: Path) -> dict[str, str]:
    """Top-level modules that the sources and notebooks of a folder import, each with one file that does."""
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


def test_the_lock_is_sorted_exact_and_holds_every_declared_package():
    assert sorted(LOCK_LINES) == LOCK_LINES and len(LOCK) == len(LOCK_LINES) > len(DECLARED) > 20
    for line in LOCK_LINES:
        (pin,) = Requirement(line).specifier
        assert pin.operator == "==" and not Version(pin.version).local, f"{line} is not one public version"
    for requirement in DECLARED:
        pin = LOCK.get(canonicalize_name(requirement.name))
        assert pin and pin in requirement.specifier, f"requirements.txt pins {requirement.name} to {pin}"


def test_conda_takes_its_packages_from_the_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    *conda, pip = environment["dependencies"]
    assert pip == {"pip": ["-r requirements.txt"]} and conda == ["python=3.11", "make", "pip"]
    python = Version(conda[0].split("=")[1])
    assert python in Requirement(f"python{PROJECT['requires-python']}").specifier


@pytest.mark.parametrize("name", LOCK)
def test_the_running_environment_is_the_locked_one(name):
    assert Version(version(name)).public == LOCK[name], f"{name}: call make setup, or activate the right environment"


@pytest.mark.parametrize("folder", ["xattn", "recipes", "notebooks", "tests"])
def test_every_import_is_declared(folder):
    modules = imported(ROOT / folder)
    assert modules, f"{folder} imports nothing: is it there?"
    declared = {canonicalize_name(requirement.name) for requirement in DECLARED}
    providers = packages_distributions()
    for module, path in modules.items():
        if module not in sys.stdlib_module_names and module not in OURS:
            names = {canonicalize_name(name) for name in providers.get(module, [])}
            assert names & declared, f"{path} imports {module}, which pyproject.toml does not declare"


def test_readme_gives_every_dependency_its_reason():
    rows = dict(re.findall(r"^\| ([\w-]+) \| (.+) \|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M))
    reasons = dict(re.findall(r'^    "([\w-]+)[^"]*",  # (.+)$', (ROOT / "pyproject.toml").read_text("utf-8"), re.M))
    assert len(reasons) > 20
    assert {name: rows.get(name) for name in reasons} == reasons
