"""Admission and routing in front of this machine's own engines, which start on demand in simulated memory."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Self

from promptai.engine.simulation import SimulationConfig
from promptai.engine.simulator import Simulator
from promptai.fleet.local import LocalModel, LocalSource
from promptai.fleet.registry import Registry
from promptai.gateway.admission import Admission, AdmissionRules, AdmittedRequest
from promptai.gateway.auth import Caller
from promptai.router.estimate.policy import Affinity
from promptai.router.estimate.rates import RateBook
from promptai.router.schedule.dispatcher import Dispatcher, QueueLimits
from promptai.router.schedule.fleet_state import FleetState
from support_fleet import GB, FakeLauncher, beside
from support_simulated_upstream import SimulatedUpstream


class Cold:
    """Models that load in ten seconds each, within a budget of memory."""

    def __init__(
        self,
        *models: LocalModel,
        config: SimulationConfig,
        budget: int = 4 * GB,
        limits: QueueLimits | None = None,
        rules: AdmissionRules | None = None,
    ) -> None:
        self.launcher = FakeLauncher()
        self.upstream = SimulatedUpstream({f"http://{model.name}": Simulator(config) for model in models})
        self.registry = Registry(())
        self.fleet_state = FleetState(self.registry, RateBook())
        self.source = LocalSource(models, self.launcher, lambda: budget, self.fleet_state.running)
        self.registry.replace([self.source])
        self.dispatcher = Dispatcher(self.fleet_state, Affinity(), limits)
        self.admission = Admission(self.dispatcher, self.upstream, rules)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncGenerator[Self, None]:
        """Run the source."""
        async with self.upstream, contextlib.AsyncExitStack() as stack:
            over, ready = asyncio.Event(), asyncio.Event()

            async def play() -> None:
                ready.set()
                await over.wait()

            task = asyncio.create_task(beside(self.registry.run(), play))
            stack.push_async_callback(asyncio.wait, [task])
            stack.callback(over.set)
            await ready.wait()
            await asyncio.sleep(0.1)
            yield self

    def admitted(
        self, model: str, messages: Sequence[Mapping[str, Any]], *, key: str = "local", **fields: Any
    ) -> AdmittedRequest:
        """Admit a chat."""
        body = {"model": model, "messages": [dict(message) for message in messages], "stream": True, **fields}
        return self.admission.admit("/v1/chat/completions", body, {}, Caller(key_id=key))
