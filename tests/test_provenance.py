"""Hashes of files, values and code: what they depend on, and what they ignore on purpose."""

import json
import os
import platform
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from reproduction.provenance import cells, digest_code, digest_files, processor, provenance, used_model, versions
from reproduction.tables import ROOT
from xattn.attribution import settings
from xattn.files import hash_file, hash_value


def test_file_has_the_hash_of_its_bytes(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"0.5")
    # printf 0.5 | sha256sum
    assert hash_file(path) == "d2cbad71ff333de67d07ec676e352ab7f38248eb69c942950157220607c55e84"


def test_hash_of_a_value_ignores_the_order_of_keys():
    assert hash_value({"seed": 0, "p": 0.5}) == hash_value({"p": 0.5, "seed": 0}) != hash_value({"p": 0.5, "seed": 1})


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda folder: os.utime(folder / "a.csv", (0, 0)), True),
        (lambda folder: (folder / "README.md").write_text("a card"), True),
        (lambda folder: (folder / "a.csv").write_text("2"), False),
        (lambda folder: (folder / "a.csv").rename(folder / "b.csv"), False),
        (lambda folder: (folder / "sub" / "c.csv").write_text("3"), False),
    ],
    ids=["time", "card", "content", "name", "file in a subfolder"],
)
def test_hash_of_a_folder(tmp_path, change, same):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.csv").write_text("1")
    before = digest_files(tmp_path, "**/*")
    change(tmp_path)
    assert (digest_files(tmp_path, "**/*") == before) is same


MAPS = """\
'''Maps.'''
from kit import files

def build(x):
    '''Build.'''
    return 2 * x
"""
LOAD = """\
def load(kind):
    if kind == 'b':
        from kit.models.b import Model
    return Model
"""
MODULES = {
    "kit/__init__.py": "from kit.maps import build\n",
    "kit/maps.py": MAPS,
    "kit/files.py": "LIMIT = 3\n",
    "kit/models/__init__.py": "",
    "kit/models/load.py": LOAD,
    "kit/models/b.py": "class Model:\n    '''A model.'''\n    x = 1\n",
    "kit/figures.py": "import kit\nCOLOUR = 'red'\n",
}
NOTEBOOK = "%matplotlib inline\n!ls\nimport kit.models.load as loading\nprint(loading.load('b'))"


@pytest.fixture
def kit(tmp_path):
    """A package whose modules import each other; NOTEBOOK imports all of them but kit/figures.py."""
    for name, code in MODULES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(code)
    return tmp_path


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("kit/maps.py", "2 * x", "2 * x  # twice"),
        ("kit/maps.py", "    return", "\n    # a comment\n    return"),
        ("kit/maps.py", "2 * x", "(\n        2\n        * x\n    )"),
        ("kit/maps.py", "'''Maps.'''", "'''Maps of an utterance.\n\nMore about them.\n'''"),
        ("kit/maps.py", "'''Build.'''", '"""Build a dataset."""'),
        ("kit/models/b.py", "'''A model.'''", '"""Another text."""'),
        ("kit/figures.py", "red", "blue"),
    ],
    ids=["comment", "comment line", "layout", "module docstring", "docstring", "class docstring", "other module"],
)
def test_hash_of_code_ignores(kit, module, old, new):
    before = digest_code(NOTEBOOK, kit)
    assert MODULES[module].count(old) == 1
    (kit / module).write_text(MODULES[module].replace(old, new))
    assert digest_code(NOTEBOOK, kit) == before


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("kit/models/load.py", "'b'", "'c'"),
        ("kit/models/b.py", "x = 1", "x = 2"),
        ("kit/models/__init__.py", "", "X = 1"),
        ("kit/__init__.py", "import build", "import build as made"),
        ("kit/maps.py", "2 * x", "3 * x"),
        ("kit/files.py", "LIMIT = 3", "LIMIT = 4"),
    ],
    ids=["imported", "in a function", "package", "outer package", "through a package", "indirect"],
)
def test_hash_of_code_depends_on(kit, module, old, new):
    before = digest_code(NOTEBOOK, kit)
    (kit / module).write_text(MODULES[module].replace(old, new))
    assert digest_code(NOTEBOOK, kit) != before


def test_hash_of_code_names_the_module_that_is_not_python(kit):
    (kit / "kit" / "files.py").write_text("LIMIT =")
    with pytest.raises(SyntaxError, match=r"invalid syntax \(files.py, line 1\)"):
        digest_code(NOTEBOOK, kit)


@pytest.fixture(scope="module")
def dependencies(tmp_path_factory):
    """Whether the maps' notebook depends on a module, from a copy of the repository in which the module is edited."""
    root = tmp_path_factory.mktemp("repository")
    for package in ("xattn", "reproduction"):
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    notebook = cells(ROOT / "notebooks" / "paper" / "10_maps.ipynb")
    source = "\n".join(text for kind, text in notebook if kind == "code")
    before = digest_code(source, root)

    def depends(module):
        text = (root / module).read_text(encoding="utf-8")
        (root / module).write_text(f"{text}\nADDED = 1\n", encoding="utf-8")
        after = digest_code(source, root)
        (root / module).write_text(text, encoding="utf-8")
        return after != before

    return depends


@pytest.mark.parametrize("module", ["xattn/figures.py", "reproduction/figures.py", "xattn/analysis/faithfulness.py"])
def test_maps_do_not_depend_on(dependencies, module):
    assert not dependencies(module)


def test_maps_depend_on_perturbation_and_models(dependencies):
    models = [path.relative_to(ROOT).as_posix() for path in (ROOT / "xattn" / "models").glob("*.py")]
    modules = ["xattn/attribution/occlusion.py", "xattn/explain.py", "xattn/store.py", "xattn/audio.py", *models]
    assert "xattn/models/whisper.py" in modules
    assert [module for module in modules if not dependencies(module)] == []


@pytest.mark.parametrize(
    ("model", "recorded"),
    [
        ("owner/small", "owner/small@" + 40 * "a"),  # the branch main in the hub's cache
        ("owner/small@v1", "owner/small@" + 40 * "b"),
        ("owner/small@" + 40 * "b", "owner/small@" + 40 * "b"),
        ("owner/small@v2", "owner/small@v2"),  # not downloaded
        ("owner/large", "owner/large"),
    ],
)
def test_hub_model_is_recorded_with_its_commit(tmp_path, monkeypatch, model, recorded):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = tmp_path / "models--owner--small"
    (cached / "refs").mkdir(parents=True)
    for name, letter in (("main", "a"), ("v1", "b")):
        (cached / "refs" / name).write_text(40 * letter)
        (cached / "snapshots" / (40 * letter)).mkdir(parents=True)
        (cached / "snapshots" / (40 * letter) / "config.json").write_text("{}")
    assert used_model(tmp_path, model) == recorded


def test_model_folder_is_recorded_with_its_hash_even_if_its_path_looks_like_a_hub_id(tmp_path):
    (tmp_path / "models" / "base").mkdir(parents=True)
    (tmp_path / "models" / "base" / "weights").write_text("0.5")
    assert used_model(tmp_path, "models/base") == digest_files(tmp_path / "models/base", "**/*")


def test_versions_are_those_of_the_packages_that_a_run_can_use():
    found = versions()
    assert found["numpy"] and {"torch", "papermill"} <= found.keys() and len(found) > 15
    assert not {"pytest", "dask", "espeakng-loader"} & found.keys()


def test_processor_has_the_name_that_the_system_gives_it(monkeypatch):
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = {line.partition(":")[2].strip() for line in lines if line.startswith("model name")}
    assert processor(torch.device("cpu")) in (names or {platform.processor()})
    monkeypatch.setattr(Path, "read_text", lambda path, encoding: "processor : 0\nmodel name\t: Xeon 3 GHz\nflags :\n")
    assert processor(torch.device("cpu")) == "Xeon 3 GHz"
    monkeypatch.setattr(Path, "read_text", lambda path, encoding: "processor : 0\n")
    assert processor(torch.device("cpu")) == platform.processor()
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: f"GPU {device.index}")
    assert processor(torch.device("cuda:1")) == "GPU 1"


@pytest.fixture
def finished(tmp_path):
    """A repository after a run of one notebook, as (profile, jobs, root)."""
    source, copy, table = (tmp_path / name for name in ("20_table.ipynb", "copy.ipynb", "20_table.csv"))
    cell = {"cell_type": "code", "source": ["rho = 1"]}
    source.write_text(json.dumps({"cells": [cell]}))
    copy.write_text(json.dumps({"metadata": {"xattn": {"inputs": "hash", "seconds": 2.5}}}))
    table.write_text("rho\n1\n")
    for name in ("data/manifest.csv", "models/base/weights"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(name)
    job = SimpleNamespace(name="20_table", source=source, copy=copy, outputs=[table], parameters={"seed": 3})
    profile = {"data": "data", "models": {"base": "models/base"}, "not_run": ["big"], "device": "cpu"}
    return profile, [job], tmp_path


def test_record_of_a_run(finished):
    profile, jobs, root = finished
    facts = provenance(profile, jobs, root)
    assert facts["tables"] == {"20_table.csv": hash_file(root / "20_table.csv")}
    assert facts["models"] == {"base": digest_files(root / "models/base", "**/*"), "big": "not run"}
    assert facts["data"] == digest_files(root / "data", "*")
    assert facts["notebooks"] == {"20_table.ipynb": hash_value([("code", "rho = 1")])}
    assert facts["steps"] == {"20_table": {"parameters": {"seed": 3}, "seconds": 2.5}}
    assert facts["processor"] == processor(torch.device("cpu")) and facts["packages"] == versions()
    assert json.loads(json.dumps(facts)) == facts


@pytest.mark.parametrize(
    ("asked", "has_bfloat16", "used"),
    [
        *(("bfloat16", True, "bfloat16"), ("bfloat16", False, "float32"), ("auto", True, "bfloat16")),
        *(("auto", False, "float32"), ("float32", True, "float32"), (None, True, "")),
    ],
)
def test_precision_is_recorded_as_it_was_used(finished, monkeypatch, asked, has_bfloat16, used):
    profile, jobs, root = finished
    monkeypatch.setattr(settings, "has_bfloat16", lambda device: device.type == "cpu" and has_bfloat16)
    facts = provenance(profile | ({"precision": asked} if asked else {}), jobs, root)
    assert facts["precision"] == used


def test_threads_are_those_of_each_notebook(finished, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert provenance(*finished)["threads"] == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("os.cpu_count", lambda: 7)
    assert provenance(*finished)["threads"] == 7
