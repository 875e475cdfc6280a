"""Tables as text, and the paper's values."""

import numpy as np
import pandas as pd

from reproduction.tables import format_interval, paper_values, save

OURS = pd.DataFrame(
    {"model": ["base", "small"], "rho": [0.434, -0.0449], "low": [0.4, np.nan], "high": [0.466, np.nan], "n": [16, 1]}
)


def test_numbers_are_followed_by_their_interval_if_there_is_one():
    assert format_interval(OURS, "rho").tolist() == ["0.43 (0.40 to 0.47)", "-0.04"]
    assert format_interval(OURS, "rho", digits=3)[0] == "0.434 (0.400 to 0.466)"
    assert format_interval(OURS, "low", bounds=("n", "n")).tolist() == ["0.40 (16.00 to 16.00)", ""]


def test_saved_table_is_markdown_below_its_caption(tmp_path):
    table = OURS.assign(ours=format_interval(OURS, "rho"), paper=["0.588", None])
    table = table.set_index("model")[["ours", "paper", "n"]]
    save(table, tmp_path / "tab.md", "Caption.")
    lines = (tmp_path / "tab.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert lines[:2] == ["Caption.", ""]
    assert cells[0] == ["model", "ours", "paper", "n"]
    assert cells[2:] == [["base", "0.43 (0.40 to 0.47)", "0.588", "16"], ["small", "-0.04", "", "1"]]
    wide = pd.DataFrame({("small", "en"): ["0.4"], ("small", "it"): [None]}, index=pd.Index([1], name="layer"))
    save(wide, tmp_path / "wide.md", "Wide.")
    assert "| layer   | small en   | small it   |" in (tmp_path / "wide.md").read_text(encoding="utf-8")


def test_values_of_a_table_of_the_paper():
    values = paper_values("tab6").set_index("metric").value
    assert values.to_dict() == {"CA": 41.2, "SM^X 2d_max": 52.9, "SM^X": 91.3}


def test_small_and_large_are_repeated_under_their_published_names():
    values = paper_values("tab4").set_index(["model", "setting"]).value
    assert values["fama-small", "en"] == values["small", "en"] == 0.633
    assert values["fama-medium", "en"] == values["large", "en"] == 0.639
