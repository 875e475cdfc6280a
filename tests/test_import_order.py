"""Dependencies of the library point downwards, and only the reproduction knows the library, not the reverse."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
# From the bottom up; modules on one line do not import each other, except inside a package.
LAYERS = (
    ("containers",),
    ("audio", "files"),
    ("models", "data"),
    ("attribution",),
    ("maps",),
    ("analysis", "store"),
    ("explain", "figures", "released", "words"),
    ("runs", "workers", "explorer_record"),
    ("explorer",),
    ("__init__",),
)
LEVELS = {name: level for level, names in enumerate(LAYERS) for name in names}


def modules(package):
    """Dotted names of a package's modules, with their files."""
    files = sorted((ROOT / package).rglob("*.py"))
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imported(file, known):
    """The known modules that a file imports at any level of nesting."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & known


def layer_of(module):
    return module.split(".")[1] if "." in module else "__init__"


def test_every_module_has_a_layer():
    names = {layer_of(module) for module in modules("xattn")}
    assert names == set(LEVELS), names ^ set(LEVELS)


def test_dependencies_point_downwards():
    files = modules("xattn")
    arrows = {
        (module, target)
        for module, file in files.items()
        for target in imported(file, set(files))
        if layer_of(module) != layer_of(target) and target != "xattn"  # `from xattn import x` names the package too
    }
    assert len(arrows) > 40  # the walk finds imports
    upwards = [
        f"{module} imports {target}"
        for module, target in sorted(arrows)
        if LEVELS[layer_of(target)] >= LEVELS[layer_of(module)]
    ]
    assert not upwards


def test_no_module_imports_itself_through_others():
    for package in ("xattn", "reproduction"):
        files = modules(package)
        graph = {module: imported(file, set(files)) - {package, module} for module, file in files.items()}
        graph = {
            module: {each for each in targets if not module.startswith(f"{each}.")} for module, targets in graph.items()
        }
        assert list(TopologicalSorter(graph).static_order())  # raises CycleError at a circle


def test_the_library_knows_nothing_of_the_reproduction():
    others = {"reproduction", "recipes", "benchmarks", "tests", "papermill", "seaborn", "IPython", "yaml"}
    for module, file in modules("xattn").items():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        roots = {
            alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
        }
        roots |= {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not roots & others, module
