"""Who is expected back at a board, and what that weighs when a prompt is given to it."""

from random import Random

import msgspec
import pytest

from promptai.fleet.replica import Replica
from promptai.router.estimate.cache_index import CacheIndex, Capacity
from promptai.router.estimate.policy import Affinity, Demand, PendingWork, ReplicaView, estimate
from promptai.router.estimate.prefix import WINDOW, chain
from promptai.router.estimate.step_curve import StepCurve

SLOTS, CACHE = Capacity(slots=4, host_chars=0), Capacity(slots=4, host_chars=1_000_000)
TEXTS = ["".join(Random(seed).choices("abcdefgh ", k=10 * WINDOW)) for seed in range(3)]
ANN, BOB, EVE = map(chain, TEXTS)
ASK = Demand(prompt_tokens=600, answer_tokens=150, conversation=1)


def left(room: Capacity) -> CacheIndex:
    """Three conversations that have just been answered."""
    index = CacheIndex()
    for slot, held in enumerate((ANN, BOB, EVE)):
        index.store("pi", room, slot, held, 0.0)
    return index


def board(*, cached_tokens: float = 0.0, expected_returns: float = 0.0) -> ReplicaView:
    """One that computes 60 tokens a second, and to which people come back after a minute."""
    replica = Replica(id="pi", url="", model="m", slots=4)
    return ReplicaView(
        replica=replica, slot=0, cached_tokens=cached_tokens, expected_returns=expected_returns, mean_gap_s=60.0
    )


@pytest.mark.parametrize("room", [SLOTS, CACHE])
def test_most_just_answered_conversations_are_expected_to_return(room: Capacity) -> None:
    assert pytest.approx(left(room).expected_returns("pi", busy=(), current=(), now=0.0)) == 0.75 * 3


@pytest.mark.parametrize("room", [SLOTS, CACHE])
def test_long_idle_conversations_are_not_expected_to_return(room: Capacity) -> None:
    index = left(room)

    assert index.expected_returns("pi", busy=(), current=(), now=240.0) < 0.5 * 3
    assert index.expected_returns("pi", busy=(), current=(), now=10_000.0) == 0


@pytest.mark.parametrize("room", [SLOTS, CACHE])
def test_a_returned_conversation_is_no_longer_expected(room: Capacity) -> None:
    back = chain(TEXTS[0] + "and what else?")

    assert pytest.approx(left(room).expected_returns("pi", busy=(), current=[back], now=0.0)) == 0.75 * 2


def test_a_conversation_being_evicted_is_not_expected() -> None:
    assert pytest.approx(left(SLOTS).expected_returns("pi", busy=[1], current=(), now=0.0)) == 0.75 * 2


def test_a_long_prompt_avoids_a_board_with_many_expected_returns() -> None:
    """Ten seconds of computing, and with a mean of 60 s a sixth of four come meanwhile and wait for half of it."""
    found = estimate(ASK, board(expected_returns=4.0))

    assert pytest.approx(found.interference_s, rel=0.01) == 4 * 0.1535 * 5


def test_a_short_prompt_ignores_expected_returns() -> None:
    short = Demand(prompt_tokens=20, answer_tokens=150, conversation=1)

    assert estimate(short, board(expected_returns=4.0)).interference_s < 0.01


def test_a_conversation_stays_with_its_cache_beside_decoding_streams() -> None:
    """It would slow others down elsewhere as well."""
    beside = (PendingWork(0.0, 150.0), PendingWork(0.0, 150.0), PendingWork(0.0, 150.0))
    busy = msgspec.structs.replace(
        board(cached_tokens=550.0), running=beside, step_curve=StepCurve.between({1: 0.1}, 0.5)
    )
    idle = ReplicaView(replica=Replica(id="pj", url="", model="m", slots=4), slot=0)

    chosen = Affinity().choose(ASK, [busy, idle])

    assert chosen is not None
    assert chosen.view is busy
