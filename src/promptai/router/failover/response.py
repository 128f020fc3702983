"""Build a complete response from the chunks of a stream.

llama-server notices that its client has disconnected only when it writes. It writes a response that is not streamed at
its end, so a board may compute for minutes without a client (tried with b11549). The gateway therefore streams from
engines wherever they can (``RoutedRequest.response``), and builds the response for clients that do not want a stream.
Fields are merged by type, not by name: texts are joined, lists are appended, and any other value replaces the earlier
one. Pure.
"""

from collections.abc import Iterable
from typing import Any

import msgspec

from promptai.router.failover.usage import UsageTally
from promptai.wire.inference import InferenceRequest
from promptai.wire.openai import Usage

_PART_SEPARATOR = "\n\n"
_OBJECTS = {"chat.completion.chunk": "chat.completion"}


class ResponseBuilder:
    """
    A response under construction.

    Args:
        chat: Whether it is a chat completion.
        prefill: Beginning of the answer that the request contains.
        alternatives: Answers per prompt; the answers to one prompt have consecutive indices.
    """

    def __init__(self, *, chat: bool, prefill: str = "", alternatives: int = 1) -> None:
        self._chat = chat
        self._prefill = prefill
        self._common: dict[str, Any] = {}
        self._choices: dict[int, dict[str, Any]] = {}
        self._tally = UsageTally(alternatives)
        self._usage: dict[str, Any] | None = None
        self._index = 0

    def add(self, chunks: Iterable[bytes]) -> None:
        """Merge chunks in the order of their arrival."""
        for data in chunks:
            chunk = msgspec.json.decode(data, type=dict[str, Any])
            for choice in chunk.pop("choices", None) or ():
                self._index = choice.get("index", 0)
                self._merge_choice(choice)
            usage = chunk.pop("usage", None)
            if isinstance(usage, dict):  # without choices beside it, it belongs to the previous chunk's answer
                self._usage = usage
                self._tally.record(usage=msgspec.convert(usage, Usage), index=self._index)
            chunk.pop("prompt_progress", None)  # only streams have it
            self._common.update(chunk)

    def build(self) -> bytes:
        """Return the response as JSON."""
        kind = self._common.get("object")
        choices = [self._choices[index] for index in sorted(self._choices)]
        response = {**self._common, "object": _OBJECTS.get(str(kind), kind), "choices": choices}
        return msgspec.json.encode(response | ({} if self._usage is None else {"usage": self._combined(self._usage)}))

    def _combined(self, last: dict[str, Any]) -> dict[str, Any]:
        """The usage of all answers; fields that the gateway does not know are those of the last report."""
        usage = self._tally.usage()
        if usage is None or self._tally.usage_reports == 1:
            return last
        prompt, generated = usage.prompt_tokens, usage.completion_tokens
        total = None if prompt is None or generated is None else prompt + generated
        combined = {**last, "prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": total}
        if "prompt_tokens_details" in last:
            combined["prompt_tokens_details"] = {"cached_tokens": usage.cached_tokens}
        return combined

    def _merge_choice(self, choice: dict[str, Any]) -> None:
        index = choice.get("index", 0)
        merged = self._choices.get(index)
        if merged is None:
            # A prefilled beginning (assistant prefill) is part of a complete response, but not of a stream.
            empty = {"message": {"role": "assistant", "content": self._prefill}} if self._chat else {"text": ""}
            merged = self._choices[index] = {"index": index, **empty, "finish_reason": None}
        for name, value in choice.items():
            if name == "delta":
                _merge(merged["message"], value or {})
            elif name == "text":
                merged["text"] += value or ""
            elif name == "logprobs" and isinstance(value, dict):
                merged[name] = merged.get(name) or {}
                _merge(merged[name], value)
            elif name != "index":
                merged[name] = merged.get(name) if value is None else value


def prefilled_answer(request: InferenceRequest) -> str:
    """Return the beginning of the answer that a chat request contains (assistant prefill)."""
    last = request.messages[-1] if request.messages else {}
    content = last.get("content") if last.get("role") == "assistant" else None
    if isinstance(content, list):  # joined as llama-server joins them (b11549)
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        return _PART_SEPARATOR.join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""


def _merge(into: dict[str, Any], more: dict[str, Any]) -> None:
    for name, value in more.items():
        if value is None:
            into.setdefault(name, None)
        elif name == "tool_calls" and isinstance(value, list):
            _merge_calls(into.setdefault(name, []), value)
        else:
            into[name] = _joined(into.get(name), value) if name != "role" else value


def _joined(one: Any, other: Any) -> Any:
    both_text = isinstance(one, str) and isinstance(other, str)
    both_lists = isinstance(one, list) and isinstance(other, list)
    return one + other if both_text or both_lists else other


def _merge_calls(into: list[dict[str, Any]], more: list[dict[str, Any]]) -> None:
    """Merge pieces of tool calls by index: id and name come once, arguments in parts."""
    for piece in more:
        index = piece.get("index", 0)
        while len(into) <= index:
            into.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
        call, function = into[index], piece.get("function") or {}
        call["id"] = piece.get("id") or call["id"]
        call["type"] = piece.get("type") or call["type"]
        call["function"]["name"] += function.get("name") or ""
        call["function"]["arguments"] += function.get("arguments") or ""
