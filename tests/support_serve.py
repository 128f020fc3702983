"""Admission and routing in front of simulated engines: on virtual time, an afternoon of four boards takes a second."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import msgspec

from promptai.engine.simulation import SimulationConfig
from promptai.engine.simulator import Simulator
from promptai.fleet.registry import Registry
from promptai.fleet.replica import Rates, Replica
from promptai.fleet.simulated import SimulatedSource
from promptai.gateway.admission import Admission, AdmissionRules, AdmittedRequest
from promptai.gateway.auth import Caller
from promptai.router.estimate.policy import STRATEGIES
from promptai.router.estimate.rates import RateBook
from promptai.router.schedule.dispatcher import Dispatcher, QueueLimits
from promptai.router.schedule.fleet_state import FleetState
from support_simulated_upstream import SimulatedUpstream


class World:
    """
    Simulated engines, and everything of the gateway but HTTP.

    Attributes:
        engines: The engines by URL, ``sim://NAME``.
    """

    def __init__(
        self,
        configs: Mapping[str, SimulationConfig],
        *,
        strategy: str = "affinity",
        limits: QueueLimits | None = None,
        rules: AdmissionRules | None = None,
        known_rates: bool = True,
        dialects: Mapping[str, str] | None = None,
    ) -> None:
        self.engines = {f"sim://{name}": Simulator(config) for name, config in configs.items()}
        self.source = SimulatedSource(
            [
                Replica(
                    id=name,
                    url=f"sim://{name}",
                    model=config.model,
                    dialect=(dialects or {}).get(name, "llama-server"),
                    slots=config.slots,
                    context=config.context,
                    host_cache_tokens=config.host_cache,
                    rates=Rates(
                        prefill_tps=config.prefill_tps,
                        decode_tps=config.decode_tps,
                        decode_slowdown=config.decode_slowdown,
                        source="settings",
                    )
                    if known_rates
                    else Rates(),
                )
                for name, config in configs.items()
            ]
        )
        self.registry = Registry([self.source])
        self.upstream = SimulatedUpstream(self.engines)
        self.fleet_state = FleetState(self.registry, RateBook())
        self.dispatcher = Dispatcher(self.fleet_state, STRATEGIES[strategy](), limits)
        self.admission = Admission(self.dispatcher, self.upstream, rules)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncGenerator["World", None]:
        """Run the engines and the registry."""
        async with self.upstream:
            registry = asyncio.create_task(self.registry.run())
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            try:
                yield self
            finally:
                registry.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await registry

    def kill(self, name: str) -> None:
        """End an engine as ``kill -9`` would, unknown to the registry."""
        self.upstream.kill(f"sim://{name}")

    def admitted(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        headers: Mapping[str, str] | None = None,
        key: str = "local",
        **fields: Any,
    ) -> AdmittedRequest:
        """Admit a chat."""
        body = {"model": "default", "messages": [dict(message) for message in messages], "stream": True, **fields}
        return self.admission.admit("/v1/chat/completions", body, headers or {}, Caller(key_id=key))


class Heard(msgspec.Struct):
    """
    The answer that a client received.

    Attributes:
        first_s: Seconds to the first text; ``total_s`` to the end.
    """

    text: str = ""
    chunks: list[dict[str, Any]] = []
    first_s: float | None = None
    total_s: float | None = None

    @property
    def finish_reason(self) -> str | None:
        """The last finish reason."""
        reasons = [c["finish_reason"] for chunk in self.chunks for c in chunk["choices"] if c.get("finish_reason")]
        return reasons[-1] if reasons else None


async def listen(admitted: AdmittedRequest) -> Heard:
    """Read an answer to its end."""
    loop = asyncio.get_running_loop()
    start, heard = loop.time(), Heard()
    async with contextlib.aclosing(admitted.routed.events()) as events:
        async for some in events:
            for data in some:
                chunk = msgspec.json.decode(data, type=dict[str, Any])
                heard.chunks.append(chunk)
                for choice in chunk.get("choices") or ():
                    text = (choice.get("delta") or {}).get("content")
                    if text:
                        heard.text += text
                        heard.first_s = heard.first_s if heard.first_s is not None else loop.time() - start
    heard.total_s = loop.time() - start
    return heard
