"""Tables as text, and the paper's values."""

import mistune
import numpy as np
import pandas as pd

from reproduction.tables import format_interval, format_reported, paper_values, save

OURS = pd.DataFrame(
    {"model": ["base", "small"], "rho": [0.434, -0.0449], "low": [0.4, np.nan], "high": [0.466, np.nan], "n": [16, 1]}
)


def test_numbers_are_followed_by_their_interval_if_there_is_one():
    assert format_interval(OURS, "rho").tolist() == ["0.43 (0.40 to 0.47)", "-0.04"]
    assert format_interval(OURS, "rho", digits=3)[0] == "0.434 (0.400 to 0.466)"
    assert format_interval(OURS, "low", bounds=("n", "n")).tolist() == ["0.40 (16.00 to 16.00)", ""]


def test_reported_value_that_is_missing_is_called_too_noisy():
    table = OURS.assign(reported=[0.5421, np.nan], reported_low=[0.5, np.nan], reported_high=[0.6, np.nan])
    assert format_reported(table).tolist() == ["0.54 (0.50 to 0.60)", "too noisy (rho -0.04)"]
    assert format_reported(table, digits=3).tolist() == ["0.542 (0.500 to 0.600)", "too noisy (rho -0.045)"]
    single = table.assign(reported_low=np.nan, reported_high=np.nan)
    assert format_reported(single).tolist() == ["0.54", "too noisy (rho -0.04)"]


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


def test_names_are_shown_as_they_are(tmp_path):
    names = ["$5_a$6", "_small_", "*a*|b", "<b>`c`</b>", "\\a\\", "[x](y)", "~~no~~", "&lt;", "2d_max"]
    table = pd.DataFrame({f"{name}, en": [name] for name in names}, index=pd.Index(["__all__"], name="model"))
    save(table, tmp_path / "tab.md", f"rho(CA, SM^X) of {' '.join(names)}.")
    markdown = (tmp_path / "tab.md").read_text(encoding="utf-8")
    parse = mistune.create_markdown(renderer=None, plugins=["table", "strikethrough", "math", "url"])
    caption, _, read = parse(markdown)
    head, body = read["children"]
    cells = [[texts(cell) for cell in row["children"]] for row in (head, *body["children"])]
    assert cells == [["model", *table.columns], ["__all__", *names]]
    assert texts(caption) == f"rho(CA, SM^X) of {' '.join(names)}."
    assert "2d_max" in markdown  # easy to read as it is, too


def texts(node):
    """The text in a node of parsed Markdown, which must hold nothing but text."""
    assert {child["type"] for child in node["children"]} == {"text"}
    return "".join(child["raw"] for child in node["children"])


def test_values_of_a_table_of_the_paper():
    values = paper_values("tab6").set_index("metric").value
    assert values.to_dict() == {"CA": 41.2, "SM^X 2d_max": 52.9, "SM^X": 91.3}


def test_small_and_large_are_repeated_under_their_published_names():
    values = paper_values("tab4").set_index(["model", "direction"]).value
    assert values["fama-small", "en"] == values["small", "en"] == 0.633
    assert values["fama-medium", "en"] == values["large", "en"] == 0.639
