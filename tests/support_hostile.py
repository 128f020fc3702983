"""What every answer to a hostile request must be, and eyes on what nobody may do meanwhile."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec
import pytest

SECRET = "pk-very-secret"  # noqa: S105  it opens nothing
WORD = "zanzibar"
FIELDS = {"message", "type", "param", "code", "src", "hint"}
#: Values that hardly any field is made for.
ODD: list[Any] = [
    *(None, True, -1, 0, 2**63, 10**30, 1.5, 1e308, -1e-308, "", "a", "\x00", "é" * 50, "\r\nX-Evil: 1"),
    *([], {}, [[]], [None], [{}], [1, "a", [2]], {"a": {"b": []}}, {"type": 1}, {"type": "function", "function": 1}),
    *({"url": "file:///etc/passwd"}, [["a"] * 50] * 20, "x" * 100_000),
]
#: What is seen of connections while somebody looks.
_seen: list[tuple[str, Any]] | None = None


class Raw(NamedTuple):
    """One answer, as it came over a socket."""

    status: int
    headers: dict[str, str]
    body: bytes


def answers(data: bytes) -> list[Raw]:
    """All answers in what a connection brought; each must have a length or be chunked."""
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
    """The inside of the envelope of a refusal that the gateway gives by itself."""
    assert 400 <= answer.status < 500, (answer.status, answer.body[:200])
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-promptai-request-id"]
    error: dict[str, Any] = msgspec.json.decode(answer.body)["error"]
    assert set(error) >= FIELDS
    assert len(error["message"]) < 1000
    assert SECRET not in answer.body.decode()
    return error


def sound(answer: Any) -> int:
    """The status of an answer that is good or a proper refusal."""
    if answer.status != 200:
        error_of(answer)
    return int(answer.status)


def silent(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing was logged that somebody said, and nothing went wrong inside; also when a test is over."""
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
    """Every connection that this process opens inside the block, and every name that it looks up."""
    global _seen  # noqa: PLW0603  audit hooks cannot be taken away again
    found: list[tuple[str, Any]] = []
    _seen = found
    try:
        yield found
    finally:
        _seen = None
