import asyncio
import contextlib
import json

import pytest

from promptai.engine.client import Arrival, EngineClient
from promptai.engine.launch import free_port
from promptai.errors import EngineDiedError, EngineError, EngineProtocolError, EngineRefusedError
from support_engine import (
    DONE,
    END,
    HELLO,
    STREAM_HEAD,
    Answer,
    Use,
    against,
    answer,
    chat,
    chunked,
    content,
    raw_server,
    repeating,
    silent_after,
    text_of,
)

WHOLE = HELLO + END


def arrivals(*answers: bytes | Answer) -> list[Arrival]:
    """The arrivals of one streamed chat that succeeds."""
    found = against(*answers)
    assert isinstance(found, list)
    return found


async def reset(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A server whose machine loses power in the middle of an answer."""
    writer.write(HELLO)
    await writer.drain()
    writer.transport.abort()


@pytest.mark.parametrize(
    ("reply", "kind", "word"),
    [
        pytest.param(b"", EngineDiedError, "no connection", id="closed-without-a-word"),
        pytest.param(b"SSH-2.0-OpenSSH_9.2\r\n", EngineDiedError, "no connection", id="not-http"),
        pytest.param(HELLO, EngineDiedError, "broke off in the middle", id="cut-in-the-middle"),
        pytest.param(reset, EngineDiedError, "broke off in the middle", id="reset-in-the-middle"),
        pytest.param(HELLO + b"xyz\r\n", EngineDiedError, "no connection", id="broken-chunk-length"),
        pytest.param(silent_after(b""), EngineDiedError, "before it began to answer", id="silent-from-the-start"),
        pytest.param(silent_after(STREAM_HEAD), EngineDiedError, "before it began", id="silent-after-its-headers"),
        pytest.param(silent_after(HELLO), EngineDiedError, "in the middle of an answer", id="silent-in-the-middle"),
        pytest.param(repeating(b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"), EngineDiedError, "before", id="headers-for-ever"),
        pytest.param(repeating(STREAM_HEAD, chunked(b": ping\n\n")), EngineDiedError, "before", id="only-keep-alives"),
        pytest.param(repeating(HELLO, chunked(b": ping\n\n")), EngineDiedError, "middle", id="nothing-but-keep-alives"),
        pytest.param(repeating(HELLO, chunked(b"data")), EngineDiedError, "middle", id="a-line-that-never-ends"),
        pytest.param(HELLO + b"0\r\n\r\n", EngineProtocolError, r"without \[DONE\]", id="end-without-done"),
        pytest.param(
            b"HTTP/1.0 200 OK\r\n\r\n" + content("hello"), EngineProtocolError, "without", id="closed-without-done"
        ),
        pytest.param(
            STREAM_HEAD + chunked(b'data: {"choices": [{"delta"\n\n') + END,
            EngineProtocolError,
            "malformed chunk",
            id="half-a-json",
        ),
        pytest.param(
            STREAM_HEAD + chunked(b'data: {"usage": {"prompt_tokens": "1", "completion_tokens": 2}}\n\n') + END,
            EngineProtocolError,
            "malformed chunk",
            id="wrong-type",
        ),
        pytest.param(
            STREAM_HEAD + chunked(b'data: {"x": ' + b"[" * 100_000 + b"\n\n") + END,
            EngineProtocolError,
            "malformed chunk",
            id="nested-without-end",
        ),
        pytest.param(
            STREAM_HEAD + chunked(b"data: \xff\xfe\n\n") + END,
            EngineProtocolError,
            "broken event stream",
            id="not-utf-8",
        ),
        pytest.param(
            answer("200 OK", b"<html>Sign in</html>", "text/html"), EngineProtocolError, "without", id="web-page"
        ),
        pytest.param(
            STREAM_HEAD + chunked(content("")) + END, EngineProtocolError, "without any text", id="an-answer-of-nothing"
        ),
        pytest.param(
            STREAM_HEAD + chunked(b'data: {"choices": null}\n\n') + END,
            EngineProtocolError,
            "without any text",
            id="an-answer-of-null",
        ),
        pytest.param(
            STREAM_HEAD + chunked(b'data: {"object": "error", "message": "no memory", "code": 500}\n\n') + END,
            EngineRefusedError,
            "broke off with an error: no memory",
            id="error-without-envelope",
        ),
        pytest.param(
            HELLO + chunked(b'data: {"error": "no memory"}\n\n') + END,
            EngineRefusedError,
            "broke off with an error: no memory",
            id="error-as-text",
        ),
        pytest.param(
            answer("500 Oops", b'{"object": "error", "message": "no"}'), EngineRefusedError, "500: no", id="500-flat"
        ),
        pytest.param(answer("500 Oops", b"<h1>\xff</h1>"), EngineRefusedError, "HTTP 500: <h1>", id="500-no-json"),
        pytest.param(answer("502 Bad", b'{"error": "down"}'), EngineRefusedError, "HTTP 502: .*down", id="error-text"),
        pytest.param(
            answer("400 Bad", b'{"error": {"code": 400, "message": "too long", "type": "exceed_context_size_error"}}'),
            EngineRefusedError,
            "HTTP 400: too long",
            id="400-envelope",
        ),
        pytest.param(
            HELLO + chunked(b'data: {"error": {"code": 500, "message": "no slot", "type": "server_error"}}\n\n') + END,
            EngineRefusedError,
            "broke off with an error: no slot",
            id="error-event",
        ),
        pytest.param(
            HELLO + chunked(b'error: {"code": 500, "message": "no slot", "type": "server_error"}\n\n') + END,
            EngineRefusedError,
            "broke off with an error: no slot",
            id="error-field-of-2024",
        ),
    ],
)
def test_a_failing_stream_raises_the_matching_error(reply: bytes | Answer, kind: type[EngineError], word: str) -> None:
    """It never ends as a short answer that looks complete."""
    with pytest.raises(kind, match=word) as caught:
        against(reply)

    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    "use",
    [chat, lambda client: client.healthy(), lambda client: client.complete({})],
    ids=["chat", "health", "completion"],
)
def test_a_refused_connection_is_a_dead_engine(use: Use) -> None:
    """The error names the URL and a hint."""
    port = free_port()

    async def play() -> None:
        async with EngineClient(f"http://127.0.0.1:{port}") as client:
            await use(client)

    with pytest.raises(EngineDiedError, match=f"no connection to http://127.0.0.1:{port}") as caught:
        asyncio.run(play())
    assert "still running" in caught.value.hint


def test_reports_the_length_of_a_silence() -> None:
    """Also fractions of a second."""
    with pytest.raises(EngineDiedError, match=r"was silent for 0\.2 s"):
        against(silent_after(HELLO))


@pytest.mark.parametrize(
    ("reply", "use", "word"),
    [
        (b'{"error": "Unexpected endpoint"}', lambda client: client.props(), "not a llama-server"),
        (b'{"error": {"message": "no key"}}', lambda client: client.models(), "200: no key"),
        (b"{}", lambda client: client.props(), "not a llama-server"),
        (
            b'{"total_slots": 1, "default_generation_settings": {}}',
            lambda client: client.props(),
            "is not a llama-server",
        ),
    ],
    ids=["error-for-props", "error-for-models", "empty", "another-server"],
)
def test_rejects_an_error_with_status_200(reply: bytes, use: Use, word: str) -> None:
    """Some servers send one for every path."""
    with pytest.raises(EngineRefusedError, match=word):
        against(answer("200 OK", reply), use=use)


@pytest.mark.parametrize(
    "reply",
    [b'{"build_info": "b1"}', b'{"model_path": "/m.gguf"}', b'{"default_generation_settings": {"n_ctx": 512}}'],
    ids=["build", "path", "context"],
)
def test_one_field_identifies_a_llama_server(reply: bytes) -> None:
    """Builds differ in what they report."""
    assert against(answer("200 OK", reply), use=lambda client: client.props())


@pytest.mark.parametrize(
    ("reply", "status", "kind"),
    [
        (answer("500 Oops", b"<h1>"), 500, None),
        (
            answer("404 Not Found", b'{"error": {"message": "File Not Found", "type": "not_found_error"}}'),
            404,
            "not_found_error",
        ),
        (HELLO + chunked(b'data: {"error": {"type": "server_error"}}\n\n'), None, "server_error"),
    ],
    ids=["no-json", "envelope", "in-the-stream"],
)
def test_a_refusal_has_status_and_kind(reply: bytes, status: int | None, kind: str | None) -> None:
    """None where there is none: an error inside a stream has no status."""
    with pytest.raises(EngineRefusedError) as caught:
        against(reply)

    assert (status, kind) == (caught.value.status, caught.value.kind)


@pytest.mark.parametrize(
    ("use", "body"),
    [
        (lambda client: client.props(), b'{"total_slots": "4"}'),
        (lambda client: client.slots(), b'{"id": 0}'),
        (lambda client: client.tokenize("x"), b'{"tokens": ["x"]}'),
        (lambda client: client.models(), b"<html>"),
        (lambda client: client.models(), b'{"data": [{"id": "\xff"}]}'),
        (lambda client: client.complete({}), b'{"content": null}'),
    ],
    ids=["props", "slots", "tokenize", "models", "not-utf-8", "completion"],
)
def test_an_unexpected_body_is_a_protocol_error(use: Use, body: bytes) -> None:
    with pytest.raises(EngineProtocolError, match="returned an unexpected body"):
        against(answer("200 OK", body), use=use)


def test_refuses_props_of_another_server() -> None:
    """This distinguishes other servers from llama-server."""
    with pytest.raises(EngineRefusedError, match="HTTP 404"):
        against(answer("404 Not Found", b"404 page not found", "text/plain"), use=lambda client: client.props())


def test_a_completion_waits_as_long_as_a_chat() -> None:
    """It may have as long a prompt."""
    with pytest.raises(EngineDiedError, match="/completion did not answer within"):
        against(silent_after(b""), use=lambda client: client.complete({"prompt": "x"}))


@pytest.mark.parametrize(("status", "healthy"), [("200 OK", True), ("503 Unavailable", False), ("404 No", False)])
def test_health_follows_the_status(status: str, healthy: bool) -> None:  # noqa: FBT001  a table
    """A loading server answers 503."""
    assert healthy is against(answer(status, b"{}"), use=lambda client: client.healthy())


def test_yields_chunks_without_keep_alive_comments() -> None:
    stream = b": ping\n\n" + content("hel") + b":\n\n" + content("lo") + b": ping\r\n\r\n"

    found = arrivals(STREAM_HEAD + chunked(stream) + END)

    assert [arrival.chunk.content for arrival in found] == ["hel", "lo"]


def test_events_of_one_read_have_the_same_time() -> None:
    """They arrived together, however long parsing took."""
    found = arrivals(STREAM_HEAD + chunked(b"".join(content(str(number)) for number in range(100))) + END)

    assert len(found) == 100
    assert len({arrival.t for arrival in found}) == 1


def test_times_never_decrease_and_differ_between_reads() -> None:
    """The second piece is sent after the first one was received."""
    seen = asyncio.Event()

    async def in_two(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD + chunked(content("a") + content("b")))
        await seen.wait()
        writer.write(chunked(content("c")) + END)

    async def listen(client: EngineClient) -> list[float]:
        times = []
        async for arrival in client.stream_chat({}):
            times.append(arrival.t)
            seen.set()
        return times

    times = against(in_two, use=listen)

    assert isinstance(times, list)
    assert times == sorted(times)
    assert times[0] == times[1] < times[2]


def test_done_ends_the_answer_of_an_open_connection() -> None:
    """Later bytes are ignored."""
    after = chunked(DONE + b"data: garbage\n\n")

    assert text_of(arrivals(silent_after(HELLO + after))) == "hello"


def test_reads_an_answer_in_single_bytes() -> None:
    """A slow network cuts characters, not only lines."""
    stream = content("grüße") + DONE
    single = b"".join(chunked(bytes([byte])) for byte in stream)

    assert text_of(arrivals(STREAM_HEAD + single + b"0\r\n\r\n")) == "grüße"


def test_each_request_has_its_own_connection() -> None:
    """A server may close the connection after a stream without announcing it."""

    async def twice(client: EngineClient) -> list[str]:
        return [text_of(await chat(client)) for _ in range(5)]

    assert against(WHOLE, use=twice) == ["hello"] * 5


def test_closing_the_generator_closes_the_connection() -> None:
    """So the server can stop computing."""
    gone = asyncio.Event()

    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HELLO)
        with contextlib.suppress(ConnectionError):
            await reader.read()
        gone.set()

    async def leave(client: EngineClient) -> bool:
        stream = client.stream_chat({})
        await anext(stream)
        await stream.aclose()
        await asyncio.wait_for(gone.wait(), 5)
        return gone.is_set()

    assert against(endless, use=leave) is True


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_sends_the_request_with_stream_usage_and_key(suffix: str) -> None:
    """The URL may end with /v1 or not."""

    async def play() -> bytes:
        async with raw_server(WHOLE) as server:
            async with EngineClient(server.url + suffix, api_key="secret") as client:
                await chat(client, {"stream": False, "max_tokens": 5})
            return server.requests[0]

    head, _, body = asyncio.run(play()).partition(b"\r\n\r\n")

    assert head.startswith(b"POST /v1/chat/completions HTTP/1.1\r\n")
    assert b"\r\nAuthorization: Bearer secret" in head
    assert json.loads(body) == {
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 5,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


def test_sends_no_authorization_without_a_key() -> None:
    """Not even an empty one."""

    async def play() -> bytes:
        async with raw_server(WHOLE) as server, EngineClient(server.url) as client:
            await chat(client)
            return server.requests[0]

    assert b"authorization" not in asyncio.run(play()).lower()
