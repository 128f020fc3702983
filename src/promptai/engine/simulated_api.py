"""llama-server's API for a simulated engine, without sockets or URLs.

A transport passes in a path and a body, and gets a whole response or the bytes of a stream as they are generated.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TypeVar

import msgspec

from promptai.engine.simulated_formats import (
    ChatBody,
    ChatFormat,
    ContentBody,
    EmbeddingsBody,
    NativeBody,
    NativeFormat,
    PrefillProgress,
    ResponseFormat,
    TemplateBody,
    TextBody,
    TextFormat,
    embedding,
    event,
)
from promptai.engine.simulation import Emission, Request, render, tokenize
from promptai.engine.simulator import FAILED, Fault, Rejected, Sent, Simulator
from promptai.engine.upstream import Reply
from promptai.wire.malformed import MALFORMED

T = TypeVar("T")

#: The bytes of a stream; empty bytes stand for the headers, which are sent before the first event.
Stream = AsyncGenerator[bytes, None]


class SimulatedApi:
    """The API of one simulated engine."""

    def __init__(self, simulator: Simulator) -> None:
        self._simulator = simulator
        self._config = simulator.config
        self._gets: dict[str, Callable[[], object]] = {
            "/health": self._health,
            "/props": self._props,
            "/slots": self._slots,
            "/metrics": self._metrics,
            "/v1/models": self._models,
            "/simulated/sent": lambda: simulator.sent,
        }
        self._posts: dict[str, Callable[[bytes], object]] = {
            "/tokenize": lambda data: {"tokens": tokenize(_read(data, ContentBody).content)},
            "/apply-template": lambda data: {"prompt": render(_read(data, TemplateBody).messages)},
            "/v1/embeddings": self._embeddings,
            "/simulated/fault": self._arm,
        }
        self._generations: dict[str, Callable[[bytes], Awaitable[Reply | Stream]]] = {
            "/completion": self._native,
            "/v1/completions": self._text,
            "/v1/chat/completions": self._chat,
        }

    async def answer(self, method: str, path: str, data: bytes = b"") -> Reply | Stream:
        """
        Answer one request; the caller must close a stream.

        Raises:
            BrokenOff: The connection must end without a response.
        """
        try:
            if method == "GET" and path in self._gets:
                return _reply(self._gets[path]())
            if method == "POST" and path in self._posts:
                return _reply(self._posts[path](data))
            if method == "POST" and path in self._generations:
                return await self._generations[path](data)
            raise Rejected(404, "not_found_error", "File Not Found")
        except Rejected as rejected:
            return _reply(rejected.body, rejected.status)

    async def _chat(self, data: bytes) -> Reply | Stream:
        body = _read(data, ChatBody)
        fault = self._simulator.next_fault()
        most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        request, sent = self._simulator.accept(
            tokenize(render(body.messages)), most, use_cache=body.cache_prompt, id_slot=body.id_slot
        )
        layout = ChatFormat(len(self._simulator.sent), self._config.model, body)
        if body.stream:
            return self._stream(layout, request, sent, fault, progress=body.return_progress)
        return await self._whole(layout, request, sent, fault)

    async def _text(self, data: bytes) -> Reply | Stream:
        body = _read(data, TextBody)
        return await self._continued(body, body.max_tokens, lambda n: TextFormat(n, self._config.model))

    async def _native(self, data: bytes) -> Reply | Stream:
        body = _read(data, NativeBody)
        layout = NativeFormat(self._config.model, return_tokens=body.return_tokens)
        return await self._continued(body, body.n_predict, lambda _n: layout)

    async def _continued(
        self, body: TextBody | NativeBody, most: int | None, make_format: Callable[[int], ResponseFormat]
    ) -> Reply | Stream:
        fault = self._simulator.next_fault()
        prompt = tokenize(body.prompt) if isinstance(body.prompt, str) else body.prompt
        request, sent = self._simulator.accept(prompt, most, use_cache=body.cache_prompt, id_slot=body.id_slot)
        layout = make_format(len(self._simulator.sent))
        if body.stream:
            return self._stream(layout, request, sent, fault, progress=body.return_progress)
        return await self._whole(layout, request, sent, fault)

    async def _whole(self, layout: ResponseFormat, request: Request, sent: Sent, fault: Fault | None) -> Reply:
        texts: list[str] = []
        items = self._simulator.generate(request)
        async with contextlib.aclosing(items):
            async for item in items:
                if not isinstance(item, Emission):
                    continue
                sent.cached_tokens = request.cached
                if fault is not None and len(texts) == fault.after_tokens:
                    await self._simulator.strike(fault)
                    if fault.kind == "error":
                        return _reply(FAILED, 500)
                    if fault.kind == "malformed":
                        return Reply(200, b'{"choices": [{"message"', "application/json")
                texts.append(item.text)
        return _reply(layout.whole(request, "".join(texts)))

    async def _stream(
        self, layout: ResponseFormat, request: Request, sent: Sent, fault: Fault | None, *, progress: bool
    ) -> Stream:
        loop, number, opened = asyncio.get_running_loop(), 0, False
        items = self._simulator.generate(request)
        async with contextlib.aclosing(items):
            async for item in items:
                if isinstance(item, PrefillProgress):
                    if progress:
                        yield event(layout.progress(request, item))
                    elif not opened:
                        # Like llama-server: the headers are sent when the request gets its slot.
                        yield b""
                    opened = True
                    continue
                sent.cached_tokens = request.cached
                if number == 0 and (begin := layout.begin()) is not None:
                    yield event(begin)
                if fault and number == fault.after_tokens and (data := await self._simulator.strike(fault)):
                    yield data
                number += 1
                yield event(layout.token(request, item, number))
                sent.t_chunks.append(loop.time())
        for body in layout.end(request):
            yield event(body)
        if layout.done:
            yield layout.done

    def _health(self) -> object:
        self._simulator.demand_ready()
        return {"status": "ok"}

    def _props(self) -> object:
        self._simulator.demand_ready()
        return {
            "default_generation_settings": {"n_ctx": self._config.context},
            "total_slots": self._config.slots,
            "model_alias": self._config.model,
            "build_info": "simulated",
        }

    def _slots(self) -> object:
        return [
            {"id": number, "n_ctx": self._config.context, "is_processing": slot.request is not None}
            for number, slot in enumerate(self._simulator.scheduler.slots)
        ]

    def _metrics(self) -> str:
        scheduler = self._simulator.scheduler
        busy = sum(slot.request is not None for slot in scheduler.slots)
        return f"llamacpp:requests_processing {busy}\nllamacpp:requests_deferred {len(scheduler.queue)}\n"

    def _models(self) -> object:
        return {"object": "list", "data": [{"id": self._config.model, "object": "model"}]}

    def _embeddings(self, data: bytes) -> object:
        self._simulator.demand_ready()
        given = _read(data, EmbeddingsBody).input
        inputs: list[str | list[int]]
        if isinstance(given, str):
            inputs = [given]
        elif given and all(isinstance(one, int) for one in given):
            inputs = [[one for one in given if isinstance(one, int)]]
        else:
            inputs = [[one] if isinstance(one, int) else one for one in given]
        tokens = [tokenize(one) if isinstance(one, str) else one for one in inputs]
        total = sum(map(len, tokens))
        return {
            "object": "list",
            "model": self._config.model,
            "data": [
                {"object": "embedding", "index": number, "embedding": embedding(one)}
                for number, one in enumerate(tokens)
            ],
            "usage": {"prompt_tokens": total, "total_tokens": total},
        }

    def _arm(self, data: bytes) -> object:
        self._simulator.fault = _read(data, Fault) if data else None
        return {"fault": self._simulator.fault}


def _read(data: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except MALFORMED as error:
        raise Rejected(400, "invalid_request_error", str(error)) from None


def _reply(body: object, status: int = 200) -> Reply:
    if isinstance(body, str):
        return Reply(status, body.encode(), "text/plain")
    return Reply(status, msgspec.json.encode(body), "application/json")
