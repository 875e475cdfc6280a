"""The page with all results of a profile, and the pages of its notebooks, as a browser shows them."""

import base64
import csv
import html
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mistune
import numpy as np
import pandas as pd
import pytest

from reproduction import pipeline
from reproduction.notebook_pages import accessible, markdown, notebook_page
from reproduction.page import comparison, provenance_of, title_of, write_page
from reproduction.pipeline import steps_of
from reproduction.profiles import load_profile
from reproduction.tables import ROOT

MINI = load_profile(ROOT / "notebooks" / "profiles" / "mini.yaml")
EXPLORER = "<!doctype html><html lang='en'><title>\"maps\"</title><h1>Explorer of a & b</h1><script>'</h1>'</script>"
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="


def executed_notebook():
    """An executed notebook with a formula, a picture, a table, a progress bar and code that looks like markup."""
    frame = pd.DataFrame({"rho": [0.5]}, index=pd.Index(["base"], name="model"))
    outputs = [
        {"output_type": "stream", "name": "stdout", "text": "\rmasks: 1 of 9"},
        {"output_type": "stream", "name": "stdout", "text": "\rmasks: 9 of 9\n"},
        {"output_type": "display_data", "metadata": {}, "data": {"image/png": PIXEL, "text/plain": "<Figure>"}},
        {
            "output_type": "execute_result",
            "metadata": {},
            "execution_count": 1,
            "data": {"text/html": frame.to_html(), "text/plain": "model"},
        },
    ]
    question = "# Heads and layers\n\nHow large is $\\rho$? See [deletion](../paper/26_deletion.ipynb).\n\n"
    equation = "$$\\rho_\\infty = \\frac{a}{b}$$\n\n## Every head"
    cells = [
        {"cell_type": "markdown", "metadata": {}, "source": question + equation},
        {"cell_type": "code", "metadata": {}, "execution_count": 1, "source": 'a = "</pre><b>"', "outputs": outputs},
    ]
    cells = [cell | {"id": f"c{number}"} for number, cell in enumerate(cells)]
    return json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """The page of mini with an executed notebook, and an explorer that another module would make."""
    folder = tmp_path_factory.mktemp("figures") / "mini"
    shutil.copytree(ROOT / "figures" / "mini", folder, ignore=shutil.ignore_patterns("maps", "notebooks", "*.html"))
    (folder / "notebooks").mkdir()
    (folder / "notebooks" / "23_heads_and_layers.ipynb").write_text(executed_notebook())
    (folder / "notebooks" / "26_deletion.failed.ipynb").write_text("not a notebook")
    with pytest.MonkeyPatch.context() as patch:
        shown = stub_explorer(patch)
        write_page(MINI, steps_of(MINI, ROOT), folder)
    assert shown == [(["en-test-0001", "en-test-0002", "en-test-0003"],) * 2]
    return folder


def stub_explorer(patch):
    """Stand in for the explorer and for stored maps; return the utterances of the maps and sounds that it is given."""
    shown = []

    def explore(maps, audio):
        shown.append(([item.utterance for item in maps], [each.id for each in audio]))
        return SimpleNamespace(page=lambda: EXPLORER)

    def load_maps(folder, model, direction):
        assert (Path(folder).name, model, direction) == ("maps", "base", "en")
        return (SimpleNamespace(utterance=f"en-test-{number:04}") for number in range(1, 13))

    patch.setattr("reproduction.page.explore", explore)
    patch.setattr("reproduction.page.load_maps", load_maps)
    return shown


@pytest.fixture
def opened(browser):
    """Open a file in a window; requests other than for the file itself and console messages fail the test."""
    pages, seen = [], []

    def open_file(path, **options):
        page = browser.new_context(offline=True, **options).new_page()
        page.on("console", lambda message: seen.append(message.text))
        page.on("pageerror", lambda error: seen.append(str(error)))
        page.on("request", lambda request: requested(request.url, path))
        page.goto(path.as_uri())
        pages.append(page)
        return page

    def requested(url, path):
        if url != path.as_uri() and not url.startswith(("data:", "about:")):
            seen.append(url)

    yield open_file
    for page in pages:
        page.context.close()
    assert not seen


@pytest.fixture
def page(opened, output):
    return opened(output / "index.html", viewport={"width": 1200, "height": 900})


def rows_of(page, selector):
    """The texts of a table's rows."""
    script = "table => [...table.rows].map(row => [...row.cells].map(cell => cell.textContent.trim()))"
    return page.locator(selector).evaluate(script)


def test_cells_of_the_matrix_equal_the_findings(page, output):
    (_, *conditions), *rows = rows_of(page, "table.matrix >> nth=0")
    cells = {(row[0], condition): cell for row in rows for condition, cell in zip(conditions, row[1:], strict=True)}
    compared = {(row[0], row[1]): " ".join(row[2:]) for row in rows_of(page, "table.matrix >> nth=1")[1:]}
    signs = {"holds": "✓", "does not hold": "✗", "undecided": "?", "too noisy": "≈", "not available": "–"}
    with (output / "findings.csv").open(newline="", encoding="utf-8") as file:
        findings = list(csv.DictReader(file))
    found = 0
    for row in findings:
        title = row["finding"] + row["statistic"]
        single = (title, row["where"].replace("/", " "))
        cell = cells.pop(single) if single in cells else compared.pop((title, row["where"]))
        assert cell.replace("\xa0", " ").startswith(f"{signs[row['verdict']]} {row['verdict']}")
        if row["value"]:
            low, high = (f"{float(row[name]):.3f}" for name in ("corrected_low", "corrected_high"))
            assert f"{float(row['value']):.3f} ({low} to {high})" in cell, row
            found += 1
    assert len(findings) == 81 and found > 70
    assert not compared and not any(cells.values())  # what is left is empty: a finding that a condition does not have
    counts = pd.Series([row["verdict"] for row in findings]).value_counts()
    text = page.locator("p", has_text="Verdicts:").inner_text()
    assert dict(re.findall(r"([a-z][a-z ]*) (\d+)", text)) == counts.astype(str).to_dict()


def test_every_table_and_picture_is_there(page, output):
    shown = page.locator("#tables ~ section table").evaluate_all(
        "tables => tables.map(table => [...table.rows].map(row => [...row.cells].map(cell => cell.textContent.trim())))"
    )
    tables = sorted(output.glob("*.md"))
    for path in tables:  # by another parser
        markup = mistune.html(path.read_text(encoding="utf-8").partition("\n\n")[2])
        rows = re.findall(r"<tr>(.*?)</tr>", markup, re.S)
        cells = [[html.unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S)] for row in rows]
        assert len(cells) > 2 and cells in shown, path.name
    assert len(tables) == 6
    for name in ("estimators", "partitions", "agreement", "sanity"):
        table = pd.read_csv(output / f"{name}.csv")
        (own,) = [rows for rows in shown if rows[0] == [column.replace("_", " ") for column in table]]
        assert len(own) == len(table) + 1
        floats = table.select_dtypes("float")
        for column in floats:
            place = table.columns.get_loc(column)
            values = [float(row[place] or "nan") for row in own[1:]]
            assert np.allclose(values, table[column], atol=6e-4, equal_nan=True), (name, column)
        assert len(floats.columns) > 1
    sources = page.locator("img").evaluate_all("all => all.map(each => [each.src, each.alt, each.naturalWidth])")
    pictures = {base64.b64decode(source.partition(",")[2]) for source, _, _ in sources}
    assert pictures == {path.read_bytes() for path in output.glob("*.png")} and len(pictures) == 13
    assert all(alt and width > 100 for _, alt, width in sources)


def test_comparison_counts_verdicts_that_differ_from_the_longer_run(page, output):
    ours, theirs = (pd.read_csv(folder / "findings.csv") for folder in (output, ROOT / "figures" / "full"))
    both = ours.merge(theirs, on=["finding", "where", "statistic"])
    moved = both[both.verdict_x != both.verdict_y]
    opposite = sum({x, y} == {"holds", "does not hold"} for x, y in zip(both.verdict_x, both.verdict_y, strict=True))
    text = page.locator("section[aria-labelledby=comparison] p").inner_text()
    assert f"Of {len(both)} verdicts in both runs, {len(moved)} differ and {opposite} contradict" in text and len(moved)
    reported, differing = (rows_of(page, f"section[aria-labelledby=comparison] table >> nth={n}") for n in (0, 1))
    assert len(reported) == 2 * 9 + 1 and len(differing) == len(moved) + 1
    largest = max(abs(float(row[-1])) for row in reported[1:])
    assert "0 of 18 reported correlations are too noisy" in text
    assert f"The largest difference of the others is {largest:.3f}." in text


def test_explorer_is_embedded_as_it_is(page):
    frame = page.locator("iframe")
    assert frame.get_attribute("srcdoc") == EXPLORER and frame.get_attribute("loading") == "lazy"
    frame.scroll_into_view_if_needed()
    assert page.frame_locator("iframe").locator("h1").inner_text() == "Explorer of a & b"


STRUCTURE = """() => {
  const all = selector => [...document.querySelectorAll(selector)];
  const ids = all('[id]').map(each => each.id);
  return {
    language: document.documentElement.lang,
    headings: all('h1, h2, h3').map(each => +each.tagName[1]),
    landmarks: ['header', 'nav', 'main'].map(name => all(name).length),
    headers: all('th:not([scope])').length + all('table').filter(each => !each.querySelector('th')).length,
    regions: all('.table').filter(each => each.tabIndex || !each.getAttribute('aria-label')).length,
    pictures: all('img:not([alt]), img[alt=""], iframe:not([title])').length,
    repeated: ids.length - new Set(ids).size,
    broken: all('a[href^="#"]').filter(each => !document.getElementById(each.getAttribute('href').slice(1))).length,
    labels: all('[aria-labelledby]').filter(each => !ids.includes(each.getAttribute('aria-labelledby'))).length,
  };
}"""


@pytest.mark.parametrize("name", ["index", "notebooks/23_heads_and_layers"])
def test_pages_have_the_structure_that_screen_readers_need(opened, output, name):
    found = opened(output / f"{name}.html").evaluate(STRUCTURE)
    headings = found.pop("headings")
    assert headings[0] == 1 and headings.count(1) == 1 and max(np.diff(headings)) <= 1
    assert found.pop("landmarks")[2] == 1
    assert found == {"language": "en"} | dict.fromkeys(set(found) - {"language"}, 0)


def test_files_that_the_page_links_to_exist(page, output):
    links = page.locator("a[href]").evaluate_all("all => all.map(each => each.getAttribute('href'))")
    files = [link for link in links if not link.startswith(("#", "https:"))]
    assert "notebooks/23_heads_and_layers.html" in files and len(files) > 25
    assert all((output / file).is_file() for file in files)


CONTRAST = """() => {
  const luminance = text => {
    const linear = v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = text.match(/[\\d.]+/g).map(v => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const background = each => {
    for (; each; each = each.parentElement) {
      const colour = getComputedStyle(each).backgroundColor;
      if (colour !== 'rgba(0, 0, 0, 0)') return colour;
    }
  };
  return [...document.querySelectorAll('p, td, th, small, a, summary, h2, dd')].map(each => {
    const pair = [getComputedStyle(each).color, background(each)].map(luminance).sort((a, b) => a - b);
    return (pair[1] + 0.05) / (pair[0] + 0.05);
  });
}"""  # WCAG 2, relative luminance and contrast ratio


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [500, 1200])
def test_page_is_legible_in_both_schemes_and_narrow_windows(opened, output, scheme, width):
    page = opened(output / "index.html", viewport={"width": width, "height": 900}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    contrasts = page.evaluate(CONTRAST)
    assert len(contrasts) > 500 and min(contrasts) >= 4.5
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor").startswith("rgb(2")
    assert dark == (scheme == "dark") or scheme == "light"


def test_page_prints_without_scripts_cut_tables_or_folded_parts(opened, output):
    page = opened(output / "index.html", viewport={"width": 688, "height": 1000})
    page.emulate_media(media="print")  # 688 pixels are the width of A4 without the margins
    assert page.evaluate("document.documentElement.scrollWidth") == 688
    assert not page.locator("iframe").is_visible() and not page.locator("nav").is_visible()
    assert page.locator("details >> nth=0 >> table").is_visible()
    link = page.locator("a[href^=https] >> nth=0")
    assert link.get_attribute("href") in link.evaluate("each => getComputedStyle(each, '::after').content")


def test_page_is_one_file_below_20_mb(output):
    text = (output / "index.html").read_text(encoding="utf-8")
    assert 1e6 < len(text.encode()) < 20e6
    assert not re.search(r"<(script|link rel=.stylesheet)", text.replace(html.escape(EXPLORER, quote=True), ""))


def test_provenance_says_what_is_known(page, output):
    facts = json.loads((output / "provenance.json").read_text(encoding="utf-8"))
    text = page.locator("section[aria-labelledby=provenance]").text_content()
    for value in (facts["processor"], facts["data"], *facts["models"].values(), facts["packages"]["torch"]):
        assert value in text
    assert ("not recorded" in text) == (not (output / "ro-crate-metadata.json").exists())


def test_commit_and_times_come_from_the_crate(tmp_path):
    facts = {"processor": "p", "threads": 1, "precision": "", "platform": "s", "python": "3", "data": "d", "models": {}}
    (tmp_path / "provenance.json").write_text(json.dumps(facts))
    run = {"@id": "#run", "startTime": "2026-11-26T09:56:47+00:00", "endTime": "2026-11-26T10:25:53+00:00"}
    graph = [run, {"@id": "#pipeline", "softwareVersion": "0.1.0+g1234"}]
    (tmp_path / "ro-crate-metadata.json").write_text(json.dumps({"@graph": graph}))
    shown = provenance_of(tmp_path)["provenance"]
    assert shown["Version and commit"] == "0.1.0+g1234" and "Commit and times" not in shown
    assert shown["First notebook started"] == "2026-11-26 09:56:47+00:00"


@pytest.mark.parametrize("name", ["smoke", "full", "whisper"])
def test_page_from_committed_files_names_what_is_missing(tmp_path, name):
    profile = load_profile(ROOT / "notebooks" / "profiles" / f"{name}.yaml")
    ignored = shutil.ignore_patterns("maps", "notebooks", "*.html", *(("*.png", "*.md") if name == "smoke" else ()))
    shutil.copytree(ROOT / "figures" / name, tmp_path / name, ignore=ignored)
    text = write_page(profile, steps_of(profile, ROOT), tmp_path / name).read_text(encoding="utf-8")
    missing = [" ".join(part.split()) for part in re.findall(r'<p class="missing">(.*?)</p>', text, re.S)]
    command = f"<code>make reproduce PROFILE={name}</code>"
    assert f"The maps are not in this folder, so there is no explorer; {command} makes them." in missing
    assert f"The executed notebooks are not in this folder; {command} makes them." in missing
    assert ("Not in this folder: tab1.md, tab1.png." in missing) == (name == "smoke")
    assert text.count("<img ") == len(list((tmp_path / name).glob("*.png"))) and "<iframe" not in text


def test_folder_without_results_is_an_error_in_one_sentence(tmp_path):
    sentence = f"There are no results in {tmp_path}: make them with `make reproduce PROFILE=mini`."
    with pytest.raises(FileNotFoundError, match=re.escape(sentence)):
        write_page(MINI, steps_of(MINI, ROOT), tmp_path)
    command = [sys.executable, "-m", "reproduction.report", "notebooks/profiles/none.yaml"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("error: There is no profile")


def test_notebook_page_folds_code_and_shows_formulas_and_outputs(opened, output):
    page = opened(output / "notebooks" / "23_heads_and_layers.html")
    assert page.title() == "Heads and layers (23_heads_and_layers)"
    assert page.locator("details").get_attribute("open") is None
    assert page.locator("details code").text_content() == 'a = "</pre><b>"'
    assert page.locator("math").evaluate_all("all => all.map(each => each.textContent)") == ["ρ", "ρ∞=ab"]
    assert page.locator("math mfrac").evaluate("each => each.getBoundingClientRect().height") > 20
    assert "masks: 9 of 9" in page.locator("main").inner_text() and "1 of 9" not in page.content()
    assert "$" not in page.locator("main").inner_text()
    assert page.locator("img").get_attribute("alt").startswith("Figure of the section “Every head”")
    links = page.locator("a").evaluate_all("all => all.map(each => each.getAttribute('href'))")
    assert links == ["../index.html", "26_deletion.html"]
    assert not (output / "notebooks" / "26_deletion.failed.html").exists()


def test_formulas_of_all_notebooks_become_mathml():
    found = 0
    for path in ROOT.glob("notebooks/*/*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "markdown":
                text = "".join(cell["source"])
                rendered = markdown(text)
                assert "$" not in re.sub(r"<code>.*?</code>", "", rendered, flags=re.S), (path, text)
                found += rendered.count("<math")
    assert found > 100


def test_tables_get_headers_with_a_scope():
    bare = "<table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td>c</td><td>d</td></tr></tbody></table>"
    found = accessible(bare, 'a "b"')
    assert found.startswith('<div class="table" role="region" tabindex="0" aria-label="a &quot;b&quot;"><table>')
    assert re.findall(r"<th [^>]*>\w", found) == ['<th scope="col">a', '<th scope="col">b', '<th scope="row">c']
    assert found.count("<td>d</td>") == 1 and found.count("</th>") == 3
    indexed = pd.DataFrame({"a": [1]}, index=["c"]).to_html()
    assert re.findall(r"<th [^>]*>\w?", accessible(indexed, "")) == [
        '<th scope="col">', '<th scope="col">a', '<th scope="row">c'
    ]  # fmt: skip


def test_page_is_written_again_only_after_a_run(tmp_path, monkeypatch, capsys):
    written = []
    monkeypatch.setattr("reproduction.page.write_page", lambda profile, steps, output: written.append(output))
    monkeypatch.setattr(pipeline, "ROOT", tmp_path)
    folder, path = tmp_path / "figures" / "mini", ROOT / "notebooks" / "profiles" / "mini.yaml"
    folder.mkdir(parents=True)
    (folder / "provenance.json").write_text("{}")
    pipeline.update_page(path)
    (folder / "index.html").write_text("page")
    pipeline.update_page(path)
    assert written == [folder]
    earlier = (folder / "provenance.json").stat().st_mtime - 60
    os.utime(folder / "index.html", (earlier, earlier))
    pipeline.update_page(path)
    assert written == [folder, folder]
    assert capsys.readouterr().out == "figures/mini/index.html has all results on one page.\n" * 3


def test_notebook_without_a_title_gets_its_name(tmp_path):
    notebook = {"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (tmp_path / "own.ipynb").write_text(json.dumps(notebook))
    assert "<title>own (own)</title>" in notebook_page(tmp_path / "own.ipynb")
    assert title_of(tmp_path / "own.ipynb") == ("own", "")


def test_comparison_of_runs_that_are_too_noisy_has_no_largest_difference():
    found = comparison(ROOT / "figures" / "smoke", ROOT / "figures" / "full")
    assert found["summary"].startswith("4 of 4 reported correlations are too noisy. Of 20 verdicts in both runs, ")
    assert "nan" not in found["summary"].lower()


def test_tables_of_another_version_are_not_compared(tmp_path):
    for name in ("tab5.csv", "findings.csv"):
        (tmp_path / name).write_text("model,rho\nbase,0.5\n")
    found = comparison(tmp_path, ROOT / "figures" / "full")
    assert found == {"summary": "The tables of the longer run have other columns: run its profile again."}
    assert comparison(tmp_path / "missing", ROOT / "figures" / "full") is None
