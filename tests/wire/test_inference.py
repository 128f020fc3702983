"""What the gateway reads in what passes through it: no more than it needs, and nothing breaks at the rest."""

from typing import Any

import msgspec
import pytest

from promptai.wire.inference import InferenceRequest, Prompt
from promptai.wire.openai import CompletionChunk, CompletionResponse, PromptTokensDetails, Usage

Kind = type[CompletionChunk] | type[CompletionResponse]
KINDS = pytest.mark.parametrize("kind", [CompletionChunk, CompletionResponse])


@KINDS
@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        pytest.param(
            b'{"prompt_tokens": 52, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 7}}',
            Usage(52, 3, PromptTokensDetails(7)),
            id="whole",
        ),
        pytest.param(b'{"prompt_tokens": 52, "total_tokens": 52}', Usage(52), id="embeddings"),
        pytest.param(b"{}", Usage(), id="empty"),
        pytest.param(b'{"prompt_tokens": null, "completion_tokens": null}', Usage(), id="nulls"),
        pytest.param(b'{"prompt_tokens_details": null}', Usage(), id="details-null"),
        pytest.param(b'{"prompt_tokens_details": {}}', Usage(None, None, PromptTokensDetails()), id="no-details"),
        pytest.param(b'{"prompt_tokens": 1, "queue_time": 0.1}', Usage(1), id="more"),
    ],
)
def test_an_account_of_tokens_may_lack_whatever_it_likes(kind: Kind, usage: bytes, expected: Usage) -> None:
    assert msgspec.json.decode(b'{"choices": [], "usage": %b}' % usage, type=kind).usage == expected


@KINDS
@pytest.mark.parametrize("fields", [b"", b'"usage": null'], ids=["missing", "null"])
def test_without_an_account_there_is_none(kind: Kind, fields: bytes) -> None:
    assert msgspec.json.decode(b"{%b}" % fields, type=kind).usage is None


@KINDS
@pytest.mark.parametrize("usage", [b'"52"', b"52", b"[]", b'{"prompt_tokens": "52"}', b'{"completion_tokens": 1.5}'])
def test_an_account_of_another_kind_is_refused(kind: Kind, usage: bytes) -> None:
    with pytest.raises(msgspec.ValidationError, match="usage"):
        msgspec.json.decode(b'{"usage": %b}' % usage, type=kind)


@pytest.mark.parametrize("field", ["prompt", "input"])
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param("abc", [Prompt("abc", 3)], id="text"),
        pytest.param("", [Prompt("", 0)], id="empty"),
        pytest.param(["abc"], [Prompt("abc", 3)], id="one"),
        pytest.param(["abc", "de\n"], [Prompt("abc", 3), Prompt("de\n", 3)], id="texts"),
        pytest.param([12, 151643], [Prompt("[12,151643]", 0, 2)], id="ids"),
        pytest.param([[1], [2, 3]], [Prompt("[1]", 0, 1), Prompt("[2,3]", 0, 2)], id="lists-of-ids"),
        pytest.param(["ab", [2, 3]], [Prompt("ab", 2), Prompt("[2,3]", 0, 2)], id="both"),
        pytest.param([1, "ab"], [Prompt('[1,"ab"]', 2, 1)], id="ids-and-text-in-one"),
        pytest.param([{"prompt_string": "ab", "multimodal_data": ["x" * 99]}], [Prompt("ab", 2)], id="picture"),
        pytest.param([None], [Prompt("", 0)], id="null"),
    ],
)
def test_what_an_engine_computes_each_by_itself_is_counted_each_by_itself(
    field: str, given: Any, expected: list[Prompt]
) -> None:
    request = msgspec.convert({field: given}, InferenceRequest)

    assert request.prompts() == tuple(expected)
    if len(expected) == 1:
        assert request.text() == expected[0].text


def test_a_chat_is_one_prompt_with_its_tools() -> None:
    talk = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    (prompt,) = InferenceRequest(messages=talk, tools=[{"a": 1}]).prompts()

    assert prompt.text == '[{"a":1}]\x1euser\x1fab\x1eassistant\x1fcd'
    assert (prompt.chars, prompt.ids) == (len(prompt.text), 0)


def test_token_ids_are_as_many_tokens_as_they_are_whatever_a_token_has_of_characters() -> None:
    assert [Prompt("[1,2]", 0, 2).tokens(per_token) for per_token in (1.0, 4.0)] == [2.0, 2.0]
    assert [Prompt("abcdefgh", 8).tokens(per_token) for per_token in (1.0, 4.0)] == [8.0, 2.0]
