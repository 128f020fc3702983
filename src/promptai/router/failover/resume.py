"""Finish an answer whose engine is gone, on another one.

Half an answer is worse than none: on a board it took a minute to make, and the program that reads
it cannot tell where it broke off. The next engine is given the prompt and what has been sent
already, as token ids, and goes on from there; so nothing is repeated and nothing is missing at
the joint, and every token after it is what the model says to all that stands before it.

The ids are exact where the engine told them (``logprobs``); else they come from tokenising prompt
and answer apart (``router.failover.joint``), which is exact as long as the model writes as its tokenizer would.

Not everything can go on: a tool call, a grammar or a thought is in a state that text does not
tell. ``obstacle`` says which. This module decides and rewrites; ``router.failover.request`` sends. Pure.
"""

from typing import Any

import msgspec

from promptai.wire.inference import InferenceRequest
from promptai.wire.llamaserver import NativeChunk, Timings
from promptai.wire.openai import CompletionChunk

#: Of a chat's body, what means nothing, or something else, to /completion.
_CHAT_ONLY = frozenset(
    (
        *("messages", "model", "stream_options", "max_tokens", "max_completion_tokens", "tools", "tool_choice"),
        *("parallel_tool_calls", "response_format", "functions", "function_call", "n", "logprobs", "top_logprobs"),
        *("reasoning_format", "chat_template_kwargs", "add_generation_prompt", "user", "store", "metadata"),
    )
)
#: Of how many tokens a chat's ``logprobs`` tell where it does not say.
_LIKELIEST = 20


class SentText:
    """
    What a stream has sent so far.

    Args:
        choices: How many answers are asked for.

    Attributes:
        text: Of the answer.
        ids: Of its tokens, as far as every one was told; ``None``: not told.
        chunks: Chunks with text: no more than tokens, and nearly always as many.
        head: The first chunk's fields other than its choices: one answer has one id.
        prompt_tokens: Of the prompt, once an engine has told; ``None`` before.
        counted: Whether the client has been sent an account of tokens.
    """

    def __init__(self, choices: int = 1) -> None:
        self.text = ""
        self.ids: list[int] | None = []
        self.chunks = 0
        self.head: dict[str, Any] = {}
        self.beyond_text = ""
        self.prompt_tokens: int | None = None
        self.counted = False
        self._choices = self._unfinished = choices
        self._held: list[int] = []

    @property
    def finished(self) -> bool:
        """Whether every answer has said why it ended."""
        return self._unfinished <= 0

    @property
    def tokens(self) -> int:
        """How many have been sent, as far as is known."""
        return max(self.chunks, len(self.ids or ()))

    @property
    def anything(self) -> bool:
        """Whether the client has been sent a part of the answer."""
        return bool(self.text or self.beyond_text or self._unfinished < self._choices)

    def add(self, chunk: CompletionChunk) -> bool:
        """Take note of a chunk; True when it carried text."""
        text = ""
        ids: list[int | None] = []
        for choice in chunk.choices or ():
            delta = choice.delta
            if delta is not None:
                text += delta.content or ""
                self.beyond_text = self.beyond_text or _beyond(
                    delta.tool_calls, delta.reasoning_content, delta.reasoning
                )
            text += choice.text or ""
            self._unfinished -= choice.finish_reason is not None
            ids += [token.id for token in (choice.logprobs.content or ())] if choice.logprobs else []
        if chunk.prompt_progress is not None:
            self.text += text  # a tag that the prompt ends with, shown to the client: no token was generated for it
        elif text:
            self._note(text, ids)
        self.counted = self.counted or chunk.usage is not None
        return bool(text)

    def goes_on(self, prompt: list[int], said: list[int]) -> None:
        """An engine goes on from these token ids."""
        self.prompt_tokens, self.ids, self._held = len(prompt), list(said), []

    def add_native(self, chunk: NativeChunk) -> None:
        """Take note of a chunk of a continuation."""
        if chunk.content:
            self._note(chunk.content, [*self._held, *chunk.tokens])
            self._held = []
        else:  # its text is held back, because a stop word may have begun
            self._held += chunk.tokens
        self._unfinished -= chunk.stop

    def end(self) -> None:
        """There is no more."""
        self._unfinished = 0

    def _note(self, text: str, ids: list[int | None]) -> None:
        self.text += text
        self.chunks += 1
        known = [token for token in ids if token is not None]
        # A chunk of text without an id ends the certainty for good.
        if self.ids is not None and known and len(known) == len(ids):
            self.ids += known
        else:
            self.ids = None


def _beyond(tool_calls: object, *thoughts: str | None) -> str:
    if tool_calls is not None:
        return "a tool call"
    return "a thought" if any(thoughts) else ""


def obstacle(request: InferenceRequest, said: SentText) -> str | None:
    """Why this answer cannot go on elsewhere, once a part of it has been sent; ``None`` when it can."""
    if said.beyond_text:
        return f"{said.beyond_text} cannot be taken up elsewhere"
    for name, given in (
        ("tools", request.tools),
        ("functions", request.functions),
        ("grammar", request.grammar),
        ("json_schema", request.json_schema),
        ("echo", request.echo),
        ("suffix", request.suffix),
    ):
        if given:
            return f"an answer with {name} cannot be taken up elsewhere"
    if (request.response_format or {}).get("type", "text") != "text":
        return "an answer with response_format cannot be taken up elsewhere"
    if answers(request) > 1 or (request.best_of or 1) > 1 or not _one_text(request.prompt):
        return "one of several answers cannot be taken up elsewhere"
    if any(_beside_text(message.get("content")) for message in request.messages or ()):
        return "an answer to more than text cannot be taken up elsewhere"
    return None


def answers(request: InferenceRequest) -> int:
    """How many answers a request asks for."""
    prompts = len(request.prompts()) if isinstance(request.prompt, list) else 1
    return max(1, request.n or 1) * prompts


def _one_text(prompt: str | list[Any] | None) -> bool:
    """Whether a prompt is one text, or the ids of one; a list of one text, or of both parts, counts as several."""
    return not isinstance(prompt, list) or all(isinstance(token, int) for token in prompt)


def _beside_text(content: object) -> bool:
    """Whether a message holds a picture or a sound: what an engine made of that is in no text."""
    return isinstance(content, list) and any(
        isinstance(part, dict) and part.get("type", "text") != "text" for part in content
    )


def continued_body(body: dict[str, Any], prompt: list[int], *, left: int | None) -> dict[str, Any]:
    """
    A request's body as one of ``/completion`` that goes on.

    Args:
        prompt: Token ids of the prompt and of what has been sent.
        left: Most tokens that may follow; ``None``: as many as the context holds.
    """
    kept = {name: value for name, value in body.items() if name not in _CHAT_ONLY}
    wanted = body.get("logprobs")
    if wanted:
        # A chat says whether and how many, a completion how many.
        likeliest = body.get("top_logprobs") if wanted is True else wanted
        kept["n_probs"] = _LIKELIEST if likeliest is None else likeliest
    if left is not None:
        kept["n_predict"] = left
    return {**kept, "prompt": prompt, "stream": True, "return_tokens": True, "return_progress": True}


def as_answer(chunk: NativeChunk, said: SentText, request: InferenceRequest, before: int) -> list[bytes]:
    """
    A continuation's chunk as chunks of the answer that it continues.

    Args:
        before: Tokens that were sent before the continuation.
    """
    head, chat = said.head, request.messages is not None
    found: list[dict[str, Any]] = []
    if chunk.content:
        text: dict[str, Any] = (
            {"delta": {"content": chunk.content}} if chat else {"text": chunk.content, "logprobs": None}
        )
        if chunk.completion_probabilities is not None:
            text["logprobs"] = {"content": chunk.completion_probabilities}
        found.append({**head, "choices": [{"index": 0, "finish_reason": None, **text}]})
    if chunk.stop:
        made = before + chunk.timings.predicted_n if chunk.timings is not None else said.tokens
        usage = None if said.prompt_tokens is None else _usage(said.prompt_tokens, made)
        reason = "length" if chunk.stop_type == "limit" else "stop"
        found.append(_last(head, reason, chat=chat, usage=usage))
        if chat and request.include_usage and usage is not None:
            found.append({**head, "choices": [], "usage": usage})
        if chunk.timings is not None:
            found[-1]["timings"] = chunk.timings
    return [msgspec.json.encode(one) for one in found]


def rest(said: SentText, request: InferenceRequest, timings: Timings | None) -> list[bytes]:
    """What is missing of an answer that is whole, though its engine failed before it said so."""
    chat, found = request.messages is not None, []
    usage = None if said.prompt_tokens is None else _usage(said.prompt_tokens, said.tokens)
    if not said.finished:
        said.end()
        found.append(_last(said.head, "length", chat=chat, usage=usage))
    if chat and request.include_usage and usage is not None and not said.counted:
        account = {} if timings is None else {"timings": timings}
        found.append({**said.head, "choices": [], "usage": usage, **account})
    return [msgspec.json.encode(one) for one in found]


def _last(head: dict[str, Any], reason: str, *, chat: bool, usage: dict[str, int] | None) -> dict[str, Any]:
    """What says why an answer ended; that of a completion holds the account of its tokens, as llama-server's does."""
    end: dict[str, Any] = {"delta": {}} if chat else {"text": "", "logprobs": None}
    account = {} if chat or usage is None else {"usage": usage}
    return {**head, "choices": [{"index": 0, "finish_reason": reason, **end}], **account}


def _usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
