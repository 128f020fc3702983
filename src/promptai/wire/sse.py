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

from codecs import BOM_UTF8

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
        self._begun = False
        self._after_cr = False

    def feed(self, chunk: bytes) -> list[SseEvent]:
        """
        Take the next bytes; give back the events that they complete.

        Raises:
            ValueError: A line exceeds ``MAX_LINE_BYTES`` or is not UTF-8.
        """
        if not chunk:
            return []
        # A carriage return ends a line at once; a line feed that still follows belongs to it.
        if self._after_cr and chunk.startswith(b"\n"):
            chunk = chunk[1:]
        self._after_cr = chunk.endswith(b"\r") or (self._after_cr and not chunk)
        buffer = self._rest + chunk
        if not self._begun:
            if len(buffer) < len(BOM_UTF8) and BOM_UTF8.startswith(buffer):
                self._rest = buffer
                return []
            self._begun, buffer = True, buffer.removeprefix(BOM_UTF8)
        lines = buffer.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        if max(map(len, lines)) > MAX_LINE_BYTES:
            raise ValueError(f"a line of more than {MAX_LINE_BYTES} bytes")
        self._rest = lines.pop()
        events = [self._line(line.decode("utf-8")) for line in lines]
        return [event for event in events if event is not None]

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
        elif field == "error":
            # Not in the standard: llama-server until 2025 sent its errors so.
            self._data.append(value)
            self._event = "error"
        elif field == "event":
            self._event = value or "message"
        return None
