"""What makes a notebook fit for `make reproduce`, for version control and for a reader."""

import ast
import json
import re
from pathlib import Path

import papermill
import pytest

from xattn.reproduce import RELEASED_STEPS, STEPS

FOLDER = Path(__file__).parents[1] / "notebooks"
EVERY_STEP = (*STEPS, *RELEASED_STEPS)
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
EXPECTED = {"00_overview", "10_maps", "23_heads_and_layers", "30_heatmaps"}
ABSOLUTE = re.compile(r"""["'(=\s](/(home|root|work|tmp|mnt|data|Users|scratch)\b|[A-Za-z]:\\|~/)""")


def cells(path: Path, kind: str) -> list[dict]:
    """The notebook's cells of a kind, their source joined."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [{**cell, "source": "".join(cell["source"])} for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_every_notebook_belongs_to_a_step_and_the_other_way_round():
    names = {path.stem for path in NOTEBOOKS}
    assert names >= EXPECTED
    assert names == {step.notebook for step in EVERY_STEP}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_opens_with_a_title(path):
    first = json.loads(path.read_text(encoding="utf-8"))["cells"][0]
    assert first["cell_type"] == "markdown" and re.match(r"# \S", "".join(first["source"]))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_parameters_are_literals_one_a_line(path):
    (cell,) = [cell for cell in cells(path, "code") if "parameters" in cell["metadata"].get("tags", [])]
    lines = [line for line in cell["source"].splitlines() if line.strip() and not line.startswith("#")]
    assert lines
    for line in lines:
        (statement,) = ast.parse(line).body
        assert isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Name), line
        assert line.count("=") == 1, f"papermill reads a second = as part of a value: {line}"
        ast.literal_eval(statement.value)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_run_as_it_is_it_needs_10_maps_alone_and_leaves_the_figures_of_profiles_alone(path):
    parameters = papermill.inspect_notebook(str(path))
    folders = {ast.literal_eval(parameters[name]["default"]) for name in ("output", "maps") if name in parameters}
    assert folders and folders <= {"figures/lab", "figures/lab/maps", "figures/released/maps"}
    assert "pairs" not in parameters or ast.literal_eval(parameters["pairs"]["default"]) == ["base/en"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_holds_no_outputs(path):
    for cell in cells(path, "code"):
        assert cell["outputs"] == [] and cell["execution_count"] is None, cell["source"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_cells_are_short_and_define_nothing(path):
    for cell in cells(path, "code"):
        assert len(cell["source"].splitlines()) <= 20, cell["source"]
        assert not re.search(r"^\s*(async def|def|class) ", cell["source"], re.MULTILINE), cell["source"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_names_no_path_of_a_machine(path):
    for cell in [*cells(path, "code"), *cells(path, "markdown")]:
        assert not ABSOLUTE.search(cell["source"]), cell["source"]


@pytest.mark.parametrize("step", EVERY_STEP, ids=lambda step: step.notebook)
def test_its_step_passes_only_parameters_it_declares(step):
    declared = papermill.inspect_notebook(str(FOLDER / f"{step.notebook}.ipynb"))
    assert set(step.parameters) <= set(declared)
