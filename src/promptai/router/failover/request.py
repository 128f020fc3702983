"""Carry one request through the fleet: queue, attempt, and after a failure another attempt.

When a board dies, its running requests fail, and their clients are left with half an answer. Here another replica takes
over. Before the first byte of the answer it gets the request anew; after it, it resumes the answer
(``failover.resume``). A silence counts as a failure once it is longer than the replica's pending work can explain.

A request that its engine refuses with HTTP 400 to 499, except 429, is not sent again: the next engine would refuse it,
too. An answer that cannot be resumed, such as a part of a tool call, ends with an error that names the obstacle.
"""

from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Literal

import msgspec

from promptai.engine.upstream import Reply, Upstream
from promptai.errors import BrokenOffError, EngineDiedError, EngineError, EngineProtocolError, EngineRefusedError
from promptai.router.estimate.breaker import FAILURE_LIMIT
from promptai.router.failover.attempt import AnswerState, Attempt
from promptai.router.failover.protocol import ClientRequest, engine_message, retry_pause_s, retry_reason
from promptai.router.failover.response import ResponseBuilder, prefilled_answer
from promptai.router.failover.resume import SentText, missing_end, resume_blocker
from promptai.router.schedule.dispatcher import Dispatcher, QueueEntry
from promptai.router.schedule.lease import LeaseResult, SlotLease, SlotRequest
from promptai.wire.llamaserver import Timings
from promptai.wire.openai import Usage

_NOT_IMPLEMENTED = 501
#: Statuses that may be the request's fault: llama-server sends 500 for an image, and inside the stream for a grammar
#: that matches nothing (b11549). A second replica decides, so that such a request does not open the breaker of one
#: board after another.
_OBJECTIONS = {500, _NOT_IMPLEMENTED}


class RequestStatus(msgspec.Struct, frozen=True, kw_only=True):
    """
    Progress of a request, for a waiting client.

    Attributes:
        stage: ``queued``, ``loading``, ``prefill`` or ``decode``.
        place: Number of requests ahead of it in the queue.
        share: Share of loading or prefill that is done, 0 to 1.
        left_s: Estimated seconds to the first token.
    """

    stage: str
    place: int | None = None
    share: float | None = None
    left_s: float | None = None


class RoutedRequest:
    """
    A request on its way through the fleet.

    Attributes:
        leases: The slots that it held, in order.
    """

    def __init__(
        self, client_request: ClientRequest, slot_request: SlotRequest, dispatcher: Dispatcher, upstream: Upstream
    ) -> None:
        self.client_request = client_request
        self.slot_request = slot_request
        self.leases: list[SlotLease] = []
        self._state = AnswerState(client_request.fields)
        self._dispatcher = dispatcher
        self._fleet_state = dispatcher.fleet_state
        self._upstream = upstream
        self._entry: QueueEntry | None = None
        self._prompt_tokens = slot_request.prompt_tokens
        self._objectors: list[SlotLease] = []
        self._objection = ""

    @property
    def lease(self) -> SlotLease | None:
        """The slot that it holds or held last."""
        return self.leases[-1] if self.leases else None

    @property
    def sent(self) -> SentText:
        """The part of the answer that the client has received."""
        return self._state.sent

    @property
    def timings(self) -> Timings | None:
        """The engine's timings of all answers; ``None`` until reported."""
        return self._state.tally.timings()

    @property
    def usage(self) -> Usage | None:
        """The engine's usage of all answers; ``None`` until reported."""
        return self._state.tally.usage()

    @property
    def retries(self) -> list[str]:
        """Reason of each attempt that started again from the beginning."""
        return self._state.retries

    @property
    def continuations(self) -> list[Literal["ids", "text"]]:
        """Source of the token ids of each attempt that resumed the answer."""
        return self._state.continuations

    def status(self) -> RequestStatus:
        """Return the current progress."""
        if self._entry is not None:
            placement, place = self._entry.placement, self._dispatcher.position(self._entry)
            left_s = placement.estimate.ttft_s if placement is not None else None
            replica = placement.view.replica if placement is not None else None
            if replica is not None and replica.state.value in {"cold", "loading"}:
                return RequestStatus(stage="loading", place=place, share=replica.progress, left_s=left_s)
            return RequestStatus(stage="queued", place=place, left_s=left_s)
        lease = self.lease
        if lease is None or lease.first_token_at is not None:
            return RequestStatus(stage="decode" if lease is not None else "queued")
        now, tps = self._fleet_state.now(), self._fleet_state.book.prefill_tps(lease.replica)
        left_s = lease.prefill_tokens_left(now, tps) / tps if tps else None
        return RequestStatus(stage="prefill", share=lease.prefill_share(now, tps or 0.0), left_s=left_s)

    async def events(self) -> AsyncGenerator[list[bytes], None]:
        """
        Yield the answer's chunks as JSON, as they arrive, without ``[DONE]``.

        Raises:
            SaturatedError, NoCapacityError: No slot is available.
            EngineRefusedError: An engine refused the request.
            EngineError: Every permitted attempt failed.
            BrokenOffError: The answer has begun and cannot be resumed.
        """
        while True:
            async with self._slot() as lease:
                try:
                    attempt = self._attempt(lease)
                    stream = attempt.resume() if self.sent.started else attempt.stream()
                    async with aclosing(stream) as chunks:
                        async for payloads in chunks:
                            yield payloads
                    self._blame_objectors()
                    return
                except (EngineDiedError, EngineProtocolError, EngineRefusedError) as error:
                    if self._handle_failure(lease, error):
                        yield missing_end(self.sent, self.client_request.fields, self.timings)
                        return

    async def response(self) -> Reply:
        """Return the complete response; raises as ``events`` does."""
        if not self._streamable():
            return await self._complete()
        fields, body = self.client_request.fields, self.client_request.body
        builder = ResponseBuilder(
            chat=self.client_request.is_chat, prefill=prefilled_answer(fields), alternatives=fields.n or 1
        )
        options = {**(fields.stream_options or {}), "include_usage": True}
        self.client_request = msgspec.structs.replace(
            self.client_request,
            fields=msgspec.structs.replace(fields, stream=True, stream_options=options),
            body={**body, "stream": True, "stream_options": options},
        )
        async with aclosing(self.events()) as events:
            async for chunks in events:
                builder.add(chunks)
        return Reply(200, builder.build(), "application/json")

    def _streamable(self) -> bool:
        """Whether engines can stream the answer: llama-server does not stream tools with ``logprobs``."""
        fields, replicas = self.client_request.fields, self._fleet_state.fleet.snapshot.of(self.slot_request.model)
        known = all(replica.dialect in {"llama-server", "promptai"} for replica in replicas)
        return fields.input is None and known and not (fields.tools and self.client_request.body.get("logprobs"))

    async def _complete(self) -> Reply:
        """Request a response that is not streamed."""
        while True:
            async with self._slot() as lease:
                try:
                    reply = await self._attempt(lease).complete(self.slot_request.max_tokens)
                except (EngineDiedError, EngineProtocolError, EngineRefusedError) as error:
                    self._handle_failure(lease, error)
                    continue
                if reply.status == 200:
                    self._blame_objectors()
                return reply

    def _slot(self) -> AbstractAsyncContextManager[SlotLease]:
        return self._dispatcher.acquire(self.slot_request, on_queued=self._queued)

    def _queued(self, entry: QueueEntry) -> None:
        self._entry = entry

    def _attempt(self, lease: SlotLease) -> Attempt:
        self.leases.append(lease)
        self._entry = None
        return Attempt(self.client_request, self._state, lease, self._fleet_state, self._upstream)

    # After a failure

    def _handle_failure(self, lease: SlotLease, error: EngineError) -> bool:
        """
        Decide what follows a failed attempt.

        Returns:
            True if the answer is complete nevertheless; False for another attempt.

        Raises:
            EngineError: The request has failed.
            BrokenOffError: The answer has begun and cannot be resumed.
        """
        # Clients may not learn the URLs of boards; the response headers name the replica.
        error.message = error.message.replace(lease.replica.url, lease.replica.id)
        status, started = error.status if isinstance(error, EngineRefusedError) else None, self.sent.started
        if status is not None and 400 <= status < 500 and status != 429:
            lease.result = LeaseResult(generated_tokens=lease.generated)
            if started:
                resumed = "it refused to resume an answer that another replica began" if self.continuations else ""
                raise _broken_off(error, resumed)
            raise error
        if isinstance(error, EngineRefusedError) and status in _OBJECTIONS:
            self._objectors.append(lease)
            if not started:
                return self._handle_objection(lease, error)
        else:
            dead = isinstance(error, EngineDiedError) and not lease.first_token_at
            self._fleet_state.record_failure(lease, weight=FAILURE_LIMIT if dead else 1)
        if self.sent.finished:
            return True
        blocker = self._resume_blocker() if started else None
        limit = self.client_request.fields.limit
        if started and blocker is None and limit is not None and self.sent.tokens >= limit:
            return True
        if blocker is not None or self._attempts_spent:
            if started:
                raise _broken_off(error, blocker or f"all {len(self.leases)} attempts failed")
            raise error
        return self._try_again(lease, error)

    def _handle_objection(self, lease: SlotLease, error: EngineRefusedError) -> Literal[False]:
        """Try once more; if two replicas object with the same message, the request is at fault."""
        earlier, self._objection = self._objection, engine_message(error)
        others = {objector.replica.id for objector in self._objectors} - {lease.replica.id}
        if others and earlier == self._objection:
            hint = f"reported by {lease.replica.id} and {', '.join(sorted(others))}"
            raise EngineRefusedError(earlier, status=400, kind=None, hint=hint)
        if earlier or error.status == _NOT_IMPLEMENTED or self._attempts_spent:
            raise error
        return self._try_again(lease, error)

    def _blame_objectors(self) -> None:
        """Record a failure of the replicas that objected to a request which another one answered."""
        for lease in self._objectors:
            self._fleet_state.record_failure(lease)

    def _try_again(self, lease: SlotLease, error: EngineError) -> Literal[False]:
        if not self.sent.started:
            self.retries.append(retry_reason(error))
        pause_ends_at = self._fleet_state.now() + retry_pause_s(error, len(self.leases))
        self.slot_request = msgspec.structs.replace(
            self.slot_request,
            avoid_until=self.slot_request.avoid_until | {lease.replica.id: pause_ends_at},
            resubmitted=True,
            resuming=self.sent.started,
            prompt_tokens=self._prompt_tokens + self.sent.tokens,
        )
        return False

    @property
    def _attempts_spent(self) -> bool:
        return len(self.leases) >= self.client_request.max_attempts

    def _resume_blocker(self) -> str | None:
        blocker, model = resume_blocker(self.client_request.fields, self.sent), self.slot_request.model
        if blocker is None and not self._fleet_state.can_resume(model):
            return f"no replica of {model} can resume an answer: only llama-server does"
        return blocker


def _broken_off(error: EngineError, hint: str) -> BrokenOffError:
    return BrokenOffError(f"the answer broke off: {error.message}", hint=hint)
