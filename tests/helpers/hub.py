"""A stand-in for the Hugging Face hub on this machine: as much of its HTTP interface as huggingface_hub calls."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import select
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml

Files = dict[str, bytes]
READER, WRITER = "hf_" + "reader", "hf_" + "writer"
"""Tokens: of an account that may read everything, and of the one that owns everything."""
_KEPT_AS_LFS = (".safetensors", ".pt", ".npz", ".png")


@dataclass
class Repo:
    """A repository: what its branches and commits hold."""

    private: bool = False
    gated: bool = False
    hidden: bool = False
    """From all accounts, as a private repository of somebody else is."""
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Files] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: Files, message: str) -> str:
        """Put a commit on a branch; return its name."""
        self.messages.append(message)
        sha = hashlib.sha1(f"{len(self.messages)} {branch} {sorted(files)}".encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.branches[branch] = sha
        return sha

    def at(self, revision: str) -> tuple[str, Files] | None:
        """Return the name and the files of a commit."""
        sha = self.branches.get(revision, revision)
        return (sha, self.commits[sha]) if sha in self.commits else None


@dataclass
class Hub:
    """The hub: its repositories, the objects that were uploaded, and what it was asked."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    sent: int = 0
    fail: dict[str, int] = field(default_factory=dict)
    """Parts of "METHOD /path", and the status that requests with them get; 0: the connection is cut."""
    wait: dict[str, float] = field(default_factory=dict)
    """The same, and seconds for which requests are not answered, or until whoever asked has gone."""

    def put(self, repo: str, files: Mapping[str, bytes | str], branch: str = "main", **of_repo: bool) -> str:
        """Make a commit, as its owner would; return its name."""
        own = self.repos.setdefault(repo, Repo(**of_repo))
        plain = {name: content.encode() if isinstance(content, str) else content for name, content in files.items()}
        return own.commit(branch, plain, "put")

    def files(self, repo: str, revision: str = "main") -> Files:
        """Return what stands at a revision."""
        found = self.repos[repo].at(revision)
        assert found is not None
        return found[1]

    def downloaded(self) -> list[str]:
        """Return the files that were downloaded, without what was asked of them alone."""
        return [unquote(line.split("/resolve/")[1].split("/", 1)[1]) for line in self.asked if _IS_DOWNLOAD.match(line)]


_IS_DOWNLOAD = re.compile(r"GET .*/resolve/")


class _RefusedError(Exception):
    def __init__(self, status: int, message: str, code: str = "") -> None:
        self.status, self.message, self.code = status, message, code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: object) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("do_"):
            return self._answer
        raise AttributeError(name)

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else self._chunks()
        path = urlsplit(self.path).path
        line = f"{self.command} {path}"
        self.hub.asked.append(line)
        status = next((status for part, status in self.hub.fail.items() if part in line), None)
        seconds = next((seconds for part, seconds in self.hub.wait.items() if part in line), 0.0)
        if status == 0 or (seconds and self._has_gone(seconds)):
            self.close_connection = True
            return
        try:
            if status is not None:
                raise _RefusedError(status, "it was told to fail")
            self._route(path, body)
        except _RefusedError as refused:
            headers = {"X-Error-Message": refused.message} | ({"X-Error-Code": refused.code} if refused.code else {})
            self._send(json.dumps({"error": refused.message}).encode(), refused.status, headers)

    def _has_gone(self, seconds: float) -> bool:
        """Wait; return whether whoever asked has closed the connection."""
        return bool(select.select([self.connection], [], [], seconds)[0])

    def _chunks(self) -> bytes:
        body = b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return body

    def _send(self, body: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.hub.sent += len(body)
            self.wfile.write(body)

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(json.dumps(value).encode(), status, {"Content-Type": "application/json"})

    def _token(self) -> str:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in ("", READER, WRITER):
            raise _RefusedError(401, "Invalid credentials in Authorization header")
        return token

    def _repo(self, name: str) -> Repo:
        token, repo = self._token(), self.hub.repos.get(name)
        if repo is None or repo.hidden or (repo.private and not token):
            raise _RefusedError(404 if token else 401, "Repository not found", "RepoNotFound" if token else "")
        return repo

    def _at(self, repo: Repo, revision: str) -> tuple[str, Files]:
        found = repo.at(revision)
        if found is None:
            raise _RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def _route(self, path: str, body: bytes) -> None:
        for pattern, name in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match:
                getattr(self, f"_{name}")(body, *(unquote(part or "") for part in match.groups()))
                return
        raise _RefusedError(404, "there is no such page")

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        self._must_write()
        if name in self.hub.repos:
            raise _RefusedError(409, "You already created this model repo")
        private = asked.get("private") is True or asked.get("visibility") == "private"
        self.hub.repos[name] = Repo(private=private)
        self.hub.repos[name].commit("main", {".gitattributes": b""}, "initial commit")
        self._json({"url": f"{self.hub.url}/{name}"})

    def _must_write(self) -> None:
        if self._token() != WRITER:
            status = 403 if self._token() else 401
            raise _RefusedError(status, "You don't have the rights to do this" if status == 403 else "Invalid username")

    def _validate_yaml(self, body: bytes) -> None:
        head = yaml.safe_load(json.loads(body)["content"].split("---\n")[1])
        license = head.get("license", "mit")
        errors = [] if license in ("mit", "apache-2.0") else [{"message": '"license" must be one of apache-2.0, mit'}]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _info(self, body: bytes, name: str, revision: str = "main") -> None:
        repo = self._repo(name)
        sha, files = self._at(repo, revision)
        siblings = [{"rfilename": file} for file in files]
        self._json({"id": name, "sha": sha, "private": repo.private, "gated": repo.gated, "siblings": siblings})

    def _tree(self, body: bytes, name: str, revision: str) -> None:
        _, files = self._at(self._repo(name), revision)
        self._json([{"type": "file", "path": path, **_entry(path, content)} for path, content in files.items()])

    def _refs(self, body: bytes, name: str) -> None:
        branches = self._repo(name).branches.items()
        told = [{"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": sha} for branch, sha in branches]
        self._json({"branches": told, "tags": [], "converts": []})

    def _branch(self, body: bytes, name: str, branch: str) -> None:
        repo = self._repo(name)
        self._must_write()
        if branch in repo.branches:
            raise _RefusedError(409, "Reference already exists")
        repo.branches[branch] = repo.branches["main"]
        self._json({})

    def _preupload(self, body: bytes, name: str, revision: str) -> None:
        _, files = self._at(self._repo(name), revision)
        self._must_write()
        told = []
        for file in json.loads(body)["files"]:
            path = file["path"]
            is_lfs = path.endswith(_KEPT_AS_LFS)
            content = files.get(path)
            oid = None if content is None else _sha256(content) if is_lfs else _git_hash(content)
            mode = "lfs" if is_lfs else "regular"
            told.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._json({"files": told})

    def _lfs(self, body: bytes, name: str) -> None:
        self._must_write()
        objects = []
        for each in json.loads(body)["objects"]:
            if each["oid"] not in self.hub.objects:
                each = {**each, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}}
            objects.append(each)
        self._json({"transfer": "basic", "objects": objects})

    def _upload(self, body: bytes, oid: str) -> None:
        assert _sha256(body) == oid
        self.hub.objects[oid] = body
        self._send(b"")

    def _commit(self, body: bytes, name: str, revision: str) -> None:
        repo = self._repo(name)
        self._must_write()
        sha, files = self._at(repo, revision)
        head, *operations = map(json.loads, body.splitlines())
        parent = head["value"].get("parentCommit")
        if parent is not None and parent != sha:
            raise _RefusedError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(files)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        oid = repo.commit(revision, files, head["value"]["summary"])
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid})

    def _resolve(self, body: bytes, name: str, revision: str, path: str) -> None:
        repo = self._repo(name)
        if repo.gated and self._token() != WRITER:
            raise _RefusedError(403 if self._token() else 401, "Access to this model is restricted", "GatedRepo")
        sha, files = self._at(repo, revision)
        if path not in files:
            raise _RefusedError(404, "Entry not found", "EntryNotFound")
        content = files[path]
        start = int((re.match(r"bytes=(\d+)-", self.headers.get("Range", "")) or [0, 0])[1])
        headers = {"X-Repo-Commit": sha, "ETag": f'"{_git_hash(content)}"', "Accept-Ranges": "bytes"}
        if path.endswith(_KEPT_AS_LFS):
            headers |= {"X-Linked-Etag": f'"{_sha256(content)}"', "X-Linked-Size": str(len(content))}
        self._send(content[start:], 206 if start else 200, headers)


_ROUTES = (
    (r"/api/repos/create", "create"),
    (r"/api/validate-yaml", "validate_yaml"),
    (r"/api/models/([^/]+/[^/]+)", "info"),
    (r"/api/models/([^/]+/[^/]+)/revision/([^/]+)", "info"),
    (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", "tree"),
    (r"/api/models/([^/]+/[^/]+)/refs", "refs"),
    (r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", "branch"),
    (r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
    (r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", "commit"),
    (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs"),
    (r"/lfs/([0-9a-f]{64})", "upload"),
    (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
)


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"size": len(content), "oid": _git_hash(content)}
    if path.endswith(_KEPT_AS_LFS):
        entry["lfs"] = {"oid": _sha256(content), "size": len(content), "pointerSize": 130}
    return entry


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def running() -> Iterator[Hub]:
    """Run a hub without repositories."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def environment(hub: Hub, home: Path, token: str | None = None) -> dict[str, str]:
    """Return what to set for a process that is to use a hub, by the names of huggingface_hub."""
    told = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    return told | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"} | ({"HF_TOKEN": token} if token else {})


def use(hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch, token: str | None = None) -> None:
    """Let huggingface_hub, which has read its environment long ago, use a hub in this process."""
    from huggingface_hub import constants

    told = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_HUB_DISABLE_PROGRESS_BARS": True,
        "AGENT_HARNESSES_PATH": str(home / "agents.json"),
    }
    for name, value in told.items():
        if hasattr(constants, name):
            monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
