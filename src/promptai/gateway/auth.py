"""Who may do what: API keys, their limits, and what a browser may not do.

Bound to loopback and without keys the gateway is open. As soon as there is a key (even a
revoked one, and even if the file is removed: neither must open the door), or when it is bound
wider, every request needs one.

An open gateway on loopback still has an enemy: a page in a browser on the same machine.
It reaches the gateway under a name of its own that resolves to loopback (then ``Host``
betrays it), or as a plain form that is sent without asking (then ``Origin`` does). Both are
refused. Pages of the origins in ``cors_origins`` are let in, and only they get CORS headers.

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
from promptai.gateway.keys import Key, KeyStore, Scope
from promptai.gateway.limits import KeyLimits, Meter, Refusal

_log = logging.getLogger("promptai.gateway")

#: Paths that need no key. The pages describe the gateway and hold nothing that is in it.
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
    Whoever makes a request; ``request[CALLER]``.

    Attributes:
        key_id: Names the queue in which it waits, and its limits; ``local`` where no key was needed.
        admin: Whether it may see and change what belongs to others.
    """

    key_id: str = "local"
    name: str = "local"
    limits: KeyLimits = KeyLimits()
    admin: bool = True

    def demand_model(self, model: str) -> None:
        """
        See that its key may use what is called so: a model, an alias or ``auto``.

        Raises:
            ApiError: 403; the key may not use that model.
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
    """The scope that a route (its pattern, not the path of a request) demands; ``None``: none."""
    if route in _OPEN:
        return None
    if route == "/metrics":
        return "metrics"
    # Another gateway reads from the fleet what it may send here; what only an administrator may see is left out of it.
    if route.startswith("/v1/") or route in {"/api/decide", "/api/fleet"}:
        return "infer"
    return "admin"


class Guard:
    """
    Decides on every request before its handler runs.

    Args:
        store: The keys; ``None``: there are none.
        open: Whether requests need no key as long as there has been none.
        bind: The address that the gateway is bound to.
        hosts: Further names under which a gateway on loopback may be called, behind a proxy for instance.
        cors_origins: Origins whose pages may use it (scheme, host, port); ``*``: all.
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
        self.meter = Meter()
        self._store = store
        self._open = open
        self._hosts = {name.lower() for name in (bind, *hosts)} if is_loopback(bind) else None
        self._origins = {origin.rstrip("/").lower() for origin in cors_origins}

    @web.middleware
    async def middleware(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Let a request in, with ``request[CALLER]``, or refuse it; comes right after the envelope."""
        self._demand_own_name(request)
        self._demand_own_page(request)
        if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
            return self._preflight(request)
        resource = request.match_info.route.resource
        scope = None if resource is None else scope_of(resource.canonical)
        request[CALLER] = caller = Caller(admin=False) if scope is None else self._admit(request, scope)
        if scope != "infer" or request.method in _SAFE_METHODS:
            return await handler(request)
        refusal = self.meter.begin(caller.key_id, caller.limits, asyncio.get_running_loop().time())
        if refusal is not None:
            raise _over_limit(refusal, caller.limits)
        try:
            return await handler(request)
        finally:
            self.meter.end(caller.key_id)

    def reserve(self, caller: Caller, tokens: int) -> None:
        """
        Set tokens of its key aside that a request will probably use; ``charge`` ends that.

        Raises:
            ApiError: 429; requests that came at the same time have taken what was left.
        """
        refusal = self.meter.reserve(caller.key_id, caller.limits, tokens, asyncio.get_running_loop().time())
        if refusal is not None:
            raise _over_limit(refusal, caller.limits)

    def charge(self, caller: Caller, tokens: int, *, reserved: int = 0) -> None:
        """Count tokens that a request used, prompt and generated, against its key, in place of those reserved."""
        now = asyncio.get_running_loop().time()
        self.meter.charge(caller.key_id, caller.limits, tokens, now, reserved=reserved)

    async def allow_origin(self, request: web.BaseRequest, response: web.StreamResponse) -> None:
        """Let a page of an allowed origin read the answer (``on_response_prepare``)."""
        if not self._origins:
            return
        response.headers["Vary"] = ", ".join(filter(None, (response.headers.get("Vary"), "Origin")))
        origin = request.headers.get("Origin")
        if origin is not None and self._allows(origin):
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = _EXPOSED

    def _admit(self, request: web.Request, scope: Scope) -> Caller:
        if self._store is not None:
            try:
                self._store.refresh(asyncio.get_running_loop().time())
            except SettingsError as error:
                _log.error("%s", error)
                raise ApiError(
                    503, "the gateway cannot read its API keys", code="keys_unreadable", hint="its log says why"
                ) from None
        if self._open and (self._store is None or not self._store.had_keys):
            return Caller()
        key = self._key_of(request)
        # Also of a request that is refused it is known whose it was.
        request[CALLER] = caller = Caller(key_id=key.id, name=key.name, limits=key.limits, admin=key.opens("admin"))
        if not key.opens(scope):
            raise ApiError(
                403,
                f"this API key has no scope {scope}",
                code="missing_scope",
                hint=f"it has {', '.join(key.scopes)}; promptai keys add --scope {scope} makes another",
            )
        return caller

    def _key_of(self, request: web.Request) -> Key:
        secret = _secret_in(request)
        if secret is None:
            raise _unauthorized("there is no API key in the request", 'Bearer realm="promptai"', "missing_api_key")
        key = None if self._store is None else self._store.find(secret)
        if key is None:
            challenge = 'Bearer realm="promptai", error="invalid_token"'
            raise _unauthorized("the API key is unknown or revoked", challenge, "invalid_api_key")
        return key

    def _demand_own_name(self, request: web.Request) -> None:
        host = request.headers.get("Host")
        if self._hosts is None or host is None:
            return
        name = host_name(host)
        if name not in self._hosts and not is_loopback(name):
            raise ApiError(
                403,
                "this gateway is bound to loopback and does not answer to that Host",
                code="host_not_allowed",
                hint="call it as localhost or 127.0.0.1",
            )

    def _demand_own_page(self, request: web.Request) -> None:
        origin = request.headers.get("Origin")
        if origin is None or request.method in {"GET", "HEAD"} or self._allows(origin):
            return
        if _authority(origin) != request.headers.get("Host", "").lower():
            raise ApiError(
                403,
                "pages of that origin may not use this gateway",
                code="origin_not_allowed",
                hint="name the origin in cors_origins",
            )

    def _allows(self, origin: str) -> bool:
        return "*" in self._origins or origin.lower() in self._origins

    def _preflight(self, request: web.Request) -> web.Response:
        """Answer a browser that asks first; the origin has been found good, the header of it comes when it is sent."""
        headers = {"Access-Control-Allow-Methods": "GET, POST, DELETE", "Access-Control-Max-Age": "600"}
        wanted = request.headers.get("Access-Control-Request-Headers", "")
        if _HEADER_NAMES.fullmatch(wanted):
            headers["Access-Control-Allow-Headers"] = wanted
        if request.headers.get("Access-Control-Request-Private-Network") == "true":
            headers["Access-Control-Allow-Private-Network"] = "true"
        return web.Response(status=204, headers=headers)


def is_loopback(host: str) -> bool:
    """Whether a name or address, without a port, is this machine and nothing else."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_name(host: str) -> str:
    """The name or address in a ``Host`` header, in lower case; empty where it is not well-formed."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]@/?#\s]+?)\.?)(?::[0-9]*)?", host)
    return "" if match is None else (match[1] or match[2]).lower()


def _authority(origin: str) -> str | None:
    """Host and port of an origin; ``None`` of what is none."""
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
        hint="send Authorization: Bearer pk-...; promptai keys add makes a key",
        headers={"WWW-Authenticate": challenge},
    )


def _over_limit(refusal: Refusal, limits: KeyLimits) -> ApiError:
    reached = {
        "requests": f"{limits.requests_per_min} requests a minute",
        "tokens": f"{limits.tokens_per_min} tokens a minute",
        "concurrent": f"{limits.concurrent} requests at once",
    }
    return ApiError(
        429,
        f"this API key is limited to {reached[refusal.reason]}",
        code="rate_limit_exceeded",
        hint=f"try again in {max(1, math.ceil(refusal.retry_after_s))} s",
        retry_after_s=refusal.retry_after_s,
    )
