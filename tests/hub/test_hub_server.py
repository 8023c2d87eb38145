"""The loopback Hub as other tests rely on it: used by the real clients, in a process of their own."""

import json
import sys
import textwrap

from support.hub_fixtures import OPENWEBTEXT, english_documents
from support.hub_server import asked_range
from support.runs import run


def result_of(hub, code: str, token: str | None = None):
    """What `code` assigns to `result`, run in a fresh process against the Hub."""
    code = "import json\n" + textwrap.dedent(code) + "\nprint(json.dumps(result))"
    env = hub.env(token, HF_HUB_DISABLE_PROGRESS_BARS="1")
    process = run([sys.executable, "-c", code], cwd=hub.folder, env=env)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def test_datasets_streams_openwebtext_by_ranges(owt_hub):
    sha = owt_hub.repository(OPENWEBTEXT, "dataset").sha
    result = result_of(
        owt_hub,
        f"""
        from datasets import load_dataset
        dataset = load_dataset("{OPENWEBTEXT}", "plain_text", split="train", streaming=True, revision="{sha}")
        result = {{"shards": dataset.num_shards, "documents": [example["text"] for example in dataset]}}
        """,
    )
    assert result["shards"] == 4
    assert tuple(result["documents"]) == english_documents()
    parquet = owt_hub.requests("/storage/*.parquet")
    assert parquet and all("Range" in request.headers and request.status == 206 for request in parquet)
    assert all(sha in request.path for request in owt_hub.requests("/datasets/*/resolve/*"))


def test_status_and_cuts_reach_the_client_before_and_after_the_request_has_its_effect(hub):
    hub.add_repository("tester/run")
    hub.fault("/api/models/tester/run", status=503)
    hub.fault("*/preupload/*", status=503)  # retried by the client
    hub.fault("*/commit/main", cut=True)
    hub.fault("*/commit/main", cut=True, after=10)
    result = result_of(
        hub,
        """
        from huggingface_hub import HfApi
        api = HfApi()
        result = []
        for call in (
            lambda: api.model_info("tester/run"),
            lambda: api.upload_file(repo_id="tester/run", path_or_fileobj=b"1", path_in_repo="1"),
            lambda: api.upload_file(repo_id="tester/run", path_or_fileobj=b"2", path_in_repo="2"),
        ):
            try:
                call()
            except Exception as error:
                result.append(type(error).__name__)
        """,
        token="hf_write",
    )
    assert result == ["HfHubHTTPError", "RemoteProtocolError", "RemoteProtocolError"]
    assert hub.repository("tester/run").files() == [".gitattributes", "2"]  # the second was made, its answer lost


def test_a_download_goes_on_where_it_was_cut_and_ends_where_it_was_reset(hub, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(i % 251 for i in range(1_000_000)) * 12)
    hub.add_repository("tester/model", tmp_path)
    cut = hub.fault("/storage/*.safetensors", cut=True, after=11_000_000)  # retried by the client
    reset = hub.fault("/storage/*.safetensors", reset=True, after=0)  # not retried
    result = result_of(
        hub,
        """
        import hashlib
        from huggingface_hub import hf_hub_download
        result = []
        for _ in range(2):
            try:
                with open(hf_hub_download("tester/model", "model.safetensors"), "rb") as file:
                    result.append(hashlib.file_digest(file, "sha256").hexdigest())
            except Exception as error:
                result.append(type(error).__name__)
        """,
    )
    assert result == ["ReadError", hub.repository("tester/model").resolve().files["model.safetensors"].sha256]
    assert (cut.hits, reset.hits) == (1, 1)
    downloads = hub.requests("/storage/*.safetensors", "GET")
    # The client writes, and so keeps, whole chunks of 10 MiB.
    assert [(r.headers.get("Range"), r.sent) for r in downloads[:2]] == [(None, 11_000_000), ("bytes=10485760-", 0)]
    assert not any("Authorization" in request.headers for request in downloads)


def test_ranges_are_those_of_rfc_9110():
    assert asked_range("", 10) is asked_range("bytes=-", 10) is asked_range("bytes=0-1,3-4", 10) is None
    assert asked_range("bytes=0-0", 10) == (0, 1)
    assert asked_range("bytes=3-", 10) == asked_range("bytes=3-99", 10) == (3, 10)
    for beyond in ("bytes=10-", "bytes=10-20", "bytes=5-2"):
        start, stop = asked_range(beyond, 10)
        assert start == stop
