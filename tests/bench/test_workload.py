import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest

from promptai.bench import workload
from promptai.bench.workload import EDGE_50, check_turns, load_bundled, load_jsonl
from promptai.errors import WorkloadError
from promptai.wire.openai import Message
from support_runs import talk

USER, ASSISTANT = {"role": "user", "content": "why?"}, {"role": "assistant", "content": "because."}
GOOD = json.dumps({"id": "good", "messages": [USER, ASSISTANT, USER]}).encode()

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write these lines as a workload."""

    def write(*lines: bytes) -> Path:
        path = tmp_path / "talks.jsonl"
        path.write_bytes(b"\n".join(lines))
        return path

    return write


def line_of(*messages: object, **fields: object) -> bytes:
    """A line in OpenAI's format."""
    return json.dumps({"messages": messages} | fields).encode()


def shared_line(*pairs: tuple[str, str]) -> bytes:
    """A line in ShareGPT's format."""
    return json.dumps({"id": "good", "conversations": [{"from": who, "value": text} for who, text in pairs]}).encode()


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        pytest.param(b'{"messages": [', "truncated", id="not-json"),
        pytest.param(b"[1, 2]", "Expected `object`", id="not-an-object"),
        pytest.param(b'{"messages": [{"role": "user", "content": "\xff"}]}', "utf-8", id="not-utf-8"),
        pytest.param(b'{"x": ' + b"[" * 5000 + b"]" * 5000 + b"}", "", id="endless-nesting"),
        pytest.param(b'{"id": "x"}', "neither 'messages' nor 'conversations'", id="no-messages-key"),
        pytest.param(line_of(), "no user message", id="no-messages"),
        pytest.param(line_of({"role": "system", "content": "be brief"}), "no user message", id="system-only"),
        pytest.param(line_of(ASSISTANT, USER), "message 1 is from 'assistant'", id="assistant-first"),
        pytest.param(line_of(USER, USER), "message 2 is from 'user'", id="user-twice"),
        pytest.param(
            line_of(USER, {"role": "system", "content": "x"}), "message 2 is from 'system'", id="system-later"
        ),
        pytest.param(line_of({"role": "user", "content": ""}), "message 1 is empty", id="empty-content"),
        pytest.param(line_of(USER, {"role": "assistant", "content": " \n"}), "message 2 is empty", id="blank-content"),
        pytest.param(line_of({"role": "user"}), "missing required field `content`", id="no-content"),
        pytest.param(line_of({"content": "why?"}), "missing required field `role`", id="no-role"),
        pytest.param(line_of({"role": "tool", "content": "x"}), "Invalid enum value 'tool'", id="unknown-role"),
        pytest.param(line_of({"role": "user", "content": None}), "Expected `str`, got `null`", id="null-content"),
        pytest.param(line_of(USER | {"name": "Al"}), "unknown field `name`", id="unknown-field"),
        pytest.param(line_of(USER, id=7), "Expected `str | null`", id="id-not-text"),
        pytest.param(line_of(USER, id="good"), "duplicate id 'good'", id="same-id-twice"),
        pytest.param(shared_line(("alien", "hello")), "Invalid enum value 'alien'", id="unknown-speaker"),
        pytest.param(b'{"conversations": [{"from": "human"}]}', "missing required field `value`", id="no-value"),
    ],
)
def test_rejects_a_malformed_line_with_file_line_and_reason(write: Write, line: bytes, reason: str) -> None:
    path = write(GOOD, line)

    with pytest.raises(WorkloadError) as refusal:
        load_jsonl(path)

    assert f"{path}, line 2: " in refusal.value.message
    assert reason in refusal.value.message


def test_rejects_an_overlong_line(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workload, "_MAX_LINE_BYTES", 1000)

    with pytest.raises(WorkloadError, match=r"line 2: the line is too long \(1,001 bytes\)"):
        load_jsonl(write(GOOD, GOOD.ljust(1001)))


@pytest.mark.parametrize("content", [b"", b"\n \n"], ids=["empty", "blank"])
def test_rejects_a_file_without_conversations(write: Write, content: bytes) -> None:
    with pytest.raises(WorkloadError, match=r"talks\.jsonl contains no conversation"):
        load_jsonl(write(content))


@pytest.mark.parametrize(
    ("name", "reason"), [("absent.jsonl", "No such file"), ("", "Is a directory")], ids=["absent", "directory"]
)
def test_rejects_an_unreadable_file(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(WorkloadError, match=reason) as refusal:
        load_jsonl(tmp_path / name)

    assert EDGE_50 in refusal.value.hint


@pytest.fixture
def bundled_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the bundled workload, which ``load_bundled`` reads instead of the original."""
    copy = tmp_path / "data" / "edge-50.jsonl"
    copy.parent.mkdir()
    copy.write_bytes((files("promptai.bench") / "data" / "edge-50.jsonl").read_bytes())
    monkeypatch.setattr(workload, "files", lambda _: tmp_path)
    return copy


def test_rejects_the_bundled_workload_with_one_word_changed(bundled_copy: Path) -> None:
    bundled_copy.write_bytes(bundled_copy.read_bytes().replace(b"alarms", b"alerts", 1))

    with pytest.raises(WorkloadError, match="has been modified"):
        load_bundled()


@pytest.mark.usefixtures("bundled_copy")
def test_accepts_the_bundled_workload() -> None:
    assert load_bundled().name == EDGE_50


def test_the_bundled_workload_contains_fifty_varied_conversations() -> None:
    conversations = load_bundled().conversations
    words = [len(m.content.split()) for c in conversations for m in c.messages if m.role == "user"]

    assert len({conversation.id for conversation in conversations}) == 50
    assert min(conversation.user_turns for conversation in conversations) >= 5
    assert min(words) >= 5
    assert max(words) <= 400


def test_both_formats_give_the_same_conversation(write: Write) -> None:
    plain = load_jsonl(write(line_of({"role": "system", "content": "be brief"}, USER, ASSISTANT, id="good")))
    shared = load_jsonl(write(shared_line(("system", "be brief"), ("human", "why?"), ("gpt", "because."))))

    assert plain.conversations == shared.conversations
    assert plain.sha256 == shared.sha256


def test_skips_blank_lines_and_names_conversations_without_id_by_line(write: Write) -> None:
    found = load_jsonl(write(GOOD, b"", line_of(USER), b""))

    assert [conversation.id for conversation in found.conversations] == ["good", "line-3"]


def test_the_fingerprint_does_not_depend_on_formatting(write: Write) -> None:
    one = write(b'{"id":"a","messages":[{"role":"user","content":"\xc3\xa9t\xc3\xa9?"}]}')
    fingerprint = load_jsonl(one).sha256
    other = write(b"", rb'{"title": 1, "messages": [ {"content": "\u00e9t\u00e9?", "role": "user"} ], "id": "a"}')

    assert fingerprint == load_jsonl(other).sha256


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param((line_of(USER, id="b"), line_of(ASSISTANT | USER, ASSISTANT, id="x")), id="id"),
        pytest.param((line_of(USER, id="a"), line_of(USER, id="x")), id="content"),
        pytest.param((line_of(USER, ASSISTANT, id="x"), line_of(USER, id="a")), id="order"),
    ],
)
def test_the_fingerprint_changes_with_the_prompts(write: Write, lines: tuple[bytes, ...]) -> None:
    original = load_jsonl(write(line_of(USER, id="a"), line_of(USER, ASSISTANT, id="x"))).sha256

    assert original != load_jsonl(write(*lines)).sha256


def test_a_prompt_ends_with_its_user_turn() -> None:
    conversation = talk("c", "one", "two", "three", "four")

    assert [message.content for message in conversation.prompt(1)] == ["one", "two", "three"]
    assert len("onetwothree") == conversation.prompt_chars(1)


def test_own_answers_replace_those_of_the_data_set() -> None:
    conversation = talk("c", "one", "two", "three", "four", "five")

    assert [
        Message("user", "one"),
        Message("assistant", "zwei"),
        Message("user", "three"),
        Message("assistant", "vier"),
        Message("user", "five"),
    ] == conversation.prompt(2, ["zwei", "vier"])


def test_there_is_no_prompt_beyond_the_last_user_turn() -> None:
    with pytest.raises(IndexError, match="c has no user turn"):
        talk("c", "one", "two").prompt(1)


def test_a_conversation_may_end_with_either_side() -> None:
    assert check_turns([Message("user", "one")]) is None
    assert check_turns([Message("user", "one"), Message("assistant", "two")]) is None
