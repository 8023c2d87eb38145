"""Recipes and data sets that cannot work, made by rule from ones that do."""

import gzip
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from clm_owt.recipe import FIELDS, TYPES

# A value that no key of the type takes, written as YAML.
WRONG = {
    "int": ["1.5", "many", "[1, 2]", "{a: 1}", "null", "true", "-3", "'7'", ".inf", "1e400"],
    "float": ["many", "[0.1]", "{a: 1}", "true", ".nan", "-.inf", "'0.1'", "null"],
    "bool": ["maybe", "1.5", "[true]", "null", "2"],
    "str": ["5", "1.5", "[a]", "{a: 1}", "true", "''", "null"],
}


def kind_of(name: str) -> str | None:
    """The type of a key that takes one, and no null."""
    return TYPES[name].__name__ if TYPES[name] in (int, float, bool, str) else None


def recipes(good: dict, draw: random.Random, count: int) -> Iterator[tuple[str, bytes]]:
    """`count` pairs of (what is wrong, the file's content)."""

    def text(content: dict) -> bytes:
        return yaml.safe_dump(content, sort_keys=False).encode()

    sound = text(good)
    pairs = {"n_head": 3, "warmup_steps": 60, "tokenizer_name": "gpt2", "report_to": ["paper"], "push_to_hub": True,
             "resume_from_checkpoint": "/nowhere", "data_files": "/nowhere/*.txt", "dataset_name": "a/b/c",
             "sample_prompts": [], "penalty_type": "sharp", "hub_strategy": "never", "min_lr_ratio": 1.5}  # fmt: skip
    cases: list[tuple[str, bytes]] = [
        ("empty", b""),
        ("not UTF-8", sound + b"run_name: \xff\xfe\n"),
        ("a list", b"- a\n- b\n"),
        ("a text", b"hello\n"),
        ("a number", b"5\n"),
        ("binary", bytes(draw.randrange(256) for _ in range(300))),
        ("a tab", sound + b"\tseed: 5\n"),
        ("an unclosed bracket", sound + b"report_to: [wandb\n"),
        ("a Python object", sound + b"seed: !!python/object/apply:os.getcwd []\n"),
        ("a NUL", sound + b"seed: \x00\n"),
        ("two documents", sound + b"---\nseed: 5\n"),
        ("an unknown anchor", sound + b"seed: *other\n"),
        ("a key that is a list", sound + b"? [a, b]\n: 5\n"),
        ("deep nesting", b"[" * 3000),
    ]
    cases += [(f"{name}: {value}", text(good | {name: value})) for name, value in pairs.items()]
    required = ("dataset_name", "effective_batch_size", "learning_rate", "warmup_steps", "max_steps", "data_files")
    cases += [(f"without {name}", text({k: v for k, v in good.items() if k != name})) for name in required]
    cases += [(f"{name} twice", sound + f"{name}: 1\n".encode()) for name in draw.sample(sorted(good), 5)]
    for name in draw.sample(sorted(good), 8):
        at = draw.randrange(len(name))
        misspelt = name[:at] + "_" + name[at:]
        cases.append((f"{name} as {misspelt}", text({misspelt if k == name else k: v for k, v in good.items()})))
    wrong = [
        (name, value)
        for name in FIELDS
        for value in WRONG.get(kind_of(name), ())
        if not (value == "-3" and FIELDS[name].metadata["rule"] is None)
        and not (value in ("''", "null") and name in ("run_name", "output_dir"))
    ]
    draw.shuffle(wrong)
    for name, value in wrong:
        rest = text({k: v for k, v in good.items() if k != name})
        cases.append((f"{name}: {value}", rest + f"{name}: {value}\n".encode()))
    yield from draw.sample(cases[:45], min(count, 45)) if count < 45 else cases[:count]


def data_sets(draw: random.Random, count: int) -> Iterator[tuple[str, list[str], Callable[[Path], None]]]:
    """`count` triples of (what is wrong, options in which {data} is the folder, what writes the files there)."""
    good = "".join(json.dumps({"text": "word " * 40}) + "\n" for _ in range(30)).encode()
    table = pa.table({"text": ["word " * 40] * 30})

    def file(name: str, content: bytes) -> Callable[[Path], None]:
        return lambda folder: (folder / name).write_bytes(content) and None

    def json_lines(what: str, content: bytes, name: str = "x.jsonl", *more: str):
        return what, ["--data_files", f"{{data}}/{name}", *more], file(name, content)

    def text_file(what: str, content: bytes, *more: str):
        return what, ["--dataset_name", "text", "--data_files", "{data}/x.txt", *more], file("x.txt", content)

    def csv_file(what: str, content: bytes):
        return what, ["--dataset_name", "csv", "--data_files", "{data}/x.csv"], file("x.csv", content)

    def parquet(what: str, write: Callable[[Path], None], *more: str):
        return what, ["--dataset_name", "parquet", "--data_files", "{data}/x.parquet", *more], write

    def parquet_of(what: str, table: pa.Table, *more: str):
        return parquet(what, lambda folder: pq.write_table(table, folder / "x.parquet"), *more)

    def broken_parquet(what: str, spoil: Callable[[bytes], bytes]):
        def write(folder: Path) -> None:
            pq.write_table(table, folder / "x.parquet")
            (folder / "x.parquet").write_bytes(spoil((folder / "x.parquet").read_bytes()))

        return parquet(what, write)

    row = b'{"text": "' + b"word " * 40 + b'"}\n'
    cases = [
        json_lines("an empty file", b""),
        json_lines("blank lines", b"\n\n\n"),
        json_lines("empty documents", b'{"text": ""}\n' * 30),
        json_lines("no JSON", b"what\n"),
        json_lines("JSON of a number", b"5\n6\n"),
        json_lines("JSON of a text", b'"a"\n"b"\n'),
        json_lines("JSON of lists", b"[1, 2]\n[3, 4]\n"),
        json_lines("a row cut short", good[:-20]),
        json_lines("a number for text", b'{"text": 5}\n' * 30),
        json_lines("null for text", b'{"text": null}\n' * 30),
        json_lines("a list for text", b'{"text": ["a", "b"]}\n' * 30),
        json_lines("an object for text", b'{"text": {"a": 1}}\n' * 30),
        json_lines("one number among texts", row * 20 + b'{"text": 5}\n' + row * 20),
        json_lines("a number after a null", row * 20 + b'{"text": null}\n{"text": 5}\n' + row * 20),
        json_lines("one row of a number", row * 20 + b"5\n" + row * 20),
        json_lines("another column", good.replace(b'"text"', b'"body"')),
        json_lines("a column that is not there", good, "x.jsonl", "--text_column", "body"),
        json_lines("bytes that are not UTF-8", b'{"text": "\xff\xfe' + b"a" * 99 + b'"}\n'),
        json_lines("a lone surrogate", b'{"text": "\\ud800 ' + b"word " * 99 + b'"}\n' * 30),
        json_lines("a NUL byte", row * 20 + b"\x00\n" + row * 20),
        json_lines("too short for a block", b'{"text": "a"}\n' * 30, "x.jsonl", "--block_size", "1000"),
        json_lines("no more documents than validation takes", row * 3),
        json_lines(
            "validation too short", b'{"text": "a"}\n' * 6 + row * 30, "x.jsonl", "--validation_documents", "1"
        ),
        json_lines("gzip cut short", gzip.compress(good)[:-30], "x.jsonl.gz"),
        json_lines("no gzip in spite of its name", good, "x.jsonl.gz"),
        json_lines("Parquet named JSON", b"PAR1" + bytes(200)),
        ("no file", ["--data_files", "{data}/y*.jsonl"], file("x.jsonl", good)),
        ("a folder for a file", ["--data_files", "{data}/x"], lambda folder: (folder / "x").mkdir()),
        csv_file("a CSV row with too many values", b"id,text\n" + b"1,word\n" * 20 + b"2,a, b\n"),
        csv_file("a CSV row with open quotes", b"id,text\n" + b"1,word\n" * 20 + b'2,"a\n'),
        csv_file("CSV without the column", b"id,body\n" + b"1,word\n" * 20),
        csv_file("CSV that is not UTF-8", b"id,text\n" + b"1,word\n" * 20 + b"2,\xe9\n"),
        text_file("a file that is not UTF-8", b"one\n\ntwo \xe9\n", "--text_documents", "file"),
        text_file("an empty text", b""),
        text_file("a text of blank lines", b"\n\n\n \n"),
        text_file("a text that is not UTF-8", b"\xff\xfe\x00" * 400),
        text_file("a text of one word", b"word"),
        parquet_of("Parquet without the column", table.rename_columns(["body"])),
        parquet_of("Parquet of numbers", pa.table({"text": list(range(99))})),
        parquet_of("Parquet of nulls", pa.table({"text": pa.array([None] * 99, pa.string())})),
        parquet_of("Parquet of bytes", pa.table({"text": pa.array([b"\xff"] * 99, pa.binary())})),
        parquet_of("Parquet without rows", table.slice(0, 0)),
        broken_parquet("Parquet cut short", lambda content: content[: len(content) // 2]),
        broken_parquet("Parquet without its footer", lambda content: content[:-8]),
        broken_parquet("Parquet with a spoilt page", lambda content: content[:40] + bytes(60) + content[100:]),
        parquet("an empty Parquet", file("x.parquet", b"")),
    ]
    draw.shuffle(cases)
    yield from cases[:count]
