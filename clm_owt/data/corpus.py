"""The files of a source, each of which can be read independently of the others: rows as Arrow tables.

Every failure is an `InputError` that names the dataset or file, the column or row, and what was there instead. No
remote code is ever run.
"""

import contextlib
import glob
import itertools
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import pyarrow as pa

from clm_owt.data.plain_files import read_csv, read_whole_files
from clm_owt.data.python_docs import python_docs
from clm_owt.data.retries import with_retries
from clm_owt.data.sources import Source, local_path
from clm_owt.errors import InputError, one_line
from clm_owt.formatting import format_value
from clm_owt.hub_client import set_timeout
from clm_owt.recipe import PYTHON_DOCS

if TYPE_CHECKING:
    from datasets import IterableDataset


@dataclass(frozen=True)
class Position:
    """A place in the stream of documents between two batches, from which reading can be resumed: the index of the
    section (of the file, where nothing divides files), the rows of the file before this place, and the state of
    `datasets`' iterable there (None at the start of the file)."""

    file: int = 0
    row: int = 0
    state: dict | None = field(default=None, compare=False)


class Corpus(Protocol):
    files: list[str]  # paths, URLs or other names

    def batches(self, file: int, start: Position, rows: int) -> Iterator[tuple[pa.Table, Position]]:
        """The batches of one file from `start` on, `rows` each, with the position after each of them."""


def open_corpus(source: Source) -> Corpus:
    plain = source.dataset_name == "csv" or source.text_documents == "file"
    return PlainCorpus(source) if plain else with_retries(lambda: DatasetsCorpus(source))


class PlainCorpus:
    """Files that `plain_files` reads. Resuming within one reads and discards the rows before."""

    def __init__(self, source: Source):
        self.source = source
        self.files = [file for file, _ in source.files]

    def batches(self, file: int, start: Position, rows: int) -> Iterator[tuple[pa.Table, Position]]:
        name, column, row = self.files[file], self.source.text_column, start.row
        with input_errors(name):
            if self.source.dataset_name == "csv":
                contents = read_csv(local_path(name), name, column)
            else:
                contents = read_whole_files(local_path(name), name)
            contents = itertools.islice(contents, start.row, None)
        while True:
            with input_errors(name):
                batch = list(itertools.islice(contents, rows))
            if not batch:
                return
            row += len(batch)
            texts = pa.array(batch, pa.large_binary()).view(pa.large_string())
            yield pa.table({column: texts}), replace(start, row=row)


class DatasetsCorpus:
    """A source as `datasets` reads it: one streaming dataset for each file."""

    def __init__(self, source: Source):
        import datasets

        set_timeout()
        # A failed connection is for `read_documents` to repeat, with pauses of its own.
        datasets.config.STREAMING_READ_MAX_RETRIES = 1
        datasets.config.STREAMING_READ_RETRY_INTERVAL = 0
        datasets.config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = 0
        datasets.config.STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL = 0
        self.source = source
        self.builder = None
        if source.dataset_name == PYTHON_DOCS:
            self.dataset = datasets.Dataset.from_dict({"text": python_docs()}).to_iterable_dataset()
            self.files = [PYTHON_DOCS]
            return
        if source.files:
            self.files = [file for file, _ in source.files]
            name = self.files[0] if len(self.files) == 1 else f"{self.files[0]} (or a later one of data_files)"
        else:
            name = f"dataset {source.dataset_name}"
        with input_errors(name):
            self.open_builder()
            self.dataset = self.builder.as_streaming_dataset(source.split)
            if not source.files:
                self.files = list(self.builder.config.data_files[source.split])
        self.check_column(name)
        if hasattr(self.builder.config, "columns"):  # Parquet: read that one column only
            self.builder.config.columns = [source.text_column]
            self.dataset = self.builder.as_streaming_dataset(source.split)
        if self.dataset.num_shards != len(self.files):  # archives of many files: read as one
            self.files = [name]

    def open_builder(self) -> None:
        from datasets import load_dataset_builder

        source, options = self.source, {}
        if source.files:
            options["data_files"] = {source.split: [glob.escape(local_path(file)) for file in self.files]}
            if source.dataset_name == "text":
                options["sample_by"] = "paragraph"
        else:
            options |= {"name": source.config_name, "revision": source.commit}
            if source.data_files:
                options["data_files"] = {source.split: list(source.data_files)}
        with tempfile.TemporaryDirectory() as lock_folder:  # a stream caches nothing, but a builder leaves its lock
            self.builder = load_dataset_builder(source.dataset_name, cache_dir=lock_folder, **options)

    def check_column(self, name: str) -> None:
        """Raises `InputError` where the schema lacks the text column. (JSON has no schema until its rows are read.)"""
        columns, column = self.dataset.column_names, self.source.text_column
        if columns and column not in columns:
            raise missing_column(name, column, columns)

    def batches(self, file: int, start: Position, rows: int) -> Iterator[tuple[pa.Table, Position]]:
        name = self.files[file]
        with input_errors(name):
            dataset = self.open_file(file)
            if start.state is not None:
                dataset.load_state_dict(start.state)
        batches, row = iter(dataset.iter(batch_size=rows)), start.row
        while True:
            with input_errors(name):
                table = next(batches, None)
                if table is None:
                    return
                row += table.num_rows
                after = replace(start, row=row, state=dataset.state_dict())
            yield table, after

    def open_file(self, index: int) -> "IterableDataset":
        """File `index` alone. Parquet's row groups become its shards, so that resuming inside the file seeks instead
        of reading and discarding; only this one file's footer is read for that."""
        dataset = self.dataset.shard(len(self.files), index) if len(self.files) > 1 else self.dataset
        return dataset.reshard().with_format("arrow")


@contextlib.contextmanager
def input_errors(name: str) -> Iterator[None]:
    """Whatever goes wrong in the block, where `name` is opened or read, becomes an `InputError` that names it."""
    try:
        yield
    except InputError:
        raise
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise InputError(f"{name}: not UTF-8 text (byte 0x{byte:02x}: {error.reason})") from error
    except StopIteration as error:  # `datasets` finds no first row to learn the columns from
        raise InputError(f"{name}: holds no rows") from error
    except Exception as error:
        raise InputError(f"{name}: cannot be read ({one_line(error)})") from error


def missing_column(name: str, column: str, columns: list[str]) -> InputError:
    return InputError(f"{name}: no column {column!r}; its columns are {', '.join(columns)} (set text_column)")


def checked_texts(column: pa.ChunkedArray, name: str, column_name: str, first_row: int) -> pa.LargeStringArray:
    """`column` as one array of large strings, null being empty. Raises `InputError` with the row of the first value
    that is not text; `first_row` is the row of the file at which the column begins."""
    texts = column.combine_chunks()
    if pa.types.is_dictionary(texts.type):
        texts = texts.dictionary_decode()
    values = None
    if isinstance(texts, pa.ExtensionArray):  # `datasets` gives JSON columns of mixed types as JSON
        values = [json.loads(value or "null") for value in texts.storage.to_pylist()]
        if all(value is None or isinstance(value, str) for value in values):
            texts = pa.array(values, pa.large_string())
    if texts.null_count == len(texts):
        texts = pa.nulls(len(texts), pa.large_string())
    if not is_text(texts.type):
        values = values or texts.to_pylist()
        row = next(row for row, value in enumerate(values) if value is not None and not isinstance(value, str))
        raise InputError(
            f"{name}: row {first_row + row}, column {column_name!r}: {format_value(values[row])} where text was "
            f"expected (the column's type is {texts.type})"
        )
    texts = texts.cast(pa.large_string()).fill_null("")
    try:
        texts.validate(full=True)
    except pa.ArrowInvalid:
        for row in range(len(texts)):
            value = texts[row].as_buffer().to_pybytes()
            try:
                value.decode("utf-8")
            except UnicodeDecodeError as error:
                raise InputError(
                    f"{name}: row {first_row + row}, column {column_name!r}: not UTF-8 "
                    f"(byte {error.start} is 0x{value[error.start]:02x}: {error.reason})"
                ) from error
        raise
    return texts


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
