import time

import pytest

from promptai.wire.sse import MAX_EVENT_BYTES, SseEvent, SseParser

STREAM = (
    ": keep-alive\r\n\r\n"
    "event: note\r\ndata: grüße 🚀\r\n\r\n"
    "data: one\ndata:  two\ndata\n\n"
    "data:three\r\r"
    "id: 7\nretry: 10\nunknown: x\nbare\ndata: four: five\n\n"
    "event: forgotten\n\n"
    "data: six\r\n\r\n"
).encode()
EVENTS = [
    SseEvent("", comment=True),
    SseEvent("grüße 🚀", event="note"),
    SseEvent("one\n two\n"),
    SseEvent("three"),
    SseEvent("four: five"),
    SseEvent("six"),
]


def feed(*chunks: bytes) -> list[SseEvent]:
    """Return the events that one parser finds in these chunks."""
    parser = SseParser()
    return [event for chunk in chunks for event in parser.feed(chunk)]


@pytest.mark.parametrize("end", [b"", b"\n\n"], ids=["unfinished", "finished"])
def test_rejects_an_event_above_the_limit(end: bytes) -> None:
    """Complete or not: memory is bounded either way."""
    with pytest.raises(ValueError, match=f"more than {MAX_EVENT_BYTES} bytes"):
        feed(b"data: " + bytes(MAX_EVENT_BYTES) + end)


@pytest.mark.parametrize("chunks", [(b"data: \xff\n",), (b"data: \xc3", b"\ndata: x\n")], ids=["stray", "cut-off"])
def test_rejects_bytes_that_are_not_utf_8(chunks: tuple[bytes, ...]) -> None:
    """A replacement character would be measured as text."""
    with pytest.raises(ValueError, match="utf-8"):
        feed(*chunks)


def test_rejects_an_event_without_an_end() -> None:
    """Its lines are short, but together they would fill the memory."""
    with pytest.raises(ValueError, match="more than"):
        feed(*[b"data: " + bytes(1 << 20) + b"\n"] * (MAX_EVENT_BYTES >> 20))


def test_the_limit_applies_to_single_events() -> None:
    """A stream may be of any length, comments included."""
    parser = SseParser()
    events = b"data: " + bytes(1 << 20) + b"\n\n:" + bytes(1 << 20) + b"\n"

    assert sum(len(parser.feed(events)) for _ in range(20)) == 40


def test_accepts_an_event_at_the_limit() -> None:
    text = b"x" * (MAX_EVENT_BYTES - len(b"data: "))

    assert [SseEvent(text.decode())] == feed(b"data: " + text, b"\n\n")


@pytest.mark.parametrize("stream", [b"", b"data: x", b"data: x\n", b"event: x\n\n", b"\n\n\r\n", b"id: 1\n\n"])
def test_ignores_incomplete_events(stream: bytes) -> None:
    """An event needs data and a blank line; the rest is dropped at the end of the stream."""
    assert feed(stream) == []


def test_a_cut_anywhere_changes_nothing() -> None:
    """In a line, between CR and LF, inside a character: the events are the same."""
    differing = {cut for cut in range(len(STREAM) + 1) if feed(STREAM[:cut], STREAM[cut:]) != EVENTS}

    assert set() == differing


def test_reads_single_bytes() -> None:
    """The slowest network there is."""
    assert feed(*(bytes([byte]) for byte in STREAM)) == EVENTS


@pytest.mark.parametrize("cut", [4096, 65536])
def test_reads_a_long_line_in_linear_time(cut: int) -> None:
    """15 MiB in pieces of 64 KiB took 9 s when each read searched all of it again."""
    line = b"data: " + b"x" * (15 << 20) + b"\n\n"

    begin = time.process_time()
    events = feed(*(line[at : at + cut] for at in range(0, len(line), cut)))

    assert len(events) == 1
    assert time.process_time() - begin < 1.0


def test_one_line_feed_belongs_to_a_carriage_return() -> None:
    """With mixed line ends, byte by byte: the second line feed is the blank line."""
    assert [SseEvent("x")] == feed(*(bytes([byte]) for byte in b"data: x\r\n\n"))


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r", b"\r\r"], ids=["lf", "crlf", "cr"])
def test_returns_an_event_with_the_byte_that_completes_it(end: bytes) -> None:
    """A carriage return ends the blank line; a line feed after it does not change the event."""
    parser = SseParser()

    assert parser.feed(b"data: x" + end[:-1]) == []
    assert [SseEvent("x")] == parser.feed(end[-1:])
    assert [SseEvent("y")] == parser.feed(b"\ndata: y\n\n")


def test_ignores_a_byte_order_mark() -> None:
    """The standard lets a stream begin with one."""
    assert [SseEvent("x")] == feed(b"\xef\xbb", b"\xbfdata: x\n\n")


def test_an_empty_event_name_is_the_default() -> None:
    """As in the standard."""
    assert [SseEvent("x", event="message")] == feed(b"event:\ndata: x\n\n")
