"""A gateway in a thread, in front of the real engine with the bundled model."""

import contextlib
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from promptai.engine.flags import EngineFlags
from promptai.engine.http_upstream import HttpUpstream
from promptai.engine.launch import RunningEngine, free_port
from promptai.engine.locate import locate
from promptai.fleet.registry import Registry
from promptai.fleet.static import StaticServer, StaticSource
from promptai.models.bundled import bundled_model
from promptai.router.estimate.policy import Affinity
from promptai.router.estimate.rates import RateBook
from promptai.router.schedule.dispatcher import Dispatcher
from promptai.router.schedule.fleet_state import FleetState
from support_engine import until
from support_fleet import beside
from support_site import Threaded, door


class RealSite(NamedTuple):
    """URLs of the gateway and of the engine behind it."""

    gateway: str
    engine: str


@contextlib.contextmanager
def real_site(log: Path, *, context: int = 2048) -> Iterator[RealSite]:
    """Run both, with two slots that share ``context`` tokens; an unhandled error on the loop fails the test."""
    flags = EngineFlags(model=str(bundled_model()), port=free_port(), threads=1, context=context, slots=2)
    engines: list[str] = []

    async def run(thread: Threaded) -> None:
        async with RunningEngine(locate(), flags, log=log) as engine, HttpUpstream() as upstream:
            engines.append(engine.base_url)
            registry = Registry([StaticSource([StaticServer(engine.base_url)], upstream)])
            dispatcher = Dispatcher(FleetState(registry, RateBook()), Affinity())

            async def play() -> None:
                async def ready() -> bool:
                    return any(replica.usable for replica in registry.snapshot.replicas)

                await until(ready)
                async with door(dispatcher, upstream) as opened:
                    await thread.until_over(opened.url)
                assert opened.troubles == []

            await beside(registry.run(), play)

    with Threaded(run) as thread:
        yield RealSite(thread.url, engines[0])


def asked(url: str, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    """Status and JSON of a response; the text of a stream."""
    request = urllib.request.Request(  # noqa: S310  loopback
        f"{url}{path}", data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310  loopback
            data = response.read()
            kind = response.headers.get_content_type()
            return response.status, json.loads(data) if kind == "application/json" else data.decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)
