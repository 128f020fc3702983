"""A request as its engine gets it: the body as it came, and the few fields that are ours. Pure."""

from typing import Any

import msgspec

from promptai.router.failover.resume import answers
from promptai.router.schedule.lease import SlotLease
from promptai.wire.inference import InferenceRequest


def first_body(lease: SlotLease, request: InferenceRequest, body: dict[str, Any]) -> bytes:
    """A request that is sent from its beginning."""
    sent = {**body, "model": lease.replica.model}
    if request.stream and lease.replica.dialect == "llama-server":
        # Not only to tell how far it is: an engine that writes nothing does not notice that its client has gone.
        sent["return_progress"] = True
    return msgspec.json.encode(own_fields(lease, request, sent))


def own_fields(lease: SlotLease, request: InferenceRequest, body: dict[str, Any]) -> dict[str, Any]:
    """What every request of ours says to a llama-server."""
    replica = lease.replica
    if replica.dialect != "llama-server":
        return body
    # Its HTTP thread says every 30 s that it lives (b11549), also where nothing is computed any more.
    sent = {**body, "sse_ping_interval": -1}
    if replica.slots > 1 and replica.host_cache_tokens == 0 and answers(request) == 1:
        # Without a prompt cache, a slot of its own choosing might be the one that somebody comes back to.
        sent["id_slot"] = lease.slot
    return sent


def counts(request: InferenceRequest) -> bool:
    """Whether what an engine counts is the text that is counted here: one prompt, no pictures, no token ids."""
    if request.messages is None:
        given = request.prompt if request.prompt is not None else request.input
        return isinstance(given, str) and answers(request) == 1
    contents = [message.get("content") for message in request.messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return answers(request) == 1 and all(isinstance(part, dict) and part.get("type") == "text" for part in parts)
