"""Code of another clone, which the environment or PYTHONPATH lead to, is refused."""

import os
import shutil
import subprocess
import sys

import pytest

from reproduction.tables import ROOT


@pytest.fixture
def clones(tmp_path):
    """Two clones, whose xattn is empty, and a folder with only xattn."""
    for name in ("own", "other"):
        (tmp_path / name / "notebooks" / "paper").mkdir(parents=True)
        (tmp_path / name / "reproduction").mkdir()
        for file in ("__init__.py", "clone.py"):
            shutil.copy(ROOT / "reproduction" / file, tmp_path / name / "reproduction")
    for name in ("own", "other", "packages"):
        (tmp_path / name / "xattn").mkdir(parents=True)
        (tmp_path / name / "xattn" / "__init__.py").touch()
    return tmp_path


def imported(clones, path, current="own/notebooks/paper"):
    """Import `reproduction` as a notebook does that is opened by hand; return the last line of the errors."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(clones / each) for each in path)}
    command = [sys.executable, "-P", "-c", "import reproduction"]
    result = subprocess.run(command, cwd=clones / current, env=environment, capture_output=True, text=True)
    return "".join(result.stderr.splitlines()[-1:])


@pytest.mark.parametrize("current", ["own/notebooks/paper", "own", "packages"])
def test_own_code_is_accepted(clones, current):
    assert imported(clones, ["own"], current) == ""


@pytest.mark.parametrize(("path", "found"), [(["other"], "other"), (["packages", "own"], "packages")])
def test_code_of_another_clone_is_refused(clones, path, found):
    assert imported(clones, path) == (
        f"ImportError: This is the repository {clones}/own, but Python imports xattn from {clones}/{found}: unset "
        f"PYTHONPATH, deactivate the environment, and use `make reproduce` or `make lab` in {clones}/own."
    )


def test_every_notebook_imports_the_check():
    for path in (ROOT / "notebooks").glob("*/*.ipynb"):
        text = path.read_text(encoding="utf-8")
        assert "import reproduction" in text or "from reproduction" in text, path
