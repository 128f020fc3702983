"""Every way in which a request can fail ends in the same shape, and tells no secret."""

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
from promptai.gateway.errors import ApiError, engine_refusal, error_type
from support_gateway import Answer, Site, asked, visit

ID, OPENAI_ID = "x-promptai-request-id", "x-request-id"
SECRET = b"pk-very-secret"


def raising(error: Exception) -> Any:
    async def handler(_request: web.Request) -> web.StreamResponse:
        raise error

    return handler


async def well(_request: web.Request) -> web.Response:
    return web.Response(text="well")


def sent_raw(data: bytes) -> Answer:
    async def use(site: Site) -> Answer:
        return await site.raw(data)

    answer: Answer = visit([web.get("/it", well)], use)
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
def test_what_is_not_http_gets_the_envelope_and_is_not_quoted(
    data: bytes, status: int, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The own answer and log of aiohttp hold the broken line, which may be the one with the key."""
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


def test_an_unknown_path_says_where_the_known_ones_are() -> None:
    async def use(site: Site) -> Answer:
        return await site.ask("/v1/chat")

    answer = visit([web.get("/it", well)], use)

    assert answer.line == (404, "not_found_error", "no such path: /v1/chat (see /openapi.json for all paths)")
    assert answer.error["src"] == "gateway"


def test_a_wrong_method_is_told_the_right_one() -> None:
    async def use(site: Site) -> Answer:
        return await site.ask("/it", "DELETE")

    answer = visit([web.post("/it", well)], use)

    assert (answer.status, answer.headers["allow"]) == (405, "POST")
    assert answer.error["hint"] == "it allows POST"


def test_an_unexpected_exception_tells_the_log_and_not_the_client(caplog: pytest.LogCaptureFixture) -> None:
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
def test_errors_of_ours_have_a_status_and_say_who_failed(
    error: PromptAIError, status: int, src: str, message: str
) -> None:
    answer = asked(raising(error))

    assert (status, src, message) == (answer.status, answer.error["src"], answer.error["message"])


@pytest.mark.parametrize(
    ("status", "told", "after"),
    [(503, 40.0, "40"), (503, None, "2"), (429, 0.0, "2"), (429, 1.2, "2"), (500, 40.0, None), (400, 40.0, None)],
)
def test_who_met_only_busy_engines_is_told_when_to_come_back(
    status: int, told: float | None, after: str | None
) -> None:
    for body in (b"", b'{"error": {"message": "Loading model"}}'):
        answer = asked(raising(EngineRefusedError("busy", status=status, kind=None, body=body, retry_after_s=told)))

        assert answer.headers.get("retry-after") == after


def test_every_field_of_an_error_arrives() -> None:
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


def test_text_that_no_json_can_hold_is_replaced() -> None:
    assert msgspec.json.decode(ApiError(404, "no such path: /\udcff").body())["error"]["message"] == "no such path: /?"


@pytest.mark.parametrize(
    ("given", "kept"), [("abc-1._Z", True), ("a" * 65, False), ("two words", False), ("", False), ("ü", False)]
)
def test_a_plain_request_id_of_the_client_is_kept(given: str, *, kept: bool) -> None:
    answer = asked(well, headers={"X-Request-Id": given})

    assert kept == (answer.headers[ID] == given)
    assert answer.headers[ID] == answer.headers[OPENAI_ID] != ""


def test_redirections_are_no_errors() -> None:
    answer = asked(raising(web.HTTPFound("/there")), allow_redirects=False)

    assert (answer.status, answer.headers["location"]) == (302, "/there")


@pytest.mark.parametrize("error", [ApiError(503, "too late"), RuntimeError("too late")], ids=["ours", "unexpected"])
def test_a_stream_that_has_begun_is_broken_off_and_gets_no_second_head(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: 1\n\n")
        raise error

    async def use(site: Site) -> tuple[str, bytes]:
        async with site.client.get(f"http://127.0.0.1:{site.port}/it") as response:
            begun = response.headers[ID]
            found = await response.content.readline()
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.read()
            return begun, found

    begun, found = visit([web.get("/it", handler)], use)

    assert begun
    assert found == b"data: 1\n"
    assert [record.name for record in caplog.records] == ["promptai.gateway"]
    assert begun in caplog.text


@pytest.mark.parametrize(
    ("status", "answered"),
    [(400, 400), (401, 502), (403, 502), (404, 404), (422, 422), (429, 429), (500, 502), (501, 501), (503, 503)],
)
def test_an_engines_status_passes_unless_it_would_blame_the_wrong_one(status: int, answered: int) -> None:
    """A key that an engine refuses is the gateway's, and the gateway itself works when an engine does not."""
    body = b'{"error": {"code": 500, "type": "strange_error", "message": "no"}}'
    error = engine_refusal(status, body)

    assert (answered, "engine", "no") == (error.status, error.src, error.message)
    assert (error.type, error.code) == ("strange_error", 500)


def test_the_numbers_of_a_prompt_that_is_too_long_are_kept() -> None:
    told = {"type": "exceed_context_size_error", "message": "m", "n_prompt_tokens": 9, "n_ctx": 4}

    error = msgspec.json.decode(engine_refusal(400, msgspec.json.encode({"error": {"code": 400, **told}})).body())[
        "error"
    ]

    assert told == {name: error[name] for name in told}


@pytest.mark.parametrize(
    ("kind", "code", "answered"),
    [
        ("exceed_context_size_error", 400, "context_length_exceeded"),
        ("exceed_context_size_error", None, "context_length_exceeded"),
        ("exceed_context_size_error", "context_length_exceeded", "context_length_exceeded"),
        ("invalid_request_error", 400, 400),
        ("invalid_request_error", "invalid_prompt", "invalid_prompt"),
        (None, None, None),
    ],
)
def test_a_prompt_that_is_too_long_has_the_code_that_clients_compare(
    kind: str | None, code: int | str | None, answered: int | str | None
) -> None:
    """The same as where the gateway refuses it by its estimate; other codes are the engine's."""
    body = msgspec.json.encode({"error": {"type": kind, "code": code, "message": "m"}})

    assert engine_refusal(400, body).code == answered


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"\xff", b"[" * 5000, b'{"error": {"message": ""}}'])
def test_an_engine_that_says_nothing_readable_is_quoted_with_its_status(body: bytes) -> None:
    assert engine_refusal(500, body).message == "the engine answered HTTP 500 without a reason"


def test_another_gateways_hint_is_not_said_twice() -> None:
    there = ApiError(429, "the queue is full", hint="wait", param="model")

    here = msgspec.json.decode(engine_refusal(429, there.body()).body())["error"]

    assert (here["message"], here["param"]) == ("the queue is full (wait)", "model")


def test_each_status_has_a_type() -> None:
    kinds = {status: error_type(status) for status in (400, 401, 403, 404, 405, 408, 413, 429, 500, 502, 503, 504)}

    assert kinds == {
        400: "invalid_request_error",
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        405: "invalid_request_error",
        408: "timeout_error",
        413: "invalid_request_error",
        429: "rate_limit_error",
        500: "server_error",
        502: "server_error",
        503: "service_unavailable_error",
        504: "timeout_error",
    }
