"""A local stand-in for the Hugging Face hub's HTTP API: models with revisions, gates and failures, and uploads.

`HubServer` listens on loopback; `HF_ENDPOINT` (or `point_clients_at`, within a process) points the clients at
it. As the real hub does, it answers for .safetensors and .bin files with a redirect to another host, here "localhost" in place of
"127.0.0.1", to which no token may be sent.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import constants, hf_api
from transformers.utils import hub as transformers_hub

LARGE = (".safetensors", ".bin")
TOKEN, READ_ONLY_TOKEN = "hf_writes", "hf_reads"
Content = bytes | Path


def commit_of(files: Mapping[str, Content]) -> str:
    """A commit hash that depends on names and contents."""
    digest = hashlib.sha1()
    for name in sorted(files):
        digest.update(f"{name}\0{etag_of(files[name])}\n".encode())
    return digest.hexdigest()


def read(content: Content) -> bytes:
    """The bytes of a file that is kept in memory or on disk."""
    return content.read_bytes() if isinstance(content, Path) else content


def etag_of(content: Content) -> str:
    """What a file is cached by: SHA-256 of its bytes."""
    return hashlib.sha256(read(content)).hexdigest()


@dataclass
class Repository:
    """One model on the stand-in.

    Args:
        files: of each commit, by name.
        revisions: the commit that each branch or tag stands for.
        gated: whether its licence has to be accepted; no account here has done so.
        private: whether anonymous requests are told that there is no such model.
    """

    files: dict[str, dict[str, Content]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: Mapping[str, Content], *revisions: str) -> str:
        """Add a commit, that `revisions` stand for from now on; returns its hash."""
        sha = commit_of(files)
        self.files[sha] = dict(files)
        self.revisions.update(dict.fromkeys(revisions, sha))
        return sha


class HubServer:
    """The stand-in hub, in threads of this process.

    Attributes:
        repositories: by name; change them at any time.
        requests: (method, path) of all requests so far.
        status: an HTTP status that every request is answered with, or None.
        login_page: whether every request is answered with a page of HTML, as networks do that ask for a login.
        cut_after: by file name, after how many bytes of the body each of the next downloads ends in a closed connection.
        wrong_length: names of files that are announced and sent with a byte less than the hub says they have.
        stored: bytes of uploaded large files by their SHA-256.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.status: int | None = None
        self.login_page = False
        self.cut_after: dict[str, list[int]] = {}
        self.wrong_length: set[str] = set()
        self.stored: dict[str, bytes] = {}
        self._server: _Server | None = None
        self._port = 0
        self.start()

    @property
    def endpoint(self) -> str:
        """The address for `HF_ENDPOINT`."""
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Listen, on the same port as before."""
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = _Server(("127.0.0.1", self._port), handler)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """Close all connections, and refuse others from now on."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server.cut_connections()
            self._server = None

    def add(self, name: str, files: Mapping[str, Content], *revisions: str) -> Repository:
        """Serve `files` as the model `name`, on its main branch and as `revisions`."""
        repository = self.repositories.setdefault(name, Repository())
        repository.commit(files, *(revisions or ("main",)))
        return repository

    def downloads(self) -> list[str]:
        """The files whose bytes were asked for so far."""
        return [path.rsplit("/", 1)[-1] for method, path in self.requests if method == "GET" and not path.startswith("/api/")]


def model_files(folder: Path, *variants: str | None) -> dict[str, Content]:
    """The files of a model's folder as a hub serves them, its weights once for each variant; None stands for the plain name."""
    files: dict[str, Content] = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        name = path.relative_to(folder).as_posix()
        if path.suffix != ".safetensors":
            files[name] = path
            continue
        for variant in variants or (None,):
            files[name if variant is None else name.replace(".safetensors", f".{variant}.safetensors")] = path
    return files


def point_clients_at(hub: HubServer, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have huggingface_hub, and what builds on it, ask `hub` and cache in the folder `cache`, in this process alone.

    A process of its own is pointed there by `HF_ENDPOINT` and `HF_HOME`, which huggingface_hub reads when it is imported.
    """
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for api in (hf_api.api, transformers_hub.hf_api()):
        monkeypatch.setattr(api, "endpoint", hub.endpoint)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


class _Server(ThreadingHTTPServer):
    """A server that can also end the connections that clients keep open."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.connections: set[socket.socket] = set()
        super().__init__(address, handler)

    def process_request(self, request: socket.socket, client_address: Any) -> None:
        """Answer in a thread of its own."""
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: socket.socket) -> None:
        """Close a connection that is done."""
        self.connections.discard(request)
        super().shutdown_request(request)

    def cut_connections(self) -> None:
        """End all that is still going on."""
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Refusal(Exception):
    """An answer with an error status, and the header by which clients tell what it means."""

    def __init__(self, status: int, code: str | None = None, message: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Stay silent."""

    def do_GET(self) -> None:
        """Model information, file lists, and files."""
        self._answer()

    def do_HEAD(self) -> None:
        """What a file is, without its bytes."""
        self._answer()

    def do_POST(self) -> None:
        """Uploads."""
        self._answer()

    def do_PUT(self) -> None:
        """The bytes of a large file."""
        self._answer()

    @property
    def _token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        url = urlsplit(self.path)
        self.hub.requests.append((self.command, unquote(url.path)))
        try:
            if self.hub.login_page:
                return self._send_file(b"<html>Log in</html>", "", {})
            if self.hub.status is not None:
                raise _Refusal(self.hub.status, message="a failure that the test asked for")
            for pattern, action in ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match:
                    return action(self, *(unquote(group or "") for group in match.groups()), body=body, query=parse_qs(url.query))
            raise _Refusal(404, message="no such address")
        except _Refusal as refusal:
            self._send(
                refusal.status, {"error": refusal.message}, {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
            )

    def _send(self, status: int, answer: Any, headers: Mapping[str, Any] | None = None) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(content), **(headers or {})}.items():
            if value:
                self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _repository(self, name: str) -> Repository:
        """The model, if the request may see it."""
        if self._token not in (None, TOKEN, READ_ONLY_TOKEN):
            raise _Refusal(401, message="Invalid credentials in Authorization header")
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and self._token is None):
            raise _Refusal(401 if self._token is None else 404, "RepoNotFound", "Repository not found")
        return repository

    def _commit(self, repository: Repository, revision: str) -> str:
        sha = repository.revisions.get(revision, revision)
        if sha not in repository.files:
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def _check_gate(self, repository: Repository, name: str) -> None:
        if repository.gated:
            message = f"Access to model {name} is restricted. Visit https://huggingface.co/{name} to ask for access."
            raise _Refusal(401 if self._token is None else 403, "GatedRepo", message)

    def model_info(self, name: str, revision: str, **_: Any) -> None:
        """The commit and the files of a revision; those of a gated model too, as on the real hub."""
        repository = self._repository(name)
        sha = self._commit(repository, revision or "main")
        siblings = [{"rfilename": file} for file in repository.files[sha]]
        self._send(200, {"id": name, "modelId": name, "sha": sha, "siblings": siblings, "gated": repository.gated, "tags": []})

    def tree(self, name: str, revision: str, folder: str, **_: Any) -> None:
        """All files below a folder, with sizes and hashes."""
        repository = self._repository(name)
        self._check_gate(repository, name)
        sha, prefix = self._commit(repository, revision), f"{folder}/" if folder else ""
        entries = []
        for file, content in repository.files[sha].items():
            if not file.startswith(prefix):
                continue
            size, oid = len(read(content)), etag_of(content)
            entry: dict[str, Any] = {"type": "file", "path": file, "size": size, "oid": oid}
            if file.endswith(LARGE):
                entry["lfs"] = {"oid": oid, "size": size, "pointerSize": 134}
            entries.append(entry)
        if prefix and not entries:
            raise _Refusal(404, "EntryNotFound", f"{folder} does not exist")
        self._send(200, entries)

    def resolve(self, name: str, revision: str, file: str, **_: Any) -> None:
        """A file, or the address of a large one on another host."""
        repository = self._repository(name)
        sha = self._commit(repository, revision)
        content = repository.files[sha].get(file)
        if content is None:
            self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
            return
        self._check_gate(repository, name)
        if not file.endswith(LARGE):
            self._send_file(content, file, {"X-Repo-Commit": sha})
            return
        address = f"{self.hub.endpoint.replace('127.0.0.1', 'localhost')}/cdn/{name}/{sha}/{file}"
        size, etag = len(read(content)), etag_of(content)
        headers = {"X-Repo-Commit": sha, "X-Linked-Size": size, "X-Linked-Etag": f'"{etag}"', "Location": address}
        self._send(302, {}, headers)

    def cdn(self, name: str, sha: str, file: str, **_: Any) -> None:
        """The bytes of a large file, for whoever has the address; a token that comes along has leaked."""
        if self._token is not None:
            raise _Refusal(400, message="a token was sent to another host")
        self._send_file(self.hub.repositories[name].files[sha][file], file, {})

    def _send_file(self, content: Content, file: str, headers: dict[str, Any]) -> None:
        data, name, status = read(content), file.rsplit("/", 1)[-1], 200
        headers["ETag"] = f'"{etag_of(content)}"'
        if name in self.hub.wrong_length:
            data = data[:-1]
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked:
            status, start = 206, int(asked[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            data = data[start:]
        self.send_response(status)
        for key, value in {**headers, "Content-Length": len(data), "Accept-Ranges": "bytes"}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.hub.cut_after.get(name):
            self.wfile.write(data[: self.hub.cut_after[name].pop(0)])
            self.close_connection = True
            return
        self.wfile.write(data)

    def whoami(self, **_: Any) -> None:
        """Whose token it is, and whether it may write."""
        if self._token not in (TOKEN, READ_ONLY_TOKEN):
            raise _Refusal(401, message="Invalid credentials in Authorization header")
        role = "write" if self._token == TOKEN else "read"
        self._send(200, {"type": "user", "name": "me", "auth": {"type": "access_token", "accessToken": {"role": role}}})

    def _check_may_write(self, owner: str) -> None:
        if self._token is None or self._token not in (TOKEN, READ_ONLY_TOKEN):
            raise _Refusal(401, message="Invalid credentials in Authorization header")
        if self._token == READ_ONLY_TOKEN or owner != "me":
            raise _Refusal(403, message=f"You don't have the rights to create a model under the namespace {owner!r}")

    def create(self, body: bytes, **_: Any) -> None:
        """Make a repository."""
        asked = json.loads(body)
        owner = asked.get("organization") or "me"
        self._check_may_write(owner)
        name = f"{owner}/{asked['name']}"
        status = 409 if name in self.hub.repositories else 200
        repository = self.hub.repositories.setdefault(name, Repository(private=asked.get("visibility") == "private"))
        if not repository.files:
            repository.commit({}, "main")
        self._send(status, {"url": f"{self.hub.endpoint}/{name}", "id": name, "name": name})

    def validate_yaml(self, **_: Any) -> None:
        """Find no fault in a card's header."""
        self._send(200, {"errors": [], "warnings": []})

    def preupload(self, name: str, revision: str, body: bytes, **_: Any) -> None:
        """Tell which files are large."""
        self._check_may_write(name.split("/")[0])
        files = [
            {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular", "shouldIgnore": False}
            for file in json.loads(body)["files"]
        ]
        self._send(200, {"files": files})

    def lfs_batch(self, name: str, body: bytes, **_: Any) -> None:
        """Tell where the bytes of large files go."""
        objects = [
            {**item, "actions": {"upload": {"href": f"{self.hub.endpoint}/lfs/{item['oid']}"}}}
            for item in json.loads(body)["objects"]
        ]
        self._send(200, {"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str, body: bytes, **_: Any) -> None:
        """Keep the bytes of a large file."""
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refusal(400, message="other bytes than announced")
        self.hub.stored[oid] = body
        self._send(200, {})

    def make_commit(self, name: str, revision: str, body: bytes, **_: Any) -> None:
        """Add the files of an upload to a revision."""
        self._check_may_write(name.split("/")[0])
        repository = self._repository(name)
        files = dict(repository.files[repository.revisions[revision]])
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            elif entry["key"] == "lfsFile":
                files[entry["value"]["path"]] = self.hub.stored[entry["value"]["oid"]]
        sha = repository.commit(files, revision)
        self._send(200, {"success": True, "commitUrl": f"{self.hub.endpoint}/{name}/commit/{sha}", "commitOid": sha})


_NAME = r"([^/]+(?:/[^/]+)?)"
ROUTES = (
    (r"/api/whoami-v2", _Handler.whoami),
    (r"/api/repos/create", _Handler.create),
    (r"/api/validate-yaml", _Handler.validate_yaml),
    (rf"/api/models/{_NAME}/tree/([^/]+)(?:/(.+))?", _Handler.tree),
    (rf"/api/models/{_NAME}/preupload/([^/]+)", _Handler.preupload),
    (rf"/api/models/{_NAME}/commit/([^/]+)", _Handler.make_commit),
    (rf"/api/models/{_NAME}(?:/revision/([^/]+))?", _Handler.model_info),
    (rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (r"/lfs/([0-9a-f]+)", _Handler.lfs_upload),
    (rf"/cdn/{_NAME}/([0-9a-f]+)/(.+)", _Handler.cdn),
    (rf"/{_NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
)
