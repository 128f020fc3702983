"""Whoever hangs up frees everything within a second, wherever its request is; and who does not read holds up nobody.

A board computes for one conversation at a time: a minute for somebody who has gone is a minute that
everybody else waits. Clients, gateway and engines are on real sockets here, because that is where
leaving is noticed, or not.
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator, Callable

import pytest

from promptai.engine.simulation import SimulationConfig
from promptai.fleet.replica import State
from promptai.router.schedule.lease import SlotLease
from support_real_door import COLD, Site, request_of, site, soon
from support_site import SLOW

pytestmark = pytest.mark.timeout(30)

NOTHING = {"engine": 0, "grants": 0, "queue": 0, "gateway": 0, "meter": 0}
#: Three seconds of reading at 100 tokens a second.
LONG = [{"role": "user", "content": "cell 12 " * 150}]
STAGES = ("queued", "loading", "prefill", "decode")
#: Reads in steps of 80 ms, then says ten words a second for as long as anybody listens.
ONE_SLOT = SimulationConfig(prefill_tps=100.0, decode_tps=10.0, batch=8, model="yi")
#: As fast as the loop turns.
TALKATIVE = SimulationConfig(prefill_tps=1e6, decode_tps=1e6, slots=2, context=10**9, model="yi")


class Client:
    """A client that can do what no library does."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def hang_up(self) -> None:
        """Close the connection."""
        self.writer.close()

    def half_close(self) -> None:
        """Say that nothing more will be sent; whatever comes could still be read."""
        self.writer.write_eof()

    def abort(self) -> None:
        """As a program that is killed."""
        self.writer.transport.abort()


@contextlib.asynccontextmanager
async def client(found: Site, **fields: object) -> AsyncGenerator[Client, None]:
    """Somebody who has asked."""
    reader, writer = await asyncio.open_connection("127.0.0.1", found.door.port)
    try:
        writer.write(request_of(**fields))
        yield Client(reader, writer)
    finally:
        writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def reached(found: Site, stage: str) -> bool:
    """Whether the last request is where a test wants it."""
    if stage in {"queued", "loading"}:
        model, state = ("yi", State.READY) if stage == "queued" else (COLD, State.LOADING)
        replica = "a" if stage == "queued" else f"local/{COLD}"
        return len(found.dispatcher.queued(model)) == 1 and found.state(replica) is state
    leases = found.dispatcher.fleet_state.leases("a")
    if stage == "decode":
        return bool(leases) and leases[0].generated >= 2
    requests = [slot.request for slot in found.engines["a"].simulator.scheduler.slots if slot.request]
    return bool(requests) and requests[0].prefilled > 0 and leases[0].first_token_at is None


async def leave_at(stage: str, leave: Callable[[Client], None], *, streamed: bool) -> None:
    asked: dict[str, object] = {"max_tokens": 1000, "stream": streamed}
    if stage == "loading":
        asked["model"] = COLD
    if stage == "prefill":
        asked["messages"] = LONG
    async with site(ONE_SLOT) as found, contextlib.AsyncExitStack() as stack:
        if stage == "queued":
            holder = await stack.enter_async_context(client(found, max_tokens=1000, stream=True))
            await soon(lambda: found.busy() == 1)
        leaver = await stack.enter_async_context(client(found, **asked))
        await soon(lambda: reached(found, stage))

        leave(leaver)

        rest = {"engine": 1, "grants": 1, "gateway": 1, "meter": 1} if stage == "queued" else {}
        model = COLD if stage == "loading" else "yi"
        await soon(lambda: found.counts(model) == NOTHING | rest, within_s=1.0)
        if stage == "queued":
            holder.hang_up()
        answer = await found.door.chat(max_tokens=1)
        assert answer.status == 200
        await soon(lambda: found.counts() == NOTHING, within_s=1.0)


@pytest.mark.parametrize("leave", [Client.hang_up, Client.half_close, Client.abort])
@pytest.mark.parametrize("kind", ["streamed", "whole"])
@pytest.mark.parametrize("stage", STAGES)
def test_who_leaves_frees_everything_within_a_second(stage: str, kind: str, leave: Callable[[Client], None]) -> None:
    asyncio.run(leave_at(stage, leave, streamed=kind == "streamed"))


def test_who_leaves_in_the_middle_of_its_own_request_leaves_nothing() -> None:
    async def play() -> None:
        async with site(SLOW) as found:
            _, writer = await asyncio.open_connection("127.0.0.1", found.door.port)
            writer.write(request_of()[:-10])
            await soon(lambda: found.guard.meter.running("local") == 1)
            writer.close()
            await soon(lambda: found.counts() == NOTHING, within_s=1.0)

    asyncio.run(play())


def test_a_hundred_that_leave_at_once_leave_nothing() -> None:
    async def play() -> None:
        async with site(ONE_SLOT) as found, contextlib.AsyncExitStack() as stack:
            crowd = [await stack.enter_async_context(client(found, max_tokens=1000)) for _ in range(50)]
            crowd += [await stack.enter_async_context(client(found, stream=True)) for _ in range(10)]
            await soon(lambda: len(found.dispatcher.queued("yi")) == len(crowd) - 1)
            for one in crowd:
                one.abort()
            await soon(lambda: found.counts() == NOTHING, within_s=1.0)
            assert (await found.door.chat(max_tokens=1)).status == 200

    asyncio.run(play())


def test_an_embedding_that_nobody_waits_for_is_given_up() -> None:
    async def play() -> None:
        async with site(ONE_SLOT) as found:
            stalled = asyncio.Event()

            async def never(*_: object, **__: object) -> None:
                stalled.set()
                await asyncio.sleep(3600)

            found.door.gateway.admission.upstream.post = never  # type: ignore[method-assign,assignment]
            async with asyncio.timeout(10):
                task = asyncio.create_task(found.door.chat("/v1/embeddings"))
                await stalled.wait()
                task.cancel()
            await soon(lambda: found.counts() == NOTHING, within_s=1.0)

    asyncio.run(play())


def test_who_does_not_read_makes_the_gateway_stop_reading_and_holds_up_nobody() -> None:
    """What the kernel's buffers take is gone; beyond that nothing may pile up."""

    async def play() -> None:
        async with site(TALKATIVE) as found:
            deaf = socket.socket()
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.connect(("127.0.0.1", found.door.port))
            deaf.sendall(request_of(max_tokens=10**8, stream=True))

            (lease,) = await _grant(found)
            passed = await _standstill(lambda: lease.generated)
            answer = await found.door.chat(max_tokens=1)
            assert answer.status == 200
            assert passed == lease.generated, "it went on reading"

            deaf.close()
            await soon(lambda: found.counts() == NOTHING, within_s=1.0)

    asyncio.run(play())


def test_who_does_not_read_for_too_long_gives_the_slot_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection lives, and it will never hang up."""
    monkeypatch.setattr("promptai.gateway.streaming._UNREAD_S", 0.3)

    async def play() -> None:
        async with site(TALKATIVE) as found:
            with socket.socket() as deaf:
                deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                deaf.connect(("127.0.0.1", found.door.port))
                deaf.sendall(request_of(max_tokens=10**8, stream=True))
                await _grant(found)
                await soon(lambda: found.counts() == NOTHING, within_s=5.0)

    asyncio.run(play())


async def _grant(found: Site) -> tuple[SlotLease, ...]:
    await soon(lambda: bool(found.dispatcher.fleet_state.leases("a")))
    return found.dispatcher.fleet_state.leases("a")


async def _standstill(number: Callable[[], int]) -> int:
    """Wait until a number that grew does not grow any more."""
    await soon(lambda: number() > 0)
    before = -1
    while number() > before:
        before = number()
        await asyncio.sleep(0.15)
    return before
