"""Convert every error to an HTTP status in OpenAI's envelope; the only map between the two.

Clients read ``error.message`` and nothing else, so the message includes the advice; ``src`` names the side that
failed, ``gateway`` or ``engine``; ``hint`` repeats the advice alone.

    {"error": {"message", "type", "param", "code", "src", "hint"}}

Every class of ``promptai.errors`` has an entry in ``_BY_CLASS``; a test fails for a class without one.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from aiohttp import web

from promptai import errors
from promptai.errors import PromptAIError
from promptai.wire.malformed import MALFORMED
from promptai.wire.openai import error_in

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
#: Longer than any message written for people; cuts an engine's HTML page.
_MAX_MESSAGE_CHARS = 2000
#: Retry-After of a busy engine that sends none: the first cooldown of ``router.estimate.breaker``.
_BUSY_S = 2.0
#: llama-server's ``type`` for a prompt that is too long, and OpenAI's ``code`` for it, which clients compare.
_TOO_LONG, _TOO_LONG_CODE = "exceed_context_size_error", "context_length_exceeded"


class ApiError(Exception):
    """
    An error as the client receives it.

    Attributes:
        status: HTTP status.
        message: What happened, to what.
        type: OpenAI's ``type``; derived from the status unless given.
        code: A word that programs compare; an engine's may be a number.
        param: The wrong field of the request.
        src: The side that failed: ``gateway`` or ``engine``.
        hint: What to do next.
        retry_after_s: Sent as ``Retry-After``; ``None``: not sent.
        headers: Further response headers.
        details: Further fields of the error, such as llama-server's ``n_ctx``.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,  # noqa: A002  OpenAI's name
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
        self.type = type or error_type(status)
        self.code = code
        self.param = param
        self.src = src
        self.hint = hint
        self.retry_after_s = retry_after_s
        self.headers = dict(headers or {})
        self.details = dict(details or {})

    def body(self) -> bytes:
        """Return the envelope as JSON, for a response or an event of a stream that has begun."""
        message = f"{self.message} ({self.hint})" if self.hint else self.message
        error = {
            **self.details,
            "message": _encodable(message),
            "type": self.type,
            "param": self.param,
            "code": self.code,
            "src": self.src,
            "hint": _encodable(self.hint),
        }
        return msgspec.json.encode({"error": error})

    def response(self) -> web.Response:
        """Return the complete HTTP response."""
        headers = dict(self.headers)
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        return web.Response(status=self.status, body=self.body(), content_type="application/json", headers=headers)


def error_type(status: int) -> str:
    """Return OpenAI's ``type`` for an HTTP status."""
    return _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")


def api_error(error: PromptAIError | ApiError) -> ApiError:
    """Return ``error`` as the client receives it."""
    if isinstance(error, ApiError):
        return error
    return next(_BY_CLASS[cls] for cls in type(error).__mro__ if cls in _BY_CLASS)(error)


def engine_refusal(status: int, body: bytes) -> ApiError:
    """
    Return an engine's error response as the gateway passes it on.

    4xx, 501 and 503 keep their status. Other 5xx become 502, since the gateway itself works. So do 401, 403 and 407,
    since the engine refused the gateway's key, not the client's. A prompt that is too long gets OpenAI's code for it,
    whether the gateway or the engine detects it.
    """
    reported = error_in(body)
    passed = status in {501, 503} or (400 <= status < 500 and status not in {401, 403, 407})
    answered = status if passed else 502
    if reported is None or not reported.message:
        return ApiError(answered, f"the engine answered HTTP {status} without a reason", src="engine")
    numbers = {"n_prompt_tokens": reported.n_prompt_tokens, "n_ctx": reported.n_ctx}
    param, hint = _param_and_hint(body)
    return ApiError(
        answered,
        reported.message[:_MAX_MESSAGE_CHARS],
        type=reported.type or error_type(answered),
        code=_TOO_LONG_CODE if reported.type == _TOO_LONG else reported.code,
        param=param,
        src="engine",
        # The message of another gateway ends with its hint.
        hint="" if hint and hint in reported.message else hint,
        details={name: number for name, number in numbers.items() if number is not None},
    )


def _fixed(status: int, *, src: str = "gateway", code: str | None = None, param: str | None = None) -> "_Convert":
    return lambda error: ApiError(status, error.message, hint=error.hint, src=src, code=code, param=param)


def _engine_refused(error: errors.EngineRefusedError) -> ApiError:
    refusal = engine_refusal(error.status or 502, error.body)
    if error_in(error.body) is None:
        refusal = ApiError(refusal.status, error.message, type=error.kind, src="engine", hint=error.hint)
    if refusal.status in {429, 503}:
        refusal.retry_after_s = error.retry_after_s or _BUSY_S
    return refusal


def _saturated(error: errors.SaturatedError) -> ApiError:
    return ApiError(429, error.message, code="saturated", hint=error.hint, retry_after_s=error.retry_after_s)


def _no_capacity(error: errors.NoCapacityError) -> ApiError:
    return ApiError(503, error.message, code="no_capacity", hint=error.hint, retry_after_s=error.retry_after_s)


def _request_refused(error: errors.RequestRefusedError) -> ApiError:
    return ApiError(error.status, error.message, code=error.code, param=error.param, hint=error.hint)


_Convert = Callable[[Any], ApiError]
_BY_CLASS: dict[type[BaseException], _Convert] = {
    errors.PromptAIError: _fixed(500),
    errors.SettingsError: _fixed(500),
    errors.ModelError: _fixed(500),
    errors.ModelNotFoundError: _fixed(404, code="model_not_found", param="model"),
    errors.ModelFormatError: _fixed(500),
    errors.ModelTooLargeError: _fixed(500),
    errors.ModelChecksumError: _fixed(500),
    errors.LibraryError: _fixed(500),
    errors.EngineError: _fixed(503, src="engine"),
    errors.EngineNotFoundError: _fixed(503, src="engine"),
    errors.EngineStartError: _fixed(503, src="engine"),
    errors.EngineDiedError: _fixed(502, src="engine"),
    errors.EngineRefusedError: _engine_refused,
    errors.EngineProtocolError: _fixed(502, src="engine"),
    errors.WorkloadError: _fixed(500),
    errors.RunError: _fixed(500),
    errors.HubError: _fixed(500),
    errors.HubNotFoundError: _fixed(500),
    errors.HubGatedError: _fixed(500),
    errors.HubUnreachableError: _fixed(500),
    errors.RoutingError: _fixed(500),
    errors.SaturatedError: _saturated,
    errors.NoCapacityError: _no_capacity,
    errors.RequestRefusedError: _request_refused,
    errors.BrokenOffError: _fixed(502, src="engine", code="broken_off"),
}


def _encodable(text: str) -> str:
    """Replace lone surrogates, which a path may contain but JSON cannot."""
    return text.encode("utf-8", "replace").decode()


def _param_and_hint(body: bytes) -> tuple[str | None, str]:
    """Return ``param`` and ``hint``, which only another gateway sends."""
    try:
        error = msgspec.json.decode(body, type=dict[str, Any]).get("error")
    except MALFORMED:
        return None, ""
    param, hint = (error.get("param"), error.get("hint")) if isinstance(error, dict) else (None, None)
    return (param if isinstance(param, str) else None), (hint if isinstance(hint, str) else "")
