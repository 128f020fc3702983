"""``promptai serve`` in a process of its own, as a user runs it."""

import contextlib
import json
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support_cli import PROMPTAI, clean_environment, wait_for

#: The bundled model answers it in a few tokens.
QUESTION = [{"role": "user", "content": "What is a base station?"}]


class Served:
    """
    A running gateway.

    Attributes:
        printed: Lines of stdout so far; ``logged``: lines of stderr.
    """

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.printed: list[str] = []
        self.logged: list[str] = []
        self._readers = [
            threading.Thread(target=self._read, args=(stream, lines), daemon=True)
            for stream, lines in ((process.stdout, self.printed), (process.stderr, self.logged))
        ]
        for reader in self._readers:
            reader.start()

    @staticmethod
    def _read(stream: Any, lines: list[str]) -> None:
        for line in stream:
            lines.append(line.rstrip("\n"))  # noqa: PERF401  the test reads it while it grows

    @property
    def url(self) -> str:
        """The URL on which it listens."""
        line = next(line for line in self.printed if line.startswith("serving at "))
        return line.removeprefix("serving at ").removesuffix("/v1")

    def line(self, start: str) -> str:
        """The printed line that starts with ``start``."""
        return next(line for line in self.printed if line.startswith(start))

    def ready(self) -> None:
        """Wait until a replica is ready."""
        wait_for(lambda: self.get("/readyz")[0] == 200, what="a replica")

    def get(self, path: str, *, key: str | None = None) -> tuple[int, Any]:
        """Status and JSON of a path."""
        return self._ask(path, None, _authorized(key))

    def chat(self, *, key: str | None = None, **fields: Any) -> tuple[int, Any]:
        """Send a chat; status and JSON of the response."""
        body = json.dumps({"messages": QUESTION, "max_tokens": 8, **fields}).encode()
        headers = {"Content-Type": "application/json", **_authorized(key)}
        return self._ask("/v1/chat/completions", body, headers)

    def _ask(self, path: str, body: bytes | None, headers: dict[str, str]) -> tuple[int, Any]:
        request = urllib.request.Request(f"{self.url}{path}", data=body, headers=headers)  # noqa: S310  loopback
        try:
            with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310  loopback
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    def states(self) -> dict[str, str]:
        """State of each replica by id."""
        return {replica["id"]: replica["state"] for replica in self.get("/api/fleet")[1]["replicas"]}

    def stream(self, **fields: Any) -> "Streamed":
        """Send a chat and read its stream in a thread."""
        return Streamed(f"{self.url}/v1/chat/completions", {"messages": QUESTION, "stream": True, **fields})

    def wait(self) -> int:
        """Wait for the process to exit and for all of its output; return the exit code."""
        code = self.process.wait(60)
        for reader in self._readers:
            reader.join(10)
        return code


class Streamed:
    """
    A streamed answer.

    Attributes:
        events: Data of the events received so far.
    """

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        self.events: list[str] = []
        self._request = urllib.request.Request(  # noqa: S310  loopback
            url, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
        )
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        with (
            contextlib.suppress(OSError, ValueError),
            urllib.request.urlopen(self._request, timeout=60) as response,  # noqa: S310  loopback
        ):
            for line in response:
                if line.startswith(b"data: "):
                    self.events.append(line.decode().removeprefix("data: ").strip())

    def until_first_text(self) -> None:
        """Wait for the first text."""
        wait_for(lambda: len(self.events) > 2, what="an answer")

    @property
    def ended(self) -> bool:
        """Whether the stream has ended, normally or not."""
        return not self._thread.is_alive()

    def whole(self) -> bool:
        """Wait for the end; whether the answer is complete."""
        self._thread.join(60)
        return self.events[-1:] == ["[DONE]"]

    @property
    def reason(self) -> str | None:
        """The finish reason; ``None`` if none has arrived."""
        chunks = [json.loads(event) for event in self.events if event.startswith("{")]
        reasons = [c["finish_reason"] for chunk in chunks for c in chunk.get("choices") or () if c["finish_reason"]]
        return str(reasons[-1]) if reasons else None


@contextlib.contextmanager
def serving(*arguments: str | Path, cwd: Path, **environ: str) -> Iterator[Served]:
    """Run ``promptai serve`` on a free port inside the block, from the time its greeting is complete."""
    home = {"XDG_DATA_HOME": str(cwd / "data"), "XDG_CONFIG_HOME": str(cwd / "config")}
    process = subprocess.Popen(
        [*PROMPTAI, "serve", "--port", "0", *map(str, arguments)],
        cwd=cwd,
        env=clean_environment() | home | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    served = Served(process)
    try:
        wait_for(
            lambda: process.poll() is not None or any(line.startswith("Ctrl-C") for line in served.printed),
            what="the start",
        )
        yield served
    finally:
        if process.poll() is None:
            process.kill()
        served.wait()
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def _authorized(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key is not None else {}
