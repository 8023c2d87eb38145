"""The documents of a source as a stream in their fixed order, which can go on from any batch.

Every failure is an `InputError` that names the dataset or file, the column or row, and what was there instead.
"""

import functools
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field

import pyarrow as pa

from clm_owt.data.python_docs import python_docs
from clm_owt.data.retries import PAUSES, limit_silence, patiently, wait_for_better
from clm_owt.data.sources import Source, local_path
from clm_owt.errors import InputError, one_line
from clm_owt.formatting import show_value
from clm_owt.recipe import PYTHON_DOCS

ROWS_PER_BATCH = 1000  # a row group of OpenWebText; some 5 MB of text


# Reading


@dataclass(frozen=True)
class Position:
    """A place in the stream between two batches: the file, the rows of it before this place, and the state of
    `datasets`' iterable at it (None: the start of the file)."""

    file: int = 0
    row: int = 0
    state: dict | None = field(default=None, compare=False)


START = Position()


def read_documents(
    source: Source, start: Position = START, rows_per_batch: int = ROWS_PER_BATCH, end_file: int | None = None
) -> Iterator[tuple[Position, pa.LargeStringArray]]:
    """Pairs of (the position before a batch, its texts), from `start` on, up to but without file `end_file`; every
    text is there and valid UTF-8.

    Documents come in the order of the files and, in them, of the rows. A plain text file's documents are its
    paragraphs, separated by blank lines, as `datasets` gives them with `sample_by="paragraph"`.
    """
    corpus = open_corpus(source)
    for file in range(start.file, corpus.num_files if end_file is None else end_file):
        position = start if file == start.file else Position(file)
        pauses = iter(PAUSES)
        while position is not None:
            try:
                for table, after in corpus.batches(position, rows_per_batch):
                    name, column = corpus.file_name(file), source.text_column
                    if column not in table.column_names:
                        raise missing_column(name, column, table.column_names)
                    yield position, checked_texts(table.column(column), name, column, position.row)
                    position, pauses = after, iter(PAUSES)
                position = None
            except InputError as error:
                wait_for_better(error, pauses)  # and open the file anew, at the same place


def count_files(source: Source) -> int:
    """Of the parts in which the source can be read side by side."""
    return open_corpus(source).num_files


@functools.lru_cache(maxsize=1)
def open_corpus(source: Source) -> "Corpus":
    return patiently(lambda: Corpus(source))


class Corpus:
    """A source as `datasets` reads it: one streaming dataset a file, rows as Arrow tables."""

    def __init__(self, source: Source):
        import datasets

        limit_silence()
        # Where a connection fails, reading begins anew at the last batch, after pauses of our own.
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
        with readable(name):
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
            options["data_files"] = {source.split: [local_path(file) for file in self.files]}
            if source.dataset_name == "text":
                options["sample_by"] = "paragraph"
        else:
            options |= {"name": source.config_name, "revision": source.commit}
            if source.data_files:
                options["data_files"] = {source.split: list(source.data_files)}
        with tempfile.TemporaryDirectory() as lock_folder:  # a stream caches nothing, but a builder leaves its lock
            self.builder = load_dataset_builder(source.dataset_name, cache_dir=lock_folder, **options)

    def check_column(self, name: str) -> None:
        """What the schema alone shows. JSON has none until its rows are read."""
        columns, column = self.dataset.column_names, self.source.text_column
        if columns and column not in columns:
            raise missing_column(name, column, columns)

    @property
    def num_files(self) -> int:
        return len(self.files)

    def file_name(self, index: int) -> str:
        return self.files[index]

    def batches(self, start: Position, rows: int) -> Iterator[tuple[pa.Table, Position]]:
        """The batches of a file from `start` on, each with the position after it."""
        name = self.file_name(start.file)
        with readable(name):
            dataset = self.open_file(start.file)
            if start.state is not None:
                dataset.load_state_dict(start.state)
        batches, row = iter(dataset.iter(batch_size=rows)), start.row
        while True:
            with readable(name):
                table = next(batches, None)
                if table is None:
                    return
                row += table.num_rows
                after = Position(start.file, row, dataset.state_dict())
            yield table, after

    def open_file(self, index: int):
        """File `index` as an `IterableDataset`. Parquet's row groups become its shards, so that resuming inside
        the file seeks instead of reading and discarding; only this one file's footer is read for that."""
        dataset = self.dataset.shard(num_shards=self.num_files, index=index) if self.num_files > 1 else self.dataset
        return dataset.reshard().with_format("arrow")


class readable:
    """Turns whatever goes wrong while `name` is opened or read into an `InputError` that names it."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, traceback) -> None:
        if isinstance(error, UnicodeDecodeError):
            byte = error.object[error.start]
            raise InputError(f"{self.name}: not UTF-8 text (byte 0x{byte:02x}: {error.reason})") from error
        if isinstance(error, StopIteration):  # `datasets` finds no first row to learn the columns from
            raise InputError(f"{self.name}: holds no rows") from error
        if isinstance(error, Exception) and not isinstance(error, InputError):
            raise InputError(f"{self.name}: cannot be read ({one_line(error)})") from error


def missing_column(name: str, column: str, columns: list[str]) -> InputError:
    return InputError(f"{name}: no column {column!r}; its columns are {', '.join(columns)} (set text_column)")


def checked_texts(column: pa.ChunkedArray, name: str, column_name: str, first_row: int) -> pa.LargeStringArray:
    """`column` as one array of large strings; anything but text in it is an error that names the row."""
    texts = column.combine_chunks()
    if pa.types.is_dictionary(texts.type):
        texts = texts.dictionary_decode()
    is_text = any(
        check(texts.type) for check in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    )
    if not is_text:
        row, value = first_non_text(texts)
        raise InputError(
            f"{name}: row {first_row + row}, column {column_name!r}: {show_value(value)} where text was expected "
            f"(the column's type is {texts.type})"
        )
    if texts.null_count:
        row = texts.is_null().index(True).as_py()
        raise InputError(f"{name}: row {first_row + row}, column {column_name!r}: null where text was expected")
    texts = texts.cast(pa.large_string())
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


def first_non_text(values: pa.Array) -> tuple[int, object]:
    """Row and value of the first entry that is no text; `datasets` gives JSON columns of mixed types as JSON."""
    if isinstance(values, pa.ExtensionArray):
        for row, value in enumerate(values.storage.to_pylist()):
            if value is None or not value.startswith('"'):
                return row, value if value is None else json.loads(value)
    return 0, values[0].as_py() if len(values) else None
