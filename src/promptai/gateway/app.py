"""The gateway as an HTTP application: its routes, and the life of a request from socket to engine and back.

    envelope ─▶ guard ─────▶ handler ─▶ admission ─▶ RoutedRequest ─▶ streaming
    (errors)    (key, its    (here)     (model,      (router: slot,   (response)
                 limits)                 context)     attempts)

``gateway.server`` listens, this module does not. One process suffices, since relaying a few hundred streams leaves it
mostly idle; so all that it knows of the fleet is in one place.
"""

import asyncio
import logging
from collections.abc import Iterable
from typing import Any

import msgspec
from aiohttp import web

from promptai.engine.upstream import Upstream
from promptai.errors import PromptAIError
from promptai.fleet.replica import Replica
from promptai.gateway import openapi
from promptai.gateway.accounting import charged_tokens, observe, request_record, write_access_line
from promptai.gateway.admission import Admission, AdmissionRules, AdmittedRequest, path_for
from promptai.gateway.auth import CALLER, Caller, Guard
from promptai.gateway.body import read_json
from promptai.gateway.envelope import Handler, envelope, request_id, stamp
from promptai.gateway.errors import ApiError, api_error
from promptai.gateway.metrics import FleetSample, Metrics, ReplicaSample, RequestRecord
from promptai.gateway.streaming import Heartbeat, respond, route_headers, stream
from promptai.gateway.views import fleet_view, models_view, queue_view
from promptai.router.schedule.dispatcher import Dispatcher

_log = logging.getLogger("promptai.gateway")

#: The request was admitted; ``_infer`` records its end.
_ADMITTED = web.RequestKey("admitted", bool)
_CLIENT_DISCONNECTED, _INTERNAL_ERROR = 499, 500
_RETRY_WHEN_DRAINING_S = 10.0


class GatewayLimits(msgspec.Struct, frozen=True, kw_only=True):
    """
    Bounds of one request.

    Attributes:
        body_bytes: Largest body.
        body_s: Longest time for the body to arrive.
    """

    body_bytes: int = 16 * 1024 * 1024
    body_s: float = 30.0


class Gateway:
    """
    One gateway.

    Args:
        dispatcher: Queues and slots.
        upstream: Sends requests to engines.
        guard: Checks keys and limits.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        upstream: Upstream,
        guard: Guard,
        *,
        rules: AdmissionRules | None = None,
        heartbeat: Heartbeat | None = None,
        limits: GatewayLimits | None = None,
    ) -> None:
        self.admission = Admission(dispatcher, upstream, rules)
        self.metrics = Metrics(self._sample)
        self.draining = False
        self._dispatcher = dispatcher
        self._guard = guard
        self._heartbeat = heartbeat or Heartbeat()
        self._limits = limits or GatewayLimits()
        self._open = 0
        self._idle = asyncio.Event()
        self._idle.set()
        dispatcher.fleet_state.fleet.subscribe(lambda snapshot: self._set_members(snapshot.replicas))
        self._set_members(dispatcher.fleet_state.fleet.snapshot.replicas)

    def application(self) -> web.Application:
        """Return the application; run it with ``EnvelopeRunner`` and ``handler_cancellation``."""
        app = web.Application(
            middlewares=[envelope, self._record_refusals, self._guard.middleware],
            client_max_size=self._limits.body_bytes,
        )
        app.on_response_prepare.append(stamp)
        app.on_response_prepare.append(self._guard.allow_origin)
        app.add_routes(
            [
                web.post("/v1/chat/completions", self._infer),
                web.post("/v1/completions", self._infer),
                web.post("/v1/embeddings", self._infer),
                web.get("/v1/models", self._models),
                web.get("/v1/models/{model:.+}", self._model),
                web.get("/api/fleet", self._fleet),
                web.get("/api/queue", self._queue),
                web.post("/api/decide", self._decide),
                web.get("/healthz", _healthy),
                web.get("/readyz", self._ready),
                web.get("/metrics", self._metrics_page),
                web.get("/openapi.json", _openapi),
                web.get("/docs", _docs),
                web.get("/", _docs),
            ]
        )
        return app

    async def drain(self, limit_s: float) -> None:
        """Refuse new requests, and wait at most ``limit_s`` seconds for the current ones to end."""
        self.draining = True
        try:
            async with asyncio.timeout(limit_s):
                await self._idle.wait()
        except TimeoutError:
            _log.warning("%d requests were still running after %g s", self._open, limit_s)

    @property
    def open_requests(self) -> int:
        """Number of admitted requests that have not ended."""
        return self._open

    async def _infer(self, request: web.Request) -> web.StreamResponse:
        self._refuse_when_draining()
        caller: Caller = request[CALLER]
        body = await read_json(request, limit_bytes=self._limits.body_bytes, limit_s=self._limits.body_s)
        self._refuse_when_draining()
        arrived = asyncio.get_running_loop().time()
        admitted = self.admission.admit(request.path, body, request.headers, caller)
        self._guard.reserve(caller, admitted.tokens)
        request[_ADMITTED] = True
        self._open += 1
        self._idle.clear()
        status = _CLIENT_DISCONNECTED
        try:
            if admitted.fields.stream and request.path != "/v1/embeddings":
                response, status = await stream(request, admitted, self._heartbeat)
                return response
            response = await respond(admitted)
            status = response.status
            return response
        except (ApiError, PromptAIError) as error:
            failure = api_error(error)
            status = failure.status
            failure.headers = {**route_headers(admitted), **failure.headers}
            raise failure from None
        except ConnectionError:
            raise
        except Exception:
            status = _INTERNAL_ERROR  # the envelope answers and logs it
            raise
        finally:
            self._record_end(request, caller, admitted, status, arrived)

    def _refuse_when_draining(self) -> None:
        if self.draining:
            raise ApiError(503, "the gateway is shutting down", code="draining", retry_after_s=_RETRY_WHEN_DRAINING_S)

    @web.middleware
    async def _record_refusals(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Record requests that fail in the guard or before they are admitted; runs before the guard."""
        arrived = asyncio.get_running_loop().time()
        try:
            return await handler(request)
        except (ApiError, PromptAIError) as error:
            self._record_refusal(request, api_error(error).status, arrived)
            raise
        except (ConnectionError, web.HTTPException):
            raise
        except Exception:
            self._record_refusal(request, _INTERNAL_ERROR, arrived)
            raise

    def _record_refusal(self, request: web.Request, status: int, arrived: float) -> None:
        if request.match_info.handler != self._infer or _ADMITTED in request:
            return
        record = RequestRecord(model="", replica="", status=status)
        self.metrics.observe_request(record)
        # Without a caller the request had no valid key; an invalid one must not be logged.
        caller = request.get(CALLER)
        key = "-" if caller is None else caller.key_id
        total_s = asyncio.get_running_loop().time() - arrived
        write_access_line(request_id(request), key, request.path, record, total_s)

    def _record_end(
        self, request: web.Request, caller: Caller, admitted: AdmittedRequest, status: int, arrived: float
    ) -> None:
        self._open -= 1
        if not self._open:
            self._idle.set()
        record = request_record(admitted, status, arrived)
        observe(self.metrics, admitted, record)
        self._guard.charge(caller, charged_tokens(admitted, record), reserved=admitted.tokens)
        total_s = asyncio.get_running_loop().time() - arrived
        write_access_line(request_id(request), caller.key_id, request.path, record, total_s)

    def _sample(self) -> FleetSample:
        fleet_state, snapshot = self._dispatcher.fleet_state, self._dispatcher.fleet_state.fleet.snapshot
        now = fleet_state.now()
        return FleetSample(
            queued={model: len(self._dispatcher.queued(model)) for model in snapshot.models},
            replicas=tuple(
                ReplicaSample(
                    replica=replica.id,
                    model=replica.model,
                    slots=replica.slots,
                    busy=fleet_state.running(replica.id),
                    up=replica.state.value == "ready",
                    breaker=fleet_state.breaker(replica.id).state(now).value,
                )
                for replica in snapshot.replicas
            ),
        )

    def _set_members(self, replicas: Iterable[Replica]) -> None:
        self.metrics.set_fleet((replica.id, replica.model) for replica in replicas)

    async def _models(self, request: web.Request) -> web.Response:
        caller: Caller = request[CALLER]
        return json_response(models_view(self._dispatcher, self.admission.rules.names, caller.limits.allow))

    async def _model(self, request: web.Request) -> web.Response:
        caller: Caller = request[CALLER]
        view = models_view(self._dispatcher, self.admission.rules.names, caller.limits.allow)
        name = request.match_info["model"]
        found = next((entry for entry in view["data"] if entry["id"] == name), None)
        if found is None:
            raise self.admission.unknown_model(name, caller)
        return json_response(found)

    async def _fleet(self, request: web.Request) -> web.Response:
        return json_response(fleet_view(self._dispatcher, self.admission.rules.names, admin=request[CALLER].admin))

    async def _queue(self, _request: web.Request) -> web.Response:
        return json_response(queue_view(self._dispatcher))

    async def _decide(self, request: web.Request) -> web.Response:
        body = await read_json(request, limit_bytes=self._limits.body_bytes, limit_s=self._limits.body_s)
        path = path_for(body)
        caller: Caller = request[CALLER]
        admitted, placement = self.admission.decide(path, body, request.headers, caller)
        found: dict[str, Any] = {
            "model": admitted.model,
            "why": admitted.reason,
            "prompt_tokens_estimated": round(admitted.routed.slot_request.prompt_tokens),
            "replica": None,
        }
        if placement is not None:
            view, expected = placement.view, placement.estimate
            found |= {
                "replica": view.replica.id,
                "now": placement.immediate,
                "reason": placement.reason,
                "cached_tokens": round(view.cached_tokens),
                "wait_s": round(expected.wait_s, 3),
                "ttft_s": round(expected.ttft_s, 3),
                "cost_s": round(expected.cost_s, 3),
                "rates": self._dispatcher.fleet_state.book.source(view.replica),
            }
        return json_response(found)

    async def _ready(self, _request: web.Request) -> web.Response:
        snapshot = self._dispatcher.fleet_state.fleet.snapshot
        usable = [replica for replica in snapshot.replicas if replica.usable]
        if self.draining or not usable:
            why = "the gateway is shutting down" if self.draining else "no replica can serve requests"
            raise ApiError(503, why, code="not_ready", retry_after_s=2.0)
        return json_response({"status": "ready", "replicas": len(usable)})

    async def _metrics_page(self, _request: web.Request) -> web.Response:
        data, kind = self.metrics.render()
        return web.Response(body=data, headers={"Content-Type": kind})


async def _healthy(_request: web.Request) -> web.Response:
    return json_response({"status": "ok"})


async def _openapi(_request: web.Request) -> web.Response:
    return web.Response(body=openapi.document_json(), content_type="application/json")


async def _docs(request: web.Request) -> web.Response:
    return web.Response(text=openapi.page(f"{request.scheme}://{request.host}"), content_type="text/html")


def json_response(value: Any) -> web.Response:
    """Return a JSON response."""
    return web.Response(body=msgspec.json.encode(value), content_type="application/json")
