"""Sources of replicas for ``promptai serve``: boards, simulated boards, and the memory budget of this machine."""

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from urllib.parse import urlsplit

import msgspec

from promptai.device.memory import read_memory
from promptai.device.process import ProcessTree
from promptai.engine.simulated import SimulatedEngine
from promptai.engine.simulation import SimulationConfig
from promptai.engine.upstream import Upstream
from promptai.engine.url import EngineUrl
from promptai.errors import SettingsError
from promptai.fleet.replica import Rates, Replica
from promptai.fleet.simulated import SimulatedSource
from promptai.fleet.source import Source
from promptai.fleet.static import StaticServer, StaticSource
from promptai.gateway.admission import AdmissionRules
from promptai.router.schedule.dispatcher import QueueLimits
from promptai.router.selection import Alias, ModelNames
from promptai.settings import FleetEntry, Settings, board_key

#: A simulated Raspberry Pi 5 with a model of 1.5 billion parameters.
PI5 = SimulationConfig(
    prefill_tps=60.0, decode_tps=10.0, slots=2, context=8192, batch=32, answer_tokens=120, model="simulated-1.5b"
)
_RESERVED_SHARE = 0.1
_READ_PERIOD_S = 2.0


class Boards(NamedTuple):
    """
    Servers that PromptAI does not start.

    Attributes:
        keys: Their API keys, by URL.
    """

    targets: tuple[StaticServer, ...]
    keys: dict[str, str]


def parse_boards(entries: Sequence[FleetEntry], environ: Mapping[str, str] = os.environ) -> Boards:
    """
    Return the boards of the settings and the command line.

    Raises:
        SettingsError: A URL is invalid, contains a password or is repeated, or its API key is not set.
    """
    targets, keys = [], {}
    for entry in _without_duplicates(entries):
        known = entry.prefill_tps is not None or entry.decode_tps is not None
        target = StaticServer(
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
    return Boards(_with_unique_names(targets), keys)


def _with_unique_names(targets: Sequence[StaticServer]) -> tuple[StaticServer, ...]:
    """
    Give every board a name of its own: path or model are added where host and port are the same.

    Raises:
        SettingsError: The settings use a name twice.
    """
    ids = Counter(target.replica_id for target in targets)
    found = []
    for target in targets:
        if target.name is None and ids[target.replica_id] > 1:
            suffix = [urlsplit(target.base_url).path.strip("/"), target.model]
            found.append(msgspec.structs.replace(target, name="/".join([target.replica_id, *filter(None, suffix)])))
        else:
            found.append(target)
    name, count = Counter(target.replica_id for target in found).most_common(1)[0] if found else ("", 0)
    if count > 1:
        raise SettingsError(f"{count} boards are named {name}", hint="give each board a unique name")
    return tuple(found)


def _without_duplicates(entries: Sequence[FleetEntry]) -> list[FleetEntry]:
    """
    Merge entries for the same board, which would otherwise get twice as many streams as it has slots.

    A bare entry, as from ``--board``, merges into an entry with more fields, and adds its API key if that has none.

    Raises:
        SettingsError: A URL is invalid or contains a password, or two entries describe the same board.
    """
    kept: list[FleetEntry] = []
    for entry in entries:
        place = _location(entry)
        matches = [number for number, other in enumerate(kept) if _location(other) == place]
        if matches and _is_bare(entry):
            for number in matches:
                kept[number] = _with_key_of(kept[number], entry)
        elif len(matches) == 1 and _is_bare(kept[matches[0]]):
            kept[matches[0]] = _with_key_of(entry, kept[matches[0]])
        else:
            for number in matches:
                _refuse_overlap(kept[number], entry)
            kept.append(entry)
    return kept


def _location(entry: FleetEntry) -> tuple[str, str, int, str]:
    """Return what identifies the server; raises ``SettingsError`` if the URL is invalid or contains a password."""
    key_hint = "put the key into the variable that api_key_env names, for --board into $PROMPTAI_API_KEY"
    return EngineUrl.parse(entry.url, name=entry.name, key_hint=key_hint).location


def _is_bare(entry: FleetEntry) -> bool:
    """Whether an entry has only a URL and perhaps an API key."""
    return entry == FleetEntry(entry.url, api_key_env=entry.api_key_env)


def _with_key_of(entry: FleetEntry, other: FleetEntry) -> FleetEntry:
    return msgspec.structs.replace(entry, api_key_env=entry.api_key_env or other.api_key_env)


def _refuse_overlap(one: FleetEntry, other: FleetEntry) -> None:
    """Reject entries for one server unless they name different models; without a model, an entry means all of them."""
    if one.model is not None and other.model is not None and one.model != other.model:
        return
    names = " and ".join(entry.name or entry.url for entry in (one, other))
    raise SettingsError(
        f"{names} are the same board at {StaticServer(one.url).base_url}",
        hint="list it once, or set a different model in each entry",
    )


def static_sources(targets: Sequence[StaticServer], upstream: Upstream) -> list[Source]:
    """Return one source per board, so that a change of one does not affect the others."""
    return [StaticSource([target], upstream, name=f"fleet:{target.replica_id}") for target in targets]


def simulated_source(engines: Sequence[SimulatedEngine]) -> SimulatedSource:
    """Return the source of the simulated boards, which must be listening."""
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


def admission_rules(settings: Settings) -> AdmissionRules:
    """Rules of admission; they may change while the gateway runs."""
    gateway = settings.gateway
    return AdmissionRules(
        names=ModelNames(
            aliases={name: Alias(entry.model, entry.params) for name, entry in settings.aliases.items()},
            default=gateway.default,
        ),
        fallbacks=settings.fallbacks,
        max_wait_s=gateway.wait_s,
        stall_s=gateway.stall_s,
        max_attempts=gateway.attempts,
    )


def queue_limits(settings: Settings) -> QueueLimits:
    """Limits of the queue; they may change while the gateway runs."""
    return QueueLimits(queue=settings.gateway.queue, outage_s=settings.gateway.outage_s)


class MemoryBudget:
    """
    Memory that all engines of this machine may take together: as configured, or what is available less a reserve.

    The anonymous memory of running engines is not available to other processes but belongs to the budget; their mapped
    weights are page cache and count as available.
    """

    def __init__(self, memory_mib: int | None) -> None:
        self._fixed = None if memory_mib is None else memory_mib * 1024**2
        self._tree = ProcessTree(os.getpid())
        self._own = self._anonymous() or 0
        self._last: int | None = None
        self._read_at: float | None = None

    def __call__(self) -> int:
        """Return the budget in bytes; measured at most every two seconds."""
        if self._fixed is not None:
            return self._fixed
        now = time.monotonic()
        if self._last is None or self._read_at is None or now - self._read_at >= _READ_PERIOD_S:
            self._read_at = now
            self._last = self._measure()
        return self._last

    def _measure(self) -> int:
        """
        Measure the budget; keep the last one while the memory of the engines is unknown.

        It is unknown while an engine ends, and always on old kernels. The budget is kept as a whole: the ending engine
        has already returned memory, which would count twice if only the last memory of the engines were kept. The first
        measurement precedes any engine, so their memory is then 0.
        """
        anonymous = self._anonymous()
        if anonymous is None and self._last is not None:
            return self._last
        memory = read_memory()
        whole = min(memory.total_bytes, memory.limit_bytes or memory.total_bytes)
        engines = 0 if anonymous is None else max(0, anonymous - self._own)
        return max(0, memory.available_for_new_process() + engines - round(_RESERVED_SHARE * whole))

    def _anonymous(self) -> int | None:
        """Anonymous memory of this process and its engines; ``None``: unknown."""
        reading = self._tree.read()
        return None if reading is None else reading.memory.anon_bytes
