"""The profile `paper` end to end, with tiny random models in FAMA's format and speech in the layout of EuroParl-ST."""

import json

import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import write_europarl
from test_fama import tiny, write_published

from reproduction.pipeline import STEPS, plan, run
from reproduction.profiles import load_profile, without_absent
from reproduction.tables import ROOT
from xattn import load_corpus, load_maps
from xattn.data.europarl import prepare

PAPER = ROOT / "notebooks" / "profiles" / "paper.yaml"


@pytest.fixture
def repository(made, vocabulary, tiny_folder, tmp_path):
    """A repository with the models and corpus of the profile, and the profile with few masks: (root, path)."""
    root, profile = tmp_path / "kit", yaml.safe_load(PAPER.read_text(encoding="utf-8"))
    root.mkdir()
    for name in ("notebooks", "xattn", "reproduction"):
        (root / name).symlink_to(ROOT / name)
    for source, target in (("en", "it"), ("it", "en")):
        spoken = load_corpus(ROOT / "data", language=source, split="test")[:3]
        audio = [utterance.audio() for utterance in spoken]
        ends = np.cumsum([len(samples) for samples in audio]) / 16_000
        texts = ((utterance.transcript, utterance.translation) for utterance in spoken)
        segments = [(start, end, *both) for start, end, both in zip([0, *ends], ends, texts, strict=False)]
        speech = {f"{source}.20080924.31.3-243": (np.concatenate(audio), 44_100, segments)}
        write_europarl(root / "europarl", source, target, "test", speech)
    prepare(root / "europarl", root / profile["data"], partial=True)
    for seed, (name, source) in enumerate(profile["models"].items()):
        if name == "base":
            (root / source).parent.mkdir(parents=True)
            (root / source).symlink_to(tiny_folder)
        else:
            write_published(root / source, tiny(made, seed=seed), vocabulary)
    # Convolutions with 16 channels, which only toy models have, take minutes in bfloat16 on a CPU.
    few = {"utterances": 2, "input_masks": 40, "encoder_masks": 40, "precision": "float32", "device": "cpu"}
    path = tmp_path / "paper.yaml"
    path.write_text(yaml.safe_dump(profile | few), encoding="utf-8")
    return root, path


def test_profile_runs_up_to_the_findings(repository):
    root, path = repository
    run(path, root=root, at_once=2)
    figures, profile = root / "figures" / "paper", load_profile(path)
    conditions = [(model, each) for model, directions in profile["directions"].items() for each in directions]
    assert len(conditions) == 9
    for model, direction in conditions:
        maps = list(load_maps(figures / "maps", model, direction))
        assert [item.sizes["input_mask"] for item in maps] == [40, 40]
        assert all(item.utterance.startswith(f"{direction[:2]}.20080924.31.3-243_") for item in maps)
    findings = pd.read_csv(figures / "findings.csv")
    # Two utterances decide nothing.
    assert set(findings.verdict) == {"too noisy"} and findings.value.notna().any()
    assert {"/".join(condition) for condition in conditions} <= set(findings["where"])
    scales = findings[findings.finding == "scale matters little"]
    assert list(scales["where"]) == [
        "base and fama-small, en",
        "base and fama-medium, en",
        *(f"fama-small and fama-medium, {direction}" for direction in profile["directions"]["fama-small"]),
    ]
    facts = json.loads((figures / "provenance.json").read_text())
    assert set(facts["models"]) == set(profile["models"]) and facts["precision"] == "float32"
    written, usual = {path.name for path in figures.glob("*.csv")}, [step for step in STEPS if not step.on_request]
    assert written == {file for step in usual for file in step.outputs if file.endswith(".csv")} == {*facts["tables"]}
    for name in ("tab1", "tab2", "tab3", "tab4", "tab5", "tab6", "partitions"):
        assert {"reliability", "n"} <= set(pd.read_csv(figures / f"{name}.csv").columns), name
    assert not any(job.stale for job in plan(profile, root))


def test_base_model_is_optional(repository):
    root, path = repository
    (root / "data/models/paper/base").unlink()
    profile = without_absent(load_profile(path), root)
    assert profile["not_run"] == ["base"]
    jobs = plan(profile, root)
    assert [job.parameters["model"] for job in jobs if job.source.stem == "10_maps"] == [
        *["FBK-MT/fama-medium"] * 2,
        *["FBK-MT/fama-small"] * 2,
    ]
    given = [job.parameters for job in jobs if "conditions" in job.parameters]
    requested = sum(step.on_request for step in STEPS)
    assert len(given) == len(STEPS) - 3 - requested  # all others but maps, overview and randomised layers
    for parameters in given:
        assert len(parameters["conditions"]) == 8 and "base/en" not in parameters["conditions"]
        assert parameters.get("models", profile["models"]).keys() == {"fama-small", "fama-medium"}
    assert {job.note for job in jobs} == {"Not run: base."}
    assert next(job for job in jobs if job.name == "00_overview").parameters["model"].startswith("FBK-MT/")
