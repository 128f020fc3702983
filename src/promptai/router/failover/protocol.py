"""Requests as engines receive them, and engine events as the router reads them. Pure.

The body of a request passes through as the client sent it, with a few fields of the gateway added. Only the parts of an
event that routing needs are read.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import msgspec

from promptai.engine.upstream import Reply, refused
from promptai.errors import EngineError, EngineProtocolError, EngineRefusedError
from promptai.router.estimate.prefix import Chain
from promptai.router.schedule.lease import LeaseResult, SlotLease
from promptai.wire.inference import InferenceRequest
from promptai.wire.llamaserver import NativeChunk
from promptai.wire.malformed import MALFORMED
from promptai.wire.openai import CompletionChunk, CompletionResponse, ErrorBody, error_in
from promptai.wire.sse import SseEvent

AnyChunk = TypeVar("AnyChunk", CompletionChunk, NativeChunk)
_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.25, 10.0
_PER_CHUNK = frozenset(("choices", "usage", "timings", "prompt_progress"))


class ClientRequest(msgspec.Struct, frozen=True, kw_only=True):
    """
    A client's request, accepted and ready to be sent.

    Attributes:
        path: Path of the engine's API.
        body: As the client sent it, with the model's name and the alias's parameters resolved.
        fields: The fields of ``body`` that the gateway reads.
        text: The prompt as one text.
        max_attempts: Upper limit of attempts.
        stall_s: Silence allowed beyond the time that pending work explains.
    """

    path: str
    body: dict[str, Any]
    fields: InferenceRequest
    text: str
    max_attempts: int = 4
    stall_s: float = 15.0

    @property
    def is_chat(self) -> bool:
        """Whether it is a chat completion."""
        return self.fields.messages is not None


# Requests


def request_body(lease: SlotLease, request: InferenceRequest, body: dict[str, Any]) -> bytes:
    """Encode a request that the engine of ``lease`` answers from the beginning."""
    sent = {**body, "model": lease.replica.model}
    if request.stream and lease.replica.dialect == "llama-server":
        # Also needed for disconnects: an engine that writes nothing does not notice that its client is gone.
        sent["return_progress"] = True
    return msgspec.json.encode(with_engine_fields(lease, request, sent))


def with_engine_fields(lease: SlotLease, request: InferenceRequest, body: dict[str, Any]) -> dict[str, Any]:
    """Add the fields that every request to a llama-server carries."""
    replica = lease.replica
    if replica.dialect != "llama-server":
        return body
    # -1 turns pings off: its HTTP thread sends one every 30 s (b11549), which would hide a stalled engine.
    sent = {**body, "sse_ping_interval": -1}
    if replica.slots > 1 and replica.host_cache_tokens == 0 and request.answers == 1:
        # Without a prompt cache, the engine might choose the slot of a conversation that will continue.
        sent["id_slot"] = lease.slot
    return sent


def is_prompt_comparable(request: InferenceRequest) -> bool:
    """Whether the engine counts the same text as the gateway: one text prompt without media."""
    if request.messages is None:
        given = request.prompt if request.prompt is not None else request.input
        return isinstance(given, str) and request.answers == 1
    contents = [message.get("content") for message in request.messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return request.answers == 1 and all(isinstance(part, dict) and part.get("type") == "text" for part in parts)


# Events of a stream


def read_chunk(event: SseEvent, kind: type[AnyChunk], replica_id: str) -> AnyChunk:
    """
    Decode one chunk of a stream.

    Raises:
        EngineProtocolError: The event is not a chunk.
        EngineRefusedError: The event is an error.
    """
    try:
        chunk = msgspec.json.decode(event.data, type=kind)
    except MALFORMED as error:
        raise EngineProtocolError(f"{replica_id} sent a malformed chunk: {error}") from None
    if event.event == "error" or chunk.error is not None:
        data = event.data.encode()
        found = error_in(data) or ErrorBody(event.data[:200])
        status = found.code if isinstance(found.code, int) and 400 <= found.code < 600 else 500
        raise EngineRefusedError(
            f"{replica_id} ended the stream with an error: {found.message}", status=status, kind=found.type, body=data
        )
    return chunk


def payloads_until_error(
    events: Iterable[SseEvent], take: Callable[[SseEvent], Sequence[bytes]]
) -> tuple[list[bytes], EngineError | None]:
    """Return the payloads decoded before the first bad event, and that error: recorded payloads must be sent."""
    payloads: list[bytes] = []
    try:
        for event in events:
            payloads += take(event)
    except EngineError as error:
        return payloads, error
    return payloads, None


def has_content(chunk: CompletionChunk) -> bool:
    """Whether a chunk with progress also carries something for the client."""
    for choice in chunk.choices or ():
        delta = choice.delta
        if choice.text or (delta and (delta.content or delta.thought or delta.tool_calls)):
            return True
    return False


def is_native_end(event: SseEvent) -> bool:
    """Whether an event ends a native stream; quotes inside a JSON string would be escaped."""
    return '"stop":true' in event.data


def common_fields(data: str) -> dict[str, Any]:
    """Return the fields that all chunks of an answer share."""
    chunk = msgspec.json.decode(data, type=dict[str, Any])
    return {name: value for name, value in chunk.items() if name not in _PER_CHUNK}


def with_common_fields(data: str, common: dict[str, Any]) -> bytes:
    """Return a chunk of one answer as a chunk of another."""
    chunk = msgspec.json.decode(data, type=dict[str, Any])
    return msgspec.json.encode({**chunk, **common})


def without_progress(data: str) -> str:
    """
    Remove the progress from a chunk.

    llama-server sends the first tag of an answer beside its first progress if the template allows reasoning and the
    client wants it as text (b11549).
    """
    chunk = msgspec.json.decode(data, type=dict[str, Any])
    chunk.pop("prompt_progress", None)
    return msgspec.json.encode(chunk).decode()


# Complete responses


def read_response(reply: Reply) -> CompletionResponse:
    """Decode usage and timings of a complete response; empty for an error or another format."""
    try:
        return msgspec.json.decode(reply.body, type=CompletionResponse) if reply.status == 200 else CompletionResponse()
    except MALFORMED:
        return CompletionResponse()


def lease_result(response: CompletionResponse, conversation: Chain, *, prompt_comparable: bool) -> LeaseResult:
    """Return the result of a complete response; without timings the engine is known to work, and no more."""
    generated = response.usage.completion_tokens if response.usage is not None else None
    if response.timings is None:
        return LeaseResult(generated_tokens=generated)
    capped = any(choice.finish_reason == "length" for choice in response.choices or ())
    generated = response.timings.predicted_n if generated is None else generated
    return LeaseResult(
        conversation=conversation,
        timings=response.timings,
        generated_tokens=generated,
        capped=capped,
        prompt_comparable=prompt_comparable,
    )


# Failures


def refusal(replica_id: str, reply: Reply) -> EngineRefusedError:
    """Return the error of a response whose status is not a success."""
    return refused(replica_id, reply.status, reply.body, reply.retry_after_s)


def engine_message(error: EngineRefusedError) -> str:
    """Return the engine's own message, without the name of the replica."""
    found = error_in(error.body)
    return found.message if found is not None and found.message else error.message


def retry_reason(error: EngineError) -> str:
    """Classify a failure for the metrics: ``busy``, ``refused``, ``protocol`` or ``died``."""
    if isinstance(error, EngineRefusedError):
        return "busy" if error.status in {429, 503} else "refused"
    return "protocol" if isinstance(error, EngineProtocolError) else "died"


def retry_pause_s(error: EngineError, failures: int) -> float:
    """
    Seconds for which a request avoids a replica that failed it, if no other replica is left.

    A board that is loading or full refuses within milliseconds. Without a pause, all attempts are spent before
    anything can change there.

    Args:
        error: The last failure; its ``Retry-After`` counts, up to ten seconds.
        failures: Failures so far, at least 1.
    """
    requested = error.retry_after_s if isinstance(error, EngineRefusedError) else None
    doubled = _FIRST_PAUSE_S * 2.0 ** min(failures - 1, 10)
    return min(max(doubled, requested or 0.0), _MAX_PAUSE_S)
