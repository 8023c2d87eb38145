"""A server on the loopback address that speaks the Hugging Face Hub's protocol, for the tests.

The clients of huggingface_hub, datasets and transformers use it as they are, through `HF_ENDPOINT` (to be set before
they are imported, so: in a subprocess, with `HubServer.env()`). It holds what this project's commands use: model and
dataset repositories with commits, branches and tags, uploads (Xet switched off: LFS over plain PUT), tokens and
their rights; it goes wrong on demand, and keeps a log of the requests. Paths, headers and error codes are those that
huggingface_hub 2.4 sends and reads.

    with HubServer(tmp_path) as hub:
        hub.add_repository("openai-community/gpt2", folder)
        hub.fault("*/config.json", status=503, times=2)
        subprocess.run([sys.executable, "-c", "..."], env=hub.env(), check=True)
        assert len(hub.requests("*/config.json", method="GET")) == 3
"""

import asyncio
import base64
import fnmatch
import functools
import hashlib
import io
import json
import re
import socket
import struct
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import yaml
from aiohttp import web
from support.runs import environment

LFS_SUFFIXES = {".arrow", ".bin", ".gz", ".npy", ".parquet", ".pt", ".safetensors", ".zip", ".zst"}
LFS_ABOVE_BYTES = 10_000_000  # the Hub takes no regular (non-LFS) file above 10 MB
GIT_ATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in sorted(LFS_SUFFIXES))


class Refusal(Exception):
    """An answer with an error status: `code` is what huggingface_hub tells the kinds of error apart by."""

    def __init__(self, status: int, message: str, code: str | None = None, **content):
        super().__init__(message)
        self.status = status
        self.content = {"error": message, **content}
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


@dataclass(frozen=True)
class Token:
    user: str
    role: str  # "read" or "write"

    def may_write(self, namespace: str) -> bool:
        return self.role == "write" and namespace == self.user


@dataclass(frozen=True)
class Blob:
    """A file's content: where it lies, its size in bytes, its git object id, and its sha256 if it is kept by LFS."""

    file: Path
    size: int
    oid: str
    sha256: str | None

    @classmethod
    def of(cls, file: Path, name: str) -> "Blob":
        size = file.stat().st_size
        with file.open("rb") as f:
            if not is_lfs(name, size, f.read(512)):
                f.seek(0)
                return cls(file, size, git_oid("blob", f.read()), None)
            f.seek(0)
            sha256 = hashlib.file_digest(f, "sha256").hexdigest()
        return cls(file, size, git_oid("blob", lfs_pointer(sha256, size)), sha256)

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid

    def entry(self, path: str) -> dict:
        """What the tree call says of a file."""
        entry = {"type": "file", "path": path, "size": self.size, "oid": self.oid}
        if self.sha256:
            pointer_size = len(lfs_pointer(self.sha256, self.size))
            entry["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": pointer_size}
        return entry


@dataclass(frozen=True)
class Commit:
    sha: str
    files: dict[str, Blob]
    date: str


def git_oid(kind: str, content: bytes) -> str:
    return hashlib.sha1(b"%s %d\0" % (kind.encode(), len(content)) + content).hexdigest()


def lfs_pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def is_lfs(name: str, size: int, sample: bytes) -> bool:
    return size > 0 and (Path(name).suffix in LFS_SUFFIXES or size > LFS_ABOVE_BYTES or b"\0" in sample)


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


class Repository:
    """Branches of commits, and tags. A commit maps paths to contents; one goes when its branch is squashed."""

    def __init__(self, kind: str, repo_id: str, private: bool = False):
        self.kind, self.id, self.private = kind, repo_id, private
        self.namespace = repo_id.split("/")[0]
        self.branches: dict[str, list[Commit]] = {"main": []}
        self.tags: dict[str, str] = {}

    @property
    def commits(self) -> list[Commit]:
        """Of the main branch, oldest first."""
        return self.branches["main"]

    @property
    def sha(self) -> str:
        return self.commits[-1].sha

    def commit(self, files: dict[str, Blob], title: str, branch: str = "main") -> Commit:
        commits = self.branches[branch]
        tree = "".join(f"{path} {blob.etag}\n" for path, blob in sorted(files.items()))
        sha = git_oid("commit", f"{len(commits)}\n{title}\n{tree}".encode())
        commits.append(Commit(sha, dict(files), now()))
        return commits[-1]

    def resolve(self, revision: str = "main") -> Commit:
        if revision in self.branches:
            return self.branches[revision][-1]
        sha = self.tags.get(revision, revision)
        for commit in (commit for commits in self.branches.values() for commit in commits):
            if commit.sha == sha:
                return commit
        raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def files(self, revision: str = "main") -> list[str]:
        return sorted(self.resolve(revision).files)

    def read(self, path: str, revision: str = "main") -> bytes:
        return self.resolve(revision).files[path].file.read_bytes()


@dataclass
class Fault:
    """What goes wrong, for the next `times` requests that match. See `HubServer.fault`."""

    pattern: str
    method: str | None
    times: float
    after: int | None
    status: int | None
    cut: bool
    reset: bool
    stall: float
    hits: int = 0

    def matches(self, request: "LoggedRequest") -> bool:
        return self.hits < self.times and self.method in (None, request.method) and path_matches(request, self.pattern)


def path_matches(request: "LoggedRequest", pattern: str) -> bool:
    return fnmatch.fnmatchcase(request.path, pattern)


@dataclass
class LoggedRequest:
    """A request as it came, and what became of it: `status` is None if the answer had none (cut before it began)."""

    method: str
    path: str  # decoded
    headers: dict[str, str]
    status: int | None = None
    sent: int = 0  # bytes of the body


@dataclass
class Reply:
    """An answer before it is sent: the body is bytes, or a file of which the range asked for is sent."""

    body: bytes | Path = b""
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)

    @classmethod
    def json(cls, content, status: int = 200, headers: dict[str, str] | None = None) -> "Reply":
        return cls(json.dumps(content).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def size(self) -> int:
        return self.body.stat().st_size if isinstance(self.body, Path) else len(self.body)

    def chunks(self, start: int, stop: int, size: int = 1 << 20) -> Iterator[bytes]:
        with io.BytesIO(self.body) if isinstance(self.body, bytes) else self.body.open("rb") as f:
            f.seek(start)
            for i in range(start, stop, size):
                yield f.read(min(size, stop - i))


class HubServer:
    """The server, in a thread of its own; `folder` takes what is uploaded. Start and stop by `with` or by the methods.

    `url` is the endpoint. `files_url` is a plain web server beside it, on a port of its own: datasets takes every URL
    below the endpoint for one of a repository, and huggingface_hub wants large files stored on another origin.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.storage = self.folder / "storage"  # contents by sha256
        self.storage.mkdir(parents=True, exist_ok=True)
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.tokens: dict[str, Token] = {}
        self.plain_files: dict[str, Path] = {}
        self.faults: list[Fault] = []
        self.log: list[LoggedRequest] = []
        self._ports = [0, 0]  # chosen at the first start and kept, so that a server that was gone can come back
        self._thread: threading.Thread | None = None

    # What a test sets up and reads

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._ports[0]}"

    @property
    def files_url(self) -> str:
        return f"http://127.0.0.1:{self._ports[1]}"

    def add_repository(self, repo_id: str, folder: Path | None = None, *, repo_type: str = "model") -> Repository:
        """A repository whose first commit holds the files of `folder`, which are served from where they lie."""
        repository = Repository(f"{repo_type}s", repo_id)
        files = {".gitattributes": self._store(GIT_ATTRIBUTES.encode(), ".gitattributes")}
        for file in sorted(Path(folder).rglob("*")) if folder else []:
            if file.is_file():
                name = file.relative_to(folder).as_posix()
                files[name] = Blob.of(file, name)
        repository.commit(files, "initial commit")
        self.repositories[repository.kind, repo_id] = repository
        return repository

    def repository(self, repo_id: str, repo_type: str = "model") -> Repository:
        return self.repositories[f"{repo_type}s", repo_id]

    def add_file(self, name: str, content: bytes) -> str:
        """A file for plain download; returns its URL."""
        self.plain_files[name] = self._store(content, name).file
        return f"{self.files_url}/files/{name}"

    def add_token(self, token: str, user: str = "tester", role: str = "write") -> None:
        self.tokens[token] = Token(user, role)

    def fault(
        self,
        pattern: str,
        *,
        method: str | None = None,
        times: float = 1,
        after: int | None = None,
        status: int | None = None,
        cut: bool = False,
        reset: bool = False,
        stall: float = 0,
    ) -> Fault:
        """Let the next `times` requests (`math.inf`: all) go wrong whose decoded path matches `pattern` (fnmatch, so
        `*` crosses slashes).

        With `after=None` it happens before the request is read or answered; with `after=k`, when the status, the
        headers and k bytes of the body have been sent, so the request has had its effect (answers with no more than k
        bytes, errors, redirects and HEAD pass). `stall` waits that many seconds; then `cut` closes the connection,
        `reset` does so by RST, `status` answers with that error, and with none of them the answer goes on.
        """
        if status is not None and after is not None:
            raise ValueError("an answer that has begun (after=...) has its status already")
        fault = Fault(pattern, method, times, after, status, cut, reset, stall)
        self.faults.append(fault)
        return fault

    def requests(self, pattern: str = "*", method: str | None = None) -> list[LoggedRequest]:
        """The logged requests whose decoded path matches (fnmatch)."""
        return [r for r in self.log if method in (None, r.method) and path_matches(r, pattern)]

    def env(self, token: str | None = None, home: Path | None = None, **more: str) -> dict[str, str]:
        """The environment of a subprocess that is to use this server and nothing of the user's own settings; `home` is
        the folder of its caches."""
        home = home or self.folder / "hf_home"
        env = environment(home) | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }
        del env["HF_HUB_OFFLINE"]
        return env | ({"HF_TOKEN": token} if token else {}) | more

    # Running

    def __enter__(self) -> "HubServer":
        self.start()
        return self

    def __exit__(self, *exception) -> None:
        self.stop()

    def start(self) -> None:
        started: Future = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run(started)), name="hub", daemon=True)
        self._thread.start()
        self._loop, self._stop = started.result(timeout=30)

    def stop(self) -> None:
        """Close the ports and every connection; `start` opens the same ports again."""
        if self._thread is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(timeout=30)
            self._thread = None

    async def _run(self, started: Future) -> None:
        # A shutdown_timeout of 0 would wait for ever.
        runner = web.AppRunner(self._application(), handler_cancellation=True, shutdown_timeout=0.01, access_log=None)
        try:
            await runner.setup()
            for i, port in enumerate(self._ports):
                site = web.TCPSite(runner, "127.0.0.1", port, reuse_address=True)
                await site.start()
                self._ports[i] = runner.addresses[i][1]
            stop = asyncio.Event()
            started.set_result((asyncio.get_running_loop(), stop))
            await stop.wait()
        except Exception as error:
            if started.done():
                raise
            started.set_exception(error)
        finally:
            await runner.cleanup()

    def _application(self) -> web.Application:
        repo = "{repo:[^/]+/[^/]+}"
        api = f"/api/{{kind:models|datasets|spaces}}/{repo}"
        routes = [
            ("POST", "/api/validate-yaml", self._validate_yaml),
            ("POST", "/api/repos/create", self._create),
            ("GET", api, self._info),
            ("GET", api + "/revision/{revision}", self._info),
            ("GET", api + "/auth-check/write", self._may_write),
            ("GET", api + "/tree/{revision}", self._tree),
            ("GET", api + "/tree/{revision}/{path:.+}", self._tree),
            ("POST", api + "/preupload/{revision}", self._preupload),
            ("POST", api + "/commit/{revision}", self._commit),
            ("POST", api + "/branch/{name}", self._create_branch),
            ("POST", api + "/super-squash/{revision}", self._super_squash),
            ("POST", api + "/tag/{name}", self._create_tag),
            ("DELETE", api + "/tag/{name}", self._delete_tag),
            ("PUT", "/storage/{sha256}", self._put_object),
            ("GET", "/storage/{sha256}/{path:.+}", self._get_object),
            ("GET", "/files/{path:.+}", self._get_plain_file),
        ]
        for prefix in (f"/{repo}", f"/{{kind:datasets|spaces}}/{repo}"):
            routes.append(("GET", prefix + "/resolve/{revision}/{path:.+}", self._resolve))
            routes.append(("POST", prefix + ".git/info/lfs/objects/batch", self._lfs_batch))
        application = web.Application(client_max_size=0)  # 0: no limit
        for method, path, answer in routes:
            application.router.add_route(method, path, functools.partial(self._serve, answer))
            if method == "GET":
                application.router.add_route("HEAD", path, functools.partial(self._serve, answer))
        application.router.add_route("*", "/{path:.*}", functools.partial(self._serve, self._nothing_here))
        return application

    # From request to bytes on the wire, with what is to go wrong

    async def _serve(self, answer, request: web.Request) -> web.StreamResponse:
        record = LoggedRequest(request.method, request.path, dict(request.headers))
        self.log.append(record)
        fault = self._take_fault(record, lambda fault: fault.after is None)
        if fault:
            await asyncio.sleep(fault.stall)
            if fault.cut or fault.reset:
                return self._drop(request, fault)
        try:
            if fault and fault.status:
                raise Refusal(fault.status, "set by the test")
            reply = await answer(request)
        except Refusal as refusal:
            reply = Reply.json(refusal.content, refusal.status, refusal.headers)
        return await self._send(request, reply, record)

    async def _send(self, request: web.Request, reply: Reply, record: LoggedRequest) -> web.StreamResponse:
        size = reply.size()
        start, stop = 0, size
        if isinstance(reply.body, Path):
            reply.headers["Accept-Ranges"] = "bytes"
            if asked := asked_range(request.headers.get("Range", ""), size):
                start, stop = asked
                reply.status = 206 if start < stop else 416
                reply.headers["Content-Range"] = f"bytes {f'{start}-{stop - 1}' if start < stop else '*'}/{size}"
        record.status = reply.status
        response = web.StreamResponse(status=reply.status, headers=reply.headers)
        response.headers.setdefault("Content-Type", "application/octet-stream")
        response.content_length = stop - start
        has_body = request.method != "HEAD" and reply.status < 300
        late = self._take_fault(record, lambda f: f.after is not None and has_body and f.after < stop - start)
        await response.prepare(request)
        if request.method == "HEAD":
            return response
        for chunk in reply.chunks(start, start + late.after if late else stop):
            await response.write(chunk)
            record.sent += len(chunk)
        if late:
            await asyncio.sleep(late.stall)
            if late.cut or late.reset:
                self._drop(request, late)
                return response
            for chunk in reply.chunks(start + late.after, stop):
                await response.write(chunk)
                record.sent += len(chunk)
        return response

    def _take_fault(self, record: LoggedRequest, applies) -> Fault | None:
        for fault in self.faults:
            if fault.matches(record) and applies(fault):
                fault.hits += 1
                return fault
        return None

    @staticmethod
    def _drop(request: web.Request, fault: Fault) -> web.Response:
        transport = request.transport
        if transport is not None:
            if fault.reset:  # lingering for 0 s is how a close becomes an RST
                linger = struct.pack("ii", 1, 0)
                transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                transport.abort()
            else:
                transport.close()
        return web.Response()  # for aiohttp's bookkeeping; there is nobody to get it

    # Who may do what

    def _token(self, request: web.Request) -> Token | None:
        scheme, _, value = request.headers.get("Authorization", "").partition(" ")
        if not scheme:
            return None
        if value not in self.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.tokens[value]

    def _repository(self, request: web.Request, write: bool = False) -> Repository:
        token = self._token(request)
        repository = self.repositories.get((request.match_info.get("kind", "models"), request.match_info["repo"]))
        hidden = repository is not None and repository.private and (not token or token.user != repository.namespace)
        if repository is None or hidden:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if write and token is None:
            raise Refusal(401, "Invalid username or password.")
        if write and not token.may_write(repository.namespace):
            raise Refusal(403, "Forbidden: you must use a write token to upload to a repository.")
        return repository

    def _commit_asked(self, request: web.Request) -> tuple[Repository, Commit]:
        repository = self._repository(request)
        return repository, repository.resolve(request.match_info.get("revision", "main"))

    # Reading

    async def _nothing_here(self, request: web.Request) -> Reply:
        raise Refusal(404, f"Sorry, we can't find the page you are looking for: {request.path}")

    async def _may_write(self, request: web.Request) -> Reply:
        self._repository(request, write=True)
        return Reply.json({})

    async def _info(self, request: web.Request) -> Reply:
        repository, commit = self._commit_asked(request)
        card = {}
        if "README.md" in commit.files:
            card = front_matter(commit.files["README.md"].file.read_text(encoding="utf-8")) or {}
        info = {
            "id": repository.id,
            "author": repository.namespace,
            "sha": commit.sha,
            "lastModified": commit.date,
            "createdAt": repository.commits[0].date,
            "private": repository.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": card.get("tags", []),
            "cardData": card,
            "siblings": [{"rfilename": path} for path in sorted(commit.files)],
        }
        if "library_name" in card:
            info["library_name"] = card["library_name"]
        return Reply.json(info)

    async def _tree(self, request: web.Request) -> Reply:
        _, commit = self._commit_asked(request)
        below = request.match_info.get("path", "").strip("/")
        entries = entries_below(commit, below, recursive=request.query.get("recursive", "").lower() in ("1", "true"))
        if not entries:
            raise Refusal(404, f"{below} does not exist on {commit.sha}", "EntryNotFound")
        return Reply.json(entries)

    async def _resolve(self, request: web.Request) -> Reply:
        _, commit = self._commit_asked(request)
        path = request.match_info["path"]
        headers = {"X-Repo-Commit": commit.sha}
        if path not in commit.files:
            refusal = Refusal(404, "Entry not found", "EntryNotFound")
            refusal.headers |= headers  # by which the client remembers that this commit has no such file
            raise refusal
        blob = commit.files[path]
        headers["ETag"] = f'"{blob.etag}"'
        headers["Content-Disposition"] = f'inline; filename="{Path(path).name}"'
        if blob.sha256 is None:
            return Reply(blob.file, headers=headers)
        # Large files lie elsewhere, as on the Hub, with their size and hash given here.
        headers |= {"X-Linked-Size": str(blob.size), "X-Linked-ETag": f'"{blob.sha256}"'}
        place = f"{self.files_url}/storage/{blob.sha256}/{request.match_info['repo']}/{path}"
        return Reply(f"Found. Redirecting to {place}".encode(), 302, {**headers, "Location": place})

    async def _get_object(self, request: web.Request) -> Reply:
        sha256 = request.match_info["sha256"]
        branches = [branch for repository in self.repositories.values() for branch in repository.branches.values()]
        commits = [commit for branch in branches for commit in branch]
        for blob in (blob for commit in commits for blob in commit.files.values()):
            if blob.sha256 == sha256:
                return Reply(blob.file, headers={"ETag": f'"{sha256}"'})
        raise Refusal(404, f"no object {sha256}")

    async def _get_plain_file(self, request: web.Request) -> Reply:
        file = self.plain_files.get(request.match_info["path"])
        if file is None:
            raise Refusal(404, f"no file {request.match_info['path']}")
        return Reply(file, headers={"ETag": f'"{file.stat().st_mtime_ns}-{file.stat().st_size}"'})

    # Writing

    async def _validate_yaml(self, request: web.Request) -> Reply:
        card = front_matter((await request.json())["content"])
        warnings = [] if card else [{"message": "empty or missing yaml metadata in repo card"}]
        return Reply.json({"errors": [], "warnings": warnings})

    async def _create(self, request: web.Request) -> Reply:
        token = self._token(request)
        if token is None:
            raise Refusal(401, "Invalid username or password.")
        asked = await request.json()
        kind = asked.get("type") or "model"
        namespace = asked.get("organization") or token.user  # where the id names another user
        repo_id = f"{namespace}/{asked['name']}"
        if not token.may_write(namespace):
            message = f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"'
            raise Refusal(403, message)
        url = f"{self.url}/{'' if kind == 'model' else kind + 's/'}{repo_id}"
        if (f"{kind}s", repo_id) in self.repositories:
            raise Refusal(409, f"You already created this {kind} repo", url=url)
        self.add_repository(repo_id, repo_type=kind).private = asked.get("visibility") == "private"
        return Reply.json({"url": url, "name": repo_id, "id": repo_id})

    async def _preupload(self, request: web.Request) -> Reply:
        repository = self._repository(request, write=True)
        commit = repository.resolve(request.match_info["revision"])
        files = []
        for file in (await request.json())["files"]:
            lfs = is_lfs(file["path"], file["size"], base64.b64decode(file["sample"]))
            present = commit.files.get(file["path"])
            oid = {"oid": present.etag} if present else {}
            files.append(
                {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, **oid}
            )
        return Reply.json({"files": files, "commitOid": commit.sha})

    async def _lfs_batch(self, request: web.Request) -> Reply:
        self._repository(request, write=True)
        objects = (await request.json())["objects"]
        for wanted in objects:
            if not (self.storage / wanted["oid"]).exists():
                wanted["actions"] = {"upload": {"href": f"{self.files_url}/storage/{wanted['oid']}"}}
        return Reply.json({"transfer": "basic", "objects": objects})

    async def _put_object(self, request: web.Request) -> Reply:
        digest = hashlib.sha256()
        with tempfile.TemporaryDirectory(dir=self.folder) as aside:
            file = Path(aside, "upload")
            with file.open("wb") as f:
                async for chunk in request.content.iter_chunked(1 << 20):
                    digest.update(chunk)
                    f.write(chunk)
            if digest.hexdigest() != request.match_info["sha256"]:
                raise Refusal(400, f"content has sha256 {digest.hexdigest()}")
            file.replace(self.storage / digest.hexdigest())
        return Reply()

    def _store(self, content: bytes, name: str) -> Blob:
        file = self.storage / hashlib.sha256(content).hexdigest()
        if not file.exists():  # else it may just be read
            file.write_bytes(content)
        return Blob.of(file, name)

    async def _commit(self, request: web.Request) -> Reply:
        repository = self._repository(request, write=True)
        lines = (await request.read()).splitlines()  # from here on nothing comes between
        files = dict(repository.resolve(request.match_info["revision"]).files)
        title = ""
        for line in lines:
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                title = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = self._store(base64.b64decode(value["content"]), value["path"])
            elif item["key"] == "lfsFile":
                file = self.storage / value["oid"]
                oid = git_oid("blob", lfs_pointer(value["oid"], file.stat().st_size))
                files[value["path"]] = Blob(file, file.stat().st_size, oid, value["oid"])
            elif item["key"] == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            else:
                raise Refusal(400, f"unknown operation {item['key']}")
        commit = repository.commit(files, title, request.match_info["revision"])
        url = f"{self.url}/{repository.id}/commit/{commit.sha}"
        return Reply.json({"success": True, "commitOid": commit.sha, "commitUrl": url, "hookOutput": ""})

    async def _create_branch(self, request: web.Request) -> Reply:
        repository, name = self._repository(request, write=True), request.match_info["name"]
        if name in repository.branches:
            raise Refusal(409, f"Reference already exists: {name}")
        start = repository.resolve((await request.json()).get("startingPoint", "main"))
        repository.branches[name] = [start]
        return Reply.json({})

    async def _super_squash(self, request: web.Request) -> Reply:
        repository, name = self._repository(request, write=True), request.match_info["revision"]
        head = repository.resolve(name)
        repository.branches[name] = []
        repository.commit(head.files, (await request.json())["message"], name)
        return Reply.json({})

    async def _create_tag(self, request: web.Request) -> Reply:
        repository = self._repository(request, write=True)
        tag = (await request.json())["tag"]
        if tag in repository.tags:
            raise Refusal(409, f"Reference already exists: {tag}")
        repository.tags[tag] = repository.resolve(request.match_info["name"]).sha
        return Reply.json({})

    async def _delete_tag(self, request: web.Request) -> Reply:
        if self._repository(request, write=True).tags.pop(request.match_info["name"], None) is None:
            raise Refusal(404, f"Invalid rev id: {request.match_info['name']}", "RevisionNotFound")
        return Reply.json({})


def asked_range(header: str, size: int) -> tuple[int, int] | None:
    """The bytes [start, stop) of a file of `size` bytes that a Range header asks for, empty if they lie past its end;
    None if it asks for no range, or for several."""
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", header)
    if asked is None:
        return None
    first, last = asked.groups()
    start = min(int(first), size)
    return start, max(start, min(int(last) + 1, size)) if last else size


def entries_below(commit: Commit, folder: str, recursive: bool) -> list[dict]:
    """Files and folders below `folder` ("" is the root), as the tree call lists them."""
    entries = {}
    for path, blob in sorted(commit.files.items()):
        if folder and not path.startswith(folder + "/"):
            continue
        parts = path[len(folder) + 1 if folder else 0 :].split("/")
        for depth in range(1, len(parts)):
            directory = "/".join([*([folder] if folder else []), *parts[:depth]])
            if recursive or depth == 1:
                entries[directory] = {
                    "type": "directory",
                    "path": directory,
                    "size": 0,
                    "oid": git_oid("tree", f"{commit.sha} {directory}".encode()),
                }
        if recursive or len(parts) == 1:
            entries[path] = blob.entry(path)
    return list(entries.values())


def front_matter(readme: str) -> dict | None:
    """The YAML block that a README begins with."""
    block = re.match(r"\s*---\r?\n(.*?)\r?\n---", readme, re.DOTALL)
    return yaml.safe_load(block[1]) if block else None
