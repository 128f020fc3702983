"""What caches hold: slots, the engine's prompt cache, and what is pushed out."""

from random import Random

from promptai.router.estimate.cache_index import CacheIndex, Capacity, SlotChoice
from promptai.router.estimate.prefix import WINDOW, Chain, chain

SLOTS = Capacity(slots=2, host_chars=0)


def letters(windows: int, seed: int) -> str:
    """A text of so many windows, unlike that of any other seed."""
    generator = Random(seed)
    return "".join(generator.choices("abcdefgh ", k=windows * WINDOW))


def linked(who: int, windows: int) -> Chain:
    """The chain of a conversation of so many windows, without its text."""
    return Chain(tuple(1000 * who + number for number in range(windows)), windows * WINDOW)


ANN, BOB, EVE = (chain(letters(10, seed)) for seed in (1, 2, 3))


def test_a_replica_without_requests_has_nothing_cached() -> None:
    assert SlotChoice(0) == CacheIndex().best_slot("pi", SLOTS, ANN, busy=(), now=0.0)


def test_a_conversation_returns_to_its_slot() -> None:
    index = CacheIndex()
    index.store("pi", SLOTS, 0, BOB, 0.0)
    index.store("pi", SLOTS, 1, ANN, 1.0)
    more = chain(letters(10, 1) + letters(3, 9))

    assert SlotChoice(1, ANN.chars) == index.best_slot("pi", SLOTS, more, busy=(), now=2.0)
    assert SlotChoice(0) == index.best_slot("elsewhere", SLOTS, more, busy=(), now=2.0)


def test_a_new_conversation_prefers_an_empty_slot() -> None:
    index = CacheIndex()
    index.store("pi", SLOTS, 0, ANN, 0.0)

    assert SlotChoice(1) == index.best_slot("pi", SLOTS, BOB, busy=(), now=1.0)


def test_a_new_conversation_takes_the_slot_unused_for_longest() -> None:
    index = CacheIndex()
    index.store("pi", SLOTS, 0, ANN, 500.0)
    index.store("pi", SLOTS, 1, BOB, 0.0)

    spot = index.best_slot("pi", SLOTS, EVE, busy=(), now=600.0)

    assert spot.slot == 1
    assert 0 < spot.evicted_chars < 0.2 * BOB.chars


def test_a_busy_slot_is_not_chosen_but_its_cache_is_reported() -> None:
    index = CacheIndex()
    index.store("pi", SLOTS, 0, ANN, 0.0)

    assert SlotChoice(1) == index.best_slot("pi", SLOTS, ANN, busy={0}, now=1.0)
    assert SlotChoice(None, ANN.chars) == index.best_slot("pi", SLOTS, ANN, busy={0, 1}, now=1.0)


def test_a_shared_prefix_does_not_evict_another_conversation() -> None:
    """One window of a system prompt against ten of a conversation that goes on, with an empty slot beside it."""
    index, system = CacheIndex(), letters(1, 7)
    index.store("pi", SLOTS, 0, chain(system + letters(10, 1)), 0.0)

    assert SlotChoice(1) == index.best_slot("pi", SLOTS, chain(system + letters(2, 2)), busy=(), now=1.0)


def test_a_dropped_conversation_is_not_found() -> None:
    index = CacheIndex()
    for slot, held in enumerate((ANN, BOB)):
        index.store("pi", SLOTS, slot, held, 0.0)

    index.drop("pi", 0)
    assert BOB.chars == index.chars("pi")

    index.drop("pi")
    assert index.chars("pi") == 0


def test_a_prompt_cache_holds_more_conversations_than_slots() -> None:
    index, room = CacheIndex(), Capacity(slots=1, host_chars=10_000)
    for held in (ANN, BOB, EVE):
        index.store("pi", room, 0, held, 0.0)

    assert [SlotChoice(0, held.chars) for held in (ANN, BOB, EVE)] == [
        index.best_slot("pi", room, held, busy=(), now=1.0) for held in (ANN, BOB, EVE)
    ]


def test_a_full_prompt_cache_evicts_the_least_recently_used() -> None:
    index, room = CacheIndex(), Capacity(slots=1, host_chars=2 * ANN.chars)
    for held in (ANN, BOB, EVE):
        index.store("pi", room, 0, held, 0.0)

    assert [0, BOB.chars, EVE.chars] == [
        index.best_slot("pi", room, held, busy=(), now=1.0).cached_chars for held in (ANN, BOB, EVE)
    ]


def test_the_expected_eviction_from_the_prompt_cache_is_reported() -> None:
    index, room = CacheIndex(), Capacity(slots=1, host_chars=2 * ANN.chars)
    for held in (ANN, BOB):
        index.store("pi", room, 0, held, 0.0)

    assert index.best_slot("pi", room, ANN, busy=(), now=1.0).evicted_chars == 0
    assert 0 < index.best_slot("pi", room, EVE, busy=(), now=1.0).evicted_chars < ANN.chars


def test_a_continued_conversation_is_stored_once() -> None:
    index, room = CacheIndex(), Capacity(slots=1, host_chars=10_000)
    for windows in (3, 5, 10):
        index.store("pi", room, 0, chain(letters(10, 1)[: windows * WINDOW]), 0.0)

    assert index.chars("pi") == 10 * WINDOW


def test_dropping_a_slot_keeps_the_prompt_cache() -> None:
    index, room = CacheIndex(), Capacity(slots=1, host_chars=10_000)
    index.store("pi", room, 0, ANN, 0.0)

    index.drop("pi", 0)

    assert ANN.chars == index.chars("pi")


def test_a_prompt_reuses_a_prefix_of_another_conversation() -> None:
    """Two people with the same first three windows."""
    index, room, system = CacheIndex(), Capacity(slots=1, host_chars=100_000), letters(3, 7)
    for seed in range(20):
        index.store("pi", room, 0, chain(system + letters(5, seed)), 0.0)

    assert index.best_slot("pi", room, chain(system + letters(5, 99)), busy=(), now=1.0) == SlotChoice(0, 3 * WINDOW)


def test_endless_short_prompts_take_no_memory_and_no_time() -> None:
    index, room = CacheIndex(), Capacity(slots=1, host_chars=10**9)
    for number in range(3000):
        index.store("pi", room, 0, linked(number, 2), float(number))

    assert index.chars("pi") == 1024 * 2 * WINDOW
    assert [index.best_slot("pi", room, linked(n, 3), busy=(), now=0.0).cached_chars for n in (0, 2999)] == [
        0,
        2 * WINDOW,
    ]


def test_a_replica_without_its_prompt_cache_is_tracked_by_slots() -> None:
    index = CacheIndex()
    index.store("pi", Capacity(slots=1, host_chars=10_000), 0, ANN, 0.0)
    index.store("pi", SLOTS, 1, BOB, 0.0)

    assert [index.best_slot("pi", SLOTS, one, busy=(), now=1.0).cached_chars for one in (ANN, BOB)] == [0, BOB.chars]
