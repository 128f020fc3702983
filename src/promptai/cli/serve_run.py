"""The life of one gateway: put together, listening, read again, drained, gone.

    plan ──▶ listen ──▶ engines start ──▶ serve ──(file changes, SIGHUP)──▶ plan again
                                            │
                          SIGTERM, SIGINT ──▶ drain ──▶ (second one, or nothing left) ──▶ engines end

What a plan may change while streams go on: which models and boards there are, aliases, fallbacks, limits. Where
it listens, who may come in and how engines are started is settled at the start.
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

_LOOK_PERIOD_S, _FILE_PERIOD_S = 0.5, 2.0
#: How long the start waits for boards to say what they serve, before it prints what it knows.
_WAIT_FOR_BOARDS_S = 0.7
_EXIT_SIGNAL_BASE = 128
#: Settings of the gateway that only count at its start.
_FIXED_AT_START = (
    *("host", "port", "strategy", "ping_s", "body_mib"),
    *("keys", "hosts", "cors_origins", "cache_ram_mib", "memory_mib"),
)
#: Of objects, of young collections, of middle ones. A request leaves a few cycles behind, so that it is some MB.
_GC_THRESHOLDS = (20_000, 50, 100)


class ServePlan(msgspec.Struct, frozen=True, kw_only=True):
    """
    What is to be served.

    Attributes:
        settings: With the command line's word in them.
        models: Of this machine.
    """

    settings: Settings
    models: tuple[LocalModel, ...] = ()
    boards: Boards = Boards((), {})
    setup: EngineSetup | None = None


def make_plan(
    settings: Settings, *, setup: EngineSetup | None, simulated: bool, note: Callable[[str], None]
) -> ServePlan:
    """
    Decide what is served; reads the library and headers of models, starts nothing.

    Args:
        machine: As it was looked at before; ``None``: it is looked at now, if models of it are served.
        simulated: Pretended boards are served, so that nothing else is unless it was named.

    Raises:
        PromptAIError: Something that is named is not there, or cannot be used.
    """
    found = parse_boards(settings.fleet)
    chosen = [] if simulated and not settings.serve else select_models(settings, note)
    if chosen and setup is None:
        setup = find_engine_setup(settings, note)
    models = tuple(describe_model(one, setup) for one in chosen) if setup is not None else ()
    return ServePlan(settings=settings, models=models, boards=found, setup=setup)


class ServeSession:
    """
    One gateway, from its start to its end.

    Args:
        plan: What it begins with.
        simulated: How many pretended boards it starts beside.
        file: Where settings are, if there are any.
        seen: The ``file_identity`` of that file before the plan was made.
        replan: Makes another plan from the settings as they are now.
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
        Serve until a signal ends it; the exit code.

        Args:
            started: Told when it listens and knows what it serves.

        Raises:
            SettingsError: It cannot listen there.
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
            # The door closes before the engines end, and a door that cannot be had starts none.
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
        """Give boards a moment to say what they serve."""
        expected = len(self.plan.models) + len(self._engines) + len(self.plan.boards.targets)
        there = asyncio.Event()

        def look(snapshot: Snapshot) -> None:
            if len(snapshot.replicas) >= expected:
                there.set()

        leave = self.registry.subscribe(look)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_WAIT_FOR_BOARDS_S):
                await there.wait()
        leave()

    async def _until_end(self, tasks: Sequence["asyncio.Task[None]"]) -> int:
        """Wait for a signal, then for the answers that are under way, or for another signal."""
        signalled = asyncio.ensure_future(self._signals.get())
        await asyncio.wait([signalled, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                signalled.cancel()
                task.result()  # a bug: it never ends by itself
        limit_s = self.plan.settings.gateway.drain_s
        if self._gateway.open_requests:
            _log.info(
                "ending: %d under way may go on for %g s; the same signal again ends at once",
                self._gateway.open_requests,
                limit_s,
            )
        again = asyncio.ensure_future(self._signals.get())
        drained = asyncio.ensure_future(self._gateway.drain(limit_s))
        await asyncio.wait([again, drained], return_when=asyncio.FIRST_COMPLETED)
        drained.cancel()
        if again.done() and not drained.done():
            _log.info("ended at once: %d were under way", self._gateway.open_requests)
            return _EXIT_SIGNAL_BASE + again.result()
        again.cancel()
        return 0

    async def _watch(self, loading: LoadingProgress) -> None:
        """What needs a look now and then: loading, and the file of settings."""
        loop = asyncio.get_running_loop()
        look_at = loop.time()
        while True:
            loading.update(self.registry.snapshot, loop.time())
            wanted = self._reload_requested.is_set()
            if wanted or loop.time() >= look_at:
                look_at, now = loop.time() + _FILE_PERIOD_S, file_identity(self._file())
                if wanted or now != self._seen:
                    self._seen = now
                    self._reload_requested.clear()
                    await self._reload()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_PERIOD_S):
                    await self._reload_requested.wait()

    async def _reload(self) -> None:
        """Take over what the file says now; a file that is wrong changes nothing."""
        try:
            plan = await asyncio.to_thread(self._replan, self.plan.setup)
            rules, limits, sources = admission_rules(plan.settings), queue_limits(plan.settings), self._sources(plan)
        except PromptAIError as error:
            _log.error("settings stay as they were: %s", error)
            return
        except Exception:  # noqa: BLE001  a border: no file, and no bug in reading it, ends what is under way
            _log.exception("settings stay as they were: they could not be read again")
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
        _log.info("settings were read again%s", f"; {pending}" if pending else "")


def _waiting_for_restart(active: Settings, read: Settings) -> str:
    """That settings differ from those in force and nothing can be done about it now; empty where none does."""
    pending = [
        f"gateway.{name}" for name in _FIXED_AT_START if getattr(active.gateway, name) != getattr(read.gateway, name)
    ]
    pending += ["engine"] if active.engine != read.engine else []
    return (
        f"{', '.join(pending)} only {'counts' if len(pending) == 1 else 'count'} from the next start" if pending else ""
    )


def _with_engine_settings_of(active: Settings, read: Settings) -> Settings:
    """With what engines are started by: it is settled when the first model of this machine is served."""
    gateway = msgspec.structs.replace(active.gateway, cache_ram_mib=read.gateway.cache_ram_mib)
    return msgspec.structs.replace(active, engine=read.engine, gateway=gateway)


def file_identity(path: Path | None) -> tuple[int, ...] | None:
    """What changes when the file does."""
    try:
        found = path.stat() if path is not None else None
    except OSError:
        return None
    return None if found is None else (found.st_mtime_ns, found.st_ino, found.st_size)


def _freeze_gc() -> None:
    """
    Keep the collector away from what has been imported: it is there to stay.

    A full collection walks it all, and every stream stands still meanwhile: 20 ms on a server core. What is left is
    looked at seldom: with Python's own thresholds, 200 streams stood still for 0.5 to 9 ms seven times a second.
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
