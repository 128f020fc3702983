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

from promptai.wire.inference import InferenceRequest

_BETWEEN_PARTS = "\n\n"
_OBJECTS = {"chat.completion.chunk": "chat.completion"}


class ResponseBuilder:
    """
    One answer in the making.

    Args:
        begun: What the request wrote of it.
        alternatives: Answers to each prompt; their indices stand together.
    """

    def __init__(self, *, chat: bool, begun: str = "", alternatives: int = 1) -> None:
        self._chat = chat
        self._begun = begun
        self._alternatives = max(1, alternatives)
        self._head: dict[str, Any] = {}
        self._choices: dict[int, dict[str, Any]] = {}
        self._usages: dict[int, dict[str, Any]] = {}
        self._index = 0

    def add(self, chunks: Iterable[bytes]) -> None:
        """Take chunks as they came."""
        for data in chunks:
            chunk = msgspec.json.decode(data, type=dict[str, Any])
            for choice in chunk.pop("choices", None) or ():
                self._index = choice.get("index", 0)
                self._merge_choice(choice)
            usage = chunk.pop("usage", None)
            if isinstance(usage, dict):  # without a choice beside it, of the one before it
                self._usages[self._index] = usage
            chunk.pop("prompt_progress", None)  # of a stream alone
            self._head.update(chunk)

    def answer(self) -> bytes:
        """The answer as JSON."""
        kind = self._head.get("object")
        usage = {"usage": self._usage()} if self._usages else {}
        choices = [self._choices[index] for index in sorted(self._choices)]
        return msgspec.json.encode({**self._head, "object": _OBJECTS.get(str(kind), kind), "choices": choices, **usage})

    def _usage(self) -> dict[str, Any]:
        """Of all answers; those to one prompt share it. What one of them does not tell is not known of all."""
        told = [self._usages[index] for index in sorted(self._usages)]
        if len(told) == 1:
            return told[0]
        prompts = {index // self._alternatives: usage for index, usage in sorted(self._usages.items(), reverse=True)}
        prompt = _sum(usage.get("prompt_tokens") for usage in prompts.values())
        generated = _sum(usage.get("completion_tokens") for usage in told)
        total = None if prompt is None or generated is None else prompt + generated
        found = {**told[-1], "prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": total}
        cached = _sum((usage.get("prompt_tokens_details") or {}).get("cached_tokens") for usage in prompts.values())
        if "prompt_tokens_details" in found:
            found["prompt_tokens_details"] = {"cached_tokens": cached}
        return found

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


def begun(request: InferenceRequest) -> str:
    """What the answer of a chat begins with because the request wrote it (assistant prefill)."""
    last = request.messages[-1] if request.messages else {}
    content = last.get("content") if last.get("role") == "assistant" else None
    if isinstance(content, list):  # as llama-server joins them (b11549)
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        return _BETWEEN_PARTS.join(text for text in texts if isinstance(text, str))
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


def _sum(numbers: Iterable[int | None]) -> int | None:
    known = list(numbers)
    return None if None in known else sum(number for number in known if number is not None)
