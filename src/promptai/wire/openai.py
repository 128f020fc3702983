"""OpenAI's chat completions, as far as PromptAI reads and writes them.

Unknown fields are ignored when reading: servers differ, and a benchmark that
breaks on a new field measures nothing. What is read is typed strictly: a
``completion_tokens`` that is a string is an error, not a guess.
"""

from typing import Literal

import msgspec

from promptai.wire.llamaserver import PromptProgress, Timings

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
    """What one chunk adds; ``content`` is ``None`` or empty in chunks that carry no text."""

    content: str | None = None
    reasoning_content: str | None = None


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
    """An error, as a response or in the middle of a stream."""

    error: ErrorBody


class ChatChunk(msgspec.Struct, frozen=True):
    """One streamed chunk; ``timings`` and ``prompt_progress`` are llama-server's."""

    choices: list[ChunkChoice] = []
    usage: Usage | None = None
    timings: Timings | None = None
    prompt_progress: PromptProgress | None = None
    error: ErrorBody | None = None


class ModelMeta(msgspec.Struct, frozen=True):
    """What llama-server adds to a model's entry: tokens of its vocabulary."""

    n_vocab: int | None = None


class ModelEntry(msgspec.Struct, frozen=True):
    """One line of ``GET /v1/models``."""

    id: str
    meta: ModelMeta | None = None


class ModelList(msgspec.Struct, frozen=True):
    """``GET /v1/models``."""

    data: list[ModelEntry] = []
