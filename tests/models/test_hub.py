"""The real huggingface_hub against a stand-in that speaks the hub's protocol, each time in a process of its own.

The library reads its environment when it is imported, so that it cannot be pointed elsewhere in this process.
"""

import hashlib
import json
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.real

CONTENT = b"one line of a data set\n" * 1000
#: The library takes up a download at whole pieces of this size.
PIECE = 10 * 1024 * 1024
ETAG = hashlib.sha256(CONTENT).hexdigest()
COMMIT = "fdf72ae0827c1cda404aff25b6603abec9e3399b"
FILE = "/datasets/people/talks/resolve/main/trees.jsonl"

#: Asks as the product does.
ASK = """
    import json, sys
    from promptai.errors import PromptAIError
    from promptai.models.hub import fetch_dataset_file
    try:
        print(json.dumps({"path": str(fetch_dataset_file("people/talks", "trees.jsonl"))}))
    except PromptAIError as error:
        print(json.dumps({"message": error.message, "hint": error.hint}))
"""


class Behaviour(NamedTuple):
    """How the stand-in answers: as the hub does, unless told otherwise."""

    status: int = 200
    error_code: str | None = None
    metadata: bool = True
    content: bytes = CONTENT
    announced: int = len(CONTENT)
    cut_first: bool = False


class Hub(ThreadingHTTPServer):
    """A hub with one file, kept in large-file storage: HEAD redirects to where the bytes are."""

    daemon_threads = True

    def __init__(self, behaviour: Behaviour) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behaviour = behaviour
        self.seen: list[str] = []

    @property
    def url(self) -> str:
        """What HF_ENDPOINT is set to."""
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self.server.seen.append("HEAD")
        behaviour = self.server.behaviour
        headers = {"Content-Length": "0"}
        if self.path != FILE:
            self._answer(404, headers | {"X-Error-Code": "EntryNotFound"})
        elif behaviour.status != 200:
            self._answer(behaviour.status, headers | {"X-Error-Code": behaviour.error_code or ""})
        elif not behaviour.metadata:
            self._answer(200, headers | {"Content-Type": "text/html"})
        else:
            headers |= {
                "X-Repo-Commit": COMMIT,
                "X-Linked-Etag": f'"{ETAG}"',
                "X-Linked-Size": str(behaviour.announced),
            }
            # Another host, as with the hub's storage: the library stops here and fetches from there.
            storage = self.server.url.replace("127.0.0.1", "localhost")
            self._answer(302, headers | {"Location": f"{storage}/{ETAG}"})

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.seen.append(f"GET {wanted or 'all'}")
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        content = self.server.behaviour.content
        body = content[start:]
        headers = {"Content-Length": str(len(body)), "ETag": f'"{ETAG}"'}
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._answer(206 if wanted else 200, headers)
        if self.server.behaviour.cut_first and not wanted:
            self.wfile.write(body[: PIECE + 1])
            self.close_connection = True
        else:
            self.wfile.write(body)

    def _answer(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  the name in the standard library
        """Say nothing on standard error."""


Start = Callable[[Behaviour], Hub]


@pytest.fixture
def hub() -> Iterator[Start]:
    """Start hubs; they are gone after the test."""
    started: list[tuple[Hub, threading.Thread]] = []

    def start(behaviour: Behaviour) -> Hub:
        server = Hub(behaviour)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        started.append((server, thread))
        return server

    yield start
    for server, thread in started:
        server.shutdown()
        thread.join()
        server.server_close()


def ask(home: Path, endpoint: str, **environ: str) -> dict[str, str]:
    """What the product answers when it is pointed at this hub; nothing but that line may be printed as a traceback."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(ASK)],
        env={
            **{name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **environ,
        },
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, str] = json.loads(done.stdout)
    assert not any("\n" in line for line in answer.values()), answer
    return answer


def nobody() -> str:
    """The address of a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.parametrize("offline", ["0", "1"], ids=["connection-refused", "told-to-be-offline"])
def test_without_hub_and_cache_it_says_what_to_do(tmp_path: Path, offline: str) -> None:
    """At once, and one line for what happened, one for what to do."""
    began = time.monotonic()
    answer = ask(tmp_path, nobody(), HF_HUB_OFFLINE=offline)

    assert time.monotonic() - began < 10  # the library alone would try for 24 s
    assert answer["message"].startswith("trees.jsonl of data set people/talks: ")
    assert answer["message"].endswith("and it is not on this machine")
    assert "fetch trees.jsonl elsewhere" in answer["hint"]


@pytest.mark.parametrize(
    ("behaviour", "word"),
    [
        pytest.param(Behaviour(404, "EntryNotFound"), "HTTP 404", id="no-such-file"),
        pytest.param(Behaviour(401, "RepoNotFound"), "HTTP 401", id="no-such-data-set"),
        pytest.param(Behaviour(403, "GatedRepo"), "HTTP 403", id="gated"),
        pytest.param(Behaviour(403), "HTTP 403", id="forbidden"),
        pytest.param(Behaviour(503), "HTTP 503", id="overloaded"),
    ],
)
def test_a_refusal_is_told_with_its_status(tmp_path: Path, hub: Start, behaviour: Behaviour, word: str) -> None:
    """A hub that answers was reached: "cannot be reached" would send people to their cables."""
    assert word in ask(tmp_path, hub(behaviour).url)["message"]


def test_a_page_that_is_no_hub_is_told_apart_from_no_connection(tmp_path: Path, hub: Start) -> None:
    """The sign-in page of a hotel answers 200 to everything."""
    message = ask(tmp_path, hub(Behaviour(metadata=False)).url)["message"]

    assert "what answered is not a hub" in message


def test_a_file_that_is_shorter_than_announced_is_refused(tmp_path: Path, hub: Start) -> None:
    """In one line, although the library says it in two; nothing of it is taken for the file."""
    server = hub(Behaviour(content=CONTENT[:5000]))

    assert "should be of size 23000 but has size 5000" in ask(tmp_path, server.url)["message"]
    assert "message" in ask(tmp_path, server.url, HF_HUB_OFFLINE="1")


def test_a_download_that_was_cut_goes_on_where_it_stopped(tmp_path: Path, hub: Start) -> None:
    """On a slow line the difference between minutes and hours."""
    large = CONTENT * 500
    server = hub(Behaviour(content=large, announced=len(large), cut_first=True))

    assert large == Path(ask(tmp_path, server.url)["path"]).read_bytes()
    assert ["HEAD", "HEAD", "GET all", f"GET bytes={PIECE}-"] == server.seen


def test_a_file_is_fetched_once_and_then_found_without_the_hub(tmp_path: Path, hub: Start) -> None:
    """The second time nothing is asked for: what a benchmark plays should not change under its feet."""
    server = hub(Behaviour())

    first = ask(tmp_path, server.url)
    again = ask(tmp_path, server.url)

    assert Path(first["path"]).read_bytes() == CONTENT
    assert server.seen == ["HEAD", "HEAD", "GET all"]
    assert first == again == ask(tmp_path, nobody()) == ask(tmp_path, nobody(), HF_HUB_OFFLINE="1")
