"""A simulated engine in time, without sockets: it computes, injects faults, and records what it sent.

The scheduler runs on the event loop's clock, so on virtual time an hour of a board passes at once. ``engine.simulated``
puts it behind a socket, and tests put it into the gateway's own process; both answer through ``engine.simulated_api``.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any, Literal, Self

import msgspec

from promptai.engine.simulated_formats import PrefillProgress, event
from promptai.engine.simulation import Emission, Request, Scheduler, SimulationConfig


class Fault(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """
    A fault to inject.

    Attributes:
        kind: ``refuse`` (HTTP 503), ``stall`` (silence for ``stall_s``), ``cut`` (connection reset), ``malformed``
            (a line that is not JSON), ``error`` (an error event), ``die`` (the process ends as if killed).
        after_tokens: Tokens sent before the fault; ignored by ``refuse``.
        times: Number of requests that it affects; ``None``: all.
        skip: Number of requests that are served before the first affected one.
    """

    kind: Literal["refuse", "stall", "cut", "malformed", "error", "die"]
    after_tokens: int = 0
    times: int | None = None
    skip: int = 0
    stall_s: float = 30.0


class Sent(msgspec.Struct):
    """
    The ground truth of one request, in seconds on the loop's clock, which is the monotonic one.

    Attributes:
        t_received: When the body had been read.
        t_chunks: When each content chunk was written to the socket.
    """

    t_received: float
    prompt_tokens: int
    cached_tokens: int
    t_chunks: list[float]


class Rejected(Exception):  # noqa: N818  becomes an HTTP response
    """The request is answered with an error."""

    def __init__(self, status: int, kind: str, message: str, **extra: int) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"code": status, "type": kind, "message": message, **extra}}


class BrokenOff(Exception):  # noqa: N818  becomes a broken connection
    """
    The connection ends in the middle of an answer.

    Attributes:
        dies: Whether the engine ends with it.
    """

    def __init__(self, *, dies: bool) -> None:
        super().__init__("the engine dies" if dies else "the connection ends")
        self.dies = dies


class Simulator:
    """
    One simulated engine; an async context manager that computes inside its block.

    Attributes:
        fault: The fault to inject from now on; setting it restarts the count of requests.
        sent: A record of every accepted request.
    """

    def __init__(self, config: SimulationConfig, *, fault: Fault | None = None) -> None:
        self.config = config
        self.sent: list[Sent] = []
        self.fault = fault
        self.scheduler = Scheduler(config)
        self._outboxes: dict[Request, asyncio.Queue[PrefillProgress | Emission | None]] = {}
        self._wake = asyncio.Event()
        self._killed = asyncio.Event()
        self._compute: asyncio.Task[None] | None = None
        self._ready_at = 0.0

    @property
    def fault(self) -> Fault | None:
        """The fault to inject; ``None``: none."""
        return self._fault

    @fault.setter
    def fault(self, fault: Fault | None) -> None:
        self._fault = fault
        self._hits = 0

    @property
    def running(self) -> bool:
        """Whether it has been started and not killed."""
        return self._compute is not None

    async def __aenter__(self) -> Self:
        """Start the engine."""
        self.start()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        """End the engine."""
        compute = self._compute
        self.kill()
        if compute is not None:
            await asyncio.wait([compute])

    def start(self) -> None:
        """Begin to load, with empty slots; does nothing when the engine is running."""
        if self._compute is not None:
            return
        self.scheduler = Scheduler(self.config)
        self._killed = asyncio.Event()
        self._ready_at = asyncio.get_running_loop().time() + self.config.load_s / self.config.time_scale
        self._compute = asyncio.create_task(self._run())

    def kill(self) -> None:
        """End at once: open streams break off, and the slots' caches are lost."""
        if self._compute is not None:
            self._compute.cancel()
            self._compute = None
        self._killed.set()
        for outbox in self._outboxes.values():
            outbox.put_nowait(None)

    def demand_ready(self) -> None:
        """
        Check that the engine has loaded.

        Raises:
            Rejected: It is still loading.
        """
        if asyncio.get_running_loop().time() < self._ready_at:
            raise Rejected(503, "unavailable_error", "Loading model")

    def accept(
        self, prompt: list[int], max_tokens: int | None, *, use_cache: bool, id_slot: int = -1
    ) -> tuple[Request, Sent]:
        """
        Accept a request, and return it with its record.

        Raises:
            Rejected: The engine is loading, or the prompt leaves no room for an answer.
        """
        self.demand_ready()
        room = self.config.context - len(prompt)
        if room <= 0:
            raise Rejected(
                400,
                "exceed_context_size_error",
                f"request ({len(prompt)} tokens) exceeds the available context size ({self.config.context} tokens), "
                "try increasing it",
                n_prompt_tokens=len(prompt),
                n_ctx=self.config.context,
            )
        wanted = room if max_tokens is None or max_tokens < 0 else min(room, max_tokens)
        now = asyncio.get_running_loop().time()
        sent = Sent(t_received=now, prompt_tokens=len(prompt), cached_tokens=0, t_chunks=[])
        self.sent.append(sent)
        return Request(prompt, max_tokens=max(1, wanted), use_cache=use_cache, id_slot=id_slot), sent

    async def generate(self, request: Request) -> AsyncGenerator[PrefillProgress | Emission, None]:
        """
        Yield progress and tokens of one request as they are computed; closing the generator frees the slot.

        The first progress is yielded when the request gets a slot.

        Raises:
            BrokenOff: The engine was killed.
        """
        outbox = self._outboxes[request] = asyncio.Queue()
        self.scheduler.add(request)
        self._wake.set()
        try:
            # The scheduler computes a step before its time has passed, so ``request.finish_reason`` is set too early.
            last = False
            while not last:
                item = await outbox.get()
                if item is None:
                    raise BrokenOff(dies=False)
                last = isinstance(item, Emission) and item.last
                yield item
        finally:
            self.scheduler.drop(request)
            del self._outboxes[request]

    def next_fault(self) -> Fault | None:
        """
        Return the fault for the request that is starting now; ``None``: none.

        Raises:
            Rejected: The fault is to refuse this request.
        """
        fault = self.fault
        if fault is None:
            return None
        self._hits += 1
        number = self._hits - fault.skip
        if number <= 0 or (fault.times is not None and number > fault.times):
            return None
        if fault.kind == "refuse":
            raise Rejected(503, "unavailable_error", "refused, as configured")
        return fault

    async def strike(self, fault: Fault) -> bytes:
        """
        Inject a fault in the middle of an answer, and return the bytes to send for it.

        Raises:
            BrokenOff: The connection must end here.
        """
        if fault.kind in {"cut", "die"}:
            raise BrokenOff(dies=fault.kind == "die")
        if fault.kind == "stall":
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._killed.wait(), fault.stall_s)
                raise BrokenOff(dies=False)
        if fault.kind == "malformed":
            return b'data: {"choices": [{"delta"\n\n'
        return event(FAILED) if fault.kind == "error" else b""

    async def _run(self) -> None:
        """Run the scheduler on absolute deadlines: late wake-ups do not accumulate."""
        loop = asyncio.get_running_loop()
        scheduler, clock = self.scheduler, loop.time()
        while True:
            if scheduler.idle:
                self._wake.clear()
                await self._wake.wait()
                clock = loop.time()
            duration, emissions = scheduler.step(clock)
            for request in scheduler.started:
                self._notify(request, PrefillProgress(len(request.prompt), request.cached, request.cached, 0))
            clock += duration
            await asyncio.sleep(max(0.0, clock - loop.time()))
            for request in scheduler.prompted:
                elapsed_ms = round((clock - (request.t_start or 0.0)) * 1000)
                self._notify(
                    request, PrefillProgress(len(request.prompt), request.cached, request.prefilled, elapsed_ms)
                )
            for emission in emissions:
                self._notify(emission.request, emission)

    def _notify(self, request: Request, item: PrefillProgress | Emission) -> None:
        if request in self._outboxes:
            self._outboxes[request].put_nowait(item)


#: The error of the fault ``error``.
FAILED: dict[str, Any] = {"error": {"code": 500, "type": "server_error", "message": "failed, as configured"}}
