"""Executed notebooks as HTML files that need neither a network nor a script, and the HTML that they share with reports.

Formulas become MathML, which browsers show by themselves.
"""

import re
from html import escape
from pathlib import Path

import nbformat
import pandas as pd
from jinja2 import Environment, FileSystemLoader
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbconvert.preprocessors import CoalesceStreamsPreprocessor

LOADER = FileSystemLoader(Path(__file__).with_name("templates"))
TEMPLATES = Environment(loader=LOADER, autoescape=True, trim_blocks=True, lstrip_blocks=True)
NOTEBOOK = """
{%- extends 'basic/index.html.j2' -%}
{%- block input_group -%}
<details><summary>Code</summary><pre><code>{{ cell.source | escape }}</code></pre></details>
{%- endblock -%}
{%- block output_area_prompt -%}{%- endblock -%}
{%- block data_png -%}
<figure><img src="data:image/png;base64,{{ output.data['image/png'] | replace('\\n', '') }}"
alt="{{ cell.metadata.alt | escape }}"></figure>
{%- endblock -%}
"""


class MathMLRenderer(IPythonRenderer):
    """Renders formulas as MathML."""

    def inline_math(self, body: str) -> str:
        return convert(body)

    def block_math(self, body: str) -> str:
        return convert(body, display="block")


def markdown(text: str) -> str:
    """Markdown with formulas and tables as HTML."""
    renderer = MathMLRenderer(escape=False, exclude_anchor_links=True)
    return MarkdownWithMath(renderer=renderer).render(text)


# Its output is the body of a page: code is folded, and pictures have the alternative text cell.metadata.alt.
EXPORTER = HTMLExporter(
    raw_template=NOTEBOOK,
    filters={"markdown2html": markdown},
    preprocessors=[CoalesceStreamsPreprocessor(enabled=True)],  # keeps the last state of a progress bar
)


def accessible(html: str, label: str) -> str:
    """HTML whose tables have headers with a scope and scroll within a region that the keyboard reaches.

    In the body of a table without headers, the first cell of each row becomes its header.

    label: names the regions for screen readers.
    """

    def table(match: re.Match) -> str:
        head, mark, body = match[0].rpartition("</thead>")
        head = re.sub(r"<th(?=[ >])", '<th scope="col"', head)
        if "<th" not in body:
            body = re.sub(r"<tr>\s*<td([^>]*)>(.*?)</td>", r"<tr><th\1>\2</th>", body, flags=re.S)
        body = re.sub(r"<th(?=[ >])", '<th scope="row"', body)
        return f'<div class="table" role="region" tabindex="0" aria-label="{escape(label)}">{head}{mark}{body}</div>'

    return re.sub(r"<table.*?</table>", table, html, flags=re.S)


def table_html(table: pd.DataFrame, label: str) -> str:
    """A table with its first column as row headers; numbers have three digits."""
    table = table.rename(columns=lambda name: name.replace("_", " "))  # narrow columns can break such names
    html = table.to_html(index=False, border=0, na_rep="", float_format="{:.3f}".format)
    return accessible(html, label)


def notebook_page(path: Path) -> str:
    """An executed notebook as a complete HTML document."""
    notebook = nbformat.read(path, as_version=4)
    title, heading = path.stem, ""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            found = re.findall(r"^#+ (.+)$", cell.source, re.M)
            if found and not heading:
                title = found[0]
            heading = found[-1] if found else heading
        else:
            cell.metadata["alt"] = f"Figure of the section “{heading}”; tables and text beside it have its content."
    body, _ = EXPORTER.from_notebook_node(notebook)
    # Links between notebooks lead to the pages, which lie in one folder.
    body = re.sub(r'href="(?:[\w./]*/)?(\w+)\.ipynb"', r'href="\1.html"', body)
    page = TEMPLATES.get_template("notebook.html.j2")
    return page.render(title=title, name=path.stem, body=accessible(body, title))
