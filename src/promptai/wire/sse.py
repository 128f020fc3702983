r"""Parse server-sent events from bytes as they arrive.

Network chunks end anywhere: in the middle of a line, between ``\r`` and ``\n``, inside a UTF-8 character. A measuring
client must not lose an event because of that, nor wait for more bytes when an event is complete. The parser takes
bytes and returns every event that they complete. It decodes only whole lines, and does no I/O.

Follows the WHATWG HTML standard, section 9.2 (server-sent events), for the fields that llama-server and
OpenAI-compatible servers use: ``data``, ``event`` and comments. ``id`` and ``retry`` are ignored: a chat is never
reconnected.
"""

from codecs import BOM_UTF8

import msgspec

#: An event larger than this is an attack or a bug.
MAX_EVENT_BYTES = 16 * 1024 * 1024


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
    """Turns the bytes of one response into events."""

    def __init__(self) -> None:
        # A list of pieces: growing a line by concatenation would cost the square of its length.
        self._rest: list[bytes] = []
        self._rest_bytes = 0
        self._data: list[str] = []
        self._data_bytes = 0
        self._event = "message"
        self._begun = False
        self._after_cr = False

    def feed(self, chunk: bytes) -> list[SseEvent]:
        """
        Take the next bytes and return the events that they complete.

        Raises:
            ValueError: An event exceeds ``MAX_EVENT_BYTES`` or is not UTF-8.
        """
        if not chunk:
            return []
        # A carriage return ends a line at once; a line feed right after it belongs to the same line end.
        if self._after_cr and chunk.startswith(b"\n"):
            chunk = chunk[1:]
        self._after_cr = chunk.endswith(b"\r")
        if not self._begun:
            chunk = b"".join(self._rest) + chunk
            if len(chunk) < len(BOM_UTF8) and BOM_UTF8.startswith(chunk):
                self._rest = [chunk]
                return []
            self._begun, self._rest, chunk = True, [], chunk.removeprefix(BOM_UTF8)
        lines = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._rest.append(lines[0])
        self._rest_bytes += len(lines[0])
        _bound(self._rest_bytes + self._data_bytes)
        if len(lines) == 1:
            return []
        lines[0] = b"".join(self._rest)
        self._rest = [lines.pop()]
        self._rest_bytes = len(self._rest[0])
        events = [self._line(line) for line in lines]
        return [event for event in events if event is not None]

    def _line(self, line: bytes) -> SseEvent | None:
        if not line:
            if not self._data:
                self._event = "message"
                return None
            done = SseEvent(data="\n".join(self._data), event=self._event)
            self._data, self._data_bytes, self._event = [], 0, "message"
            return done
        if line.startswith(b":"):
            return SseEvent(data="", comment=True)
        field, _, value = line.decode("utf-8").partition(":")
        value = value.removeprefix(" ")
        if field == "event":
            self._event = value or "message"
        elif field in ("data", "error"):
            self._data_bytes += len(line)
            _bound(self._data_bytes)
            self._data.append(value)
            if field == "error":
                # Not in the standard: llama-server sent its errors like this until 2025.
                self._event = "error"
        return None


def _bound(size: int) -> None:
    if size > MAX_EVENT_BYTES:
        raise ValueError(f"an event of more than {MAX_EVENT_BYTES} bytes")
