"""A model hub on loopback that serves the real huggingface_hub over HTTP, and misbehaves on command.

Responds as the hub does: ``/api/models/NAME`` (also ``/revision/SHA`` and the list), and
``/NAME/resolve/REVISION/FILE``, which for large files redirects to storage on another
origin, where no token may arrive. ``/plain/FILE`` is a file on any other web server.
"""

import hashlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from huggingface_hub import constants

COMMIT = "fdf72ae0827c1cda404aff25b6603abec9e3399b"
TOKEN = "hf_sesame"  # noqa: S105  valid only for this fake hub
_LARGE = (".gguf", ".jsonl")
#: Small, so that hardly any byte counts as sent after the client has disconnected.
_PIECE_BYTES = 1 << 16


@dataclass
class Repository:
    """A repository; its ``.gguf`` and ``.jsonl`` files are in large-file storage."""

    files: dict[str, bytes]
    license: str | None = "apache-2.0"
    gated: bool = False
    private: bool = False


@dataclass
class Faults:
    """
    Faults of hub and storage; all off by default.

    Attributes:
        cut_at: Close the connection at this share of the file ...
        cut_first: ... for this number of responses with a body.
        flip_byte: Change the byte at this offset; length and names stay the same.
        bytes_per_s: Limit the rate of sending.
        no_ranges: Ignore ranges and send the whole file.
        no_etag: Omit the ETag.
        shorter_by: Omit this number of bytes at the end of the file.
        refuse: Status and error code of every response of the hub.
        sign_in_page: Respond to every request with a hotel's sign-in page.
    """

    cut_at: float = 1.0
    cut_first: int = 0
    flip_byte: int | None = None
    bytes_per_s: float | None = None
    no_ranges: bool = False
    no_etag: bool = False
    shorter_by: int = 0
    refuse: tuple[int, str] | None = None
    sign_in_page: bool = False


@dataclass(frozen=True)
class Seen:
    """One request, and the sizes of the pieces sent in response."""

    method: str
    path: str
    range: str | None
    token: str | None
    sent: list[int] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """Bytes of the response's body."""
        return sum(self.sent)


class Hub(ThreadingHTTPServer):
    """The fake hub; ``repositories``, ``plain`` and ``faults`` may change while it runs."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, repositories: dict[str, Repository]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.plain: dict[str, bytes] = {}
        self.redirects: dict[str, str] = {}
        self.faults = Faults()
        self.seen: list[Seen] = []

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that disconnect during a response; print any other error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        """The value for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def storage(self) -> str:
        """The same server under another host name, and so of another origin."""
        return self.url.replace("127.0.0.1", "localhost")

    def bodies(self) -> list[Seen]:
        """Requests for the bytes of large or plain files."""
        return [s for s in self.seen if s.method == "GET" and s.path.startswith(("/storage/", "/plain/"))]

    def environment(self, home: Path) -> dict[str, str]:
        """Variables that point a child process at this hub, at a home of its own and at a library in it."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home / "hf"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HOME": str(home),
            "PROMPTAI_MODELS": str(home / "models"),
            **{name: "" for name in os.environ if name.lower().endswith("_proxy")},
        }


@contextmanager
def hub_with(**files: dict[str, bytes] | Repository) -> Iterator[Hub]:
    """Run a hub; ``owner__name={file: bytes}`` is model ``owner/name``, ``datasets__owner__name`` a data set."""
    hub = Hub({name.replace("__", "/").replace("_", "-"): _repository(held) for name, held in files.items()})
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


def point_at(url: str, home: Path, patch: pytest.MonkeyPatch) -> None:
    """Point huggingface_hub in this process at a hub and an empty home, until the patch is undone."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy") or name.startswith("HF_")]:
        patch.delenv(name)
    patch.setattr(constants, "ENDPOINT", url)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(home / "hf"))
    patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))


class RecordingReporter:
    """A ``ProgressReporter`` that records everything."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.stretches: list[tuple[str, int | None, int]] = []
        self.advanced = 0

    def begin(self, what: str, total: int | None, done: int = 0) -> None:
        """Record a step."""
        self.stretches.append((what, total, done))

    def advance(self, size: int) -> None:
        """Record progress in bytes."""
        self.advanced += size

    def notify(self, line: str) -> None:
        """Record a line."""
        self.lines.append(line)


def unused_url() -> str:
    """A URL on loopback at which no server listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self._route()

    def do_GET(self) -> None:
        self._route()

    def _route(self) -> None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.request_seen = Seen(self.command, unquote(self.path), self.headers.get("Range"), token)
        self.server.seen.append(self.request_seen)
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        faults = self.server.faults
        if faults.sign_in_page:
            page = b"<html>Welcome! Room number?</html>"
            self._answer(200, {"Content-Type": "text/html"}, page, 0, len(page))
        elif faults.refuse is not None and not path.startswith("/storage/"):
            self._answer(faults.refuse[0], {"X-Error-Code": faults.refuse[1]})
        elif path in self.server.redirects:
            self._answer(302, {"Location": self.server.redirects[path]})
        elif path == "/api/models":
            self._list(parse_qs(parts.query))
        elif path.startswith("/api/models/"):
            self._facts(path.removeprefix("/api/models/").partition("/revision/")[0])
        elif "/resolve/" in path:
            name, _, rest = path.lstrip("/").partition("/resolve/")
            self._resolve(name, rest.partition("/")[2])
        elif path.startswith("/storage/"):
            self._file(self._stored(path.removeprefix("/storage/")), path.removeprefix("/storage/"))
        elif path.startswith("/plain/") and path.removeprefix("/plain/") in self.server.plain:
            content = self.server.plain[path.removeprefix("/plain/")]
            self._file(content, hashlib.md5(content).hexdigest())  # noqa: S324  any unique value is an ETag
        else:
            self._answer(404, {})

    def _list(self, query: dict[str, list[str]]) -> None:
        owner, word = query.get("author", [""])[0], query.get("search", [""])[0].lower()
        names = [n for n in self.server.repositories if n.startswith(f"{owner}/") and word in n.lower()]
        self._json([{"id": name, "modelId": name} for name in names])

    def _facts(self, name: str) -> None:
        if self._hidden(name):
            return
        repository = self.server.repositories[name]
        siblings = [_sibling(file, content) for file, content in repository.files.items()]
        facts = {
            "_id": "6512a3c0f4e5a1b2c3d4e5f6",
            "id": name,
            "modelId": name,
            "sha": COMMIT,
            "private": repository.private,
            "gated": "manual" if repository.gated else False,
            "disabled": False,
            "tags": ["gguf"],
            "cardData": {"license": repository.license} if repository.license else {},
            "siblings": siblings,
        }
        self._json(facts)

    def _resolve(self, name: str, file: str) -> None:
        if self._hidden(name):
            return
        repository = self.server.repositories[name]
        if repository.gated and self.request_seen.token != TOKEN:
            status = 401 if self.request_seen.token is None else 403
            self._answer(status, {"X-Error-Code": "GatedRepo", "X-Error-Message": f"Access to {name} is restricted."})
        elif file not in repository.files:
            headers = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": COMMIT}
            self._answer(404, headers)
        elif not file.endswith(_LARGE):
            self._file(repository.files[file], hashlib.sha1(repository.files[file]).hexdigest())  # noqa: S324  as git
        else:
            content = repository.files[file]
            sha256 = hashlib.sha256(content).hexdigest()
            self._answer(
                302,
                {
                    "Location": f"{self.server.storage}/storage/{sha256}",
                    "X-Repo-Commit": COMMIT,
                    "X-Linked-ETag": f'"{sha256}"',
                    "X-Linked-Size": str(len(content)),
                    "Accept-Ranges": "bytes",
                },
            )

    def _hidden(self, name: str) -> bool:
        """Refuse an absent or private repository (401 without a token, as the hub does); whether it was refused."""
        repository, token = self.server.repositories.get(name), self.request_seen.token
        if repository is not None and (not repository.private or token == TOKEN):
            return False
        self._answer(
            401 if token is None else 404,
            {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Invalid username or password."},
        )
        return True

    def _stored(self, sha256: str) -> bytes:
        files = [c for r in self.server.repositories.values() for c in r.files.values()]
        return next(content for content in files if hashlib.sha256(content).hexdigest() == sha256)

    def _file(self, content: bytes, etag: str) -> None:
        faults = self.server.faults
        content = content[: len(content) - faults.shorter_by]
        if faults.flip_byte is not None:
            changed = bytearray(content)
            changed[faults.flip_byte] ^= 0xFF
            content = bytes(changed)
        headers = {"ETag": f'"{etag}"', "Content-Type": "application/octet-stream", "X-Repo-Commit": COMMIT}
        if faults.no_etag:
            del headers["ETag"]
        first, last = 0, len(content) - 1
        wanted = None if faults.no_ranges else self.request_seen.range
        if wanted and self.headers.get("If-Range") in (None, headers.get("ETag")):
            begin, _, end = wanted.removeprefix("bytes=").partition("-")
            first, last = int(begin), min(int(end) if end else last, last)
            if first > last:
                self._answer(416, {"Content-Range": f"bytes */{len(content)}"})
                return
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self._answer(206 if "Content-Range" in headers else 200, headers, content, first, last + 1)

    def _json(self, answer: Any) -> None:
        body = json.dumps(answer).encode()
        self._answer(200, {"Content-Type": "application/json"}, body, 0, len(body))

    def _answer(self, status: int, headers: dict[str, str], content: bytes = b"", first: int = 0, end: int = 0) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(end - first)} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "GET" or end == first:
            return
        faults = self.server.faults
        stop = end
        if faults.cut_first > 0 and self.request_seen in self.server.bodies():
            faults.cut_first -= 1
            stop, self.close_connection = max(first, int(len(content) * faults.cut_at)), True
        step = _PIECE_BYTES if faults.bytes_per_s is None else max(1, int(faults.bytes_per_s / 50))
        try:
            for at in range(first, stop, step):
                piece = content[at : min(at + step, stop)]
                self.request_seen.sent.append(len(piece))  # before the bytes: their receiver may look at once
                self.wfile.write(piece)
                if faults.bytes_per_s is not None:
                    time.sleep(len(piece) / faults.bytes_per_s)
        except OSError:  # the client has disconnected
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the name in the standard library
        """Log nothing."""


def _repository(held: dict[str, bytes] | Repository) -> Repository:
    return held if isinstance(held, Repository) else Repository(held)


def _sibling(file: str, content: bytes) -> dict[str, Any]:
    sha256 = hashlib.sha256(content).hexdigest()
    large = {"lfs": {"sha256": sha256, "size": len(content), "pointerSize": 134}} if file.endswith(_LARGE) else {}
    return {"rfilename": file, "size": len(content), "blobId": sha256[:40], **large}
