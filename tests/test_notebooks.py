"""What makes a notebook fit for `make reproduce`, for version control and for a reader."""

import ast
import importlib
import json
import re
from pathlib import Path

import papermill
import pytest

from reproduction.pipeline import RELEASED_STEPS, STEPS

FOLDER = Path(__file__).parents[1] / "notebooks" / "paper"
EVERY_STEP = (*STEPS, *RELEASED_STEPS)
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
EXPECTED = {"00_overview", "10_maps", "23_heads_and_layers", "30_heatmaps"}
ABSOLUTE = re.compile(r"""["'(=\s](/(home|root|work|tmp|mnt|data|Users|scratch)\b|[A-Za-z]:\\|~/)""")
LONGEST = 15  # lines of a code cell; the parameters, one a line, may be more
# Parameters that only a reader sets.
FOR_READERS = {"23_heads_and_layers": {"reduction"}, "30_heatmaps": {"utterance"}, "90_findings": {"reference"}}
# Names of the interface before the package was split; columns of tables still say setting, pair and source.
OLD_NAMES = {
    *("pairs", "pair", "settings", "setting", "source", "interop", "compare"),
    *("load_all", "correlations", "few_against_all", "spoken_tokens", "frame_wise", "mean_std", "spread", "written"),
    *("sources_of", "saliency_on_steps", "together", "expand", "with_means", "labelled", "explain_targets", "cost"),
}


def cells(path: Path, kind: str) -> list[dict]:
    """The cells of a notebook that have this kind, each with its source as one string."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    return [{**cell, "source": "".join(cell["source"])} for cell in notebook["cells"] if cell["cell_type"] == kind]


def is_parameters(cell: dict) -> bool:
    return "parameters" in cell["metadata"].get("tags", [])


def code_of(path: Path) -> ast.Module:
    return ast.parse("\n".join(cell["source"] for cell in cells(path, "code")))


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
    (cell,) = filter(is_parameters, cells(path, "code"))
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
    assert "conditions" not in parameters or ast.literal_eval(parameters["conditions"]["default"]) == ["base/en"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_holds_no_outputs(path):
    for cell in cells(path, "code"):
        assert cell["outputs"] == [] and cell["execution_count"] is None, cell["source"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_formatted_for_version_control(path):
    text = path.read_text(encoding="utf-8")
    notebook = json.loads(text)
    assert text == json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_cells_are_short_and_define_nothing(path):
    for cell in cells(path, "code"):
        assert is_parameters(cell) or len(cell["source"].splitlines()) <= LONGEST, cell["source"]
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    assert not [node.name for node in ast.walk(code_of(path)) if isinstance(node, definitions)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_code_knows_only_names_that_exist(path):
    for node in ast.walk(code_of(path)):
        if isinstance(node, ast.Name):
            assert node.id not in OLD_NAMES, node.id
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(node.module)
            for alias in node.names:
                if not hasattr(module, alias.name):  # a module of a package
                    importlib.import_module(f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_it_takes_from_modules_exists(path):
    """Every `module.name` in its code, for the modules that it imports from this repository."""
    tree = code_of(path)
    modules = {"xattn": importlib.import_module("xattn")}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("xattn", "reproduction"):
            modules |= {
                alias.name: importlib.import_module(f"{node.module}.{alias.name}")
                for alias in node.names
                if (Path(__file__).parents[1] / node.module / f"{alias.name}.py").is_file()
            }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            assert hasattr(modules[node.value.id], node.attr), ast.unparse(node)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_names_no_path_of_a_machine(path):
    for cell in [*cells(path, "code"), *cells(path, "markdown")]:
        assert not ABSOLUTE.search(cell["source"]), cell["source"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_links_lead_to_notebooks(path):
    for cell in cells(path, "markdown"):
        for target in re.findall(r"\]\(([^)]*\.ipynb)\)", cell["source"]):
            assert (path.parent / target).is_file(), target
        for name in re.findall(r"`(\d\d_\w+)`", cell["source"]):
            assert (path.parent / f"{name}.ipynb").is_file(), name


@pytest.mark.parametrize("step", EVERY_STEP, ids=lambda step: step.notebook)
def test_its_parameters_are_those_that_its_step_passes(step):
    declared = set(papermill.inspect_notebook(str(FOLDER / f"{step.notebook}.ipynb")))
    passed = set(step.parameters)
    assert passed <= declared
    left = declared - passed - FOR_READERS.get(step.notebook, set())
    assert left <= ({"split", "device"} if step in RELEASED_STEPS else set()), left
