"""Comparing committed tables with a fresh run, and accepting the fresh ones."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

from reproduction import verify
from reproduction.pipeline import CHANGED
from reproduction.profiles import load_profile
from reproduction.tables import ROOT
from reproduction.verify import accept, compare, differences

TABLE = pd.DataFrame({"model": ["base", "base"], "rho": [0.4, 0.5], "low": [0.3, float("nan")], "n": [16, 16]})


def test_equal_tables_do_not_differ():
    assert differences(TABLE, TABLE.copy()) == []


@pytest.mark.parametrize(
    ("column", "value", "differs"),
    [
        *(("rho", 0.409, False), ("rho", 0.411, True), ("low", 0.314, False), ("low", 0.32, True)),
        *(("n", 15, True), ("model", "small", True)),
    ],
)
def test_each_column_has_its_tolerance(column, value, differs):
    fresh = TABLE.copy()
    fresh[column] = fresh[column].where(fresh.index != 0, value)
    found = differences(TABLE, fresh)
    assert bool(found) is differs
    if differs:
        assert len(found) == 1 and found[0].startswith(f"row 2, {column}: {value} instead of ")


def test_missing_text_equals_missing_text():
    table = pd.DataFrame({"map": ["CA", "SM^X"], "minus": [None, "CA"], "area": [60.0, 20.0]})
    assert differences(table, table.copy()) == []
    assert len(differences(table, table.assign(minus=["CA", None]))) == 2


def test_areas_have_a_larger_tolerance_than_correlations():
    table = pd.DataFrame(
        {"map": ["CA"], "metric": ["corpus-capped WER"], "area": [60.0], "low": [50.0], "high": [70.0]}
    )
    assert differences(table, table.assign(area=61.5)) == []
    assert len(differences(table, table.assign(area=62.5))) == 1


def test_missing_rows_columns_and_files_are_reported(tmp_path):
    assert len(differences(TABLE, TABLE.head(1))) == 1
    assert len(differences(TABLE, TABLE.drop(columns="n"))) == 1
    committed, fresh = tmp_path / "committed", tmp_path / "fresh"
    fresh.mkdir()
    assert compare(committed, fresh) == [f"there are no tables in {committed}: make them with `make accept`"]
    TABLE.to_csv(fresh / "tab3.csv", index=False)
    committed.mkdir()
    for folder, models in ((committed, {"base": "1"}), (fresh, {"base": "2"})):
        (folder / "provenance.json").write_text(json.dumps({"data": "0", "models": models}))
    assert compare(committed, fresh) == [
        f"tab3.csv: only in {fresh}",
        "provenance.json: another hash of models",
    ]


def test_accepted_files_agree(tmp_path):
    committed, fresh = tmp_path / "committed", tmp_path / "fresh"
    (fresh / "maps").mkdir(parents=True)
    (fresh / "provenance.json").write_text('{"data": "0", "models": {}, "seconds": 1}')
    TABLE.to_csv(fresh / "tab3.csv", index=False)
    accept(committed, fresh)
    assert sorted(path.name for path in committed.iterdir()) == ["provenance.json", "tab3.csv"]
    assert compare(committed, fresh) == []
    TABLE.assign(rho=[0.1, 0.5]).to_csv(fresh / "tab3.csv", index=False)
    assert compare(committed, fresh) == ["tab3.csv: row 2, rho: 0.1 instead of 0.4"]


@pytest.mark.parametrize(("reason", "kept"), [(CHANGED, False), ("", True), ("not run yet", True)])
def test_fresh_run_from_before_a_change_is_deleted(tmp_path, monkeypatch, reason, kept):
    monkeypatch.setattr(verify, "ROOT", tmp_path)
    maps = tmp_path / "figures" / "fresh" / "smoke" / "maps"
    maps.mkdir(parents=True)
    jobs = [SimpleNamespace(source=Path("23_heads_and_layers.ipynb"), stale=CHANGED)]
    jobs.append(SimpleNamespace(source=Path("10_maps.ipynb"), stale=reason))
    monkeypatch.setattr(verify, "plan", lambda profile, figures: jobs)
    verify.forget_changed(load_profile(ROOT / "notebooks" / "profiles" / "smoke.yaml"))
    assert maps.is_dir() is kept


@pytest.mark.parametrize(
    ("quantity", "tolerance"),
    [
        *(("rho", 0.01), ("r", 0.01), ("reliability", 0.01), ("measured", 0.1), ("reported", 0.1)),
        *(("deletion, SM^X", 2.0), ("insertion", 2.0), ("insertion, SM^X 2d_max", 2.0)),
    ],
)
def test_tolerance_depends_on_the_quantity_of_each_row(quantity, tolerance):
    table = pd.DataFrame({"quantity": ["rho", quantity], "value": 0.43, "spread": 0.2, "low": 0.4, "n": 16})
    # A bound also moves with the standard deviation, whose change Student's quantile multiplies: 2.131 for n = 16.
    for column, factor in (("value", 1), ("spread", 1), ("low", 1 + 2.131 / 15**0.5)):
        moved = [pd.Series([0.0, by * factor * tolerance]) + table[column] for by in (0.9, 1.1)]
        assert differences(table, table.assign(**{column: moved[0]})) == []
        (found,) = differences(table, table.assign(**{column: moved[1]}))
        assert found.startswith(f"row 3, {column}: ")


def test_reported_columns_have_the_tolerance_of_values_without_noise():
    table = TABLE.assign(reliability=0.8, reported=0.5, reported_low=[0.4, float("nan")])
    assert differences(table, table.assign(reported=0.59, reported_low=table.reported_low + 0.15)) == []
    assert len(differences(table, table.assign(reported=0.61))) == 2
    assert differences(table, table.assign(reported=[0.5, float("nan")])) == ["row 3, reported: nan instead of 0.5"]
    assert len(differences(table, table.assign(reliability=0.82))) == 2


def test_findings_have_the_tolerance_of_values_without_noise():
    table = pd.DataFrame({"statistic": ["deletion area, SM^X minus CA", "overall average minus best head"]})
    for column in ("value", "low", "corrected_low", "corrected_high"):
        table = table.assign(**{column: [20.0, 0.4]})
        assert differences(table, table.assign(**{column: [21.9, 0.49]})) == []
        found = differences(table, table.assign(**{column: [22.1, 0.51]}))
        assert found == [f"row 2, {column}: 22.1 instead of 20.0", f"row 3, {column}: 0.51 instead of 0.4"]


def test_verdicts_are_not_compared():
    table = pd.DataFrame({"statistic": ["rho"], "value": [0.4], "low": [0.0001], "high": [0.5], "verdict": ["holds"]})
    assert differences(table, table.assign(low=-0.0001, verdict="undecided")) == []


def test_file_that_cannot_be_written_is_an_error_in_one_sentence(monkeypatch, capsys):
    def full(path, **options):
        raise OSError("figures/tab1.csv could not be written (No space left on device): make room and run this again.")

    monkeypatch.setattr(sys, "argv", ["verify", str(ROOT / "notebooks" / "profiles" / "smoke.yaml")])
    monkeypatch.setattr(verify, "forget_changed", lambda profile: None)
    monkeypatch.setattr(verify, "run", full)
    assert verify.main() == 2
    assert capsys.readouterr().err.startswith("error: figures/tab1.csv could not be written (No space left on device)")
