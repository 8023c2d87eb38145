"""The texts of CSV files, and of text files that are one document each, as bytes.

Python's own `csv` reads, and not `datasets`, whose reader (pandas) guesses types anew in each chunk of a file, takes
texts such as "NA" for null, fills up rows that are too short, and cannot tell in which row a byte is wrong.
"""

import csv
import io
import sys
from collections.abc import Iterator
from typing import BinaryIO

from clm_owt.errors import InputError
from clm_owt.formatting import format_value

SEPARATORS = (",", ";", "\t")


def read_whole_files(path: str, name: str) -> Iterator[bytes]:
    """The text of the file, its line breaks as "\\n"; of each file of an archive."""
    for file in open_files(path):
        content = file.read().replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        try:
            content.decode()
        except UnicodeDecodeError as error:
            line = content.count(b"\n", 0, error.start) + 1
            raise InputError(
                f"{name}: line {line}: not UTF-8 (byte 0x{content[error.start]:02x}: {error.reason})"
            ) from error
        yield content


def read_csv(path: str, name: str, column: str) -> Iterator[bytes]:
    """The values of `column` in a CSV file, row by row: any bytes, empty ones too, quotes and their doubling undone.

    The first line names the columns. Commas, semicolons or tabs separate them: the first of these with which the first
    line names `column`. Blank lines are no rows. Raises `InputError` for a row with other than one value a column, and
    for quotes that do not match.
    """
    csv.field_size_limit(sys.maxsize)
    for file in open_files(path):
        # What is not UTF-8 goes through as it is, and is found where all texts are checked.
        lines = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        columns, separator = find_columns(lines.readline(), name, column)
        reader, row, index = csv.reader(lines, delimiter=separator, strict=True), 0, columns.index(column)
        try:
            for values in filter(None, reader):
                if len(values) != len(columns):
                    raise InputError(
                        f"{name}: row {row} (line {reader.line_num + 1}): {len(values)} of {len(columns)} values; "
                        f"one that holds {separator!r} or a line break must be in quotes"
                    )
                yield values[index].encode("utf-8", "surrogateescape")
                row += 1
        except csv.Error as error:
            raise InputError(
                f"{name}: row {row} (line {reader.line_num + 1}): {error}; quotes in a value must be doubled"
            ) from error


def find_columns(first_line: str, name: str, column: str) -> tuple[list[str], str]:
    """The names of the columns, and what separates them. Raises `InputError` where `column` is not among them."""
    found = [(next(csv.reader([first_line], delimiter=separator), []), separator) for separator in SEPARATORS]
    for columns, separator in found:
        if column in columns:
            return columns, separator
    columns = max((columns for columns, _ in found), key=len)
    shown = ", ".join(format_value(each.encode(errors="surrogateescape").decode(errors="replace")) for each in columns)
    raise InputError(f"{name}: no column {column!r}; its first line names {shown or 'none'} (set text_column)")


def open_files(path: str) -> Iterator[BinaryIO]:
    """The file, uncompressed, or the files of an archive, open for reading."""
    from datasets import StreamingDownloadManager
    from datasets.utils.file_utils import xopen

    manager = StreamingDownloadManager()
    for file in manager.iter_files(manager.extract(path)):
        with xopen(file, "rb") as opened:
            yield opened
