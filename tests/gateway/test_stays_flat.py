"""A gateway runs for months: a thousand requests must leak nothing."""

import asyncio

import pytest

from support_soak import SOAKED, Left, grown, look, soak
from support_sockets import site

pytestmark = pytest.mark.timeout(60)

WARM_UP, REQUESTS = 300, 1000
#: Growth of a process with clients, gateway and engines, after a warm-up.
MEMORY_BYTES = 4_000_000


def test_a_thousand_requests_leak_nothing() -> None:
    async def play() -> tuple[Left, Left, dict[str, int]]:
        async with site(*SOAKED) as found:
            await soak(found, WARM_UP)
            before = await look(found)
            sent = await soak(found, REQUESTS, first=WARM_UP)
            return before, await look(found), sent

    before, after, sent = asyncio.run(play())

    assert sum(sent.values()) == REQUESTS
    assert min(sent.values()) >= REQUESTS // len(sent)
    assert after.files <= before.files
    assert after.tasks <= before.tasks
    assert after.timers <= before.timers + 2
    assert grown(before, after, at_least=REQUESTS // 100) == {}
    assert after.rss - before.rss < MEMORY_BYTES
