"""The pretended engine in time, without sockets: it computes, goes wrong, and takes notes.

Runs the scheduler on the event loop's clock, so that on virtual time an hour of a board passes
at once. ``engine.simulated`` puts it behind a socket, ``engine.simulated_upstream`` into the
gateway's own process; both say the same, because ``engine.simulated_api`` says it for both.
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
    What goes wrong.

    Attributes:
        kind: ``refuse`` (HTTP 503), ``stall`` (silence for ``stall_s``), ``cut`` (connection
            reset), ``malformed`` (a line that is no JSON), ``error`` (an error event),
            ``die`` (the process ends as if killed).
        after_tokens: Tokens sent before it happens; ``refuse`` needs none.
        times: Requests that it hits before the engine is well again; ``None``: all.
        skip: Requests that are spared first.
    """

    kind: Literal["refuse", "stall", "cut", "malformed", "error", "die"]
    after_tokens: int = 0
    times: int | None = None
    skip: int = 0
    stall_s: float = 30.0


class Sent(msgspec.Struct):
    """
    What really happened to one request, on the loop's clock, which is the monotonic one.

    Attributes:
        t_received: When its body had been read.
        t_chunks: When each content chunk was written to the socket.
    """

    t_received: float
    prompt_tokens: int
    cached_tokens: int
    t_chunks: list[float]


class Rejected(Exception):  # noqa: N818  becomes an HTTP answer
    """A request that is answered with an error."""

    def __init__(self, status: int, kind: str, message: str, **extra: int) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"code": status, "type": kind, "message": message, **extra}}


class BrokenOff(Exception):  # noqa: N818  becomes a broken connection
    """
    The connection ends in the middle of an answer.

    Attributes:
        dies: Whether it is meant to take the engine with it.
    """

    def __init__(self, *, dies: bool) -> None:
        super().__init__("the engine dies" if dies else "the connection ends")
        self.dies = dies


class Simulator:
    """
    One pretended engine; an async context manager that computes inside its block.

    Attributes:
        fault: What goes wrong from now on; setting it counts requests anew.
        sent: Notes of every request that was accepted.
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
        """What goes wrong."""
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
        """Start it."""
        self.start()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        """End it."""
        compute = self._compute
        self.kill()
        if compute is not None:
            await asyncio.wait([compute])

    def start(self) -> None:
        """Begin to load, with empty slots; nothing happens where it runs already."""
        if self._compute is not None:
            return
        self.scheduler = Scheduler(self.config)
        self._killed = asyncio.Event()
        self._ready_at = asyncio.get_running_loop().time() + self.config.load_s / self.config.time_scale
        self._compute = asyncio.create_task(self._run())

    def kill(self) -> None:
        """End at once: whoever listens is cut off, and what the slots remembered is lost."""
        if self._compute is not None:
            self._compute.cancel()
            self._compute = None
        self._killed.set()
        for outbox in self._outboxes.values():
            outbox.put_nowait(None)

    def demand_ready(self) -> None:
        """
        Nothing, once it has loaded.

        Raises:
            Rejected: It is still loading.
        """
        if asyncio.get_running_loop().time() < self._ready_at:
            raise Rejected(503, "unavailable_error", "Loading model")

    def accept(
        self, prompt: list[int], max_tokens: int | None, *, use_cache: bool, id_slot: int = -1
    ) -> tuple[Request, Sent]:
        """
        A request with its note.

        Raises:
            Rejected: It is loading, or the prompt leaves no room for an answer.
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
        PrefillProgress and tokens of one request as they are computed; closing it frees the slot.

        The first progress comes when it gets a slot.

        Raises:
            BrokenOff: The engine was killed.
        """
        outbox = self._outboxes[request] = asyncio.Queue()
        self.scheduler.add(request)
        self._wake.set()
        try:
            # The scheduler decides a step before its time has passed, so the end
            # is what the emission says, not what the request says by now.
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
        The fault that hits the request that is starting now, if any.

        Raises:
            Rejected: It is told to refuse this one.
        """
        fault = self.fault
        if fault is None:
            return None
        self._hits += 1
        number = self._hits - fault.skip
        if number <= 0 or (fault.times is not None and number > fault.times):
            return None
        if fault.kind == "refuse":
            raise Rejected(503, "unavailable_error", "refused, as it was told to")
        return fault

    async def strike(self, fault: Fault) -> bytes:
        """
        Let a fault happen in the middle of an answer; what is to be sent for it.

        Raises:
            BrokenOff: The connection is to end here.
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
        """Run the scheduler on absolute deadlines, so that late wake-ups do not add up."""
        loop = asyncio.get_running_loop()
        scheduler, clock = self.scheduler, loop.time()
        while True:
            if scheduler.idle:
                self._wake.clear()
                await self._wake.wait()
                clock = loop.time()
            duration, emissions = scheduler.step(clock)
            for request in scheduler.started:
                self._tell(request, PrefillProgress(len(request.prompt), request.cached, request.cached, 0))
            clock += duration
            await asyncio.sleep(max(0.0, clock - loop.time()))
            for request in scheduler.prompted:
                elapsed_ms = round((clock - (request.t_start or 0.0)) * 1000)
                self._tell(request, PrefillProgress(len(request.prompt), request.cached, request.prefilled, elapsed_ms))
            for emission in emissions:
                self._tell(emission.request, emission)

    def _tell(self, request: Request, item: PrefillProgress | Emission) -> None:
        if request in self._outboxes:
            self._outboxes[request].put_nowait(item)


#: What it says when it fails.
FAILED: dict[str, Any] = {"error": {"code": 500, "type": "server_error", "message": "failed, as it was told to"}}
