"""Put every error response into OpenAI's envelope, including aiohttp's own.

aiohttp rejects some requests before any handler sees them: malformed HTTP, endless headers, an unknown ``Expect``. Its
responses quote the line it could not read, which may contain the API key. ``EnvelopeRunner`` sends the envelope there,
too, without the quotation.

    app = web.Application(middlewares=[envelope, guard.middleware])
    app.on_response_prepare.append(stamp)
    runner = EnvelopeRunner(app, handler_cancellation=True)
"""

import http
import logging
import re
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import http_exceptions, web

from promptai.errors import PromptAIError
from promptai.gateway.errors import ApiError, api_error

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

REQUEST_ID = "x-promptai-request-id"
#: The same id under the name that OpenAI's clients read.
OPENAI_REQUEST_ID = "x-request-id"

_log = logging.getLogger("promptai.gateway")

_PLAIN_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_STARTED = web.RequestKey("response_started", bool)
_ID = web.RequestKey("request_id", str)
#: Headers that describe the body that the envelope replaces.
_BODY_HEADERS = {"content-type", "content-length", "content-encoding", "transfer-encoding"}


def request_id(request: web.BaseRequest) -> str:
    """Return the request's id for responses and logs: the client's ``X-Request-Id`` if it is plain, else a new one."""
    known: str | None = request.get(_ID)
    if known is not None:
        return known
    given = request.headers.get("X-Request-Id", "")
    request[_ID] = chosen = given if _PLAIN_ID.fullmatch(given) else secrets.token_hex(8)
    return chosen


async def stamp(request: web.BaseRequest, response: web.StreamResponse) -> None:
    """Add the request id to a response, and record that the response has started (``on_response_prepare``)."""
    request[_STARTED] = True
    _with_id(request, response)


@web.middleware
async def envelope(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Convert every exception of a handler into the envelope; must be the first middleware."""
    try:
        return await handler(request)
    except Exception as error:  # noqa: BLE001  the border: no exception may reach a client in another shape
        return _error_response(request, error)


class EnvelopeRunner(web.AppRunner):
    """``web.AppRunner`` that sends the envelope for requests that reach no handler, too."""

    __slots__ = ()

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        assert made is not None  # noqa: S101  as its annotation states
        handle = made.request_handler

        async def enveloped(request: web.BaseRequest) -> web.StreamResponse:
            # aiohttp refuses an unknown Expect before the middlewares run.
            try:
                return await handle(request)
            except web.HTTPException as error:
                return _with_id(request, _error_response(request, error))

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
        """Respond to malformed HTTP; never calls the inherited method, which logs and quotes the input."""
        del message
        if request.get(_STARTED) or request.writer.output_size > 0 or isinstance(exc, ConnectionError):
            raise ConnectionResetError("the client is gone, or a response has started")
        if status < 500:
            _log.debug("malformed request from %s: %s", request.remote, type(exc).__name__)
            error = _malformed_http(exc)
        else:
            _log.error("request %s failed outside its handler", request_id(request), exc_info=exc)
            error = _internal_error(request)
        response = _with_id(request, error.response())
        response.force_close()
        return response

    def log_exception(self, *args: Any, **kw: Any) -> None:
        """Log a failure, except for a malformed rest of a body that is only read to be discarded."""
        if isinstance(kw.get("exc_info"), web.RequestPayloadError):
            _log.debug("the rest of a request body is not encoded as its headers declare")
        else:
            super().log_exception(*args, **kw)


def _error_response(request: web.Request | web.BaseRequest, error: Exception) -> web.StreamResponse:
    """Return the response for a handler's exception; raises if it is too late for one."""
    if isinstance(error, web.HTTPException) and error.status < 400:
        raise error
    known = _known_error(request, error)
    if known is None and isinstance(error, ConnectionError) and _disconnected(request):
        raise error
    if known is None:
        target = getattr(request, "rel_url", None)
        _log.error("request %s: %s %a failed", request_id(request), request.method, str(target), exc_info=error)
    if request.get(_STARTED):
        if known is not None:
            _log.warning("request %s broke off: %s", request_id(request), known)
        # The status has been sent. Only closing the connection shows the client that the rest is missing.
        raise ConnectionResetError("the response broke off") from error
    response = (known or _internal_error(request)).response()
    # After an incomplete or malformed body, the start of the next request on the connection is unknown.
    if response.status in {408, 413} or request.content.exception() is not None:
        response.force_close()
    return response


def _known_error(request: web.BaseRequest, error: Exception) -> ApiError | None:
    if isinstance(error, ApiError | PromptAIError):
        return api_error(error)
    if isinstance(error, web.HTTPException):
        return _aiohttp_error(request, error)
    return None


def _aiohttp_error(request: web.BaseRequest, error: web.HTTPException) -> ApiError:
    headers = {name: value for name, value in error.headers.items() if name.lower() not in _BODY_HEADERS}
    path = request.path[:200]
    if error.status == 404:
        return ApiError(404, f"no such path: {path}", code="unknown_url", hint="see /openapi.json for all paths")
    if error.status == 405:
        return ApiError(
            405,
            f"{path} does not allow {request.method}",
            code="method_not_allowed",
            hint=f"it allows {headers.get('Allow', 'another method')}",
            headers=headers,
        )
    if error.status == 413:
        return ApiError(413, "the request is too large", code="request_too_large", hint="send less", headers=headers)
    return ApiError(error.status, error.reason or http.HTTPStatus(error.status).phrase, headers=headers)


def _malformed_http(error: BaseException | None) -> ApiError:
    if isinstance(error, http_exceptions.LineTooLong) or "Too many headers" in str(error):
        return ApiError(431, "the request line or a header is too long", code="headers_too_large", hint="shorten them")
    return ApiError(400, "malformed HTTP request", code="bad_http", hint="use http:// and HTTP/1.1")


def _internal_error(request: web.BaseRequest) -> ApiError:
    return ApiError(
        500,
        "internal error of the gateway",
        code="internal_error",
        hint=f"see request {request_id(request)} in its log",
    )


def _with_id(request: web.BaseRequest, response: web.StreamResponse) -> web.StreamResponse:
    response.headers[REQUEST_ID] = response.headers[OPENAI_REQUEST_ID] = request_id(request)
    return response


def _disconnected(request: web.BaseRequest) -> bool:
    return request.transport is None or request.transport.is_closing()
