"""OpenAI's chat completions, as far as PromptAI reads and writes them.

Unknown fields are ignored when reading: servers differ, and a benchmark that
breaks on a new field measures nothing. What is read is typed strictly: a
``completion_tokens`` that is a string is an error, not a guess.
"""

from typing import Literal

import msgspec

from promptai.wire.llamaserver import PromptProgress, Timings
from promptai.wire.malformed import MALFORMED

Role = Literal["system", "user", "assistant"]


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One message of a conversation."""

    role: Role
    content: str


class PromptTokensDetails(msgspec.Struct, frozen=True):
    """The part of a prompt that came from a cache, in tokens."""

    cached_tokens: int | None = None


class Usage(msgspec.Struct, frozen=True):
    """Token counts of one request, by the server's own tokenizer."""

    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


class Delta(msgspec.Struct, frozen=True):
    """
    What one chunk adds.

    Attributes:
        content: ``None`` or empty in chunks that carry no text.
        reasoning_content, reasoning: Text of a model that thinks before it answers, as llama-server and
            DeepSeek call it, and as Ollama and newer builds of vLLM do.
    """

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    @property
    def thought(self) -> str:
        """What it adds to the thinking, under whichever name; a server may send both."""
        return self.reasoning_content or self.reasoning or ""


class ChunkChoice(msgspec.Struct, frozen=True):
    """One alternative of a chunk."""

    delta: Delta = Delta()
    finish_reason: str | None = None


class ErrorBody(msgspec.Struct, frozen=True):
    """The inside of an error envelope; ``n_ctx`` and ``n_prompt_tokens`` are llama-server's."""

    message: str = ""
    type: str | None = None
    code: int | str | None = None
    n_prompt_tokens: int | None = None
    n_ctx: int | None = None


class ErrorEnvelope(msgspec.Struct, frozen=True):
    """An error, as a response or in the middle of a stream: wrapped, or flat (then ``error`` is missing)."""

    error: ErrorBody | str | None = None
    message: str | None = None
    type: str | None = None
    code: int | str | None = None


def error_in(data: str | bytes) -> ErrorBody | None:
    """The error that a server sent, in any of the forms in use; ``None`` when it is none."""
    try:
        envelope = msgspec.json.decode(data, type=ErrorEnvelope)
    except MALFORMED:
        return None
    if isinstance(envelope.error, ErrorBody):
        return envelope.error
    text = envelope.error if envelope.error is not None else envelope.message
    return None if text is None else ErrorBody(text, envelope.type, envelope.code)


class ChatChunk(msgspec.Struct, frozen=True):
    """One streamed chunk; ``timings`` and ``prompt_progress`` are llama-server's."""

    listed: list[ChunkChoice] | None = msgspec.field(default=None, name="choices")
    usage: Usage | None = None
    timings: Timings | None = None
    prompt_progress: PromptProgress | None = None
    error: ErrorBody | str | None = None

    @property
    def choices(self) -> list[ChunkChoice]:
        """Its alternatives; for none of them some servers send null."""
        return self.listed or []


class ModelMeta(msgspec.Struct, frozen=True):
    """What llama-server adds to a model's entry: tokens of its vocabulary."""

    n_vocab: int | None = None


class ModelEntry(msgspec.Struct, frozen=True):
    """One line of ``GET /v1/models``."""

    id: str
    meta: ModelMeta | None = None


class ModelList(msgspec.Struct, frozen=True):
    """``GET /v1/models``; Ollama writes null for none."""

    data: list[ModelEntry] | None
