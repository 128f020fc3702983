import itertools
import random
import re
import time

import pytest

from promptai.fleet.placement import LoadedEngine, expired, has_room, may_overtake, plan_eviction, why_never_fits

GIB = 1024**3
SMALLER = "a smaller quantisation, a shorter context or fewer slots"
LESS_CACHE = "a smaller [gateway] cache_ram_mib"


def engine(name: str, size: float = 1.0, **settings: object) -> LoadedEngine:
    """An engine of ``size`` GiB, idle and quick to load by default."""
    values: dict[str, object] = {"load_s": 10.0, **settings}
    return LoadedEngine(id=name, model=name, needed_bytes=int(size * GIB), **values)  # type: ignore[arg-type]


def test_a_model_larger_than_the_budget_never_fits_and_evicts_nothing() -> None:
    """The reason has both figures and advice."""
    placed = plan_eviction(5 * GIB, [engine("a")], 4 * GIB)

    assert (placed.fits, placed.evict, placed.waits_for) == (False, (), ())
    assert "needs 5.0 GiB" in placed.reason
    assert "4.0 GiB" in placed.reason
    assert "smaller quantisation" in placed.reason


def test_a_model_that_does_not_fit_beside_a_pinned_one_never_fits() -> None:
    """The reason names the pinned model."""
    engines = [engine("kept", 3, pinned=True), engine("a", 1)]

    placed = plan_eviction(2 * GIB, engines, 4 * GIB)

    assert (placed.fits, placed.evict, placed.waits_for) == (False, (), ())
    assert "kept (pinned, 3.0 GiB)" in placed.reason
    assert why_never_fits(2 * GIB, engines, 4 * GIB) == placed.reason
    assert why_never_fits(1 * GIB, engines, 4 * GIB) == ""


@pytest.mark.parametrize(
    ("cache", "pinned", "budget", "hint"),
    [
        (0.0, [], 4.0, f"; use {SMALLER}"),
        (2.0, [], 1.0, f"; use {LESS_CACHE} with {SMALLER}"),
        (2.0, [], 3.0, f"; use {LESS_CACHE}, {SMALLER}"),
        (4.5, [], 4.0, f"; use {LESS_CACHE}"),
        (1.0, [], 3.0, f"; use {SMALLER}"),
        (0.0, [engine("kept", 3, pinned=True)], 6.0, f"; unpin a model or use {SMALLER}"),
        (3.0, [engine("kept", 3, pinned=True)], 5.5, f"; unpin a model or use {LESS_CACHE}"),
        (3.0, [engine("kept", 3, pinned=True, cache_bytes=3 * GIB)], 5.0, f"; unpin a model or use {LESS_CACHE}"),
    ],
)
def test_advises_only_settings_that_make_the_model_fit(
    cache: float, pinned: list[LoadedEngine], budget: float, hint: str
) -> None:
    """Neither a smaller model if the prompt cache alone is too large, nor a smaller cache if that does not suffice."""
    reason = why_never_fits(5 * GIB, pinned, int(budget * GIB), cache_bytes=int(cache * GIB))

    assert re.sub(r" \(now \d+\)", "", reason).endswith(hint)


def test_evicts_nothing_in_vain() -> None:
    """The idle engine alone would not free enough memory, so it stays; the reason names the busy one."""
    placed = plan_eviction(3 * GIB, [engine("idle", 1), engine("busy", 3, busy=True)], 4 * GIB)

    assert (placed.fits, placed.evict, placed.waits_for) == (False, (), ("busy",))
    assert placed.reason == "waits for busy to become idle"


def test_a_model_that_fits_evicts_nothing() -> None:
    placed = plan_eviction(1 * GIB, [engine("a", 1), engine("b", 2)], 4 * GIB)

    assert (placed.fits, placed.evict) == (True, ())


def test_evicts_the_model_that_reloads_fastest_even_if_used_last() -> None:
    engines = [engine("slow", idle_since=0.0, load_s=60.0), engine("fast", idle_since=100.0, load_s=5.0)]

    placed = plan_eviction(1 * GIB, engines, 2 * GIB)

    assert placed.evict == ("fast",)
    assert placed.reason == "replaces fast"


def test_evicts_the_least_recently_used_among_equals() -> None:
    engines = [engine("newer", idle_since=9.0), engine("older", idle_since=3.0), engine("newest", idle_since=11.0)]

    assert plan_eviction(1 * GIB, engines, 3 * GIB).evict == ("older",)


def test_evicts_one_large_engine_rather_than_three_that_reload_slower() -> None:
    small = [engine(name, 1, load_s=5.0) for name in "abc"]

    assert plan_eviction(3 * GIB, [*small, engine("large", 3, load_s=12.0)], 6 * GIB).evict == ("large",)
    assert plan_eviction(3 * GIB, [*small, engine("large", 3, load_s=20.0)], 6 * GIB).evict == ("a", "b", "c")


def test_estimates_an_unknown_load_time_from_the_size() -> None:
    engines = [engine("large", 2, load_s=None), engine("small", 1, load_s=None)]

    assert plan_eviction(1 * GIB, engines, 3 * GIB).evict == ("small",)


def test_waits_for_a_busy_engine_only_if_idle_ones_do_not_suffice() -> None:
    """Even if the busy engine reloads faster."""
    engines = [engine("busy", 2, busy=True, load_s=0.1), engine("x", load_s=99.0), engine("y", load_s=99.0)]

    assert plan_eviction(2 * GIB, engines, 4 * GIB).evict == ("x", "y")
    assert plan_eviction(3 * GIB, engines, 4 * GIB).waits_for == ("busy",)


def test_lists_all_engines_that_must_stop_idle_or_busy() -> None:
    engines = [engine("busy", 2, busy=True), engine("idle", 2), engine("kept", 1, pinned=True)]

    assert plan_eviction(4 * GIB, engines, 5 * GIB).must_stop == ("busy", "idle")
    assert plan_eviction(2 * GIB, engines, 5 * GIB).must_stop == ("idle",)
    assert plan_eviction(5 * GIB, engines, 5 * GIB).must_stop == ()


def test_keeps_waiting_for_draining_engines_when_others_become_cheaper() -> None:
    """Unless it no longer has to wait, or they no longer suffice."""
    dear, cheap = engine("dear", 2, busy=True, load_s=60.0), engine("cheap", 2, busy=True, load_s=1.0)

    assert plan_eviction(2 * GIB, [dear, cheap], 4 * GIB).waits_for == ("cheap",)
    kept = plan_eviction(2 * GIB, [dear, cheap], 4 * GIB, {"dear", "gone"})
    assert (kept.waits_for, kept.must_stop, kept.reason) == (("dear",), ("dear",), "waits for dear to become idle")
    assert plan_eviction(2 * GIB, [dear, engine("idle", 2)], 4 * GIB, {"dear"}).evict == ("idle",)
    assert plan_eviction(3 * GIB, [dear, cheap], 4 * GIB, {"dear"}).must_stop == ("dear", "cheap")


def test_overtaking_requires_room_now_and_room_for_the_waiting_load() -> None:
    engines = [engine("going", 2, busy=True), engine("stays", 1)]

    assert has_room(1 * GIB, engines, 4 * GIB)
    assert not has_room(2 * GIB, engines, 4 * GIB)
    assert has_room(3 * GIB, engines, 4 * GIB, without={"going"})
    assert may_overtake(1 * GIB, 2 * GIB, {"going"}, engines, 4 * GIB)
    assert not may_overtake(1 * GIB, 3 * GIB, {"going"}, engines, 4 * GIB)
    assert not may_overtake(2 * GIB, 1 * GIB, {"going"}, engines, 4 * GIB)


@pytest.mark.parametrize("seed", range(20))
def test_the_chosen_set_is_as_cheap_as_the_best_of_all_sets(seed: int) -> None:
    """Compared with an exhaustive search."""
    rng = random.Random(seed)
    engines = [engine(str(n), rng.randint(1, 5), load_s=rng.randint(1, 30), idle_since=rng.random()) for n in range(8)]
    budget = sum(e.needed_bytes for e in engines)
    needed = rng.randint(1, 12) * GIB

    def cost(chosen: tuple[LoadedEngine, ...]) -> tuple[float, list[float]]:
        return sum(e.load_s or 0 for e in chosen), sorted((e.idle_since for e in chosen), reverse=True)

    enough = [
        chosen
        for size in range(9)
        for chosen in itertools.combinations(engines, size)
        if sum(e.needed_bytes for e in chosen) >= needed
    ]
    best = min(enough, key=cost)

    assert plan_eviction(needed, engines, budget).evict == tuple(e.id for e in best)


@pytest.mark.timed
def test_choosing_among_forty_engines_is_fast() -> None:
    rng = random.Random(1)
    engines = [engine(str(n), rng.random() + 0.1, load_s=rng.random()) for n in range(40)]

    begun = time.perf_counter()
    placed = plan_eviction(10 * GIB, engines, sum(e.needed_bytes for e in engines))

    assert placed.fits
    assert time.perf_counter() - begun < 1.0


def test_expires_engines_that_are_idle_for_too_long() -> None:
    """But no engine that is busy, pinned or without a limit."""
    engines = [
        engine("old", ttl_s=60.0),
        engine("busy", ttl_s=60.0, busy=True),
        engine("pinned", ttl_s=60.0, pinned=True),
        engine("recent", ttl_s=60.0, idle_since=41.0),
        engine("for-ever"),
    ]

    assert expired(engines, 100.0) == ("old",)
    assert expired(engines, 60.0) == ()
