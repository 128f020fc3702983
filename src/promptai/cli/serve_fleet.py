"""Where the replicas of ``promptai serve`` come from: this machine, addresses, and pretended boards."""

import os
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from promptai.device.memory import read_memory
from promptai.device.process import ProcessTree
from promptai.engine.simulated import SimulatedEngine
from promptai.engine.simulation import SimulationConfig
from promptai.engine.upstream import Upstream
from promptai.fleet.replica import Rates, Replica
from promptai.fleet.simulated import SimulatedSource
from promptai.fleet.source import Source
from promptai.fleet.static import StaticSource, Target
from promptai.gateway.desk import Serving
from promptai.router.dispatch import Limits
from promptai.router.selection import Alias, Names
from promptai.settings import FleetEntry, Settings, board_key

#: A pretended Raspberry Pi 5 with a model of 1.5 billion parameters.
PI5 = SimulationConfig(
    prefill_tps=60.0, decode_tps=10.0, slots=2, context=8192, batch=32, answer_tokens=120, model="simulated-1.5b"
)
_RESERVED_SHARE = 0.1
_LOOK_EVERY_S = 2.0


class Boards(NamedTuple):
    """
    Servers that somebody else starts.

    Attributes:
        keys: Their API keys, by their URLs.
    """

    targets: tuple[Target, ...]
    keys: dict[str, str]


def boards(entries: Sequence[FleetEntry], environ: Mapping[str, str] = os.environ) -> Boards:
    """
    The addresses that settings and options name.

    Raises:
        SettingsError: One is no address, or its key is not there.
    """
    targets, keys = [], {}
    for entry in entries:
        known = entry.prefill_tps is not None or entry.decode_tps is not None
        target = Target(
            url=entry.url,
            name=entry.name,
            model=entry.model,
            slots=entry.slots,
            rates=Rates(
                prefill_tps=entry.prefill_tps,
                decode_tps=entry.decode_tps,
                source="settings" if known else "unknown",
            ),
            capability=entry.capability,
        )
        key = board_key(entry, environ)
        if key is not None:
            keys[target.base_url] = key
        targets.append(target)
    for target in targets:
        _ = target.replica_id  # raises where an address is none
    return Boards(tuple(targets), keys)


def static_sources(targets: Sequence[Target], upstream: Upstream) -> list[Source]:
    """One source a board, so that a change of one leaves the others alone."""
    return [StaticSource([target], upstream, name=f"fleet:{target.replica_id}") for target in targets]


def simulated_source(engines: Sequence[SimulatedEngine]) -> SimulatedSource:
    """Pretended boards, as soon as they listen."""
    return SimulatedSource(
        [
            Replica(
                id=f"pi5-{number}",
                url=engine.base_url,
                model=engine.config.model,
                slots=engine.config.slots,
                context=engine.config.context,
                rates=Rates(
                    prefill_tps=engine.config.prefill_tps,
                    decode_tps=engine.config.decode_tps,
                    decode_slowdown=engine.config.decode_slowdown,
                    source="settings",
                ),
                capability=1.5,
            )
            for number, engine in enumerate(engines, 1)
        ]
    )


def serving_of(settings: Settings) -> Serving:
    """What may change while the gateway runs."""
    gateway = settings.gateway
    return Serving(
        names=Names(
            aliases={name: Alias(entry.model, entry.params) for name, entry in settings.aliases.items()},
            default=gateway.default,
        ),
        fallbacks=settings.fallbacks,
        wait_s=gateway.wait_s,
        stall_s=gateway.stall_s,
        attempts=gateway.attempts,
    )


def limits_of(settings: Settings) -> Limits:
    """How many may wait, and how long for a replica that is away."""
    return Limits(queue=settings.gateway.queue, outage_s=settings.gateway.outage_s)


class MemoryBudget:
    """
    What all engines of this machine together may take: as set, or what there is now, less a reserve.

    Anonymous memory of engines that run is not available to others, but is in the budget;
    their mapped weights are page cache, which counts as available anyway.
    """

    def __init__(self, memory_mib: int | None) -> None:
        self._fixed = None if memory_mib is None else memory_mib * 1024**2
        self._tree = ProcessTree(os.getpid())
        self._own = self._anonymous()
        self._seen = 0
        self._looked_at: float | None = None

    def __call__(self) -> int:
        """Bytes; looked at now and then."""
        if self._fixed is not None:
            return self._fixed
        now = time.monotonic()
        if self._looked_at is None or now - self._looked_at >= _LOOK_EVERY_S:
            self._looked_at = now
            memory = read_memory()
            whole = min(memory.total_bytes, memory.limit_bytes or memory.total_bytes)
            engines = max(0, self._anonymous() - self._own)
            self._seen = max(0, memory.available_for_new_process() + engines - round(_RESERVED_SHARE * whole))
        return self._seen

    def _anonymous(self) -> int:
        reading = self._tree.read()
        return (reading.memory.anon_bytes or 0) if reading is not None else 0
