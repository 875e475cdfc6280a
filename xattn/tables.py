"""Tables in the paper's arrangement, as text: our numbers with their intervals, and the paper's where we hold them."""

from pathlib import Path

import pandas as pd

from xattn.provenance import ROOT

PAPER = ROOT / "data" / "paper.csv"
PUBLISHED = {"small": "fama-small", "large": "fama-medium"}  # the paper's models under their own names


def written(table: pd.DataFrame, value: str, digits: int = 2, bounds: tuple[str, str] = ("low", "high")) -> pd.Series:
    """The column `value` with its interval as text: "0.43 (0.40 to 0.47)", or "0.43" where there is none; where there
    is no value, nothing."""
    number, low, high = (table[name].map(f"{{:z.{digits}f}}".format) for name in (value, *bounds))
    text = number + (" (" + low + " to " + high + ")").where(table[bounds[0]].notna(), "")
    return text.where(table[value].notna(), "")


def paper_values(table: str) -> pd.DataFrame:
    """The numbers of one of the paper's tables that we hold: metric, model, setting, value, note (data/paper.csv).

    Those of its small and large stand under the names that these were published by, too.
    """
    held = pd.read_csv(PAPER).query("table == @table").drop(columns="table")
    own = held.assign(model=held.model.map(PUBLISHED))
    return pd.concat([held, own.dropna(subset="model")])


def save(table: pd.DataFrame, path: str | Path, caption: str) -> None:
    """Write a table of texts as Markdown under its caption; what is missing stays empty."""
    names = [*table.index.names, *table.columns] if table.index.names[0] else list(table.columns)
    rows = table.reset_index() if table.index.names[0] else table
    rows = rows.set_axis([" ".join(map(str, n)) if isinstance(n, tuple) else str(n) for n in names], axis=1)
    text = rows.fillna("").to_markdown(index=False, disable_numparse=True)
    Path(path).write_text(f"{caption}\n\n{text}\n", encoding="utf-8")
