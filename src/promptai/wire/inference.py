"""An inference request, as far as the gateway reads it.

Bodies pass through unchanged. The gateway reads only what it decides by: the model, the length of the prompt, and
whether another engine could continue the answer. Unknown fields are ignored here and reach the engine as they came.
"""

from typing import Any

import msgspec


class Prompt(msgspec.Struct, frozen=True):
    """
    One text that an engine computes independently of the request's others.

    Attributes:
        text: The text that prefix matching compares; JSON for a prompt of token ids.
        chars: Characters that an engine has to tokenise.
        ids: Tokens that were sent as token ids.
    """

    text: str
    chars: int
    ids: int = 0

    def tokens(self, chars_per_token: float) -> float:
        """Estimate the length in tokens."""
        return self.ids + self.chars / chars_per_token


class InferenceRequest(msgspec.Struct, frozen=True):
    """
    The fields of a chat completion, completion or embeddings request that decide something in the gateway.

    Attributes:
        messages: Set for a chat; each is an object, not checked further.
        prompt: Set for a completion: a text, token ids, or several of either.
        input: Set for embeddings.
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
        """Maximum tokens of the answer; ``None``: limited only by the context."""
        found = next((x for x in (self.n_predict, self.max_completion_tokens, self.max_tokens) if x is not None), None)
        return found if found is not None and found >= 0 else None

    @property
    def include_usage(self) -> bool:
        """Whether the client wants a usage chunk at the end of the stream."""
        return bool((self.stream_options or {}).get("include_usage"))

    @property
    def answers(self) -> int:
        """Number of answers requested: ``n`` for each prompt."""
        prompts = len(self.prompts()) if isinstance(self.prompt, list) else 1
        return max(1, self.n or 1) * prompts

    def prompts(self) -> tuple[Prompt, ...]:
        """Return the texts that an engine computes independently: one for a chat, one for each prompt or input."""
        if self.messages is not None:
            tools = msgspec.json.encode(self.tools).decode() if self.tools else ""
            text = tools + "".join(map(_message, self.messages))
            return (Prompt(text, len(text)),)
        given = self.prompt if self.prompt is not None else self.input
        # llama-server's rule: a list that contains a token id is one prompt.
        if isinstance(given, list) and not any(map(_is_id, given)):
            return tuple(map(_prompt, given))
        return (_prompt(given),)

    def text(self) -> str:
        """Return the prompt as one text for prefix matching, in the order an engine reads it; JSON for several."""
        prompts = self.prompts()
        if len(prompts) == 1:
            return prompts[0].text
        return msgspec.json.encode(self.prompt if self.prompt is not None else self.input).decode()


def _prompt(given: Any) -> Prompt:
    if isinstance(given, dict):  # llama-server's multimodal form: a text, and images beside it
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


def assistant_turn(answer: str) -> str:
    """Return how ``InferenceRequest.text`` renders ``answer`` when the conversation's next request repeats it."""
    return f"\x1eassistant\x1f{answer}"
