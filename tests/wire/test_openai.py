import msgspec
import pytest

from promptai.wire.llamaserver import PromptProgress, Timings
from promptai.wire.openai import (
    ChunkChoice,
    CompletionChunk,
    CompletionResponse,
    Delta,
    ErrorBody,
    ErrorEnvelope,
    Message,
    ModelEntry,
    ModelList,
    PromptTokensDetails,
    TokenCounts,
    Usage,
    error_in,
)

HEAD = b'"created": 1795261712, "id": "chatcmpl-1", "model": "s", "object": "chat.completion.chunk"'
TIMINGS = b'"prompt_n": 52, "prompt_ms": 3.446, "prompt_per_second": null, "predicted_n": 3, "predicted_ms": 0.834'
USAGE = b'"completion_tokens": 3, "prompt_tokens": 52, "total_tokens": 55'


def chunk(fields: bytes) -> CompletionChunk:
    """Decode a chunk with these fields and the usual ones."""
    return msgspec.json.decode(b"{%b, %b}" % (HEAD, fields), type=CompletionChunk)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(b'"usage": {"prompt_tokens": 1, "completion_tokens": "3"}', id="tokens-as-text"),
        pytest.param(b'"usage": {"prompt_tokens": 1.5, "completion_tokens": 3}', id="fraction-of-a-token"),
        pytest.param(b'"choices": [{"delta": {"content": 7}}]', id="content-number"),
        pytest.param(b'"choices": {"0": {}}', id="choices-object"),
        pytest.param(b'"choices": [{"finish_reason": true}]', id="reason-bool"),
        pytest.param(b'"timings": {"prompt_n": "52"}', id="timings-text"),
    ],
)
def test_rejects_wrong_types(fields: bytes) -> None:
    """A number that is a string is an error, not a guess."""
    with pytest.raises(msgspec.ValidationError):
        chunk(fields)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param(b'"usage": {}', id="empty-usage"),
        pytest.param(b'"usage": {"prompt_tokens": 1}', id="half-a-usage"),
        pytest.param(b'"usage": {"prompt_tokens": null, "completion_tokens": 3}', id="tokens-null"),
        pytest.param(b'"choices": [{"delta": null}]', id="delta-null"),
        pytest.param(b'"error": 500', id="error-number"),
        pytest.param(b'"error": {"message": ["overloaded"]}', id="error-message-list"),
    ],
)
def test_the_strict_reading_rejects_what_the_gateway_passes_on(fields: bytes) -> None:
    found = chunk(fields)

    with pytest.raises(msgspec.ValidationError):
        found.exact()


def test_exact_counts_are_those_of_the_usage() -> None:
    usage = Usage(52, 3, PromptTokensDetails(7))

    assert TokenCounts(52, 3, 7) == usage.exact()
    assert TokenCounts(52, 3, None) == Usage(52, 3).exact()


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
def test_every_field_of_a_usage_may_be_missing(kind: Kind, usage: bytes, expected: Usage) -> None:
    assert msgspec.json.decode(b'{"choices": [], "usage": %b}' % usage, type=kind).usage == expected


@KINDS
@pytest.mark.parametrize("fields", [b"", b'"usage": null'], ids=["missing", "null"])
def test_a_missing_usage_is_none(kind: Kind, fields: bytes) -> None:
    assert msgspec.json.decode(b"{%b}" % fields, type=kind).usage is None


@KINDS
@pytest.mark.parametrize("usage", [b'"52"', b"52", b"[]", b'{"prompt_tokens": "52"}', b'{"completion_tokens": 1.5}'])
def test_rejects_a_usage_of_wrong_types(kind: Kind, usage: bytes) -> None:
    with pytest.raises(msgspec.ValidationError, match="usage"):
        msgspec.json.decode(b'{"usage": %b}' % usage, type=kind)


@pytest.mark.parametrize(
    "message",
    [
        b'{"role": "tool", "content": "x"}',
        b'{"role": "user", "content": null}',
        b'{"role": "user"}',
        b'{"role": "user", "content": "x", "name": "y"}',
        b'{"role": "user", "content": [{"type": "text", "text": "x"}]}',
    ],
    ids=["role", "null", "missing", "extra-field", "parts"],
)
def test_rejects_a_message_that_would_be_sent_differently(message: bytes) -> None:
    """A conversation is sent as it stands, so no field may be ignored."""
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(message, type=Message)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        pytest.param(
            b'"choices": [{"index": 0, "finish_reason": null, "delta": {"role": "assistant", "content": null}}]',
            CompletionChunk([ChunkChoice(Delta(content=None))]),
            id="role-only",
        ),
        pytest.param(
            b'"choices": [{"index": 0, "finish_reason": null, "delta": {"content": "gr\\u00fc"}, "index": 0}]',
            CompletionChunk([ChunkChoice(Delta("grü"))]),
            id="content",
        ),
        pytest.param(
            b'"choices": [{"index": 0, "delta": {"reasoning_content": "hm"}}]',
            CompletionChunk([ChunkChoice(Delta(reasoning_content="hm"))]),
            id="reasoning-of-llama-server",
        ),
        pytest.param(
            b'"choices": [{"index": 0, "delta": {"reasoning": "hm", "content": ""}}]',
            CompletionChunk([ChunkChoice(Delta("", reasoning="hm"))]),
            id="reasoning-of-ollama-and-vllm",
        ),
        pytest.param(b'"choices": null', CompletionChunk(), id="choices-null"),
        pytest.param(
            b'"choices": [{"finish_reason": "length", "index": 0, "delta": {}}]',
            CompletionChunk([ChunkChoice(finish_reason="length")]),
            id="finish",
        ),
        pytest.param(
            b'"choices": [{"finish_reason": "stop", "index": 0, "delta": {}}], "usage": {%b}, "timings": {%b}'
            % (USAGE, TIMINGS),
            CompletionChunk(
                [ChunkChoice(finish_reason="stop")], Usage(52, 3), Timings(52, 3.446, 3, 0.834, cache_n=None)
            ),
            id="account-of-2024-in-the-last-choice",
        ),
        pytest.param(
            b'"choices": [], "usage": {%b, "prompt_tokens_details": {"cached_tokens":0}}, "timings": {"cache_n": 0, %b}'
            % (USAGE, TIMINGS),
            CompletionChunk([], Usage(52, 3, PromptTokensDetails(0)), Timings(52, 3.446, 3, 0.834, cache_n=0)),
            id="account-of-2026-after-the-choices",
        ),
        pytest.param(
            b'"choices": [], "usage": {%b, "prompt_tokens_details": null, "queue_time": 0.1}' % USAGE,
            CompletionChunk([], Usage(52, 3)),
            id="account-of-another-server",
        ),
        pytest.param(b'"usage": null', CompletionChunk(), id="usage-to-come"),
        pytest.param(
            b'"choices": [], "prompt_progress": {"total": 52, "cache": 0, "processed": 52, "time_ms": 3}',
            CompletionChunk([], prompt_progress=PromptProgress(52, 52, 0, 3.0)),
            id="progress",
        ),
        pytest.param(
            b'"error": {"code": 500, "message": "failed to decode", "type": "server_error"}',
            CompletionChunk(error={"code": 500, "message": "failed to decode", "type": "server_error"}),
            id="error-in-the-stream",
        ),
        pytest.param(b'"error": "overloaded"', CompletionChunk(error="overloaded"), id="error-text"),
    ],
)
def test_reads_chunks_of_several_servers(fields: bytes, expected: CompletionChunk) -> None:
    """Unknown fields are ignored, missing ones are None; a measurement accepts all of them."""
    assert expected == chunk(fields).exact()


@pytest.mark.parametrize(
    ("delta", "thought"),
    [(Delta("x"), ""), (Delta(reasoning_content="a"), "a"), (Delta(reasoning="b"), "b"), (Delta("", "a", "a"), "a")],
    ids=["none", "llama-server", "ollama", "both"],
)
def test_reads_reasoning_under_both_names(delta: Delta, thought: str) -> None:
    """A server in between may send both."""
    assert thought == delta.thought


@pytest.mark.parametrize("fields", [b'"choices": null', b'"choices": []', b'"usage": null'])
def test_a_chunk_without_choices_adds_nothing(fields: bytes) -> None:
    """Servers send null, an empty list, or no field."""
    found = chunk(fields)

    assert not found.choices
    assert (found.content, found.thought, found.finish_reasons) == ("", "", [])


def test_a_chunk_adds_the_text_of_all_its_choices() -> None:
    choices = [ChunkChoice(Delta("a", "b")), ChunkChoice(None), ChunkChoice(Delta("c", reasoning="d"), "stop", 1)]
    found = CompletionChunk(choices)

    assert (found.content, found.thought, found.finish_reasons) == ("ac", "bd", ["stop"])


@pytest.mark.parametrize(
    ("data", "error"),
    [
        pytest.param(b'{"error": {"message": "no slot", "code": 500}}', ErrorBody("no slot", code=500), id="envelope"),
        pytest.param(b'{"error": "no slot"}', ErrorBody("no slot"), id="text"),
        pytest.param(
            b'{"object": "error", "message": "no slot", "type": "Internal", "code": 500}',
            ErrorBody("no slot", "Internal", 500),
            id="flat",
        ),
        pytest.param(b'{"code": 500, "message": "no slot"}', ErrorBody("no slot", code=500), id="bare"),
        pytest.param(b'{"error": {"message": ["no slot"]}}', None, id="another-form"),
        pytest.param(b'{"data": []}', None, id="no-error"),
        pytest.param(b'{"error": null}', None, id="null"),
        pytest.param(b"<h1>no slot</h1>", None, id="no-json"),
        pytest.param(b'{"message": "\xff"}', None, id="not-utf-8"),
    ],
)
def test_finds_an_error_in_every_form(data: bytes, error: ErrorBody | None) -> None:
    """Servers do not agree on one; other bodies are not taken for errors."""
    assert error == error_in(data)


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        pytest.param(
            b'{"error": {"code": 400, "message": "request (450 tokens) exceeds the available context size",'
            b' "type": "exceed_context_size_error", "n_prompt_tokens": 450, "n_ctx": 256}}',
            ErrorBody(
                "request (450 tokens) exceeds the available context size", "exceed_context_size_error", 400, 450, 256
            ),
            id="llama-server",
        ),
        pytest.param(
            b'{"error": {"message": "Incorrect API key", "type": "invalid_request_error", "param": null,'
            b' "code": "invalid_api_key"}}',
            ErrorBody("Incorrect API key", "invalid_request_error", "invalid_api_key"),
            id="openai",
        ),
        pytest.param(b'{"error": {}}', ErrorBody(), id="says-nothing"),
    ],
)
def test_reads_error_envelopes(answer: bytes, body: ErrorBody) -> None:
    """A code is a number at one server and a word at another."""
    assert ErrorEnvelope(body) == msgspec.json.decode(answer, type=ErrorEnvelope)


def test_reads_the_models_under_data() -> None:
    """llama-server lists them again under another key, in another server's format."""
    answer = b'{"models": [{"name": "other"}], "object": "list", "data": [{"id": "s", "aliases": ["s"], "meta": null}]}'

    assert ModelList([ModelEntry("s")]) == msgspec.json.decode(answer, type=ModelList)
