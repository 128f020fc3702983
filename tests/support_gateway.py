"""Applications with the gateway's middlewares on loopback, and clients for them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, NamedTuple

import aiohttp
import msgspec
from aiohttp import web

from promptai.gateway.auth import Guard
from promptai.gateway.envelope import EnvelopeRunner, Handler, envelope, stamp

Use = Callable[["Site"], Awaitable[Any]]


class Answer(NamedTuple):
    """A response."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        """The ``error`` object of the body."""
        found: dict[str, Any] = msgspec.json.decode(self.body)["error"]
        return found

    @property
    def line(self) -> tuple[int, str, str]:
        """Status, type and message."""
        return self.status, self.error["type"], self.error["message"]


class Site(NamedTuple):
    """A listening application and a client for it."""

    port: int
    client: aiohttp.ClientSession

    async def ask(self, path: str, method: str = "GET", **fields: Any) -> Answer:
        """Send one well-formed request."""
        async with self.client.request(method, f"http://127.0.0.1:{self.port}{path}", **fields) as response:
            headers = {name.lower(): value for name, value in response.headers.items()}
            return Answer(response.status, headers, await response.read())

    async def raw(self, data: bytes) -> Answer:
        """Send one request as bytes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(data)
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            first, *lines = head.decode().strip().split("\r\n")
            headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
            body = await reader.readexactly(int(headers["content-length"]))
        finally:
            writer.close()
        return Answer(int(first.split()[1]), headers, body)


@contextlib.asynccontextmanager
async def listening(routes: list[web.RouteDef], guard: Guard | None = None) -> AsyncIterator[Site]:
    """An application with the gateway's middlewares."""
    guarded = [] if guard is None else [guard.middleware]
    app = web.Application(middlewares=[envelope, *guarded])
    app.add_routes(routes)
    app.on_response_prepare.append(stamp)
    if guard is not None:
        app.on_response_prepare.append(guard.allow_origin)
    runner = EnvelopeRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as client:
            yield Site(runner.addresses[0][1], client)
    finally:
        await runner.cleanup()


def visit(routes: list[web.RouteDef], use: Use, guard: Callable[[], Guard] | None = None) -> Any:
    """Run ``use`` against an application."""

    async def play() -> Any:
        async with asyncio.timeout(10), listening(routes, None if guard is None else guard()) as site:
            return await use(site)

    return asyncio.run(play())


def asked(handler: Handler, method: str = "GET", **fields: Any) -> Answer:
    """The response of an application with one handler."""

    async def use(site: Site) -> Answer:
        return await site.ask("/it", method, **fields)

    answer: Answer = visit([web.route("*", "/it", handler)], use)
    return answer
