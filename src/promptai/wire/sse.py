r"""Server-sent events from bytes, as they come.

Network chunks end anywhere: in the middle of a line, between ``\r`` and ``\n``,
inside a UTF-8 character. A measuring client must neither lose an event to that
nor wait for one that is already whole. This parser takes bytes and gives back
every event that they complete; it never waits, decodes only whole lines, and
does no I/O.

Follows the WHATWG HTML standard, section 9.2 (server-sent events), for the
fields that llama-server and OpenAI-compatible servers use: ``data``, ``event``
and comments. ``id`` and ``retry`` are ignored: a chat is never reconnected.
"""

import msgspec

#: A line longer than this is not a chat event but an attack or a bug.
MAX_LINE_BYTES = 16 * 1024 * 1024


class SseEvent(msgspec.Struct, frozen=True):
    """
    One event.

    Attributes:
        data: The ``data`` lines joined by newlines; empty for a pure comment.
        event: The event's name; ``"message"`` when it has none.
        comment: True for a comment line (a keep-alive), which carries no data.
    """

    data: str
    event: str = "message"
    comment: bool = False


class SseParser:
    """Turns a stream of byte chunks into events; one parser a response."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[str] = []
        self._event = "message"

    def feed(self, chunk: bytes) -> list[SseEvent]:
        """
        Take the next bytes; give back the events that they complete.

        Raises:
            ValueError: A line exceeds ``MAX_LINE_BYTES`` or is not UTF-8.
        """
        buffer = self._rest + chunk
        # A carriage return at the very end may be the first half of \r\n.
        held = b"\r" if buffer.endswith(b"\r") else b""
        lines = buffer[: len(buffer) - len(held)].replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._rest = lines.pop() + held
        if len(self._rest) > MAX_LINE_BYTES:
            raise ValueError(f"a line of more than {MAX_LINE_BYTES} bytes")
        events: list[SseEvent] = []
        for line in lines:
            event = self._line(line.decode("utf-8"))
            if event is not None:
                events.append(event)
        return events

    def _line(self, line: str) -> SseEvent | None:
        if not line:
            if not self._data:
                self._event = "message"
                return None
            done = SseEvent(data="\n".join(self._data), event=self._event)
            self._data, self._event = [], "message"
            return done
        if line.startswith(":"):
            return SseEvent(data="", comment=True)
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if field == "data":
            self._data.append(value)
        elif field == "event":
            self._event = value
        return None
