"""What makes a notebook fit for `make reproduce`, for version control and for a reader."""

import ast
import importlib
import json
import re
from pathlib import Path

import pandas as pd
import papermill
import pytest

from reproduction import conditions as conditions_module
from reproduction.pipeline import RELEASED_STEPS, STEPS
from reproduction.profiles import load_profile
from reproduction.tables import ROOT

FOLDERS = [ROOT / "notebooks" / name for name in ("paper", "beyond")]
EVERY_STEP = (*STEPS, *RELEASED_STEPS)
NOTEBOOKS = [path for folder in FOLDERS for path in sorted(folder.glob("*.ipynb"))]
EXPECTED = {"00_overview", "10_maps", "23_heads_and_layers", "30_heatmaps", "40_agreement", "41_sanity"}
ABSOLUTE = re.compile(r"""["'(=\s](/(home|root|work|tmp|mnt|data|Users|scratch)\b|[A-Za-z]:\\|~/)""")
LONGEST = 15  # lines of a code cell; the parameters, one a line, may be more
# Parameters that only a reader sets.
FOR_READERS = {"23_heads_and_layers": {"reduction"}, "30_heatmaps": {"utterance"}}
MAKES_MAPS = {"10_maps": "figures/lab/maps", "11_released": "figures/released/maps"}
# Names of the interface before the package was split.
OLD_NAMES = {
    *("pairs", "pair", "settings", "setting", "source", "interop", "compare"),
    *("load_all", "correlations", "few_against_all", "spoken_tokens", "frame_wise", "mean_std", "spread", "written"),
    *("sources_of", "saliency_on_steps", "together", "expand", "with_means", "labelled", "explain_targets", "cost"),
    *("goals_reached", "convergence_intervals", "correlation_with_noise", "correlations_of_pyramids"),
    *("corrected_for_noise", "map_reliability", "noise_ceiling", "PERCENT", "RESAMPLES"),
}
# Columns and parameters that have other names now; maps keep the attribute setting.
OLD_COLUMNS = {"setting", "source", "pair", "perturbations", "bias", "ceiling", "corrected", "pyramid"}
ATTRIBUTES_OF_MAPS = {"10_maps": {"setting"}, "30_heatmaps": {"setting"}}


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
def test_run_as_it_is_it_leaves_the_figures_of_profiles_alone(path):
    parameters = papermill.inspect_notebook(str(path))
    defaults = {name: ast.literal_eval(each["default"]) for name, each in parameters.items()}
    assert {"output", "maps"} & set(defaults)
    assert defaults.get("output", "figures/lab") == "figures/lab"
    assert defaults.get("maps", "") == MAKES_MAPS.get(path.stem, "")
    assert defaults.get("conditions", ["base/en"]) == ["base/en"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_run_as_it_is_it_finds_or_makes_its_maps(path):
    """Its first use of `maps` is `find_maps(maps, conditions)`, whose result replaces the parameter."""
    if path.stem in MAKES_MAPS or "maps" not in papermill.inspect_notebook(str(path)):
        return
    tree = code_of(path)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "find_maps"]
    assert [ast.unparse(call) for call in calls] == ["find_maps(maps, conditions)"]
    loads = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
    first, *others = sorted((node.lineno, node.col_offset) for node in loads if node.id == "maps")
    assert (calls[0].args[0].lineno, calls[0].args[0].col_offset) == first
    assert not others or "maps = find_maps(maps, conditions)" in map(ast.unparse, tree.body)


@pytest.mark.parametrize("name", ["23_heads_and_layers", "24_models_and_tasks", "25_context_mixing", "90_findings"])
def test_opened_by_hand_it_explains_a_few_utterances_once(
    name, tiny_folder, corpus_folder, tmp_path, monkeypatch, capsys
):
    """Its code, in an empty folder, with a tiny model and few masks in place of the default profile's."""
    (tmp_path / "base").symlink_to(tiny_folder)
    few = {"input_masks": 60, "encoder_masks": 60, "precision": "float32"}
    own = {"models": {"base": str(tmp_path / "base")}, "data": str(corpus_folder)}
    mini = load_profile(ROOT / "notebooks" / "profiles" / "mini.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(conditions_module, "load_profile", lambda path: mini | own | few)
    (path,) = (path for path in NOTEBOOKS if path.stem == name)
    run = compile(code_of(path), name, "exec")
    exec(run, {"display": print})
    printed = capsys.readouterr().out
    assert "Maps: figures/lab/maps (8 utterances; `make reproduce` makes more)" in printed
    assert "2/2 en-test-1: explained" in printed
    assert sorted(file.name for file in tmp_path.glob("figures/*")) == ["lab"]
    written = {file.suffix for file in tmp_path.glob("figures/lab/*.*")}
    assert ".csv" in written and (name == "90_findings" or written == {".csv", ".md", ".png"})
    exec(run, {"display": print})
    assert "explained" not in capsys.readouterr().out


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
def test_its_code_has_no_old_column(path):
    tree, allowed = code_of(path), ATTRIBUTES_OF_MAPS.get(path.stem, set())
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    found = [node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    found += [node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword)]
    found += [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
    found += [word for text in texts for word in re.findall(r"\w+", text)]
    assert OLD_COLUMNS & set(found) <= allowed


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
                if (ROOT / node.module / f"{alias.name}.py").is_file()
            }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            assert hasattr(modules[node.value.id], node.attr), ast.unparse(node)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_names_in_its_titles_pass_through_literal(path):
    """A title can hold formulas, which names must not begin."""
    tree = code_of(path)
    titles = [node.value for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "title"]
    assigned = [node for node in ast.walk(tree) if isinstance(node, ast.Assign | ast.AugAssign)]
    titles += [node.value for node in assigned if "title" in ast.unparse(node).partition("=")[0]]
    values = [part.value for title in titles for part in ast.walk(title) if isinstance(part, ast.FormattedValue)]
    assert not {"model", "condition", "s2t.name", "name", "utterance"} & {ast.unparse(value) for value in values}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_tables_show_dollars(path):
    """Jupyter would show what stands between two of them as a formula, but for an option that the package sets."""
    imports = [node for node in ast.walk(code_of(path)) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert any(re.match("(import|from) reproduction", ast.unparse(node)) for node in imports)
    assert "mathjax_ignore" in pd.DataFrame({"utterance": ["cost$5_a$6"]})._repr_html_()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_names_no_path_of_a_machine(path):
    for cell in [*cells(path, "code"), *cells(path, "markdown")]:
        assert not ABSOLUTE.search(cell["source"]), cell["source"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_links_lead_to_notebooks(path):
    for cell in cells(path, "markdown"):
        for target in re.findall(r"\]\(([^)]*\.ipynb)\)", cell["source"]):
            assert (path.parent / target).resolve().is_file(), target
        for name in re.findall(r"`(\d\d_\w+)`", cell["source"]):
            assert any((folder / f"{name}.ipynb").is_file() for folder in FOLDERS), name


def test_the_overview_lists_every_notebook():
    text = "\n".join(cell["source"] for cell in cells(FOLDERS[0] / "00_overview.ipynb", "markdown"))
    listed = re.findall(r"^\| \[(\w+)\]\(([^)]*)\)", text, re.MULTILINE)
    targets = [(FOLDERS[0] / target).resolve() for _, target in listed]
    assert [target.stem for target in targets] == [name for name, _ in listed]
    assert sorted(targets) == sorted(path for path in NOTEBOOKS if path.stem != "00_overview")


@pytest.mark.parametrize("step", EVERY_STEP, ids=lambda step: step.notebook)
def test_its_parameters_are_those_that_its_step_passes(step):
    path = ROOT / "notebooks" / step.folder / f"{step.notebook}.ipynb"
    declared = set(papermill.inspect_notebook(str(path)))
    passed = set(step.parameters)
    assert passed <= declared
    left = declared - passed - FOR_READERS.get(step.notebook, set())
    assert left <= ({"split", "device", "deletion_step"} if step in RELEASED_STEPS else set()), left
