"""The simulated engine's requests, and the three formats of its responses.

The formats are those observed from llama-server b11549, with their oddities: a chat's progress chunks look like its
first chunk, those of ``/completion`` contain a token 0 that was never generated, and a native stream ends without
``[DONE]``. Values only: no time and no sockets.
"""

import zlib
from typing import Any, Protocol

import msgspec

from promptai.engine.simulation import Emission, Request

_DIMENSIONS = 8
_DONE = b"data: [DONE]\n\n"


class ContentPart(msgspec.Struct):
    """One part of a message; only text is read."""

    text: str
    type: str = "text"


class ChatTurn(msgspec.Struct):
    """One message of a request, in any of OpenAI's formats."""

    role: str
    parts: str | list[ContentPart] | None = msgspec.field(default=None, name="content")

    @property
    def content(self) -> str:
        """The text; parts are joined by line feeds, like llama-server does."""
        return "\n".join(part.text for part in self.parts) if isinstance(self.parts, list) else self.parts or ""


class StreamOptions(msgspec.Struct):
    """``stream_options`` of a chat."""

    include_usage: bool = False


class _Common(msgspec.Struct, kw_only=True):
    stream: bool = False
    cache_prompt: bool = True
    id_slot: int = -1
    return_progress: bool = False


class TemplateBody(msgspec.Struct):
    """``POST /apply-template``."""

    messages: list[ChatTurn]


class ChatBody(_Common, kw_only=True):
    """``POST /v1/chat/completions``."""

    messages: list[ChatTurn]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class TextBody(_Common, kw_only=True):
    """``POST /v1/completions``."""

    prompt: str | list[int]
    max_tokens: int | None = None


class NativeBody(_Common, kw_only=True):
    """``POST /completion``."""

    prompt: str | list[int]
    n_predict: int = 128
    return_tokens: bool = False


class ContentBody(msgspec.Struct):
    """``POST /tokenize``; the vocabulary has no special tokens to add."""

    content: str


class EmbeddingsBody(msgspec.Struct):
    """``POST /v1/embeddings``."""

    input: str | list[str | int | list[int]]


class PrefillProgress(msgspec.Struct, frozen=True):
    """Progress of a request's prefill, in tokens and milliseconds."""

    total: int
    cache: int
    processed: int
    time_ms: int


class ResponseFormat(Protocol):
    """
    The chunks and the response of one API.

    Attributes:
        done: The bytes that end a stream.
    """

    done: bytes

    def begin(self) -> dict[str, Any] | None:
        """Return the chunk before the first token; ``None``: there is none."""

    def progress(self, request: Request, progress: PrefillProgress) -> dict[str, Any]:
        """Return the chunk for a computed part of the prompt."""

    def token(self, request: Request, emission: Emission, number: int) -> dict[str, Any]:
        """Return the chunk for a token; ``number`` counts from 1."""

    def end(self, request: Request) -> list[dict[str, Any]]:
        """Return the chunks after the last token."""

    def whole(self, request: Request, text: str) -> dict[str, Any]:
        """Return the response in one piece."""


class ChatFormat:
    """OpenAI's chat completions, with llama-server's additions."""

    done = _DONE

    def __init__(self, number: int, model: str, body: ChatBody) -> None:
        self._head = {"id": f"sim-{number}", "created": 0, "model": model}
        self._usage = body.stream_options is not None and body.stream_options.include_usage
        self._logprobs = body.logprobs is True and body.top_logprobs != 0

    def begin(self) -> dict[str, Any]:
        """Return the chunk with the role."""
        return self._chunk({"role": "assistant", "content": None})

    def progress(self, request: Request, progress: PrefillProgress) -> dict[str, Any]:  # noqa: ARG002  part of the protocol
        """Repeat the chunk with the role, with the progress."""
        return {**self.begin(), "prompt_progress": msgspec.to_builtins(progress)}

    def token(self, request: Request, emission: Emission, number: int) -> dict[str, Any]:  # noqa: ARG002  see above
        """Return one delta, with the token's id when ``logprobs`` was requested."""
        chunk = self._chunk({"content": emission.text})
        if self._logprobs:
            token = {
                "id": emission.token,
                "token": emission.text,
                "bytes": list(emission.text.encode()),
                "logprob": 0.0,
            }
            chunk["choices"][0]["logprobs"] = {"content": [{**token, "top_logprobs": [token]}]}
        return chunk

    def end(self, request: Request) -> list[dict[str, Any]]:
        """Return the finish reason; timings are in its chunk, or in a separate chunk with the usage."""
        last = self._chunk({}, request.finish_reason)
        if not self._usage:
            return [{**last, "timings": msgspec.to_builtins(request.timings)}]
        return [last, {**last, "choices": [], **_usage_and_timings(request)}]

    def whole(self, request: Request, text: str) -> dict[str, Any]:
        """Return one message."""
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": request.finish_reason}
        return {**self._head, "object": "chat.completion", "choices": [choice], **_usage_and_timings(request)}

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}


class TextFormat:
    """OpenAI's text completions."""

    done = _DONE

    def __init__(self, number: int, model: str) -> None:
        self._head = {"id": f"sim-{number}", "object": "text_completion", "created": 0, "model": model}

    def begin(self) -> None:
        """Return nothing: there is no such chunk."""

    def progress(self, request: Request, progress: PrefillProgress) -> dict[str, Any]:  # noqa: ARG002  part of the protocol
        """Return a chunk without text."""
        return {**self._chunk(""), "prompt_progress": msgspec.to_builtins(progress)}

    def token(self, request: Request, emission: Emission, number: int) -> dict[str, Any]:  # noqa: ARG002  see above
        """Return one piece of text."""
        return self._chunk(emission.text)

    def end(self, request: Request) -> list[dict[str, Any]]:
        """Return the finish reason with usage and timings."""
        return [{**self._chunk("", request.finish_reason), **_usage_and_timings(request)}]

    def whole(self, request: Request, text: str) -> dict[str, Any]:
        """Return one text."""
        return {**self._chunk(text, request.finish_reason), **_usage_and_timings(request)}

    def _chunk(self, text: str, finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"text": text, "index": 0, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head, "choices": [choice]}


class NativeFormat:
    """llama-server's own ``/completion``."""

    done = b""

    def __init__(self, model: str, *, return_tokens: bool) -> None:
        self._model = model
        self._return_tokens = return_tokens

    def begin(self) -> None:
        """Return nothing: there is no such chunk."""

    def progress(self, request: Request, progress: PrefillProgress) -> dict[str, Any]:
        """Return a chunk without text, with a token 0 that was never generated."""
        return {**_native(request, "", [0], 0), "prompt_progress": msgspec.to_builtins(progress)}

    def token(self, request: Request, emission: Emission, number: int) -> dict[str, Any]:
        """Return a token with its id, requested or not."""
        return _native(request, emission.text, [emission.token], number)

    def end(self, request: Request) -> list[dict[str, Any]]:
        """Return the chunk with the timings."""
        return [self._last(request, "", [])]

    def whole(self, request: Request, text: str) -> dict[str, Any]:
        """Return text and timings, and token ids when ``return_tokens`` was requested."""
        return self._last(request, text, request.generated if self._return_tokens else [])

    def _last(self, request: Request, text: str, tokens: list[int]) -> dict[str, Any]:
        return {
            **_native(request, text, tokens, len(request.generated)),
            "id_slot": request.slot,
            "stop": True,
            "model": self._model,
            "truncated": False,
            "stop_type": "limit" if request.finish_reason == "length" else "eos",
            "stopping_word": "",
            "tokens_cached": len(request.prompt) + len(request.generated),
            "timings": msgspec.to_builtins(request.timings),
        }


def _native(request: Request, text: str, tokens: list[int], predicted: int) -> dict[str, Any]:
    return {
        "index": 0,
        "content": text,
        "tokens": tokens,
        "stop": False,
        "id_slot": -1,
        "tokens_predicted": predicted,
        "tokens_evaluated": len(request.prompt),
    }


def _usage_and_timings(request: Request) -> dict[str, Any]:
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


def embedding(tokens: list[int]) -> list[float]:
    """Return a small vector of length 1 that depends on these tokens alone."""
    data = b"".join((token % 2**64).to_bytes(8, "big") for token in tokens)
    numbers = [zlib.crc32(data, number + 1) / 2**31 - 1 for number in range(_DIMENSIONS)]
    length = sum(number * number for number in numbers) ** 0.5 or 1.0
    return [number / length for number in numbers]


def event(body: dict[str, Any]) -> bytes:
    """Encode one server-sent event."""
    return b"data: " + msgspec.json.encode(body) + b"\n\n"
