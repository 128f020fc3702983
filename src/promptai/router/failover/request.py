"""One request's way through the fleet: wait, be sent, fail, be sent again, go on, arrive.

A board that dies takes its requests along, and whoever asked gets half an answer. Here a request
outlives its board: before the first byte it is sent to another one as it was; after it, the answer
goes on elsewhere from what has been sent already (``continuation``). A silence counts as a death
once it is longer than everything that the board has to compute could explain.

A request that its engine refuses (400 to 499) is not sent again: the next one would refuse it too.
Nothing is sent again that could not be: a part of a tool call, or of one of several answers, ends
in an error that says so.
"""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, Literal

import msgspec

from promptai.engine.upstream import Reply, Upstream
from promptai.errors import (
    BrokenOffError,
    EngineDiedError,
    EngineError,
    EngineProtocolError,
    EngineRefusedError,
)
from promptai.router.estimate.prefix import chain
from promptai.router.failover.joint import find_joint
from promptai.router.failover.order import ClientRequest, RequestStatus
from promptai.router.failover.outgoing import counts, first_body, own_fields
from promptai.router.failover.protocol import (
    account_of,
    adds,
    head_of,
    outcome_of,
    pause_s,
    read_chunk,
    reason_of,
    refused,
    rehead,
    stops,
    taken,
    without_progress,
    words_of,
)
from promptai.router.failover.response import ResponseBuilder, begun
from promptai.router.failover.resume import SentText, answers, as_answer, continued_body, obstacle, rest
from promptai.router.failover.usage import UsageTally
from promptai.router.schedule.dispatcher import Dispatcher, QueueEntry
from promptai.router.schedule.lease import LeaseResult, RouteRequest, SlotLease
from promptai.wire.inference import assistant_turn
from promptai.wire.llamaserver import NativeChunk, Timings
from promptai.wire.malformed import MALFORMED
from promptai.wire.openai import CompletionChunk, Usage
from promptai.wire.sse import SseEvent

_DONE = "[DONE]"
_NOT_IMPLEMENTED = 501
#: Of an engine that says so in good order and lives. It may be broken all the same; but llama-server also says 500 to
#: an image, or in the stream to a grammar that allows nothing (b11549), and whoever sends those must not take one board
#: after another out.
_OBJECTIONS = {500, _NOT_IMPLEMENTED}
_QUICK_S = 30.0
#: An answer in one piece says nothing while it comes: seconds a token of a board that nobody knows, at most for all.
_SLOW_STEP_S, _WHOLE_S = 2.0, 3600.0


class RoutedRequest:
    """
    One request under way.

    Attributes:
        grants: The slots that it had, one after another.
        retries: Why it was sent again from the start, each time.
        continuations: How its answer went on elsewhere, each time: by ``ids`` that the engine told, or by ``text``.
        usage: The engine's account, if it is no llama-server; else it is in ``timings``.
    """

    def __init__(
        self, order: ClientRequest, route_request: RouteRequest, dispatcher: Dispatcher, upstream: Upstream
    ) -> None:
        self.order = order
        self.route_request = route_request
        self.leases: list[SlotLease] = []
        self.retries: list[str] = []
        self.continuations: list[Literal["ids", "text"]] = []
        self.usage: Usage | None = None
        self.said = SentText(answers(order.request))
        self._dispatcher = dispatcher
        self._fleet_state = dispatcher.fleet_state
        self._upstream = upstream
        self._entry: QueueEntry | None = None
        self._sent = 0
        self._prompt_tokens = route_request.tokens
        self._bill = UsageTally(order.request.n or 1)
        self._objectors: list[SlotLease] = []
        self._objection = ""

    @property
    def lease(self) -> SlotLease | None:
        """The slot that it has, or had last."""
        return self.leases[-1] if self.leases else None

    @property
    def timings(self) -> Timings | None:
        """The engine's account of all its answers together, once it has come."""
        return self._bill.total()

    def stage(self) -> RequestStatus:
        """Where it is now."""
        if self._entry is not None:
            choice, place = self._entry.placement, self._dispatcher.position(self._entry)
            left = choice.estimate.ttft_s if choice is not None else None
            replica = choice.view.replica if choice is not None else None
            if replica is not None and replica.state.value in {"cold", "loading"}:
                return RequestStatus(stage="loading", place=place, share=replica.progress, left_s=left)
            return RequestStatus(stage="queued", place=place, left_s=left)
        lease = self.lease
        if lease is None or lease.first_at is not None:
            return RequestStatus(stage="decode" if lease is not None else "queued")
        now, tps = self._fleet_state.now(), self._fleet_state.book.prefill_tps(lease.replica)
        left = lease.prefill_left(now, tps or 0.0)
        return RequestStatus(
            stage="prefill", share=lease.prefill_share(now, tps or 0.0), left_s=left / tps if tps else None
        )

    async def events(self) -> AsyncGenerator[list[bytes], None]:
        """
        The answer's chunks as they come, as JSON; ``[DONE]`` is not among them.

        Raises:
            SaturatedError, NoCapacityError: There is no slot for it.
            EngineRefusedError: Its engine refuses it.
            EngineError: It was sent as often as it may be, and failed each time.
            BrokenOffError: A part of it has been sent, and it cannot go on.
        """
        while True:
            async with self._slot() as lease:
                try:
                    self._sends(lease)
                    attempt = self._go_on(lease) if self.said.anything else self._begin(lease)
                    async with aclosing(attempt) as chunks:
                        async for some in chunks:
                            yield some
                    return
                except (EngineDiedError, EngineProtocolError, EngineRefusedError) as error:
                    if self._failed(lease, error):
                        yield rest(self.said, self.order.request, self.timings)
                        return

    async def whole(self) -> Reply:
        """The answer in one piece; raises as ``events`` does."""
        if not self._streamable():
            return await self._asked()
        request, body = self.order.request, self.order.body
        assembly = ResponseBuilder(chat=self.order.chat, begun=begun(request), alternatives=request.n or 1)
        options = {**(request.stream_options or {}), "include_usage": True}
        self.order = msgspec.structs.replace(
            self.order,
            request=msgspec.structs.replace(request, stream=True, stream_options=options),
            body={**body, "stream": True, "stream_options": options},
        )
        async with aclosing(self.events()) as events:
            async for chunks in events:
                assembly.add(chunks)
        return Reply(200, assembly.answer(), "application/json")

    def _streamable(self) -> bool:
        """Whether an answer can be had as a stream: llama-server does not stream tools with ``logprobs``."""
        request, replicas = self.order.request, self._fleet_state.fleet.snapshot.of(self.route_request.model)
        known = all(replica.dialect in {"llama-server", "promptai"} for replica in replicas)
        return request.input is None and known and not (request.tools and self.order.body.get("logprobs"))

    async def _asked(self) -> Reply:
        """Ask for the answer in one piece; an engine's refusal is an answer."""
        while True:
            async with self._slot() as lease:
                self._sends(lease)
                try:
                    reply = await self._upstream.ask(
                        lease.replica.url, self.order.path, self._body(lease), limit_s=self._response_limit_s(lease)
                    )
                    if reply.status >= 500 or reply.status == 429:
                        raise refused(lease.replica.id, reply)
                except (EngineDiedError, EngineRefusedError) as error:
                    self._failed(lease, error)
                    continue
                account = account_of(reply)
                self.usage = account.usage
                if account.timings is not None:
                    self._bill.note(account.timings)
                lease.outcome = outcome_of(account, chain(self.order.text), counted=counts(self.order.request))
                if reply.status == 200:
                    self._blame()
                else:
                    lease.outcome = LeaseResult(generated=0)
                return reply

    def _slot(self) -> Any:
        return self._dispatcher.acquire(self.route_request, entered=self._entered)

    def _entered(self, entry: QueueEntry) -> None:
        self._entry = entry

    def _sends(self, lease: SlotLease) -> None:
        self.leases.append(lease)
        self._entry = None
        self._sent += 1

    async def _begin(self, lease: SlotLease) -> AsyncGenerator[list[bytes], None]:
        """Send it as it is."""
        async with aclosing(
            self._upstream.stream(lease.replica.url, self.order.path, self._body(lease), silence_s=self._silence(lease))
        ) as pieces:
            async for piece in pieces:
                out, error = taken(piece.events, partial(self._take, lease, piece.t))
                if out:
                    yield out
                if error is not None:
                    raise error
        lease.outcome = self._ended(lease)

    def _ended(self, lease: SlotLease) -> LeaseResult:
        self._blame()
        if answers(self.order.request) > 1:  # nobody knows which of them lies in which slot, or how they shared time
            return LeaseResult(generated=self._generated)
        text = self.said.text
        held = chain(self.order.text + (assistant_turn(text) if self.order.chat else text))
        limit = self.order.request.limit
        # The engine's account of a part says nothing of how long answers are.
        capped = bool(self.continuations) or (limit is not None and lease.generated >= limit)
        counted = not self.continuations and counts(self.order.request)
        return LeaseResult(answer=held, timings=self.timings, generated=self._generated, capped=capped, counted=counted)

    @property
    def _generated(self) -> int | None:
        timings, usage = self.timings, self.usage
        if timings is not None:
            return timings.predicted_n
        return usage.completion_tokens if usage is not None else None

    def _take(self, lease: SlotLease, t: float, event: SseEvent) -> Sequence[bytes]:
        """Note what an event says that came at ``t``; its data, if it is the client's."""
        # With several prompts llama-server begins by saying null (b11549).
        if event.comment or event.data in {_DONE, "null"}:
            return ()
        chunk = read_chunk(event, CompletionChunk, lease.replica.id)
        self._bill.take(chunk)
        self.usage = chunk.usage or self.usage
        progress = chunk.prompt_progress
        if progress is not None:
            lease.progress(progress.processed, progress.cache, progress.total, t)
            self.said.prompt_tokens = progress.total
        text = self.said.add(chunk)
        if progress is None and (text or self.said.beyond_text):
            self._fleet_state.token(lease, t)
        data = event.data
        if progress is not None and not self.order.request.return_progress:
            if not adds(chunk):
                return ()
            data = without_progress(data)
        if not self.said.head:
            self.said.head = head_of(data)
        elif self.retries:
            # What an engine sent before its first token, and died, has been passed on: one answer has one id.
            return (rehead(data, self.said.head),) if self.said.anything else ()
        return (data.encode(),)

    async def _go_on(self, lease: SlotLease) -> AsyncGenerator[list[bytes], None]:
        """Continue the answer from what has been sent."""
        said, limit = self.said, self.order.request.limit
        joint = await find_joint(
            lambda path, body: self._quick(lease, path, body), self.order.request, self.order.body, said
        )
        self.continuations.append(joint.how)
        said.goes_on(joint.prompt, joint.said)
        left = None if limit is None else max(1, limit - said.tokens)
        before = said.tokens
        body = continued_body(self.order.body, joint.prompt + joint.said, left=left)
        payload = msgspec.json.encode(own_fields(lease, self.order.request, body))
        async with aclosing(
            self._upstream.stream(lease.replica.url, "/completion", payload, silence_s=self._silence(lease), ends=stops)
        ) as pieces:
            async for piece in pieces:
                out, error = taken(piece.events, partial(self._take_up, lease, before, piece.t))
                if out:
                    yield out
                if error is not None:
                    raise error
        lease.outcome = self._ended(lease)

    def _take_up(self, lease: SlotLease, before: int, t: float, event: SseEvent) -> Sequence[bytes]:
        """As ``_take``, of a continuation; ``before``: tokens that were sent before it."""
        if event.comment or event.data == _DONE:
            return ()
        chunk = read_chunk(event, NativeChunk, lease.replica.id)
        if chunk.prompt_progress is not None:
            p = chunk.prompt_progress
            lease.progress(p.processed, p.cache, p.total, t)
            return ()
        if chunk.timings is not None:
            self._bill.note(chunk.timings)
        self.said.add_native(chunk)
        if chunk.content:
            self._fleet_state.token(lease, t)
        return as_answer(chunk, self.said, self.order.request, before)

    async def _quick(self, lease: SlotLease, path: str, body: dict[str, Any]) -> dict[str, Any]:
        # These wait behind whatever the engine computes: its loop takes them between two batches.
        limit = self._fleet_state.silence_s(lease, _QUICK_S)
        reply = await self._upstream.ask(lease.replica.url, path, msgspec.json.encode(body), limit_s=limit)
        if reply.status != 200:
            raise refused(lease.replica.id, reply)
        try:
            return msgspec.json.decode(reply.body, type=dict[str, Any])
        except MALFORMED as error:
            raise EngineProtocolError(f"{lease.replica.id} answered something else at {path}: {error}") from None

    def _failed(self, lease: SlotLease, error: EngineError) -> bool:
        """Decide what follows: True when the answer is whole all the same; raises when nothing can follow."""
        # Where boards are is not for everybody who may ask them; how they are called is in the answer's head.
        error.message = error.message.replace(lease.replica.url, lease.replica.id)
        refusal = error.status if isinstance(error, EngineRefusedError) else None
        if refusal is not None and 400 <= refusal < 500 and refusal != 429:
            lease.outcome = LeaseResult(generated=lease.generated)
            if self.said.anything:
                raise self._broken_off(lease, error, "it was to go on with what another one began")
            raise error
        if isinstance(error, EngineRefusedError) and refusal in _OBJECTIONS:
            self._objectors.append(lease)
            if not self.said.anything:
                return self._objected(lease, error)
        else:
            dead = isinstance(error, EngineDiedError) and not lease.first_at
            self._fleet_state.failed(lease, weight=3 if dead else 1)
        if self.said.finished:
            return True
        why = obstacle(self.order.request, self.said) if self.said.anything else None
        if self.said.anything and not self._fleet_state.can_go_on(self.route_request.model):
            why = why or f"no board of {self.route_request.model} can go on: only llama-server does"
        limit = self.order.request.limit
        if self.said.anything and why is None and limit is not None and self.said.tokens >= limit:
            return True
        if why is not None or self._sent >= self.order.attempts:
            if self.said.anything:
                raise self._broken_off(lease, error, why or f"it was sent {self._sent} times")
            raise error
        return self._again(lease, error)

    def _objected(self, lease: SlotLease, error: EngineRefusedError) -> Literal[False]:
        """Ask once more; if two boards say the same it is the request."""
        before, self._objection = self._objection, words_of(error)
        others = {one.replica.id for one in self._objectors} - {lease.replica.id}
        if others and before == self._objection:
            hint = f"{lease.replica.id} says so, and {', '.join(sorted(others))}"
            raise EngineRefusedError(before, status=400, kind=None, hint=hint)
        if before or error.status == _NOT_IMPLEMENTED or self._sent >= self.order.attempts:
            raise error
        return self._again(lease, error)

    def _broken_off(self, lease: SlotLease, error: EngineError, why: str) -> BrokenOffError:
        return BrokenOffError(f"{lease.replica.id} failed in the middle of the answer: {error.message}", hint=why)

    def _blame(self) -> None:
        """What engines objected to has been answered."""
        for lease in self._objectors:
            self._fleet_state.failed(lease)

    def _again(self, lease: SlotLease, error: EngineError) -> Literal[False]:
        """Let it be sent to another replica."""
        if not self.said.anything:
            self.retries.append(reason_of(error))
        self.route_request = msgspec.structs.replace(
            self.route_request,
            refused=self.route_request.refused
            | {lease.replica.id: self._fleet_state.now() + pause_s(error, self._sent)},
            again=True,
            goes_on=self.said.anything,
            tokens=self._prompt_tokens + self.said.tokens,
        )
        return False

    def _body(self, lease: SlotLease) -> bytes:
        return first_body(lease, self.order.request, self.order.body)

    def _silence(self, lease: SlotLease) -> Callable[[], float]:
        return lambda: self._fleet_state.silence_s(lease, self.order.stall_s)

    def _response_limit_s(self, lease: SlotLease) -> float:
        step = self._fleet_state.book.decode_step_s(lease.replica, lease.replica.slots) or _SLOW_STEP_S
        tokens = self.route_request.limit or lease.replica.context or 4096
        answer = 0.0 if self.order.request.input is not None else 4.0 * tokens * step
        return self._fleet_state.silence_s(lease, self.order.stall_s) + min(answer, _WHOLE_S)
