"""A replica: an engine that the gateway can reach, and what is known of it.

Values only. A snapshot of all replicas is immutable, so that nothing changes under a
decision that reads it; a change is another snapshot. What is in flight on a replica is not
here: the gateway counts that itself, because figures that are scraped from an engine are
seconds old when they arrive.
"""

from enum import Enum

import msgspec


class State(Enum):
    """Whether a replica takes requests."""

    COLD = "cold"  # not running; asking for its model starts it
    LOADING = "loading"  # will answer soon
    READY = "ready"
    DRAINING = "draining"  # finishes what it has, takes nothing new
    DOWN = "down"  # does not answer


class Rates(msgspec.Struct, frozen=True, kw_only=True):
    """
    How fast a replica is expected to be, before it has been seen at work.

    Attributes:
        prefill_tps: Prompt tokens a second; ``None``: not known.
        decode_tps: Generated tokens a second of a stream that is alone; ``None``: not known.
        decode_slowdown: What each further stream adds to a decode step, as a share of the step of one.
        source: ``profile`` (an earlier run), ``forecast``, ``settings``, or ``unknown``.
    """

    prefill_tps: float | None = None
    decode_tps: float | None = None
    decode_slowdown: float = 0.5
    source: str = "unknown"


class Replica(msgspec.Struct, frozen=True, kw_only=True):
    """
    One engine with one model.

    Attributes:
        id: Unique in the fleet, and the same in every gateway that sees it: rendezvous hashing uses it.
        url: Scheme, host and port; empty while it is cold.
        model: The name it answers to; empty while it has never answered.
        slots: Streams at once.
        context: Tokens of context of one slot; ``None`` where it does not tell.
        host_cache_tokens: What its prompt cache beside the slots holds (``--cache-ram``); 0: it has none;
            ``None``: not known, and llama-server's default is large.
        state: Whether it takes requests; ``reason`` says why not.
        leaving: It drains and will not be back: settings do not have it any more, nor the source that it came from.
        dialect: ``llama-server``, ``promptai`` (another gateway) or ``openai`` (anything else).
        rates: What is expected of it.
        progress: Share of its model that is loaded, 0 to 1; ``None`` where nobody knows.
        load_s: Seconds that loading takes, as far as is known.
        capability: What ``auto`` orders models by: parameters in billions, unless settings say otherwise.
        accuracy: Share of Winogrande items it solved in an earlier run; ``None``: not measured.
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
        """Whether a request may be planned for it, now or when it has loaded."""
        return self.state in {State.COLD, State.LOADING, State.READY}


class Snapshot(msgspec.Struct, frozen=True):
    """
    All replicas at one moment.

    Attributes:
        version: Grows with every change.
    """

    version: int = 0
    replicas: tuple[Replica, ...] = ()

    def of(self, model: str) -> tuple[Replica, ...]:
        """The replicas of one model, in the fleet's order."""
        return tuple(replica for replica in self.replicas if replica.model == model)

    def find(self, replica_id: str) -> Replica | None:
        """The replica of that id."""
        return next((replica for replica in self.replicas if replica.id == replica_id), None)

    @property
    def models(self) -> tuple[str, ...]:
        """Names of all models, each once, in the fleet's order."""
        return tuple(dict.fromkeys(replica.model for replica in self.replicas if replica.model))
