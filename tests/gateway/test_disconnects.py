"""A disconnected client frees everything within a second, at every stage; a client that does not read blocks no other.

A board computes one conversation at a time: every minute spent on a client that has gone delays all others. Clients,
gateway and engines use real sockets here, because only they show whether a disconnect is noticed.
"""

import asyncio
import contextlib
import socket
from collections.abc import AsyncGenerator, Callable

import pytest

from promptai.engine.simulation import SimulationConfig
from promptai.fleet.replica import State
from promptai.router.schedule.lease import SlotLease
from support_site import SLOW
from support_sockets import COLD, Site, request_of, site, soon

pytestmark = pytest.mark.timeout(30)

NOTHING = {"engine": 0, "leases": 0, "queue": 0, "gateway": 0, "meter": 0}
#: Three seconds of prefill at 100 tokens/s.
LONG = [{"role": "user", "content": "cell 12 " * 150}]
STAGES = ("queued", "loading", "prefill", "decode")
#: Prefill in steps of 80 ms, then 10 tokens/s until the client disconnects.
ONE_SLOT = SimulationConfig(prefill_tps=100.0, decode_tps=10.0, batch=8, model="yi")
#: As fast as the event loop allows.
UNLIMITED = SimulationConfig(prefill_tps=1e6, decode_tps=1e6, slots=2, context=10**9, model="yi")


class Client:
    """A raw client that can end its connection in ways that HTTP libraries cannot."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def hang_up(self) -> None:
        """Close the connection."""
        self.writer.close()

    def half_close(self) -> None:
        """Close the sending side only; the response could still be read."""
        self.writer.write_eof()

    def abort(self) -> None:
        """Reset the connection, as a killed program does."""
        self.writer.transport.abort()


@contextlib.asynccontextmanager
async def client(found: Site, **fields: object) -> AsyncGenerator[Client, None]:
    """Yield a client that has sent a request."""
    reader, writer = await asyncio.open_connection("127.0.0.1", found.door.port)
    try:
        writer.write(request_of(**fields))
        yield Client(reader, writer)
    finally:
        writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


def reached(found: Site, stage: str) -> bool:
    """Whether the last request has reached a stage."""
    if stage in {"queued", "loading"}:
        model, state = ("yi", State.READY) if stage == "queued" else (COLD, State.LOADING)
        replica = "a" if stage == "queued" else f"local/{COLD}"
        return len(found.dispatcher.queued(model)) == 1 and found.state(replica) is state
    leases = found.dispatcher.fleet_state.leases("a")
    if stage == "decode":
        return bool(leases) and leases[0].generated >= 2
    requests = [slot.request for slot in found.engines["a"].simulator.scheduler.slots if slot.request]
    return bool(requests) and requests[0].prefilled > 0 and leases[0].first_token_at is None


async def disconnect_at(stage: str, leave: Callable[[Client], None], *, streamed: bool) -> None:
    fields: dict[str, object] = {"max_tokens": 1000, "stream": streamed}
    if stage == "loading":
        fields["model"] = COLD
    if stage == "prefill":
        fields["messages"] = LONG
    async with site(ONE_SLOT) as found, contextlib.AsyncExitStack() as stack:
        if stage == "queued":
            holder = await stack.enter_async_context(client(found, max_tokens=1000, stream=True))
            await soon(lambda: found.busy() == 1)
        leaving = await stack.enter_async_context(client(found, **fields))
        await soon(lambda: reached(found, stage))

        leave(leaving)

        rest = {"engine": 1, "leases": 1, "gateway": 1, "meter": 1} if stage == "queued" else {}
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
def test_a_disconnect_frees_everything_within_a_second(stage: str, kind: str, leave: Callable[[Client], None]) -> None:
    asyncio.run(disconnect_at(stage, leave, streamed=kind == "streamed"))


def test_a_disconnect_while_sending_the_request_leaves_nothing() -> None:
    async def play() -> None:
        async with site(SLOW) as found:
            _, writer = await asyncio.open_connection("127.0.0.1", found.door.port)
            writer.write(request_of()[:-10])
            await soon(lambda: found.guard.meter.running("local") == 1)
            writer.close()
            await soon(lambda: found.counts() == NOTHING, within_s=1.0)

    asyncio.run(play())


def test_many_disconnects_at_once_leave_nothing() -> None:
    async def play() -> None:
        async with site(ONE_SLOT) as found, contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(client(found, max_tokens=1000)) for _ in range(50)]
            clients += [await stack.enter_async_context(client(found, stream=True)) for _ in range(10)]
            await soon(lambda: len(found.dispatcher.queued("yi")) == len(clients) - 1)
            for one in clients:
                one.abort()
            await soon(lambda: found.counts() == NOTHING, within_s=1.0)
            assert (await found.door.chat(max_tokens=1)).status == 200

    asyncio.run(play())


def test_cancels_an_embedding_after_a_disconnect() -> None:
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


def test_a_client_that_does_not_read_stops_only_its_own_stream() -> None:
    """The kernel's buffers fill up; beyond them the gateway must not buffer."""

    async def play() -> None:
        async with site(UNLIMITED) as found:
            not_reading = socket.socket()
            not_reading.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            not_reading.connect(("127.0.0.1", found.door.port))
            not_reading.sendall(request_of(max_tokens=10**8, stream=True))

            (lease,) = await _wait_for_lease(found)
            generated = await _wait_until_constant(lambda: lease.generated)
            answer = await found.door.chat(max_tokens=1)
            assert answer.status == 200
            assert generated == lease.generated, "the gateway continued to read from the engine"

            not_reading.close()
            await soon(lambda: found.counts() == NOTHING, within_s=1.0)

    asyncio.run(play())


def test_a_client_that_does_not_read_for_too_long_loses_its_slot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its connection stays open and is never closed by the client."""
    monkeypatch.setattr("promptai.gateway.streaming._UNREAD_S", 0.3)

    async def play() -> None:
        async with site(UNLIMITED) as found:
            with socket.socket() as not_reading:
                not_reading.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
                not_reading.connect(("127.0.0.1", found.door.port))
                not_reading.sendall(request_of(max_tokens=10**8, stream=True))
                await _wait_for_lease(found)
                await soon(lambda: found.counts() == NOTHING, within_s=5.0)

    asyncio.run(play())


async def _wait_for_lease(found: Site) -> tuple[SlotLease, ...]:
    await soon(lambda: bool(found.dispatcher.fleet_state.leases("a")))
    return found.dispatcher.fleet_state.leases("a")


async def _wait_until_constant(number: Callable[[], int]) -> int:
    """Wait until a growing number stays constant, and return it."""
    await soon(lambda: number() > 0)
    before = -1
    while number() > before:
        before = number()
        await asyncio.sleep(0.15)
    return before
