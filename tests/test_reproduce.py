"""The runner on throw-away notebooks, through papermill and real kernels (two seconds each, so few of them)."""

import json
import re
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml

from xattn.reproduce import (
    RELEASED_STEPS,
    ROOT,
    STEPS,
    NotebookFailed,
    Step,
    check_parameters,
    load_profile,
    plan,
    require_inputs,
    run,
    steps_of,
    without_absent,
)

PROFILES = sorted((ROOT / "notebooks" / "profiles").glob("*.yaml"))
PROFILE = {
    "profile": "tiny",
    "data": "data",
    "models": {"base": "models/base"},
    "settings": {"base": ["en", "en-it"]},
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
    "pyramid": "published",
    "device": "cpu",
}
MAPS = Step("10_maps", ("maps", "model", "settings", "seed"), ("maps/base.txt",), per_source=True)
TABLE = Step("20_table", ("maps", "output"), ("20_table.csv",), needs=("10_maps",))
STEPS_HERE = (MAPS, TABLE)
MAKE_MAPS = [
    'maps = ""\nmodel = ""\nsettings = []\nseed = 0',
    "from pathlib import Path\nPath(maps).mkdir(exist_ok=True)\n"
    "print('explaining', settings, seed)\n(Path(maps) / 'base.txt').write_text(Path(model, 'weights').read_text())",
]
MAKE_TABLE = [
    'maps = ""\noutput = ""',
    "from pathlib import Path\n"
    "(Path(output) / '20_table.csv').write_text('rho\\n' + (Path(maps) / 'base.txt').read_text())",
]


def write_notebook(path, sources):
    """A notebook of code cells, the first one its parameters cell."""
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
    """A repository in miniature: a profile, a corpus, a model, a notebook that makes maps and one that reads them."""
    for folder in ("notebooks/profiles", "data", "models/base", "models/small", "xattn/models"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "xattn" / "models" / "conformer.py").write_text("SUBSAMPLING = 4\n")
    (tmp_path / "data" / "manifest.csv").write_text("id\n1\n")
    (tmp_path / "models" / "base" / "weights").write_text("0.5")
    write_profile(tmp_path, PROFILE)
    write_notebook(tmp_path / "notebooks" / "10_maps.ipynb", MAKE_MAPS)
    write_notebook(tmp_path / "notebooks" / "20_table.ipynb", MAKE_TABLE)
    return tmp_path


def write_profile(root, profile):
    path = root / "notebooks" / "profiles" / "tiny.yaml"
    path.write_text(yaml.safe_dump(profile), encoding="utf-8")
    return path


def stale(root, steps=STEPS_HERE):
    """Names of the executions that are not current."""
    return [job.name for job in plan(load_profile(root / "notebooks/profiles/tiny.yaml"), root, steps) if job.stale]


def test_only_what_changed_runs_again(root, capfd):
    profile, figures = root / "notebooks/profiles/tiny.yaml", root / "figures/tiny"
    run(profile, root=root, steps=STEPS_HERE)
    printed = capfd.readouterr().out
    assert "[1/2] 10_maps-base-en" in printed and "[2/2] 20_table" in printed
    assert "explaining ['en', 'en-it'] 3" in printed  # what a cell prints is seen while it runs
    assert (figures / "20_table.csv").read_text() == "rho\n0.5"
    assert stale(root) == []

    copies = {path: path.stat().st_mtime_ns for path in figures.rglob("*") if path.is_file()}
    assert len(copies) == 5  # two executed copies, a map, a table, the provenance
    run(profile, root=root, steps=STEPS_HERE)
    assert capfd.readouterr().out == "figures/tiny is up to date (2 notebooks); nothing to do.\n"
    assert {path: path.stat().st_mtime_ns for path in figures.rglob("*") if path.is_file()} == copies

    write_notebook(root / "notebooks/20_table.ipynb", [*MAKE_TABLE, "rho = 1"])
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
        "settings": ["en", "en-it"],
        "seed": 3,
    }
    assert facts["steps"]["20_table"]["seconds"] > 0
    # sha256sum of the eight bytes above
    assert facts["tables"] == {"20_table.csv": "06b48e31fe6e089f3f33dc0e7612d929dca03e8856bf2d9147d99a8c7c8c5ce5"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda root: write_profile(root, {**PROFILE, "seed": 4}), ["10_maps-base-en", "20_table"]),
        (lambda root: write_profile(root, {**PROFILE, "device": "cuda"}), []),  # no step here is passed the device
        (lambda root: (root / "data/manifest.csv").write_text("id\n2\n"), []),  # nor the corpus
        (lambda root: (root / "models/base/weights").touch(), []),
        (
            lambda root: (root / "xattn/models/conformer.py").write_text("SUBSAMPLING = 8"),
            ["10_maps-base-en", "20_table"],
        ),
        (lambda root: (root / "figures/tiny/20_table.csv").unlink(), ["20_table"]),
        (lambda root: (root / "figures/tiny/notebooks/20_table.ipynb").write_text("{"), ["20_table"]),
    ],
    ids=["seed", "device", "corpus", "time of the weights", "package", "output gone", "copy damaged"],
)
def test_what_makes_a_step_stale(root, change, expected):
    assert stale(root) == ["10_maps-base-en", "20_table"]
    for job in plan(PROFILE, root, STEPS_HERE):  # as if both had run
        for file in (job.copy, *job.outputs):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"metadata": {"xattn": {"inputs": job.inputs, "seconds": 1.0}}}))
    assert stale(root) == []
    change(root)
    assert stale(root) == expected


def test_a_corpus_makes_the_steps_that_read_it_stale(root):
    steps = (replace(MAPS, parameters=(*MAPS.parameters, "data")), TABLE)
    before = [job.inputs for job in plan(PROFILE, root, steps)]
    (root / "data/README.md").write_text("a card is no data")
    assert [job.inputs for job in plan(PROFILE, root, steps)] == before
    (root / "data/manifest.csv").write_text("id\n2\n")
    after = [job.inputs for job in plan(PROFILE, root, steps)]
    assert before[0] != after[0] and before[1] != after[1]


def test_maps_are_made_once_for_every_model_and_source_language(root):
    settings = {"base": ["en"], "small": ["en", "it", "en-it", "it-en"]}
    profile = {**PROFILE, "models": {"base": "models/base", "small": "models/small"}, "settings": settings}
    jobs = plan(load_profile(write_profile(root, profile)), root, STEPS_HERE)
    assert [(job.name, job.parameters.get("settings")) for job in jobs] == [
        ("10_maps-base-en", ["en"]),
        ("10_maps-small-en", ["en", "en-it"]),
        ("10_maps-small-it", ["it", "it-en"]),
        ("20_table", None),
    ]


def test_independent_notebooks_run_together_and_the_others_wait(root):
    """Each of two map notebooks waits until the other one runs; the table waits for both."""
    meet = (
        "import time\nmine, other = Path(maps, settings[0]), Path(maps, {'en': 'it', 'it': 'en'}[settings[0]])\n"
        "mine.touch()\nwhile not other.exists():\n    time.sleep(0.05)\n"
    )
    write_notebook(root / "notebooks/10_maps.ipynb", [*MAKE_MAPS, meet])
    write_profile(root, {**PROFILE, "settings": {"base": ["en", "it"]}})
    check = "assert {'en', 'it'} <= {path.name for path in Path(maps).iterdir()}"
    write_notebook(root / "notebooks/20_table.ipynb", [*MAKE_TABLE, check])
    run(root / "notebooks/profiles/tiny.yaml", root=root, steps=STEPS_HERE, at_once=2)
    assert stale(root) == []


INTERRUPTED = """
import sys
from pathlib import Path
from xattn.reproduce import Step, leave_interrupted, run
root = Path(sys.argv[1])
try:
    maps = Step("10_maps", ("maps", "model", "settings", "seed"), ())
    run(root / "notebooks/profiles/tiny.yaml", root=root, steps=(maps,))
except KeyboardInterrupt:
    leave_interrupted()
"""


def test_an_interruption_does_not_wait_for_a_running_notebook(root):
    write_notebook(root / "notebooks/10_maps.ipynb", [MAKE_MAPS[0], "import time\nprint('begun')\ntime.sleep(600)"])
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(root)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert any(line == "begun\n" for line in process.stdout)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 130
    assert process.stderr.read().endswith("Interrupted; the same command goes on from here.\n")


def test_a_failure_keeps_the_last_good_copy(root, capfd):
    profile, folder = root / "notebooks/profiles/tiny.yaml", root / "figures/tiny/notebooks"
    folder.mkdir(parents=True)
    good = folder / "10_maps-base-en.ipynb"
    good.write_text("the copy of an earlier run")
    write_notebook(root / "notebooks/10_maps.ipynb", [*MAKE_MAPS, "raise ValueError('no such split:\\n  dev')"])
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


def test_a_notebook_that_does_not_write_its_outputs_fails(root):
    steps = (replace(MAPS, outputs=("maps/base.txt", "maps/other.txt")), TABLE)
    with pytest.raises(
        NotebookFailed, match=r"10_maps-base-en failed with it did not write figures/tiny/maps/other.txt"
    ):
        run(root / "notebooks/profiles/tiny.yaml", root=root, steps=steps)


def test_a_parameter_the_notebook_does_not_declare_is_refused_before_anything_runs(root):
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
        ({"profile": "mini"}, "profile must be the file's own name, 'tiny', not 'mini'"),
        ({"models": {"base": "a/b/base"}}, "the folder 'a/b/base' of models: base does not exist; put it there"),
        ({"precision": "half"}, "There is no precision 'half': choose one of auto, float32, bfloat16"),
        ({"models": {"base": "models/small"}}, "models: base must be called as its folder, 'models/small'"),
        ({"settings": {"bass": ["en"]}}, "models and settings must name the same models"),
        ({"settings": {"base": [False]}}, "settings: base must list such as en or en-it, each once"),
        ({"settings": {"base": ["en", "en"]}}, "settings: base must list such as en or en-it, each once"),
        ({"data": "corpus"}, "the corpus folder 'corpus' does not exist or holds no manifest"),
        ({"optional": "base"}, "optional must be of type list, not 'base'"),
        ({"optional": ["bass"]}, "optional must list models of the profile, not all of them, and not ['bass']"),
        ({"optional": ["base"]}, "optional must list models of the profile, not all of them, and not ['base']"),
    ],
)
def test_a_wrong_profile_ends_in_one_sentence(root, change, sentence):
    profile = {key: value for key, value in {**PROFILE, **change}.items() if value is not None}
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        run(write_profile(root, profile), root=root, steps=STEPS_HERE)
    text = str(error.value)
    assert sentence in text and "tiny" in text and "\n" not in text and text.endswith(".")


def test_a_model_of_the_hub_is_planned_by_its_id_and_fetched_by_nobody(root, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("fetched"))
    jobs = {}
    for revision in ("", "@0a1b", "@refs/pr/2"):
        path = write_profile(root, {**PROFILE, "models": {"base": f"owner/base{revision}"}})
        require_inputs(load_profile(path), root)
        jobs[revision], _ = plan(load_profile(path), root, STEPS_HERE)
        assert jobs[revision].parameters["model"] == f"owner/base{revision}"
        assert [file.name for file in jobs[revision].outputs] == ["base.txt"]
    assert len({job.inputs for job in jobs.values()}) == 3
    path = write_profile(root, {**PROFILE, "models": {"base": "owner/other@base"}})
    with pytest.raises(ValueError, match="models: base must be called as its folder, 'owner/other@base'"):
        load_profile(path)


def test_an_optional_model_without_a_folder_is_left_out_and_the_tables_say_so(root, capfd):
    settings = {"base": ["en"], "small": ["en"], "big": ["en"], "huge": ["en"]}
    models = {model: f"models/{model}" for model in settings} | {"big": "models/of/big", "huge": "owner/huge"}
    changed = {"models": models, "settings": settings, "optional": ["big", "small", "huge"]}
    path = write_profile(root, PROFILE | changed)
    table = "Path(output, 'tab9.md').write_text('A caption.\\n\\n| a |\\n\\n| b |\\n')"
    write_notebook(root / "notebooks/20_table.ipynb", [MAKE_TABLE[0] + "\npairs = []", MAKE_TABLE[1] + "\n" + table])
    table = Step("20_table", ("maps", "output", "pairs"), ("20_table.csv", "tab9.md"), needs=("10_maps",))
    jobs = plan(without_absent(load_profile(path), root), root, (MAPS, table))
    assert [job.parameters["model"] for job in jobs[:-1]] == ["models/base", "owner/huge", "models/small"]
    assert jobs[-1].parameters["pairs"] == ["base/en", "huge/en", "small/en"]
    with pytest.raises(FileNotFoundError, match="the folder 'models/of/big' of models: big does not exist"):
        run(write_profile(root, PROFILE | changed | {"optional": []}), root=root, steps=(table,))

    models.pop("huge"), settings.pop("huge")
    path, alone = write_profile(root, PROFILE | changed | {"optional": ["big"]}), replace(table, needs=())
    (root / "figures/tiny/maps").mkdir(parents=True)
    (root / "figures/tiny/maps/base.txt").touch()
    run(path, root=root, steps=(alone,))
    said = "big is not run: there is no models/of/big (docs/paper_scale.md says how to make one).\n"
    assert capfd.readouterr().out.startswith(said)
    assert (root / "figures/tiny/tab9.md").read_text() == "A caption. Not run: big.\n\n| a |\n\n| b |\n"
    facts = json.loads((root / "figures/tiny/provenance.json").read_text())
    assert facts["models"].keys() == {"base", "small", "big"} and facts["models"]["big"] == "not run"
    assert facts["steps"]["20_table"]["parameters"]["pairs"] == ["base/en", "small/en"]
    run(path, root=root, steps=(alone,))
    assert capfd.readouterr().out == said + "figures/tiny is up to date (1 notebooks); nothing to do.\n"

    (root / "models/of/big").mkdir(parents=True)
    run(path, root=root, steps=(alone,))
    assert "not run" not in capfd.readouterr().out
    assert (root / "figures/tiny/tab9.md").read_text() == "A caption.\n\n| a |\n\n| b |\n"
    facts = json.loads((root / "figures/tiny/provenance.json").read_text())
    assert len(facts["models"]["big"]) == 64 and len(facts["steps"]["20_table"]["parameters"]["pairs"]) == 3


@pytest.mark.parametrize(("setting", "expected"), [("en", ["a.png"]), ("en-it", ["a.png", "b.png"])])
def test_a_translation_is_told_by_the_setting_and_not_by_the_model_s_name(root, setting, expected):
    (root / "models/fama-small").mkdir()
    changed = {"models": {"fama-small": "models/fama-small"}, "settings": {"fama-small": [setting]}}
    step = Step("20_table", (), ("a.png",), translations=("b.png",))
    (job,) = plan(load_profile(write_profile(root, {**PROFILE, **changed})), root, (step,))
    assert [file.name for file in job.outputs] == expected


RELEASED = {"profile": "tiny", "data": "data", "released": "files", "settings": {"base": ["en"], "small": ["en-it"]}}


def test_a_profile_of_released_files_runs_what_needs_maps_alone(root):
    profile = load_profile(write_profile(root, RELEASED))
    assert profile["models"] == {"base": "files/base", "small": "files/small"}
    names = ["11_released", "22_quality", "21_reduction", "23_heads_and_layers", "24_models_and_tasks"]
    names += ["30_heatmaps", "90_findings"]
    assert [step.notebook for step in steps_of(profile, root)] == names
    for folder in ("files/base/en", "files/small/en-it"):
        (root / folder).mkdir(parents=True)
        assert [step.notebook for step in steps_of(profile, root)] == names  # SM^H has to be there for all
        (root / folder / "encoder_saliency.h5").touch()
    assert [step.notebook for step in steps_of(profile, root)] == [*names[:5], "25_context_mixing", *names[5:]]
    assert not any({"split", "device"} & set(step.parameters) for step in RELEASED_STEPS)
    needs = {step.notebook: step.needs for step in RELEASED_STEPS}
    assert needs.pop("11_released") == () and needs.pop("90_findings") == ("11_released", "21_reduction")
    assert set(needs.values()) == {("11_released",)}
    assert steps_of(PROFILE, root) == STEPS
    (root / "notebooks/11_released.ipynb").write_bytes((ROOT / "notebooks/11_released.ipynb").read_bytes())
    changed = load_profile(write_profile(root, RELEASED | {"subsampling": 8}))
    for each, frames in ((profile, 4), (changed, 8)):
        first, *_ = plan(each, root, RELEASED_STEPS[:1])
        assert first.parameters["subsampling"] == frames and first.parameters["model"] == "files/base"
        check_parameters(first)
    (root / "notebooks/21_reduction.ipynb").write_bytes((ROOT / "notebooks/21_reduction.ipynb").read_bytes())
    chosen = [step for step in RELEASED_STEPS if step.notebook in ("11_released", "21_reduction")]
    *_, reduction = plan(profile, root, chosen)
    assert reduction.parameters["models"] == {} and reduction.parameters["pairs"] == ["base/en", "small/en-it"]
    check_parameters(reduction)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"released": 3}, "released must be of type str, not 3"),
        (
            {"models": {"base": "models/base"}},
            "'models' is unknown; a profile has exactly profile, data, released, set",
        ),
        ({"data": None}, "the key 'data' is missing; a profile has exactly profile, data, released, settings"),
        ({"settings": {}}, "models and settings must name the same models, at least one"),
        ({"settings": {"base": "en"}}, "settings: base must list such as en or en-it, each once"),
        ({"subsampling": "4"}, "subsampling must be of type int, not '4'"),
        ({"subsampling": 0}, "subsampling must be at least 1, not 0"),
        ({"optional": []}, "'optional' is unknown; a profile has exactly profile, data, released, settings, and may"),
        ({}, "the folder 'files/base' of models: base does not exist; put it there"),
    ],
)
def test_a_wrong_profile_of_released_files_ends_in_one_sentence(root, change, sentence):
    profile = {key: value for key, value in {**RELEASED, **change}.items() if value is not None}
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        run(write_profile(root, profile), root=root)
    text = str(error.value)
    assert sentence in text and "tiny" in text and "\n" not in text and text.endswith(".")


def test_the_command_line_says_what_is_wrong_in_one_sentence():
    command = [sys.executable, "-m", "xattn.reproduce", "notebooks/profiles/huge.yaml"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 2
    assert result.stderr.startswith("error: There is no profile notebooks/profiles/huge.yaml; profiles in ")
    assert "full, mini, paper, released, smoke" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize("path", PROFILES, ids=lambda path: path.stem)
def test_the_shipped_profiles_are_valid(path):
    profile = load_profile(path)
    pairs = [(model, setting) for model, settings in profile["settings"].items() for setting in settings]
    first = "whisper-tiny" if path.stem == "whisper" else "base"
    assert pairs[0] == (first, "en")  # tab1, tab3 and tab6 are of the first pair
    if path.stem == "whisper":
        assert all(re.fullmatch(r"openai/[\w-]+@[0-9a-f]{40}", model) for model in profile["models"].values())
    if path.stem in ("mini", "full", "paper", "released"):
        others = {"fama-small", "fama-medium"} if path.stem == "paper" else {"small", "large"}
        assert len(pairs) == 9 and {model for model, _ in pairs} == {"base", *others}
    if path.stem in ("full", "paper"):
        assert profile["input_masks"] == profile["encoder_masks"] == 20_000
        assert (profile["input_p"], profile["encoder_p"]) == (0.5, 0.7)


@pytest.mark.parametrize("name", ["smoke", "full"])
def test_the_cost_of_all_steps_that_make_maps_is_told(name, monkeypatch, capsys, tmp_path):
    calls = []

    def cost(model, corpus, settings, occlusion):
        calls.append((model, [u.language for u in corpus], settings, occlusion.pyramid, occlusion.input_masks))
        return 1800.0, 5e8

    monkeypatch.setattr("xattn.reproduce.load_model", lambda folder, device: (folder, device))
    monkeypatch.setattr("xattn.reproduce.cost", cost)
    monkeypatch.chdir(tmp_path)  # a run's paths start in the repository, wherever the command is given
    path = ROOT / "notebooks" / "profiles" / f"{name}.yaml"
    run(path, dry_run=True, figures=str(tmp_path))
    profile, printed = load_profile(path), capsys.readouterr().out
    jobs = {
        (model, source): [setting for setting in settings if setting[:2] == source]
        for model, settings in profile["settings"].items()
        for source in dict.fromkeys(setting[:2] for setting in settings)
    }
    number, masks = profile["utterances"], profile["input_masks"]
    expected = [
        ((f"data/models/{model}", "cpu"), [source] * number, settings, "published", masks)
        for (model, source), settings in jobs.items()
    ]
    expected.append((("data/models/base", "cpu"), ["en"] * number, ["en"], "spread", masks))
    assert calls == expected and len(calls) == {"smoke": 3, "full": 6}[name]
    assert printed.count("stale ") == len(STEPS) + len(jobs) - 1
    assert printed.count(": about 30.0 min and 500 MB\n") == len(calls)
    hours = f"{len(calls) / 2:.1f}"  # half an hour and half a GB each
    assert f"The maps would take about {hours} h and at most {hours} GB, one after the other." in printed


def test_a_dry_run_says_that_a_device_is_not_there(tmp_path):
    smoke = yaml.safe_load((ROOT / "notebooks" / "profiles" / "smoke.yaml").read_text(encoding="utf-8"))
    path = tmp_path / "smoke.yaml"
    path.write_text(yaml.safe_dump(smoke | {"device": "gpu"}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"^There is no device 'gpu' here .*: set device to cpu, or run this where"):
        run(path, dry_run=True, figures=str(tmp_path))


def test_the_steps_read_only_from_steps_before_them():
    names = [step.notebook for step in STEPS]
    assert len(set(names)) == len(names) > 0
    assert all(need in names[:i] for i, step in enumerate(STEPS) for need in (*step.needs, *step.after))
