"""Make one answer of a stream's chunks, as if it had never been streamed.

llama-server notices that its client has gone only when it writes; an answer in one piece is
written at its end, so that a board computes for minutes for nobody (tried with b11549). So the
gateway always has answers streamed to it, and puts them together for those who want one piece.
What chunks may hold is merged by what it is, not by name: texts are joined, lists are
appended, and whatever else there is stands as it came last. Pure.
"""

from collections.abc import Iterable
from typing import Any

import msgspec

from promptai.wire.passing import PassingRequest

_OBJECTS = {"chat.completion.chunk": "chat.completion"}


class Assembly:
    """One answer in the making."""

    def __init__(self, *, chat: bool, begun: str = "") -> None:
        self._chat = chat
        self._begun = begun
        self._head: dict[str, Any] = {}
        self._choices: dict[int, dict[str, Any]] = {}
        self._usage: dict[str, Any] | None = None

    def add(self, chunks: Iterable[bytes]) -> None:
        """Take chunks as they came."""
        for data in chunks:
            chunk = msgspec.json.decode(data, type=dict[str, Any])
            for choice in chunk.pop("choices", None) or ():
                self._merge_choice(choice)
            usage = chunk.pop("usage", None)
            if isinstance(usage, dict):
                self._usage = usage if self._usage is None else _both(self._usage, usage)
            chunk.pop("prompt_progress", None)  # of a stream alone
            self._head.update(chunk)

    def answer(self) -> bytes:
        """The answer as JSON."""
        kind = self._head.get("object")
        usage = {} if self._usage is None else {"usage": self._usage}
        choices = [self._choices[index] for index in sorted(self._choices)]
        return msgspec.json.encode({**self._head, "object": _OBJECTS.get(str(kind), kind), "choices": choices, **usage})

    def _merge_choice(self, choice: dict[str, Any]) -> None:
        index = choice.get("index", 0)
        into = self._choices.get(index)
        if into is None:
            # What the request began itself (assistant prefill) is a part of an answer in one piece, not of a stream.
            empty = {"message": {"role": "assistant", "content": self._begun}} if self._chat else {"text": ""}
            into = self._choices[index] = {"index": index, **empty, "finish_reason": None}
        for name, value in choice.items():
            if name == "delta":
                _merge(into["message"], value or {})
            elif name == "text":
                into["text"] += value or ""
            elif name == "logprobs" and isinstance(value, dict):
                into[name] = into.get(name) or {}
                _merge(into[name], value)
            elif name != "index":
                into[name] = into.get(name) if value is None else value


def begun(request: PassingRequest) -> str:
    """What the answer of a chat begins with because the request wrote it (assistant prefill)."""
    last = request.messages[-1] if request.messages else {}
    content = last.get("content") if last.get("role") == "assistant" else None
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
    """Tool calls come in pieces, by index: id and name once, arguments in parts."""
    for piece in more:
        index = piece.get("index", 0)
        while len(into) <= index:
            into.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
        call, function = into[index], piece.get("function") or {}
        call["id"] = piece.get("id") or call["id"]
        call["type"] = piece.get("type") or call["type"]
        call["function"]["name"] += function.get("name") or ""
        call["function"]["arguments"] += function.get("arguments") or ""


def _both(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The usage of two alternatives of one prompt; what one of them does not tell, both do not."""
    here, there, prompt = one.get("completion_tokens"), other.get("completion_tokens"), other.get("prompt_tokens")
    generated = None if here is None or there is None else here + there
    total = None if generated is None or prompt is None else prompt + generated
    return {**other, "completion_tokens": generated, "total_tokens": total}
