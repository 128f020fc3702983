import itertools
import random
import re
import time

import pytest

from promptai.fleet.placement import LoadedEngine, expired, has_room, may_overtake, plan_eviction, why_never_fits

GB = 1_000_000_000
SMALLER = "a smaller quantisation, less context or fewer slots"
LESS_CACHE = "a smaller [gateway] cache_ram_mib"


def engine(name: str, size: float = 1.0, **settings: object) -> LoadedEngine:
    """One that holds so many GB, idle and quick to load unless it is said."""
    values: dict[str, object] = {"load_s": 10.0, **settings}
    return LoadedEngine(id=name, model=name, needed_bytes=int(size * GB), **values)  # type: ignore[arg-type]


def test_a_model_that_is_larger_than_the_budget_never_fits_and_nothing_goes_for_it() -> None:
    """With both numbers, and what would help."""
    placed = plan_eviction(5 * GB, [engine("a")], 4 * GB)

    assert (placed.fits, placed.evict, placed.waits_for) == (False, (), ())
    assert "needs 5.0 GB" in placed.reason
    assert "4.0 GB" in placed.reason
    assert "smaller quantisation" in placed.reason


def test_a_model_that_has_no_room_beside_a_pinned_one_never_fits() -> None:
    """And the pinned one is named."""
    engines = [engine("kept", 3, pinned=True), engine("a", 1)]

    placed = plan_eviction(2 * GB, engines, 4 * GB)

    assert (placed.fits, placed.evict, placed.waits_for) == (False, (), ())
    assert "kept (pinned, 3.0 GB)" in placed.reason
    assert why_never_fits(2 * GB, engines, 4 * GB) == placed.reason
    assert why_never_fits(1 * GB, engines, 4 * GB) == ""


@pytest.mark.parametrize(
    ("cache", "pinned", "budget", "hint"),
    [
        (0.0, [], 4.0, f"; {SMALLER} would help"),
        (2.0, [], 1.0, f"; {LESS_CACHE} with {SMALLER} would help"),
        (2.0, [], 3.0, f"; {LESS_CACHE}, {SMALLER} would help"),
        (4.5, [], 4.0, f"; {LESS_CACHE} would help"),
        (1.0, [], 3.0, f"; {SMALLER} would help"),
        (0.0, [engine("kept", 3, pinned=True)], 6.0, f"; unpinning, or {SMALLER}, would help"),
        (3.0, [engine("kept", 3, pinned=True)], 5.5, f"; unpinning, or {LESS_CACHE}, would help"),
        (3.0, [engine("kept", 3, pinned=True, cache_bytes=3 * GB)], 5.0, f"; unpinning, or {LESS_CACHE}, would help"),
    ],
)
def test_the_hint_names_what_makes_a_model_fit(
    cache: float, pinned: list[LoadedEngine], budget: float, hint: str
) -> None:
    """Neither a smaller model where its prompt cache alone is too large, nor the cache where that is too small."""
    reason = why_never_fits(5 * GB, pinned, int(budget * GB), cache_bytes=int(cache * GB))

    assert re.sub(r" \(now \d+\)", "", reason).endswith(hint)


def test_nothing_is_evicted_in_vain() -> None:
    """The idle one alone would not make enough room; so it stays, and what is waited for is said."""
    placed = plan_eviction(3 * GB, [engine("idle", 1), engine("busy", 3, busy=True)], 4 * GB)

    assert (placed.fits, placed.evict, placed.waits_for) == (False, (), ("busy",))
    assert placed.reason == "waits until busy may be stopped"


def test_what_fits_evicts_nothing() -> None:
    placed = plan_eviction(1 * GB, [engine("a", 1), engine("b", 2)], 4 * GB)

    assert (placed.fits, placed.evict) == (True, ())


def test_the_model_that_loads_fastest_goes_though_it_was_used_last() -> None:
    engines = [engine("slow", idle_since=0.0, load_s=60.0), engine("fast", idle_since=100.0, load_s=5.0)]

    placed = plan_eviction(1 * GB, engines, 2 * GB)

    assert placed.evict == ("fast",)
    assert placed.reason == "takes the place of fast"


def test_among_equals_the_one_that_was_not_used_for_longest_goes() -> None:
    engines = [engine("newer", idle_since=9.0), engine("older", idle_since=3.0), engine("newest", idle_since=11.0)]

    assert plan_eviction(1 * GB, engines, 3 * GB).evict == ("older",)


def test_one_large_engine_goes_rather_than_three_small_ones_that_take_longer_to_load() -> None:
    small = [engine(name, 1, load_s=5.0) for name in "abc"]

    assert plan_eviction(3 * GB, [*small, engine("large", 3, load_s=12.0)], 6 * GB).evict == ("large",)
    assert plan_eviction(3 * GB, [*small, engine("large", 3, load_s=20.0)], 6 * GB).evict == ("a", "b", "c")


def test_without_a_known_time_the_size_says_what_loading_again_costs() -> None:
    engines = [engine("large", 2, load_s=None), engine("small", 1, load_s=None)]

    assert plan_eviction(1 * GB, engines, 3 * GB).evict == ("small",)


def test_a_busy_engine_is_only_waited_for_when_the_idle_ones_do_not_suffice() -> None:
    """However cheap it were."""
    engines = [engine("busy", 2, busy=True, load_s=0.1), engine("x", load_s=99.0), engine("y", load_s=99.0)]

    assert plan_eviction(2 * GB, engines, 4 * GB).evict == ("x", "y")
    assert plan_eviction(3 * GB, engines, 4 * GB).waits_for == ("busy",)


def test_all_that_must_go_make_room_idle_or_busy() -> None:
    engines = [engine("busy", 2, busy=True), engine("idle", 2), engine("kept", 1, pinned=True)]

    assert plan_eviction(4 * GB, engines, 5 * GB).must_stop == ("busy", "idle")
    assert plan_eviction(2 * GB, engines, 5 * GB).must_stop == ("idle",)
    assert plan_eviction(5 * GB, engines, 5 * GB).must_stop == ()


def test_what_yields_already_is_waited_for_though_another_would_be_cheaper_by_now() -> None:
    """Until nothing needs to be waited for, or it no longer suffices."""
    dear, cheap = engine("dear", 2, busy=True, load_s=60.0), engine("cheap", 2, busy=True, load_s=1.0)

    assert plan_eviction(2 * GB, [dear, cheap], 4 * GB).waits_for == ("cheap",)
    kept = plan_eviction(2 * GB, [dear, cheap], 4 * GB, {"dear", "gone"})
    assert (kept.waits_for, kept.must_stop, kept.reason) == (("dear",), ("dear",), "waits until dear may be stopped")
    assert plan_eviction(2 * GB, [dear, engine("idle", 2)], 4 * GB, {"dear"}).evict == ("idle",)
    assert plan_eviction(3 * GB, [dear, cheap], 4 * GB, {"dear"}).must_stop == ("dear", "cheap")


def test_who_passes_one_that_waits_fits_now_and_leaves_it_its_room() -> None:
    engines = [engine("going", 2, busy=True), engine("stays", 1)]

    assert has_room(1 * GB, engines, 4 * GB)
    assert not has_room(2 * GB, engines, 4 * GB)
    assert has_room(3 * GB, engines, 4 * GB, without={"going"})
    assert may_overtake(1 * GB, 2 * GB, {"going"}, engines, 4 * GB)
    assert not may_overtake(1 * GB, 3 * GB, {"going"}, engines, 4 * GB)
    assert not may_overtake(2 * GB, 1 * GB, {"going"}, engines, 4 * GB)


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_as_cheap_as_the_best_of_all_sets(seed: int) -> None:
    """Against trying them all."""
    rng = random.Random(seed)
    engines = [engine(str(n), rng.randint(1, 5), load_s=rng.randint(1, 30), idle_since=rng.random()) for n in range(8)]
    budget = sum(e.needed_bytes for e in engines)
    needed = rng.randint(1, 12) * GB

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


def test_the_choice_among_forty_engines_takes_no_time() -> None:
    rng = random.Random(1)
    engines = [engine(str(n), rng.random() + 0.1, load_s=rng.random()) for n in range(40)]

    begun = time.perf_counter()
    placed = plan_eviction(10 * GB, engines, sum(e.needed_bytes for e in engines))

    assert placed.fits
    assert time.perf_counter() - begun < 1.0


def test_idle_for_longer_than_allowed_is_expired() -> None:
    """But not while it is busy, nor when it is pinned, nor without a limit."""
    engines = [
        engine("old", ttl_s=60.0),
        engine("busy", ttl_s=60.0, busy=True),
        engine("pinned", ttl_s=60.0, pinned=True),
        engine("recent", ttl_s=60.0, idle_since=41.0),
        engine("for-ever"),
    ]

    assert expired(engines, 100.0) == ("old",)
    assert expired(engines, 60.0) == ()
