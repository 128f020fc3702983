"""A complete response from the chunks of a stream."""

from typing import Any

import msgspec
import pytest

from promptai.router.failover.response import ResponseBuilder, prefilled_answer
from promptai.wire.inference import InferenceRequest

HEAD = {"id": "a", "created": 1, "model": "m", "object": "chat.completion.chunk"}


def assembled(*chunks: dict[str, Any], chat: bool = True, prefilled: str = "", alternatives: int = 1) -> dict[str, Any]:
    builder = ResponseBuilder(chat=chat, prefill=prefilled, alternatives=alternatives)
    for chunk in chunks:
        builder.add([msgspec.json.encode({**HEAD, **chunk})])
    return msgspec.json.decode(builder.build(), type=dict[str, Any])


def delta(index: int = 0, finish_reason: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": index, "delta": fields, "finish_reason": finish_reason}]}


def test_texts_are_joined_and_other_fields_replaced() -> None:
    found = assembled(
        delta(role="assistant", content=None),
        delta(content="The"),
        delta(content="re"),
        {**delta(finish_reason="stop"), "timings": {"predicted_n": 2}},
    )

    message = {"role": "assistant", "content": "There"}
    assert found == {
        **HEAD,
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
        "timings": {"predicted_n": 2},
    }


def test_a_completion_has_text_instead_of_a_message() -> None:
    found = assembled(
        {"choices": [{"index": 0, "text": "The", "finish_reason": None}], "object": "text_completion"},
        {"choices": [{"index": 0, "text": "re", "finish_reason": "length"}], "object": "text_completion"},
        chat=False,
    )

    assert found["object"] == "text_completion"
    assert found["choices"] == [{"index": 0, "text": "There", "finish_reason": "length"}]


def test_reasoning_and_logprobs_are_joined_separately() -> None:
    found = assembled(
        delta(reasoning_content="H"),
        delta(reasoning_content="m"),
        {"choices": [{"index": 0, "delta": {"content": "a"}, "logprobs": {"content": [{"id": 1}]}}]},
        {"choices": [{"index": 0, "delta": {"content": "b"}, "logprobs": {"content": [{"id": 2}]}}]},
    )

    (choice,) = found["choices"]
    assert choice["message"] == {"role": "assistant", "content": "ab", "reasoning_content": "Hm"}
    assert choice["logprobs"] == {"content": [{"id": 1}, {"id": 2}]}


def test_pieces_of_a_tool_call_are_joined() -> None:
    found = assembled(
        delta(tool_calls=[{"index": 0, "id": "x", "type": "function", "function": {"name": "ping", "arguments": ""}}]),
        delta(tool_calls=[{"index": 0, "function": {"arguments": '{"a":'}}]),
        delta(tool_calls=[{"index": 0, "function": {"arguments": "1}"}}]),
        delta(tool_calls=[{"index": 1, "id": "y", "function": {"name": "pong", "arguments": "{}"}}]),
        delta(finish_reason="tool_calls"),
    )

    calls = found["choices"][0]["message"]["tool_calls"]
    assert [(call["id"], call["function"]) for call in calls] == [
        ("x", {"name": "ping", "arguments": '{"a":1}'}),
        ("y", {"name": "pong", "arguments": "{}"}),
    ]


def test_two_answers_are_separate_but_share_usage() -> None:
    found = assembled(
        delta(1, content="b"),
        delta(0, content="a"),
        delta(0, "stop"),
        {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 2, "total_tokens": 6}},
        delta(1, "length"),
        {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}},
        alternatives=2,
    )

    assert [(c["index"], c["message"]["content"], c["finish_reason"]) for c in found["choices"]] == [
        (0, "a", "stop"),
        (1, "b", "length"),
    ]
    assert found["usage"] == {"prompt_tokens": 4, "completion_tokens": 5, "total_tokens": 9}


def test_a_prefilled_beginning_is_part_of_the_answer() -> None:
    found = assembled(delta(content=" there"), prefilled="Hi")

    assert found["choices"][0]["message"]["content"] == "Hi there"


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([], ""),
        ([{"role": "user", "content": "a"}], ""),
        ([{"role": "assistant", "content": "a"}], "a"),
        ([{"role": "assistant", "content": None}], ""),
        ([{"role": "assistant", "content": [{"type": "text", "text": "A"}, {"type": "text", "text": "b"}]}], "A\n\nb"),
        ([{"role": "assistant", "content": [{"type": "image_url"}, "x", {"text": 3}]}], ""),
    ],
)
def test_only_a_trailing_assistant_message_is_a_prefill(messages: list[dict[str, Any]], text: str) -> None:
    assert text == prefilled_answer(InferenceRequest(messages=messages))


def test_each_prompt_is_counted_once_however_many_answers_it_has() -> None:
    """Four answers to two prompts of 11 and 8 tokens, of which 3 and none were cached."""
    reports = ((11, 3), (11, 3), (8, 0), (8, 0))
    chunks = [
        {
            "choices": [{"index": index, "text": "x"}],
            "usage": {
                "prompt_tokens": prompt,
                "completion_tokens": 4,
                "total_tokens": prompt + 4,
                "prompt_tokens_details": {"cached_tokens": cached},
            },
        }
        for index, (prompt, cached) in enumerate(reports)
    ]

    found = assembled(*chunks, chat=False, alternatives=2)

    assert found["usage"] == {
        "prompt_tokens": 19,
        "completion_tokens": 16,
        "total_tokens": 35,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


def test_an_unreported_count_makes_the_total_unknown() -> None:
    found = assembled(
        delta(0, content="x"),
        {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": None, "total_tokens": None}},
        delta(1, content="x"),
        {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}},
        alternatives=2,
    )

    assert found["usage"] == {"prompt_tokens": 4, "completion_tokens": None, "total_tokens": None}
