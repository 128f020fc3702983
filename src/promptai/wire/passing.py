"""What the gateway reads in what passes through it: as little as it can.

Bodies go through unchanged; of a request that is who it is for, how long its prompt is and
whether its answer could be continued elsewhere, and of a chunk what it adds, and the engine's
account. Everything else is left as it came, and what is unknown is ignored.
"""

from typing import Any

import msgspec

from promptai.wire.llamaserver import PromptProgress, Timings
from promptai.wire.openai import PromptTokensDetails


class PassingUsage(msgspec.Struct, frozen=True):
    """An account of tokens, as far as a server gives one: of embeddings nothing is generated, and some send ``{}``."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: PromptTokensDetails | None = None


class TokenId(msgspec.Struct, frozen=True):
    """One token of ``logprobs``; llama-server tells its id."""

    id: int | None = None


class Logprobs(msgspec.Struct, frozen=True):
    """``logprobs`` of a chunk, as far as ids are in it."""

    content: list[TokenId] | None = None


class PassingDelta(msgspec.Struct, frozen=True):
    """What a chunk adds, in whichever field."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: Any = None


class PassingChoice(msgspec.Struct, frozen=True):
    """One alternative: a chat's ``delta``, or a completion's ``text``."""

    index: int = 0
    delta: PassingDelta | None = None
    text: str | None = None
    finish_reason: str | None = None
    logprobs: Logprobs | None = None


class PassingChunk(msgspec.Struct, frozen=True):
    """A streamed chunk of a chat or a completion; ``error`` in place of one breaks the stream off."""

    choices: list[PassingChoice] | None = None
    usage: PassingUsage | None = None
    timings: Timings | None = None
    prompt_progress: PromptProgress | None = None
    error: Any = None


class NativeChunk(msgspec.Struct, frozen=True):
    """A streamed chunk of llama-server's own ``/completion``."""

    content: str = ""
    tokens: list[int] = []
    stop: bool = False
    stop_type: str | None = None
    timings: Timings | None = None
    prompt_progress: PromptProgress | None = None
    completion_probabilities: Any = None
    error: Any = None


class PassingReply(msgspec.Struct, frozen=True):
    """An answer that was not streamed, as far as it is accounted."""

    choices: list[PassingChoice] | None = None
    usage: PassingUsage | None = None
    timings: Timings | None = None


class Prompt(msgspec.Struct, frozen=True):
    """
    One of the texts that an engine computes each by itself.

    Attributes:
        text: As it is compared with others; of token ids their JSON.
        chars: Characters that an engine has to tokenise.
        ids: Tokens that came as their ids.
    """

    text: str
    chars: int
    ids: int = 0

    def tokens(self, chars_per_token: float) -> float:
        """How many it has, as far as characters tell."""
        return self.ids + self.chars / chars_per_token


class PassingRequest(msgspec.Struct, frozen=True):
    """
    A request's fields that decide something here; all others go to the engine as they are.

    Attributes:
        messages: Of a chat; each is an object, checked no further.
        prompt: Of a completion: text, token ids, or several of either.
        input: Of embeddings.
    """

    model: str | None = None
    messages: list[dict[str, Any]] | None = None
    prompt: str | list[Any] | None = None
    input: str | list[Any] | None = None
    stream: bool | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n_predict: int | None = None
    n: int | None = None
    best_of: int | None = None
    echo: bool | None = None
    suffix: str | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    response_format: dict[str, Any] | None = None
    json_schema: Any | None = None
    grammar: str | None = None
    stream_options: dict[str, Any] | None = None
    return_progress: bool | None = None
    cache_prompt: bool | None = None

    @property
    def limit(self) -> int | None:
        """Most tokens of the answer; ``None``: as many as the context holds."""
        found = next((x for x in (self.n_predict, self.max_completion_tokens, self.max_tokens) if x is not None), None)
        return found if found is not None and found >= 0 else None

    @property
    def include_usage(self) -> bool:
        """Whether the stream shall end with a usage chunk."""
        return bool((self.stream_options or {}).get("include_usage"))

    def prompts(self) -> tuple[Prompt, ...]:
        """What an engine computes each by itself: a chat, or a prompt or an input, or each of several."""
        if self.messages is not None:
            tools = msgspec.json.encode(self.tools).decode() if self.tools else ""
            text = tools + "".join(map(_message, self.messages))
            return (Prompt(text, len(text)),)
        given = self.prompt if self.prompt is not None else self.input
        # As llama-server takes it: a list with a token id in it is one prompt.
        if isinstance(given, list) and not any(map(_is_id, given)):
            return tuple(map(_prompt, given))
        return (_prompt(given),)

    def text(self) -> str:
        """The prompt as one text, in the order in which an engine reads it, for comparing; of several, their JSON."""
        prompts = self.prompts()
        if len(prompts) == 1:
            return prompts[0].text
        return msgspec.json.encode(self.prompt if self.prompt is not None else self.input).decode()


def _prompt(given: Any) -> Prompt:
    if isinstance(given, dict):  # llama-server's: a text, and pictures beside it
        given = given.get("prompt_string")
    if isinstance(given, list):
        chars = sum(len(part) for part in given if isinstance(part, str))
        return Prompt(msgspec.json.encode(given).decode(), chars, sum(map(_is_id, given)))
    text = given if isinstance(given, str) else ""
    return Prompt(text, len(text))


def _is_id(part: object) -> bool:
    return isinstance(part, int) and not isinstance(part, bool)


def _message(message: dict[str, Any]) -> str:
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(str(part.get("text", "")) for part in content if isinstance(part, dict))
    calls = message.get("tool_calls")
    written = msgspec.json.encode(calls).decode() if calls else ""
    return f"\x1e{message.get('role')}\x1f{content if isinstance(content, str) else ''}{written}"


def answered(text: str) -> str:
    """How an answer stands in ``PassingRequest.text`` when it comes back as a conversation's earlier turn."""
    return f"\x1eassistant\x1f{text}"
