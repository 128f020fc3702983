"""Decide which engines to stop so that another model fits into memory. Pure.

Engines on a board compete for memory, and a limit on the number of models ignores their size: two small
models fit where one large model does not. The cost of an eviction is the time to load the evicted model
again, so the set that reloads fastest is evicted, and among equals the least recently used.

A busy engine is never stopped, because one client would pay for the model of another. Nothing is stopped in
vain: if evictions cannot free enough memory, all engines stay. ``fleet.local`` is the only caller.
"""

from collections.abc import Collection, Iterable, Sequence

import msgspec

#: Read rate for a reload that was never timed: a good SD card.
_TYPICAL_READ_BYTES_PER_S = 80_000_000


class LoadedEngine(msgspec.Struct, frozen=True, kw_only=True):
    """
    An engine that holds memory.

    Attributes:
        id: Replica id.
        model: Model name, for messages.
        needed_bytes: Its share of the budget, ``cache_bytes`` of prompt cache included.
        busy: Answers a request, or is loading for one.
        pinned: Never stopped.
        idle_since: Time of its last use, in seconds on the caller's clock.
        load_s: Seconds to load it again; ``None``: unknown, estimated from its size.
        ttl_s: Idle time after which it expires; ``None``: unlimited.
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
    The steps before a model can be loaded.

    Attributes:
        fits: The model can be loaded once the engines ``evict`` are stopped.
        reason: One line for people.
        evict: Ids of idle engines to stop.
        waits_for: Ids of busy engines that must finish first. Empty while ``fits`` is false: the model never fits.
        must_stop: Ids of all engines to stop, idle ones included. If one of them accepted a request while another
            drains, the load would have to wait for it next, and could wait for ever.
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
    Plan how to make room for one more engine.

    Args:
        needed_bytes: Memory of the new engine.
        engines: All engines that hold memory now.
        budget_bytes: Memory that all engines may take together.
        draining: Ids of engines that already drain for this load. It keeps waiting for them, even if another set has
            become cheaper, unless it no longer has to wait or they no longer free enough.
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
        reason = f"waits for {_names(busy)} to become idle"
        return EvictionPlan(fits=False, reason=reason, waits_for=tuple(engine.id for engine in busy), must_stop=ids)
    reason = f"replaces {_names(chosen)}" if chosen else "fits"
    return EvictionPlan(fits=True, reason=reason, evict=ids, must_stop=ids)


def has_room(
    needed_bytes: int, engines: Iterable[LoadedEngine], budget_bytes: int, *, without: Collection[str] = frozenset()
) -> bool:
    """Whether one more engine fits beside all others except those with the ids ``without``."""
    return needed_bytes + sum(engine.needed_bytes for engine in engines if engine.id not in without) <= budget_bytes


def may_overtake(
    needed_bytes: int, first_bytes: int, stopping: Collection[str], engines: Sequence[LoadedEngine], budget_bytes: int
) -> bool:
    """
    Whether a load may start before the first one in the queue, which waits.

    Args:
        needed_bytes: Memory of the new engine.
        first_bytes: Memory of the engine that waits.
        stopping: Ids of the engines that the first load waits for.
        engines: All engines that hold memory now.
        budget_bytes: Memory that all engines may take together.
    """
    return has_room(needed_bytes, engines, budget_bytes) and has_room(
        needed_bytes + first_bytes, engines, budget_bytes, without=stopping
    )


def why_never_fits(
    needed_bytes: int, engines: Iterable[LoadedEngine], budget_bytes: int, *, cache_bytes: int = 0
) -> str:
    """
    Return why an engine does not fit even beside the pinned engines alone; empty when it fits.

    Args:
        needed_bytes: Memory of the new engine.
        engines: All engines that hold memory now.
        budget_bytes: Memory that all engines may take together.
        cache_bytes: Prompt cache included in ``needed_bytes``; used for the advice only.
    """
    pinned = [engine for engine in engines if engine.pinned]
    pinned_bytes = sum(engine.needed_bytes for engine in pinned)
    if needed_bytes + pinned_bytes <= budget_bytes:
        return ""
    limit = f"the budget of all engines is {_size(budget_bytes)}"
    if needed_bytes > budget_bytes:
        helps = _remedies(needed_bytes, cache_bytes, (), budget_bytes)
        return f"needs {_size(needed_bytes)} of memory, but {limit}; use {helps}"
    beside = f"beside {_names(pinned)} (pinned, {_size(pinned_bytes)})"
    helps = _remedies(needed_bytes, cache_bytes, pinned, budget_bytes)
    return f"needs {_size(needed_bytes)} of memory {beside}, but {limit}; unpin a model or use {helps}"


def _remedies(needed_bytes: int, cache_bytes: int, pinned: Sequence[LoadedEngine], budget_bytes: int) -> str:
    """Settings that would make an engine fit; the prompt cache setting applies to all engines."""
    smaller = "a smaller quantisation, a shorter context or fewer slots"
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
    """Ids of the engines that have been idle for longer than their ``ttl_s``."""
    return tuple(
        engine.id
        for engine in engines
        if engine.ttl_s is not None and not (engine.busy or engine.pinned) and now - engine.idle_since > engine.ttl_s
    )


#: Cost of stopping a set: number of busy engines, seconds to reload them, times of last use (latest first).
_Cost = tuple[int, float, tuple[float, ...]]


def _cheapest(engines: Sequence[LoadedEngine], shortfall: int) -> tuple[LoadedEngine, ...]:
    """
    Return the cheapest set that frees ``shortfall`` bytes; all ``engines`` together must free it.

    Sets grow engine by engine, and a set that frees no more than a cheaper one is dropped at once. That leaves
    some hundreds of the 2^n sets.
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
    return f"{amount / 1024**3:.1f} GiB" if amount >= 100 * 1024**2 else f"{amount / 1024**2:.0f} MiB"
