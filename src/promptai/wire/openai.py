"""OpenAI's chat completions and completions, as far as PromptAI reads and writes them.

Servers disagree on details, and a reader that fails on a new field neither measures nor routes. So unknown fields are
ignored and missing ones are ``None``, but nothing is guessed: a ``completion_tokens`` that is a string is an error.

The gateway passes on what decodes; a measurement needs more. ``CompletionChunk.exact`` and ``Usage.exact`` are the
strict reading: an answer without token counts is an error there, never a zero.
"""

from typing import Any, Literal, Self

import msgspec

from promptai.wire.llamaserver import PromptProgress, Timings
from promptai.wire.malformed import MALFORMED

Role = Literal["system", "user", "assistant"]


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One message of a conversation; unknown fields are refused, because they would not be sent."""

    role: Role
    content: str


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """Prompt tokens served from a cache; ``None``: not reported."""

    cached_tokens: int | None = None


class TokenCounts(msgspec.Struct, frozen=True):
    """
    A complete usage.

    Attributes:
        cached_tokens: Prompt tokens served from a cache; ``None``: not reported.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None = None


class Usage(msgspec.Struct, frozen=True):
    """
    Token counts of one request, by the server's own tokenizer; ``None``: not reported.

    Embeddings have no ``completion_tokens``, and some servers send ``{}``.
    """

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: PromptTokensDetails | None = None

    @property
    def cached_tokens(self) -> int | None:
        """Prompt tokens served from a cache; ``None``: not reported."""
        return self.prompt_tokens_details.cached_tokens if self.prompt_tokens_details is not None else None

    def exact(self) -> TokenCounts:
        """
        Return the counts of a complete usage.

        Raises:
            msgspec.ValidationError: ``prompt_tokens`` or ``completion_tokens`` is missing.
        """
        if self.prompt_tokens is None or self.completion_tokens is None:
            missing = "prompt_tokens" if self.prompt_tokens is None else "completion_tokens"
            raise msgspec.ValidationError(f"missing `{missing}` - at `$.usage`")
        return TokenCounts(self.prompt_tokens, self.completion_tokens, self.cached_tokens)


class TokenId(msgspec.Struct, frozen=True):
    """One token of ``logprobs``; its ``id`` is an addition of llama-server."""

    id: int | None = None


class Logprobs(msgspec.Struct, frozen=True):
    """``logprobs`` of a chunk, reduced to the token ids."""

    content: list[TokenId] | None = None


class Delta(msgspec.Struct, frozen=True):
    """
    The part of a message that one chunk adds.

    Attributes:
        content: ``None`` or empty in chunks without text.
        reasoning_content, reasoning: Reasoning before the answer. llama-server and DeepSeek use the first name,
            Ollama and newer builds of vLLM the second.
    """

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: Any = None

    @property
    def thought(self) -> str:
        """The reasoning under either name; a server may send both, with the same text."""
        return self.reasoning_content or self.reasoning or ""


class ChunkChoice(msgspec.Struct, frozen=True):
    """One alternative of a chunk: a chat's ``delta`` or a completion's ``text``."""

    delta: Delta | None = Delta()
    finish_reason: str | None = None
    index: int = 0
    text: str | None = None
    logprobs: Logprobs | None = None


class ErrorBody(msgspec.Struct, frozen=True):
    """The content of an error envelope; ``n_prompt_tokens`` and ``n_ctx`` are additions of llama-server."""

    message: str = ""
    type: str | None = None
    code: int | str | None = None
    n_prompt_tokens: int | None = None
    n_ctx: int | None = None


class ErrorEnvelope(msgspec.Struct, frozen=True):
    """An error, as a response or inside a stream: wrapped, or flat (then ``error`` is missing)."""

    error: ErrorBody | str | None = None
    message: str | None = None
    type: str | None = None
    code: int | str | None = None


def error_in(data: str | bytes) -> ErrorBody | None:
    """Return the error that ``data`` contains in any of the forms in use; ``None`` when it is not an error."""
    try:
        envelope = msgspec.json.decode(data, type=ErrorEnvelope)
    except MALFORMED:
        return None
    if isinstance(envelope.error, ErrorBody):
        return envelope.error
    text = envelope.error if envelope.error is not None else envelope.message
    return None if text is None else ErrorBody(text, envelope.type, envelope.code)


class CompletionChunk(msgspec.Struct, frozen=True):
    """
    One chunk of a streamed chat completion or completion.

    Attributes:
        choices: ``None`` or empty in chunks that carry only counts; some servers send ``null``.
        timings, prompt_progress: Additions of llama-server.
        error: Anything but ``None`` ends the stream with an error.
    """

    choices: list[ChunkChoice] | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    prompt_progress: PromptProgress | None = None
    error: Any = None

    @property
    def content(self) -> str:
        """The answer's text in this chunk, over all choices of a chat."""
        return "".join(choice.delta.content or "" for choice in self.choices or () if choice.delta is not None)

    @property
    def thought(self) -> str:
        """The reasoning in this chunk, over all choices of a chat."""
        return "".join(choice.delta.thought for choice in self.choices or () if choice.delta is not None)

    @property
    def finish_reasons(self) -> list[str]:
        """The reasons of the choices that end with this chunk."""
        return [choice.finish_reason for choice in self.choices or () if choice.finish_reason is not None]

    def exact(self) -> Self:
        """
        Return this chunk, checked for everything that a measurement relies on.

        Raises:
            msgspec.ValidationError: A usage without its counts, a ``delta`` that is ``null``, or an error of a form
                that no server is known to use.
        """
        if self.usage is not None:
            self.usage.exact()
        if any(choice.delta is None for choice in self.choices or ()):
            raise msgspec.ValidationError("expected `object`, got `null` - at `$.choices[...].delta`")
        if self.error is not None:
            msgspec.convert(self.error, ErrorBody | str)
        return self


class CompletionResponse(msgspec.Struct, frozen=True):
    """A chat completion, completion or embedding in one piece, reduced to what accounting reads."""

    choices: list[ChunkChoice] | None = None
    usage: Usage | None = None
    timings: Timings | None = None


class ModelMeta(msgspec.Struct, frozen=True):
    """An addition of llama-server to a model's entry: the size of its vocabulary in tokens."""

    n_vocab: int | None = None


class ModelEntry(msgspec.Struct, frozen=True):
    """One entry of ``GET /v1/models``."""

    id: str
    meta: ModelMeta | None = None


class ModelList(msgspec.Struct, frozen=True):
    """``GET /v1/models``; Ollama sends ``null`` for an empty list."""

    data: list[ModelEntry] | None
