"""The limits of the client: a server cannot keep it waiting for ever or fill its memory."""

import asyncio

import pytest

from promptai.errors import EngineProtocolError, EngineRefusedError
from support_engine import (
    END,
    HELLO,
    STREAM_HEAD,
    Answer,
    against,
    answer,
    chat,
    chunked,
    content,
    repeating,
    silent_after,
    text_of,
)


def test_cuts_off_an_endless_answer() -> None:
    """A server that ignores max_tokens would be measured for ever."""
    with pytest.raises(EngineProtocolError, match=r"sent \d+ chunks of an answer limited to 5 tokens"):
        against(repeating(HELLO, chunked(content("x") * 50)), use=lambda client: chat(client, {"max_tokens": 5}))


@pytest.mark.parametrize(("max_tokens", "chunks"), [(5, 20), (0, 500), (-1, 500)], ids=["thinks", "none", "unlimited"])
def test_an_answer_may_have_more_chunks_than_tokens(max_tokens: int, chunks: int) -> None:
    """Reasoning tokens may not count, and roles, usage and progress have chunks of their own."""
    stream = STREAM_HEAD + chunked(content("x") * chunks) + END

    found = against(stream, use=lambda client: chat(client, {"max_tokens": max_tokens}))

    assert isinstance(found, list)
    assert len(found) == chunks


def test_accepts_keep_alive_comments_between_timely_chunks() -> None:
    async def slow(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD)
        for letter in "abcdefg":
            writer.write(chunked(content(letter)) + chunked(b": ping\n\n"))
            await asyncio.sleep(0.1)
        writer.write(END)

    found = against(slow, silence_s=0.5)

    assert isinstance(found, list)
    assert text_of(found) == "abcdefg"


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        pytest.param(repeating(b"HTTP/1.1 500 Oops\r\n\r\n", b"x"), r"HTTP 500: x+$", id="slowly"),
        pytest.param(silent_after(b"HTTP/1.1 500 Oops\r\n\r\n"), r"HTTP 500: $", id="without-saying-why"),
    ],
)
def test_reports_a_refusal_whose_body_does_not_end(
    reply: bytes | Answer, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the part of its reason that has arrived."""
    monkeypatch.setattr("promptai.engine.connection._REASON_S", 0.1)

    with pytest.raises(EngineRefusedError, match=words) as caught:
        against(reply)

    assert caught.value.status == 500


def test_reads_only_the_beginning_of_a_long_reason() -> None:
    with pytest.raises(EngineRefusedError, match=r"HTTP 500: x{200}$"):
        against(repeating(b"HTTP/1.1 500 Oops\r\n\r\n", b"x" * 32_768))


@pytest.mark.parametrize("size", [1000, 1001])
def test_rejects_a_body_above_the_limit(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would fill the memory of the measured board."""
    monkeypatch.setattr("promptai.engine.connection._MAX_BODY_BYTES", 1000)
    reply = answer("200 OK", b"x" * size, "text/plain")

    if size > 1000:
        with pytest.raises(EngineProtocolError, match="more than 1000 bytes"):
            against(reply, use=lambda client: client.metrics())
    else:
        assert against(reply, use=lambda client: client.metrics()) == "x" * size
