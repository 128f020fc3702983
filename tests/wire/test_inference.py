"""The part of requests that the gateway reads."""

from typing import Any

import msgspec
import pytest

from promptai.wire.inference import InferenceRequest, Prompt


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
def test_splits_a_request_into_independent_prompts(field: str, given: Any, expected: list[Prompt]) -> None:
    request = msgspec.convert({field: given}, InferenceRequest)

    assert request.prompts() == tuple(expected)
    if len(expected) == 1:
        assert request.text() == expected[0].text


def test_a_chat_is_one_prompt_with_its_tools() -> None:
    talk = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]
    (prompt,) = InferenceRequest(messages=talk, tools=[{"a": 1}]).prompts()

    assert prompt.text == '[{"a":1}]\x1euser\x1fab\x1eassistant\x1fcd'
    assert (prompt.chars, prompt.ids) == (len(prompt.text), 0)


def test_token_ids_count_as_tokens() -> None:
    """Whatever the number of characters per token."""
    assert [Prompt("[1,2]", 0, 2).tokens(per_token) for per_token in (1.0, 4.0)] == [2.0, 2.0]
    assert [Prompt("abcdefgh", 8).tokens(per_token) for per_token in (1.0, 4.0)] == [8.0, 2.0]
