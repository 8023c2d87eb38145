"""The built-in corpus, `dataset_name: python-docs`: docstrings that are on every machine that can train."""

import ast
import functools
import hashlib
import inspect
import os
import re
import sysconfig
from collections.abc import Iterator
from importlib import util
from pathlib import Path

PACKAGES = ("torch", "transformers", "numpy", "datasets")  # beside the standard library; read, never imported
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
MIN_CHARACTERS = 200

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
    """Docstrings of the standard library and of packages that training needs anyway, each of at least 200 characters:
    technical English. De-duplicated, and ordered by a hash, which mixes the packages."""
    folders = [Path(sysconfig.get_paths()["stdlib"])]
    folders += [Path(util.find_spec(package).origin).parent for package in PACKAGES]
    documents = set()
    for folder in folders:
        for file in python_files(folder):
            source = file.read_bytes().replace(b"\r\n", b"\n")
            documents.update(docstrings(source))
    return sorted(documents, key=lambda text: hashlib.sha256(text.encode()).digest())


def python_files(folder: Path) -> Iterator[Path]:
    """The Python files in `folder` and below it, tests and installed packages left out."""
    for parent, subfolders, names in os.walk(folder):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED_FOLDERS]
        yield from (Path(parent, name) for name in names if name.endswith(".py"))


def docstrings(source: bytes) -> Iterator[str]:
    """The docstrings of at least 200 characters in Python `source`, indentation removed: triple-quoted strings that
    open the module or a block. Against `ast` over all five packages: 3 of 16,442 are missed (those in parentheses)
    and 16 strings that open an `if` or a loop are taken besides."""
    long_strings = (len(part) for quotes in TRIPLE_QUOTES for part in source.split(quotes)[1:])
    if max(long_strings, default=0) < MIN_CHARACTERS:
        return
    before, position = b":\n", 0  # code since the last string; a module's docstring stands as if it opened a block
    for match in TOKEN.finditer(source):
        start, end = match.span()
        before += source[position:start]
        position = end
        if source[start : start + 1] == b"#":
            continue
        if end - start >= MIN_CHARACTERS and source[start : start + 3] in TRIPLE_QUOTES:
            prefix = before[-1:] if before[-1:] in (b"r", b"R", b"u", b"U") else b""
            code = before[: len(before) - len(prefix)].rstrip(b" \t")
            if code.endswith(b"\n") and code.rstrip().endswith(b":"):
                text = inspect.cleandoc(literal(prefix + source[start:end]))
                if len(text) >= MIN_CHARACTERS:
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
