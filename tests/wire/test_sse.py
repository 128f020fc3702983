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
    """What one parser makes of these chunks."""
    parser = SseParser()
    return [event for chunk in chunks for event in parser.feed(chunk)]


@pytest.mark.parametrize("end", [b"", b"\n\n"], ids=["unfinished", "finished"])
def test_an_event_above_the_limit_is_refused(end: bytes) -> None:
    """Whether its end has come or not: memory is bounded either way."""
    with pytest.raises(ValueError, match=f"more than {MAX_EVENT_BYTES} bytes"):
        feed(b"data: " + bytes(MAX_EVENT_BYTES) + end)


@pytest.mark.parametrize("chunks", [(b"data: \xff\n",), (b"data: \xc3", b"\ndata: x\n")], ids=["stray", "cut-off"])
def test_bytes_that_are_not_utf_8_are_refused(chunks: tuple[bytes, ...]) -> None:
    """A replacement character would be measured as text."""
    with pytest.raises(ValueError, match="utf-8"):
        feed(*chunks)


def test_an_event_whose_blank_line_never_comes_is_refused() -> None:
    """Its lines are short, and yet they would fill the memory."""
    with pytest.raises(ValueError, match="more than"):
        feed(*[b"data: " + bytes(1 << 20) + b"\n"] * (MAX_EVENT_BYTES >> 20))


def test_events_do_not_add_up() -> None:
    """The limit is that of one event; a stream may be as long as it likes, its comments too."""
    parser = SseParser()
    events = b"data: " + bytes(1 << 20) + b"\n\n:" + bytes(1 << 20) + b"\n"

    assert sum(len(parser.feed(events)) for _ in range(20)) == 40


def test_an_event_at_the_limit_is_taken() -> None:
    """The limit itself is still an event."""
    text = b"x" * (MAX_EVENT_BYTES - len(b"data: "))

    assert [SseEvent(text.decode())] == feed(b"data: " + text, b"\n\n")


@pytest.mark.parametrize("stream", [b"", b"data: x", b"data: x\n", b"event: x\n\n", b"\n\n\r\n", b"id: 1\n\n"])
def test_nothing_comes_of_what_is_no_whole_event(stream: bytes) -> None:
    """An event needs data and a blank line; at the end of the stream the rest is dropped."""
    assert feed(stream) == []


def test_a_cut_anywhere_changes_nothing() -> None:
    """In a line, between CR and LF, inside a character: the events are the same."""
    differing = {cut for cut in range(len(STREAM) + 1) if feed(STREAM[:cut], STREAM[cut:]) != EVENTS}

    assert set() == differing


def test_single_bytes_change_nothing() -> None:
    """The slowest network there is."""
    assert feed(*(bytes([byte]) for byte in STREAM)) == EVENTS


@pytest.mark.parametrize("cut", [4096, 65536])
def test_a_long_line_is_read_in_time_that_grows_with_its_length(cut: int) -> None:
    """Not with its square: 15 MiB in pieces of 64 KiB took 9 s when each read looked at all of it again."""
    line = b"data: " + b"x" * (15 << 20) + b"\n\n"

    begin = time.process_time()
    events = feed(*(line[at : at + cut] for at in range(0, len(line), cut)))

    assert len(events) == 1
    assert time.process_time() - begin < 1.0


def test_one_line_feed_belongs_to_a_carriage_return_and_the_next_does_not() -> None:
    """Mixed ends of lines, byte by byte: the second line feed is the blank line."""
    assert [SseEvent("x")] == feed(*(bytes([byte]) for byte in b"data: x\r\n\n"))


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r", b"\r\r"], ids=["lf", "crlf", "cr"])
def test_an_event_is_given_with_the_byte_that_completes_it(end: bytes) -> None:
    """A carriage return ends the blank line; whether a line feed follows changes nothing about the event."""
    parser = SseParser()

    assert parser.feed(b"data: x" + end[:-1]) == []
    assert [SseEvent("x")] == parser.feed(end[-1:])
    assert [SseEvent("y")] == parser.feed(b"\ndata: y\n\n")


def test_a_byte_order_mark_at_the_start_is_no_part_of_the_first_field() -> None:
    """The standard lets a stream begin with one."""
    assert [SseEvent("x")] == feed(b"\xef\xbb", b"\xbfdata: x\n\n")


def test_an_empty_event_name_is_the_default_one() -> None:
    """As the standard dispatches it."""
    assert [SseEvent("x", event="message")] == feed(b"event:\ndata: x\n\n")
