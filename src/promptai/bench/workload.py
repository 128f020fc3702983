"""Conversations to play, with a fingerprint.

Two runs compare only if their prompts are the same. So a workload is a list of conversations plus
the SHA-256 of their exact contents, which every run records; the bundled workload is sealed: it is
rejected if its bytes have changed. A malformed line in any other file is an error with file, line
and reason, because a workload that silently loads only in part is worse than none.

Reads JSON Lines in OpenAI's form (``messages``) and ShareGPT's (``conversations``); ``bench.oasst1``
reads the trees of oasst1.
"""

import hashlib
from importlib.resources import files
from pathlib import Path
from typing import Literal

import msgspec

from promptai.errors import WorkloadError
from promptai.wire.malformed import MALFORMED
from promptai.wire.openai import Message

EDGE_50 = "edge-50"
_EDGE_50_SHA256 = "9cc642515d3665023e84990f9ea04d8c984257f5f46472f883d725c0101851f5"
_MAX_LINE_BYTES = 16 * 1024 * 1024

History = Literal["data", "own"]


class Conversation(msgspec.Struct, frozen=True):
    """
    One conversation: an optional system message, then user and assistant in turn.

    Attributes:
        id: Unique within its workload.
    """

    id: str
    messages: tuple[Message, ...]

    @property
    def user_turns(self) -> int:
        """Number of user messages, which is the number of requests."""
        return sum(message.role == "user" for message in self.messages)

    def prompt(self, turn: int, own_answers: list[str] | None = None) -> list[Message]:
        """
        Return the messages before the answer to user turn ``turn`` (from 0).

        Args:
            own_answers: The model's answers to the earlier turns, which replace the data set's; ``None`` keeps those.
        """
        prompt: list[Message] = []
        answered = 0
        for message in self.messages:
            if message.role == "assistant" and own_answers is not None:
                prompt.append(Message("assistant", own_answers[answered]))
            else:
                prompt.append(message)
            answered += message.role == "assistant"
            if message.role == "user":
                if turn == 0:
                    return prompt
                turn -= 1
        raise IndexError(f"conversation {self.id} has no user turn {turn}")

    def prompt_chars(self, turn: int) -> int:
        """Characters of the prompt of ``turn``, for estimates before tokenising."""
        return sum(len(message.content) for message in self.prompt(turn))


class Workload(msgspec.Struct, frozen=True):
    """
    Conversations and their source.

    Attributes:
        name: ``edge-50``, ``oasst1`` or the file's name.
        source: Argument with which ``load_workload`` loads it again.
        rule: The rule that selected the conversations from their source, in words.
    """

    name: str
    source: str
    rule: str
    conversations: tuple[Conversation, ...]

    @property
    def sha256(self) -> str:
        """Fingerprint of ids, roles and contents, independent of the file's formatting."""
        return hashlib.sha256(msgspec.json.encode(self.conversations)).hexdigest()


class _OpenAiLine(msgspec.Struct):
    messages: list[Message]
    id: str | None = None


class _ShareGptMessage(msgspec.Struct):
    from_: Literal["system", "human", "user", "gpt", "assistant"] = msgspec.field(name="from")
    value: str


class _ShareGptLine(msgspec.Struct):
    conversations: list[_ShareGptMessage]
    id: str | None = None


_SHARE_GPT_ROLES: dict[str, Literal["system", "user", "assistant"]] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}


def load_bundled() -> Workload:
    """
    Load the 50 conversations bundled with the package.

    Raises:
        WorkloadError: The file was changed.
    """
    path = Path(str(files("promptai.bench") / "data" / "edge-50.jsonl"))
    workload = Workload(EDGE_50, EDGE_50, "all of the bundled conversations", _read(path))
    if workload.sha256 != _EDGE_50_SHA256:
        raise WorkloadError(f"the bundled workload {path} has been modified", hint="install promptai again")
    return workload


def load_jsonl(path: Path) -> Workload:
    """
    Load every conversation of a JSON Lines file.

    Raises:
        WorkloadError: The file cannot be read, contains no conversation, or has a malformed line.
    """
    return Workload(path.name, str(path), "all conversations of the file", _read(path))


def check_turns(messages: list[Message]) -> str | None:
    """Return why these messages cannot be played; ``None`` if they can."""
    turns = messages[1:] if messages and messages[0].role == "system" else messages
    if not turns:
        return "it has no user message"
    for position, message in enumerate(turns):
        expected = "user" if position % 2 == 0 else "assistant"
        if message.role != expected:
            return f"message {position + 1} is from {message.role!r} (user and assistant must alternate, user first)"
        if not message.content.strip():
            return f"message {position + 1} is empty"
    return None


def _read(path: Path) -> tuple[Conversation, ...]:
    found: dict[str, Conversation] = {}
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    conversation = _parse(path, number, line)
                    if conversation.id in found:
                        raise _malformed(path, number, f"duplicate id {conversation.id!r}")
                    found[conversation.id] = conversation
    except OSError as error:
        raise WorkloadError(
            f"cannot read workload {path}: {error.strerror}",
            hint=f"use {EDGE_50}, oasst1 or the path of a .jsonl file",
        ) from None
    if not found:
        raise WorkloadError(f"workload {path} contains no conversation", hint="it needs one JSON object per line")
    return tuple(found.values())


def _parse(path: Path, number: int, line: bytes) -> Conversation:
    if len(line) > _MAX_LINE_BYTES:
        raise _malformed(path, number, f"the line is too long ({len(line):,} bytes)")
    try:
        fields = msgspec.json.decode(line, type=dict[str, msgspec.Raw])
        if "conversations" in fields:
            shared = msgspec.json.decode(line, type=_ShareGptLine)
            name = shared.id
            messages = [Message(_SHARE_GPT_ROLES[m.from_], m.value) for m in shared.conversations]
        elif "messages" in fields:
            plain = msgspec.json.decode(line, type=_OpenAiLine)
            name, messages = plain.id, plain.messages
        else:
            raise _malformed(path, number, "neither 'messages' nor 'conversations' found")
    except MALFORMED as error:
        raise _malformed(path, number, str(error)) from None
    reason = check_turns(messages)
    if reason is not None:
        raise _malformed(path, number, reason)
    return Conversation(name or f"line-{number}", tuple(messages))


def _malformed(path: Path, line: int, reason: str) -> WorkloadError:
    return WorkloadError(f"workload {path}, line {line}: {reason}", hint="fix or remove the line")
