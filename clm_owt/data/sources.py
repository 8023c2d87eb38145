"""A stream of documents: the Hub, local files or URLs, the built-in corpus.

`resolve_source` says which documents a recipe means, exactly: everything their content depends on.
`read_documents` streams them in their fixed order and can go on from any batch. No remote code is ever run.
Every failure is an `InputError` that names the dataset or file, the column or row, and what was there instead.
"""

import ast
import asyncio
import functools
import glob
import hashlib
import inspect
import json
import os
import re
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata, util
from pathlib import Path
from typing import TypeVar

import pyarrow as pa

from clm_owt.recipe import FILE_FORMATS, PYTHON_DOCS, InputError, Recipe
from clm_owt.stopping import tell

PYTHON_DOCS_PACKAGES = ("torch", "transformers", "numpy", "datasets")
PYTHON_DOCS_MIN_CHARACTERS = 200
ROWS_PER_BATCH = 1000  # a row group of OpenWebText; some 5 MB of text
SHOWN_CHARACTERS = 80
# Seconds before reading, and before a first look-up, is tried again.
PAUSES = (1, 2, 4, 8, 16, 32, 60, 60, 60, 60, 60)
LOOKUP_PAUSES = (1, 2, 4)
SECONDS_OF_SILENCE = 60.0

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """Which documents, in which order: all that the content of a token store depends on, before tokens.

    `files` pairs a path or URL with the digest of its content; `packages` a name with its version.
    """

    dataset_name: str
    config_name: str | None = None
    split: str = "train"
    revision: str | None = None  # as the recipe names it
    commit: str | None = None  # what `revision` means
    data_files: tuple[str, ...] | None = None  # inside a dataset repository
    files: tuple[tuple[str, str], ...] = ()
    packages: tuple[tuple[str, str], ...] = ()
    text_column: str = "text"

    def identity(self) -> dict:
        """What the content depends on: the digests of files but not where they lie, the commit but not its name."""
        identity = asdict(self) | {"files": [digest for _, digest in self.files]}
        del identity["revision"]
        return identity

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Source":
        values = json.loads(text)
        for name in ("files", "packages"):
            values[name] = tuple(tuple(pair) for pair in values[name])
        if values["data_files"] is not None:
            values["data_files"] = tuple(values["data_files"])
        return cls(**values)


def resolve_source(recipe: Recipe) -> Source:
    """The exact source that `recipe` means.

    A branch or tag on the Hub is looked up once and then remembered in `data_cache_dir`, as are the digests of
    downloaded URLs, from the moment a token store is begun with them: an interrupted run continues with the same
    data, and a complete store needs no connection. A full commit hash needs no look-up at all.
    Raises `InputError` for missing files, unknown datasets or revisions, and an unreachable Hub.
    """
    name = recipe.dataset_name
    if name == PYTHON_DOCS:
        versions = [(package, metadata.version(package)) for package in PYTHON_DOCS_PACKAGES]
        return Source(name, packages=(("python", sys.version.split()[0]), *versions))
    if name in FILE_FORMATS:
        files = tuple(
            (file, patiently(functools.partial(file_digest, file, recipe)))
            for file in expand_files(recipe.data_files or ())
        )
        return Source(name, split="train", files=files, text_column=recipe.text_column)
    return Source(
        name,
        config_name=recipe.dataset_config_name,
        split=recipe.dataset_split,
        revision=recipe.dataset_revision,
        commit=patiently(lambda: resolve_commit(recipe)),
        data_files=tuple(recipe.data_files) if recipe.data_files else None,
        text_column=recipe.text_column,
    )


def is_url(path: str) -> bool:
    return "://" in path


def expand_files(patterns: tuple[str, ...]) -> list[str]:
    """Absolute paths (sorted within a glob) and URLs, in the order of the patterns; no file twice."""
    files = []
    for pattern in patterns:
        if is_url(pattern):
            files.append(pattern)
            continue
        expanded = str(Path(pattern).expanduser())
        exact = [expanded] if Path(expanded).is_file() else []
        found = exact or sorted(path for path in glob.glob(expanded, recursive=True) if Path(path).is_file())
        if not found:
            raise InputError(f"data_files: {pattern!r} names no file (looked in {Path.cwd()})")
        files += [str(Path(path).absolute()) for path in found]
    return list(dict.fromkeys(files))


def file_digest(file: str, recipe: Recipe) -> str:
    """SHA-256 of a file's content, or of what a URL gives; a URL that a store was begun with is not asked again."""
    if is_url(file):
        known = recall(recipe, url=file)
        if known is not None:
            return known
    with open(local_path(file), "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def local_path(file: str) -> str:
    """The path itself, or the downloaded copy of a URL in the Hugging Face cache."""
    if not is_url(file):
        return file
    from datasets import DownloadConfig, DownloadManager

    try:
        return DownloadManager(download_config=DownloadConfig(disable_tqdm=True, max_retries=3)).download(file)
    except Exception as error:
        raise InputError(f"data_files: {file} cannot be downloaded ({describe(error)})") from error


def resolve_commit(recipe: Recipe) -> str:
    """The commit that `dataset_revision` (default: the main branch) means."""
    name, revision = recipe.dataset_name, recipe.dataset_revision
    if revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    known = recall(recipe, dataset=name, revision=revision)
    if known is not None:
        return known

    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        return HfApi().dataset_info(name, revision=revision, timeout=30).sha
    except GatedRepoError as error:
        raise InputError(
            f"dataset_name: {name} is gated; accept its terms on the Hub and log in (hf auth login)"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"dataset_name: no dataset {name!r} on the Hub, or it is private and you are not logged in (hf auth login)"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(f"dataset_revision: {name} has no branch, tag or commit {revision!r}") from error
    except Exception as error:  # the HTTP client's own kinds: no route, no name, timeout, 5xx
        raise InputError(
            f"dataset_name: the Hub cannot be asked about {name!r} ({describe(error)})\n"
            "without a connection, use a complete token store (same data_cache_dir), local files, or "
            f"dataset_name: {PYTHON_DOCS}"
        ) from error


# What a name meant when a store was begun with it: one small file a name, in `data_cache_dir`/refs.


def ref_file(cache: Path, **named: str | None) -> Path:
    return cache / "refs" / (hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:16] + ".json")


def recall(recipe: Recipe, **named: str | None) -> str | None:
    file = ref_file(Path(recipe.data_cache_dir).expanduser(), **named)
    return json.loads(file.read_text())["meant"] if file.is_file() else None


def remember_refs(source: Source, cache: Path) -> None:
    """Write down what the names in `source` meant; kept from then on (delete the file to ask again)."""
    refs = [({"url": file}, digest) for file, digest in source.files if is_url(file)]
    if source.commit is not None and source.commit != source.revision:
        refs.append(({"dataset": source.dataset_name, "revision": source.revision}, source.commit))
    for named, meant in refs:
        file = ref_file(cache, **named)
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            aside = file.with_suffix(".partial")
            aside.write_text(json.dumps(named | {"meant": meant}))
            aside.rename(file)


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


# Servers that fail for a while


def limit_silence() -> None:
    """Give the Hub's client a time limit, between two signs of life; it waits for ever by default."""
    import httpx2
    import huggingface_hub
    from huggingface_hub.utils._http import default_client_factory

    def client() -> "httpx2.Client":
        client = default_client_factory()
        client.timeout = httpx2.Timeout(SECONDS_OF_SILENCE, connect=min(10.0, SECONDS_OF_SILENCE))
        return client

    huggingface_hub.set_client_factory(client)


def patiently(attempt: Callable[[], T]) -> T:
    """What `attempt()` gives, which is repeated while it fails for reasons that may pass."""
    pauses = iter(LOOKUP_PAUSES)
    while True:
        try:
            return attempt()
        except InputError as error:
            wait_for_better(error, pauses)


def wait_for_better(error: InputError, pauses: Iterator[float]) -> None:
    """Say what went wrong and wait for the next of `pauses`; raises the error if it will not pass, or none is left."""
    pause = next(pauses, None) if may_pass(error) else None
    if pause is None:
        raise error
    tell(f"{str(error).splitlines()[0]}; trying again in {pause:g} s")
    time.sleep(pause)


def may_pass(error: BaseException) -> bool:
    """Whether it came of a connection or of a server in trouble, rather than of the request or of the data."""
    import httpx2
    from huggingface_hub.errors import OfflineModeIsEnabled

    seen = []
    while error is not None and error not in seen:
        seen.append(error)
        status = getattr(getattr(error, "response", None), "status_code", getattr(error, "status", None))
        if isinstance(status, int):
            return status >= 500 or status in (408, 425, 429)
        if isinstance(error, OfflineModeIsEnabled):
            return False
        error = error.__cause__ or error.__context__
    lost = (ConnectionError, TimeoutError, asyncio.TimeoutError, httpx2.TransportError)
    return any(isinstance(e, lost) or type(e).__module__.startswith("aiohttp") for e in seen)


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
            raise InputError(f"{self.name}: cannot be read ({describe(error)})") from error


def describe(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


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
            f"{name}: row {first_row + row}, column {column_name!r}: {shown(value)} where text was expected "
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


def shown(value: object) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "…"


# The built-in corpus

# Comments and strings of Python source. Triple-quoted bodies are written out ("unrolled") so that the regular
# expression never backtracks: 100 MB of source take 1.3 s, where `ast.parse` takes 16 s.
TOKEN = re.compile(
    rb"#[^\n]*"
    rb'|"""[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*"""'
    rb"|'''[^'\\]*(?:(?:\\.|'(?!''))[^'\\]*)*'''"
    rb'|"[^"\\\n]*(?:\\.[^"\\\n]*)*"'
    rb"|'[^'\\\n]*(?:\\.[^'\\\n]*)*'",
    re.DOTALL,
)
TRIPLE_QUOTES = (b'"""', b"'''")


@functools.cache  # read twice where a tokenizer is trained on it
def python_docs() -> list[str]:
    """Docstrings of at least 200 characters of the standard library and the packages that training needs anyway:
    technical English that is on every machine. De-duplicated, and ordered by a hash, which mixes the packages."""
    folders = [Path(sysconfig.get_paths()["stdlib"])]
    folders += [Path(util.find_spec(package).origin).parent for package in PYTHON_DOCS_PACKAGES]
    documents = set()
    for folder in folders:
        for file in python_files(folder):
            source = file.read_bytes().replace(b"\r\n", b"\n")
            documents.update(docstrings(source))
    return sorted(documents, key=lambda text: hashlib.sha256(text.encode()).digest())


def python_files(folder: Path) -> Iterator[Path]:
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
    for parent, subfolders, names in os.walk(folder):
        subfolders[:] = [name for name in subfolders if name not in skipped]
        yield from (Path(parent, name) for name in names if name.endswith(".py"))


def docstrings(source: bytes) -> Iterator[str]:
    """The docstrings of at least 200 characters in Python `source`, indentation removed: triple-quoted strings that
    open the module or a block. Against `ast` over all five packages: 3 of 16,442 are missed (those in parentheses)
    and 16 strings that open an `if` or a loop are taken besides."""
    long_strings = (len(part) for quotes in TRIPLE_QUOTES for part in source.split(quotes)[1:])
    if max(long_strings, default=0) < PYTHON_DOCS_MIN_CHARACTERS:
        return
    before, position = b":\n", 0  # code since the last string; a module's docstring stands as if it opened a block
    for match in TOKEN.finditer(source):
        start, end = match.span()
        before += source[position:start]
        position = end
        if source[start : start + 1] == b"#":
            continue
        if end - start >= PYTHON_DOCS_MIN_CHARACTERS and source[start : start + 3] in TRIPLE_QUOTES:
            prefix = before[-1:] if before[-1:] in (b"r", b"R", b"u", b"U") else b""
            code = before[: len(before) - len(prefix)].rstrip(b" \t")
            if code.endswith(b"\n") and code.rstrip().endswith(b":"):
                text = inspect.cleandoc(literal(prefix + source[start:end]))
                if len(text) >= PYTHON_DOCS_MIN_CHARACTERS:
                    yield text
        before = b'"'


def literal(quoted: bytes) -> str:
    """The value of a string literal; empty where it is no text (not UTF-8, or a lone surrogate)."""
    try:
        text = ast.literal_eval(quoted.decode("utf-8"))
        text.encode("utf-8")
    except (SyntaxError, ValueError):
        return ""
    return text
