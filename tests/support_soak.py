"""Thousands of requests of every kind through one gateway, and the resources that remain afterwards.

``tests/gateway/test_stays_flat.py`` sends a thousand, ``benchmarks/gateway_cost.py --soak`` ten thousand. Clients,
gateway and engines share one process, so a leak of any of them shows.
"""

import asyncio
import contextlib
import gc
import os
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from promptai.engine.simulated import SimulatedEngine
from promptai.engine.simulation import SimulationConfig
from support_gateway import Answer
from support_site import CHAT, EMBED, TEXT
from support_sockets import Site, request_of, soon

#: Fast, yet 1.5 ms a token: a client can disconnect in the middle of an answer.
QUICK = SimulationConfig(prefill_tps=1e6, decode_tps=700.0, slots=4, model="yi")
SOAKED = (QUICK, QUICK)
_AT_ONCE = 16
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Left(NamedTuple):
    """
    Resources in use while no request is open.

    Attributes:
        files: Open file descriptors; ``tasks``: tasks of the event loop; ``timers``: scheduled timers.
        entries: Size of every container below the gateway, by its path.
        rss: Resident memory of this process in bytes.
    """

    files: int
    tasks: int
    timers: int
    entries: dict[str, int]
    rss: int


async def look(found: Site) -> Left:
    """Count the resources in use once all requests have ended."""
    await soon(lambda: set(found.counts().values()) == {0})
    for engine in found.engines.values():
        engine.sent.clear()  # a record for tests; it grows with every request
    before = -1
    while before != len(asyncio.all_tasks()):  # connections are closed a moment after their last byte
        before = len(asyncio.all_tasks())
        await asyncio.sleep(0.05)
    gc.collect()
    loop = asyncio.get_running_loop()
    return Left(
        files=len(list(Path("/proc/self/fd").iterdir())),
        tasks=len(asyncio.all_tasks()),
        timers=sum(not handle.cancelled() for handle in loop._scheduled),  # type: ignore[attr-defined]
        entries=dict(_containers(found.door.gateway)),
        rss=int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE,
    )


async def soak(found: Site, requests: int, *, first: int = 0) -> dict[str, int]:
    """Send ``requests`` requests, 16 at a time; return the number of each kind."""
    kinds = list(_KINDS)
    sent = dict.fromkeys(kinds, 0)
    numbers = iter(range(first, first + requests))

    async def one_after_another() -> None:
        for number in numbers:
            kind = kinds[number % len(kinds)]
            await _KINDS[kind](found, number)
            sent[kind] += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(_AT_ONCE):
            group.create_task(one_after_another())
    return sent


def _containers(root: object) -> Mapping[str, int]:
    """Sizes of all dicts, lists, sets and deques that are reachable from ``root`` through our objects."""
    sizes: dict[str, int] = {}
    seen: set[int] = set()
    todo: deque[tuple[str, object]] = deque([("gateway", root)])
    while todo:
        where, thing = todo.popleft()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, dict | list | set | deque):
            sizes[where] = sizes.get(where, 0) + len(thing)
            todo += [(f"{where}[]", one) for one in (thing.values() if isinstance(thing, dict) else thing)]
        elif type(thing).__module__.startswith(("promptai", "prometheus_client")) and not isinstance(thing, type):
            names = [*getattr(thing, "__dict__", ()), *getattr(thing, "__struct_fields__", ())]
            todo += [(f"{where}.{name}", getattr(thing, name)) for name in names]
    return sizes


def _words(number: int) -> list[dict[str, str]]:
    """A conversation that no other request has."""
    return [{"role": "user", "content": f"{number} " + "is cell 12 up? " * (number % 20)}]


def _is(answer: Answer, *statuses: int) -> None:
    assert answer.status in statuses, (answer.status, answer.headers, answer.body[:500])


async def _streamed(found: Site, number: int) -> None:
    heard = await found.door.stream(messages=_words(number), max_tokens=8)
    assert heard.whole


async def _whole(found: Site, number: int) -> None:
    _is(await found.door.chat(messages=_words(number)), 200)


async def _text(found: Site, number: int) -> None:
    _is(await found.door.chat(TEXT, prompt=f"cell {number}"), 200)


async def _embedding(found: Site, number: int) -> None:
    _is(await found.door.chat(EMBED, input=f"cell {number}"), 200)


async def _unknown_model(found: Site, number: int) -> None:
    _is(await found.door.chat(model=f"none-{number}"), 404)


async def _nonsense(found: Site, number: int) -> None:
    _is(await found.door.ask(CHAT, "POST", data=b"{" * (number % 50 + 1)), 400)


async def _too_long(found: Site, number: int) -> None:
    words = [{"role": "user", "content": f"{number} " + "cell " * 60_000}] if number % 8 == 0 else []
    _is(await found.door.chat(messages=words), 400)


async def _left_before_an_answer(found: Site, number: int) -> None:
    await _leave(found, number, read=False, stream=number % 2 == 0)


async def _left_in_the_middle(found: Site, number: int) -> None:
    await _leave(found, number, read=True, stream=True)


async def _leave(found: Site, number: int, *, read: bool, stream: bool) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", found.door.port)
    writer.write(request_of(messages=_words(number), max_tokens=500, stream=stream))
    if read:
        await reader.readuntil(b"data: ")
    else:
        await asyncio.sleep(0.002 * (number % 5))
    writer.transport.abort()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def _looked_at(found: Site, number: int) -> None:
    path = ("/metrics", "/api/fleet", "/api/queue", "/v1/models", "/readyz", f"/nowhere/{number}")[number % 6]
    _is(await found.door.ask(path), 200, 404)


async def _failed(found: Site, number: int) -> None:
    """
    Send a request while an engine refuses one request, this or another; another engine answers.

    One request in 33 meets a fault: if it were one in 11, one in 15,000 would meet four by chance, and fail.
    """
    if number % 3 == 0:
        engine: SimulatedEngine = found.engines["ab"[number % 2]]
        async with found.door.client.post(f"{engine.base_url}/simulated/fault", data=_REFUSES) as response:
            assert response.status == 200
    _is(await found.door.chat(messages=_words(number)), 200)


_REFUSES = b'{"kind": "refuse", "times": 1}'
_KINDS: dict[str, Callable[[Site, int], Awaitable[Any]]] = {
    "streamed": _streamed,
    "whole": _whole,
    "text": _text,
    "left in the middle": _left_in_the_middle,
    "embedding": _embedding,
    "unknown model": _unknown_model,
    "left before an answer": _left_before_an_answer,
    "nonsense": _nonsense,
    "too long": _too_long,
    "looked at": _looked_at,
    "failed": _failed,
}


def grown(before: Left, after: Left, *, at_least: int) -> dict[str, tuple[int, int]]:
    """
    Containers that grew, with their sizes before and after.

    Args:
        at_least: Least growth of a leak, which happens with every request of a kind; containers with a bound grow
            by less.
    """
    return {
        where: (before.entries.get(where, 0), size)
        for where, size in after.entries.items()
        if size >= before.entries.get(where, 0) + at_least and where != _BOUNDED
    }


#: Conversations that may continue: those answered in the last minutes, 2,048 at most (``router.estimate.prefix``).
_BOUNDED = "gateway._dispatcher.fleet_state.index.reuse._answered_at"
