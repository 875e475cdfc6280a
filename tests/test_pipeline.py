"""The pipeline on small notebooks; those that run in real kernels take two seconds each."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from threading import Barrier, Event

import pytest
import yaml

from reproduction.kernels import temporary_folder
from reproduction.pipeline import (
    RELEASED_STEPS,
    STEPS,
    NotebookFailed,
    Step,
    check_parameters,
    comparison,
    execute_all,
    plan,
    run,
    steps_of,
)
from reproduction.profiles import PROFILE_KEYS, load_profile, require_inputs, without_absent
from reproduction.tables import ROOT
from xattn.workers import ENVIRONMENT

PROFILES = sorted((ROOT / "notebooks" / "profiles").glob("*.yaml"))
PROFILE = {
    "profile": "tiny",
    "data": "data",
    "models": {"base": "models/base"},
    "directions": {"base": ["en", "en-it"]},
    "split": "test",
    "utterances": 1,
    "input_masks": 1,
    "encoder_masks": 1,
    "input_p": 0.5,
    "encoder_p": 0.7,
    "seed": 3,
    "precision": "auto",
    "estimator": "mean",
    "reliability": 1.0,
    "partition": "superpixels",
    "deletion_step": 10,
    "device": "cpu",
}
MAPS = Step("10_maps", ("maps", "model", "directions", "seed"), ("maps/base.txt",), per_language=True)
TABLE = Step("20_table", ("maps", "output"), ("20_table.csv",), needs=("10_maps",))
STEPS_HERE = (MAPS, TABLE)
MAKE_MAPS = [
    'maps = ""\nmodel = ""\ndirections = []\nseed = 0',
    "from pathlib import Path\n\nfrom kit.text import read\n\nPath(maps).mkdir(exist_ok=True)\n"
    "print('explaining', directions, seed)\n(Path(maps) / 'base.txt').write_text(read(Path(model, 'weights')))",
]
MAKE_TABLE = [
    'maps = ""\noutput = ""',
    "from pathlib import Path\n"
    "(Path(output) / '20_table.csv').write_text('rho\\n' + (Path(maps) / 'base.txt').read_text())",
]


def write_notebook(path, sources):
    """Write a notebook of code cells; the first one holds the parameters."""
    cells = [
        {"cell_type": "code", "metadata": {}, "source": source, "outputs": [], "execution_count": None, "id": f"c{i}"}
        for i, source in enumerate(sources)
    ]
    cells[0]["metadata"]["tags"] = ["parameters"]
    kernel = {"name": "python3", "language": "python", "display_name": "Python 3"}
    notebook = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(notebook), encoding="utf-8")


@pytest.fixture
def root(tmp_path):
    return make_repository(tmp_path)


def make_repository(tmp_path):
    """A small repository: a profile, corpus, model and package, a notebook that makes maps and one that reads them."""
    for folder in ("notebooks/profiles", "notebooks/paper", "data", "models/base", "models/small", "kit"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "kit" / "text.py").write_text("def read(path):\n    return path.read_text()\n")
    (tmp_path / "kit" / "unused.py").write_text("COLOUR = 'red'\n")
    (tmp_path / "data" / "manifest.csv").write_text("id\n1\n")
    (tmp_path / "models" / "base" / "weights").write_text("0.5")
    write_profile(tmp_path, PROFILE)
    write_notebook(tmp_path / "notebooks" / "paper" / "10_maps.ipynb", MAKE_MAPS)
    write_notebook(tmp_path / "notebooks" / "paper" / "20_table.ipynb", MAKE_TABLE)
    return tmp_path


def write_profile(root, profile):
    path = root / "notebooks" / "profiles" / "tiny.yaml"
    path.write_text(yaml.safe_dump(profile), encoding="utf-8")
    return path


def stale(root, steps=STEPS_HERE):
    """Return the names of the jobs that are not current."""
    return [job.name for job in plan(load_profile(root / "notebooks/profiles/tiny.yaml"), root, steps) if job.stale]


def test_only_what_changed_runs_again(root, capfd):
    profile, figures = root / "notebooks/profiles/tiny.yaml", root / "figures/tiny"
    run(profile, root=root, steps=STEPS_HERE)
    printed = capfd.readouterr().out
    assert "[1/2] 10_maps-base-en" in printed and "[2/2] 20_table" in printed
    assert "explaining ['en', 'en-it'] 3" in printed  # the output of cells is streamed
    assert (figures / "20_table.csv").read_text() == "rho\n0.5"
    assert stale(root) == []

    copies = {path: path.stat().st_mtime_ns for path in figures.rglob("*") if path.is_file()}
    assert len(copies) == 6  # two executed copies, a map, a table, the two records of the run
    run(profile, root=root, steps=STEPS_HERE)
    assert capfd.readouterr().out == "figures/tiny is up to date (2 notebooks); nothing to do.\n"
    assert {path: path.stat().st_mtime_ns for path in figures.rglob("*") if path.is_file()} == copies

    write_notebook(root / "notebooks/paper/20_table.ipynb", [*MAKE_TABLE, "rho = 1"])
    run(profile, root=root, steps=STEPS_HERE)
    printed = capfd.readouterr().out
    assert "[1/1] 20_table" in printed and "10_maps" not in printed

    (root / "models/base/weights").write_text("0.25")
    run(profile, root=root, steps=STEPS_HERE)
    printed = capfd.readouterr().out
    assert "[1/2] 10_maps-base-en" in printed and "[2/2] 20_table" in printed
    assert (figures / "20_table.csv").read_text() == "rho\n0.25"

    facts = json.loads((figures / "provenance.json").read_text())
    assert list(facts) == sorted(facts)
    assert facts["steps"]["10_maps-base-en"]["parameters"] == {
        "maps": "figures/tiny/maps",
        "model": "models/base",
        "directions": ["en", "en-it"],
        "seed": 3,
    }
    assert facts["steps"]["20_table"]["seconds"] > 0
    assert facts["precision"] in ("float32", "bfloat16") and facts["threads"] >= 1 and facts["processor"]
    # sha256sum of the table above
    assert facts["tables"] == {"20_table.csv": "06b48e31fe6e089f3f33dc0e7612d929dca03e8856bf2d9147d99a8c7c8c5ce5"}


@pytest.mark.parametrize("name", ["my {x} proj", "{maps}", "$HOME `a` %s #1 'b' \"c\"", "雪 😀", "caf\udce9"])
def test_folders_can_have_any_name(tmp_path, name):
    root = make_repository(tmp_path / name)
    for folder in ("data", "models"):
        (root / folder).rename(root / f"$y {{seed}} {folder}")
    changed = {"data": "$y {seed} data", "models": {"base": "$y {seed} models/base"}}
    run(write_profile(root, PROFILE | changed), root=root, steps=STEPS_HERE)
    assert (root / "figures/tiny/20_table.csv").read_text() == "rho\n0.5"


SENTENCES = {
    errno.ENOSPC: r" \(No space left on device\): make room",
    errno.EACCES: ", because you have no permission to write there: change the permissions of its folder or",
    errno.EROFS: ", because it is on a read-only file system: choose another folder and run this again",
}


@pytest.mark.parametrize("number", SENTENCES)
def test_notebook_that_cannot_be_written_is_named_with_the_reason(root, monkeypatch, number):
    def refused(path, content):
        raise OSError(number, os.strerror(number), str(path))

    check = "reproduction.pipeline.check_kernel"  # writes elsewhere
    monkeypatch.setattr(check, lambda: None)
    monkeypatch.setattr(Path, "write_bytes", refused)
    with pytest.raises(
        OSError, match=rf"^figures/tiny/.*10_maps-base-en\.running\.ipynb could not be w.*{SENTENCES[number]}"
    ):
        run(root / "notebooks/profiles/tiny.yaml", root=root, steps=STEPS_HERE)


def test_disk_that_gets_full_while_a_notebook_runs_is_named(root, monkeypatch):
    write, calls = Path.write_bytes, []

    def full(path, content):
        calls.extend([path] * (".running." in path.name))
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(
        OSError, match=r"running\.ipynb could not be written \(No space left.*\): make room and run this a"
    ):
        run(root / "notebooks/profiles/tiny.yaml", root=root, steps=STEPS_HERE)


@pytest.mark.parametrize("name", ["figures", "figures/tiny", "figures/tiny/notebooks"])
def test_file_in_the_place_of_a_folder_is_named(root, name):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).touch()
    with pytest.raises(
        OSError, match=f"because {name} is a file where a folder is needed: rename that file and run this"
    ):
        run(root / "notebooks/profiles/tiny.yaml", root=root, steps=STEPS_HERE)


def test_temporary_folder_can_have_a_path_too_long_for_sockets(root, tmp_path, monkeypatch, capfd):
    long = tmp_path / ("long" * 40)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with temporary_folder() as folder:
        assert len(os.fsencode(f"{folder}/kernel-ipc-5")) <= 103
    run(root / "notebooks/profiles/tiny.yaml", root=root, steps=STEPS_HERE)
    assert stale(root) == [] and "TMPDIR" not in capfd.readouterr().out


def test_unusable_temporary_folder_is_reported(root, monkeypatch, capfd):
    monkeypatch.setenv("TMPDIR", "/nowhere")
    monkeypatch.setattr(tempfile, "tempdir", None)
    run(root / "notebooks/profiles/tiny.yaml", root=root, steps=STEPS_HERE)
    used = tempfile.gettempdir()
    assert capfd.readouterr().out.startswith(
        f"No file can be written in TMPDIR, /nowhere: temporary files go to {used}.\n"
    )

    def none():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "gettempdir", none)
        with pytest.raises(
            OSError, match=r"^There is no folder for temporary files: set TMPDIR to one in which you can"
        ):
            temporary_folder()


def test_kernel_that_would_import_another_clone_is_refused_before_anything_runs(root, tmp_path, monkeypatch):
    other = tmp_path / "other"
    (other / "xattn").mkdir(parents=True)
    (other / "xattn" / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(other))
    sentence = f"This is the repository {ROOT}, but Python imports xattn from {other}: unset PYTHONPATH, deactivate the"
    with pytest.raises(NotebookFailed, match=f"^{re.escape(sentence)}"):
        run(root / "notebooks/profiles/tiny.yaml", root=root, steps=STEPS_HERE)
    assert not (root / "figures").exists()


@pytest.mark.parametrize("own", [{}, {"GOMP_SPINCOUNT": "7", "OMP_NUM_THREADS": "5"}])
def test_kernels_get_the_environment_of_workers_unless_the_user_has_set_it(root, jobs, monkeypatch, own):
    environment = {name: each for name, each in os.environ.items() if name not in ENVIRONMENT} | own
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr("reproduction.pipeline.execute", lambda job, root: 1.0)
    execute_all(jobs, root, at_once=1)
    assert environment.items() >= (ENVIRONMENT | own).items() and environment["GOMP_SPINCOUNT"] in ("7", "1000")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda root: write_profile(root, {**PROFILE, "seed": 4}), ["10_maps-base-en", "20_table"]),
        (lambda root: write_profile(root, {**PROFILE, "device": "cuda"}), []),  # not a parameter of these steps
        (lambda root: (root / "data/manifest.csv").write_text("id\n2\n"), []),  # nor is the corpus
        (lambda root: (root / "models/base/weights").touch(), []),
        (
            lambda root: (root / "kit/text.py").write_text("def read(path):\n    return path.read_text() + '!'\n"),
            ["10_maps-base-en", "20_table"],
        ),
        (
            lambda root: (root / "kit/text.py").write_text("def read(path):  # a file\n    return path.read_text()\n"),
            [],
        ),
        (lambda root: (root / "kit/unused.py").write_text("COLOUR = 'blue'\n"), []),
        (lambda root: (root / "figures/tiny/20_table.csv").unlink(), ["20_table"]),
        (lambda root: (root / "figures/tiny/notebooks/20_table.ipynb").write_text("{"), ["20_table"]),
    ],
    ids=[
        *("seed", "device", "corpus", "time of the weights", "imported module", "comment in a module"),
        *("module that is not imported", "output missing", "copy damaged"),
    ],
)
def test_what_makes_a_step_stale(root, change, expected):
    assert stale(root) == ["10_maps-base-en", "20_table"]
    for job in plan(PROFILE, root, STEPS_HERE):  # as if both had run
        for file in (job.copy, *job.outputs):
            file.parent.mkdir(parents=True, exist_ok=True)
            times = dict.fromkeys(("start_time", "end_time"), "2026-01-01T00:00:00+00:00")
            record = {"xattn": {"inputs": job.inputs, "seconds": 1.0}, "papermill": times}
            file.write_text(json.dumps({"metadata": record}))
    assert stale(root) == []
    change(root)
    assert stale(root) == expected


def test_changed_corpus_makes_the_steps_that_read_it_stale(root):
    steps = (replace(MAPS, parameters=(*MAPS.parameters, "data")), TABLE)
    before = [job.inputs for job in plan(PROFILE, root, steps)]
    (root / "data/README.md").write_text("a card is not data")
    assert [job.inputs for job in plan(PROFILE, root, steps)] == before
    (root / "data/manifest.csv").write_text("id\n2\n")
    after = [job.inputs for job in plan(PROFILE, root, steps)]
    assert before[0] != after[0] and before[1] != after[1]


def test_maps_are_made_once_for_each_model_and_spoken_language(root):
    directions = {"base": ["en"], "small": ["en", "it", "en-it", "it-en"]}
    profile = {**PROFILE, "models": {"base": "models/base", "small": "models/small"}, "directions": directions}
    jobs = plan(load_profile(write_profile(root, profile)), root, STEPS_HERE)
    assert [(job.name, job.parameters.get("directions")) for job in jobs] == [
        ("10_maps-base-en", ["en"]),
        ("10_maps-small-en", ["en", "en-it"]),
        ("10_maps-small-it", ["it", "it-en"]),
        ("20_table", None),
    ]


def test_independent_notebooks_run_at_the_same_time(root):
    """Each of two notebooks waits until the other one runs."""
    meet = (
        "import time\n(own,) = directions\nother = {'en': 'it', 'it': 'en'}[own]\n"
        "Path(maps, own).touch()\nwhile not Path(maps, other).exists():\n    time.sleep(0.05)\n"
    )
    write_notebook(root / "notebooks/paper/10_maps.ipynb", [*MAKE_MAPS, meet])
    write_profile(root, {**PROFILE, "directions": {"base": ["en", "it"]}})
    run(root / "notebooks/profiles/tiny.yaml", root=root, steps=STEPS_HERE, at_once=2)
    assert stale(root) == []


@pytest.fixture
def jobs(root):
    """Jobs in order: maps of English and of Italian, a table of them, a figure after it, and a step of its own."""
    for name in ("30_figure", "40_other"):
        shutil.copy(root / "notebooks/paper/20_table.ipynb", root / f"notebooks/paper/{name}.ipynb")
    figure, other = replace(TABLE, notebook="30_figure", needs=(), after=("20_table",)), Step("40_other", (), ())
    profile = {**PROFILE, "directions": {"base": ["en", "it"]}}
    return plan(profile, root, (MAPS, TABLE, figure, other))


def test_steps_wait_for_those_they_need_and_those_they_come_after(root, jobs, monkeypatch):
    """With two at a time, the other step runs while the table and the figure wait for the slow Italian maps."""
    events, other_finished = [], Event()

    def execute(job, root):
        events.append(("start", job.name))
        if job.name == "10_maps-base-it":
            assert other_finished.wait(timeout=10)
            time.sleep(0.1)  # a step that does not wait would start now
        events.append(("end", job.name))
        if job.name == "40_other":
            other_finished.set()

    monkeypatch.setattr("reproduction.pipeline.execute", execute)
    execute_all(jobs, root, at_once=2)
    assert sorted(events) == sorted((event, job.name) for event in ("start", "end") for job in jobs)
    when = {event: position for position, event in enumerate(events)}
    maps_end = max(when["end", "10_maps-base-en"], when["end", "10_maps-base-it"])
    assert maps_end < when["start", "20_table"] < when["end", "20_table"] < when["start", "30_figure"]
    assert when["end", "40_other"] < when["end", "10_maps-base-it"]


def test_failure_is_raised_once_running_jobs_have_ended_and_starts_no_other(root, jobs, monkeypatch):
    both_run, ended = Barrier(2), []

    def execute(job, root):
        both_run.wait(timeout=10)
        if job.name == "10_maps-base-en":
            raise NotebookFailed("no such split")
        time.sleep(0.1)
        ended.append(job.name)

    monkeypatch.setattr("reproduction.pipeline.execute", execute)
    with pytest.raises(NotebookFailed, match="no such split"):
        execute_all(jobs, root, at_once=2)
    assert ended == ["10_maps-base-it"]


INTERRUPTED = """
import sys
from pathlib import Path
from reproduction.pipeline import Step, leave_interrupted, run
root = Path(sys.argv[1])
try:
    maps = Step("10_maps", ("maps", "model", "directions", "seed"), ())
    run(root / "notebooks/profiles/tiny.yaml", root=root, steps=(maps,))
except KeyboardInterrupt:
    leave_interrupted()
"""


def test_interruption_does_not_wait_for_a_running_notebook(root):
    write_notebook(
        root / "notebooks/paper/10_maps.ipynb", [MAKE_MAPS[0], "import time\nprint('started')\ntime.sleep(600)"]
    )
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(root)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert any(line == "started\n" for line in process.stdout)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert process.stderr.read().endswith("Interrupted. Run the same command again to resume.\n")


def test_failure_keeps_the_last_good_copy(root):
    profile, folder = root / "notebooks/profiles/tiny.yaml", root / "figures/tiny/notebooks"
    folder.mkdir(parents=True)
    good = folder / "10_maps-base-en.ipynb"
    good.write_text("the copy of an earlier run")
    write_notebook(root / "notebooks/paper/10_maps.ipynb", [*MAKE_MAPS, "raise ValueError('no such split:\\n  dev')"])
    sentence = (
        r"^10_maps-base-en failed with ValueError: no such split: dev "
        r"\(the traceback is in figures/tiny/notebooks/10_maps-base-en.failed.ipynb\)\.$"
    )
    with pytest.raises(NotebookFailed, match=sentence):
        run(profile, root=root, steps=STEPS_HERE)
    assert good.read_text() == "the copy of an earlier run"
    assert sorted(path.name for path in folder.iterdir()) == ["10_maps-base-en.failed.ipynb", good.name]
    assert "Traceback" in (folder / "10_maps-base-en.failed.ipynb").read_text()
    assert stale(root) == ["10_maps-base-en", "20_table"]


def test_notebook_that_does_not_write_its_outputs_fails(root):
    steps = (replace(MAPS, outputs=("maps/base.txt", "maps/other.txt")), TABLE)
    with pytest.raises(
        NotebookFailed, match=r"10_maps-base-en failed with it did not write figures/tiny/maps/other.txt"
    ):
        run(root / "notebooks/profiles/tiny.yaml", root=root, steps=steps)


def test_notebook_with_invalid_code_is_an_error_before_anything_runs(root):
    write_notebook(root / "notebooks/paper/20_table.ipynb", [*MAKE_TABLE, "rho ="])
    with pytest.raises(ValueError, match=r"20_table.ipynb or a module that it imports is not valid Python \(inv"):
        run(root / "notebooks/profiles/tiny.yaml", root=root, steps=STEPS_HERE)
    assert not (root / "figures").exists()


def test_undeclared_parameter_is_an_error_before_anything_runs(root):
    steps = (MAPS, replace(TABLE, parameters=("maps", "output", "split")))
    with pytest.raises(ValueError, match=r"^20_table.ipynb does not declare split in its parameters cell"):
        run(root / "notebooks/profiles/tiny.yaml", root=root, steps=steps)
    assert not (root / "figures").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"masks": 3}, "the key 'masks' is unknown; a profile has exactly profile, data, models"),
        ({"seed": None}, "the key 'seed' is missing"),
        ({"utterances": 0}, "utterances must be at least 1, not 0"),
        ({"utterances": True}, "utterances must be of type int, not True"),
        ({"input_masks": "2,000"}, "input_masks must be of type int, not '2,000'"),
        ({"encoder_p": 1.0}, "encoder_p is a masking probability between 0 and 1, not 1.0"),
        ({"checked": -1}, "checked must be a number of utterances, 0 or more, and not -1"),
        ({"profile": "mini"}, "profile must be the file's own name, 'tiny', not 'mini'"),
        ({"models": {"base": "a/b/base"}}, "the folder 'a/b/base' of models: base does not exist; put it there"),
        ({"precision": "half"}, "There is no precision 'half': choose one of auto, float32, bfloat16"),
        ({"partition": "published"}, "There is no partition 'published': choose one of superpixels, spread, windows"),
        ({"pyramid": "published"}, "the key 'pyramid' is unknown; a profile has exactly profile, data, models"),
        ({"deletion_step": 7}, "The step of a deletion curve is 7: give a whole number that divides 100"),
        ({"deletion_step": 0}, "The step of a deletion curve is 0: give a whole number that divides 100"),
        ({"deletion_step": 2.5}, "deletion_step must be of type int, not 2.5"),
        ({"reference": 3}, "reference must be of type str, not 3"),
        ({"reference": None, "seeds": 1}, "and can have optional, reference"),
        ({"models": {"base": "models/small"}}, "models: base must have the name of its folder, 'models/small'"),
        ({"directions": {"bass": ["en"]}}, "models and directions must name the same models"),
        ({"directions": {"base": [False]}}, "base must list directions such as en or en-it, each once"),
        (
            {"directions": {"base": ["en", "en"]}},
            "base must list directions such as en or en-it, each once",
        ),
        ({"data": "corpus"}, "the corpus folder 'corpus' does not exist or holds no manifest"),
        ({"optional": "base"}, "optional must be of type list, not 'base'"),
        ({"optional": ["bass"]}, "optional must list some models of the profile, but not all, and not ['bass']"),
        ({"optional": ["base"]}, "optional must list some models of the profile, but not all, and not ['base']"),
    ],
)
def test_error_in_a_profile_is_one_sentence(root, change, sentence):
    profile = {key: value for key, value in {**PROFILE, **change}.items() if value is not None}
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        run(write_profile(root, profile), root=root, steps=STEPS_HERE)
    text = str(error.value)
    assert sentence in text and "tiny" in text and "\n" not in text and text.endswith(".")


def test_hub_model_is_planned_by_its_id_without_a_download(root, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("a download started"))
    jobs = {}
    for revision in ("", "@0a1b", "@refs/pr/2"):
        path = write_profile(root, {**PROFILE, "models": {"base": f"owner/base{revision}"}})
        require_inputs(load_profile(path), root)
        jobs[revision], _ = plan(load_profile(path), root, STEPS_HERE)
        assert jobs[revision].parameters["model"] == f"owner/base{revision}"
        assert [file.name for file in jobs[revision].outputs] == ["base.txt"]
    assert len({job.inputs for job in jobs.values()}) == 3
    path = write_profile(root, {**PROFILE, "models": {"base": "owner/other@base"}})
    with pytest.raises(ValueError, match="models: base must have the name of its folder, 'owner/other@base'"):
        load_profile(path)


def test_optional_model_without_a_folder_is_skipped_and_named_in_the_tables(root, capfd):
    directions = {"base": ["en"], "small": ["en"], "big": ["en"], "huge": ["en"]}
    models = {model: f"models/{model}" for model in directions} | {"big": "models/of/big", "huge": "owner/huge"}
    changed = {"models": models, "directions": directions, "optional": ["big", "small", "huge"]}
    path = write_profile(root, PROFILE | changed)
    table = "Path(output, 'tab9.md').write_text('A caption.\\n\\n| a |\\n\\n| b |\\n')"
    write_notebook(
        root / "notebooks/paper/20_table.ipynb", [MAKE_TABLE[0] + "\nconditions = []", MAKE_TABLE[1] + "\n" + table]
    )
    table = Step("20_table", ("maps", "output", "conditions"), ("20_table.csv", "tab9.md"), needs=("10_maps",))
    jobs = plan(without_absent(load_profile(path), root), root, (MAPS, table))
    assert [job.parameters["model"] for job in jobs[:-1]] == ["models/base", "owner/huge", "models/small"]
    assert jobs[-1].parameters["conditions"] == ["base/en", "huge/en", "small/en"]
    with pytest.raises(FileNotFoundError, match="the folder 'models/of/big' of models: big does not exist"):
        run(write_profile(root, PROFILE | changed | {"optional": []}), root=root, steps=(table,))

    models.pop("huge"), directions.pop("huge")
    path, alone = write_profile(root, PROFILE | changed | {"optional": ["big"]}), replace(table, needs=())
    (root / "figures/tiny/maps").mkdir(parents=True)
    (root / "figures/tiny/maps/base.txt").touch()
    run(path, root=root, steps=(alone,))
    message = "big is not run, because models/of/big does not exist (docs/paper_scale.md says how to make it).\n"
    assert capfd.readouterr().out.startswith(message)
    assert (root / "figures/tiny/tab9.md").read_text() == "A caption. Not run: big.\n\n| a |\n\n| b |\n"
    facts = json.loads((root / "figures/tiny/provenance.json").read_text())
    assert facts["models"].keys() == {"base", "small", "big"} and facts["models"]["big"] == "not run"
    assert facts["steps"]["20_table"]["parameters"]["conditions"] == ["base/en", "small/en"]
    run(path, root=root, steps=(alone,))
    assert capfd.readouterr().out == message + "figures/tiny is up to date (1 notebooks); nothing to do.\n"

    (root / "models/of/big").mkdir(parents=True)
    run(path, root=root, steps=(alone,))
    assert "not run" not in capfd.readouterr().out
    assert (root / "figures/tiny/tab9.md").read_text() == "A caption.\n\n| a |\n\n| b |\n"
    facts = json.loads((root / "figures/tiny/provenance.json").read_text())
    assert len(facts["models"]["big"]) == 64 and len(facts["steps"]["20_table"]["parameters"]["conditions"]) == 3


@pytest.mark.parametrize(("direction", "expected"), [("en", ["a.png"]), ("en-it", ["a.png", "b.png"])])
def test_translations_are_recognised_by_direction_not_by_model_name(root, direction, expected):
    (root / "models/fama-small").mkdir()
    changed = {"models": {"fama-small": "models/fama-small"}, "directions": {"fama-small": [direction]}}
    step = Step("20_table", (), ("a.png",), translations=("b.png",))
    (job,) = plan(load_profile(write_profile(root, {**PROFILE, **changed})), root, (step,))
    assert [file.name for file in job.outputs] == expected


RELEASED = {"profile": "tiny", "data": "data", "released": "files"}
RELEASED["directions"] = {"base": ["en"], "small": ["en-it"]}


def test_profile_of_released_maps_runs_the_steps_that_need_only_maps(root):
    profile = load_profile(write_profile(root, RELEASED))
    assert profile["models"] == {"base": "files/base", "small": "files/small"}
    names = ["11_released", "22_quality", "21_reduction", "23_heads_and_layers", "24_models_and_tasks"]
    names += ["30_heatmaps", "40_agreement", "90_findings"]
    assert [step.notebook for step in steps_of(profile, root)] == names
    for folder in ("files/base/en", "files/small/en-it"):
        (root / folder).mkdir(parents=True)
        assert [step.notebook for step in steps_of(profile, root)] == names  # SM^H must exist for all conditions
        (root / folder / "encoder_saliency.h5").touch()
    assert [step.notebook for step in steps_of(profile, root)] == [*names[:5], "25_context_mixing", *names[5:]]
    assert not any({"split", "device", "deletion_step"} & set(step.parameters) for step in RELEASED_STEPS)
    needs = {step.notebook: step.needs for step in RELEASED_STEPS}
    assert needs.pop("11_released") == () and needs.pop("90_findings") == ("11_released", "21_reduction")
    assert set(needs.values()) == {("11_released",)}
    usual = tuple(step for step in STEPS if not step.on_request)
    assert steps_of(PROFILE | {"beyond": [], "paper": True}, root) == usual
    everything = PROFILE | {
        "beyond": ["42_resolution", "43_methods", "44_sufficiency", "45_regularisation"],
        "paper": True,
    }
    assert steps_of(everything, root) == STEPS
    assert {*STEPS} - {*steps_of(everything | {"reliability": 0.8}, root)} == {
        step for step in STEPS if step.notebook == "28_estimators"
    }
    without_paper = everything | {"beyond": ["43_methods"], "paper": False}
    assert [step.notebook for step in steps_of(without_paper, root)] == ["10_maps", "43_methods"]
    shutil.copy(ROOT / "notebooks/paper/11_released.ipynb", root / "notebooks/paper")
    changed = load_profile(write_profile(root, RELEASED | {"subsampling": 8}))
    for each, frames in ((profile, 4), (changed, 8)):
        first, *_ = plan(each, root, RELEASED_STEPS[:1])
        assert first.parameters["subsampling"] == frames and first.parameters["model"] == "files/base"
        check_parameters(first)
    shutil.copy(ROOT / "notebooks/paper/21_reduction.ipynb", root / "notebooks/paper")
    chosen = [step for step in RELEASED_STEPS if step.notebook in ("11_released", "21_reduction")]
    *_, reduction = plan(profile, root, chosen)
    assert reduction.parameters["models"] == {} and reduction.parameters["conditions"] == ["base/en", "small/en-it"]
    check_parameters(reduction)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"released": 3}, "released must be of type str, not 3"),
        (
            {"models": {"base": "models/base"}},
            "'models' is unknown; a profile has exactly profile, data, released, dir",
        ),
        ({"data": None}, "the key 'data' is missing; a profile has exactly profile, data, released, directions"),
        ({"directions": {}}, "models and directions must name the same models, at least one"),
        ({"directions": {"base": "en"}}, "base must list directions such as en or en-it, each once"),
        ({"subsampling": "4"}, "subsampling must be of type int, not '4'"),
        ({"subsampling": 0}, "subsampling must be at least 1, not 0"),
        ({"optional": []}, "'optional' is unknown; a profile has exactly profile, data, released, directions, and can"),
        ({"deletion_step": 5}, "'deletion_step' is unknown; a profile has exactly profile, data, released, directions"),
        ({"reference": []}, "reference must be of type str, not []"),
        ({}, "the folder 'files/base' of models: base does not exist; put it there"),
    ],
)
def test_error_in_a_profile_of_released_maps_is_one_sentence(root, change, sentence):
    profile = {key: value for key, value in {**RELEASED, **change}.items() if value is not None}
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        run(write_profile(root, profile), root=root)
    text = str(error.value)
    assert sentence in text and "tiny" in text and "\n" not in text and text.endswith(".")


def test_error_of_the_command_line_is_one_sentence():
    command = [sys.executable, "-m", "reproduction.pipeline", "notebooks/profiles/huge.yaml"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 2
    assert result.stderr.startswith("error: There is no profile notebooks/profiles/huge.yaml; profiles in ")
    assert "full, mini, paper, released, smoke" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_committed_profiles_are_valid(path):
    profile = load_profile(path)
    conditions = [(model, each) for model, directions in profile["directions"].items() for each in directions]
    first = "faster-whisper-tiny.en" if path.stem in ("whisper", "timit") else "base"
    assert conditions[0] == (first, "en")  # tab1, tab3 and tab6 show the first condition
    if path.stem in ("mini", "full", "paper", "released"):
        others = {"fama-small", "fama-medium"} if path.stem == "paper" else {"small", "large"}
        assert len(conditions) == 9 and {model for model, _ in conditions} == {"base", *others}
    if path.stem in ("full", "paper"):
        assert profile["input_masks"] == profile["encoder_masks"] == 20_000
        assert (profile["input_p"], profile["encoder_p"]) == (0.5, 0.7)
        assert profile["deletion_step"] == 5
    if path.stem not in ("released", "whisper", "timit"):
        assert (profile["partition"], profile["reliability"]) == ("superpixels", 1.0)  # the paper's
    if profile["reference"]:
        assert path.stem in ("smoke", "mini") and profile["reference"] == "figures/full"
        reference = load_profile(path.with_name("full.yaml"))
        assert profile["models"].items() <= reference["models"].items()


@pytest.mark.parametrize("name", ["smoke", "full"])
def test_dry_run_estimates_the_cost_of_every_step_that_makes_maps(name, monkeypatch, capsys, tmp_path):
    calls = []

    def estimate_cost(model, corpus, directions, occlusion):
        masks = occlusion.input_masks, occlusion.encoder_masks
        calls.append((model, [u.language for u in corpus], directions, occlusion.partition, *masks))
        return 1800.0, 5e8

    monkeypatch.setattr("reproduction.pipeline.load_model", lambda folder, device: (folder, device))
    monkeypatch.setattr("reproduction.pipeline.estimate_cost", estimate_cost)
    monkeypatch.chdir(tmp_path)  # paths are relative to the repository, not to the current folder
    path = ROOT / "notebooks" / "profiles" / f"{name}.yaml"
    run(path, dry_run=True, figures=str(tmp_path))
    profile, printed = load_profile(path), capsys.readouterr().out
    jobs = {
        (model, language): [each for each in directions if each[:2] == language]
        for model, directions in profile["directions"].items()
        for language in dict.fromkeys(each[:2] for each in directions)
    }
    number, masks = profile["utterances"], (profile["input_masks"], profile["encoder_masks"])
    expected = [
        ((f"data/models/{model}", "cpu"), [language] * number, directions, "superpixels", *masks)
        for (model, language), directions in jobs.items()
    ]
    *maps, spread, windows = calls
    assert maps == expected and len(maps) == {"smoke": 2, "full": 5}[name]
    # The two other partitions have few masks in the encoder and at most 8 utterances.
    few = ("data/models/base", "cpu"), ["en"] * min(8, number), ["en"]
    assert (spread, windows) == ((*few, "spread", masks[0], 12), (*few, "windows", masks[0], 12))
    number = sum(not step.on_request for step in STEPS) + len(profile["beyond"])
    assert printed.count("stale ") == number + len(jobs) - 1
    assert printed.count(": about 30.0 min and 500 MB\n") == len(maps)
    assert printed.count("stale    29_partitions (not run yet): about 60.0 min and 1000 MB\n") == 1
    hours = f"{len(maps) / 2 + 1:.1f}"  # half an hour and half a GB for each step of maps
    assert printed.endswith(f"All maps together: about {hours} h and at most {hours} GB.\n")


def test_a_profile_chooses_partitions_utterances_of_each_model_and_further_notebooks(monkeypatch, capsys, tmp_path):
    calls = []

    def estimate_cost(model, corpus, directions, occlusion):
        calls.append((model, len(corpus), directions, occlusion.partition, occlusion.input_masks))
        return 1.0, 1.0

    monkeypatch.setattr("reproduction.pipeline.load_model", lambda folder, device: Path(folder).name)
    monkeypatch.setattr("reproduction.pipeline.estimate_cost", estimate_cost)
    profile = load_profile(ROOT / "notebooks" / "profiles" / "mini.yaml")
    models = {name: profile["models"][name] for name in ("base", "small")}
    directions = {"base": ["en"], "small": ["it"]}
    changes = {"utterances": {"base": 3, "small": 2}, "compared": {"windows": 50}, "beyond": ["42_resolution"]}
    given = {key: profile[key] for key in PROFILE_KEYS} | {"models": models, "directions": directions} | changes
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(given | {"profile": "own"}, sort_keys=False), encoding="utf-8")
    run(path, dry_run=True, figures=str(tmp_path))
    assert calls == [
        ("base", 3, ["en"], "superpixels", 800),
        ("small", 2, ["it"], "superpixels", 800),
        ("base", 3, ["en"], "windows", 50),
    ]
    assert "stale    42_resolution (not run yet)\n" in capsys.readouterr().out
    path.write_text(yaml.safe_dump(given | {"profile": "own", "beyond": ["49_none"]}), encoding="utf-8")
    with pytest.raises(
        ValueError,
        match=r"^The profile own: beyond names 49_none; choose among 42_resolution, 43_methods, "
        r"44_sufficiency, 45_regularisation\.$",
    ):
        run(path, dry_run=True, figures=str(tmp_path))


def test_dry_run_reports_a_missing_device(tmp_path):
    smoke = yaml.safe_load((ROOT / "notebooks" / "profiles" / "smoke.yaml").read_text(encoding="utf-8"))
    path = tmp_path / "smoke.yaml"
    path.write_text(yaml.safe_dump(smoke | {"device": "gpu"}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"^There is no device 'gpu' here .*: set device to cpu, or run this where"):
        run(path, dry_run=True, figures=str(tmp_path))


def test_steps_come_after_those_they_need():
    names = [step.notebook for step in STEPS]
    assert len(set(names)) == len(names) > 0
    assert all(need in names[:i] for i, step in enumerate(STEPS) for need in (*step.needs, *step.after))


def test_steps_can_have_notebooks_in_another_folder(root):
    (root / "notebooks/beyond").mkdir()
    write_notebook(root / "notebooks/beyond/40_other.ipynb", ['output = ""', "print(output)"])
    (job,) = plan(PROFILE, root, (Step("40_other", ("output",), (), folder="beyond"),))
    assert job.source == root / "notebooks/beyond/40_other.ipynb"
    assert job.copy == root / "figures/tiny/notebooks/40_other.ipynb"
    check_parameters(job)
    with pytest.raises(FileNotFoundError, match=r"notebooks/paper/40_other.ipynb of a step does not exist"):
        plan(PROFILE, root, (Step("40_other", ("output",), ()),))


MIXING = """model,direction,saliency,layer,rho,reported
base,en,input,1,0.1,0.15
base,en,input,mean,0.4,{x}
base,en,encoder,mean,0.5,{h}
base,en,difference,mean,0.1,0.1
"""
JUDGED = """finding,where,statistic,value,reliability,verdict
a,base/en,s,0.1,0.8,{a}
b,base/en,s,0.1,0.8,{b}
c,base/en,s,0.1,0.8,holds
"""


def write_results(folder, x=0.5, h=0.6, a="holds", b="holds"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tab5.csv").write_text(MIXING.format(x=x, h=h))
    (folder / "findings.csv").write_text(JUDGED.format(a=a, b=b))


def test_results_are_compared_with_those_of_a_longer_run(tmp_path):
    write_results(tmp_path / "figures/tiny", x=0.47, h="", a="too noisy", b="holds")
    write_results(tmp_path / "figures/full", a="holds", b="does not hold")
    lines = comparison(tmp_path / "figures/tiny", tmp_path / "figures/full", tmp_path).splitlines()
    assert lines[0] == "Compared with figures/full:"
    assert [line.split() for line in lines[1:4]] == [
        ["model", "direction", "saliency", "reported", "reference", "difference"],
        ["base", "en", "input", "0.47", "0.5", "-0.03"],
        ["base", "en", "encoder", "NaN", "0.6", "NaN"],
    ]
    assert lines[4:] == [
        "Largest difference of a reported rho: 0.030; too noisy: 1 of 2.",
        "Verdicts: 3 in both, 2 differ, 1 contradict.",
    ]


@pytest.mark.parametrize("reference", ["", "figures/full", "figures/missing"])
def test_a_run_ends_with_the_comparison_if_there_is_a_reference(root, capsys, monkeypatch, reference):
    def execute(job, root):
        for file in (job.copy, *job.outputs):
            file.parent.mkdir(parents=True, exist_ok=True)
            times = dict.fromkeys(("start_time", "end_time"), "2026-01-01T00:00:00+00:00")
            record = {"xattn": {"inputs": job.inputs, "seconds": 1.0}, "papermill": times}
            file.write_text(json.dumps({"metadata": record}))
        write_results(root / "figures/tiny", x=0.47)
        return 1.0

    monkeypatch.setattr("reproduction.pipeline.execute", execute)
    write_results(root / "figures/full")
    path = write_profile(root, PROFILE | {"reference": reference})
    run(path, root=root, steps=STEPS_HERE)
    printed = capsys.readouterr().out
    assert "  figures/tiny/20_table.csv\n" in printed
    end = "Compared with figures/full:", "Verdicts: 3 in both, 0 differ, 0 contradict.\n"
    found = printed[printed.index("  figures/tiny/20_table.csv") :]
    assert (end[0] in found and found.endswith(end[1])) == (reference == "figures/full")
    assert reference == "figures/full" or "Compared" not in printed


def test_findings_get_the_reference_of_their_profile(root):
    shutil.copy(ROOT / "notebooks/paper/90_findings.ipynb", root / "notebooks/paper")
    step = replace(next(step for step in STEPS if step.notebook == "90_findings"), needs=(), after=())
    for reference in ("figures/full", ""):
        profile = load_profile(write_profile(root, PROFILE | {"reference": reference}))
        (job,) = plan(profile, root, (step,))
        assert job.parameters["reference"] == reference
        check_parameters(job)


@pytest.mark.parametrize("name", ["smoke", "mini", "full"])
def test_committed_tables_are_those_that_the_steps_write(name):
    folder, profile = ROOT / "figures" / name, load_profile(ROOT / "notebooks" / "profiles" / f"{name}.yaml")
    written = {file for step in steps_of(profile, ROOT) for file in step.outputs if file.endswith(".csv")}
    assert {path.name for path in folder.glob("*.csv")} == written
    for path in folder.glob("*.csv"):
        columns = path.read_text(encoding="utf-8").partition("\n")[0].split(",")
        assert not {"setting", "source", "pair", "perturbations", "ceiling", "corrected"} & set(columns), path
    facts = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    assert facts["tables"].keys() == written and {"precision", "processor", "threads"} <= facts.keys()
