"""Replicas, the endpoints that the gateway routes to, and immutable snapshots of all of them.

A snapshot never changes under a decision that reads it; every change makes a new snapshot. Requests in flight
are not part of it: the gateway counts them itself, because figures scraped from an engine are seconds old when
they arrive.
"""

from enum import Enum

import msgspec


class State(Enum):
    """Whether a replica takes requests."""

    COLD = "cold"  # not running; a request for its model starts it
    LOADING = "loading"  # starting
    READY = "ready"
    DRAINING = "draining"  # finishes its requests, accepts no new one
    DOWN = "down"  # not usable


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """
    Expected speed of a replica before it has served requests.

    Attributes:
        prefill_tps: Prompt tokens per second; ``None``: unknown.
        decode_tps: Generated tokens per second of a single stream; ``None``: unknown.
        decode_slowdown: Increase of the decode step per further stream, as a share of the step with one stream.
        source: ``profile`` (an earlier run), ``forecast``, ``settings`` or ``unknown``.
    """

    prefill_tps: float | None = None
    decode_tps: float | None = None
    decode_slowdown: float = 0.5
    source: str = "unknown"


class Replica(msgspec.Struct, frozen=True, kw_only=True):
    """
    An endpoint that serves one model.

    Attributes:
        id: Unique in the fleet and the same in every gateway, because rendezvous hashing uses it.
        url: Scheme, host and port; empty while cold.
        model: Model name in requests; empty until the server has answered once.
        slots: Concurrent streams.
        context: Context of one slot in tokens; ``None``: not reported.
        host_cache_tokens: Capacity of its prompt cache (``--cache-ram``) in tokens; 0: no prompt cache; ``None``:
            unknown, and llama-server's default is large.
        state: Whether it accepts requests; ``reason`` explains why not.
        leaving: Draining for good: neither the settings nor its source list it any more.
        dialect: ``llama-server``, ``promptai`` (another gateway) or ``openai`` (any other server).
        rates: Expected speed.
        progress: Loaded share of its model, 0 to 1; ``None``: unknown.
        load_s: Load time in seconds; ``None``: unknown.
        capability: Rank of the model for ``auto``: parameters in billions unless the settings override it.
        accuracy: Share of Winogrande items solved in an earlier run; ``None``: not measured.
    """

    id: str
    url: str
    model: str
    slots: int = 1
    context: int | None = None
    host_cache_tokens: int | None = None
    state: State = State.READY
    reason: str = ""
    leaving: bool = False
    dialect: str = "llama-server"
    rates: Rates = Rates()
    progress: float | None = None
    load_s: float | None = None
    capability: float | None = None
    accuracy: float | None = None

    @property
    def usable(self) -> bool:
        """Whether requests may be assigned to it, now or once it has loaded."""
        return self.state in {State.COLD, State.LOADING, State.READY}


class Snapshot(msgspec.Struct, frozen=True):
    """
    All replicas at one moment.

    Attributes:
        version: Increases with every change.
    """

    version: int = 0
    replicas: tuple[Replica, ...] = ()

    def of(self, model: str) -> tuple[Replica, ...]:
        """Return the replicas of one model, in fleet order."""
        return tuple(replica for replica in self.replicas if replica.model == model)

    def find(self, replica_id: str) -> Replica | None:
        """Return the replica with this id; ``None`` when there is none."""
        return next((replica for replica in self.replicas if replica.id == replica_id), None)

    @property
    def models(self) -> tuple[str, ...]:
        """Distinct model names, in fleet order."""
        return tuple(dict.fromkeys(replica.model for replica in self.replicas if replica.model))
