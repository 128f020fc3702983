"""Contents of slots and of the engine's prompt cache, and what a prompt evicts from them."""

from random import Random

from promptai.router.estimate.cache_index import CacheIndex, Capacity, SlotChoice
from promptai.router.estimate.prefix import WINDOW, Chain, chain

SLOTS = Capacity(slots=2, host_chars=0)


def letters(windows: int, seed: int) -> str:
    """Random text of that many windows; each seed gives a different text."""
    generator = Random(seed)
    return "".join(generator.choices("abcdefgh ", k=windows * WINDOW))


def chain_of(conversation: int, windows: int) -> Chain:
    """Return a chain of that many windows without hashing any text."""
    return Chain(tuple(1000 * conversation + number for number in range(windows)), windows * WINDOW)


ANN, BOB, EVE = (chain(letters(10, seed)) for seed in (1, 2, 3))


def test_nothing_is_cached_on_an_unused_replica() -> None:
    assert SlotChoice(0) == CacheIndex().best_slot("pi", SLOTS, ANN, busy=(), now=0.0)


def test_a_conversation_returns_to_its_slot() -> None:
    index = CacheIndex()
    index.store("pi", SLOTS, 0, BOB, 0.0)
    index.store("pi", SLOTS, 1, ANN, 1.0)
    follow_up = chain(letters(10, 1) + letters(3, 9))

    assert SlotChoice(1, ANN.chars) == index.best_slot("pi", SLOTS, follow_up, busy=(), now=2.0)
    assert SlotChoice(0) == index.best_slot("elsewhere", SLOTS, follow_up, busy=(), now=2.0)


def test_a_new_conversation_prefers_an_empty_slot() -> None:
    index = CacheIndex()
    index.store("pi", SLOTS, 0, ANN, 0.0)

    assert SlotChoice(1) == index.best_slot("pi", SLOTS, BOB, busy=(), now=1.0)


def test_a_new_conversation_takes_the_slot_that_has_been_idle_longest() -> None:
    index = CacheIndex()
    index.store("pi", SLOTS, 0, ANN, 500.0)
    index.store("pi", SLOTS, 1, BOB, 0.0)

    choice = index.best_slot("pi", SLOTS, EVE, busy=(), now=600.0)

    assert choice.slot == 1
    assert 0 < choice.evicted_chars < 0.2 * BOB.chars


def test_a_busy_slot_is_not_chosen_but_its_cached_prefix_is_reported() -> None:
    index = CacheIndex()
    index.store("pi", SLOTS, 0, ANN, 0.0)

    assert SlotChoice(1) == index.best_slot("pi", SLOTS, ANN, busy={0}, now=1.0)
    assert SlotChoice(None, ANN.chars) == index.best_slot("pi", SLOTS, ANN, busy={0, 1}, now=1.0)


def test_a_short_shared_prefix_does_not_justify_an_eviction() -> None:
    """Reusing one window of a system prompt would evict ten of a conversation; the other slot is empty."""
    index, system = CacheIndex(), letters(1, 7)
    index.store("pi", SLOTS, 0, chain(system + letters(10, 1)), 0.0)

    assert SlotChoice(1) == index.best_slot("pi", SLOTS, chain(system + letters(2, 2)), busy=(), now=1.0)


def test_drop_forgets_a_slot_or_the_whole_replica() -> None:
    index = CacheIndex()
    for slot, conversation in enumerate((ANN, BOB)):
        index.store("pi", SLOTS, slot, conversation, 0.0)

    index.drop("pi", 0)
    assert BOB.chars == index.chars("pi")

    index.drop("pi")
    assert index.chars("pi") == 0


def test_a_prompt_cache_holds_more_conversations_than_slots() -> None:
    index, capacity = CacheIndex(), Capacity(slots=1, host_chars=10_000)
    for conversation in (ANN, BOB, EVE):
        index.store("pi", capacity, 0, conversation, 0.0)

    assert [SlotChoice(0, conversation.chars) for conversation in (ANN, BOB, EVE)] == [
        index.best_slot("pi", capacity, conversation, busy=(), now=1.0) for conversation in (ANN, BOB, EVE)
    ]


def test_a_full_prompt_cache_evicts_the_least_recently_used() -> None:
    index, capacity = CacheIndex(), Capacity(slots=1, host_chars=2 * ANN.chars)
    for conversation in (ANN, BOB, EVE):
        index.store("pi", capacity, 0, conversation, 0.0)

    assert [0, BOB.chars, EVE.chars] == [
        index.best_slot("pi", capacity, conversation, busy=(), now=1.0).cached_chars for conversation in (ANN, BOB, EVE)
    ]


def test_best_slot_reports_what_the_prompt_would_evict_from_the_prompt_cache() -> None:
    index, capacity = CacheIndex(), Capacity(slots=1, host_chars=2 * ANN.chars)
    for conversation in (ANN, BOB):
        index.store("pi", capacity, 0, conversation, 0.0)

    assert index.best_slot("pi", capacity, ANN, busy=(), now=1.0).evicted_chars == 0
    assert 0 < index.best_slot("pi", capacity, EVE, busy=(), now=1.0).evicted_chars < ANN.chars


def test_a_continued_conversation_is_stored_once() -> None:
    index, capacity = CacheIndex(), Capacity(slots=1, host_chars=10_000)
    for windows in (3, 5, 10):
        index.store("pi", capacity, 0, chain(letters(10, 1)[: windows * WINDOW]), 0.0)

    assert index.chars("pi") == 10 * WINDOW


def test_dropping_a_slot_keeps_the_prompt_cache() -> None:
    index, capacity = CacheIndex(), Capacity(slots=1, host_chars=10_000)
    index.store("pi", capacity, 0, ANN, 0.0)

    index.drop("pi", 0)

    assert ANN.chars == index.chars("pi")


def test_a_prompt_reuses_the_prefix_it_shares_with_another_conversation() -> None:
    """All conversations begin with the same three windows."""
    index, capacity, system = CacheIndex(), Capacity(slots=1, host_chars=100_000), letters(3, 7)
    for seed in range(20):
        index.store("pi", capacity, 0, chain(system + letters(5, seed)), 0.0)

    assert index.best_slot("pi", capacity, chain(system + letters(5, 99)), busy=(), now=1.0) == SlotChoice(
        0, 3 * WINDOW
    )


def test_at_most_1024_conversations_are_kept() -> None:
    index, capacity = CacheIndex(), Capacity(slots=1, host_chars=10**9)
    for number in range(3000):
        index.store("pi", capacity, 0, chain_of(number, 2), float(number))

    assert index.chars("pi") == 1024 * 2 * WINDOW
    assert [index.best_slot("pi", capacity, chain_of(n, 3), busy=(), now=0.0).cached_chars for n in (0, 2999)] == [
        0,
        2 * WINDOW,
    ]


def test_a_replica_without_its_former_prompt_cache_has_only_its_slots() -> None:
    index = CacheIndex()
    index.store("pi", Capacity(slots=1, host_chars=10_000), 0, ANN, 0.0)
    index.store("pi", SLOTS, 1, BOB, 0.0)

    assert [
        index.best_slot("pi", SLOTS, conversation, busy=(), now=1.0).cached_chars for conversation in (ANN, BOB)
    ] == [0, BOB.chars]
