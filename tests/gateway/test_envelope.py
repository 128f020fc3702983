"""Every failure of a request has the same form, and contains no secret."""

import logging
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web

from promptai.errors import (
    EngineDiedError,
    EngineRefusedError,
    EngineStartError,
    ModelNotFoundError,
    PromptAIError,
    SettingsError,
)
from promptai.gateway.errors import ApiError
from support_gateway import Answer, Site, asked, visit

ID, OPENAI_ID = "x-promptai-request-id", "x-request-id"
SECRET = b"pk-very-secret"


def raising(error: Exception) -> Any:
    async def handler(_request: web.Request) -> web.StreamResponse:
        raise error

    return handler


async def ok(_request: web.Request) -> web.Response:
    return web.Response(text="ok")


def sent_raw(data: bytes) -> Answer:
    async def use(site: Site) -> Answer:
        return await site.raw(data)

    answer: Answer = visit([web.get("/it", ok)], use)
    return answer


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"garbage\r\n\r\n", 400, "bad_http"),
        (b"GET /it HTTP/1.1\r\n\r\n", 400, "bad_http"),
        (b"GET /it HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400, "bad_http"),
        (b"GET /it HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer\x01 " + SECRET + b"\r\n\r\n", 400, "bad_http"),
        (b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n", 400, "bad_http"),
        (b"GET /it HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 9000 + b"\r\n\r\n", 431, "headers_too_large"),
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 431, "headers_too_large"),
        (b"GET /it HTTP/1.1\r\nHost: a\r\n" + b"X: 1\r\n" * 200 + b"\r\n", 431, "headers_too_large"),
    ],
    ids=["no-http", "no-host", "two-hosts", "control-character", "not-utf8", "header", "line", "headers"],
)
def test_malformed_http_gets_the_envelope_and_is_not_quoted(
    data: bytes, status: int, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The response and log of aiohttp itself contain the malformed line, which may be the one with the key."""
    caplog.set_level(logging.DEBUG)

    answer = sent_raw(data)

    assert (status, code) == (answer.status, answer.error["code"])
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers[ID] == answer.headers[OPENAI_ID] != ""
    assert SECRET.decode() not in answer.body.decode() + caplog.text
    assert [record for record in caplog.records if record.levelno > logging.DEBUG] == []


def test_an_unknown_expectation_gets_the_envelope() -> None:
    answer = sent_raw(b"GET /it HTTP/1.1\r\nHost: a\r\nExpect: wonders\r\nConnection: close\r\n\r\n")

    assert answer.line[:2] == (417, "invalid_request_error")
    assert answer.headers[ID] == answer.headers[OPENAI_ID] != ""


def test_an_unknown_path_refers_to_the_known_paths() -> None:
    async def use(site: Site) -> Answer:
        return await site.ask("/v1/chat")

    answer = visit([web.get("/it", ok)], use)

    assert answer.line == (404, "not_found_error", "no such path: /v1/chat (see /openapi.json for all paths)")
    assert answer.error["src"] == "gateway"


def test_a_wrong_method_lists_the_allowed_ones() -> None:
    async def use(site: Site) -> Answer:
        return await site.ask("/it", "DELETE")

    answer = visit([web.post("/it", ok)], use)

    assert (answer.status, answer.headers["allow"]) == (405, "POST")
    assert answer.error["hint"] == "it allows POST"


def test_an_unexpected_exception_is_logged_but_not_returned(caplog: pytest.LogCaptureFixture) -> None:
    answer = asked(raising(RuntimeError("the password is swordfish")), headers={"X-Request-Id": "r-17"})

    assert answer.line[:2] == (500, "server_error")
    assert "request r-17" in answer.error["message"]
    assert b"swordfish" not in answer.body
    (record,) = [record for record in caplog.records if record.name == "promptai.gateway"]
    assert record.getMessage() == "request r-17: GET '/it' failed"
    assert record.exc_info is not None
    assert "swordfish" in str(record.exc_info[1])


@pytest.mark.parametrize(
    ("error", "status", "src", "message"),
    [
        (ModelNotFoundError("no model llama", hint="pull it"), 404, "gateway", "no model llama (pull it)"),
        (EngineDiedError("the engine is gone"), 502, "engine", "the engine is gone"),
        (EngineStartError("it did not start"), 503, "engine", "it did not start"),
        (SettingsError("settings are odd"), 500, "gateway", "settings are odd"),
        (EngineRefusedError("refused: no", status=503, kind=None), 503, "engine", "refused: no"),
        (EngineRefusedError("refused: no", status=500, kind=None), 502, "engine", "refused: no"),
        (
            EngineRefusedError("refused", status=400, kind=None, body=b'{"error": {"message": "too long"}}'),
            400,
            "engine",
            "too long",
        ),
    ],
    ids=lambda value: getattr(value, "message", None) and type(value).__name__,
)
def test_errors_have_a_status_and_a_source(error: PromptAIError, status: int, src: str, message: str) -> None:
    answer = asked(raising(error))

    assert (status, src, message) == (answer.status, answer.error["src"], answer.error["message"])


@pytest.mark.parametrize(
    ("status", "sent", "after"),
    [(503, 40.0, "40"), (503, None, "2"), (429, 0.0, "2"), (429, 1.2, "2"), (500, 40.0, None), (400, 40.0, None)],
)
def test_sends_retry_after_if_every_engine_is_busy(status: int, sent: float | None, after: str | None) -> None:
    for body in (b"", b'{"error": {"message": "Loading model"}}'):
        answer = asked(raising(EngineRefusedError("busy", status=status, kind=None, body=body, retry_after_s=sent)))

        assert answer.headers.get("retry-after") == after


def test_sends_every_field_of_an_error() -> None:
    error = ApiError(
        429, "the queue is full", code="queue_full", param="model", hint="wait", retry_after_s=2.1, headers={"X-A": "b"}
    )

    answer = asked(raising(error))

    expected = {
        "message": "the queue is full (wait)",
        "type": "rate_limit_error",
        "param": "model",
        "code": "queue_full",
        "src": "gateway",
        "hint": "wait",
    }
    assert expected == answer.error
    assert (answer.status, answer.headers["retry-after"], answer.headers["x-a"]) == (429, "3", "b")


def test_replaces_text_that_json_cannot_contain() -> None:
    assert msgspec.json.decode(ApiError(404, "no such path: /\udcff").body())["error"]["message"] == "no such path: /?"


@pytest.mark.parametrize(
    ("given", "kept"), [("abc-1._Z", True), ("a" * 65, False), ("two words", False), ("", False), ("ü", False)]
)
def test_keeps_a_plain_request_id_of_the_client(given: str, *, kept: bool) -> None:
    answer = asked(ok, headers={"X-Request-Id": given})

    assert kept == (answer.headers[ID] == given)
    assert answer.headers[ID] == answer.headers[OPENAI_ID] != ""


def test_redirects_are_not_errors() -> None:
    answer = asked(raising(web.HTTPFound("/there")), allow_redirects=False)

    assert (answer.status, answer.headers["location"]) == (302, "/there")


@pytest.mark.parametrize("error", [ApiError(503, "too late"), RuntimeError("too late")], ids=["known", "unexpected"])
def test_an_error_after_the_start_of_a_stream_closes_the_connection(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        raise error

    async def use(site: Site) -> tuple[str, bytes]:
        async with site.client.get(f"http://127.0.0.1:{site.port}/it") as response:
            request_id = response.headers[ID]
            found = await response.content.readline()
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.read()
            return request_id, found

    request_id, found = visit([web.get("/it", handler)], use)

    assert request_id
    assert found == b"data: 1\n"
    assert [record.name for record in caplog.records] == ["promptai.gateway"]
    assert request_id in caplog.text
