"""Whether and from which tokens an answer is resumed, and the chunks of a resumed answer."""

import asyncio
from typing import Any

import msgspec
import pytest

from promptai.errors import EngineRefusedError
from promptai.router.failover.resume import (
    ResumePoint,
    SentText,
    answer_chunks,
    missing_end,
    resume_blocker,
    resume_body,
    resume_tokens,
)
from promptai.wire.inference import InferenceRequest
from promptai.wire.llamaserver import NativeChunk, Timings
from promptai.wire.openai import CompletionChunk

HEAD = {"id": "a", "object": "chat.completion.chunk"}
TIMINGS = Timings(prompt_n=4, prompt_ms=1.0, predicted_n=3, predicted_ms=1.0)


def chunk(**choice: Any) -> CompletionChunk:
    return msgspec.convert({"choices": [{"index": 0, **choice}]}, CompletionChunk)


def text_chunk(text: str, *ids: int | None) -> CompletionChunk:
    return chunk(delta={"content": text}, logprobs={"content": [{"id": token} for token in ids]})


def native(content: str, *tokens: int, **fields: Any) -> NativeChunk:
    return NativeChunk(content=content, tokens=list(tokens), **fields)


def decoded(chunks: list[bytes]) -> list[dict[str, Any]]:
    return [msgspec.json.decode(one) for one in chunks]


def request(**fields: Any) -> InferenceRequest:
    return msgspec.convert({"messages": [{"role": "user", "content": "a"}], **fields}, InferenceRequest)


def test_a_role_is_not_text() -> None:
    sent = SentText()

    assert not sent.record(chunk(delta={"role": "assistant", "content": None}))
    assert not sent.started


def test_text_and_ids_are_kept_while_every_id_is_reported() -> None:
    sent = SentText()
    sent.record(text_chunk("a", 1))
    sent.record(text_chunk("bc", 2, 3))

    assert sent.text == "abc"
    assert sent.token_ids == [1, 2, 3]
    assert sent.tokens == 3


@pytest.mark.parametrize("second", [chunk(delta={"content": "b"}), text_chunk("b", None), text_chunk("b")])
def test_one_missing_id_makes_the_ids_unknown(second: CompletionChunk) -> None:
    sent = SentText()
    sent.record(text_chunk("a", 1))
    sent.record(second)
    sent.record(text_chunk("c", 3))

    assert sent.token_ids is None
    assert sent.tokens == 3


def test_a_withheld_token_counts_when_its_text_arrives() -> None:
    """After the beginning of a stop word, llama-server sends the token at once and its text later."""
    sent = SentText()
    sent.resume_from(ResumePoint([0, 9], [1], "ids"))
    sent.record_native(native("", 2))
    sent.record_native(native(" the end", 3))

    assert sent.token_ids == [1, 2, 3]
    assert sent.prompt_tokens == 2


def test_a_tag_sent_during_prefill_is_not_a_token() -> None:
    sent = SentText()
    tag = {"choices": [{"index": 0, "delta": {"content": "<think>"}}], "prompt_progress": {"total": 4, "processed": 0}}
    sent.record(msgspec.convert(tag, CompletionChunk))

    assert sent.started
    assert (sent.text, sent.token_ids, sent.tokens) == ("<think>", [], 0)


def test_the_final_chunk_has_no_token() -> None:
    sent = SentText()
    sent.resume_from(ResumePoint([0], [1], "ids"))
    sent.record_native(native("", 2))
    sent.record_native(native("", stop=True))

    assert sent.token_ids == [1]
    assert sent.finished


def test_two_answers_must_both_end() -> None:
    sent = SentText(2)
    sent.record(chunk(finish_reason="stop"))

    assert sent.started
    assert not sent.finished
    sent.record(chunk(finish_reason="stop"))
    assert sent.finished


@pytest.mark.parametrize(
    ("fields", "number"),
    [({}, 1), ({"n": 3}, 3), ({"messages": None, "prompt": ["a", "b"]}, 2), ({"messages": None, "prompt": [1, 2]}, 1)],
)
def test_answers_are_counted(fields: dict[str, Any], number: int) -> None:
    assert number == request(**fields).answers


@pytest.mark.parametrize(
    ("delta", "obstacle"),
    [
        ({"reasoning_content": "Hm"}, "reasoning"),
        ({"reasoning": "Hm"}, "reasoning"),
        ({"tool_calls": [{"index": 0}]}, "a tool call"),
    ],
)
def test_tool_calls_and_reasoning_block_a_resume(delta: dict[str, Any], obstacle: str) -> None:
    sent = SentText()
    sent.record(chunk(delta=delta))

    assert sent.started
    assert f"{obstacle} cannot be resumed on another engine" == resume_blocker(request(), sent)


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
def test_plain_text_can_be_resumed(fields: dict[str, Any]) -> None:
    assert resume_blocker(request(**fields), SentText()) is None


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
def test_some_requests_cannot_be_resumed(fields: dict[str, Any]) -> None:
    assert "cannot be resumed on another engine" in (resume_blocker(request(**fields), SentText()) or "")


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
def test_answers_of_several_prompts_are_counted(fields: dict[str, Any], count: int) -> None:
    """A list that contains a token id is one prompt."""
    assert request(**fields).answers == count


def test_the_body_keeps_sampling_fields_and_drops_chat_fields() -> None:
    body = {"messages": [], "model": "m", "temperature": 0, "seed": 7, "stop": ["x"], "max_tokens": 50, "n": 1}

    assert resume_body(body, ResumePoint([1, 2], [], "ids"), max_tokens=5) == {
        "prompt": [1, 2],
        "temperature": 0,
        "seed": 7,
        "stop": ["x"],
        "n_predict": 5,
        "stream": True,
        "return_tokens": True,
        "return_progress": True,
    }
    assert "n_predict" not in resume_body({"messages": []}, ResumePoint([1], [], "ids"), max_tokens=None)


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
def test_logprobs_are_requested_again(fields: dict[str, Any], likeliest: int | None) -> None:
    assert likeliest == resume_body(fields, ResumePoint([1], [], "ids"), max_tokens=None).get("n_probs")


@pytest.mark.parametrize("chat", [True, False])
def test_a_resumed_token_becomes_a_chunk_of_the_answer(*, chat: bool) -> None:
    sent = SentText()
    sent.common = HEAD
    client_request = request() if chat else request(messages=None, prompt="a")
    probabilities = [{"id": 5, "logprob": -0.5}]
    (found,) = decoded(answer_chunks(native("b", 5, completion_probabilities=probabilities), sent, client_request, 3))

    text = {"delta": {"content": "b"}} if chat else {"text": "b"}
    choice = {"index": 0, "finish_reason": None, "logprobs": {"content": probabilities}, **text}
    assert {**HEAD, "choices": [choice]} == found


@pytest.mark.parametrize(("stop_type", "reason"), [("limit", "length"), ("eos", "stop"), ("word", "stop")])
def test_the_end_of_a_resumed_answer_counts_all_engines(stop_type: str, reason: str) -> None:
    sent = SentText()
    sent.common = HEAD
    sent.resume_from(ResumePoint([0, 1, 2, 3], [5, 6], "ids"))
    end = native("", stop=True, stop_type=stop_type, timings=TIMINGS)

    last, usage = decoded(answer_chunks(end, sent, request(stream_options={"include_usage": True}), 2))

    assert last["choices"] == [{"index": 0, "finish_reason": reason, "delta": {}}]
    assert usage["choices"] == []
    assert usage["usage"] == {"prompt_tokens": 4, "completion_tokens": 5, "total_tokens": 9}
    assert usage["timings"]["predicted_n"] == 3
    (alone,) = decoded(answer_chunks(end, sent, request(), 2))
    assert alone["timings"]["predicted_n"] == 3
    assert "usage" not in alone


def test_a_withheld_token_sends_no_chunk() -> None:
    assert answer_chunks(native("", 5), SentText(), request(), 0) == []


def test_the_missing_end_contains_only_unsent_parts() -> None:
    sent = SentText()
    sent.common = HEAD
    sent.prompt_tokens = 4
    sent.record(chunk(delta={"content": "a"}))
    client_request = request(stream_options={"include_usage": True})

    end, usage = decoded(missing_end(sent, client_request, None))

    assert end["choices"][0]["finish_reason"] == "length"
    assert usage["usage"] == {"prompt_tokens": 4, "completion_tokens": 1, "total_tokens": 5}
    assert sent.finished
    sent.usage_sent = True
    assert missing_end(sent, client_request, None) == []


def test_unreported_tokens_are_not_invented() -> None:
    sent = SentText()
    sent.record(chunk(delta={"content": "a"}, finish_reason="stop"))

    assert missing_end(sent, request(stream_options={"include_usage": True}), None) == []


# Resume points, with two tiny vocabularies: with and without a leading space

PIECES = ["<s>", "<|user|>", "<|assistant|>", "Hi", " there", "The", "re", "There", " ", "\n", "é", "<0xC3>", "a"]
CHAT = InferenceRequest(messages=[{"role": "user", "content": "Hi"}])
SPECIAL = 3


class Vocabulary:
    """
    A tokenizer by longest match.

    Args:
        spaced: It puts a space before every text, as SentencePiece does.
        blind: It has no ``/detokenize``.

    Attributes:
        opens: The tag with which its template ends, to start the reasoning.
    """

    def __init__(self, *, spaced: bool = False, blind: bool = False) -> None:
        self.opens = ""
        self._spaced = spaced
        self._blind = blind

    async def __call__(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Respond as an engine does."""
        if path == "/apply-template":
            return {"prompt": f"<|user|>{body['messages'][0]['content']}<|assistant|>{self.opens}"}
        if path == "/detokenize":
            if self._blind:
                raise EngineRefusedError("not found", status=404, kind=None)
            return {"content": "".join(PIECES[token] for token in body["tokens"])}
        text, first = body["content"], 0 if body["parse_special"] else SPECIAL
        found = [0] if body["add_special"] else []
        if self._spaced and not text.startswith("<|"):
            found.append(PIECES.index(" "))
        while text:
            piece = max((p for p in PIECES[first:] if text.startswith(p)), key=len, default=None)
            if piece is not None:
                found.append(PIECES.index(piece))
            text = text[len(piece or "?") :]
        return {"tokens": found}


def resume_point(sent: SentText, engine: Vocabulary | None = None, request: InferenceRequest = CHAT) -> ResumePoint:
    body = {"messages": request.messages, "stream": True}
    return asyncio.run(resume_tokens(engine or Vocabulary(), request, body, sent))


def sent_text(text: str, ids: list[int] | None = None) -> SentText:
    sent = SentText()
    sent.text, sent.token_ids = text, ids
    return sent


def test_a_chat_prompt_is_rendered_with_special_tokens() -> None:
    assert resume_point(sent_text("There")).prompt == [0, 1, 3, 2]


@pytest.mark.parametrize("prompt", ["Hi", [0, 3]])
def test_a_completion_prompt_is_used_unchanged(prompt: str | list[int]) -> None:
    assert resume_point(sent_text("There"), request=InferenceRequest(prompt=prompt)).prompt == [0, 3]


def test_reported_ids_win_over_tokenising() -> None:
    assert resume_point(sent_text("There", [5, 6])) == ResumePoint([0, 1, 3, 2], [5, 6], "ids")


def test_without_reported_ids_the_text_is_tokenised() -> None:
    assert resume_point(sent_text("There")) == ResumePoint([0, 1, 3, 2], [7], "text")


def test_ids_that_do_not_decode_to_the_text_are_ignored() -> None:
    """For a character of several tokens, llama-server reports only the last one."""
    assert resume_point(sent_text("é", [11])) == ResumePoint([0, 1, 3, 2], [10], "text")
    assert resume_point(sent_text("Hi there", [4])).answer == [3, 4]


def test_a_space_added_by_the_tokenizer_is_removed() -> None:
    assert resume_point(sent_text("There"), Vocabulary(spaced=True)).answer == [7]


def test_template_marks_in_the_answer_are_plain_text() -> None:
    """Otherwise a prompt that makes the model repeat marks could begin another turn."""
    assert min(resume_point(sent_text("a<|user|>a")).answer) >= SPECIAL


@pytest.mark.parametrize(("text", "sent"), [("<|user|>\nHi", [3]), ("<|user|>\n\nHi", [9, 3]), ("Hi", [3])])
def test_a_tag_opened_by_the_template_is_not_repeated(text: str, sent: list[int]) -> None:
    """With reasoning as text, llama-server sends the tag although it ends the prompt (b11549)."""
    engine = Vocabulary()
    engine.opens = "<|user|>\n"

    assert resume_point(sent_text(text), engine) == ResumePoint([0, 1, 3, 2, 1, 9], sent, "text")


def test_a_tag_missing_from_the_prompt_belongs_to_the_answer() -> None:
    assert min(resume_point(sent_text("<a>Hi")).answer) >= SPECIAL
    assert resume_point(sent_text("<a>Hi")).answer[-1] == 3


def test_without_detokenize_the_tokens_are_assumed_exact() -> None:
    engine = Vocabulary(blind=True)

    assert resume_point(sent_text("There", [5, 6]), engine).answer == [5, 6]
    assert resume_point(sent_text("There"), engine).answer == [7]


def test_other_refusals_are_failures() -> None:
    async def query(path: str, _body: dict[str, Any]) -> dict[str, Any]:
        if path == "/detokenize":
            raise EngineRefusedError("loading", status=503, kind=None)
        return {"prompt": "", "tokens": [1]}

    with pytest.raises(EngineRefusedError):
        asyncio.run(resume_tokens(query, CHAT, {"messages": CHAT.messages}, sent_text("a", [1])))
