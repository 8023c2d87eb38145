"""Which documents a recipe means, and reading them: formats, resuming, bad data."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.hub_server import HubServer

from clm_owt.data.building import build
from clm_owt.data.corpus import Position
from clm_owt.data.documents import read_documents
from clm_owt.data.sources import Source, remember_refs, resolve_source
from clm_owt.errors import InputError
from clm_owt.recipe import Recipe
from clm_owt.recipe_reader import load_recipe

TEXTS = [f"document number {i}" for i in range(100)]
JSON_LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def recipe(tmp_path: Path, **settings) -> Recipe:
    required = {"effective_batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 0, "max_steps": 1}
    return Recipe(**required | {"data_cache_dir": str(tmp_path / "cache")} | settings)


def written(file: Path, content: bytes | pa.Table, row_group_size: int = 10) -> Path:
    if isinstance(content, pa.Table):
        pq.write_table(content, file, row_group_size=row_group_size)
    else:
        file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)
    return file


def files_source(tmp_path: Path, kind: str, *files: Path | str, **settings) -> Source:
    return resolve_source(recipe(tmp_path, dataset_name=kind, data_files=tuple(map(str, files)), **settings))


def texts_of(source: Source, **options) -> list[str]:
    return [text for _, texts in read_documents(source, **options) for text in texts.to_pylist()]


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json"])
def test_json_lines_are_read_compressed_or_not(tmp_path, name):
    assert texts_of(files_source(tmp_path, "json", written(tmp_path / name, JSON_LINES))) == TEXTS


def test_a_text_files_documents_are_its_paragraphs(tmp_path):
    file = written(tmp_path / "a.txt", "one\n\ntwo\nlines\n\n\n\nthree é\n".encode())
    assert texts_of(files_source(tmp_path, "text", file)) == ["one", "two\nlines", "three é\n"]


def test_a_text_file_is_one_document_where_the_recipe_says_so(tmp_path):
    files = [written(tmp_path / name, b"one\r\n\r\ntwo\n") for name in ("a.txt", "b.txt.gz")]
    source = files_source(tmp_path, "text", *files, text_documents="file")
    assert texts_of(source) == ["one\n\ntwo\n"] * 2
    assert source.identity() != files_source(tmp_path, "text", *files).identity()


CSV = b'text,id\r\n"a, ""b""\nc",1\r\n\r\nNA,2\r\n,3\r\n5,4\r\n'


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
@pytest.mark.parametrize("content", [CSV, b"\xef\xbb\xbf" + CSV, CSV.replace(b"\r\n", b"\n")])
def test_csv_gives_the_texts_as_they_stand_there(tmp_path, name, content):
    """Neither NA nor a number is anything but text, and a line break in quotes ends no row."""
    file = written(tmp_path / name, content)
    assert texts_of(files_source(tmp_path, "csv", file)) == ['a, "b"\nc', "NA", "", "5"]


@pytest.mark.parametrize("separator", [b";", b"\t"])
def test_csv_may_be_separated_by_semicolons_or_tabs(tmp_path, separator):
    content = b'"n,m";text\n1;"a,b"\n2;c\n'.replace(b";", separator)
    assert texts_of(files_source(tmp_path, "csv", written(tmp_path / "a.csv", content))) == ["a,b", "c"]


def test_parquet_of_any_text_type_is_read_by_its_text_column(tmp_path):
    for kind in (pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        table = pa.table({"number": range(100), "page": pa.array(TEXTS, pa.string()).cast(kind)})
        file = written(tmp_path / "a.parquet", table)
        assert texts_of(files_source(tmp_path, "parquet", file, text_column="page")) == TEXTS


def test_files_come_in_the_order_of_the_patterns_and_sorted_within_one(tmp_path):
    for name in ("b", "a", "c"):
        written(tmp_path / f"{name}.jsonl", json.dumps({"text": name}).encode())
    assert texts_of(files_source(tmp_path, "json", tmp_path / "c.jsonl", tmp_path / "*.jsonl")) == ["c", "a", "b"]


@pytest.mark.parametrize("kind", ["json", "text", "csv", "parquet"])
@pytest.mark.parametrize("rows_per_batch", [7, 25])
def test_reading_goes_on_from_any_batch(tmp_path, kind, rows_per_batch):
    """Twice in a row too: the position that a continued reading gives is as good as the first one's."""
    contents = {"json": JSON_LINES, "text": "\n\n".join(TEXTS).encode(), "parquet": pa.table({"text": TEXTS})}
    contents["csv"] = "\n".join(["text", *TEXTS]).encode()
    source = files_source(tmp_path, kind, *(written(tmp_path / f"{i}.{kind}", contents[kind]) for i in range(2)))
    batches = list(read_documents(source, rows_per_batch=rows_per_batch))
    assert sum(len(texts) for _, texts in batches) == 200
    for start in range(0, len(batches), 3):
        position = Position(**json.loads(json.dumps(vars(batches[start][0]))))
        continued = list(read_documents(source, position, rows_per_batch))
        assert [texts.to_pylist() for _, texts in continued] == [texts.to_pylist() for _, texts in batches[start:]]
        if len(continued) > 1:
            again = read_documents(source, continued[1][0], rows_per_batch)
            assert [texts.to_pylist() for _, texts in again] == [
                texts.to_pylist() for _, texts in batches[start + 1 :]
            ]


def truncated(content: bytes) -> bytes:
    return content[: len(content) // 2]


PARQUET = pa.BufferOutputStream()
pq.write_table(pa.table({"text": TEXTS}), PARQUET)
NOT_UTF8 = pa.array([b"fine", b"a\xff"], pa.binary()).view(pa.string())
BAD_DATA = {
    "missing column": ("a.jsonl", b'{"txt": "a", "n": 1}\n', "no column 'text'; its columns are txt, n"),
    "only nulls": ("a.jsonl", b'{"text": null}\n' * 3, r"no document with text in it \(3 empty ones\)"),
    "null, then number": (
        "a.jsonl",
        b'{"text": null}\n{"text": 5}\n',
        "row 1, column 'text': 5 where text was expected",
    ),
    "number": ("a.jsonl", b'{"text": "a"}\n{"text": 5}\n', "row 1, column 'text': 5 where text was expected"),
    "numbers": ("a.jsonl", b'{"text": 5}\n{"text": 6}\n', "row 0, column 'text': 5 where text was expected"),
    "nested": ("a.jsonl", b'{"text": "a"}\n{"text": {"b": [1]}}\n', r"row 1, column 'text': {'b': \[1\]} where text"),
    "invalid UTF-8": ("a.jsonl", b'{"text": "ok"}\n{"text": "a\xff"}\n', r"row 1, .* not UTF-8 \(byte 1 is 0xff"),
    "lone surrogate": (
        "a.jsonl",
        b'{"text": "ok"}\n{"text": "\\ud800"}\n',
        "surrogate pair in string is invalid. in row 1",
    ),
    "no JSON": ("a.jsonl", b"nonsense\n", "cannot be read .*JSON parse error"),
    "cut JSON": ("a.jsonl", JSON_LINES[:-10], "cannot be read .*JSON parse error.* in row 99"),
    "zero-length JSON": ("a.jsonl", b"", "holds no rows"),
    "truncated gz": ("a.jsonl.gz", None, "cannot be read .EOFError"),
    "CSV column": ("a.csv", b"id,body\n1,a\n", "no column 'text'; its first line names 'id', 'body' .set text_column"),
    "CSV without a first line": (
        "a.csv",
        b"some text, and " * 99,
        "no column 'text'; its first line names 'some text'",
    ),
    "zero-length CSV": ("a.csv", b"", "no column 'text'; its first line names none"),
    "CSV, too many values": ("a.csv", b"id,text\n0,a b\n1,a, b\n", r"row 1 \(line 3\): 3 of 2 values; .* in quotes"),
    "CSV, too few values": ("a.csv", b"id,text\n0,a b\n1,a\nb\n", r"row 2 \(line 4\): 1 of 2 values; .* in quotes"),
    "CSV, open quotes": ("a.csv", b'text\n"a b\nc d\n', r"row 0 \(line 3\): unexpected end of data; quotes"),
    "CSV, quotes amid quotes": ("a.csv", b'text\n"a "b" c"\n', r"row 0 \(line 2\): ',' expected after '\"'; quotes"),
    "CSV not UTF-8": (
        "a.csv",
        b"id,text\n0,a b c d e f\n1,a\xff\n",
        r"row 1, column 'text': not UTF-8 \(byte 1 is 0xff",
    ),
    "CSV in UTF-16": ("a.csv", "id,text\n1,a\n".encode("utf-16"), "no column 'text'; its first line names '"),
    "truncated CSV gz": ("a.csv.gz", gzip.compress(CSV)[:-12], "cannot be read .EOFError"),
    "file not UTF-8": ("a.book", b"one\n\ntwo \xe9\n", r"line 3: not UTF-8 \(byte 0xe9"),
    "text not UTF-8": ("a.txt", b"one\n\ntwo \xe9\n", "not UTF-8 text .byte 0xe9"),
    "zero-length Parquet": ("a.parquet", b"", "cannot be read .*0 bytes"),
    "truncated Parquet": ("a.parquet", truncated(PARQUET.getvalue().to_pybytes()), "cannot be read .*corrupted"),
    "Parquet column": ("a.parquet", pa.table({"t": TEXTS}), "no column 'text'; its columns are t"),
    "Parquet nulls": ("a.parquet", pa.table({"text": pa.nulls(9, pa.int64())}), r"no document .* \(9 empty ones\)"),
    "Parquet null, then number": (
        "a.parquet",
        pa.table({"text": [None, 3]}),
        "row 1, column 'text': 3 where text was",
    ),
    "Parquet number": ("a.parquet", pa.table({"text": [3, 4]}), "row 0, column 'text': 3 where text was expected"),
    "Parquet nested": ("a.parquet", pa.table({"text": [{"a": 1}]}), "row 0, column 'text': {'a': 1} where text"),
    "Parquet binary": ("a.parquet", pa.table({"text": [b"a"]}), "row 0, column 'text': b'a' where text was expected"),
    "Parquet not UTF-8": (
        "a.parquet",
        pa.table({"text": NOT_UTF8}),
        "row 1, column 'text': not UTF-8 .byte 1 is 0xff",
    ),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_an_error_that_names_file_row_and_value_and_nothing_is_written(
    tmp_path, case, gpt2_tokenizer_folder, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    name, content, message = BAD_DATA[case]
    file = tmp_path / name
    if case == "truncated gz":
        file.write_bytes(truncated(gzip.compress(JSON_LINES)))
    elif case == "truncated CSV gz":
        file.write_bytes(content)
    else:
        written(file, content)
    kind = {"txt": "text", "book": "text", "csv": "csv", "parquet": "parquet"}.get(name.split(".")[1], "json")
    bad = recipe(
        tmp_path,
        dataset_name=kind,
        text_documents="file" if file.suffix == ".book" else "paragraph",
        data_files=(str(file),),
        tokenizer_name=str(gpt2_tokenizer_folder),
        validation_documents=1,
        block_size=4,
    )
    with pytest.raises(InputError, match=message) as raised:
        build(bad, resolve_source(bad))
    assert str(file) in str(raised.value)
    assert len(str(raised.value).splitlines()) <= 3
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("kind", ["json", "parquet"])
def test_rows_without_text_are_empty_documents(tmp_path, kind):
    """Null, or in JSON no key of that name; a value that is no text stays an error."""
    texts = ["a", None, "b", None, None]
    lines = [json.dumps({"n": 1} if text is None and row == 3 else {"text": text}) for row, text in enumerate(texts)]
    content = {"json": "\n".join(lines).encode(), "parquet": pa.table({"text": texts})}[kind]
    assert texts_of(files_source(tmp_path, kind, written(tmp_path / f"a.{kind}", content))) == ["a", "", "b", "", ""]


def test_a_number_in_a_later_batch_is_named_by_its_row_in_the_file(tmp_path):
    content = b'{"text": "a"}\n' * 1500 + b'{"text": null}\n{"text": 5}\n'
    with pytest.raises(InputError, match="row 1501, column 'text': 5 where text was expected"):
        texts_of(files_source(tmp_path, "json", written(tmp_path / "a.jsonl", content)))


@pytest.mark.parametrize("name", ["draft [1].txt", "why?*.txt", "[a-b]/{x}.txt"])
def test_a_file_is_named_by_its_name_whatever_characters_are_in_it(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    written(tmp_path / name, b"one\n\ntwo")
    written(tmp_path / "a", b"another file, which '[a-b]' would match")
    source = files_source(tmp_path, "text", tmp_path / name)
    assert texts_of(source) == ["one", "two"]
    argv = "--dataset_name text --tokenizer_name gpt2 --max_steps 9 --warmup_steps 1 --effective_batch_size 1".split()
    load_recipe([*argv, "--learning_rate", "1e-3", "--data_files", str(tmp_path / name)])


def test_a_folder_stands_for_the_files_of_the_format_in_it(tmp_path):
    for name in ("b.jsonl.gz", "a.json", "notes.txt", "sub/c.ndjson", ".hidden/d.json", "README", "a.jsonl.partial"):
        (tmp_path / "my [data]" / name).parent.mkdir(parents=True, exist_ok=True)
        written(tmp_path / "my [data]" / name, json.dumps({"text": name}).encode())
    folder = tmp_path / "my [data]"
    assert texts_of(files_source(tmp_path, "json", folder)) == ["a.json", "b.jsonl.gz", "sub/c.ndjson"]
    assert texts_of(files_source(tmp_path, "text", folder)) == ['{"text": "notes.txt"}']
    with pytest.raises(
        InputError, match=r"the folder .* holds no parquet files \(named \.parquet, compressed or not\)"
    ):
        files_source(tmp_path, "parquet", folder)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"data_files: '.*no-such.*' matches no file here"):
        files_source(tmp_path, "json", tmp_path / "no-such-*.jsonl")


def test_a_full_commit_needs_no_connection_and_a_name_is_remembered(tmp_path, monkeypatch):
    import huggingface_hub

    class NoHub:
        def dataset_info(self, *_, **__):
            raise ConnectionError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "HfApi", NoHub)
    by_commit = recipe(tmp_path, dataset_name="owner/pages", dataset_revision=COMMIT)
    assert resolve_source(by_commit).commit == COMMIT

    by_name = recipe(tmp_path, dataset_name="owner/pages")
    with pytest.raises(InputError, match="the Hub cannot be asked about 'owner/pages'"):
        resolve_source(by_name)
    remember_refs(Source("owner/pages", commit=COMMIT), tmp_path / "cache")
    assert resolve_source(by_name).commit == COMMIT
    assert resolve_source(by_name).identity() == resolve_source(by_commit).identity()


def test_a_url_is_read_like_a_file_and_not_asked_again_once_a_store_was_begun(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "downloads")
    with HubServer(tmp_path / "hub") as hub:
        url = hub.add_file("pages.txt", b"one\n\ntwo")
        source = files_source(tmp_path, "text", url)
        assert texts_of(source) == ["one", "two"]
        with pytest.raises(InputError, match=r"no-such\.txt cannot be downloaded"):
            files_source(tmp_path, "text", url.replace("pages", "no-such"))
    remember_refs(source, tmp_path / "cache")
    assert files_source(tmp_path, "text", url) == source  # the server is gone
    local = files_source(tmp_path, "text", written(tmp_path / "a.txt", b"one\n\ntwo"))
    assert local.identity() == source.identity()


def test_a_source_survives_json(tmp_path):
    for source in (
        files_source(tmp_path, "json", written(tmp_path / "a.jsonl", JSON_LINES)),
        Source("owner/pages", "config", "train", None, COMMIT, ("a/*.parquet",)),
        resolve_source(recipe(tmp_path, dataset_name="python-docs")),
    ):
        assert Source.from_json(source.to_json()) == source
