"""The built-in corpus."""

import ast
import sysconfig
from pathlib import Path

import pytest

from clm_owt.data.python_docs import docstrings, python_docs


def by_ast(source: bytes) -> set[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(ast.parse(source)) if isinstance(node, kinds))
    return {text for text in found if text and len(text) >= 200}


@pytest.mark.parametrize("package", [".", "asyncio", "concurrent/futures", "email", "unittest", "xml/etree"])
def test_docstrings_are_those_that_ast_finds(package):
    """The lexer is 10 times as fast as `ast.parse`; in the standard library it differs nowhere but once: a string
    that opens an `if` in ctypes."""
    for file in sorted((Path(sysconfig.get_paths()["stdlib"]) / package).glob("[a-l]*.py")):
        source = file.read_bytes()
        assert set(docstrings(source)) == by_ast(source), file


def test_strings_that_only_look_like_docstrings_are_not_taken():
    long = b"words " * 50
    source = (
        b"x = '''\nfoo:\n'''\n" + b'y = {"key": """' + long + b'"""}\n# """\n' + b'def f():\n    # """ in a comment\n'
    )
    source += b'    s = \'"""\'\n    return """' + long + b'"""\n'
    assert not by_ast(source) and not list(docstrings(source))
    assert list(docstrings(b"x = '''\nfoo:\n'''\n# \"\"\"\ndef f():\n    # a\n    r'''" + long + b"'''\n")) == [
        long.decode()
    ]


def test_the_corpus_is_5_to_15_megabytes_of_different_documents_in_a_fixed_order():
    corpus = python_docs()
    python_docs.cache_clear()
    assert python_docs() == corpus
    assert len(set(corpus)) == len(corpus)
    assert min(map(len, corpus)) >= 200
    assert 5e6 < sum(len(text.encode()) for text in corpus) < 15e6
