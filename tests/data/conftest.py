"""A tokenizer with which a test can write down what a store must hold."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers


@pytest.fixture(scope="session")
def byte_tokenizer_folder(tmp_path_factory) -> Path:
    """One id per byte: 'A' is 65, and 256 is the end of text. So a test can write down what a store must hold."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    shown = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]  # GPT-2's byte alphabet
    hidden = [b for b in range(256) if b not in shown]
    vocabulary = {chr(b): b for b in shown} | {chr(256 + n): b for n, b in enumerate(hidden)}
    assert set(vocabulary) == set(alphabet)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary | {"<|endoftext|>": 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|endoftext|>"])
    folder = tmp_path_factory.mktemp("bytes")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
