"""Packages: pyproject.toml, requirements.txt, environment.yml, docs/dependencies.md, installed versions and imports."""

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
