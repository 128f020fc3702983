"""One attempt of a request on one leased slot: send it, or resume its answer, and relay the events.

A failed attempt raises an ``EngineError`` and leaves in ``AnswerState`` all that the client has received.
``failover.request`` decides whether another attempt follows.
"""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, Literal

import msgspec

from promptai.engine.upstream import Reply, Upstream, is_done
from promptai.errors import EngineProtocolError
from promptai.router.estimate.prefix import chain
from promptai.router.failover.protocol import (
    ClientRequest,
    common_fields,
    has_content,
    is_native_end,
    is_prompt_comparable,
    lease_result,
    payloads_until_error,
    read_chunk,
    read_response,
    refusal,
    request_body,
    with_common_fields,
    with_engine_fields,
    without_progress,
)
from promptai.router.failover.resume import SentText, answer_chunks, resume_body, resume_tokens
from promptai.router.failover.usage import UsageTally
from promptai.router.schedule.fleet_state import FleetState
from promptai.router.schedule.lease import LeaseResult, SlotLease
from promptai.wire.inference import InferenceRequest, assistant_turn
from promptai.wire.llamaserver import NativeChunk
from promptai.wire.malformed import MALFORMED
from promptai.wire.openai import CompletionChunk
from promptai.wire.sse import SseEvent

_DONE = "[DONE]"
_QUICK_S = 30.0
#: For the limit of a response that is not streamed: seconds per token of a replica without known rates, and the limit
#: for the whole answer.
_SLOW_STEP_S, _MAX_RESPONSE_S = 2.0, 3600.0
_DEFAULT_ANSWER_TOKENS = 4096


class AnswerState:
    """
    State of an answer across attempts.

    Attributes:
        sent: The part that the client has received.
        tally: Timings and usage reported by engines.
        retries: Reason of each attempt that started again from the beginning.
        continuations: Source of the token ids of each resumed attempt.
    """

    def __init__(self, request: InferenceRequest) -> None:
        self.sent = SentText(request.answers)
        self.tally = UsageTally(request.n or 1)
        self.retries: list[str] = []
        self.continuations: list[Literal["ids", "text"]] = []

    @property
    def generated_tokens(self) -> int | None:
        """Generated tokens by the engine's report; ``None`` without one."""
        timings, usage = self.tally.timings(), self.tally.usage()
        if timings is not None:
            return timings.predicted_n
        return usage.completion_tokens if usage is not None else None


class Attempt:
    """One attempt; used for one of ``stream``, ``resume`` and ``complete``."""

    def __init__(
        self,
        client_request: ClientRequest,
        state: AnswerState,
        lease: SlotLease,
        fleet_state: FleetState,
        upstream: Upstream,
    ) -> None:
        self._client_request = client_request
        self._state = state
        self._lease = lease
        self._fleet_state = fleet_state
        self._upstream = upstream

    def stream(self) -> AsyncGenerator[list[bytes], None]:
        """
        Send the request and yield the payloads for the client; closing the generator closes the connection.

        Raises:
            EngineDiedError, EngineProtocolError, EngineRefusedError: The attempt failed.
        """
        return self._relay(self._client_request.path, self._body(), self._payloads, is_done)

    async def resume(self) -> AsyncGenerator[list[bytes], None]:
        """Continue the answer from the text sent so far; raises as ``stream`` does."""
        state, sent, fields = self._state, self._state.sent, self._client_request.fields
        point = await resume_tokens(self._query, fields, self._client_request.body, sent)
        state.continuations.append(point.source)
        sent.resume_from(point)
        tokens_before = sent.tokens
        left = None if fields.limit is None else max(1, fields.limit - tokens_before)
        body = with_engine_fields(self._lease, fields, resume_body(self._client_request.body, point, max_tokens=left))
        take = partial(self._resumed_payloads, tokens_before)
        async with aclosing(self._relay("/completion", msgspec.json.encode(body), take, is_native_end)) as relayed:
            async for payloads in relayed:
                yield payloads

    async def complete(self, max_tokens: int | None) -> Reply:
        """
        Send a request whose response is not streamed; an engine's 4xx is a response, too.

        Raises:
            EngineDiedError, EngineProtocolError, EngineRefusedError: The attempt failed; the last one for HTTP 5xx
                and 429.
        """
        lease, request = self._lease, self._client_request
        limit_s = self._response_limit_s(max_tokens)
        reply = await self._upstream.post(lease.replica.url, request.path, self._body(), limit_s=limit_s)
        if reply.status >= 500 or reply.status == 429:
            raise refusal(lease.replica.id, reply)
        response = read_response(reply)
        self._state.tally.record(timings=response.timings, usage=response.usage)
        comparable = is_prompt_comparable(request.fields)
        lease.result = lease_result(response, chain(request.text), prompt_comparable=comparable)
        if reply.status != 200:
            lease.result = LeaseResult(generated_tokens=0)
        return reply

    async def _relay(
        self,
        path: str,
        body: bytes,
        take: Callable[[float, SseEvent], Sequence[bytes]],
        ends: Callable[[SseEvent], bool],
    ) -> AsyncGenerator[list[bytes], None]:
        url = self._lease.replica.url
        async with aclosing(
            self._upstream.stream(url, path, body, silence_s=self._silence_limit_s, ends=ends)
        ) as pieces:
            async for piece in pieces:
                payloads, error = payloads_until_error(piece.events, partial(take, piece.t))
                if payloads:
                    yield payloads
                if error is not None:
                    raise error
        self._lease.result = self._result()

    def _payloads(self, t: float, event: SseEvent) -> Sequence[bytes]:
        """Record an event that arrived at ``t``; return the payload for the client, if any."""
        # With several prompts llama-server starts with a null event (b11549).
        if event.comment or event.data in {_DONE, "null"}:
            return ()
        lease, sent = self._lease, self._state.sent
        chunk = read_chunk(event, CompletionChunk, lease.replica.id)
        self._state.tally.add(chunk)
        progress = chunk.prompt_progress
        if progress is not None:
            lease.record_progress(progress.processed, progress.cache, progress.total, t)
            sent.prompt_tokens = progress.total
        has_text = sent.record(chunk)
        if progress is None and (has_text or sent.beyond_text):
            self._fleet_state.record_token(lease, t)
        data = event.data
        if progress is not None and not self._client_request.fields.return_progress:
            if not has_content(chunk):
                return ()
            data = without_progress(data)
        if not sent.common:
            sent.common = common_fields(data)
        elif self._state.retries:
            # The client has the first chunks of an engine that died before its first token; one answer has one id.
            return (with_common_fields(data, sent.common),) if sent.started else ()
        return (data.encode(),)

    def _resumed_payloads(self, tokens_before: int, t: float, event: SseEvent) -> Sequence[bytes]:
        """Record an event of a resumed answer, as ``_payloads`` does; ``tokens_before``: tokens sent before it."""
        if event.comment or event.data == _DONE:
            return ()
        lease, sent = self._lease, self._state.sent
        chunk = read_chunk(event, NativeChunk, lease.replica.id)
        progress = chunk.prompt_progress
        if progress is not None:
            lease.record_progress(progress.processed, progress.cache, progress.total, t)
            return ()
        self._state.tally.record(timings=chunk.timings)
        sent.record_native(chunk)
        if chunk.content:
            self._fleet_state.record_token(lease, t)
        return answer_chunks(chunk, sent, self._client_request.fields, tokens_before)

    async def _query(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        # These requests wait for the engine's current computation: its loop takes them between two batches.
        limit_s = self._fleet_state.silence_limit_s(self._lease, _QUICK_S)
        replica = self._lease.replica
        reply = await self._upstream.post(replica.url, path, msgspec.json.encode(body), limit_s=limit_s)
        if reply.status != 200:
            raise refusal(replica.id, reply)
        try:
            return msgspec.json.decode(reply.body, type=dict[str, Any])
        except MALFORMED as error:
            raise EngineProtocolError(f"{replica.id}{path} sent an unexpected response: {error}") from None

    def _result(self) -> LeaseResult:
        """Return the result of a complete stream."""
        state, request, generated = self._state, self._client_request, self._state.generated_tokens
        if request.fields.answers > 1:  # it is unknown which slots the answers used, and how they shared the time
            return LeaseResult(generated_tokens=generated)
        text, limit = state.sent.text, request.fields.limit
        # The timings of a resumed part say nothing about the length of answers.
        capped = bool(state.continuations) or (limit is not None and self._lease.generated >= limit)
        return LeaseResult(
            conversation=chain(request.text + (assistant_turn(text) if request.is_chat else text)),
            timings=state.tally.timings(),
            generated_tokens=generated,
            capped=capped,
            prompt_comparable=not state.continuations and is_prompt_comparable(request.fields),
        )

    def _body(self) -> bytes:
        return request_body(self._lease, self._client_request.fields, self._client_request.body)

    def _silence_limit_s(self) -> float:
        return self._fleet_state.silence_limit_s(self._lease, self._client_request.stall_s)

    def _response_limit_s(self, max_tokens: int | None) -> float:
        """Limit of a response that is not streamed: four times the expected time."""
        replica = self._lease.replica
        step = self._fleet_state.book.decode_step_s(replica, replica.slots) or _SLOW_STEP_S
        tokens = max_tokens or replica.context or _DEFAULT_ANSWER_TOKENS
        decode_s = 0.0 if self._client_request.fields.input is not None else 4.0 * tokens * step
        return self._silence_limit_s() + min(decode_s, _MAX_RESPONSE_S)
