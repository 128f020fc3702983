"""Bodies that are too large, too slow or not a JSON object are refused with a reason."""

import asyncio
import json
from typing import Any

import msgspec
import pytest
from aiohttp import web

from promptai.gateway.body import MAX_DEPTH, decode_object, read_json
from promptai.gateway.errors import ApiError
from support_gateway import Answer, Site, asked, visit


async def echo(request: web.Request) -> web.Response:
    return web.json_response(await read_json(request, limit_bytes=1000, limit_s=0.2))


def posted(data: Any, **headers: str) -> Answer:
    return asked(echo, "POST", data=data, headers=headers)


def sent_raw(head: bytes, body: bytes = b"") -> Answer:
    async def use(site: Site) -> Answer:
        return await site.raw(b"POST /it HTTP/1.1\r\nHost: a\r\nConnection: close\r\n" + head + b"\r\n\r\n" + body)

    answer: Answer = visit([web.post("/it", echo)], use)
    return answer


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "no body"),
        (b"{", "not JSON"),
        (b'{"a": NaN}', "not JSON"),
        (b'{"a": 1e999}', "not JSON"),
        (b'{"a": "\\ud800"}', "not JSON"),
        (b"\xef\xbb\xbf{}", "not JSON"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"[1]", "an array, not a JSON object"),
        (b'"a"', "a string, not"),
        (b"1", "a number, not"),
        (b"true", "a boolean, not"),
        (b"null", "null, not"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not JSON"),
        (b'{"a":' * 5000, "nested deeper"),
        (b'{"a":' * 101 + b"1" + b"}" * 101, "nested deeper"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_refuses_invalid_json_objects_with_the_reason(data: bytes, word: str) -> None:
    with pytest.raises(ApiError, match=word) as caught:
        decode_object(data)

    assert (caught.value.status, caught.value.code) == (400, "invalid_json")


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"a": None},
        {"a": [{"b": [1, 2.5, "ü", True]}]},
        {"a": "1234567890123456789012"},
        {"a": 2**63, "b": 10**40},
        {"a": [{}] * 500},
    ],
    ids=lambda value: str(value)[:24],
)
def test_an_accepted_object_can_be_encoded_again(value: dict[str, Any]) -> None:
    assert value == msgspec.json.decode(msgspec.json.encode(decode_object(json.dumps(value).encode())))


def test_accepts_the_maximum_nesting() -> None:
    assert decode_object(b'{"a":' * MAX_DEPTH + b"1" + b"}" * MAX_DEPTH)


def test_the_last_of_two_equal_keys_counts() -> None:
    assert decode_object(b'{"a": 1, "a": 2}') == {"a": 2}


def test_refuses_a_too_large_content_length_before_the_body_arrives() -> None:
    answer = sent_raw(b"Content-Length: 1001")

    assert (answer.status, answer.error["code"]) == (413, "request_too_large")
    assert "1,000 bytes" in answer.error["message"]


def test_refuses_a_streamed_body_that_is_too_large() -> None:
    async def endless() -> Any:
        for _ in range(100):
            yield b" " * 100

    assert posted(endless()).status == 413


def test_refuses_a_body_that_is_too_large_after_decompression() -> None:
    answer = posted(b'{"a": "' + b" " * 100_000 + b'"}', **{"Content-Encoding": "gzip"})

    assert answer.status == 413


def test_refuses_a_body_with_a_wrong_content_encoding() -> None:
    answer = sent_raw(b"Content-Encoding: gzip\r\nContent-Length: 4", b"abcd")

    assert (answer.status, answer.error["code"]) == (400, "invalid_json")


def test_refuses_malformed_chunks() -> None:
    assert sent_raw(b"Transfer-Encoding: chunked", b"zz\r\n").status == 400


def test_cuts_off_a_slow_body() -> None:
    async def dribble() -> Any:
        for _ in range(100):
            yield b" "
            await asyncio.sleep(0.05)

    answer = posted(dribble())

    assert answer.line[:2] == (408, "timeout_error")
    assert "within 0.2 s" in answer.error["message"]


def test_a_disconnected_client_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def use(site: Site) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", site.port)
        writer.write(b"POST /it HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
        await writer.drain()
        writer.close()
        await asyncio.sleep(0.05)

    visit([web.post("/it", echo)], use)

    assert caplog.text == ""


def test_returns_the_body() -> None:
    answer = posted(b'{"model": "auto"}')

    assert (answer.status, answer.body) == (200, b'{"model": "auto"}')
