"""What caches hold: chains, slots, the engine's prompt cache, and who comes back."""

import heapq
from random import Random

import pytest

from promptai.router.prefix import WINDOW, CacheIndex, Chain, Returns, Room, Spot, chain, rendezvous

SLOTS = Room(slots=2, host_chars=0)


def letters(windows: int, seed: int) -> str:
    """A text of so many windows, unlike that of any other seed."""
    generator = Random(seed)
    return "".join(generator.choices("abcdefgh ", k=windows * WINDOW))


def linked(who: int, windows: int) -> Chain:
    """The chain of a conversation of so many windows, without its text."""
    return Chain(tuple(1000 * who + number for number in range(windows)), windows * WINDOW)


ANN, BOB, EVE = (chain(letters(10, seed)) for seed in (1, 2, 3))


def test_texts_that_differ_in_their_first_character_share_nothing() -> None:
    """A KV cache is only good from its beginning."""
    text = letters(10, 1)

    assert chain(text).shared(chain("x" + text[1:])) == 0


@pytest.mark.parametrize("same", [0, 1, 63, 64, 65, 300, 640])
def test_what_is_shared_is_counted_in_whole_windows(same: int) -> None:
    text = letters(10, 1)
    other = text[:same] + letters(10, 2)

    assert same // WINDOW * WINDOW == chain(text).shared(chain(other)) == chain(other).shared(chain(text))


def test_a_text_shorter_than_a_window_has_no_links_and_still_a_head() -> None:
    assert Chain((), 5) == chain("short")
    assert chain("short").head == chain("trust").head != chain("longer").head


def test_text_that_no_encoder_takes_has_a_chain_too() -> None:
    assert len(chain("\ud800" * 2 * WINDOW).links) == 2


def test_nothing_is_cached_where_nothing_was_sent() -> None:
    assert Spot(0) == CacheIndex().spot("pi", SLOTS, ANN, busy=(), now=0.0)


def test_a_conversation_finds_its_slot_again() -> None:
    index = CacheIndex()
    index.hold("pi", SLOTS, 0, BOB, 0.0)
    index.hold("pi", SLOTS, 1, ANN, 1.0)
    more = chain(letters(10, 1) + letters(3, 9))

    assert Spot(1, ANN.chars) == index.spot("pi", SLOTS, more, busy=(), now=2.0)
    assert Spot(0) == index.spot("elsewhere", SLOTS, more, busy=(), now=2.0)


def test_a_new_conversation_takes_the_empty_slot_before_anybodys() -> None:
    index = CacheIndex()
    index.hold("pi", SLOTS, 0, ANN, 0.0)

    assert Spot(1) == index.spot("pi", SLOTS, BOB, busy=(), now=1.0)


def test_a_new_conversation_takes_the_slot_of_whoever_has_been_away_for_longest() -> None:
    index = CacheIndex()
    index.hold("pi", SLOTS, 0, ANN, 500.0)
    index.hold("pi", SLOTS, 1, BOB, 0.0)

    spot = index.spot("pi", SLOTS, EVE, busy=(), now=600.0)

    assert spot.slot == 1
    assert 0 < spot.lost_chars < 0.2 * BOB.chars


def test_a_slot_in_use_is_nobody_elses_and_its_cache_is_told_all_the_same() -> None:
    index = CacheIndex()
    index.hold("pi", SLOTS, 0, ANN, 0.0)

    assert Spot(1) == index.spot("pi", SLOTS, ANN, busy={0}, now=1.0)
    assert Spot(None, ANN.chars) == index.spot("pi", SLOTS, ANN, busy={0, 1}, now=1.0)


def test_a_shared_beginning_is_not_worth_somebodys_conversation() -> None:
    """One window of a system prompt against ten of a conversation that goes on, with an empty slot beside it."""
    index, system = CacheIndex(), letters(1, 7)
    index.hold("pi", SLOTS, 0, chain(system + letters(10, 1)), 0.0)

    assert Spot(1) == index.spot("pi", SLOTS, chain(system + letters(2, 2)), busy=(), now=1.0)


def test_what_is_lost_is_not_found_again() -> None:
    index = CacheIndex()
    for slot, held in enumerate((ANN, BOB)):
        index.hold("pi", SLOTS, slot, held, 0.0)

    index.lose("pi", 0)
    assert BOB.chars == index.chars("pi")

    index.lose("pi")
    assert index.chars("pi") == 0


def test_a_prompt_cache_keeps_more_conversations_than_there_are_slots() -> None:
    index, room = CacheIndex(), Room(slots=1, host_chars=10_000)
    for held in (ANN, BOB, EVE):
        index.hold("pi", room, 0, held, 0.0)

    assert [Spot(0, held.chars) for held in (ANN, BOB, EVE)] == [
        index.spot("pi", room, held, busy=(), now=1.0) for held in (ANN, BOB, EVE)
    ]


def test_a_full_prompt_cache_loses_what_was_used_longest_ago() -> None:
    index, room = CacheIndex(), Room(slots=1, host_chars=2 * ANN.chars)
    for held in (ANN, BOB, EVE):
        index.hold("pi", room, 0, held, 0.0)

    assert [0, BOB.chars, EVE.chars] == [
        index.spot("pi", room, held, busy=(), now=1.0).cached_chars for held in (ANN, BOB, EVE)
    ]


def test_what_a_prompt_pushes_out_of_the_prompt_cache_is_told_before() -> None:
    index, room = CacheIndex(), Room(slots=1, host_chars=2 * ANN.chars)
    for held in (ANN, BOB):
        index.hold("pi", room, 0, held, 0.0)

    assert index.spot("pi", room, ANN, busy=(), now=1.0).lost_chars == 0
    assert 0 < index.spot("pi", room, EVE, busy=(), now=1.0).lost_chars < ANN.chars


def test_a_conversation_that_goes_on_is_kept_once() -> None:
    index, room = CacheIndex(), Room(slots=1, host_chars=10_000)
    for windows in (3, 5, 10):
        index.hold("pi", room, 0, chain(letters(10, 1)[: windows * WINDOW]), 0.0)

    assert index.chars("pi") == 10 * WINDOW


def test_the_loss_of_a_slot_takes_nothing_from_the_prompt_cache() -> None:
    index, room = CacheIndex(), Room(slots=1, host_chars=10_000)
    index.hold("pi", room, 0, ANN, 0.0)

    index.lose("pi", 0)

    assert ANN.chars == index.chars("pi")


def test_who_was_just_here_is_likelier_back_than_who_has_been_away() -> None:
    likely = [Returns().likely(age) for age in (0, 60, 300, 3600)]

    assert sorted(likely, reverse=True) == likely
    assert likely[0] == pytest.approx(0.75)
    assert likely[-1] < 0.001


@pytest.mark.parametrize(("share", "gap_s"), [(0.5, 20.0), (0.9, 20.0), (0.9, 300.0)])
def test_it_is_learned_how_many_come_back_and_when(share: float, gap_s: float) -> None:
    """Exponential pauses; each conversation ends after an answer with a known chance, and another one begins."""
    generator, returns = Random(0), Returns()
    turns = [(generator.expovariate(1 / gap_s), who, 2) for who in range(20)]
    for fresh in range(20, 1500):
        now, who, windows = heapq.heappop(turns)
        returns.asked(linked(who, windows), now)
        returns.answered(linked(who, windows + 2), now)
        goes_on = generator.random() < share
        then = now + generator.expovariate(1 / gap_s)
        heapq.heappush(turns, (then, who, windows + 3) if goes_on else (then, fresh, 2))

    assert returns.gap_s == pytest.approx(gap_s, rel=0.3)
    assert returns.likely(0.0) == pytest.approx(share, abs=0.1)


def test_a_client_that_strips_an_answer_is_recognised_all_the_same() -> None:
    """What the last window held has changed then; the one before it has not."""
    returns, text = Returns(), letters(10, 1)
    returns.answered(chain(text), 0.0)
    before = returns.gap_s

    returns.asked(chain(text[: 10 * WINDOW - 1] + letters(5, 2)), 10_000.0)

    assert returns.gap_s > before


def test_what_is_remembered_of_answers_is_bounded() -> None:
    returns = Returns()
    for number in range(5000):
        returns.answered(chain(letters(3, number)), 0.0)

    assert len(returns._answered) <= 2048


def test_gateways_agree_on_a_replica_without_talking() -> None:
    names = [f"pi-{number}" for number in range(4)]

    assert {rendezvous(7, names)} == {rendezvous(7, list(reversed(names))) for _ in range(3)}


def test_heads_are_spread_over_replicas_and_stay_when_another_leaves() -> None:
    names = [f"pi-{number}" for number in range(4)]
    before = {head: rendezvous(head, names) for head in range(2000)}
    after = {head: rendezvous(head, names[:3]) for head in before}

    shares = [list(before.values()).count(name) for name in names]
    assert max(shares) < 1.2 * min(shares)
    assert all(after[head] == name for head, name in before.items() if name != "pi-3")
