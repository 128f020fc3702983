"""Conditions that every response to a hostile request must meet, and a watch on connections and the log."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec
import pytest

SECRET = "pk-very-secret"  # noqa: S105  not a real key
WORD = "zanzibar"
FIELDS = {"message", "type", "param", "code", "src", "hint"}
#: Values that hardly any field accepts.
ODD: list[Any] = [
    *(None, True, -1, 0, 2**63, 10**30, 1.5, 1e308, -1e-308, "", "a", "\x00", "é" * 50, "\r\nX-Evil: 1"),
    *([], {}, [[]], [None], [{}], [1, "a", [2]], {"a": {"b": []}}, {"type": 1}, {"type": "function", "function": 1}),
    *({"url": "file:///etc/passwd"}, [["a"] * 50] * 20, "x" * 100_000),
]
#: Connections and look-ups since ``connections`` was entered; ``None`` outside it.
_seen: list[tuple[str, Any]] | None = None


class Raw(NamedTuple):
    """One response as received over a socket."""

    status: int
    headers: dict[str, str]
    body: bytes


def answers(data: bytes) -> list[Raw]:
    """All responses in the bytes of a connection; a response without a length takes the rest."""
    found = []
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("ascii").split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        status = int(first.split()[1])
        if status < 200:
            continue
        if "content-length" in headers:
            length = int(headers["content-length"])
            body, data = data[:length], data[length:]
        else:
            body, data = data, b""
        found.append(Raw(status, headers, body))
    return found


def error_of(answer: Any) -> dict[str, Any]:
    """Assert that a response is a refusal by the gateway itself; return its ``error`` object."""
    assert 400 <= answer.status < 500, (answer.status, answer.body[:200])
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-promptai-request-id"]
    error: dict[str, Any] = msgspec.json.decode(answer.body)["error"]
    assert set(error) >= FIELDS
    assert len(error["message"]) < 1000
    assert SECRET not in answer.body.decode()
    return error


def sound(answer: Any) -> int:
    """Assert that a response is 200 or a proper refusal; return its status."""
    if answer.status != 200:
        error_of(answer)
    return int(answer.status)


def silent(caplog: pytest.LogCaptureFixture) -> None:
    """Assert that the log has neither secrets, nor text of requests, nor errors; works after a test, too."""
    records = caplog.get_records("call")  # ``caplog.records`` is empty again by then
    text = "\n".join(map(caplog.handler.format, records))
    assert SECRET not in text
    assert WORD not in text
    assert [record.getMessage() for record in records if record.levelname in {"ERROR", "CRITICAL"}] == []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _seen is not None and event in {"socket.connect", "socket.getaddrinfo"}:
        _seen.append((event, arguments[1] if event == "socket.connect" else arguments[0]))


sys.addaudithook(_hook)


@contextlib.contextmanager
def connections() -> Iterator[list[tuple[str, Any]]]:
    """Record every connection that this process opens inside the block, and every name that it looks up."""
    global _seen  # noqa: PLW0603  an audit hook cannot be removed
    found: list[tuple[str, Any]] = []
    _seen = found
    try:
        yield found
    finally:
        _seen = None
