"""An asynchronous client of the llama-server API; the only HTTP client of engines.

It stamps every streamed chunk with the monotonic clock the moment its bytes
arrive, before anything is parsed, because what a person feels is measured here.
It works against any OpenAI-compatible server; what only llama-server has
(``timings``, ``/props``, ``/tokenize``) is ``None`` or raises ``EngineRefusedError``
elsewhere.

It never retries: a retry would hide what happened from a measurement, and in
the gateway the router decides. aiohttp's exceptions end here.
"""

import time
from collections.abc import AsyncGenerator
from typing import Any, Self, TypeVar

import aiohttp
import msgspec

from promptai.errors import EngineDiedError, EngineProtocolError, EngineRefusedError
from promptai.wire.llamaserver import Completion, Props, Slot, Tokens
from promptai.wire.malformed import MALFORMED
from promptai.wire.openai import ChatChunk, ErrorBody, ErrorEnvelope, ModelList
from promptai.wire.sse import SseEvent, SseParser

T = TypeVar("T")

#: Longest silence inside an answer. A slow board may prefill for many minutes without a word.
SILENCE_S = 1800.0
_QUICK_S = 30.0
_DONE = "[DONE]"


class Arrival(msgspec.Struct, frozen=True):
    """One chunk and the monotonic second at which its last byte arrived."""

    t: float
    chunk: ChatChunk


class EngineClient:
    """
    Talks to one server; an async context manager.

    Args:
        base_url: Scheme, host and port, without ``/v1``.
        api_key: Sent as a bearer token when given.
        silence_s: Longest wait for the next bytes of an answer.
    """

    def __init__(self, base_url: str, *, api_key: str | None = None, silence_s: float = SILENCE_S) -> None:
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._silence_s = silence_s
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        # No limit on connections: concurrency is the caller's decision, and a
        # hidden queue in the client would be measured as the server's.
        # No kept-alive connections: llama-server closes them after a stream, and a
        # request that meets the closing one fails (seen with b11549 on a busy board).
        # A fresh connection costs 0.1 ms on loopback.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=self._silence_s),
            headers=self._headers,
        )
        return self

    async def __aexit__(self, *_exc: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def healthy(self) -> bool:
        """
        Whether it can answer; False while it loads its model.

        Raises:
            EngineDiedError: Nobody listens there.
        """
        status, _ = await self._exchange("GET", "/health")
        return status == 200

    async def props(self) -> Props:
        """``GET /props``; raises ``EngineRefusedError`` where the server is no llama-server."""
        return await self._get("/props", Props)

    async def slots(self) -> list[Slot]:
        """``GET /slots``: what each slot is doing."""
        return await self._get("/slots", list[Slot])

    async def models(self) -> list[str]:
        """Names that the server answers to."""
        return [entry.id for entry in (await self._get("/v1/models", ModelList)).data]

    async def vocabulary(self) -> int | None:
        """Tokens of the loaded model's vocabulary; ``None`` where the server does not tell."""
        metas = [entry.meta for entry in (await self._get("/v1/models", ModelList)).data]
        return metas[0].n_vocab if metas and metas[0] is not None else None

    async def metrics(self) -> str:
        """``GET /metrics`` in Prometheus text format."""
        return (await self._ok("GET", "/metrics")).decode("utf-8", "replace")

    async def tokenize(self, text: str, *, add_special: bool = False) -> list[int]:
        """Token ids of ``text``; special tokens in it are read as such."""
        body = {"content": text, "add_special": add_special, "parse_special": True}
        return (await self._post("/tokenize", body, Tokens)).tokens

    async def complete(self, body: dict[str, Any]) -> Completion:
        """``POST /completion`` without streaming."""
        return await self._post("/completion", {**body, "stream": False}, Completion)

    async def stream_chat(self, body: dict[str, Any]) -> AsyncGenerator[Arrival, None]:
        """
        ``POST /v1/chat/completions`` with streaming: the chunks as they arrive.

        Keep-alive comments are skipped. Ends after ``[DONE]``. Whoever may leave early
        wraps it in ``contextlib.aclosing``: closing it is what frees the engine's slot.

        Raises:
            EngineRefusedError: An error instead of, or in the middle of, the answer.
            EngineDiedError: The connection failed or fell silent.
            EngineProtocolError: Something that is not the protocol, or an end without ``[DONE]``.
        """
        payload = msgspec.json.encode({**body, "stream": True, "stream_options": {"include_usage": True}})
        parser = SseParser()
        try:
            async with self._open().post(
                f"{self.base_url}/v1/chat/completions",
                data=payload,
                headers={"Content-Type": "application/json"},
            ) as response:
                if response.status != 200:
                    raise self._refused(response.status, await response.read())
                async for data in response.content.iter_any():
                    now = time.monotonic()
                    for event in parser.feed(data):
                        if event.data == _DONE:
                            return
                        if not event.comment:
                            yield Arrival(now, self._chunk(event))
        except aiohttp.ConnectionTimeoutError as error:
            raise self._lost(error) from None
        except TimeoutError:
            raise EngineDiedError(
                f"{self.base_url} was silent for {self._silence_s:g} s in the middle of an answer",
                hint="give --timeout more seconds if the prompt is long and the board slow",
            ) from None
        except (aiohttp.ClientError, OSError) as error:
            raise self._lost(error) from None
        except ValueError as error:
            raise EngineProtocolError(f"{self.base_url} sent a broken event stream: {error}") from None
        raise EngineProtocolError(f"{self.base_url} ended its answer without [DONE]")

    def _chunk(self, event: SseEvent) -> ChatChunk:
        if event.event == "error":
            raise self._broken_off(event.data)
        try:
            chunk = msgspec.json.decode(event.data, type=ChatChunk)
        except MALFORMED as error:
            raise EngineProtocolError(f"{self.base_url} sent a malformed chunk: {error}") from None
        if chunk.error is not None:
            raise self._broken_off(event.data)
        return chunk

    def _broken_off(self, data: str) -> EngineRefusedError:
        """An error in the middle of an answer, in an envelope or bare."""
        try:
            error = msgspec.json.decode(data, type=ErrorEnvelope).error
        except MALFORMED:
            try:
                error = msgspec.json.decode(data, type=ErrorBody)
            except MALFORMED:
                error = ErrorBody(message=data)
        return EngineRefusedError(
            f"{self.base_url} broke off with an error: {error.message[:300]}", status=None, kind=error.type
        )

    async def _get(self, path: str, kind: type[T]) -> T:
        return self._decode(path, await self._ok("GET", path), kind)

    async def _post(self, path: str, body: dict[str, Any], kind: type[T]) -> T:
        return self._decode(path, await self._ok("POST", path, body), kind)

    def _decode(self, path: str, data: bytes, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(data, type=kind)
        except MALFORMED as error:
            raise EngineProtocolError(f"{self.base_url}{path} answered something else than expected: {error}") from None

    async def _ok(self, method: str, path: str, body: dict[str, Any] | None = None) -> bytes:
        status, data = await self._exchange(method, path, body)
        if status != 200:
            raise self._refused(status, data)
        return data

    async def _exchange(self, method: str, path: str, body: dict[str, Any] | None = None) -> tuple[int, bytes]:
        # A quick answer is expected of everything but inference.
        timeout = aiohttp.ClientTimeout(total=self._silence_s if path == "/completion" else _QUICK_S)
        try:
            async with self._open().request(method, f"{self.base_url}{path}", json=body, timeout=timeout) as response:
                return response.status, await response.read()
        except TimeoutError:
            raise EngineDiedError(f"{self.base_url}{path} did not answer in time") from None
        except (aiohttp.ClientError, OSError) as error:
            raise self._lost(error) from None

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("EngineClient is used outside its async with block")
        return self._session

    def _refused(self, status: int, data: bytes) -> EngineRefusedError:
        try:
            error = msgspec.json.decode(data, type=ErrorEnvelope).error
        except MALFORMED:
            text = data[:200].decode("utf-8", "replace").strip()
            return EngineRefusedError(f"{self.base_url} answered HTTP {status}: {text}", status=status, kind=None)
        return EngineRefusedError(
            f"{self.base_url} answered HTTP {status}: {error.message[:300]}", status=status, kind=error.type
        )

    def _lost(self, error: Exception) -> EngineDiedError:
        reason = str(error) or type(error).__name__
        return EngineDiedError(f"no connection to {self.base_url}: {reason}", hint="is it still running there?")
