"""How the gateway reaches engines: the interface, and the errors that every implementation reports alike.

A gateway that decodes answers into types loses the fields it does not know, and one that waits for whole answers
cannot stream. So requests and answers are bytes here, streams are events as they arrive, and only failures are
understood. ``engine.http_upstream`` implements it over HTTP; tests use simulated engines without sockets.
"""

from collections.abc import AsyncGenerator, Callable
from typing import NamedTuple, Protocol

import msgspec

from promptai.errors import EngineDiedError, EngineProtocolError, EngineRefusedError
from promptai.wire.openai import ErrorBody, error_in
from promptai.wire.sse import SseEvent


class Reply(NamedTuple):
    """
    A whole response, whatever its status.

    Attributes:
        retry_after_s: Seconds of its ``Retry-After``; ``None``: missing, or not a number of seconds.
    """

    status: int
    body: bytes
    content_type: str
    retry_after_s: float | None = None


class Piece(msgspec.Struct, frozen=True):
    """
    The events that the bytes of one read completed.

    Attributes:
        t: The loop's time at which the bytes arrived.
        events: May be empty; includes keep-alive comments.
    """

    t: float
    events: list[SseEvent]


def is_done(event: SseEvent) -> bool:
    """Whether an event ends a stream in OpenAI's format."""
    return event.data == "[DONE]"


class Upstream(Protocol):
    """Requests to engines by their URL."""

    async def get(self, url: str, path: str, *, limit_s: float) -> Reply:
        """
        Send a ``GET`` and return the whole response.

        Raises:
            EngineDiedError: The connection failed, or the response was not complete within ``limit_s``.
            EngineProtocolError: The body is larger than any legitimate one.
        """

    async def post(self, url: str, path: str, body: bytes, *, limit_s: float) -> Reply:
        """
        ``POST`` JSON and return the whole response.

        Raises:
            EngineDiedError: The connection failed, or the response was not complete within ``limit_s``.
            EngineProtocolError: The body is larger than any legitimate one.
        """

    def stream(
        self,
        url: str,
        path: str,
        body: bytes,
        *,
        silence_s: Callable[[], float],
        ends: Callable[[SseEvent], bool] = is_done,
    ) -> AsyncGenerator[Piece, None]:
        """
        ``POST`` JSON and yield the events of the response as they arrive; closing it closes the connection.

        Args:
            silence_s: The longest wait for the next bytes; called repeatedly while waiting, so it may change.
            ends: Whether an event completes the answer; that event is yielded, later ones are not.

        Raises:
            EngineRefusedError: An HTTP status other than 200, or an error in place of a stream; its ``body`` is the
                response's.
            EngineDiedError: The connection failed, fell silent, or ended before the answer did.
            EngineProtocolError: The response is not an event stream.
        """


def up_to_end(events: list[SseEvent], ends: Callable[[SseEvent], bool]) -> tuple[list[SseEvent], bool]:
    """Return the events up to the one that completes the answer, and whether it is among them."""
    for number, event in enumerate(events, 1):
        if ends(event):
            return events[:number], True
    return events, False


def no_connection(url: str, reason: str) -> EngineDiedError:
    """Report an engine that could not be reached, or that disconnected before it answered."""
    return EngineDiedError(f"no connection to {url}: {reason}", hint="check that the engine is still running there")


def broken_off(url: str, reason: str = "") -> EngineDiedError:
    """Report a connection that ended before the answer did."""
    return EngineDiedError(f"{url} broke off in the middle of an answer{f': {reason}' if reason else ''}")


def refused(url: str, status: int, body: bytes, retry_after_s: float | None = None) -> EngineRefusedError:
    """Report an HTTP status other than 200, with the message of the error envelope or the start of the body."""
    error = error_in(body) or ErrorBody(body[:200].decode("utf-8", "replace").strip())
    return EngineRefusedError(
        f"{url} answered HTTP {status}: {error.message[:300]}",
        status=status,
        kind=error.type,
        body=body,
        retry_after_s=retry_after_s,
    )


def no_stream(url: str, body: bytes) -> EngineRefusedError | EngineProtocolError:
    """Report a response with HTTP 200 that is not an event stream: an error in disguise, or something else."""
    if error_in(body) is not None:
        return refused(url, 200, body)
    return EngineProtocolError(f"{url} sent a whole response although a stream was requested")
