"""Rows of tables (CSV and Parquet files) and text files."""

import codecs
import csv
import math
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from xattn.data.utterance import check_id, folded

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}


def read_rows(
    table: Path, required: Iterable[str], *, filled: Iterable[str] | None = None, quoted: bool = True
) -> Iterator[tuple[int, dict[str, str]]]:
    """Read the rows of a CSV file, numbered as in a spreadsheet, or of a Parquet file, numbered from 1.

    The cells of a CSV file are separated by commas, semicolons or tabs, whichever the header has. It is encoded in
    UTF-8, with or without a byte order mark, or in UTF-16 with one. Rows are read one at a time.

    Args:
        table: the file.
        required: columns that the table must have.
        filled: columns whose cells must not be empty; by default the required ones.
        quoted: whether quotes enclose cells of a CSV file; otherwise they belong to the text.

    Yields:
        the number of a row, and its stripped cells by the name of their column in lower case, empty if unknown.

    Raises:
        ValueError: a column is missing or named twice, or a row is not valid.
    """
    required = tuple(required)
    filled = required if filled is None else tuple(filled)
    rows = _parquet_rows(table, required) if _is_parquet(table) else _csv_rows(table, required, quoted)
    for number, row in rows:
        if not all(map(row.__getitem__, filled)):
            empty = ", ".join(column for column in filled if not row[column])
            raise ValueError(f"{where_in(table, number, row)} has an empty {empty}: fill it in or drop the row.")
        yield number, row


def rows_with_ids(table: Path, required: Iterable[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """`read_rows`. ValueError: an id is repeated or unsafe as a file name."""
    seen: dict[str, int] = {}
    for number, row in read_rows(table, required):
        first = seen.setdefault(folded(row["id"]), number)
        if first != number:
            raise ValueError(
                f"{where_in(table, number, row)} repeats the id of row {first}: rename one, because ids must differ in "
                "more than case and Unicode normalisation."
            )
        check_id(row["id"], f"{table} row {number}: ")
        yield number, row


def where_in(table: Path, number: int, row: dict[str, str]) -> str:
    """The start of a message about a row."""
    return f"{table} row {number}" + (f" (id {row['id']})" if row.get("id") else "")


def number_in(table: Path, number: int, row: dict[str, str], column: str) -> float | None:
    """The value of a cell of row `number`, None if it is empty. ValueError: it is not a finite number."""
    text = row.get(column, "")
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(
            f"{where_in(table, number, row)} has {text!r} as its {column}, but a number is needed: correct it "
            "(decimals follow a point)."
        )
    return value


def read_text(path: Path) -> str:
    """The text in a file in UTF-8, with or without a byte order mark, or in UTF-16 with one."""
    try:
        return path.read_text(encoding=_encoding(path))
    except UnicodeError as error:
        raise ValueError(f"{path} is not encoded in UTF-8: save it again as text in UTF-8.") from error


def _is_parquet(table: Path) -> bool:
    return table.suffix.lower() == ".parquet"


def _columns(table: Path, names: Iterable[str], required: tuple[str, ...], row: str = "") -> list[str]:
    """The names of the columns in lower case. ValueError, with the `row` of the header: one is missing or repeated."""
    columns = [name.strip().lower() for name in names]
    repeated = sorted({name for name in columns if name and columns.count(name) > 1})
    if repeated:
        names = ", ".join(repeated)
        raise ValueError(f"{table}{row} has more than one column {names}: rename or drop all but one.")
    missing = [name for name in required if name not in columns]
    if missing:
        *others, last = DELIMITERS.values()
        cells = f"add it to the header (cells are separated by {', '.join(others)} or {last})"
        how = "add it, as texts or numbers" if _is_parquet(table) else cells
        raise ValueError(f"{table} has no column {', '.join(missing)}: {how}.")
    return columns


def _csv_rows(table: Path, required: tuple[str, ...], quoted: bool) -> Iterator[tuple[int, dict[str, str]]]:
    try:
        with table.open(encoding=_encoding(table), newline="") as file:
            header = next((line for line in file if line.strip()), "")
            if "\0" in header:
                raise UnicodeError("UTF-16 or UTF-32 without a byte order mark")
            delimiter = max(DELIMITERS, key=lambda each: sum(name in required for name in _names(header, each)))
            file.seek(0)
            quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
            reader = csv.reader(file, delimiter=delimiter, quoting=quoting, strict=True, skipinitialspace=True)
            yield from _checked_rows(table, reader, header, delimiter, required)
    except UnicodeError as error:
        line = _undecodable_line(table)
        found = f" (see line {line})" if line else ""
        raise ValueError(f"{table} is not encoded in UTF-8: save it again as CSV in UTF-8{found}.") from error


def _checked_rows(
    table: Path, reader, header: str, delimiter: str, required: tuple[str, ...]
) -> Iterator[tuple[int, dict[str, str]]]:
    columns, nameless, number = [], [], 0
    while True:
        number, line = number + 1, reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            where = f"{table} row {number}" + f" (line {line})" * (line != number)
            if "field larger" in str(error):
                limit = f"{csv.field_size_limit():,}"
                raise ValueError(
                    f"{where} has a cell of more than {limit} characters: look for a quote that is not closed."
                ) from error
            raise ValueError(
                f"{where} has a quote that is not closed, or a quote inside a quoted cell that is not doubled: correct "
                "the quotes."
            ) from error
        if cells is None:
            break
        if reader.line_num > line and _is_merged(cells, delimiter, f"{delimiter} " in header):
            where = f"{table} row {number}" + f" (line {line})" * (line != number)
            raise ValueError(
                f"{where} has a cell that goes on to line {reader.line_num} and contains the start of another row: "
                "look for a quote that is not closed."
            )
        if not cells:  # a blank line
            continue
        if not columns:
            columns = _columns(table, cells, required, f" row {number}")
            # A first column without a name is an index, as pandas writes it.
            nameless = [index for index, name in enumerate(columns) if index and not name]
            continue
        if len(cells) != len(columns):
            where = where_in(table, number, dict(zip(columns, cells, strict=False)))
            many = len(cells) > len(columns)
            how = f"quote cells that contain {DELIMITERS[delimiter]}" if many else "add the missing ones"
            raise ValueError(f"{where} has {len(cells)} cells, but the header has {len(columns)}: {how}.")
        row = {name: cell.strip() for name, cell in zip(columns, cells, strict=True)}
        if nameless and any(cells[index].strip() for index in nameless):
            raise ValueError(
                f"{where_in(table, number, row)} has a cell in a column without a name: name the column, or quote "
                f"cells that contain {DELIMITERS[delimiter]}."
            )
        yield number, row
    if not columns:
        _columns(table, [], required)


def _names(header: str, delimiter: str) -> list[str]:
    return [name.strip().strip('"').strip().lower() for name in header.split(delimiter)]


def _is_merged(cells: list[str], delimiter: str, spaced: bool) -> bool:
    """Whether a cell of several lines looks like the end of one row and the start of the next.

    This happens if a quote is not closed and another one in the same column of a later row closes it. Then the first
    line of the cell contains the cells that follow in its row, and the last line those that precede in the later row.
    In tables without a space after the delimiter, one that is followed by a space belongs to a text.
    """

    def delimiters(text: str) -> int:
        return text.count(delimiter) - (0 if spaced else text.count(f"{delimiter} "))

    for index, cell in enumerate(cells):
        first, *rest = cell.replace("\r", "\n").split("\n")
        if rest and delimiters(first) >= len(cells) - 1 - index and delimiters(rest[-1]) >= index:
            return True
    return False


def _parquet_rows(table: Path, required: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ImportError(f"{table} needs pyarrow: install it with `pip install 'xattn[datasets]'`.") from error
    # Columns of other types, such as embedded audio, are dropped.
    other = (pyarrow.types.is_nested, pyarrow.types.is_binary, pyarrow.types.is_large_binary)
    try:
        with parquet.ParquetFile(table) as file:
            names = [field.name for field in file.schema_arrow if not any(kind(field.type) for kind in other)]
            columns = _columns(table, names, required)
            batches = (
                zip(*(batch.column(name).to_pylist() for name in names), strict=True)
                for batch in file.iter_batches(columns=names)
            )
            for number, cells in enumerate(chain.from_iterable(batches), start=1):
                # NaN, pandas' mark of missing values, is not equal to itself.
                texts = ["" if cell is None or cell != cell else str(cell).strip() for cell in cells]
                yield number, dict(zip(columns, texts, strict=True))
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{table} is not a readable Parquet file: write it again.") from error


def _encoding(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(2)
    # utf-8-sig also accepts the byte order mark that spreadsheets write.
    return "utf-16" if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def _undecodable_line(table: Path) -> int | None:
    """The number of the first line that is not UTF-8, None if there is none."""
    with table.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return None
