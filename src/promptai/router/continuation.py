"""Finish an answer whose engine is gone, on another one.

Half an answer is worse than none: on a board it took a minute to make, and the program that reads
it cannot tell where it broke off. The next engine is given the prompt and what has been sent
already, as token ids, and goes on from there; so nothing is repeated and nothing is missing at
the joint, and every token after it is what the model says to all that stands before it.

The ids are exact where the engine told them (``logprobs``); else they come from tokenising prompt
and answer apart, which is exact as long as the model writes as its tokenizer would.

Not everything can go on: a tool call, a grammar or a thought is in a state that text does not
tell. ``obstacle`` says which. This module decides and rewrites; ``router.flight`` sends. Pure.
"""

from typing import Any

import msgspec

from promptai.wire.llamaserver import Timings
from promptai.wire.passing import NativeChunk, PassingChunk, PassingRequest

#: Of a chat's body, what means nothing, or something else, to /completion.
_CHAT_ONLY = frozenset(
    (
        *("messages", "model", "stream_options", "max_tokens", "max_completion_tokens", "tools", "tool_choice"),
        *("parallel_tool_calls", "response_format", "functions", "function_call", "n", "logprobs", "top_logprobs"),
        *("reasoning_format", "chat_template_kwargs", "add_generation_prompt", "user", "store", "metadata"),
    )
)


class Said:
    """
    What a stream has sent so far.

    Attributes:
        text: Of the answer.
        ids: Of its tokens, as far as every one was told; ``None``: not told.
        chunks: Chunks with text: no more than tokens, and nearly always as many.
        head: The first chunk's fields other than its choices: one answer has one id.
    """

    def __init__(self) -> None:
        self.text = ""
        self.ids: list[int] | None = []
        self.chunks = 0
        self.head: dict[str, Any] = {}
        self.finished = False
        self.beyond_text = ""

    @property
    def anything(self) -> bool:
        """Whether the client has been sent a part of the answer."""
        return bool(self.chunks or self.beyond_text or self.finished)

    def add(self, chunk: PassingChunk) -> bool:
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
            self.finished = self.finished or choice.finish_reason is not None
            ids += [token.id for token in (choice.logprobs.content or ())] if choice.logprobs else []
        if text:
            self._note(text, ids)
        return bool(text)

    def add_native(self, chunk: NativeChunk) -> None:
        """Take note of a chunk of a continuation."""
        if chunk.content:
            self._note(chunk.content, list(chunk.tokens))

    def _note(self, text: str, ids: list[int | None]) -> None:
        self.text += text
        self.chunks += 1
        known = [token for token in ids if token is not None]
        # A chunk of text without as many ids as it has tokens ends the certainty for good.
        self.ids = self.ids + known if self.ids is not None and known and len(known) == len(ids) else None


def _beyond(tool_calls: object, *thoughts: str | None) -> str:
    if tool_calls is not None:
        return "a tool call"
    return "a thought" if any(thoughts) else ""


def obstacle(request: PassingRequest, said: Said) -> str | None:
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
    if max(request.n or 1, request.best_of or 1) > 1:
        return "one of several answers cannot be taken up elsewhere"
    if (
        request.messages is None
        and isinstance(request.prompt, list)
        and not all(isinstance(x, int) for x in request.prompt)
    ):
        return "one of several answers cannot be taken up elsewhere"
    return None


def continued_body(body: dict[str, Any], prompt: list[int], said: list[int], limit: int | None) -> dict[str, Any]:
    """
    A chat's body as one of ``/completion`` that goes on.

    Args:
        prompt: Token ids of the rendered prompt; ``said`` of what has been sent.
        limit: Most tokens of the whole answer.
    """
    kept = {name: value for name, value in body.items() if name not in _CHAT_ONLY}
    left = {} if limit is None else {"n_predict": max(1, limit - len(said))}
    return {**kept, "prompt": prompt + said, "stream": True, "return_tokens": True, "return_progress": True, **left}


def as_chat(chunk: NativeChunk, head: dict[str, Any], *, chat: bool) -> list[bytes]:
    """A continuation's chunk as chunks of the answer that it continues."""
    choices: list[dict[str, Any]] = []
    if chunk.content:
        text = {"delta": {"content": chunk.content}} if chat else {"text": chunk.content, "logprobs": None}
        choices.append({"index": 0, "finish_reason": None, **text})
    if chunk.stop:
        reason = "length" if chunk.stop_type == "limit" else "stop"
        choices.append({"index": 0, "finish_reason": reason, **({"delta": {}} if chat else {"text": ""})})
    found = [{**head, "choices": [choice]} for choice in choices]
    if chunk.stop and chunk.timings is not None and found:
        found[-1]["timings"] = msgspec.to_builtins(chunk.timings)
    return [msgspec.json.encode(one) for one in found]


def usage_chunk(head: dict[str, Any], *, prompt_tokens: int, completion_tokens: int, timings: Timings | None) -> bytes:
    """The last chunk of a stream that was asked for usage, counted over all engines that took part."""
    usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
    account = {} if timings is None else {"timings": msgspec.to_builtins(timings)}
    return msgspec.json.encode({**head, "choices": [], "usage": usage, **account})
