"""Bodies that are too large, too slow or no JSON object are refused in time, with a reason."""

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
        (b"true", "a truth value, not"),
        (b"null", "null, not"),
        (b'{"a": ' + b"1" * 5000 + b"}", "not JSON"),
        (b'{"a":' * 5000, "nests deeper"),
        (b'{"a":' * 101 + b"1" + b"}" * 101, "nests deeper"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_what_is_no_json_object_is_refused_with_the_reason(data: bytes, word: str) -> None:
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
def test_what_is_one_can_be_encoded_again(value: dict[str, Any]) -> None:
    assert value == msgspec.json.decode(msgspec.json.encode(decode_object(json.dumps(value).encode())))


def test_the_deepest_nesting_that_is_allowed_is_read() -> None:
    assert decode_object(b'{"a":' * MAX_DEPTH + b"1" + b"}" * MAX_DEPTH)


def test_of_a_key_that_comes_twice_the_last_counts() -> None:
    assert decode_object(b'{"a": 1, "a": 2}') == {"a": 2}


def test_a_body_that_is_announced_too_large_is_refused_before_it_comes() -> None:
    answer = sent_raw(b"Content-Length: 1001")

    assert (answer.status, answer.error["code"]) == (413, "request_too_large")
    assert "1,000 bytes" in answer.error["message"]


def test_a_body_that_turns_out_too_large_is_refused() -> None:
    async def endless() -> Any:
        for _ in range(100):
            yield b" " * 100

    assert posted(endless()).status == 413


def test_a_small_body_that_unpacks_large_is_refused() -> None:
    answer = posted(b'{"a": "' + b" " * 100_000 + b'"}', **{"Content-Encoding": "gzip"})

    assert answer.status == 413


def test_a_body_that_is_not_packed_as_it_says_is_refused() -> None:
    answer = sent_raw(b"Content-Encoding: gzip\r\nContent-Length: 4", b"abcd")

    assert (answer.status, answer.error["code"]) == (400, "invalid_json")


def test_broken_chunks_are_refused() -> None:
    assert sent_raw(b"Transfer-Encoding: chunked", b"zz\r\n").status == 400


def test_a_client_that_dribbles_is_cut_off() -> None:
    async def dribble() -> Any:
        for _ in range(100):
            yield b" "
            await asyncio.sleep(0.05)

    answer = posted(dribble())

    assert answer.line[:2] == (408, "timeout_error")
    assert "within 0.2 s" in answer.error["message"]


def test_a_client_that_goes_away_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    async def use(site: Site) -> None:
        _, writer = await asyncio.open_connection("127.0.0.1", site.port)
        writer.write(b"POST /it HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
        await writer.drain()
        writer.close()
        await asyncio.sleep(0.05)

    visit([web.post("/it", echo)], use)

    assert caplog.text == ""


def test_the_body_arrives() -> None:
    answer = posted(b'{"model": "auto"}')

    assert (answer.status, answer.body) == (200, b'{"model": "auto"}')
