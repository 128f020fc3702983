"""Open a target: start an engine with a model file, or connect to a server that is already running.

Both give an ``OpenTarget``, on which the runner plays turns without knowing which it is. Checks
that need no engine, such as whether a model fits the memory, are in ``bench.target_facts``.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from promptai.bench.client import TurnClient
from promptai.bench.manifest import TargetFacts
from promptai.bench.plan import Protocol
from promptai.engine.client import EngineClient
from promptai.engine.launch import RunningEngine, free_port
from promptai.engine.locate import EngineBinary
from promptai.errors import EngineDiedError, EngineRefusedError, SettingsError


class OpenTarget(msgspec.Struct, frozen=True):
    """
    A target that is ready for requests.

    Attributes:
        client: Sends requests to it.
        model: Model name in requests.
        llama_server: Whether it is a llama-server.
        pid: Process of an engine started here; ``None`` for a server.
        load_s: Seconds until that engine was ready; ``None`` for a server.
        death: Returns why that engine has ended; ``None`` while it runs, and for a server.
    """

    client: EngineClient
    model: str
    llama_server: bool
    pid: int | None
    load_s: float | None
    death: Callable[[], EngineDiedError | None]

    def turn_client(self, protocol: Protocol, *, origin: float, nonce: str) -> TurnClient:
        """Return a client that plays turns of ``protocol`` on this target; see ``TurnClient`` for the arguments."""
        return TurnClient(
            self.client, protocol, model=self.model, llama_server=self.llama_server, origin=origin, nonce=nonce
        )


@asynccontextmanager
async def open_target(
    facts: TargetFacts, *, log: Path, api_key: str | None, silence_s: float
) -> AsyncIterator[OpenTarget]:
    """
    Start an engine or connect to a server; the target is ready within the block.

    Args:
        log: File for the log of an engine started here.
        api_key: For servers that require one.
        silence_s: Longest wait for the next bytes of an answer.

    Raises:
        EngineError: The engine cannot be started, or the server cannot be reached.
        SettingsError: The server has no model loaded.
    """
    if facts.engine is None or facts.model is None:
        async with EngineClient(facts.url or "", api_key=api_key, silence_s=silence_s) as client:
            yield await _reach(client)
        return
    flags = facts.engine.flags
    if flags.port == 0:
        flags = msgspec.structs.replace(flags, port=free_port())
    binary = EngineBinary(facts.engine.source, facts.engine.command, facts.engine.build, facts.engine.features)
    engine = RunningEngine(binary, flags, log=log)
    async with engine, EngineClient(engine.base_url, silence_s=silence_s) as client:
        yield OpenTarget(client, flags.alias, True, engine.pid, engine.load_s, engine.death)


async def _reach(client: EngineClient) -> OpenTarget:
    try:
        props = await client.props()
    except EngineRefusedError as refused:
        if refused.status in (401, 503):
            raise  # a missing key or a model that is still loading does not reveal the dialect
        models = await client.models()
        if not models:
            raise SettingsError(f"{client.base_url} serves no model", hint="load a model there first") from None
        return OpenTarget(client, models[0], False, None, None, lambda: None)
    return OpenTarget(client, props.model_alias or "model", True, None, None, lambda: None)
