"""One shape for every error that leaves the gateway: OpenAI's, and who failed, and what to do.

Clients read ``error.message`` and nothing else, so the message says what to do as well;
``src`` tells whether the gateway or an engine failed, ``hint`` repeats the advice alone.

    {"error": {"message", "type", "param", "code", "src", "hint"}}

aiohttp answers some requests before any handler of an application sees them: broken HTTP,
headers without end, an unknown ``Expect``. Its answers quote the line that it could not
read, and that line may be the one with the key. ``EnvelopeRunner`` gives the envelope there too,
without the quotation.

    app = web.Application(middlewares=[envelope, guard.middleware])
    app.on_response_prepare.append(stamp)
    runner = Runner(app, handler_cancellation=True)
"""

import http
import logging
import math
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec
from aiohttp import http_exceptions, web

from promptai.errors import (
    EngineDiedError,
    EngineError,
    EngineProtocolError,
    EngineRefusedError,
    ModelNotFoundError,
    PromptAIError,
)
from promptai.wire.malformed import MALFORMED
from promptai.wire.openai import error_in

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

REQUEST_ID = "x-promptai-request-id"
#: The same, under the name that clients made for OpenAI read.
OPENAI_REQUEST_ID = "x-request-id"

_log = logging.getLogger("promptai.gateway")

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
_PLAIN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_BEGUN = web.RequestKey("begun", bool)
_ID = web.RequestKey("request_id", str)
#: Longer than any error that a person reads; an engine that answers a page of HTML is cut.
_MESSAGE_CHARS = 2000
#: Pause after HTTP 503 or 429 without ``Retry-After``: the same as the first cooldown in ``router.estimate.breaker``.
_BUSY_S = 2.0
#: llama-server's ``type`` of a prompt that is too long, and OpenAI's ``code`` of it, which clients compare.
_TOO_LONG, _TOO_LONG_CODE = "exceed_context_size_error", "context_length_exceeded"
#: Headers that describe the body that the envelope replaces.
_OF_THE_BODY = {"content-type", "content-length", "content-encoding", "transfer-encoding"}


def kind_of(status: int) -> str:
    """OpenAI's ``type`` of an error with that HTTP status."""
    return _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")


class ApiError(Exception):
    """
    An error as a client sees it.

    Attributes:
        status: HTTP status.
        message: What happened, to what.
        kind: OpenAI's ``type``; absent: by the status.
        code: A word that a program can compare; an engine's may be a number.
        param: The field of the request that is wrong.
        src: Who failed: ``gateway`` or ``engine``.
        hint: What to do next.
        retry_after_s: When trying again makes sense; becomes ``Retry-After``.
        headers: Further headers of the answer.
        details: Further fields of the error, such as llama-server's ``n_ctx``.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str | None = None,
        code: str | int | None = None,
        param: str | None = None,
        src: str = "gateway",
        hint: str = "",
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind or kind_of(status)
        self.code = code
        self.param = param
        self.src = src
        self.hint = hint
        self.retry_after_s = retry_after_s
        self.headers = dict(headers or {})
        self.details = dict(details or {})

    def body(self) -> bytes:
        """The envelope, as JSON; also what goes into a stream that has begun."""
        message = f"{self.message} ({self.hint})" if self.hint else self.message
        error = {
            **self.details,
            "message": _encodable(message),
            "type": self.kind,
            "param": self.param,
            "code": self.code,
            "src": self.src,
            "hint": _encodable(self.hint),
        }
        return msgspec.json.encode({"error": error})

    def response(self) -> web.Response:
        """The whole answer."""
        headers = dict(self.headers)
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        return web.Response(status=self.status, body=self.body(), content_type="application/json", headers=headers)


def from_engine(status: int, body: bytes) -> ApiError:
    """
    What an engine answered, as the gateway passes it on.

    Its 4xx, 501 and 503 keep their status. Other 5xx become 502: the gateway itself works. So do 401 and 403,
    because the key that an engine refused is the gateway's, not the client's. A prompt that is too long
    has the code that OpenAI gives it, whether the gateway or the engine found it out.
    """
    told = error_in(body)
    passed = status in {501, 503} or (400 <= status < 500 and status not in {401, 403, 407})
    answered = status if passed else 502
    if told is None or not told.message:
        return ApiError(answered, f"the engine answered HTTP {status} without a reason", src="engine")
    numbers = {"n_prompt_tokens": told.n_prompt_tokens, "n_ctx": told.n_ctx}
    param, hint = _words_in(body)
    return ApiError(
        answered,
        told.message[:_MESSAGE_CHARS],
        kind=told.type or kind_of(answered),
        code=_TOO_LONG_CODE if told.type == _TOO_LONG else told.code,
        param=param,
        src="engine",
        # Another gateway's message ends with its hint already.
        hint="" if hint and hint in told.message else hint,
        details={name: number for name, number in numbers.items() if number is not None},
    )


def from_error(error: PromptAIError) -> ApiError:
    """One of our own errors, as a client sees it."""
    if isinstance(error, EngineRefusedError):
        refusal = from_engine(error.status or 502, error.body)
        if error_in(error.body) is None:
            refusal = ApiError(refusal.status, error.message, kind=error.kind, src="engine", hint=error.hint)
        if refusal.status in {429, 503}:
            refusal.retry_after_s = error.retry_after_s or _BUSY_S
        return refusal
    if isinstance(error, EngineDiedError | EngineProtocolError):
        return _plain(502, error, "engine")
    if isinstance(error, EngineError):
        return _plain(503, error, "engine")
    if isinstance(error, ModelNotFoundError):
        return _plain(404, error, "gateway", code="model_not_found", param="model")
    return _plain(500, error, "gateway")


def request_id(request: web.BaseRequest) -> str:
    """The request's name in answers and logs: the client's ``X-Request-Id`` where it is plain, else our own."""
    known: str | None = request.get(_ID)
    if known is not None:
        return known
    given = request.headers.get("X-Request-Id", "")
    request[_ID] = chosen = given if _PLAIN_ID.fullmatch(given) else secrets.token_hex(8)
    return chosen


async def stamp(request: web.BaseRequest, response: web.StreamResponse) -> None:
    """Name the request in the head of its answer, and note that the answer has begun (``on_response_prepare``)."""
    request[_BEGUN] = True
    _named(request, response)


@web.middleware
async def envelope(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn whatever a handler raises into the envelope; comes first of the middlewares."""
    try:
        return await handler(request)
    except Exception as error:  # noqa: BLE001  nothing may reach a client in another shape
        return _answer(request, error)


class EnvelopeRunner(web.AppRunner):
    """``web.AppRunner`` that answers in the envelope where no handler was reached, too."""

    __slots__ = ()

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        assert made is not None  # noqa: S101  as its annotation says
        handle = made.request_handler

        async def enveloped(request: web.BaseRequest) -> web.StreamResponse:
            # An unknown Expect is refused before the middlewares run.
            try:
                return await handle(request)
            except web.HTTPException as error:
                return _named(request, _answer(request, error))

        return _Server(
            enveloped,
            request_factory=made.request_factory,
            handler_cancellation=made.handler_cancellation,
            **made._kwargs,  # noqa: SLF001  aiohttp has no public way to choose its protocol
        )


class _Server(web.Server):
    def __call__(self) -> web.RequestHandler:
        return _Protocol(self, loop=self._loop, **self._kwargs)


class _Protocol(web.RequestHandler):
    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what could not be read as HTTP; never calls the inherited one, which logs and quotes it."""
        del message
        if request.get(_BEGUN) or request.writer.output_size > 0 or isinstance(exc, ConnectionError):
            raise ConnectionResetError("nobody is there for an answer, or one has begun")
        if status < 500:
            _log.debug("unreadable request from %s: %s", request.remote, type(exc).__name__)
            error = _unreadable(exc)
        else:
            _log.error("request %s failed outside its handler", request_id(request), exc_info=exc)
            error = _unexpected(request)
        response = _named(request, error.response())
        response.force_close()
        return response

    def log_exception(self, *args: Any, **kw: Any) -> None:
        """Log a failure; not that the rest of a body, read only to be thrown away after the answer, is broken."""
        if isinstance(kw.get("exc_info"), web.RequestPayloadError):
            _log.debug("the body behind an answer is not encoded as its headers say")
        else:
            super().log_exception(*args, **kw)


def _answer(request: web.Request | web.BaseRequest, error: Exception) -> web.StreamResponse:
    """The answer to what a handler raised; raises where there can be none any more."""
    if isinstance(error, web.HTTPException) and error.status < 400:
        raise error
    known = _known(request, error)
    if known is None and isinstance(error, ConnectionError) and _gone(request):
        raise error
    if known is None:
        target = getattr(request, "rel_url", None)
        _log.error("request %s: %s %a failed", request_id(request), request.method, str(target), exc_info=error)
    if request.get(_BEGUN):
        if known is not None:
            _log.warning("request %s broke off: %s", request_id(request), known)
        # Its status has gone out. Breaking the connection is the one way left to say that the rest is missing.
        raise ConnectionResetError("the answer broke off") from error
    response = (known or _unexpected(request)).response()
    # Where a body is broken or has not come to its end, nobody knows where the next request begins.
    if response.status in {408, 413} or request.content.exception() is not None:
        response.force_close()
    return response


def _known(request: web.BaseRequest, error: Exception) -> ApiError | None:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, PromptAIError):
        return from_error(error)
    if isinstance(error, web.HTTPException):
        return _from_aiohttp(request, error)
    return None


def _from_aiohttp(request: web.BaseRequest, error: web.HTTPException) -> ApiError:
    headers = {name: value for name, value in error.headers.items() if name.lower() not in _OF_THE_BODY}
    path = request.path[:200]
    if error.status == 404:
        return ApiError(404, f"there is no {path}", code="unknown_url", hint="/openapi.json lists what there is")
    if error.status == 405:
        return ApiError(
            405,
            f"{path} does not take {request.method}",
            code="method_not_allowed",
            hint=f"it takes {headers.get('Allow', 'another method')}",
            headers=headers,
        )
    if error.status == 413:
        return ApiError(413, "the request is too large", code="request_too_large", hint="send less", headers=headers)
    return ApiError(error.status, error.reason or http.HTTPStatus(error.status).phrase, headers=headers)


def _unreadable(error: BaseException | None) -> ApiError:
    if isinstance(error, http_exceptions.LineTooLong) or "Too many headers" in str(error):
        return ApiError(431, "the request line or a header is too long", code="headers_too_large", hint="shorten them")
    return ApiError(400, "that is not well-formed HTTP", code="bad_http", hint="http:// and HTTP/1.1 are spoken here")


def _unexpected(request: web.BaseRequest) -> ApiError:
    return ApiError(
        500,
        "something went wrong inside the gateway",
        code="internal_error",
        hint=f"its log tells more about request {request_id(request)}",
    )


def _plain(
    status: int, error: PromptAIError, src: str, *, code: str | None = None, param: str | None = None
) -> ApiError:
    return ApiError(status, error.message, hint=error.hint, src=src, code=code, param=param)


def _named(request: web.BaseRequest, response: web.StreamResponse) -> web.StreamResponse:
    response.headers[REQUEST_ID] = response.headers[OPENAI_REQUEST_ID] = request_id(request)
    return response


def _gone(request: web.BaseRequest) -> bool:
    return request.transport is None or request.transport.is_closing()


def _encodable(text: str) -> str:
    """A path may hold lone surrogates, which no JSON can."""
    return text.encode("utf-8", "replace").decode()


def _words_in(body: bytes) -> tuple[str | None, str]:
    """``param`` and ``hint``, which only another gateway sends."""
    try:
        error = msgspec.json.decode(body, type=dict[str, Any]).get("error")
    except MALFORMED:
        return None, ""
    param, hint = (error.get("param"), error.get("hint")) if isinstance(error, dict) else (None, None)
    return (param if isinstance(param, str) else None), (hint if isinstance(hint, str) else "")
