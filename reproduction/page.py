"""One page with all results of a profile, figures/<profile>/index.html.

The page is made from the files in its folder. It needs no network, and only its explorer needs scripts. Executed
notebooks become pages beside their copies. The page names what is missing, with the command that makes it.
"""

import base64
import json
import re
from contextlib import redirect_stdout, suppress
from io import StringIO
from itertools import islice
from pathlib import Path

import pandas as pd

from reproduction.crate import METADATA, entities
from reproduction.findings import COMPARED, VERDICTS, changed, compare_reported, contradictions
from reproduction.kernels import AGAIN
from reproduction.notebook_pages import TEMPLATES, accessible, markdown, notebook_page, table_html
from reproduction.provenance import cells
from reproduction.tables import ROOT
from xattn.data.corpus import load_corpus
from xattn.explorer import explore
from xattn.files import write_whole
from xattn.store import load_maps

PAGE, RECORD = "index.html", "provenance.json"
SIGNS = dict(zip(VERDICTS, "✓✗?≈–", strict=True))
CONDITION = re.compile(r"[^\s,]+/[a-z-]+")
EXPLORED = 3  # utterances
PICTURES = {  # that have no table, and so no caption
    "fig1": "Which part of the model each of the three maps covers",
    "fig2": "CA, SM^X and SM^H of one transcript: tokens against time, below the spectrogram",
    "fig2_translation": "CA, SM^X and SM^H of one translation: tokens against time, below the spectrogram",
}


def write_page(profile: dict, steps: tuple, output: Path, root: Path = ROOT) -> Path:
    """Write the page of a profile, and a page for each of its executed notebooks.

    Args:
        profile: from `reproduction.profiles.load_profile`.
        steps: its steps, from `reproduction.pipeline.steps_of`.
        output: the folder with the results.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: the folder holds no results. ValueError: maps are damaged. OSError: a page could not be
            written.
    """
    command = f"make reproduce PROFILE={profile['profile']}"
    if not (output / RECORD).is_file():
        raise FileNotFoundError(f"There are no results in {output}: make them with `{command}`.")
    copies = {path.name.removesuffix(".ipynb"): path for path in sorted(output.glob("notebooks/*.ipynb"))}
    copies = {name: path for name, path in copies.items() if not name.endswith((".failed", ".running"))}
    for name, path in copies.items():
        write_whole(path.with_name(f"{name}.html"), notebook_page(path).encode(), AGAIN)
    steps = sorted(steps, key=lambda step: step.notebook)
    page = TEMPLATES.get_template("report.html.j2").render(
        profile=profile,
        command=command,
        signs=SIGNS,
        settings={name: setting_text(value) for name, value in profile.items() if value not in ([], {}, "")},
        findings=findings(output / "findings.csv"),
        comparison=comparison(output, root / profile["reference"]) if profile["reference"] else None,
        first_condition=first_condition(profile),
        explorer=explorer_page(profile, output / "maps", root),
        parts=[part for part in (part_of(step, output, root) for step in steps) if part["items"]],
        notebooks={name: title_of(path)[0] for name, path in copies.items()},
        **provenance_of(output),
    )
    write_whole(output / PAGE, page.encode(), AGAIN)
    return output / PAGE


def first_condition(profile: dict) -> str:
    """The first model with its first direction, such as "base/en"."""
    model, directions = next(iter(profile["directions"].items()))
    return f"{model}/{directions[0]}"


def setting_text(value: object) -> str:
    """A value of a profile without the marks of a programming language."""
    if isinstance(value, dict):
        return "; ".join(f"{name}: {setting_text(each)}" for name, each in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def findings(path: Path) -> dict | None:
    """The rows of findings.csv, arranged; None without the file.

    Returns:
        conditions: the columns of the matrix; matrix: for each finding and statistic, its rows by condition; compared:
        the rows about several conditions or none; counts: of verdicts, as text; table: all rows as HTML. A row has the
        column `numbers`, its value and interval as text.
    """
    if not path.is_file():
        return None
    table = pd.read_csv(path).fillna({"where": ""})
    table = table.sort_values("finding", key=lambda column: column.map(list(column.unique()).index), kind="stable")
    rows = [row | {"numbers": numbers(row)} for row in table.to_dict("records")]
    single = [row for row in rows if CONDITION.fullmatch(row["where"])]
    matrix = {}
    for row in single:
        matrix.setdefault((row["finding"], row["statistic"]), {})[row["where"]] = row
    counts = table.verdict.value_counts().reindex(VERDICTS).dropna().astype(int)
    return {
        "conditions": list(dict.fromkeys(row["where"] for row in single)),
        "matrix": matrix,
        "compared": [row for row in rows if not CONDITION.fullmatch(row["where"])],
        "counts": ", ".join(f"{verdict} {count}" for verdict, count in counts.items()),
        "table": table_html(table, "All numbers of the findings"),
    }


def numbers(row: dict) -> str:
    """The value of a finding's row with the interval on which its verdict rests, as text."""
    if pd.isna(row["value"]):
        return f"no value; {row['n']} utterances"
    text = f"{row['value']:.3f} ({row['corrected_low']:.3f} to {row['corrected_high']:.3f})"
    low, high = row["expected_low"], row["expected_high"]
    expected = f"above {low:g}" if high == float("inf") else f"{low:g} to {high:g}"
    return f"{text}; expected {expected}; {row['n']} utterances; reliability {row['reliability']:.2f}"


def comparison(output: Path, reference: Path) -> dict | None:
    """How results differ from those of a longer run: a summary, and two tables as HTML; None if there are none."""
    if not all((folder / name).is_file() for folder in (output, reference) for name in COMPARED):
        return None
    (mixing, judged), (their_mixing, theirs) = (
        [pd.read_csv(folder / name) for name in COMPARED] for folder in (output, reference)
    )
    if list(mixing.columns) != list(their_mixing.columns):
        return {"summary": "The tables of the longer run have other columns: run its profile again."}
    reported = compare_reported(mixing, their_mixing)
    moved, common = changed(judged, theirs)
    largest = reported.difference.abs().max()  # NaN if all are too noisy
    return {
        "summary": f"{reported.reported.isna().sum()} of {len(reported)} reported correlations are too noisy. "
        + ("" if pd.isna(largest) else f"The largest difference of the others is {largest:.3f}. ")
        + f"Of {common} verdicts in both runs, {len(moved)} differ and {len(contradictions(moved))} contradict each "
        "other: one is “holds” and one “does not hold”.",
        "reported": table_html(reported, "Reported correlations here and in the longer run"),
        "moved": table_html(moved, "Verdicts that differ from the longer run") if len(moved) else "",
    }


def explorer_page(profile: dict, folder: Path, root: Path) -> str:
    """A page to explore the first maps of the first condition, with sound if the corpus is there; "" without maps."""
    model, direction = first_condition(profile).split("/")
    try:
        maps = list(islice(load_maps(folder, model, direction), EXPLORED))
    except FileNotFoundError:
        return ""
    utterances = []
    with suppress(OSError, ValueError), redirect_stdout(StringIO()):
        corpus = load_corpus(root / profile["data"], language=direction.partition("-")[0], split=profile.get("split"))
        utterances = [each for each in corpus if each.id in {item.utterance for item in maps}]
    return explore(maps, audio=utterances or None).page()


def title_of(notebook: Path) -> tuple[str, str]:
    """The title of a notebook, and the Markdown below it in its first cell."""
    text = next((source for kind, source in cells(notebook) if kind == "markdown"), notebook.stem)
    title, _, question = text.partition("\n")
    return title.lstrip("# "), question.strip()


def part_of(step, output: Path, root: Path) -> dict:
    """The title and question of a step's notebook, and the tables and pictures that it wrote, by name."""
    title, question = title_of(root / "notebooks" / step.folder / f"{step.notebook}.ipynb")
    written = [file for file in (*step.outputs, *step.translations) if "/" not in file and file != "findings.csv"]
    by_name = {}
    for file in written:
        by_name.setdefault(file.partition(".")[0], []).append(file)
    items = [item_of(name, files, title, output) for name, files in by_name.items()]
    optional = {file.partition(".")[0] for file in step.translations}
    return {
        "notebook": step.notebook,
        "title": title,
        "question": markdown(question),
        "items": [item for item in items if item["files"] or item["name"] not in optional],
    }


def item_of(name: str, written: list[str], title: str, output: Path) -> dict:
    """A table, its picture, or both, as HTML. Numbers are shown where there is no table in the paper's arrangement."""
    files = [file for file in written if (output / file).is_file()]
    text, picture, numbers = (f"{name}.{suffix}" for suffix in ("md", "png", "csv"))
    caption, table = "", ""
    if text in files:
        caption, _, rows = (output / text).read_text(encoding="utf-8").partition("\n\n")
        caption = caption.replace("\\", "")
        table = accessible(markdown(rows), caption)
    alt = f"{caption or PICTURES.get(name, title)}{'' if numbers not in files else f' The numbers are in {numbers}.'}"
    data = base64.b64encode((output / picture).read_bytes()).decode() if picture in files else ""
    return {
        "name": name,
        "files": files,
        # SVG files have the content of the PNG files and are not committed.
        "missing": [file for file in written if file not in files and not file.endswith(".svg")],
        "caption": caption,
        "table": table,
        "picture": f"data:image/png;base64,{data}" if data else "",
        "alt": alt,
        "numbers": table_html(pd.read_csv(output / numbers), numbers) if numbers in files and not table else "",
    }


def provenance_of(output: Path) -> dict:
    """What is known about a run: the facts of provenance.json, those to show by name, and the files with the record."""
    facts = json.loads((output / RECORD).read_text(encoding="utf-8"))
    known = entities(output / METADATA)
    shown = {"Commit and times": "not recorded in this folder"}
    if known:
        shown = {"Version and commit": known["#pipeline"]["softwareVersion"]}
        shown |= {
            name: known["#run"][key].replace("T", " ")
            for name, key in (("First notebook started", "startTime"), ("Last notebook ended", "endTime"))
        }
    shown |= {
        "Processor": f"{facts['processor']}; threads for each notebook: {facts['threads']}",
        "Precision of perturbed passes": facts["precision"],
        "System": f"{facts['platform']}, Python {facts['python']}",
        "Corpus (SHA-256)": facts["data"],
        **{f"Model {name} (SHA-256 or commit)": digest for name, digest in facts["models"].items()},
    }
    records = [name for name in (RECORD, METADATA) if (output / name).is_file()]
    return {"facts": facts, "provenance": {name: text for name, text in shown.items() if text}, "records": records}
