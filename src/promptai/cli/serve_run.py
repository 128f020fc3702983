"""The life cycle of one gateway: assemble, listen, serve, reload settings, drain, end.

    plan ──▶ listen ──▶ engines start ──▶ serve ──(file changes, SIGHUP)──▶ new plan
                                            │
                          SIGTERM, SIGINT ──▶ drain ──▶ (second one, or nothing left) ──▶ engines end

A new plan may change models, boards, aliases, fallbacks and limits while streams continue. The address, access control
and the way engines are started are fixed at the start.
"""

import asyncio
import contextlib
import gc
import logging
import signal
from collections import ChainMap
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from promptai.cli.serve_fleet import (
    PI5,
    Boards,
    MemoryBudget,
    admission_rules,
    parse_boards,
    queue_limits,
    simulated_source,
    static_sources,
)
from promptai.cli.serve_models import EngineSetup, describe_model, find_engine_setup, flags_for, select_models
from promptai.cli.serve_show import LoadingProgress
from promptai.engine.http_upstream import HttpUpstream
from promptai.engine.simulated import SimulatedEngine
from promptai.errors import PromptAIError
from promptai.fleet.launcher import EngineLauncher
from promptai.fleet.local import LocalModel, LocalSource
from promptai.fleet.registry import Registry
from promptai.fleet.replica import Snapshot
from promptai.fleet.source import Source
from promptai.gateway.app import Gateway, GatewayLimits
from promptai.gateway.auth import Guard
from promptai.gateway.server import GatewayServer
from promptai.gateway.streaming import Heartbeat
from promptai.router.estimate.policy import STRATEGIES
from promptai.router.estimate.rates import RateBook
from promptai.router.schedule.dispatcher import Dispatcher
from promptai.router.schedule.fleet_state import FleetState
from promptai.settings import Settings, cache_directory

_log = logging.getLogger("promptai.serve")

_PROGRESS_PERIOD_S, _FILE_PERIOD_S = 0.5, 2.0
#: How long the start waits for boards to report their models before it prints the table.
_WAIT_FOR_BOARDS_S = 0.7
_EXIT_SIGNAL_BASE = 128
#: Settings of ``[gateway]`` that take effect only at the start.
_FIXED_AT_START = (
    *("host", "port", "strategy", "ping_s", "body_mib"),
    *("keys", "hosts", "cors_origins", "cache_ram_mib", "memory_mib"),
)
#: Thresholds of the three generations. A request leaves a few reference cycles, so garbage grows to some MiB.
_GC_THRESHOLDS = (20_000, 50, 100)


class ServePlan(msgspec.Struct, frozen=True, kw_only=True):
    """
    What the gateway serves.

    Attributes:
        settings: The settings with the options of the command line applied.
        models: Models of this machine.
        setup: How their engines are started; ``None``: no model of this machine was served yet.
    """

    settings: Settings
    models: tuple[LocalModel, ...] = ()
    boards: Boards = Boards((), {})
    setup: EngineSetup | None = None


def make_plan(
    settings: Settings, *, setup: EngineSetup | None, simulated: bool, note: Callable[[str], None]
) -> ServePlan:
    """
    Decide what to serve; reads the library and model headers, starts nothing.

    Args:
        setup: From an earlier plan; ``None``: determined now if models of this machine are served.
        simulated: Simulated boards are served, so the library is not served unless its models are named.

    Raises:
        PromptAIError: A named model or board does not exist or cannot be used.
    """
    boards = parse_boards(settings.fleet)
    chosen = [] if simulated and not settings.serve else select_models(settings, note)
    if chosen and setup is None:
        setup = find_engine_setup(settings, note)
    models = tuple(describe_model(one, setup) for one in chosen) if setup is not None else ()
    return ServePlan(settings=settings, models=models, boards=boards, setup=setup)


class ServeSession:
    """
    One run of the gateway, from start to end.

    Args:
        plan: The initial plan.
        simulated: Number of simulated boards to start.
        file: Returns the path of the settings file; ``None``: there is no file.
        seen: ``file_identity`` of that file before the plan was made.
        replan: Makes a new plan from the current settings.
    """

    def __init__(
        self,
        plan: ServePlan,
        guard: Guard,
        *,
        simulated: int = 0,
        file: Callable[[], Path | None],
        seen: tuple[int, ...] | None,
        replan: Callable[[EngineSetup | None], ServePlan],
    ) -> None:
        self.plan = plan
        self._active = plan.settings
        self.keys = dict(plan.boards.keys)
        self._engine_keys: dict[str, str] = {}
        self.budget = MemoryBudget(plan.settings.gateway.memory_mib)
        self._guard = guard
        self._file = file
        self._seen = seen
        self._replan = replan
        self._engines = [SimulatedEngine(PI5) for _ in range(simulated)]
        self._signals: asyncio.Queue[int] = asyncio.Queue()
        self._reload_requested = asyncio.Event()

    async def run(self, started: Callable[["ServeSession", GatewayServer], None], loading: LoadingProgress) -> int:
        """
        Serve until a signal arrives; returns the exit code.

        Args:
            started: Called once the gateway listens and knows its replicas.

        Raises:
            SettingsError: The gateway cannot listen on its address.
        """
        gateway_settings = self.plan.settings.gateway
        loop = asyncio.get_running_loop()
        async with contextlib.AsyncExitStack() as stack:
            self._upstream = await stack.enter_async_context(HttpUpstream(ChainMap(self._engine_keys, self.keys)))
            for engine in self._engines:
                await stack.enter_async_context(engine)
            self.registry = Registry((), busy=self._in_flight)
            self._fleet_state = FleetState(self.registry, RateBook())
            self.registry.replace(self._sources(self.plan))
            strategy = STRATEGIES[gateway_settings.strategy]()
            self._dispatcher = Dispatcher(self._fleet_state, strategy, queue_limits(self.plan.settings))
            stack.callback(self._dispatcher.close)
            self._gateway = Gateway(
                self._dispatcher,
                self._upstream,
                self._guard,
                rules=admission_rules(self.plan.settings),
                heartbeat=Heartbeat(ping_s=gateway_settings.ping_s),
                limits=GatewayLimits(body_bytes=gateway_settings.body_mib * 1024**2),
            )
            self._catch_signals(loop, stack)
            # The server stops before the engines end; if it cannot listen, no engine starts.
            tasks: list[asyncio.Task[None]] = []
            stack.push_async_callback(_end, tasks)
            server = GatewayServer(self._gateway, gateway_settings.host, gateway_settings.port)
            await stack.enter_async_context(server)
            tasks.append(asyncio.create_task(self.registry.run()))
            await self._wait_for_boards()
            started(self, server)
            tasks.append(asyncio.create_task(self._watch(loading)))
            _freeze_gc()
            return await self._until_end(tasks)

    def _sources(self, plan: ServePlan) -> list[Source]:
        sources: list[Source] = []
        if plan.models and plan.setup is not None:
            logs = cache_directory() / "logs"
            launcher = EngineLauncher(plan.setup.binary, flags_for(plan.setup), logs, self._engine_keys)
            sources.append(LocalSource(plan.models, launcher, self.budget, self._fleet_state.running))
        if self._engines:
            sources.append(simulated_source(self._engines))
        return sources + static_sources(plan.boards.targets, self._upstream)

    def _in_flight(self, replica_id: str) -> int:
        return self._fleet_state.running(replica_id)

    def _catch_signals(self, loop: asyncio.AbstractEventLoop, stack: contextlib.AsyncExitStack) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._signals.put_nowait, number)
            stack.callback(loop.remove_signal_handler, number)
        loop.add_signal_handler(signal.SIGHUP, self._reload_requested.set)
        stack.callback(loop.remove_signal_handler, signal.SIGHUP)

    async def _wait_for_boards(self) -> None:
        """Give boards a moment to report their models."""
        expected = len(self.plan.models) + len(self._engines) + len(self.plan.boards.targets)
        reported = asyncio.Event()

        def check(snapshot: Snapshot) -> None:
            if len(snapshot.replicas) >= expected:
                reported.set()

        unsubscribe = self.registry.subscribe(check)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_WAIT_FOR_BOARDS_S):
                await reported.wait()
        unsubscribe()

    async def _until_end(self, tasks: Sequence["asyncio.Task[None]"]) -> int:
        """Wait for a signal, then until the answers in progress have finished or another signal arrives."""
        signalled = asyncio.ensure_future(self._signals.get())
        await asyncio.wait([signalled, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                signalled.cancel()
                task.result()  # raises: a task that ends before a signal is a bug
        limit_s = self.plan.settings.gateway.drain_s
        if self._gateway.open_requests:
            _log.info(
                "draining: %d requests in progress may finish for %g s; send the signal again to stop at once",
                self._gateway.open_requests,
                limit_s,
            )
        again = asyncio.ensure_future(self._signals.get())
        drained = asyncio.ensure_future(self._gateway.drain(limit_s))
        await asyncio.wait([again, drained], return_when=asyncio.FIRST_COMPLETED)
        drained.cancel()
        if again.done() and not drained.done():
            _log.info("stopped at once: %d requests were cut off", self._gateway.open_requests)
            return _EXIT_SIGNAL_BASE + again.result()
        again.cancel()
        return 0

    async def _watch(self, loading: LoadingProgress) -> None:
        """Periodically update the load progress and check the settings file."""
        loop = asyncio.get_running_loop()
        check_file_at = loop.time()
        while True:
            loading.update(self.registry.snapshot, loop.time())
            requested = self._reload_requested.is_set()
            if requested or loop.time() >= check_file_at:
                check_file_at, now = loop.time() + _FILE_PERIOD_S, file_identity(self._file())
                if requested or now != self._seen:
                    self._seen = now
                    self._reload_requested.clear()
                    await self._reload()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_PROGRESS_PERIOD_S):
                    await self._reload_requested.wait()

    async def _reload(self) -> None:
        """Apply the current settings; invalid settings change nothing."""
        try:
            plan = await asyncio.to_thread(self._replan, self.plan.setup)
            rules, limits, sources = admission_rules(plan.settings), queue_limits(plan.settings), self._sources(plan)
        except PromptAIError as error:
            _log.error("settings not reloaded: %s", error)
            return
        except Exception:  # noqa: BLE001  neither a file nor a bug in reading it may end the gateway
            _log.exception("settings not reloaded: unexpected error")
            return
        if self.plan.setup is None:
            self._active = _with_engine_settings_of(self._active, plan.settings)
        pending = _waiting_for_restart(self._active, plan.settings)
        self.keys.clear()
        self.keys.update(plan.boards.keys)
        self._gateway.admission.rules = rules
        self._dispatcher.limits = limits
        self.plan = msgspec.structs.replace(plan, setup=plan.setup or self.plan.setup)
        self.registry.replace(sources)
        for problem in self.registry.problems:
            _log.warning("%s", problem)
        _log.info("settings reloaded%s", f"; {pending}" if pending else "")


def _waiting_for_restart(active: Settings, current: Settings) -> str:
    """Name the changed settings that take effect only after a restart; empty if there are none."""
    changed = [name for name in _FIXED_AT_START if getattr(active.gateway, name) != getattr(current.gateway, name)]
    pending = [f"gateway.{name}" for name in changed] + (["engine"] if active.engine != current.engine else [])
    return f"restart to apply {', '.join(pending)}" if pending else ""


def _with_engine_settings_of(active: Settings, current: Settings) -> Settings:
    """Take over the engine settings, which stay open until the first model of this machine is served."""
    gateway = msgspec.structs.replace(active.gateway, cache_ram_mib=current.gateway.cache_ram_mib)
    return msgspec.structs.replace(active, engine=current.engine, gateway=gateway)


def file_identity(path: Path | None) -> tuple[int, ...] | None:
    """Return values that change when the file changes; ``None`` if it does not exist."""
    try:
        stat = path.stat() if path is not None else None
    except OSError:
        return None
    return None if stat is None else (stat.st_mtime_ns, stat.st_ino, stat.st_size)


def _freeze_gc() -> None:
    """
    Exclude imported modules from garbage collection and collect the rest less often.

    A full collection walks all objects, and every stream pauses meanwhile: 20 ms on a server core. With Python's
    default thresholds, 200 streams paused for 0.5 to 9 ms seven times a second.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLDS)


async def _end(tasks: Sequence["asyncio.Task[None]"]) -> None:
    for task in reversed(tasks):
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError):
            await task
