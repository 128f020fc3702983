"""Hostile bodies and headers get an answer or a refusal with a reason, and cause no outgoing connection."""

import asyncio
import gzip
import logging
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest

from promptai.engine.upstream import refused
from promptai.fleet.replica import Replica
from promptai.gateway.app import GatewayLimits
from promptai.gateway.openapi import document
from promptai.router.estimate.breaker import BreakerState
from support_hostile import ODD, SECRET, WORD, answers, connections, error_of, sound
from support_serve import World
from support_simulated_upstream import SimulatedUpstream
from support_site import CHAT, EMBED, FAST, SLOW, TEXT, Door, asking, one, visit

HEADERS = {"Authorization": f"Bearer {SECRET}"}
MESSAGES = [{"role": "user", "content": WORD}]
SCHEMAS = {CHAT: "ChatRequest", TEXT: "CompletionRequest", EMBED: "EmbeddingRequest"}


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    caplog.set_level(logging.DEBUG)
    yield
    records = caplog.get_records("call")  # after the test, caplog.records is empty
    logged = "\n".join(map(caplog.handler.format, records))
    assert SECRET not in logged
    assert WORD not in logged
    assert [one.getMessage() for one in records if one.levelno >= logging.ERROR] == []


async def send(at: Door, path: str, body: dict[str, Any] | bytes) -> int:
    """Return the status of a response, whose error is checked for the envelope."""
    data = body if isinstance(body, bytes) else msgspec.json.encode(body)
    answer = await at.ask(path, "POST", data=data, headers=HEADERS)
    return 200 if answer.status == 200 else sound(answer)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, TEXT, EMBED])
def test_any_type_in_any_field(path: str, stream: bool) -> None:  # noqa: FBT001
    """Every documented field, and one that is unknown."""
    fields = [*document()["components"]["schemas"][SCHEMAS[path]]["properties"], "unheard_of"]
    required: dict[str, dict[str, Any]] = {
        CHAT: {"messages": MESSAGES, "stream": stream},
        TEXT: {"prompt": WORD, "stream": stream},
        EMBED: {"input": WORD},
    }

    async def use(at: Door) -> set[int]:
        body = asking(path, required[path])
        found = {await send(at, path, {**body, field: value}) for field in fields for value in ODD}
        assert (await at.chat()).status == 200
        return found

    assert visit(one(msgspec.structs.replace(FAST, context=100, answer_tokens=2)), use) <= {200, 400, 404}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, TEXT, EMBED])
def test_fields_of_several_paths_in_one_request(path: str, stream: bool) -> None:  # noqa: FBT001
    """Whatever their types, no answer is computed that cannot be assembled."""
    fields: dict[str, Any] = {"messages": MESSAGES, "prompt": WORD, "input": WORD}

    async def use(at: Door) -> set[int]:
        bodies = [
            {**asking(path, {"stream": stream}), field: value} for field in fields for value in (*ODD, "a", MESSAGES)
        ]
        bodies = [body for body in bodies if sum(body.get(field) is not None for field in fields) > 1]
        return {await send(at, path, body) for body in [*bodies, {**asking(path, {"stream": stream}), **fields}]}

    assert visit(one(FAST), use) == {400}


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": msgspec.json.decode(b"[" * 90 + b"]" * 90)},
        *(1, "a", None, [], {}, {"role": None}, {"role": 1, "content": WORD}, {"role": "", "content": ""}),
        *({"role": "user"}, {"role": "user", "content": 5}, {"role": "user", "content": [1]}),
        *({"role": "user", "content": [{}]}, {"role": "user", "content": [{"type": "text", "text": 5}]}),
        *({"role": "user", "content": [{"type": "text"}]}, {"role": "wizard\x00", "content": WORD}),
        {"role": "assistant", "tool_calls": [{"id": 1, "function": 2}]},
        {"role": "assistant", "tool_calls": "a"},
        {"role": "tool", "content": {"a": 1}, "tool_call_id": []},
    ],
    ids=str,
)
def test_any_message(message: Any) -> None:
    async def use(at: Door) -> set[int]:
        bodies = [
            asking(CHAT, {"messages": messages}) for messages in ([message], [*MESSAGES, message], [message, *MESSAGES])
        ]
        return {await send(at, CHAT, body) for body in bodies}

    assert visit(one(FAST), use) <= {200, 400}


@pytest.mark.parametrize(
    "data",
    [
        b'{"messages":' + b"[" * 100_000,
        b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"model": "\xff\xfe"}',
        b'{"model": "yi\xc0\x80"}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "\\udc00\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "a\x00b"}]}',
        b'{"messages": [{"role": "user", "content": "a\nb"}]}',
        b'\x00{"messages": []}',
        b"\xef\xbb\xbf{}",
        b"\xff\xfe{\x00}\x00",
        b'{"max_tokens": NaN}',
        b'{"max_tokens": Infinity}',
        b'{"max_tokens": 1e999}',
        b'{"max_tokens": ' + b"9" * 100_000 + b"}",
        b'{"temperature": 0.' + b"0" * 100_000 + b"1}",
        b'{"messages": []} trailing',
        b"{'messages': []}",
        b'{"messages": [],}',
        b"[]",
        b'"' + b"a" * 1_000_000 + b'"',
        b"\x1f\x8b\x08\x00\x00\x00\x00\x00",
        b"----boundary\r\nContent-Disposition: form-data; name=a\r\n\r\nb\r\n",
    ],
    ids=lambda data: str(data[:40]),
)
@pytest.mark.parametrize("path", [CHAT, "/api/decide"])
def test_refuses_malformed_bodies(path: str, data: bytes) -> None:
    assert visit(one(FAST), lambda at: send(at, path, data)) == 400


@pytest.mark.parametrize("parts", [(b"abcd",), (b"a", b"bcd")], ids=["at-once", "in-parts"])
@pytest.mark.parametrize(
    ("line", "status"),
    [(f"POST {CHAT}", 400), ("POST /api/decide", 400), ("POST /nowhere", 404), ("GET /healthz", 200)],
)
def test_a_wrong_content_encoding_is_not_logged_as_an_error(line: str, status: int, parts: tuple[bytes, ...]) -> None:
    """Whether the handler reads the body, or aiohttp discards it after the response."""
    head = f"{line} HTTP/1.1\r\nHost: localhost\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\n".encode()

    found = visit(one(FAST), lambda at: at.raw(head + parts[0], *parts[1:], pause_s=0.1))

    (answer,) = answers(found)
    assert (answer.status, sound(answer)) == (status, status)
    assert status != 400 or answer.headers["connection"] == "close"


def test_does_not_read_beyond_a_body_with_a_wrong_content_encoding() -> None:
    """Its beginning is unknown."""
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Encoding: gzip\r\nContent-Length: 4\r\n\r\n".encode()
    second = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"

    found = visit(one(FAST), lambda at: at.raw(head + b"abcd" + second, second))

    assert [answer.status for answer in answers(found)] == [400]


def test_a_malformed_rest_beyond_the_size_limit_is_not_logged_as_an_error() -> None:
    packed = gzip.compress(b" " * 1_000_000)[:-8] + b"\xff" * 8
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Encoding: gzip\r\nContent-Length: {len(packed)}\r\n\r\n"
    limits = GatewayLimits(body_bytes=10_000)

    found = visit(one(FAST), lambda at: at.raw(head.encode() + packed), limits=limits)

    assert [answer.status for answer in answers(found)] == [413]


def test_the_last_of_two_equal_fields_counts_in_gateway_and_engine() -> None:
    messages = b'"messages": [{"role": "user", "content": "a"}]'
    data = b'{"max_tokens": 1, "model": "x", ' + messages + b', "max_tokens": 3, "model": "yi"}'

    answer = visit(one(FAST), lambda at: at.ask(CHAT, "POST", data=data))

    assert msgspec.json.decode(answer.body)["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(
    "name",
    [
        *("../../etc/passwd", "/etc/passwd", "http://169.254.169.254/latest/meta-data/", "file:///etc/passwd"),
        *(
            "yi/../../x",
            "yi\x00",
            "yi\r\nX-Evil: 1",
            "\u202eiy",
            "yi ",
            " yi",
            "YI",
            "a" * 1_000_000,
            "${jndi:ldap://a}",
        ),
        *(
            "%s%s%s%n",
            "{0.__class__}",
            "<script>",
            "' OR 1=1 --",
            "\U0001d4ce\U0001d4be",
            "\ud7ff",
            "yi\u2028",
            "*",
            "sim://a",
            "http://a",
        ),
    ],
    ids=lambda name: ascii(name[:20]),
)
def test_odd_model_names_are_not_found(name: str) -> None:
    async def use(at: Door) -> None:
        for path in (CHAT, TEXT, EMBED):
            answer = await at.chat(path, model=name)
            assert (answer.status, error_of(answer)["code"]) == (404, "model_not_found")
            assert "x-evil" not in answer.headers

    visit(one(FAST), use)


def test_names_of_models_and_replicas_cannot_inject_headers() -> None:
    """The names come from files and from other servers."""
    evil = "yi\r\nX-Evil: 1\u2028é\x7f"

    def world() -> World:
        made = one(msgspec.structs.replace(FAST, model=evil))()
        known = made.source._replicas.pop("a")
        made.source._replicas[evil] = msgspec.structs.replace(known, id=evil)
        return made

    async def use(at: Door) -> tuple[Any, Any, Any]:
        return await at.chat(model=evil), await at.stream(model=evil), await at.ask("/metrics")

    whole, stream, metrics = visit(world, use)

    for headers in (whole.headers, stream.headers):
        assert "x-evil" not in headers
        assert headers["x-promptai-model"] == headers["x-promptai-replica"] == "yi??X-Evil: 1???"
    assert (whole.status, stream.whole, metrics.status) == (200, True, 200)
    assert b"\nX-Evil" not in metrics.body


def test_fetches_no_url_from_a_request() -> None:
    """No image, file or schema: no host name is resolved, and only the gateway is connected to."""
    received: list[bytes] = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received.append(await reader.read(100))
        writer.close()

    async def use(at: Door) -> list[tuple[str, Any]]:
        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        urls = [
            f"http://127.0.0.1:{port}/x",
            "http://trap.example/x",
            "file:///etc/passwd",
            "gopher://127.0.0.1/",
            "//a",
        ]
        with connections() as seen:
            for url in urls:
                for body in _bodies_with(url):
                    await send(at, CHAT, {"model": "yi", "max_tokens": 2, **body})
                await send(at, EMBED, {"model": "yi", "input": url})
                for name in ("Referer", "X-Forwarded-Host", "Forwarded", "Origin", "X-Original-URL", "Host"):
                    await at.ask("/v1/models", headers={name: url})
        server.close()
        return [one for one in seen if one != ("socket.connect", ("127.0.0.1", at.port))]

    assert visit(one(FAST), use) == []
    assert received == []


def _bodies_with(url: str) -> Iterator[dict[str, Any]]:
    part: dict[str, Any]
    for part in (
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "image_url", "image_url": url},
        {"type": "input_audio", "input_audio": {"data": url, "format": "wav"}},
        {"type": "file", "file": {"file_data": url, "file_id": url}},
        {"type": "video_url", "video_url": {"url": url}},
    ):
        yield {"messages": [{"role": "user", "content": [part]}]}
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"$ref": url}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"$ref": url}}}
    extras: tuple[dict[str, Any], ...] = (
        {"response_format": schema},
        {"tools": [tool]},
        {"grammar": url},
        *({name: url} for name in ("user", "metadata", "base_url", "api_base", "url", "callback", "proxy", "lora")),
        {"model": url},
        {"chat_template": url, "chat_template_kwargs": {"url": url}},
    )
    for extra in extras:
        yield {"messages": MESSAGES, **extra}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("x-promptai-deadline", value) for value in ("soon", "-1", "9" * 5000, "0", "1 fortnight")),
        *(("x-promptai-budget", value) for value in ("soon", "0s", "-5m")),
        *(("x-promptai-priority", value) for value in ("first", "batch; x", "\t")),
        *(("x-promptai-status", value) for value in ("2", "yes", "a" * 5000)),
        *(("X-Request-Id", value) for value in ("a" * 5000, "a b", "../../x", "%0d%0a")),
        *(("Authorization", value) for value in ("Bearer", "Bearer " + "a" * 8000, "Basic Og==", "bearer\tx")),
        *(("Origin", value) for value in ("http://evil.example", "null", "file://", "http://[", "a" * 5000)),
        *(("Accept", value) for value in ("image/png", "text/event-stream", "*/*;q=0")),
        *(("Accept-Encoding", value) for value in ("br", "gzip;q=wonders", "identity;q=0")),
        *(("Range", value) for value in ("bytes=0-1", "bytes=-1,-1,-1")),
    ],
    ids=lambda value: str(value)[:24],
)
@pytest.mark.parametrize("path", [CHAT, "/api/decide"])
def test_any_header(path: str, name: str, value: str) -> None:
    async def use(at: Door) -> int:
        answer = await at.ask(path, "POST", json=asking(CHAT, {"messages": MESSAGES}), headers={**HEADERS, name: value})
        assert len(answer.headers.get("x-promptai-request-id", "")) <= 64
        return sound(answer)

    assert visit(one(FAST), use) in {200, 400, 403}


class _FailingUpstream(SimulatedUpstream):
    """Engines that respond to some requests with HTTP 500, as llama-server does for input that it cannot parse."""

    broken = ""

    async def stream(self, url: str, path: str, body: bytes, **settings: Any) -> Any:
        """Fail for images, and for every request to the broken engine."""
        if b"image_url" in body or url == self.broken:
            error = {"error": {"code": 500, "message": "image input is not supported", "type": "server_error"}}
            raise refused(url, 500, msgspec.json.encode(error))
        async for piece in super().stream(url, path, body, **settings):
            yield piece


def failing_engines(broken: str = "") -> Callable[[], World]:
    def make() -> World:
        world = World(dict.fromkeys("abc", SLOW))
        upstream = _FailingUpstream(world.upstream.engines)
        upstream.broken = broken
        world.upstream = upstream
        world.admission.upstream = upstream
        return world

    return make


def test_a_request_that_fails_on_every_engine_opens_no_breaker() -> None:
    """If two engines fail alike, the request is at fault: 400, which clients do not retry."""
    worlds: list[World] = []
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]

    def world() -> World:
        worlds.append(failing_engines()())
        return worlds[-1]

    async def use(at: Door) -> list[tuple[int, str, str]]:
        found = [await at.chat(messages=image) for _ in range(20)]
        states = {worlds[0].fleet_state.breaker(name).state(worlds[0].fleet_state.now()) for name in "abc"}
        assert states == {BreakerState.CLOSED}
        assert (await at.chat()).status == 200
        return [(one.status, one.error["src"], one.error["message"].partition(" (")[0]) for one in found]

    assert set(visit(world, use)) == {(400, "engine", "image input is not supported")}


def test_an_engine_that_fails_where_others_succeed_is_taken_out() -> None:
    """Its requests are answered by the others."""
    worlds: list[World] = []

    def world() -> World:
        worlds.append(failing_engines("sim://a")())
        return worlds[-1]

    async def use(at: Door) -> tuple[set[int], Replica]:
        found = set()
        for number in range(40):
            answer = await at.chat(messages=[{"role": "user", "content": f"{number} {WORD}"}], max_tokens=1)
            found.add(answer.status)
            if worlds[0].fleet_state.breaker("a").state(worlds[0].fleet_state.now()) is not BreakerState.CLOSED:
                return found, worlds[0].registry.snapshot.replicas[0]
        raise AssertionError("its breaker never opened")

    statuses, _ = visit(world, use)

    assert statuses == {200}
