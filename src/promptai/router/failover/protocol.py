"""Read what an engine sends as far as a flight must understand it. Pure."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import msgspec

from promptai.engine.upstream import Reply
from promptai.errors import EngineError, EngineProtocolError, EngineRefusedError
from promptai.router.estimate.prefix import Chain
from promptai.router.schedule.lease import LeaseResult
from promptai.wire.llamaserver import NativeChunk
from promptai.wire.malformed import MALFORMED
from promptai.wire.openai import CompletionChunk, CompletionResponse, ErrorBody, error_in
from promptai.wire.sse import SseEvent

AnyChunk = TypeVar("AnyChunk", CompletionChunk, NativeChunk)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 10.0
_OWN_OF_CHUNK = frozenset(("choices", "usage", "timings", "prompt_progress"))


def read_chunk(event: SseEvent, kind: type[AnyChunk], replica_id: str) -> AnyChunk:
    """
    One chunk of a stream.

    Raises:
        EngineProtocolError: It is none.
        EngineRefusedError: It is an error in place of one.
    """
    try:
        chunk = msgspec.json.decode(event.data, type=kind)
    except MALFORMED as error:
        raise EngineProtocolError(f"{replica_id} sent a malformed chunk: {error}") from None
    if event.event == "error" or chunk.error is not None:
        data = event.data.encode()
        found = error_in(data) or ErrorBody(event.data[:200])
        status = found.code if isinstance(found.code, int) and 400 <= found.code < 600 else 500
        raise EngineRefusedError(f"{replica_id} broke off: {found.message}", status=status, kind=found.type, body=data)
    return chunk


def taken(
    events: Iterable[SseEvent], take: Callable[[SseEvent], Sequence[bytes]]
) -> tuple[list[bytes], EngineError | None]:
    """What of the events is the client's, up to what is wrong in them: all that has been noted must be passed on."""
    out: list[bytes] = []
    try:
        for event in events:
            out += take(event)
    except EngineError as error:
        return out, error
    return out, None


def refused(replica_id: str, reply: Reply) -> EngineRefusedError:
    """An answer with a status that is none of success, as an error."""
    found = error_in(reply.body) or ErrorBody(reply.body[:200].decode("utf-8", "replace"))
    return EngineRefusedError(
        f"{replica_id} answered HTTP {reply.status}: {found.message}",
        status=reply.status,
        kind=found.type,
        body=reply.body,
        retry_after_s=reply.retry_after_s,
    )


def words_of(error: EngineRefusedError) -> str:
    """What an engine said, without who said it."""
    found = error_in(error.body)
    return found.message if found is not None and found.message else error.message


def adds(chunk: CompletionChunk) -> bool:
    """Whether there is something for the client in a chunk that also tells progress."""
    for choice in chunk.choices or ():
        delta = choice.delta
        if choice.text or (delta and (delta.content or delta.reasoning_content or delta.reasoning or delta.tool_calls)):
            return True
    return False


def reason_of(error: EngineError) -> str:
    """What went wrong with an engine, in one word."""
    if isinstance(error, EngineRefusedError):
        return "busy" if error.status in {429, 503} else "refused"
    return "protocol" if isinstance(error, EngineProtocolError) else "died"


def pause_s(error: EngineError, failures: int) -> float:
    """
    How long those that failed a request are left alone by it, where there is nobody else to ask.

    A board that is loading, or as full as it can be, refuses within milliseconds: without a pause all attempts are
    spent before anything can have changed there.

    Args:
        error: The last failure; what it says of the time is kept to, within reason.
        failures: So far, at least 1.
    """
    told = error.retry_after_s if isinstance(error, EngineRefusedError) else None
    doubled = _FIRST_PAUSE_S * 2.0 ** min(failures - 1, 10)
    return min(max(doubled, told or 0.0), _LONGEST_PAUSE_S)


def stops(event: SseEvent) -> bool:
    """Whether an event ends a native stream; in a string its quotes would be escaped."""
    return '"stop":true' in event.data


def head_of(data: str) -> dict[str, Any]:
    """What all chunks of one answer have in common."""
    chunk = msgspec.json.decode(data, type=dict[str, Any])
    return {name: value for name, value in chunk.items() if name not in _OWN_OF_CHUNK}


def without_progress(data: str) -> str:
    """
    A chunk without its progress.

    Where a template lets the model think and thoughts are wanted as text, llama-server says the first tag of the
    answer beside its first progress (b11549).
    """
    chunk = msgspec.json.decode(data, type=dict[str, Any])
    chunk.pop("prompt_progress", None)
    return msgspec.json.encode(chunk).decode()


def rehead(data: str, head: dict[str, Any]) -> bytes:
    """A chunk of one answer as one of another."""
    chunk = msgspec.json.decode(data, type=dict[str, Any])
    return msgspec.json.encode({**chunk, **head})


def account_of(reply: Reply) -> CompletionResponse:
    """What an answer in one piece says of itself; nothing where it is a refusal, or none."""
    try:
        return msgspec.json.decode(reply.body, type=CompletionResponse) if reply.status == 200 else CompletionResponse()
    except MALFORMED:
        return CompletionResponse()


def outcome_of(found: CompletionResponse, held: Chain, *, counted: bool) -> LeaseResult:
    """How a request ended that was answered in one piece; of its engine only timings tell more than that it lives."""
    generated = found.usage.completion_tokens if found.usage is not None else None
    if found.timings is None:
        return LeaseResult(generated=generated)
    capped = any(choice.finish_reason == "length" for choice in found.choices or ())
    generated = found.timings.predicted_n if generated is None else generated
    return LeaseResult(answer=held, timings=found.timings, generated=generated, capped=capped, counted=counted)
