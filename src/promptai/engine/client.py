"""An asynchronous client of the llama-server API; the only HTTP client of engines.

It stamps every streamed chunk with the monotonic clock the moment its bytes
arrive, before anything is parsed, because what a person feels is measured here.
It works against any OpenAI-compatible server; what only llama-server has
(``timings``, ``/props``, ``/tokenize``) is ``None`` or raises ``EngineRefusedError``
elsewhere.

It never retries: a retry would hide what happened from a measurement, and in
the gateway the router decides. aiohttp's exceptions end here.

Nothing that a server does keeps it for ever or fills its memory. Silence is
counted between pieces of an answer: keep-alive comments and half lines are
silence too. An answer ends, by force, at a multiple of its ``max_tokens`` in
chunks. Bodies, lines and events have a largest size.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from typing import Any, Self, TypeVar

import aiohttp
import msgspec

from promptai.errors import EngineDiedError, EngineProtocolError, EngineRefusedError
from promptai.wire.llamaserver import Completion, Props, Slot, Tokens
from promptai.wire.malformed import MALFORMED
from promptai.wire.openai import CompletionChunk, ErrorBody, ModelList, error_in
from promptai.wire.sse import SseEvent, SseParser

T = TypeVar("T")

#: Longest silence inside an answer. A slow board may prefill for many minutes without a word.
SILENCE_S = 1800.0
_QUICK_S = 30.0
#: The largest honest body: the probabilities of a vocabulary of 256k tokens take about 30 MB.
_MAX_BODY_BYTES = 64 * 1024 * 1024
_MAX_REASON_BYTES = 64 * 1024
#: A chunk may hold several tokens, never the other way round; but some servers do not count what was
#: thought, and roles, progress and accounts come in chunks of their own.
_CHUNKS_PER_TOKEN, _CHUNKS_BESIDE = 4, 256
_DONE = "[DONE]"
#: What a PromptAI gateway adds to an answer: headers, and events that tell its stage.
_OURS, _STATUS = "x-promptai-", "promptai.status"


class Arrival(msgspec.Struct, frozen=True):
    """One chunk and the monotonic second at which its last byte arrived."""

    t: float
    chunk: CompletionChunk


class EngineClient:
    """
    Talks to one server; an async context manager.

    Args:
        base_url: Scheme, host and port, without ``/v1``.
        api_key: Sent as a bearer token when given.
        silence_s: Longest wait for the next bytes of an answer.
        headers: Further ones of every request.
        beside: Told what a PromptAI gateway says beside an answer: of its way in the head, by the
            names of the headers, and of its stage in events (``x-promptai-status: 1`` asks for them).
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None = None,
        silence_s: float = SILENCE_S,
        headers: Mapping[str, str] | None = None,
        beside: Callable[[Mapping[str, Any]], None] = lambda _: None,
    ) -> None:
        self.base_url = base_url.rstrip("/").removesuffix("/v1")
        self._headers = {**(headers or {}), **({"Authorization": f"Bearer {api_key}"} if api_key else {})}
        self._beside = beside
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
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
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
        """
        ``GET /props``.

        Raises:
            EngineRefusedError: The server is no llama-server: it has no such address, or answers there with
                something that says nothing of a llama-server (LM Studio: HTTP 200 and an error).
        """
        props = await self._get("/props", Props)
        if (props.build_info, props.model_path, props.default_generation_settings.n_ctx) == (None, None, None):
            raise EngineRefusedError(f"{self.base_url} is no llama-server", status=200, kind=None)
        return props

    async def slots(self) -> list[Slot]:
        """``GET /slots``: what each slot is doing."""
        return await self._get("/slots", list[Slot])

    async def models(self) -> list[str]:
        """Names that the server answers to."""
        return [entry.id for entry in (await self._get("/v1/models", ModelList)).data or ()]

    async def vocabulary(self) -> int | None:
        """Tokens of the loaded model's vocabulary; ``None`` where the server does not tell."""
        metas = [entry.meta for entry in (await self._get("/v1/models", ModelList)).data or ()]
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
            EngineProtocolError: Something that is not the protocol, an end without ``[DONE]`` or without
                a word, or no end.
        """
        payload = msgspec.json.encode({**body, "stream": True, "stream_options": {"include_usage": True}})
        answer = _Answer(self.base_url, body.get("max_tokens"), self._beside)
        silent_at = time.monotonic() + self._silence_s
        try:
            async with asyncio.timeout(self._silence_s):
                response = await self._open().post(
                    f"{self.base_url}/v1/chat/completions", data=payload, headers={"Content-Type": "application/json"}
                )
            async with response:
                if response.status != 200:
                    raise self._refused(response.status, await _reason(response))
                self._beside(_ours(response.headers))
                while not answer.done:
                    async with asyncio.timeout(silent_at - time.monotonic()):
                        data = await response.content.readany()
                        now = time.monotonic()
                    if not data:
                        raise EngineProtocolError(f"{self.base_url} ended its answer without [DONE]")
                    for chunk in answer.take(data):
                        silent_at = now + self._silence_s
                        yield Arrival(now, chunk)
        except aiohttp.ConnectionTimeoutError as error:
            raise self._lost(error) from None
        except TimeoutError:
            when = "in the middle of an answer" if answer.chunks else "before it began to answer"
            raise EngineDiedError(
                f"{self.base_url} was silent for {self._silence_s:g} s {when}",
                hint="give --timeout more seconds if the prompt is long and the board slow",
            ) from None
        except (aiohttp.ClientError, OSError) as error:
            raise self._lost(error) from None
        except ValueError as error:
            raise EngineProtocolError(f"{self.base_url} sent a broken event stream: {error}") from None

    async def _get(self, path: str, kind: type[T]) -> T:
        return self._decode(path, await self._ok("GET", path), kind)

    async def _post(self, path: str, body: dict[str, Any], kind: type[T]) -> T:
        return self._decode(path, await self._ok("POST", path, body), kind)

    def _decode(self, path: str, data: bytes, kind: type[T]) -> T:
        try:
            return msgspec.json.decode(data, type=kind)
        except MALFORMED as error:
            if error_in(data) is not None:
                raise self._refused(200, data) from None
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
                data = bytearray()
                await _read(response, data, _MAX_BODY_BYTES + 1)
                if len(data) > _MAX_BODY_BYTES:
                    raise EngineProtocolError(f"{self.base_url}{path} answered more than {_MAX_BODY_BYTES} bytes")
                return response.status, bytes(data)
        except TimeoutError:
            raise EngineDiedError(f"{self.base_url}{path} did not answer in time") from None
        except (aiohttp.ClientError, OSError) as error:
            raise self._lost(error) from None

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("EngineClient is used outside its async with block")
        return self._session

    def _refused(self, status: int, data: bytes) -> EngineRefusedError:
        error = error_in(data) or ErrorBody(data[:200].decode("utf-8", "replace").strip())
        return EngineRefusedError(
            f"{self.base_url} answered HTTP {status}: {error.message[:300]}", status=status, kind=error.type
        )

    def _lost(self, error: Exception) -> EngineDiedError:
        reason = str(error) or type(error).__name__
        return EngineDiedError(f"no connection to {self.base_url}: {reason}", hint="is it still running there?")


class _Answer:
    """
    What has come of one streamed answer.

    Attributes:
        chunks: How many of them.
        done: Whether ``[DONE]`` has come.
    """

    def __init__(self, url: str, max_tokens: int | None, beside: Callable[[Mapping[str, Any]], None]) -> None:
        self.chunks = 0
        self._beside = beside
        self.done = False
        self._url = url
        self._max_tokens = max_tokens if max_tokens is not None and max_tokens > 0 else None
        self._parser = SseParser()
        self._said = False

    def take(self, data: bytes) -> Iterator[CompletionChunk]:
        """The chunks that these bytes complete; raises where they are none, or one too many."""
        for event in self._parser.feed(data):
            if event.data == _DONE:
                if not self._said:
                    raise EngineProtocolError(f"{self._url} ended its answer without a word")
                self.done = True
                return
            if event.comment:
                continue
            if event.event == _STATUS:
                self._beside(_object(event.data))
                continue
            chunk = self._chunk(event)
            self.chunks += 1
            self._said = self._said or bool(chunk.content or chunk.thought or any(chunk.finish_reasons))
            if self._max_tokens and self.chunks > self._max_tokens * _CHUNKS_PER_TOKEN + _CHUNKS_BESIDE:
                raise EngineProtocolError(
                    f"{self._url} went on after {self.chunks} chunks of an answer of at most {self._max_tokens} tokens",
                    hint="does it know max_tokens?",
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
        """An error in the middle of an answer, in whichever form."""
        error = error_in(data) or ErrorBody(data)
        return EngineRefusedError(
            f"{self._url} broke off with an error: {error.message[:300]}", status=None, kind=error.type
        )


def _ours(headers: Mapping[str, str]) -> dict[str, str]:
    """What a gateway tells in the head of an answer."""
    told = {name.lower(): text for name, text in headers.items()}
    return {name: text for name, text in told.items() if name.startswith(_OURS)}


def _object(data: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except MALFORMED:
        return {}


async def _read(response: aiohttp.ClientResponse, data: bytearray, most: int) -> None:
    """Put a body into ``data``, up to so many bytes."""
    while len(data) < most and (piece := await response.content.read(most - len(data))):
        data += piece


async def _reason(response: aiohttp.ClientResponse) -> bytes:
    """Why it refused, as far as it says so in a short time: its status is known, and that it refused."""
    data = bytearray()
    with contextlib.suppress(TimeoutError, aiohttp.ClientError, OSError):
        async with asyncio.timeout(_QUICK_S):
            await _read(response, data, _MAX_REASON_BYTES)
    return bytes(data)
