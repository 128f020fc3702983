"""An asynchronous client of the llama-server API, for measuring and for tools.

It stamps every streamed chunk with the monotonic clock as soon as its bytes arrive, before anything is parsed,
because the latency that a person experiences is measured here. It works with any OpenAI-compatible server; what only
llama-server provides (``timings``, ``/props``, ``/tokenize``) is ``None`` or raises ``EngineRefusedError`` elsewhere.

A server can keep the client busy without answering: keep-alive comments and half lines count as silence, and an
answer is cut off at a multiple of its ``max_tokens`` in chunks. ``engine.connection`` holds the other limits.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from typing import Any, Self, TypeVar

import msgspec

from promptai.engine.connection import EngineSession
from promptai.engine.upstream import Reply, refused
from promptai.errors import EngineProtocolError, EngineRefusedError
from promptai.wire.llamaserver import Completion, Props, Slot, Tokens
from promptai.wire.malformed import MALFORMED
from promptai.wire.openai import CompletionChunk, ErrorBody, ModelList, error_in
from promptai.wire.sse import SseEvent

T = TypeVar("T")

#: Longest silence inside an answer. A slow board may prefill for many minutes without sending anything.
SILENCE_S = 1800.0
_QUICK_S = 30.0
#: A chunk may hold several tokens, but not the reverse. Some servers do not count reasoning tokens, though, and roles,
#: progress and usage come in chunks of their own.
_CHUNKS_PER_TOKEN, _EXTRA_CHUNKS = 4, 256
_DONE = "[DONE]"
#: Additions of a PromptAI gateway to a response: headers with this prefix, and events of this name.
_GATEWAY_HEADER, _STATUS_EVENT = "x-promptai-", "promptai.status"
_SILENT_HINT = "raise --timeout if the prompt is long and the board slow"

OnStatus = Callable[[Mapping[str, Any]], None]


class Arrival(msgspec.Struct, frozen=True):
    """One chunk and the monotonic second at which its last byte arrived."""

    t: float
    chunk: CompletionChunk


class EngineClient:
    """
    A client of one server; an async context manager.

    Args:
        base_url: Scheme, host and port; a trailing ``/v1`` is ignored.
        api_key: Sent as a bearer token; ``None``: none is sent.
        silence_s: The longest wait for the next chunk of an answer.
        headers: Sent with every request.
        on_status: Receives what a PromptAI gateway reports besides the answer: its ``x-promptai-*`` response headers,
            and the fields of its status events (requested with the header ``x-promptai-status: 1``).
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        silence_s: float = SILENCE_S,
        headers: Mapping[str, str] | None = None,
        on_status: OnStatus = lambda _: None,
    ) -> None:
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        key = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._session = EngineSession({**(headers or {}), **key})
        self._on_status = on_status
        self._silence_s = silence_s

    async def __aenter__(self) -> Self:
        await self._session.__aenter__()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self._session.__aexit__()

    async def healthy(self) -> bool:
        """
        Whether the server can answer; False while it loads its model.

        Raises:
            EngineDiedError: No server listens there.
        """
        return (await self.get("/health")).status == 200

    async def props(self) -> Props:
        """
        ``GET /props``.

        Raises:
            EngineRefusedError: The server is not a llama-server: it has no such path, or returns something else there
                (LM Studio: HTTP 200 and an error).
        """
        props = await self._get("/props", Props)
        if (props.build_info, props.model_path, props.default_generation_settings.n_ctx) == (None, None, None):
            raise EngineRefusedError(f"{self.base_url} is not a llama-server", status=200, kind=None)
        return props

    async def get(self, path: str) -> Reply:
        """``GET`` any path, whatever the status."""
        return await self._exchange("GET", path)

    async def slots(self) -> list[Slot]:
        """``GET /slots``: the state of each slot."""
        return await self._get("/slots", list[Slot])

    async def models(self) -> list[str]:
        """``GET /v1/models``: the names of the models."""
        return [entry.id for entry in (await self._get("/v1/models", ModelList)).data or ()]

    async def vocabulary(self) -> int | None:
        """Size of the loaded model's vocabulary in tokens; ``None``: not reported."""
        metas = [entry.meta for entry in (await self._get("/v1/models", ModelList)).data or ()]
        return metas[0].n_vocab if metas and metas[0] is not None else None

    async def metrics(self) -> str:
        """``GET /metrics`` in Prometheus text format."""
        return (await self._ok("GET", "/metrics")).decode("utf-8", "replace")

    async def tokenize(self, text: str, *, add_special: bool = False) -> list[int]:
        """Return the token ids of ``text``; special tokens written in it are recognised."""
        body = {"content": text, "add_special": add_special, "parse_special": True}
        return (await self._post("/tokenize", body, Tokens)).tokens

    async def complete(self, body: dict[str, Any]) -> Completion:
        """``POST /completion`` without streaming."""
        return await self._post("/completion", {**body, "stream": False}, Completion)

    async def stream_chat(self, body: dict[str, Any]) -> AsyncGenerator[Arrival, None]:
        """
        ``POST /v1/chat/completions`` with streaming, and yield the chunks as they arrive, up to ``[DONE]``.

        Keep-alive comments are skipped. A caller that may stop early wraps the generator in ``contextlib.aclosing``:
        closing it frees the engine's slot.

        Raises:
            EngineRefusedError: An error in place of the answer or in the middle of it.
            EngineDiedError: The connection failed or fell silent.
            EngineProtocolError: The response breaks the protocol, ends without ``[DONE]`` or without an answer, or
                does not end.
        """
        payload = msgspec.json.encode({**body, "stream": True, "stream_options": {"include_usage": True}})
        reader = _AnswerReader(self.base_url, body.get("max_tokens"), self._on_status)
        loop = asyncio.get_running_loop()
        silent_since = loop.time()
        async with self._session.stream(
            self.base_url,
            "/v1/chat/completions",
            payload,
            silence_s=lambda: self._silence_s,
            headers={"Content-Type": "application/json"},
            hint=_SILENT_HINT,
        ) as stream:
            if stream.status != 200:
                raise refused(self.base_url, stream.status, await stream.reason())
            self._on_status(_gateway_headers(stream.headers))
            while not reader.done:
                data = await stream.read(silent_since)
                now = time.monotonic()
                if not data:
                    raise EngineProtocolError(f"{self.base_url} ended its answer without [DONE]")
                for chunk in reader.take(stream.parse(data)):
                    stream.begun, silent_since = True, loop.time()
                    yield Arrival(now, chunk)

    async def _get(self, path: str, kind: type[T]) -> T:
        return self._decode(path, await self._ok("GET", path), kind)

    async def _post(self, path: str, body: dict[str, Any], kind: type[T]) -> T:
        return self._decode(path, await self._ok("POST", path, body), kind)

    def _decode(self, path: str, data: bytes, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(data, type=kind)
        except MALFORMED as error:
            if error_in(data) is not None:
                raise refused(self.base_url, 200, data) from None
            raise EngineProtocolError(f"{self.base_url}{path} returned an unexpected body: {error}") from None

    async def _ok(self, method: str, path: str, body: dict[str, Any] | None = None) -> bytes:
        reply = await self._exchange(method, path, body)
        if reply.status != 200:
            raise refused(self.base_url, reply.status, reply.body)
        return reply.body

    async def _exchange(self, method: str, path: str, body: dict[str, Any] | None = None) -> Reply:
        """Send a request; everything but inference must answer quickly."""
        return await self._session.exchange(
            method,
            self.base_url,
            path,
            None if body is None else msgspec.json.encode(body),
            limit_s=self._silence_s if path == "/completion" else _QUICK_S,
            headers=None if body is None else {"Content-Type": "application/json"},
        )


class _AnswerReader:
    """
    Reads the events of one streamed answer.

    Attributes:
        done: Whether ``[DONE]`` has arrived.
    """

    def __init__(self, url: str, max_tokens: int | None, on_status: OnStatus) -> None:
        self.done = False
        self._url = url
        self._max_tokens = max_tokens if max_tokens is not None and max_tokens > 0 else None
        self._on_status = on_status
        self._chunks = 0
        self._answered = False

    def take(self, events: list[SseEvent]) -> Iterator[CompletionChunk]:
        """Yield the chunks in ``events``; raises at the first that is malformed, an error, or one too many."""
        for event in events:
            if event.data == _DONE:
                if not self._answered:
                    raise EngineProtocolError(f"{self._url} ended its answer without any text")
                self.done = True
                return
            if event.comment:
                continue
            if event.event == _STATUS_EVENT:
                self._on_status(_object(event.data))
                continue
            chunk = self._chunk(event)
            self._chunks += 1
            self._answered = self._answered or bool(chunk.content or chunk.thought or any(chunk.finish_reasons))
            if self._max_tokens and self._chunks > self._max_tokens * _CHUNKS_PER_TOKEN + _EXTRA_CHUNKS:
                raise EngineProtocolError(
                    f"{self._url} sent {self._chunks} chunks of an answer limited to {self._max_tokens} tokens",
                    hint="check that the server supports max_tokens",
                )
            yield chunk

    def _chunk(self, event: SseEvent) -> CompletionChunk:
        if event.event == "error":
            raise self._broken_off(event.data)
        try:
            chunk = msgspec.json.decode(event.data, type=CompletionChunk).exact()
        except MALFORMED as error:
            raise EngineProtocolError(f"{self._url} sent a malformed chunk: {error}") from None
        if chunk.error is not None or (not chunk.choices and error_in(event.data) is not None):
            raise self._broken_off(event.data)
        return chunk

    def _broken_off(self, data: str) -> EngineRefusedError:
        error = error_in(data) or ErrorBody(data)
        return EngineRefusedError(
            f"{self._url} broke off with an error: {error.message[:300]}", status=None, kind=error.type
        )


def _gateway_headers(headers: Mapping[str, str]) -> dict[str, str]:
    lower = {name.lower(): value for name, value in headers.items()}
    return {name: value for name, value in lower.items() if name.startswith(_GATEWAY_HEADER)}


def _object(data: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except MALFORMED:
        return {}
