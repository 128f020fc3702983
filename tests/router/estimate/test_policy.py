"""The cost of a prompt on each replica, calculated by hand, and the replica that each strategy chooses."""

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

#: 0.1 s per token with one stream, and half of that more for each further stream.
STEP_CURVE = StepCurve.between({1: 0.1}, 0.5)
DEMAND = Demand(prompt_tokens=500, answer_tokens=100, conversation=7)


def view(name: str = "a", *, slots: int = 2, state: State = State.READY, **fields: object) -> ReplicaView:
    """View of a replica that computes 50 prompt tokens a second."""
    replica = Replica(id=name, url="", model="m", slots=slots, state=state)
    slot = fields.pop("slot", 0)
    return msgspec.structs.replace(
        ReplicaView(replica=replica, prefill_tps=50.0, step_curve=STEP_CURVE), slot=slot, **fields
    )


def test_a_free_replica_costs_the_prefill_of_the_uncached_tokens() -> None:
    found = estimate(DEMAND, view(cached_tokens=400.0))

    assert (found.wait_s, found.prefill_s, found.ttft_s, found.interference_s, found.eviction_s) == (
        0.0,
        2.0,
        2.0,
        0.0,
        0.0,
    )


def test_a_fully_cached_prompt_still_computes_one_token() -> None:
    assert estimate(DEMAND, view(cached_tokens=500.0)).prefill_s == 1 / 50


def test_an_evicted_cache_costs_its_recomputation() -> None:
    assert estimate(DEMAND, view(evicted_tokens=250.0)).eviction_s == 5.0


def test_prefill_includes_the_prompts_ahead() -> None:
    """6 s for the 300 tokens ahead, then 10 s for this prompt's 500."""
    found = estimate(DEMAND, view(running=(PendingWork(300.0, 100.0),)))

    assert (found.wait_s, found.prefill_s) == (0.0, 16.0)


def test_interference_is_half_the_stall_of_running_streams_plus_their_slowdown() -> None:
    """
    The prefill takes 10 s; one stream has 100 tokens left (10 s alone), the other 20 (2 s).

    Beside one more stream, 120 tokens are each 0.05 s slower.
    """
    found = estimate(DEMAND, view(slots=4, running=(PendingWork(0.0, 100.0), PendingWork(0.0, 20.0))))

    assert found.interference_s == pytest.approx(0.5 * (10 + 2) + 0.05 * 120 * 0.05)


def test_a_full_replica_is_free_when_its_first_stream_ends() -> None:
    """Two streams take 0.15 s per token; the second one first computes its prompt, in 1 s."""
    assert free_in_s(view(running=(PendingWork(0.0, 100.0), PendingWork(50.0, 20.0)))) == pytest.approx(1.0 + 20 * 0.15)


def test_free_in_s_counts_the_reserved_requests_ahead() -> None:
    """The slot that is free after 3 s goes to the reserved request: 1 s of prefill, then 10 tokens."""
    running = (PendingWork(0.0, 100.0), PendingWork(0.0, 20.0))
    reserved = (PendingWork(50.0, 10.0),)

    assert free_in_s(view(running=running, reserved=reserved)) == pytest.approx(3.0 + 1.0 + 10 * 0.15)


def test_a_cold_replica_is_free_once_it_is_loaded() -> None:
    found = estimate(DEMAND, view(state=State.COLD, ready_in_s=20.0))

    assert (found.wait_s, found.ttft_s) == (20.0, 30.0)


def test_a_conversation_waits_for_its_cache_if_that_is_faster_than_recomputing() -> None:
    """Prefill takes 1 s with the cache and 10 s without; the wait is 0.5 s, then 20 s."""
    for tokens_left, chosen in ((5.0, "a"), (200.0, "b")):
        with_cache = view("a", slots=1, slot=None, cached_tokens=450.0, running=(PendingWork(0.0, tokens_left),))
        placement = Affinity().choose(DEMAND, [with_cache, view("b")])
        assert placement is not None
        assert (placement.view.replica.id, placement.immediate) == (chosen, chosen == "b")


def test_the_conversation_alone_decides_between_equal_replicas() -> None:
    """Two gateways that see the same fleet agree."""
    views = [view(name) for name in "abcd"]

    def chosen(head: int, views: list[ReplicaView]) -> str:
        placement = Affinity().choose(msgspec.structs.replace(DEMAND, conversation=head), views)
        assert placement is not None
        return placement.view.replica.id

    assert {chosen(head, views) for head in range(50)} == set("abcd")
    assert all(chosen(head, views) == chosen(head, views[::-1]) for head in range(50))


def test_least_busy_compares_only_streams_per_slot() -> None:
    cached = view("a", cached_tokens=500.0, running=(PendingWork(0.0, 1.0),))

    placement = LeastBusy().choose(DEMAND, [cached, view("b", slots=4, running=(PendingWork(0.0, 900.0),))])

    assert placement is not None
    assert placement.view.replica.id == "b"


def test_round_robin_continues_after_the_last_replica_placed() -> None:
    strategy, order = RoundRobin(), []
    for _ in range(5):
        placement = strategy.choose(DEMAND, [view("c"), view("a"), view("b")])
        assert placement is not None
        strategy.placed(placement.view.replica.id)
        order.append(placement.view.replica.id)

    assert order == ["a", "b", "c", "a", "b"]


def test_round_robin_skips_a_replica_without_a_free_slot() -> None:
    busy = view("a", slots=1, slot=None, running=(PendingWork(0.0, 9.0),))

    placement = RoundRobin().choose(DEMAND, [busy, view("b")])

    assert placement is not None
    assert (placement.view.replica.id, placement.immediate) == ("b", True)


@pytest.mark.parametrize("name", STRATEGIES)
def test_no_strategy_chooses_an_unusable_replica(name: str) -> None:
    assert STRATEGIES[name]().choose(DEMAND, [view(state=State.DOWN), view("b", state=State.DRAINING)]) is None
