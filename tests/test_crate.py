"""The records of a run for others' tools: RO-Crate metadata and codecheck.yml.

The checks are those that RO-Crate 1.1, Process Run Crate 0.5 and CODECHECK 1.0 require. The community's validator of
crates is not used, because it fetches JSON-LD contexts from the network.
"""

import hashlib
import json
import re
import shutil
import subprocess
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import xattn
from reproduction.crate import METADATA, crate, entities, pipeline_version
from reproduction.pipeline import steps_of, write_json
from reproduction.profiles import load_profile, without_absent
from reproduction.tables import ROOT

PROFILE = without_absent(load_profile(ROOT / "notebooks" / "profiles" / "mini.yaml"), ROOT)
RESULTS = sorted(
    file
    for step in steps_of(PROFILE, ROOT)
    for file in (*step.outputs, *step.translations)
    if file.endswith((".csv", ".md", ".png"))
)
START, END = "2026-11-26T09:56:47.780767+00:00", "2026-11-26T10:25:53.271187+00:00"
GIT = shutil.which("git")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The committed results of mini with the metadata of a crate, as after a run."""
    output = tmp_path_factory.mktemp("mini")
    shutil.copytree(ROOT / "figures" / "mini", output, dirs_exist_ok=True)
    jobs = []
    for number, step in enumerate(steps_of(PROFILE, ROOT)):
        copy = output / f"{step.notebook}.ipynb"
        times = {"start_time": START if number == 3 else END, "end_time": END if number == 5 else START}
        copy.write_text(json.dumps({"metadata": {"papermill": times}}))
        outputs = [output / file for file in (*step.outputs, *step.translations)]
        jobs.append(SimpleNamespace(copy=copy, source=Path(f"{step.notebook}.ipynb"), outputs=outputs))
    facts = json.loads((output / "provenance.json").read_text(encoding="utf-8"))
    write_json(output / METADATA, crate(PROFILE, jobs, facts, output, ROOT))
    return output


def require_files(path):
    """Every file that a crate lists exists with the stated size and hash; return their names."""
    files = [each for each in entities(path).values() if each["@type"] == "File"]
    for file in files:
        content = (path.parent / file["@id"]).read_bytes()
        assert file["contentSize"] == str(len(content)), file["@id"]
        assert file["sha256"] == hashlib.sha256(content).hexdigest(), file["@id"]
    return sorted(file["@id"] for file in files)


def test_crate_lists_every_table_and_figure_with_its_size_and_hash(folder):
    assert require_files(folder / METADATA) == sorted([*RESULTS, "provenance.json"]) and len(RESULTS) >= 30


@pytest.mark.parametrize("path", sorted(ROOT.glob(f"figures/*/{METADATA}")), ids=lambda path: path.parent.name)
def test_stored_crates_describe_the_files_beside_them(path):
    assert require_files(path)


def test_changed_file_is_noticed(folder, tmp_path):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    with (tmp_path / "tab1.csv").open("a") as file:
        file.write("\n")
    with pytest.raises(AssertionError, match="tab1.csv"):
        require_files(tmp_path / METADATA)


def test_crate_meets_the_requirements_of_ro_crate(folder):
    """RO-Crate 1.1: sections Metadata File Descriptor, Root Data Entity, Data Entities and JSON-LD."""
    document = json.loads((folder / METADATA).read_text(encoding="utf-8"))
    assert document.keys() == {"@context", "@graph"}
    assert document["@context"][0] == "https://w3id.org/ro/crate/1.1/context"
    graph = document["@graph"]
    found = {each["@id"]: each for each in graph}
    assert len(found) == len(graph) > len(RESULTS) and all(each["@type"] for each in graph)
    descriptor, root = found["ro-crate-metadata.json"], found["./"]
    assert descriptor["@type"] == "CreativeWork" and descriptor["about"] == {"@id": "./"}
    assert descriptor["conformsTo"] == {"@id": "https://w3id.org/ro/crate/1.1"}
    assert root["@type"] == "Dataset" and root["name"] and root["description"]
    assert datetime.fromisoformat(root["datePublished"]) and root["license"]["@id"].startswith("https://")
    parts = {part["@id"] for part in root["hasPart"]}
    assert parts == {each["@id"] for each in graph if each["@type"] == "File"}
    assert not any(part.startswith(("/", ".", "#")) or "\\" in part or ":" in part for part in parts)
    for each in graph:  # flat: values are texts, numbers or references, and references lead to an entity
        for key, value in each.items():
            for item in value if isinstance(value, list) else [value]:
                assert isinstance(item, str | int | float | dict), (each["@id"], key)
                known = {*found, "https://w3id.org/ro/crate/1.1"}
                assert not isinstance(item, dict) or (item.keys() == {"@id"} and item["@id"] in known), (each, key)


def test_crate_meets_the_requirements_of_process_run_crate(folder):
    """Process Run Crate 0.5, section Requirements."""
    found = entities(folder / METADATA)
    profile = found[found["./"]["conformsTo"]["@id"]]
    assert profile["@id"] == "https://w3id.org/ro/wfrun/process/0.5" and profile["@type"] == "CreativeWork"
    (run,) = [each for each in found.values() if each["@type"] == "CreateAction"]
    assert found["./"]["mentions"] == {"@id": run["@id"]} and run["name"] and "agent" not in run
    assert (run["startTime"], run["endTime"]) == ("2026-11-26T09:56:47+00:00", "2026-11-26T10:25:53+00:00")
    assert sorted(each["@id"] for each in run["result"]) == sorted([*RESULTS, "provenance.json"])
    used = [found[each["@id"]] for each in run["object"]]
    assert {each["@type"] for each in used} == {"CreativeWork", "PropertyValue"}
    settings = {each["name"]: each["value"] for each in used if each["@type"] == "PropertyValue"}
    assert settings.keys() == PROFILE.keys() and settings["input_masks"] == PROFILE["input_masks"]
    assert json.loads(settings["directions"]) == PROFILE["directions"]
    facts = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    hashes = {each["identifier"] for each in used if each["@type"] == "CreativeWork"}
    assert hashes == {f"sha256:{each}" for each in (facts["data"], *facts["models"].values())}
    tool = found[run["instrument"]["@id"]]
    assert tool["@type"] == "SoftwareApplication" and tool["name"] and "version" not in tool
    assert f"torch=={facts['packages']['torch']}" in tool["softwareRequirements"]


def test_crate_holds_no_path_of_this_machine(folder):
    text = (folder / METADATA).read_text(encoding="utf-8")
    assert str(ROOT) not in text and str(folder) not in text and str(Path.home()) not in text


def test_model_of_the_hub_is_identified_by_its_commit(folder):
    copy = folder / "hub.ipynb"
    copy.write_text(json.dumps({"metadata": {"papermill": {"start_time": START, "end_time": END}}}))
    job = SimpleNamespace(copy=copy, source=copy, outputs=[folder / "tab1.csv"])
    facts = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    facts["models"] = {"tiny": "owner/tiny@1234"}
    found = crate({"profile": "hub", "data": "data", "models": {"tiny": "owner/tiny"}}, [job], facts, folder, ROOT)
    (model,) = [each for each in found["@graph"] if each["@id"] == "#model-tiny"]
    assert model["identifier"] == "owner/tiny@1234" and model["name"] == "The model owner/tiny"


def git(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


@pytest.mark.skipif(not GIT, reason="git is not installed")
def test_version_names_the_commit_and_whether_code_has_changed(tmp_path):
    assert pipeline_version(tmp_path) == (xattn.__version__, "")
    (tmp_path / "xattn").mkdir()
    (tmp_path / "xattn" / "code.py").write_text("a = 1\n")
    git(tmp_path, "init")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "code")
    version, commit = pipeline_version(tmp_path)
    assert re.fullmatch("[0-9a-f]{40}", commit) and version == f"{xattn.__version__}+g{commit}"
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "tab1.csv").write_text("rho\n")
    assert pipeline_version(tmp_path) == (version, commit)  # results are no code
    assert pipeline_version(tmp_path / "xattn") == (xattn.__version__, "")  # the repository is another one's
    (tmp_path / "xattn" / "code.py").write_text("a = 2\n")
    assert pipeline_version(tmp_path) == (f"{version}.changed", "")


def test_version_is_known_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert pipeline_version(ROOT) == (xattn.__version__, "")


@pytest.fixture(scope="module")
def codecheck():
    text = (ROOT / "codecheck.yml").read_bytes().decode("utf-8")
    assert re.search(r"^---$", text, re.M)  # the document start marker
    return yaml.safe_load(text)


def test_codecheck_manifest_lists_the_tables_and_figures_of_mini(codecheck):
    files = [item["file"] for item in codecheck["manifest"]]
    assert sorted(files) == sorted(f"figures/mini/{name}" for name in RESULTS) and len(set(files)) == len(files)
    assert all((ROOT / file).is_file() for file in files)
    assert all(item.keys() == {"file", "comment"} and item["comment"] for item in codecheck["manifest"])
    if GIT and (ROOT / ".git").exists():  # a release without its repository has no list
        listed = subprocess.run(["git", "ls-files", "figures/mini"], cwd=ROOT, capture_output=True, text=True).stdout
        assert sorted(files) == sorted(file for file in listed.split() if not file.endswith(".json"))


def test_codecheck_names_the_paper_and_leaves_the_rest_to_the_codechecker(codecheck):
    assert codecheck.keys() == {"version", "paper", "manifest"}
    assert codecheck["version"] == "https://codecheck.org.uk/spec/config/1.0/"
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["preferred-citation"]
    assert codecheck["paper"] == {
        "title": cited["title"],
        "authors": [{"name": f"{each['given-names']} {each['family-names']}"} for each in cited["authors"]],
        "reference": f"https://doi.org/{cited['doi']}",
    }
