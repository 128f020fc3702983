"""Bodies as engines receive them, and events as the router reads them."""

from typing import Any

import msgspec
import pytest

from promptai.engine.upstream import Reply
from promptai.errors import EngineDiedError, EngineError, EngineProtocolError, EngineRefusedError
from promptai.router.estimate.prefix import chain
from promptai.router.failover.protocol import (
    common_fields,
    is_native_end,
    is_prompt_comparable,
    lease_result,
    payloads_until_error,
    read_chunk,
    read_response,
    refusal,
    retry_pause_s,
    retry_reason,
    with_common_fields,
    without_progress,
)
from promptai.router.schedule.lease import LeaseResult
from promptai.wire.inference import InferenceRequest
from promptai.wire.llamaserver import NativeChunk
from promptai.wire.openai import CompletionChunk
from promptai.wire.sse import SseEvent


def event(data: str, name: str = "message") -> SseEvent:
    return SseEvent(event=name, data=data)


def test_a_chunk_with_unknown_fields_is_read() -> None:
    chunk = read_chunk(event('{"choices":[{"delta":{"content":"a"}}],"x":1}'), CompletionChunk, "pi")

    assert chunk.choices is not None
    assert chunk.choices[0].delta is not None
    assert chunk.choices[0].delta.content == "a"


def test_a_part_of_a_tool_call_is_not_malformed() -> None:
    chunk = read_chunk(event('{"choices":[{"delta":{"tool_calls":[{"index":0}]}}]}'), CompletionChunk, "pi")

    assert chunk.choices is not None
    assert chunk.choices[0].delta is not None
    assert chunk.choices[0].delta.tool_calls == [{"index": 0}]


@pytest.mark.parametrize("kind", [CompletionChunk, NativeChunk])
@pytest.mark.parametrize("data", ["{", "7", '{"choices":7,"tokens":7}', ""])
def test_a_malformed_chunk_is_a_protocol_error(kind: Any, data: str) -> None:
    with pytest.raises(EngineProtocolError, match="pi sent a malformed chunk"):
        read_chunk(event(data), kind, "pi")


@pytest.mark.parametrize("kind", [CompletionChunk, NativeChunk])
@pytest.mark.parametrize(
    ("data", "name", "status", "message"),
    [
        ('{"error":{"code":500,"type":"server_error","message":"no"}}', "message", 500, "no"),
        ('{"error":{"code":400,"message":"no"}}', "message", 400, "no"),
        ('{"error":{"code":"x","message":"no"}}', "message", 500, "no"),
        ('{"error":"no"}', "message", 500, "no"),
        ('{"code":503,"message":"no"}', "error", 503, "no"),
    ],
)
def test_an_error_event_raises(kind: Any, data: str, name: str, status: int, message: str) -> None:
    with pytest.raises(EngineRefusedError, match=f"pi ended the stream with an error: {message}") as caught:
        read_chunk(event(data, name), kind, "pi")

    assert status == caught.value.status
    assert data.encode() == caught.value.body


def test_payloads_before_an_error_are_returned_with_it() -> None:
    def take(event: SseEvent) -> list[bytes]:
        if event.data == "bad":
            raise EngineProtocolError("bad")
        return [event.data.encode()] if event.data else []

    out, error = payloads_until_error([event("a"), event(""), event("b"), event("bad"), event("c")], take)

    assert out == [b"a", b"b"]
    assert isinstance(error, EngineProtocolError)
    assert payloads_until_error([event("a")], take) == ([b"a"], None)


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (EngineDiedError("x"), "died"),
        (EngineProtocolError("x"), "protocol"),
        (EngineRefusedError("x", status=503, kind=None), "busy"),
        (EngineRefusedError("x", status=429, kind=None), "busy"),
        (EngineRefusedError("x", status=500, kind=None), "refused"),
    ],
)
def test_a_failure_is_classified_in_one_word(error: EngineError, word: str) -> None:
    assert word == retry_reason(error)


def test_pauses_double_and_respect_retry_after_up_to_a_limit() -> None:
    died = EngineDiedError("gone")

    assert [retry_pause_s(died, failures) for failures in (1, 2, 3, 6, 7, 5000)] == [0.25, 0.5, 1.0, 8.0, 10.0, 10.0]
    pauses = {4.0: 4.0, 0.1: 0.25, 1e6: 10.0}
    assert {after: retry_pause_s(busy(after), 1) for after in pauses} == pauses


def busy(retry_after_s: float) -> EngineRefusedError:
    return EngineRefusedError("busy", status=503, kind=None, retry_after_s=retry_after_s)


def test_an_error_response_keeps_the_engines_message() -> None:
    error = refusal("pi", Reply(503, b'{"error":{"message":"Loading model","type":"unavailable_error"}}', ""))

    assert (error.status, error.kind) == (503, "unavailable_error")
    assert "Loading model" in error.message
    assert "<html>" in refusal("pi", Reply(502, b"<html>", "")).message


def test_a_native_stream_ends_with_its_stop_field_not_with_such_text() -> None:
    assert is_native_end(event('{"content":"","stop":true}'))
    assert not is_native_end(event(msgspec.json.encode({"content": '"stop":true', "stop": False}).decode()))


def test_chunks_get_the_common_fields_of_another_answer() -> None:
    head = common_fields('{"id":"a","created":1,"choices":[],"timings":{},"usage":null,"prompt_progress":{}}')

    assert head == {"id": "a", "created": 1}
    assert msgspec.json.decode(with_common_fields('{"id":"b","created":2,"choices":[]}', head)) == {
        **head,
        "choices": [],
    }


def test_text_beside_progress_is_sent_without_the_progress() -> None:
    assert msgspec.json.decode(without_progress('{"choices":[1],"prompt_progress":{"total":4}}')) == {"choices": [1]}


def test_usage_replaces_missing_timings() -> None:
    reply = Reply(200, b'{"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 40}}', "")

    assert lease_result(read_response(reply), chain("a"), prompt_comparable=True) == LeaseResult(generated_tokens=40)


def test_a_complete_response_yields_a_lease_result() -> None:
    held = chain("a")
    timings = {"prompt_n": 1, "prompt_ms": 1, "predicted_n": 1, "predicted_ms": 1}
    body = msgspec.json.encode({"choices": [{"finish_reason": "length"}], "timings": timings})

    found = lease_result(read_response(Reply(200, body, "")), held, prompt_comparable=True)

    assert found.capped
    assert found.conversation is held
    for reply in (Reply(200, b"{}", ""), Reply(200, b"{", ""), Reply(400, body, "")):
        assert lease_result(read_response(reply), held, prompt_comparable=True) == LeaseResult()


# Requests that the engine counts as the same text as the gateway (characters per token)

TEXT = {"type": "text", "text": "up?"}


def chat(content: object, **fields: Any) -> InferenceRequest:
    return InferenceRequest(messages=[{"role": "user", "content": content}], **fields)


@pytest.mark.parametrize(
    "request_", [chat("up?"), chat([TEXT]), InferenceRequest(prompt="up?"), InferenceRequest(input="up?")]
)
def test_one_text_is_comparable(request_: InferenceRequest) -> None:
    assert is_prompt_comparable(request_)


@pytest.mark.parametrize(
    "request_",
    [
        chat([TEXT, {"type": "image_url"}]),
        chat("up?", n=2),
        InferenceRequest(prompt=["up?", "down?"]),
        InferenceRequest(prompt=[7, 8, 9]),
        InferenceRequest(prompt="up?", n=2),
        InferenceRequest(input=["up?", "down?"]),
        InferenceRequest(input=[[7], [8]]),
    ],
    ids=str,
)
def test_images_ids_and_several_prompts_are_not_comparable(request_: InferenceRequest) -> None:
    """Four requests with several prompts once cut the estimate of every prompt to a fifth."""
    assert not is_prompt_comparable(request_)
