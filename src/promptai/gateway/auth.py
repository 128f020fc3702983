"""Authenticate requests: API keys, their scopes and limits, and protection from web pages.

On loopback the gateway is open until a key exists. From then on every request needs a key, even after the key is
revoked or its file removed: neither may open the gateway again. On any other address every request needs one.

A web page in a browser on the same machine can attack an open gateway on loopback. It uses a host name of its own that
resolves to loopback, which the ``Host`` header reveals, or a plain form, which browsers send without a preflight and
the ``Origin`` header reveals. Both are refused. Pages of the origins in ``cors_origins`` are permitted, and only they
get CORS headers.

    guard = Guard(store, open=True, bind="127.0.0.1", cors_origins=settings.cors_origins)
    app = web.Application(middlewares=[envelope, guard.middleware])
    app.on_response_prepare.append(guard.allow_origin)
"""

import asyncio
import ipaddress
import logging
import math
import re
from collections.abc import Sequence
from urllib.parse import urlsplit

import msgspec
from aiohttp import web

from promptai.errors import SettingsError
from promptai.gateway.envelope import OPENAI_REQUEST_ID, REQUEST_ID, Handler
from promptai.gateway.errors import ApiError
from promptai.gateway.keys import ApiKey, KeyStore, Scope
from promptai.gateway.limits import KeyLimits, LimitReached, UsageMeter

_log = logging.getLogger("promptai.gateway")

#: Paths that need no key: probes, and pages that describe the API but contain no data of this gateway.
_OPEN = {"/", "/docs", "/healthz", "/readyz", "/openapi.json"}
_SAFE_METHODS = {"GET", "HEAD", "OPTIONS"}
_HEADER_NAMES = re.compile(r"[A-Za-z0-9-]{1,64}( *, *[A-Za-z0-9-]{1,64}){0,63}")
_EXPOSED = ", ".join(
    [
        REQUEST_ID,
        OPENAI_REQUEST_ID,
        *(f"x-promptai-{name}" for name in ("model", "replica", "route-reason", "cached-tokens", "queue-ms")),
        "Retry-After",
    ]
)


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """
    The client that makes a request; ``request[CALLER]``.

    Attributes:
        key_id: ID of its key, for fair queueing and limits; ``local`` if no key was needed.
        name: Name of its key.
        limits: Limits of its key.
        admin: Whether it may see and change what belongs to other keys.
    """

    key_id: str = "local"
    name: str = "local"
    limits: KeyLimits = KeyLimits()
    admin: bool = True

    def check_model(self, model: str) -> None:
        """
        Check that the key permits a model, an alias or ``auto``, by name.

        Raises:
            ApiError: 403; the key does not permit it.
        """
        if not self.limits.allow(model):
            raise ApiError(
                403,
                f"this API key may not use {model}",
                code="model_not_allowed",
                param="model",
                hint=f"it may use: {', '.join(self.limits.models or ()) or 'none'}",
            )


CALLER = web.RequestKey("caller", Caller)


def scope_of(route: str) -> Scope | None:
    """Return the scope that a route requires, given its pattern; ``None``: no key needed."""
    if route in _OPEN:
        return None
    if route == "/metrics":
        return "metrics"
    # Other gateways read /api/fleet to learn what they may send here; it omits data for administrators.
    if route.startswith("/v1/") or route in {"/api/decide", "/api/fleet"}:
        return "infer"
    return "admin"


class Guard:
    """
    Middleware that admits or refuses every request before its handler runs.

    Args:
        store: The keys; ``None``: no keys.
        open: Whether requests need no key until the first key exists.
        bind: The address that the gateway listens on.
        hosts: Further host names that a gateway on loopback accepts, for instance behind a proxy.
        cors_origins: Origins (scheme, host, port) whose pages may use the gateway; ``*``: all.
    """

    def __init__(
        self,
        store: KeyStore | None,
        *,
        open: bool,  # noqa: A002  the word that settings and messages use
        bind: str = "127.0.0.1",
        hosts: Sequence[str] = (),
        cors_origins: Sequence[str] = (),
    ) -> None:
        self.meter = UsageMeter()
        self._store = store
        self._open = open
        self._hosts = {name.lower() for name in (bind, *hosts)} if is_loopback(bind) else None
        self._origins = {origin.rstrip("/").lower() for origin in cors_origins}

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Set ``request[CALLER]``, or refuse the request; must run inside the envelope."""
        self._check_host(request)
        self._check_origin(request)
        if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
            return self._preflight(request)
        resource = request.match_info.route.resource
        scope = None if resource is None else scope_of(resource.canonical)
        request[CALLER] = caller = Caller(admin=False) if scope is None else self._authenticate(request, scope)
        if scope != "infer" or request.method in _SAFE_METHODS:
            return await handler(request)
        reached = self.meter.begin(caller.key_id, caller.limits, asyncio.get_running_loop().time())
        if reached is not None:
            raise _over_limit(reached, caller.limits)
        try:
            return await handler(request)
        finally:
            self.meter.end(caller.key_id)

    def reserve(self, caller: Caller, tokens: int) -> None:
        """
        Reserve the tokens that a request will probably use; ``charge`` ends the reservation.

        Raises:
            ApiError: 429; concurrent requests have used up the limit.
        """
        reached = self.meter.reserve(caller.key_id, caller.limits, tokens, asyncio.get_running_loop().time())
        if reached is not None:
            raise _over_limit(reached, caller.limits)

    def charge(self, caller: Caller, tokens: int, *, reserved: int = 0) -> None:
        """Charge the prompt and generated tokens of a request to its key, in place of the reserved ones."""
        now = asyncio.get_running_loop().time()
        self.meter.charge(caller.key_id, caller.limits, tokens, now, reserved=reserved)

    async def allow_origin(self, request: web.BaseRequest, response: web.StreamResponse) -> None:
        """Add CORS headers for a page of an allowed origin (``on_response_prepare``)."""
        if not self._origins:
            return
        response.headers["Vary"] = ", ".join(filter(None, (response.headers.get("Vary"), "Origin")))
        origin = request.headers.get("Origin")
        if origin is not None and self._allows(origin):
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = _EXPOSED

    def _authenticate(self, request: web.Request, scope: Scope) -> Caller:
        if self._store is not None:
            try:
                self._store.refresh(asyncio.get_running_loop().time())
            except SettingsError as error:
                _log.error("%s", error)
                raise ApiError(
                    503, "the gateway cannot read its API keys", code="keys_unreadable", hint="see its log"
                ) from None
        if self._open and (self._store is None or not self._store.had_keys):
            return Caller()
        key = self._find_key(request)
        # Set before the check: the access log names the key of a refused request, too.
        request[CALLER] = caller = Caller(key_id=key.id, name=key.name, limits=key.limits, admin=key.permits("admin"))
        if not key.permits(scope):
            raise ApiError(
                403,
                f"this API key does not have the scope {scope}",
                code="missing_scope",
                hint=f"it has {', '.join(key.scopes)}; create a key with promptai keys add NAME --scope {scope}",
            )
        return caller

    def _find_key(self, request: web.Request) -> ApiKey:
        secret = _secret_in(request)
        if secret is None:
            raise _unauthorized("the request has no API key", 'Bearer realm="promptai"', "missing_api_key")
        key = None if self._store is None else self._store.find(secret)
        if key is None:
            challenge = 'Bearer realm="promptai", error="invalid_token"'
            raise _unauthorized("the API key is unknown or revoked", challenge, "invalid_api_key")
        return key

    def _check_host(self, request: web.Request) -> None:
        host = request.headers.get("Host")
        if self._hosts is None or host is None:
            return
        name = host_name(host)
        if name not in self._hosts and not is_loopback(name):
            raise ApiError(
                403,
                "this Host is not allowed on a gateway bound to loopback",
                code="host_not_allowed",
                hint="use localhost or 127.0.0.1",
            )

    def _check_origin(self, request: web.Request) -> None:
        origin = request.headers.get("Origin")
        if origin is None or request.method in {"GET", "HEAD"} or self._allows(origin):
            return
        if _authority(origin) != request.headers.get("Host", "").lower():
            raise ApiError(
                403,
                "pages of this origin may not use the gateway",
                code="origin_not_allowed",
                hint="add the origin to cors_origins",
            )

    def _allows(self, origin: str) -> bool:
        return "*" in self._origins or origin.lower() in self._origins

    def _preflight(self, request: web.Request) -> web.Response:
        """Respond to a CORS preflight whose origin has been checked; ``allow_origin`` adds the origin's header."""
        headers = {"Access-Control-Allow-Methods": "GET, POST, DELETE", "Access-Control-Max-Age": "600"}
        wanted = request.headers.get("Access-Control-Request-Headers", "")
        if _HEADER_NAMES.fullmatch(wanted):
            headers["Access-Control-Allow-Headers"] = wanted
        if request.headers.get("Access-Control-Request-Private-Network") == "true":
            headers["Access-Control-Allow-Private-Network"] = "true"
        return web.Response(status=204, headers=headers)


def is_loopback(host: str) -> bool:
    """Whether a host name or address, without a port, is loopback."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_name(host: str) -> str:
    """Return the name or address in a ``Host`` header in lower case; empty if the header is malformed."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]@/?#\s]+?)\.?)(?::[0-9]*)?", host)
    return "" if match is None else (match[1] or match[2]).lower()


def _authority(origin: str) -> str | None:
    """Return host and port of an origin; ``None``: malformed."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


def _secret_in(request: web.Request) -> str | None:
    kind, _, token = request.headers.get("Authorization", "").partition(" ")
    if kind.lower() == "bearer" and token.strip():
        return token.strip()
    return request.headers.get("x-api-key") or None


def _unauthorized(message: str, challenge: str, code: str) -> ApiError:
    return ApiError(
        401,
        message,
        code=code,
        hint="send Authorization: Bearer pk-...; create a key with promptai keys add NAME",
        headers={"WWW-Authenticate": challenge},
    )


def _over_limit(reached: LimitReached, limits: KeyLimits) -> ApiError:
    texts = {
        "requests": f"{limits.requests_per_min} requests per minute",
        "tokens": f"{limits.tokens_per_min} tokens per minute",
        "concurrent": f"{limits.concurrent} concurrent requests",
    }
    return ApiError(
        429,
        f"this API key is limited to {texts[reached.limit]}",
        code="rate_limit_exceeded",
        hint=f"try again in {max(1, math.ceil(reached.retry_after_s))} s",
        retry_after_s=reached.retry_after_s,
    )
