"""What a prompt costs on each replica, worked out by hand, and who is chosen for it."""

import msgspec
import pytest

from promptai.fleet.replica import Replica, State
from promptai.router.estimate.policy import (
    STRATEGIES,
    Affinity,
    Demand,
    LeastBusy,
    PendingWork,
    ReplicaView,
    RoundRobin,
    estimate,
    free_in_s,
)
from promptai.router.estimate.step_curve import StepCurve

#: 50 prompt tokens a second, 0.1 s a token alone and half of that more for each further stream.
STEPS = StepCurve.between({1: 0.1}, 0.5)
ASK = Demand(prompt_tokens=500, answer_tokens=100, conversation=7)


def board(name: str = "a", *, slots: int = 2, state: State = State.READY, **fields: object) -> ReplicaView:
    """One replica as a prompt sees it."""
    replica = Replica(id=name, url="", model="m", slots=slots, state=state)
    slot = fields.pop("slot", 0)
    return msgspec.structs.replace(
        ReplicaView(replica=replica, prefill_tps=50.0, step_curve=STEPS), slot=slot, **fields
    )


def test_a_free_board_costs_its_uncached_tokens() -> None:
    found = estimate(ASK, board(cached_tokens=400.0))

    assert (found.wait_s, found.prefill_s, found.ttft_s, found.interference_s, found.eviction_s) == (
        0.0,
        2.0,
        2.0,
        0.0,
        0.0,
    )


def test_a_fully_cached_prompt_still_costs_one_token() -> None:
    assert estimate(ASK, board(cached_tokens=500.0)).prefill_s == 1 / 50


def test_an_eviction_costs_the_prefill_to_restore_it() -> None:
    assert estimate(ASK, board(evicted_tokens=250.0)).eviction_s == 5.0


def test_earlier_prefills_delay_a_prompt() -> None:
    """300 tokens are 6 s, then our 500 are 10 s."""
    found = estimate(ASK, board(running=(PendingWork(300.0, 100.0),)))

    assert (found.wait_s, found.prefill_s) == (0.0, 16.0)


def test_stalled_streams_count_half_and_only_until_they_end() -> None:
    """10 s of ours; one has 100 tokens left (10 s alone), the other 20 (2 s). Slower by 0.05 s for 120 tokens."""
    found = estimate(ASK, board(slots=4, running=(PendingWork(0.0, 100.0), PendingWork(0.0, 20.0))))

    assert found.interference_s == pytest.approx(0.5 * (10 + 2) + 0.05 * 120 * 0.05)


def test_a_full_board_is_free_when_its_first_stream_ends() -> None:
    """Two streams take 0.15 s a token; the second one's prompt is read before, in 1 s."""
    assert free_in_s(board(running=(PendingWork(0.0, 100.0), PendingWork(50.0, 20.0)))) == pytest.approx(
        1.0 + 20 * 0.15
    )


def test_earlier_queued_requests_go_first() -> None:
    """After 3 s one takes the slot for 1 s of reading and 10 tokens; the other slot is free before that."""
    running = (PendingWork(0.0, 100.0), PendingWork(0.0, 20.0))
    waiting = (PendingWork(50.0, 10.0),)

    assert free_in_s(board(running=running, reserved=waiting)) == pytest.approx(3.0 + 1.0 + 10 * 0.15)


def test_a_cold_board_is_free_once_loaded() -> None:
    found = estimate(ASK, board(state=State.COLD, ready_in_s=20.0))

    assert (found.wait_s, found.ttft_s) == (20.0, 30.0)


def test_a_conversation_waits_for_its_cache_rather_than_recompute() -> None:
    """A second here, ten there; and where it would take twenty, it goes there."""
    for left, chosen in ((5.0, "a"), (200.0, "b")):
        home = board("a", slots=1, slot=None, cached_tokens=450.0, running=(PendingWork(0.0, left),))
        placement = Affinity().choose(ASK, [home, board("b")])
        assert placement is not None
        assert (placement.view.replica.id, placement.immediate) == (chosen, chosen == "b")


def test_equal_boards_are_chosen_by_the_conversation_hash() -> None:
    """So that two gateways that see the same fleet agree."""
    views = [board(name) for name in "abcd"]

    def chosen(head: int, views: list[ReplicaView]) -> str:
        placement = Affinity().choose(msgspec.structs.replace(ASK, conversation=head), views)
        assert placement is not None
        return placement.view.replica.id

    assert {chosen(head, views) for head in range(50)} == set("abcd")
    assert all(chosen(head, views) == chosen(head, views[::-1]) for head in range(50))


def test_least_busy_compares_only_streams_per_slot() -> None:
    full_of_cache = board("a", cached_tokens=500.0, running=(PendingWork(0.0, 1.0),))

    placement = LeastBusy().choose(ASK, [full_of_cache, board("b", slots=4, running=(PendingWork(0.0, 900.0),))])

    assert placement is not None
    assert placement.view.replica.id == "b"


def test_round_robin_continues_after_the_last_replica() -> None:
    strategy, order = RoundRobin(), []
    for _ in range(5):
        placement = strategy.choose(ASK, [board("c"), board("a"), board("b")])
        assert placement is not None
        strategy.placed(placement.view.replica.id)
        order.append(placement.view.replica.id)

    assert order == ["a", "b", "c", "a", "b"]


def test_round_robin_skips_replicas_without_a_free_slot() -> None:
    busy = board("a", slots=1, slot=None, running=(PendingWork(0.0, 9.0),))

    placement = RoundRobin().choose(ASK, [busy, board("b")])

    assert placement is not None
    assert (placement.view.replica.id, placement.immediate) == ("b", True)


@pytest.mark.parametrize("name", STRATEGIES)
def test_no_usable_replica_means_no_placement(name: str) -> None:
    assert STRATEGIES[name]().choose(ASK, [board(state=State.DOWN), board("b", state=State.DRAINING)]) is None
