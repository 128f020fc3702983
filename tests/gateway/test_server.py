"""A gateway on a socket."""

import asyncio
import urllib.request

import pytest

from promptai.engine.simulation import SimulationConfig
from promptai.errors import SettingsError
from promptai.gateway.app import Gateway
from promptai.gateway.auth import Guard
from promptai.gateway.server import GatewayServer, url_host
from support_serve import World


def gateway(world: World) -> Gateway:
    return Gateway(world.dispatcher, world.upstream, Guard(None, open=True))


def status(url: str) -> int:
    with urllib.request.urlopen(url, timeout=2) as response:  # noqa: S310  loopback
        return int(response.status)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])  # noqa: S104  what is tested
def test_listens_only_inside_its_block(host: str) -> None:
    async def run() -> tuple[int, str]:
        world = World({"a": SimulationConfig()})
        async with world.running(), GatewayServer(gateway(world), host) as server:
            return await asyncio.to_thread(status, f"{server.url}/healthz"), server.url

    answered, url = asyncio.run(run())

    assert answered == 200
    with pytest.raises(OSError, match="refused"):
        status(f"{url}/healthz")


@pytest.mark.parametrize(
    ("host", "port", "word"),
    [
        ("192.0.2.1", 0, "192.0.2.1 is not an address of this machine"),
        ("127.0.0.1", None, "on 127.0.0.1 is taken by another program"),
        ("a..b", 0, "cannot listen on a..b:0"),
    ],
)
def test_an_unavailable_address_is_a_one_line_error(host: str, port: int | None, word: str) -> None:
    async def run() -> None:
        world = World({"a": SimulationConfig()})
        async with (
            world.running(),
            GatewayServer(gateway(world)) as first,
            GatewayServer(gateway(world), host, first.port if port is None else port),
        ):
            pass

    with pytest.raises(SettingsError, match=word) as refusal:
        asyncio.run(run())
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("host", "shown"),
    [("", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("fe80::1", "[fe80::1]"), ("pi-1", "pi-1")],  # noqa: S104
)
def test_url_host_is_reachable_from_this_machine(host: str, shown: str) -> None:
    assert shown == url_host(host)
