"""A simulated llama-server on a real socket, with configured speed and faults.

It is the ground truth for the harness (``promptai doctor --selftest``), stands for four boards on a laptop, and shows
every failure that a real engine has only on bad days: it refuses, stalls, is cut off, sends broken lines, dies. It
implements the part of the HTTP API that PromptAI uses, and records when it *really* sent each chunk, so a client is
compared with what happened and not only with what was intended.

``GET /simulated/sent`` gives these notes, ``POST /simulated/fault`` arms or clears a fault.
Scheduling is in ``engine.simulation``, time in ``engine.simulator``, the API in ``engine.simulated_api``; this module
adds sockets.
"""

import contextlib
import os
from typing import Self

from aiohttp import web

from promptai.engine.simulated_api import SimulatedApi, Stream
from promptai.engine.simulation import SimulationConfig
from promptai.engine.simulator import BrokenOff, Fault, Sent, Simulator
from promptai.engine.upstream import Reply

__all__ = ["Fault", "Sent", "SimulatedEngine"]

_MAX_BODY_BYTES = 16 * 1024 * 1024


class SimulatedEngine:
    """
    One simulated engine; an async context manager that listens inside its block.

    Args:
        config: Its speed and size.
        port: TCP port on loopback; 0 takes a free one, see ``base_url``.
    """

    def __init__(self, config: SimulationConfig, *, port: int = 0, fault: Fault | None = None) -> None:
        self.config = config
        self.simulator = Simulator(config, fault=fault)
        self._api = SimulatedApi(self.simulator)
        self._port = port
        self._stack = contextlib.AsyncExitStack()

    @property
    def base_url(self) -> str:
        """The URL on which it listens."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def sent(self) -> list[Sent]:
        """A record of every accepted request."""
        return self.simulator.sent

    async def __aenter__(self) -> Self:
        """Start to listen; raises ``OSError`` when the port is taken."""
        app = web.Application(client_max_size=_MAX_BODY_BYTES)
        app.router.add_route("*", "/{path:.*}", self._answer)
        # Cancellation stops the handler when its client has disconnected, which frees the slot.
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", self._port).start()
        self._port = runner.addresses[0][1]
        await self._stack.enter_async_context(self.simulator)
        return self

    async def __aexit__(self, *_exc: object) -> None:
        """Stop listening."""
        await self._stack.aclose()

    async def _answer(self, http: web.Request) -> web.StreamResponse:
        try:
            answer = await self._api.answer(http.method, http.path, await http.read())
            if isinstance(answer, Reply):
                return web.Response(status=answer.status, body=answer.body, content_type=answer.content_type)
            return await _relay(http, answer)
        except BrokenOff as broken:
            if broken.dies:
                os._exit(9)
            if http.transport is not None:
                http.transport.abort()
            raise ConnectionResetError from None


async def _relay(http: web.Request, stream: Stream) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    async with contextlib.aclosing(stream):
        async for data in stream:
            if not response.prepared:
                await response.prepare(http)
            if data:
                await response.write(data)
    return response
