"""A llama-server lookalike on a real socket, with chosen speed and chosen faults.

Ground truth for the harness (``promptai doctor --selftest``), four boards on a
laptop, and every failure that a real engine only has on bad days: it refuses,
stalls, is cut off, sends broken lines, dies. Speaks the part of the HTTP API
that PromptAI uses. It also notes when it *really* sent each chunk, so that a
client is compared with what happened and not only with what was intended.

``GET /simulated/sent`` gives these notes, ``POST /simulated/fault`` arms or clears a fault.
The arithmetic is in ``engine.simulation``; here are time and sockets.
"""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Literal, Self, TypeVar

import msgspec
from aiohttp import web

from promptai.engine.simulation import Emission, Request, Scheduler, SimulationConfig, render, tokenize
from promptai.wire.malformed import MALFORMED
from promptai.wire.openai import Message

_MAX_BODY_BYTES = 16 * 1024 * 1024

T = TypeVar("T")


class Fault(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """
    What goes wrong.

    Attributes:
        kind: ``refuse`` (HTTP 503), ``stall`` (silence for ``stall_s``), ``cut`` (connection
            reset), ``malformed`` (a line that is no JSON), ``error`` (an error event),
            ``die`` (the process ends as if killed).
        after_tokens: Tokens sent before it happens; ``refuse`` needs none.
        times: Requests that it hits before the engine is well again; ``None``: all.
        skip: Requests that are spared first.
    """

    kind: Literal["refuse", "stall", "cut", "malformed", "error", "die"]
    after_tokens: int = 0
    times: int | None = None
    skip: int = 0
    stall_s: float = 30.0


class Sent(msgspec.Struct):
    """
    What really happened to one request, on the monotonic clock.

    Attributes:
        t_received: When its body had been read.
        t_chunks: When each content chunk was written to the socket.
    """

    t_received: float
    prompt_tokens: int
    cached_tokens: int
    t_chunks: list[float]


class _ChatBody(msgspec.Struct):
    messages: list[Message]
    max_tokens: int | None = None
    stream: bool = False
    cache_prompt: bool = True


class _TextBody(msgspec.Struct):
    prompt: str | list[int]
    n_predict: int = 128
    stream: bool = False
    cache_prompt: bool = True


class _Content(msgspec.Struct):
    content: str


class _Rejected(Exception):  # noqa: N818  becomes an HTTP answer
    def __init__(self, status: int, kind: str, message: str, **extra: int) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"code": status, "type": kind, "message": message, **extra}}


class SimulatedEngine:
    """
    One pretended engine; an async context manager that listens inside its block.

    Args:
        config: Its speed and size.
        port: TCP port on loopback; 0 takes a free one, see ``base_url``.
    """

    def __init__(self, config: SimulationConfig, *, port: int = 0, fault: Fault | None = None) -> None:
        self.config = config
        self.fault = fault
        self.sent: list[Sent] = []
        self._port = port
        self._scheduler = Scheduler(config)
        self._outboxes: dict[Request, asyncio.Queue[Emission]] = {}
        self._wake = asyncio.Event()
        self._hits = 0
        self._stack = contextlib.AsyncExitStack()

    @property
    def base_url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._port}"

    async def __aenter__(self) -> Self:
        """Listen; raises ``OSError`` when the port is taken."""
        app = web.Application(client_max_size=_MAX_BODY_BYTES, middlewares=[_envelope])
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/props", self._props),
                web.get("/slots", self._slots),
                web.get("/metrics", self._metrics),
                web.get("/v1/models", self._models),
                web.post("/tokenize", self._tokenize),
                web.post("/apply-template", self._template),
                web.post("/completion", self._completion),
                web.post("/v1/chat/completions", self._chat),
                web.get("/simulated/sent", self._sent),
                web.post("/simulated/fault", self._arm),
            ]
        )
        # Cancellation tells a handler that its client has gone: the slot must come free.
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", self._port).start()
        self._port = runner.addresses[0][1]
        self._ready_at = time.monotonic() + self.config.load_s / self.config.time_scale
        compute = asyncio.create_task(self._compute())
        self._stack.callback(compute.cancel)
        return self

    async def __aexit__(self, *_exc: object) -> None:
        """Stop listening."""
        await self._stack.aclose()

    async def _compute(self) -> None:
        """Run the scheduler on absolute deadlines, so that late wake-ups do not add up."""
        clock = time.monotonic()
        while True:
            if self._scheduler.idle:
                self._wake.clear()
                await self._wake.wait()
                clock = time.monotonic()
            duration, emissions = self._scheduler.step(clock)
            clock += duration
            await asyncio.sleep(max(0.0, clock - time.monotonic()))
            for emission in emissions:
                if emission.request in self._outboxes:
                    self._outboxes[emission.request].put_nowait(emission)

    async def _generate(self, request: Request, sent: Sent) -> AsyncGenerator[str, None]:
        """Texts of the tokens of one request as they are computed."""
        outbox = self._outboxes[request] = asyncio.Queue()
        self._scheduler.add(request)
        self._wake.set()
        try:
            # The scheduler decides a step before its time has passed, so the end
            # is what the emission says, not what the request says by now.
            last = False
            while not last:
                _, text, last = await outbox.get()
                sent.cached_tokens = request.cached
                yield text
        finally:
            self._scheduler.drop(request)
            del self._outboxes[request]

    def _accept(self, prompt: list[int], max_tokens: int | None, *, use_cache: bool) -> tuple[Request, Sent]:
        self._demand_ready()
        room = self.config.context - len(prompt)
        if room <= 0:
            raise _Rejected(
                400,
                "exceed_context_size_error",
                f"request ({len(prompt)} tokens) exceeds the available context size ({self.config.context} tokens)",
                n_prompt_tokens=len(prompt),
                n_ctx=self.config.context,
            )
        wanted = room if max_tokens is None or max_tokens < 0 else min(room, max_tokens)
        sent = Sent(t_received=time.monotonic(), prompt_tokens=len(prompt), cached_tokens=0, t_chunks=[])
        self.sent.append(sent)
        return Request(prompt, max_tokens=max(1, wanted), use_cache=use_cache), sent

    def _demand_ready(self) -> None:
        if time.monotonic() < self._ready_at:
            raise _Rejected(503, "unavailable_error", "Loading model")

    def _next_fault(self) -> Fault | None:
        """The fault that hits the request that is starting now, if any."""
        fault = self.fault
        if fault is None:
            return None
        self._hits += 1
        number = self._hits - fault.skip
        if number <= 0 or (fault.times is not None and number > fault.times):
            return None
        return fault

    async def _chat(self, http: web.Request) -> web.StreamResponse:
        body = await _read(http, _ChatBody)
        fault = self._next_fault()
        if fault is not None and fault.kind == "refuse":
            raise _Rejected(503, "unavailable_error", "refused, as it was told to")
        request, sent = self._accept(tokenize(render(body.messages)), body.max_tokens, use_cache=body.cache_prompt)
        if body.stream:
            return await self._stream(http, request, sent, fault)
        text = "".join([piece async for piece in self._generate(request, sent)])
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "finish_reason": request.finish_reason,
        }
        return _json({**self._head("chat.completion"), "choices": [choice], **_account(request)})

    async def _stream(self, http: web.Request, request: Request, sent: Sent, fault: Fault | None) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        head = self._head("chat.completion.chunk")
        texts = self._generate(request, sent)
        number = 0
        async with contextlib.aclosing(texts):
            async for text in texts:
                if number == 0:
                    # As llama-server: headers and the empty first chunk come with the first token.
                    await response.prepare(http)
                    await _event(response, {**head, "choices": [_delta({"role": "assistant", "content": None})]})
                if fault is not None and number == fault.after_tokens:
                    await _strike(http, response, fault)
                await _event(response, {**head, "choices": [_delta({"content": text})]})
                sent.t_chunks.append(time.monotonic())
                number += 1
        await _event(response, {**head, "choices": [_delta({}, request.finish_reason)]})
        await _event(response, {**head, "choices": [], **_account(request)})
        await response.write(b"data: [DONE]\n\n")
        return response

    async def _completion(self, http: web.Request) -> web.Response:
        body = await _read(http, _TextBody)
        prompt = tokenize(body.prompt) if isinstance(body.prompt, str) else body.prompt
        request, sent = self._accept(prompt, body.n_predict, use_cache=body.cache_prompt)
        text = "".join([piece async for piece in self._generate(request, sent)])
        return _json({"content": text, "stop": True, "timings": msgspec.to_builtins(request.timings)})

    async def _health(self, _http: web.Request) -> web.Response:
        self._demand_ready()
        return _json({"status": "ok"})

    async def _props(self, _http: web.Request) -> web.Response:
        self._demand_ready()
        return _json(
            {
                "default_generation_settings": {"n_ctx": self.config.context},
                "total_slots": self.config.slots,
                "model_alias": self.config.model,
                "build_info": "simulated",
            }
        )

    async def _slots(self, _http: web.Request) -> web.Response:
        slots = self._scheduler.slots
        return _json(
            [
                {"id": number, "n_ctx": self.config.context, "is_processing": slot.request is not None}
                for number, slot in enumerate(slots)
            ]
        )

    async def _metrics(self, _http: web.Request) -> web.Response:
        busy = sum(slot.request is not None for slot in self._scheduler.slots)
        return web.Response(
            text=f"llamacpp:requests_processing {busy}\nllamacpp:requests_deferred {len(self._scheduler.queue)}\n"
        )

    async def _models(self, _http: web.Request) -> web.Response:
        return _json({"object": "list", "data": [{"id": self.config.model, "object": "model"}]})

    async def _tokenize(self, http: web.Request) -> web.Response:
        return _json({"tokens": tokenize((await _read(http, _Content)).content)})

    async def _template(self, http: web.Request) -> web.Response:
        return _json({"prompt": render((await _read(http, _ChatBody)).messages)})

    async def _sent(self, _http: web.Request) -> web.Response:
        return _json([msgspec.to_builtins(sent) for sent in self.sent])

    async def _arm(self, http: web.Request) -> web.Response:
        self.fault = await _read(http, Fault) if http.content_length else None
        self._hits = 0
        return _json({"fault": msgspec.to_builtins(self.fault)})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": f"sim-{len(self.sent)}", "object": kind, "created": 0, "model": self.config.model}


async def _strike(http: web.Request, response: web.StreamResponse, fault: Fault) -> None:
    """Let a fault happen in the middle of a stream."""
    if fault.kind == "stall":
        await asyncio.sleep(fault.stall_s)
    elif fault.kind == "malformed":
        await response.write(b'data: {"choices": [{"delta"\n\n')
    elif fault.kind == "error":
        await _event(response, {"error": {"code": 500, "type": "server_error", "message": "failed, as it was told to"}})
    elif fault.kind == "cut":
        if http.transport is not None:
            http.transport.abort()
        raise ConnectionResetError
    elif fault.kind == "die":
        os._exit(9)


def _account(request: Request) -> dict[str, Any]:
    timings = request.timings
    return {
        "usage": {
            "prompt_tokens": len(request.prompt),
            "completion_tokens": timings.predicted_n,
            "total_tokens": len(request.prompt) + timings.predicted_n,
            "prompt_tokens_details": {"cached_tokens": request.cached},
        },
        "timings": msgspec.to_builtins(timings),
    }


def _delta(delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "finish_reason": finish_reason}


async def _event(response: web.StreamResponse, body: dict[str, Any]) -> None:
    await response.write(b"data: " + msgspec.json.encode(body) + b"\n\n")


async def _read(http: web.Request, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(await http.read(), type=kind)
    except MALFORMED as error:
        raise _Rejected(400, "invalid_request_error", str(error)) from None


def _json(body: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(body), content_type="application/json")


@web.middleware
async def _envelope(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        answer = await handler(request)
    except _Rejected as rejected:
        return web.Response(
            status=rejected.status, body=msgspec.json.encode(rejected.body), content_type="application/json"
        )
    return answer
