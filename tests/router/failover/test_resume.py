from typing import Any

import msgspec
import pytest

from promptai.router.failover.resume import SentText, answers, as_answer, continued_body, obstacle, rest
from promptai.wire.inference import InferenceRequest
from promptai.wire.llamaserver import NativeChunk, Timings
from promptai.wire.openai import CompletionChunk

HEAD = {"id": "a", "object": "chat.completion.chunk"}
TIMINGS = Timings(prompt_n=4, prompt_ms=1.0, predicted_n=3, predicted_ms=1.0)


def chunk(**choice: Any) -> CompletionChunk:
    return msgspec.convert({"choices": [{"index": 0, **choice}]}, CompletionChunk)


def told(text: str, *ids: int | None) -> CompletionChunk:
    return chunk(delta={"content": text}, logprobs={"content": [{"id": token} for token in ids]})


def native(content: str, *tokens: int, **fields: Any) -> NativeChunk:
    return NativeChunk(content=content, tokens=list(tokens), **fields)


def decoded(chunks: list[bytes]) -> list[dict[str, Any]]:
    return [msgspec.json.decode(one) for one in chunks]


def request(**fields: Any) -> InferenceRequest:
    return msgspec.convert({"messages": [{"role": "user", "content": "a"}], **fields}, InferenceRequest)


def test_nothing_has_been_said_by_a_role() -> None:
    said = SentText()

    assert not said.add(chunk(delta={"role": "assistant", "content": None}))
    assert not said.anything


def test_text_and_ids_are_kept_as_long_as_every_token_is_told() -> None:
    said = SentText()
    said.add(told("a", 1))
    said.add(told("bc", 2, 3))

    assert said.text == "abc"
    assert said.ids == [1, 2, 3]
    assert said.tokens == 3


@pytest.mark.parametrize("second", [chunk(delta={"content": "b"}), told("b", None), told("b")])
def test_one_token_that_is_not_told_ends_the_certainty_for_good(second: CompletionChunk) -> None:
    said = SentText()
    said.add(told("a", 1))
    said.add(second)
    said.add(told("c", 3))

    assert said.ids is None
    assert said.tokens == 3


def test_a_token_whose_text_was_held_back_counts_where_its_text_comes() -> None:
    """A stop word may have begun: llama-server tells the token at once and its text later."""
    said = SentText()
    said.goes_on([0, 9], [1])
    said.add_native(native("", 2))
    said.add_native(native(" the end", 3))

    assert said.ids == [1, 2, 3]
    assert said.prompt_tokens == 2


def test_a_tag_that_is_shown_while_the_prompt_is_computed_is_no_token() -> None:
    said = SentText()
    tag = {"choices": [{"index": 0, "delta": {"content": "<think>"}}], "prompt_progress": {"total": 4, "processed": 0}}
    said.add(msgspec.convert(tag, CompletionChunk))

    assert said.anything
    assert (said.text, said.ids, said.tokens) == ("<think>", [], 0)


def test_the_end_has_no_token() -> None:
    said = SentText()
    said.goes_on([0], [1])
    said.add_native(native("", 2))
    said.add_native(native("", stop=True))

    assert said.ids == [1]
    assert said.finished


def test_of_two_answers_both_must_end() -> None:
    said = SentText(2)
    said.add(chunk(finish_reason="stop"))

    assert said.anything
    assert not said.finished
    said.add(chunk(finish_reason="stop"))
    assert said.finished


@pytest.mark.parametrize(
    ("fields", "number"),
    [({}, 1), ({"n": 3}, 3), ({"messages": None, "prompt": ["a", "b"]}, 2), ({"messages": None, "prompt": [1, 2]}, 1)],
)
def test_how_many_answers_a_request_wants(fields: dict[str, Any], number: int) -> None:
    assert number == answers(request(**fields))


@pytest.mark.parametrize(
    ("delta", "what"),
    [
        ({"reasoning_content": "Hm"}, "a thought"),
        ({"reasoning": "Hm"}, "a thought"),
        ({"tool_calls": [{"index": 0}]}, "a tool call"),
    ],
)
def test_what_is_beyond_text_is_an_obstacle(delta: dict[str, Any], what: str) -> None:
    said = SentText()
    said.add(chunk(delta=delta))

    assert said.anything
    assert f"{what} cannot be taken up elsewhere" == obstacle(request(), said)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 1, "tools": [], "response_format": {"type": "text"}},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "assistant"}]},
        {"messages": None, "prompt": [1, 2, 3]},
        {"messages": None, "prompt": "a"},
    ],
)
def test_plain_text_has_no_obstacle(fields: dict[str, Any]) -> None:
    assert obstacle(request(**fields), SentText()) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"best_of": 2},
        {"echo": True},
        {"suffix": "x"},
        {"messages": None, "prompt": ["a", "b"]},
        {"messages": None, "prompt": ["a"]},
        {"messages": None, "prompt": [1, "a"]},
        {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
    ],
)
def test_obstacles_of_requests(fields: dict[str, Any]) -> None:
    assert "cannot be taken up elsewhere" in (obstacle(request(**fields), SentText()) or "")


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({}, 1),
        ({"n": 3}, 3),
        ({"messages": None, "prompt": "a", "n": 2}, 2),
        ({"messages": None, "prompt": ["a", "b"], "n": 2}, 4),
        ({"messages": None, "prompt": [[1, 2], [3]]}, 2),
        ({"messages": None, "prompt": [1, 2, 3]}, 1),
        ({"messages": None, "prompt": [1, "a"]}, 1),
        ({"messages": None, "input": ["a", "b"]}, 1),
    ],
)
def test_how_many_answers_there_will_be(fields: dict[str, Any], count: int) -> None:
    """A list with a token id in it is one prompt."""
    assert answers(request(**fields)) == count


def test_the_body_keeps_what_decides_tokens_and_drops_what_is_a_chat_s() -> None:
    body = {"messages": [], "model": "m", "temperature": 0, "seed": 7, "stop": ["x"], "max_tokens": 50, "n": 1}

    assert continued_body(body, [1, 2], left=5) == {
        "prompt": [1, 2],
        "temperature": 0,
        "seed": 7,
        "stop": ["x"],
        "n_predict": 5,
        "stream": True,
        "return_tokens": True,
        "return_progress": True,
    }
    assert "n_predict" not in continued_body({"messages": []}, [1], left=None)


@pytest.mark.parametrize(
    ("fields", "likeliest"),
    [
        ({"logprobs": True}, 20),
        ({"logprobs": True, "top_logprobs": 3}, 3),
        ({"logprobs": True, "top_logprobs": 0}, 0),
        ({"logprobs": 2}, 2),
        ({"logprobs": False}, None),
        ({}, None),
    ],
)
def test_probabilities_go_on_being_told(fields: dict[str, Any], likeliest: int | None) -> None:
    assert likeliest == continued_body(fields, [1], left=None).get("n_probs")


@pytest.mark.parametrize("chat", [True, False])
def test_a_token_of_a_continuation_is_one_of_the_answer(*, chat: bool) -> None:
    said = SentText()
    said.head = HEAD
    asked = request() if chat else request(messages=None, prompt="a")
    probabilities = [{"id": 5, "logprob": -0.5}]
    (found,) = decoded(as_answer(native("b", 5, completion_probabilities=probabilities), said, asked, 3))

    text = {"delta": {"content": "b"}} if chat else {"text": "b"}
    choice = {"index": 0, "finish_reason": None, "logprobs": {"content": probabilities}, **text}
    assert {**HEAD, "choices": [choice]} == found


@pytest.mark.parametrize(("stop_type", "reason"), [("limit", "length"), ("eos", "stop"), ("word", "stop")])
def test_the_end_of_a_continuation_counts_all_engines(stop_type: str, reason: str) -> None:
    said = SentText()
    said.head = HEAD
    said.goes_on([0, 1, 2, 3], [5, 6])
    end = native("", stop=True, stop_type=stop_type, timings=TIMINGS)

    last, usage = decoded(as_answer(end, said, request(stream_options={"include_usage": True}), 2))

    assert last["choices"] == [{"index": 0, "finish_reason": reason, "delta": {}}]
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 4, "completion_tokens": 5, "total_tokens": 9}
    assert usage["timings"]["predicted_n"] == 3
    (alone,) = decoded(as_answer(end, said, request(), 2))
    assert alone["timings"]["predicted_n"] == 3
    assert "usage" not in alone


def test_a_held_back_token_says_nothing() -> None:
    assert as_answer(native("", 5), SentText(), request(), 0) == []


def test_the_rest_of_an_answer_that_is_whole_is_what_was_not_said() -> None:
    said = SentText()
    said.head = HEAD
    said.prompt_tokens = 4
    said.add(chunk(delta={"content": "a"}))
    asked = request(stream_options={"include_usage": True})

    end, usage = decoded(rest(said, asked, None))

    assert end["choices"][0]["finish_reason"] == "length"
    assert usage["usage"] == {"prompt_tokens": 4, "completion_tokens": 1, "total_tokens": 5}
    assert said.finished
    said.counted = True
    assert rest(said, asked, None) == []


def test_tokens_that_nobody_counted_are_not_made_up() -> None:
    said = SentText()
    said.add(chunk(delta={"content": "a"}, finish_reason="stop"))

    assert rest(said, request(stream_options={"include_usage": True}), None) == []
