"""Fixtures for the tests that need a Hub: the server of `hub_server.py`, and repositories to put on it."""

import functools
import re
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.hub_server import HubServer

OPENWEBTEXT = "Skylion007/openwebtext"
GPT2 = "openai-community/gpt2"

# The metadata of the real repository's README (numbers aside), from which datasets learns the config and its files.
DATASET_CARD = """\
---
language:
- en
license: cc0-1.0
dataset_info:
  config_name: plain_text
  features:
  - name: text
    dtype: string
  splits:
  - name: train
    num_bytes: {num_bytes}
    num_examples: {num_examples}
configs:
- config_name: plain_text
  data_files:
  - split: train
    path: plain_text/train-*
  default: true
---

# Dataset Card for "openwebtext"
"""


@functools.cache
def english_documents() -> tuple[str, ...]:
    """About 1,900 documents, 1.36 MB of real English that comes with Python: the language reference's topics and the
    standard library's docstrings of 200 characters and more, distinct, in an order fixed for one version of Python."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = (f for f in folder.rglob("*.py") if not {"test", "tests", "site-packages"} & set(f.parts))
    documents = [topics[name] for name in sorted(topics)]
    for file in sorted(files):
        # Ten times faster than ast.parse; that it also finds some other strings does no harm.
        documents += re.findall(r'"""([A-Z][^"\\]{199,}?)"""', file.read_text(encoding="utf-8", errors="replace"))
    return tuple(dict.fromkeys(documents))


def write_openwebtext(
    folder: Path, documents: Sequence[str] | None = None, num_files: int = 4, rows_per_group: int = 100
) -> Path:
    """A dataset repository in OpenWebText's form: `plain_text/train-0000N-of-0000M.parquet`, several row groups each,
    one column `text`, and a README that names the config `plain_text`. The files hold the documents in their order."""
    documents = english_documents() if documents is None else documents
    (folder / "plain_text").mkdir(parents=True)
    for i in range(num_files):
        part = documents[i * len(documents) // num_files : (i + 1) * len(documents) // num_files]
        name = f"train-{i:05d}-of-{num_files:05d}.parquet"
        table = pa.table({"text": pa.array(part, pa.string())})
        pq.write_table(table, folder / "plain_text" / name, row_group_size=rows_per_group)
    num_bytes = sum(len(document.encode()) for document in documents)
    (folder / "README.md").write_text(DATASET_CARD.format(num_bytes=num_bytes, num_examples=len(documents)))
    return folder


@pytest.fixture(scope="session")
def openwebtext_folder(tmp_path_factory) -> Path:
    """`english_documents()` in OpenWebText's form, 4 files of 5 row groups each."""
    return write_openwebtext(tmp_path_factory.mktemp("openwebtext") / "repository")


@pytest.fixture
def hub(tmp_path_factory):
    """A running Hub without repositories, with a token `hf_write` of the user `tester`."""
    with HubServer(tmp_path_factory.mktemp("hub")) as server:
        server.add_token("hf_write", user="tester", role="write")
        yield server


@pytest.fixture
def owt_hub(hub, openwebtext_folder, gpt2_tokenizer_folder) -> HubServer:
    """A running Hub with what `recipes/owt_512.yaml` reads: `Skylion007/openwebtext` and GPT-2's tokenizer."""
    hub.add_repository(OPENWEBTEXT, openwebtext_folder, repo_type="dataset")
    hub.add_repository(GPT2, gpt2_tokenizer_folder)
    return hub
