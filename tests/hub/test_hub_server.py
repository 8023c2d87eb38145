"""The loopback Hub, used by the real clients: they run in a process of their own, where HF_ENDPOINT is set."""

import json
import math
import socket
import subprocess
import sys
import textwrap
import time

import pytest
from support.hub_fixtures import GPT2, OPENWEBTEXT, english_documents
from support.hub_server import asked_range


def run(hub, code: str, token: str | None = None, **env: str):
    """What `code` assigns to `result`, run in a fresh process against the Hub."""
    code = "import json\n" + textwrap.dedent(code) + "\nprint(json.dumps(result))"
    environment = hub.env(token) | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"} | env
    process = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


@pytest.fixture
def model_folder(tmp_path):
    """A repository with a file that LFS keeps (3 MB), regular files, one of them in a folder, and a model card."""
    folder = tmp_path / "model"
    (folder / "curves").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(i % 251 for i in range(3_000_000)))
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    (folder / "curves" / "step 1+2.txt").write_text("loss")  # a name that has to be quoted
    (folder / "README.md").write_text("---\nlicense: mit\ntags: [gpt2]\n---\n# Model\n")
    return folder


def read_folder(folder) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# Reading


def test_datasets_streams_openwebtext_by_ranges(owt_hub):
    sha = owt_hub.repository(OPENWEBTEXT, "dataset").sha
    result = run(
        owt_hub,
        f"""
        from datasets import load_dataset
        dataset = load_dataset("{OPENWEBTEXT}", "plain_text", split="train", streaming=True, revision="{sha}")
        result = {{"shards": dataset.num_shards, "documents": [example["text"] for example in dataset]}}
        row_groups = dataset.reshard()
        state = row_groups.state_dict()
        iterator = iter(row_groups)
        for _ in range(1500):
            next(iterator)
        state = row_groups.state_dict()
        row_groups = dataset.reshard()
        row_groups.load_state_dict(state)
        result["rest"] = [example["text"] for example in row_groups]
        """,
    )
    assert result["shards"] == 4
    assert tuple(result["documents"]) == english_documents()
    assert tuple(result["rest"]) == english_documents()[1500:]
    parquet = owt_hub.requests("/storage/*.parquet")
    assert parquet and all(request.range and request.status == 206 for request in parquet)
    assert all(sha in request.path for request in owt_hub.requests("/datasets/*/resolve/*"))


def test_datasets_refuses_an_unknown_config_and_an_unknown_revision(owt_hub):
    result = run(
        owt_hub,
        f"""
        from datasets import load_dataset
        result = []
        for name, revision in [("no_such_config", None), ("plain_text", "no-such-revision")]:
            try:
                load_dataset("{OPENWEBTEXT}", name, split="train", streaming=True, revision=revision)
            except Exception as error:
                result.append(f"{{type(error).__name__}}: {{error}}")
        """,
    )
    assert "no_such_config" in result[0] and "plain_text" in result[0]
    assert "no-such-revision" in result[1]


def test_a_repository_can_be_had_at_a_commit_id_known_beforehand(hub, model_folder):
    sha = "0123456789abcdef0123456789abcdef01234567"
    hub.add_repository("tester/model", model_folder, sha=sha)
    code = f"from huggingface_hub import HfApi; result = HfApi().model_info('tester/model', revision='{sha}').sha"
    assert run(hub, code) == sha


def test_datasets_reads_a_text_file_by_url(hub):
    url = hub.add_file("x.txt", b"to be\nor not to be\n")
    code = f"""
        from datasets import load_dataset
        result = load_dataset("text", data_files="{url}", split="train")["text"][:]
        """
    assert run(hub, code) == ["to be", "or not to be"]


def test_transformers_loads_the_tokenizer_and_shares_a_model_with_its_revisions(owt_hub):
    result = run(
        owt_hub,
        f"""
        import torch
        from huggingface_hub import HfApi
        from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, pipeline

        tokenizer = AutoTokenizer.from_pretrained("{GPT2}")
        result = {{"ids": tokenizer("Hello world").input_ids, "eos": tokenizer.eos_token_id}}

        id = "tester/run"
        model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, n_positions=16))
        wte = model.transformer.wte.weight
        for step in (1, 2):
            torch.nn.init.constant_(wte, step)
            model.push_to_hub(id, commit_message=f"step {{step}}")
            HfApi().create_tag(id, tag=f"step-{{step:08d}}")
        tokenizer.push_to_hub(id)
        HfApi().create_branch(id, branch="first", revision="step-00000001")

        revisions = ["main", "step-00000001", "step-00000002", "first"]
        loaded = [GPT2LMHeadModel.from_pretrained(id, revision=revision) for revision in revisions]
        result["weights"] = [model.transformer.wte.weight.mean().item() for model in loaded]
        result["samples"] = pipeline("text-generation", model=id)("Hello", max_new_tokens=2)
        """,
        token="hf_write",
    )
    assert result["ids"] == [15496, 995] and result["eos"] == 50256
    assert result["weights"] == [2, 1, 2, 1]
    assert result["samples"][0]["generated_text"].startswith("Hello")
    repository = owt_hub.repository("tester/run")
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(repository.files())
    assert "tokenizer.json" not in repository.files("step-00000002")


def test_huggingface_hub_reads_repositories(hub, model_folder):
    repository = hub.add_repository("tester/model", model_folder)
    result = run(
        hub,
        """
        from pathlib import Path
        from huggingface_hub import HfApi, HfFileSystem, hf_hub_download, snapshot_download
        from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

        api, id = HfApi(), "tester/model"
        info = api.model_info(id, files_metadata=True)
        result = {
            "sha": info.sha,
            "tags": info.tags,
            "license": info.card_data.license,
            "siblings": {file.rfilename: [file.size, file.lfs.size if file.lfs else None] for file in info.siblings},
            "config": Path(hf_hub_download(id, "config.json")).read_text(),
            "folder": snapshot_download(id),
            "top": sorted(entry.path for entry in api.list_repo_tree(id)),
            "info": [entry.path for entry in api.get_paths_info(id, ["config.json", "curves", "?"], expand=True)],
            "glob": HfFileSystem().glob(id + "/**/*.txt"),
            "commits": [commit.title for commit in api.list_repo_commits(id)],
        }
        for error, call in [
            (EntryNotFoundError, lambda: hf_hub_download(id, "missing.json")),
            (RevisionNotFoundError, lambda: hf_hub_download(id, "config.json", revision="missing")),
            (RepositoryNotFoundError, lambda: api.model_info("tester/missing")),
        ]:
            try:
                call()
            except error:
                continue
            raise AssertionError(error)
        """,
    )
    assert result["sha"] == repository.sha
    assert result["tags"] == ["gpt2"] and result["license"] == "mit"
    assert result["siblings"]["model.safetensors"] == [3_000_000, 3_000_000]
    assert result["siblings"]["config.json"] == [22, None]
    assert result["config"] == '{"model_type": "gpt2"}'
    folder = type(model_folder)(result["folder"])
    assert read_folder(folder) == read_folder(model_folder) | {".gitattributes": repository.read(".gitattributes")}
    assert result["top"] == [".gitattributes", "README.md", "config.json", "curves", "model.safetensors"]
    assert result["info"] == ["config.json", "curves"]
    assert result["glob"] == ["tester/model/curves/step 1+2.txt"]
    assert result["commits"] == ["initial commit"]


# Uploading


def test_what_is_uploaded_is_what_is_downloaded_at_every_revision(hub, model_folder, tmp_path):
    result = run(
        hub,
        f"""
        from huggingface_hub import CommitOperationDelete, HfApi, snapshot_download
        from huggingface_hub.errors import HfHubHTTPError

        api = HfApi()
        result = {{"url": api.create_repo("run"), "again": api.create_repo("run", exist_ok=True), "status": []}}
        id = result["url"].repo_id

        def status(call, *args, **kwargs):
            try:
                call(*args, **kwargs)
            except HfHubHTTPError as error:
                result["status"].append(error.response.status_code)

        status(api.create_repo, "run")
        first = api.upload_folder(repo_id=id, folder_path={str(model_folder)!r}, commit_message="step 1")
        api.create_tag(id, tag="step-1")
        status(api.create_tag, id, tag="step-1")
        api.create_branch(id, branch="side/1")
        status(api.create_branch, id, branch="side/1")
        api.upload_file(repo_id=id, path_or_fileobj=b"new", path_in_repo="config.json", commit_message="step 2")
        large = {str(model_folder / "model.safetensors")!r}
        api.upload_file(repo_id=id, path_or_fileobj=large, path_in_repo="copy.bin", commit_message="copy")
        operations = [CommitOperationDelete(path) for path in ("curves/", "README.md", "copy.bin")]
        api.create_commit(id, operations, commit_message="delete")
        status(api.create_commit, id, operations, commit_message="late", parent_commit=first.oid)
        status(api.upload_file, repo_id=id, path_or_fileobj=b"", path_in_repo="x", revision="missing")
        api.delete_tag(id, tag="step-1")
        api.create_tag(id, tag="step-1", revision="side/1")
        refs = api.list_repo_refs(id)
        result["refs"] = [[ref.name for ref in refs.branches], [ref.name for ref in refs.tags]]
        result["folder"] = snapshot_download(id, revision="step-1", local_dir={str(tmp_path / "old")!r})
        result["side"] = snapshot_download(id, revision="side/1") == snapshot_download(id, revision=first.oid)
        result["new"] = snapshot_download(id, local_dir={str(tmp_path / "new")!r})
        """,
        token="hf_write",
    )
    assert result["url"] == result["again"] == f"{hub.url}/tester/run"
    assert result["status"] == [409, 409, 409, 412, 404]
    assert result["refs"] == [["main", "side/1"], ["step-1"]]
    assert result["side"]
    wanted = read_folder(model_folder) | {".gitattributes": hub.repository("tester/run").read(".gitattributes")}
    old, new = ({k: v for k, v in read_folder(tmp_path / f).items() if ".cache" not in k} for f in ("old", "new"))
    assert old == wanted
    assert new == {k: wanted[k] for k in (".gitattributes", "model.safetensors")} | {"config.json": b"new"}
    repository = hub.repository("tester/run")
    assert [commit.title for commit in repository.history()] == [
        "delete",
        "copy",
        "step 2",
        "step 1",
        "initial commit",
    ]
    assert len(hub.requests("/storage/*", "PUT")) == 1  # the same content is sent once


def test_an_invalid_model_card_is_refused(hub):
    result = run(
        hub,
        """
        from huggingface_hub import HfApi
        api = HfApi()
        id = api.create_repo("run").repo_id
        try:
            api.upload_file(repo_id=id, path_or_fileobj=b"---\\na: [\\n---\\n", path_in_repo="README.md")
        except ValueError as error:
            result = str(error)
        """,
        token="hf_write",
    )
    assert "Invalid metadata in README.md" in result


RIGHTS = """
    from huggingface_hub import HfApi
    api = HfApi()
    result = []
    for call in (
        lambda: api.whoami()["name"],
        lambda: api.model_info("tester/private").id,
        lambda: api.create_repo("tester/new"),
        lambda: api.create_repo("tester/private", exist_ok=True).repo_id,
        lambda: api.auth_check("tester/private", write=True),
        lambda: api.upload_file(repo_id="tester/private", path_or_fileobj=b"x", path_in_repo="x").commit_message,
    ):
        try:
            result.append(call())
        except Exception as error:
            result.append([type(error).__name__, error.response.status_code])
"""


def test_tokens_open_what_they_may_and_nothing_else(hub):
    hub.add_repository("tester/private", private=True)
    hub.add_token("hf_read", user="tester", role="read")
    hub.add_token("hf_other", user="other")

    name, seen, new, again, may_write, uploaded = run(hub, RIGHTS, token="hf_write")
    assert (name, seen, new) == ("tester", "tester/private", f"{hub.url}/tester/new")
    assert (again, may_write, uploaded) == ("tester/private", None, "Upload x with huggingface_hub")

    name, seen, new, again, may_write, uploaded = run(hub, RIGHTS, token="hf_read")
    assert (name, seen, again) == ("tester", "tester/private", "tester/private")
    assert new == may_write == uploaded == ["HfHubHTTPError", 403]

    name, seen, new, again, may_write, uploaded = run(hub, RIGHTS, token="hf_other")
    assert name == "other" and seen == may_write == uploaded == ["RepositoryNotFoundError", 404]
    assert new == again == ["HfHubHTTPError", 403]

    assert run(hub, RIGHTS, token="hf_rejected") == [["HfHubHTTPError", 401]] * 6
    assert hub.repository("tester/private").files() == [".gitattributes", "x"]


# Going wrong


def test_a_download_goes_on_where_it_was_cut_and_ends_where_it_was_reset(hub, model_folder):
    (model_folder / "model.safetensors").write_bytes(bytes(i % 251 for i in range(1_000_000)) * 12)
    hub.add_repository("tester/model", model_folder)
    cut = hub.fault("/storage/*.safetensors", cut=True, after=11_000_000)  # retried by the client
    reset = hub.fault("/storage/*.safetensors", reset=True, after=0)  # not retried
    result = run(
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
    assert result == ["ReadError", hub.repository("tester/model").resolve("main").files["model.safetensors"].sha256]
    assert (cut.hits, reset.hits) == (1, 1)
    downloads = hub.requests("/storage/*.safetensors", "GET")
    # The client writes, and so keeps, whole chunks of 10 MiB.
    assert [(r.range, r.sent) for r in downloads[:2]] == [(None, 11_000_000), ("bytes=10485760-", 0)]
    assert not any("Authorization" in request.headers for request in downloads)


def test_a_stream_of_documents_survives_503(owt_hub):
    fault = owt_hub.fault("*/train-00002*", status=503)
    code = f"""
        from datasets import load_dataset
        dataset = load_dataset("{OPENWEBTEXT}", "plain_text", split="train", streaming=True)
        result = [example["text"] for example in dataset]
        """
    assert tuple(run(owt_hub, code)) == english_documents()
    assert fault.hits == 1


def test_status_and_cuts_reach_the_client_before_and_after_the_request_has_its_effect(hub):
    hub.add_repository("tester/run")
    hub.fault("/api/models/tester/run", status=503)
    hub.fault("*/preupload/*", status=503)  # retried by the client
    hub.fault("*/commit/main", cut=True)
    hub.fault("*/commit/main", cut=True, after=10)
    result = run(
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


def test_stalls_and_slow_answers_take_their_time(hub, model_folder):
    hub.add_repository("tester/model", model_folder)
    hub.fault("*/config.json", method="GET", stall=30)
    hub.fault("/storage/*", bytes_per_second=3_000_000, times=math.inf)
    result = run(
        hub,
        """
        import time
        from huggingface_hub import hf_hub_download
        result = []
        for file in ("config.json", "model.safetensors"):
            begin = time.monotonic()
            hf_hub_download("tester/model", file)  # the first try of config.json times out, after 1 s
            result.append(time.monotonic() - begin)
        """,
        HF_HUB_DOWNLOAD_TIMEOUT="1",
    )
    assert all(0.8 <= seconds < 10 for seconds in result), result
    assert len(hub.requests("*/config.json", "GET")) == 2


def test_stopping_does_not_wait_for_a_request_that_stalls(hub):
    stall = hub.fault("*", stall=60)
    with socket.create_connection(("127.0.0.1", int(hub.url.split(":")[-1])), timeout=30) as client:
        client.sendall(b"GET /api/models/tester/model HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        while not stall.hits:
            time.sleep(0.01)
        begin = time.monotonic()
        hub.stop()
        assert client.recv(1) == b""  # closed without an answer
    assert time.monotonic() - begin < 5


def test_a_hub_that_is_gone_comes_back_at_the_same_address(hub, model_folder):
    hub.add_repository("tester/model", model_folder)
    url = hub.url
    code = """
        from huggingface_hub import HfApi
        try:
            result = HfApi().model_info("tester/model").id
        except Exception as error:
            result = type(error).__name__
        """
    hub.stop()
    assert run(hub, code) == "ConnectError"
    hub.start()
    assert hub.url == url
    assert run(hub, code) == "tester/model"


def test_ranges_are_those_of_rfc_9110():
    assert asked_range("", 10) is asked_range("bytes=-", 10) is asked_range("bytes=0-1,3-4", 10) is None
    assert asked_range("bytes=0-0", 10) == (0, 1)
    assert asked_range("bytes=3-", 10) == (3, 10)
    assert asked_range("bytes=3-99", 10) == (3, 10)
    assert asked_range("bytes=-4", 10) == (6, 10)
    assert asked_range("bytes=-99", 10) == (0, 10)
    for beyond in ("bytes=10-", "bytes=10-20", "bytes=5-2"):
        start, stop = asked_range(beyond, 10)
        assert start == stop
