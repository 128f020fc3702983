"""llama-server's additions to OpenAI's API, and its own endpoints.

Field names are llama-server's. They come and go between builds (``build_info`` moved, ``timings`` grew), so nearly
every field has a default, and a count that a build does not send is ``None``, never 0. Seen in b11434 and b11549.
"""

from typing import Any

import msgspec


class Timings(msgspec.Struct, frozen=True):
    """
    The engine's own timings of one request; ground truth for prefill and decode.

    Attributes:
        cache_n: Prompt tokens taken from the KV cache; ``None``: not reported.
        prompt_n: Prompt tokens computed, without those from the cache.
        prompt_ms: Milliseconds spent on them.
        predicted_n: Tokens generated.
        predicted_ms: Milliseconds from the first generated token to the last. The first token belongs to prefill, so
            the rate is (predicted_n - 1) / predicted_ms.
    """

    prompt_n: int
    prompt_ms: float
    predicted_n: int
    predicted_ms: float
    cache_n: int | None = None


class PromptProgress(msgspec.Struct, frozen=True):
    """Progress of prefill (``return_progress``), in tokens and milliseconds."""

    total: int
    processed: int
    cache: int = 0
    time_ms: float = 0.0


class GenerationSettings(msgspec.Struct, frozen=True):
    """``default_generation_settings``, reduced to the context of one slot in tokens."""

    n_ctx: int | None = None


class Props(msgspec.Struct, frozen=True):
    """``GET /props``: the server's model and configuration."""

    total_slots: int = 1
    default_generation_settings: GenerationSettings = GenerationSettings()
    model_alias: str | None = None
    model_path: str | None = None
    model_ftype: str | None = None
    build_info: str | None = None
    chat_template: str | None = None


class Slot(msgspec.Struct, frozen=True):
    """One entry of ``GET /slots``."""

    id: int
    is_processing: bool = False
    n_ctx: int | None = None


class Tokens(msgspec.Struct, frozen=True):
    """``POST /tokenize``."""

    tokens: list[int]


class TokenProbability(msgspec.Struct, frozen=True):
    """One generated token with its raw log-probability (natural logarithm), and the likeliest alternatives."""

    id: int
    logprob: float
    top_logprobs: list["TokenProbability"] = []


class Completion(msgspec.Struct, frozen=True):
    """``POST /completion`` without streaming, reduced to what scoring reads."""

    content: str = ""
    completion_probabilities: list[TokenProbability] = []
    timings: Timings | None = None


class NativeChunk(msgspec.Struct, frozen=True):
    """One chunk of a streamed ``POST /completion``; anything but ``None`` in ``error`` ends the stream."""

    content: str = ""
    tokens: list[int] = []
    stop: bool = False
    stop_type: str | None = None
    timings: Timings | None = None
    prompt_progress: PromptProgress | None = None
    completion_probabilities: Any = None
    error: Any = None
