"""Refuses to import this package if the current repository and Python's `xattn` and `reproduction` are not one.

Otherwise the environment's packages or PYTHONPATH could lead to another clone, whose code the hashes of a run do not
describe.
"""

from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("xattn", "reproduction")

folders = Path.cwd(), *Path.cwd().parents, Path(__file__).resolve().parents[1]
root = next(folder for folder in folders if all((folder / name / "__init__.py").is_file() for name in PACKAGES))
for spec in filter(None, map(find_spec, PACKAGES)):
    own = root / spec.name / "__init__.py"
    found = Path(spec.origin or own).resolve()
    if found != own.resolve():  # a package can be a link
        raise ImportError(
            f"This is the repository {root}, but Python imports {spec.name} from {found.parents[1]}: unset PYTHONPATH, "
            f"deactivate the environment, and use `make reproduce` or `make lab` in {root}."
        )
