"""Serve a gateway on a socket; the caller builds the gateway.

    async with GatewayServer(gateway, "127.0.0.1", 8400) as server:
        print(server.url)

Leaving the block closes the socket and cancels running requests; call ``Gateway.drain`` first to let them finish.
"""

import errno
import ipaddress
import os
from typing import Self

from aiohttp import web

from promptai.errors import SettingsError
from promptai.gateway.app import Gateway
from promptai.gateway.envelope import EnvelopeRunner

#: Longer than the pause between two requests of an interactive client, shorter than routers keep idle connections.
_KEEP_ALIVE_S = 75.0
#: Running handlers are cancelled this long after the block is left.
_SHUTDOWN_S = 0.2


class GatewayServer:
    """
    Listens while its ``async with`` block runs.

    Args:
        host: Name or address of this machine.
        port: 0: any free port.

    Attributes:
        port: The port that it listens on, inside the block.
    """

    def __init__(self, gateway: Gateway, host: str = "127.0.0.1", port: int = 0) -> None:
        self.port = port
        self._gateway = gateway
        self._host = host
        self._runner: EnvelopeRunner | None = None

    @property
    def url(self) -> str:
        """URL of the gateway, as seen from this machine."""
        return f"http://{url_host(self._host)}:{self.port}"

    async def __aenter__(self) -> Self:
        """
        Start listening.

        Raises:
            SettingsError: The address or port is not available.
        """
        runner = EnvelopeRunner(
            self._gateway.application(),
            handler_cancellation=True,  # a client that disconnects frees its slot
            access_log=None,
            shutdown_timeout=_SHUTDOWN_S,
            keepalive_timeout=_KEEP_ALIVE_S,
        )
        await runner.setup()
        try:
            await web.TCPSite(runner, self._host, self.port, reuse_address=True).start()
        except (OSError, UnicodeError, OverflowError) as error:
            await runner.cleanup()
            raise _listen_error(self._host, self.port, error) from None
        self._runner = runner
        self.port = runner.addresses[0][1]
        return self

    async def __aexit__(self, *_exc: object) -> None:
        """Stop listening, and close all connections."""
        if self._runner is not None:
            await self._runner.cleanup()


def url_host(host: str) -> str:
    """Return the host as it is written in a URL; loopback for an address that means all interfaces."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host or "127.0.0.1"
    if address.is_unspecified:
        return "127.0.0.1" if address.version == 4 else "[::1]"
    return f"[{address}]" if address.version == 6 else str(address)


def _listen_error(host: str, port: int, error: Exception) -> SettingsError:
    where = f"{host}:{port}"
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EADDRINUSE:
        return SettingsError(f"port {port} on {host} is taken by another program", hint="choose another with --port")
    if number == errno.EACCES:
        return SettingsError(f"not permitted to listen on port {port}", hint="use a port above 1023")
    if number == errno.EADDRNOTAVAIL:
        return SettingsError(
            f"{host} is not an address of this machine", hint="use 127.0.0.1, or 0.0.0.0 for all addresses"
        )
    # asyncio's own message is long; errors of name resolution have their own, negative numbers.
    why = os.strerror(number) if number is not None and number > 0 else str(error)
    return SettingsError(f"cannot listen on {where}: {why}", hint="choose an address of this machine with --host")
