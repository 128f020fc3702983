"""A gateway on a real socket; what is behind it was put together by whoever calls.

    async with GatewayServer(gateway, "127.0.0.1", 8400) as server:
        print(server.url)

Leaving the block closes the door and breaks off whatever is still under way: drain first
(``Gateway.drain``) where answers are to be finished.
"""

import errno
import ipaddress
import os
from typing import Self

from aiohttp import web

from promptai.errors import SettingsError
from promptai.gateway.app import Gateway
from promptai.gateway.envelope import EnvelopeRunner

#: Longer than the pause between two questions of one person's program, shorter than what routers forget.
_KEEP_ALIVE_S = 75.0
#: Handlers that are still at work when the block is left are cancelled after this.
_SHUTDOWN_S = 0.2


class GatewayServer:
    """
    Listens inside its block.

    Args:
        host: Name or address of this machine.
        port: 0 takes a free one.

    Attributes:
        port: Where it listens, inside the block.
    """

    def __init__(self, gateway: Gateway, host: str = "127.0.0.1", port: int = 0) -> None:
        self.port = port
        self._gateway = gateway
        self._host = host
        self._runner: EnvelopeRunner | None = None

    @property
    def url(self) -> str:
        """Where it is reached from this machine."""
        return f"http://{url_host(self._host)}:{self.port}"

    async def __aenter__(self) -> Self:
        """
        Listen.

        Raises:
            SettingsError: It cannot be had there.
        """
        runner = EnvelopeRunner(
            self._gateway.application(),
            handler_cancellation=True,  # whoever hangs up frees a slot
            access_log=None,
            shutdown_timeout=_SHUTDOWN_S,
            keepalive_timeout=_KEEP_ALIVE_S,
        )
        await runner.setup()
        try:
            await web.TCPSite(runner, self._host, self.port, reuse_address=True).start()
        except (OSError, UnicodeError, OverflowError) as error:
            await runner.cleanup()
            raise _refusal(self._host, self.port, error) from None
        self._runner = runner
        self.port = runner.addresses[0][1]
        return self

    async def __aexit__(self, *_exc: object) -> None:
        """Close the door, and whatever is still open."""
        if self._runner is not None:
            await self._runner.cleanup()


def url_host(host: str) -> str:
    """The host as a URL has it; one that stands for all addresses becomes loopback."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host or "127.0.0.1"
    if address.is_unspecified:
        return "127.0.0.1" if address.version == 4 else "[::1]"
    return f"[{address}]" if address.version == 6 else str(address)


def _refusal(host: str, port: int, error: Exception) -> SettingsError:
    where = f"{host}:{port}"
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EADDRINUSE:
        return SettingsError(f"port {port} on {host} is taken by another program", hint="choose another with --port")
    if number == errno.EACCES:
        return SettingsError(f"port {port} on {host} is not ours to take", hint="choose one above 1023 with --port")
    if number == errno.EADDRNOTAVAIL:
        return SettingsError(f"{host} is no address of this machine", hint="127.0.0.1, or 0.0.0.0 for all of them")
    # asyncio words it at length; name resolution has numbers of its own.
    why = os.strerror(number) if number is not None and number > 0 else str(error)
    return SettingsError(f"cannot listen on {where}: {why}", hint="give an address of this machine with --host")
