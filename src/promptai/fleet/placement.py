"""Which engines must go so that another one has room: the decision, without effects.

On a board, memory is what engines compete for, and a count of models says nothing of it: two
small ones fit where one large one does not. What an eviction costs is the time that the evicted
model takes to load again; so the set that is cheapest to load again goes, and among equals the
one that has not been used for longest.

Two things are never done. An engine that answers somebody is not stopped: a caller would pay
for another caller's model. And nothing is stopped in vain: if that would not make enough room,
everything stays. ``fleet.local`` is the only caller.
"""

from collections.abc import Collection, Iterable, Sequence

import msgspec

#: Reading a model again where nobody has timed it: an SD card of the better kind, bytes a second.
_TYPICAL_READ_BYTES_PER_S = 80_000_000


class LoadedEngine(msgspec.Struct, frozen=True, kw_only=True):
    """
    An engine that holds memory, as far as placing another one cares.

    Attributes:
        id: Of its replica.
        model: Its name, for people.
        needed_bytes: What it takes of the budget.
        cache_bytes: How much of that is its prompt cache.
        busy: It answers somebody, or is still loading for somebody.
        pinned: It stays whatever comes.
        idle_since: Seconds on the caller's clock at which it was last used.
        load_s: What it would take to load it again; ``None``: nobody knows, its size decides.
        ttl_s: How long it may be idle; ``None``: for ever.
    """

    id: str
    model: str
    needed_bytes: int
    cache_bytes: int = 0
    busy: bool = False
    pinned: bool = False
    idle_since: float = 0.0
    load_s: float | None = None
    ttl_s: float | None = None


class EvictionPlan(msgspec.Struct, frozen=True, kw_only=True):
    """
    What has to happen before a model can be loaded.

    Attributes:
        fits: It can be loaded as soon as ``evict`` have been stopped.
        evict: Ids of idle engines.
        waits_for: Ids of busy engines that must end first; empty with ``fits`` false: it never fits.
        makes_room: Ids of all that must end, ``evict`` or ``waits_for`` and the idle ones beside them. One of these
            that takes something new while another drains would be waited for in its turn, and so on for ever.
        reason: One line for people.
    """

    fits: bool
    reason: str
    evict: tuple[str, ...] = ()
    waits_for: tuple[str, ...] = ()
    must_stop: tuple[str, ...] = ()


def plan_eviction(
    needed_bytes: int, engines: Sequence[LoadedEngine], budget_bytes: int, draining: Collection[str] = frozenset()
) -> EvictionPlan:
    """
    Make room for one more engine.

    Args:
        needed_bytes: What it will take.
        engines: All that hold memory now.
        budget_bytes: What all engines together may take.
        yielding: Ids of those that take nothing new because it waits: it goes on to wait for them, though others
            would be cheaper by now, unless it need not wait at all or they no longer suffice.
    """
    hopeless = why_never_fits(needed_bytes, engines, budget_bytes)
    if hopeless:
        return EvictionPlan(fits=False, reason=hopeless)
    shortfall = needed_bytes + sum(engine.needed_bytes for engine in engines) - budget_bytes
    chosen = _cheapest([engine for engine in engines if not engine.pinned], shortfall)
    if any(engine.busy for engine in chosen) and has_room(needed_bytes, engines, budget_bytes, without=draining):
        chosen = tuple(engine for engine in engines if engine.id in draining)
    ids = tuple(engine.id for engine in chosen)
    busy = [engine for engine in chosen if engine.busy]
    if busy:
        reason = f"waits until {_names(busy)} may be stopped"
        return EvictionPlan(fits=False, reason=reason, waits_for=tuple(engine.id for engine in busy), must_stop=ids)
    reason = f"takes the place of {_names(chosen)}" if chosen else "fits"
    return EvictionPlan(fits=True, reason=reason, evict=ids, must_stop=ids)


def has_room(
    needed_bytes: int, engines: Iterable[LoadedEngine], budget_bytes: int, *, without: Collection[str] = frozenset()
) -> bool:
    """Whether one more engine fits beside all others, those with the ids ``without`` not counted."""
    return needed_bytes + sum(engine.needed_bytes for engine in engines if engine.id not in without) <= budget_bytes


def may_overtake(
    needed_bytes: int, first_bytes: int, going: Collection[str], engines: Sequence[LoadedEngine], budget_bytes: int
) -> bool:
    """
    Whether one more engine may begin before another that came first and waits.

    Args:
        needed_bytes: What it will take.
        first_bytes: What the other will take.
        going: Ids of the engines whose end the other waits for.
        engines: All that hold memory now.
        budget_bytes: What all engines together may take.
    """
    return has_room(needed_bytes, engines, budget_bytes) and has_room(
        needed_bytes + first_bytes, engines, budget_bytes, without=going
    )


def why_never_fits(
    needed_bytes: int, engines: Iterable[LoadedEngine], budget_bytes: int, *, cache_bytes: int = 0
) -> str:
    """
    Why an engine has no room even when it is alone with the pinned ones; empty when it has.

    Args:
        needed_bytes: What it will take.
        engines: All that hold memory now.
        budget_bytes: What all engines together may take.
        cache_bytes: How much of ``needed_bytes`` is its prompt cache; only for what would help.
    """
    pinned = [engine for engine in engines if engine.pinned]
    pinned_bytes = sum(engine.needed_bytes for engine in pinned)
    if needed_bytes + pinned_bytes <= budget_bytes:
        return ""
    limit = f"all engines together may take {_size(budget_bytes)}"
    if needed_bytes > budget_bytes:
        helps = _remedies(needed_bytes, cache_bytes, (), budget_bytes)
        return f"needs {_size(needed_bytes)} of memory and {limit}; {helps} would help"
    beside = f"beside {_names(pinned)} (pinned, {_size(pinned_bytes)})"
    helps = _remedies(needed_bytes, cache_bytes, pinned, budget_bytes)
    return f"needs {_size(needed_bytes)} of memory {beside}, and {limit}; unpinning, or {helps}, would help"


def _remedies(needed_bytes: int, cache_bytes: int, pinned: Sequence[LoadedEngine], budget_bytes: int) -> str:
    """What of its settings makes an engine fit; the setting of the prompt cache is one for all engines."""
    smaller = "a smaller quantisation, less context or fewer slots"
    caches = cache_bytes + sum(engine.cache_bytes for engine in pinned)
    if not caches:
        return smaller
    largest = max([cache_bytes, *(engine.cache_bytes for engine in pinned)])
    smaller_cache = f"a smaller [gateway] cache_ram_mib (now {largest // 1024**2})"
    pinned_bytes = sum(engine.needed_bytes for engine in pinned)
    without_caches = needed_bytes + pinned_bytes - caches <= budget_bytes
    beside_caches = cache_bytes + pinned_bytes < budget_bytes
    if without_caches:
        return f"{smaller_cache}, {smaller}" if beside_caches else smaller_cache
    return smaller if beside_caches else f"{smaller_cache} with {smaller}"


def expired(engines: Iterable[LoadedEngine], now: float) -> tuple[str, ...]:
    """Ids of the engines that nobody has used for longer than they may be idle."""
    return tuple(
        engine.id
        for engine in engines
        if engine.ttl_s is not None and not (engine.busy or engine.pinned) and now - engine.idle_since > engine.ttl_s
    )


#: How bad it is to stop a set: how many are busy; seconds to load them again; last uses, the latest first.
_Cost = tuple[int, float, tuple[float, ...]]


def _cheapest(engines: Sequence[LoadedEngine], shortfall: int) -> tuple[LoadedEngine, ...]:
    """
    The set that frees enough at the least cost; all of them together do.

    Sets grow engine by engine; one that frees no more than a cheaper one is dropped at once, which
    keeps some hundreds of the 2^n.
    """
    if shortfall <= 0:
        return ()
    front: list[tuple[int, _Cost, tuple[LoadedEngine, ...]]] = [(0, (0, 0.0, ()), ())]
    for engine in engines:
        grown = [
            (min(shortfall, freed + engine.needed_bytes), _with(cost, engine), (*chosen, engine))
            for freed, cost, chosen in front
            if freed < shortfall
        ]
        front, candidates = [], sorted(front + grown, key=lambda entry: (-entry[0], entry[1]))
        for entry in candidates:
            if not front or entry[1] < front[-1][1]:
                front.append(entry)
    return front[0][2]


def _with(cost: _Cost, engine: LoadedEngine) -> _Cost:
    busy, load_s, uses = cost
    reload_s = engine.needed_bytes / _TYPICAL_READ_BYTES_PER_S if engine.load_s is None else engine.load_s
    return busy + engine.busy, load_s + reload_s, tuple(sorted((*uses, engine.idle_since), reverse=True))


def _names(engines: Sequence[LoadedEngine]) -> str:
    return " and ".join(engine.model for engine in engines)


def _size(amount: int) -> str:
    return f"{amount / 1e9:.1f} GB" if amount >= 100_000_000 else f"{amount / 1e6:.0f} MB"
