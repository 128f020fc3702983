"""Cached conversations that are expected to return, and their weight in the choice of a replica."""

from random import Random

import msgspec
import pytest

from promptai.fleet.replica import Replica
from promptai.router.estimate.cache_index import CacheIndex, Capacity
from promptai.router.estimate.policy import Affinity, Demand, PendingWork, ReplicaView, estimate
from promptai.router.estimate.prefix import WINDOW, chain
from promptai.router.estimate.step_curve import StepCurve

SLOTS, PROMPT_CACHE = Capacity(slots=4, host_chars=0), Capacity(slots=4, host_chars=1_000_000)
TEXTS = ["".join(Random(seed).choices("abcdefgh ", k=10 * WINDOW)) for seed in range(3)]
ANN, BOB, EVE = map(chain, TEXTS)
DEMAND = Demand(prompt_tokens=600, answer_tokens=150, conversation=1)


def index_of_three(capacity: Capacity) -> CacheIndex:
    """Return the index of a replica that has just answered three conversations."""
    index = CacheIndex()
    for slot, conversation in enumerate((ANN, BOB, EVE)):
        index.store("pi", capacity, slot, conversation, 0.0)
    return index


def view(*, cached_tokens: float = 0.0, expected_returns: float = 0.0) -> ReplicaView:
    """View of a replica that computes 60 tokens/s and whose conversations return after a minute on average."""
    replica = Replica(id="pi", url="", model="m", slots=4)
    return ReplicaView(
        replica=replica, slot=0, cached_tokens=cached_tokens, expected_returns=expected_returns, mean_gap_s=60.0
    )


@pytest.mark.parametrize("capacity", [SLOTS, PROMPT_CACHE])
def test_three_quarters_of_the_just_answered_conversations_are_expected_to_return(capacity: Capacity) -> None:
    assert pytest.approx(index_of_three(capacity).expected_returns("pi", busy=(), current=(), now=0.0)) == 0.75 * 3


@pytest.mark.parametrize("capacity", [SLOTS, PROMPT_CACHE])
def test_a_long_idle_conversation_is_not_expected_to_return(capacity: Capacity) -> None:
    index = index_of_three(capacity)

    assert index.expected_returns("pi", busy=(), current=(), now=240.0) < 0.5 * 3
    assert index.expected_returns("pi", busy=(), current=(), now=10_000.0) == 0


@pytest.mark.parametrize("capacity", [SLOTS, PROMPT_CACHE])
def test_a_conversation_that_has_returned_is_no_longer_expected(capacity: Capacity) -> None:
    follow_up = chain(TEXTS[0] + "and what else?")

    expected = index_of_three(capacity).expected_returns("pi", busy=(), current=[follow_up], now=0.0)

    assert expected == pytest.approx(0.75 * 2)


def test_a_conversation_whose_slot_is_in_use_is_not_expected() -> None:
    assert pytest.approx(index_of_three(SLOTS).expected_returns("pi", busy=[1], current=(), now=0.0)) == 0.75 * 2


def test_a_long_prompt_costs_more_where_many_conversations_will_return() -> None:
    """The prefill takes 10 s; with a mean gap of 60 s, 15 % of the four return meanwhile and wait for half of it."""
    found = estimate(DEMAND, view(expected_returns=4.0))

    assert pytest.approx(found.interference_s, rel=0.01) == 4 * 0.1535 * 5


def test_a_short_prompt_costs_hardly_more_where_many_conversations_will_return() -> None:
    short = Demand(prompt_tokens=20, answer_tokens=150, conversation=1)

    assert estimate(short, view(expected_returns=4.0)).interference_s < 0.01


def test_a_conversation_stays_with_its_cache_beside_decoding_streams() -> None:
    """On another replica it would slow down streams as well."""
    running = (PendingWork(0.0, 150.0), PendingWork(0.0, 150.0), PendingWork(0.0, 150.0))
    busy = msgspec.structs.replace(
        view(cached_tokens=550.0), running=running, step_curve=StepCurve.between({1: 0.1}, 0.5)
    )
    idle = ReplicaView(replica=Replica(id="pj", url="", model="m", slots=4), slot=0)

    chosen = Affinity().choose(DEMAND, [busy, idle])

    assert chosen is not None
    assert chosen.view is busy
