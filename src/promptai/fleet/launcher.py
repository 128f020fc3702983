"""Real engines for ``fleet.local``: one llama-server process for each model.

``engine.launch`` starts and stops an engine; this module adds what a server that runs for months
needs in addition:

- A port stays reserved until its engine is gone: a new engine has not bound its port yet, so two starts in a
  row could otherwise be given the same one.
- Large logs are rotated: each request adds about 0.75 kB, and a board boots from a small card.
- A process that is alive but computes nothing counts as dead, because an unattended board has no operator to
  end it.
- Each engine gets an API key of its own. Without one, any program or web page on this machine could reach it
  and bypass the gateway's keys, limits and browser guard.
"""

import asyncio
import contextlib
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Self

from promptai.device.process import ProcessTree
from promptai.engine.flags import EngineFlags
from promptai.engine.http_upstream import HttpUpstream
from promptai.engine.launch import RunningEngine, free_port
from promptai.engine.locate import EngineBinary
from promptai.errors import EngineDiedError, EngineError
from promptai.fleet.local import LocalModel

#: A log is rotated at this size: some 10 000 requests.
_LOG_BYTES = 8_000_000
#: Engines answer ``/slots`` between two steps, and one step computes a batch of the prompt. No board is so slow
#: that it takes a second per token.
_LIVENESS_PERIOD_S, _HANG_S, _SLOWEST_TOKEN_S = 30.0, 600.0, 1.0


class EngineLauncher:
    """
    Starts ``binary`` with the flags that ``flags_for`` returns for a model and a port.

    Args:
        logs: Directory for one log per model, and the previous log of each after a rotation.
        keys: API keys of the running engines, by URL; written here.
    """

    def __init__(
        self,
        binary: EngineBinary,
        flags_for: Callable[[LocalModel, int], EngineFlags],
        logs: Path,
        keys: dict[str, str],
    ) -> None:
        self._binary = binary
        self._keys = keys
        self._flags_for = flags_for
        self._logs = logs
        self._ports: set[int] = set()

    def start(self, model: LocalModel) -> "LaunchedEngine":
        """
        Return an engine that starts when its ``async with`` block is entered.

        Raises:
            PromptAIError: The model's flags are invalid.
            OSError: The log directory cannot be written.
        """
        port = free_port()
        while port in self._ports:
            port = free_port()
        flags = self._flags_for(model, port)
        key = secrets.token_urlsafe(32)
        engine = RunningEngine(self._binary, flags, log=self._log_of(model), api_key=key)
        return LaunchedEngine(engine, key, self._ports, self._keys)

    def _log_of(self, model: LocalModel) -> Path:
        self._logs.mkdir(parents=True, exist_ok=True)
        log = self._logs / f"{re.sub(r'[^A-Za-z0-9._-]', '_', model.name)}.log"
        if log.exists() and log.stat().st_size > _LOG_BYTES:
            log.replace(log.with_suffix(".log.old"))
        return log


class LaunchedEngine:
    """One engine and its process."""

    def __init__(self, engine: RunningEngine, key: str, ports: set[int], keys: dict[str, str]) -> None:
        self._engine = engine
        self._key = key
        self._ports = ports
        self._keys = keys
        self._tree: ProcessTree | None = None
        self._liveness: asyncio.Task[None] | None = None
        self._hang: EngineDiedError | None = None

    @property
    def base_url(self) -> str:
        """URL of its API."""
        return self._engine.base_url

    @property
    def pid(self) -> int | None:
        """Process id; ``None`` before the process exists."""
        return self._engine.pid

    def resident_bytes(self) -> int | None:
        """Resident memory of its process tree, mapped weights included; ``None`` when unknown."""
        if self._tree is None and self.pid is not None:
            self._tree = ProcessTree(self.pid)
        reading = self._tree.read() if self._tree is not None else None
        if reading is None:
            return None
        parts = (reading.memory.anon_bytes, reading.memory.file_bytes)
        return sum(part for part in parts if part is not None) if any(parts) else None

    async def death(self) -> EngineDiedError | None:
        """Return why it died or hangs, ``None`` while healthy; rotates its log, so it must be called regularly."""
        if self._ended():
            return await asyncio.to_thread(self._engine.death)
        if self._engine.log_bytes() > _LOG_BYTES:
            await asyncio.to_thread(self._engine.put_log_aside)
        return self._hang

    async def __aenter__(self) -> Self:
        """
        Start the engine and wait until it answers.

        Raises:
            EngineStartError: The engine exited, or did not answer in time.
        """
        self._ports.add(self._engine.flags.port)
        self._keys[self.base_url] = self._key
        try:
            await self._engine.__aenter__()
        except BaseException:
            self._release()
            raise
        self._liveness = asyncio.create_task(self._watch_liveness())
        return self

    async def __aexit__(self, *_exc: object) -> None:
        """End the engine; a cancellation is raised only after the engine is gone."""
        if self._liveness is not None:
            self._liveness.cancel()
        try:
            await self._engine.__aexit__()
        finally:
            self._release()

    async def _watch_liveness(self) -> None:
        """Detect an engine that is alive but no longer computes."""
        loop, flags = asyncio.get_running_loop(), self._engine.flags
        limit_s, answered_at, missed = max(_HANG_S, flags.batch * _SLOWEST_TOKEN_S), loop.time(), 0
        async with HttpUpstream({self.base_url: self._key}) as upstream:
            while self._hang is None:
                await asyncio.sleep(_LIVENESS_PERIOD_S)
                missed += 1
                with contextlib.suppress(EngineError):
                    await upstream.get(self.base_url, "/slots", limit_s=limit_s)
                    answered_at, missed = loop.time(), 0
                # One miss is not enough: this process may itself have been stopped meanwhile.
                if missed > 1 and loop.time() - answered_at >= limit_s:
                    self._hang = EngineDiedError(
                        f"the engine of {flags.alias} hangs: it has not answered for {limit_s:g} s",
                        hint="the gateway ends it",
                    )

    def _release(self) -> None:
        self._ports.discard(self._engine.flags.port)
        self._keys.pop(self.base_url, None)
        if self._tree is not None:
            self._tree.close()

    def _ended(self) -> bool:
        """Whether its process has exited; neither waits nor reaps, which ``RunningEngine`` does."""
        if self.pid is None:
            return False
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:
            return True
