from collections import Counter
from random import Random

import pytest

from promptai.router.schedule.fair_queue import FairQueue


def filled(*items: tuple[str, str, float]) -> FairQueue[str]:
    """Return a queue of items given as (name, key, cost), in order of arrival."""
    queue = FairQueue[str]()
    for name, key, cost in items:
        queue.push(name, key=key, cost=cost, now=0.0)
    return queue


def drained(queue: FairQueue[str], now: float = 0.0) -> list[str]:
    """Take all items in order of service; return their names."""
    taken = []
    while len(queue):
        taken.append(queue.ordered(now)[0])
        queue.take(taken[-1])
    return taken


def test_rejects_an_item_that_is_already_queued() -> None:
    queue = filled(("a", "ann", 1.0))

    with pytest.raises(ValueError, match="already queued"):
        queue.push("a", key="bob", cost=1.0, now=0.0)


@pytest.mark.parametrize("cost", [0.0, -1.0, float("nan")])
def test_rejects_a_cost_that_is_not_above_0(cost: float) -> None:
    with pytest.raises(ValueError, match="must be above 0"):
        FairQueue[str]().push("a", key="ann", cost=cost, now=0.0)


def test_an_item_that_is_not_queued_has_no_position_and_cannot_be_taken() -> None:
    queue = filled(("a", "ann", 1.0))

    assert queue.remove("a")
    assert not queue.remove("a")
    with pytest.raises(KeyError):
        queue.position("a", 0.0)
    with pytest.raises(KeyError):
        queue.take("a")


def test_items_of_one_key_keep_their_order() -> None:
    assert drained(filled(("a1", "ann", 9.0), ("a2", "ann", 1.0), ("a3", "ann", 5.0))) == ["a1", "a2", "a3"]


def test_keys_alternate() -> None:
    queue = filled(*[(f"a{number}", "ann", 10.0) for number in range(4)], ("b0", "bob", 10.0), ("b1", "bob", 10.0))

    assert drained(queue) == ["a0", "b0", "a1", "b1", "a2", "a3"]


def test_a_key_with_cheap_items_gets_more_turns() -> None:
    queue = filled(("a0", "ann", 30.0), ("a1", "ann", 30.0), *[(f"b{number}", "bob", 10.0) for number in range(5)])

    assert drained(queue) == ["a0", "b0", "b1", "b2", "a1", "b3", "b4"]


def test_position_counts_the_items_ahead() -> None:
    queue = filled(("a0", "ann", 10.0), ("a1", "ann", 10.0), ("b0", "bob", 10.0))

    assert [queue.position(name, 0.0) for name in ("a0", "a1", "b0")] == [0, 2, 1]
    assert len(queue) == 3
    assert "a1" in queue


def test_a_removed_item_is_not_charged() -> None:
    """Ann cancels two expensive requests; her cheap one is then level with Bob's."""
    queue = filled(("a0", "ann", 500.0), ("a1", "ann", 500.0), ("a2", "ann", 10.0), ("b0", "bob", 10.0))
    queue.remove("a0")
    queue.remove("a1")

    assert queue.ordered(0.0) == ["a2", "b0"]


def test_an_idle_key_gains_no_credit() -> None:
    queue = filled(*[(f"a{number}", "ann", 10.0) for number in range(20)])
    for number in range(10):
        queue.take(f"a{number}")
    for number in range(5):
        queue.push(f"b{number}", key="bob", cost=10.0, now=0.0)

    assert queue.ordered(0.0)[:4] == ["b0", "a10", "b1", "a11"]


def test_taking_a_late_item_does_not_put_newcomers_behind_earlier_ones() -> None:
    """Only Ann's last item can be placed; Bob, arriving afterwards, is not behind her other 99."""
    queue = filled(*[(f"a{number}", "ann", 10.0) for number in range(100)])
    queue.take("a99")
    queue.push("b0", key="bob", cost=10.0, now=0.0)

    assert queue.position("b0", 0.0) == 0


def test_a_key_that_waits_for_its_model_gains_no_credit() -> None:
    queue = filled(*[(f"a{number}", "ann", 10.0) for number in range(50)])
    for number in range(30):
        queue.push(f"b{number}", key="bob", cost=10.0, now=0.0)
        queue.take(f"b{number}")
    queue.push("c0", key="cid", cost=10.0, now=0.0)

    assert queue.ordered(0.0)[:3] == ["a0", "c0", "a1"]


def test_settle_charges_the_real_cost() -> None:
    """Ann's answer was 20 tokens longer than estimated, so Bob gets two extra turns before her next."""
    queue = filled(("a0", "ann", 10.0), ("a1", "ann", 10.0), *[(f"b{number}", "bob", 10.0) for number in range(4)])
    queue.take("a0")
    queue.settle("ann", 20.0)

    assert queue.ordered(0.0) == ["b0", "b1", "b2", "a1", "b3"]


def test_settling_an_unknown_key_starts_at_the_virtual_time() -> None:
    """The virtual time is 1000; Cid and Dan exceeded their estimates by 20 and 10 and start that far behind it."""
    queue = filled(("a0", "ann", 1000.0), ("a1", "ann", 10.0))
    queue.take("a0")
    queue.take("a1")
    queue.settle("cid", 20.0)
    queue.settle("dan", 10.0)
    for name in ("cid", "dan", "eve"):
        queue.push(name, key=name, cost=10.0, now=0.0)

    assert queue.ordered(0.0) == ["eve", "dan", "cid"]


def test_a_refund_brings_a_key_forward_but_earns_no_credit() -> None:
    queue = filled(("a0", "ann", 100.0), *[(f"b{number}", "bob", 10.0) for number in range(12)])
    queue.take("a0")
    queue.take("b0")
    queue.settle("ann", -95.0)
    queue.push("a1", key="ann", cost=10.0, now=0.0)
    queue.push("a2", key="ann", cost=10.0, now=0.0)
    queue.settle("ann", -1000.0)

    assert [name for name in drained(queue)[:3] if name.startswith("a")] == ["a1", "a2"]


def test_batch_items_come_after_interactive_ones_until_their_patience_ends() -> None:
    queue = FairQueue[str](patience_s=300.0)
    queue.push("batch", key="night", cost=10.0, batch=True, now=0.0)
    queue.push("late", key="bob", cost=10.0, now=299.0)

    assert queue.ordered(299.9) == ["late", "batch"]
    assert queue.ordered(300.0) == ["batch", "late"]


def test_yields_is_true_only_for_patient_batch_items() -> None:
    queue = FairQueue[str](patience_s=300.0)
    queue.push("batch", key="night", cost=10.0, batch=True, now=0.0)
    queue.push("again", key="night", cost=10.0, batch=True, first=True, now=0.0)
    queue.push("interactive", key="bob", cost=10.0, now=0.0)

    assert [queue.yields(name, 299.9) for name in ("batch", "again", "interactive")] == [True, False, False]
    assert not queue.yields("batch", 300.0)
    with pytest.raises(KeyError):
        queue.yields("unknown", 0.0)


def test_batch_items_past_their_patience_alternate_with_interactive_ones() -> None:
    """The patience of a thousand items ends at once; an interactive item that arrives then waits for one of them."""
    queue = FairQueue[str](patience_s=300.0)
    for number in range(1000):
        queue.push(f"n{number}", key="night", cost=10.0, batch=True, now=0.0)
    for number in range(20):
        queue.push(f"a{number}", key="ann", cost=10.0, now=1.0)
        queue.take(f"a{number}")
    queue.push("b0", key="bob", cost=10.0, now=400.0)

    assert queue.ordered(400.0)[:3] == ["n0", "b0", "n1"]


def remembered_keys(queue: FairQueue[int], number: int) -> int:
    """
    Number of keys whose finish tag the queue still has, among the served keys ``once-0`` to ``once-{number - 1}``.

    Pushes an item for each of them and one for a new key; remembered keys are those behind the new one.
    """
    for key in range(number):
        queue.push(number + key, key=f"once-{key}", cost=10.0, now=0.0)
    queue.push(2 * number, key="newcomer", cost=10.0, now=0.0)
    return len(queue) - 1 - queue.position(2 * number, 0.0)


def test_memory_stays_flat_when_every_key_is_used_once() -> None:
    """One item stays queued throughout, so the queue is never empty."""
    queue = FairQueue[int](remembered=100)
    queue.push(-1, key="stuck", cost=10.0, now=0.0)
    for number in range(100_000):
        queue.push(number, key=f"once-{number}", cost=10.0, now=0.0)
        queue.take(number)

    assert queue.ordered(0.0) == [-1]
    assert remembered_keys(queue, 100_000) == 100


def test_memory_stays_flat_when_unknown_keys_are_settled() -> None:
    queue = FairQueue[int](remembered=100)
    for number in range(1000):
        queue.settle(f"once-{number}", 10.0)

    assert remembered_keys(queue, 1000) == 100


@pytest.mark.parametrize("seed", range(8))
def test_a_new_key_waits_for_at_most_one_item_of_a_key_with_a_thousand(seed: int) -> None:
    generator = Random(seed)
    queue = FairQueue[str]()
    for number in range(1000):
        queue.push(f"heavy{number}", key="heavy", cost=generator.uniform(1.0, 2000.0), now=0.0)
    for visit in range(20):
        for _ in range(generator.randrange(4)):
            queue.take(queue.ordered(0.0)[0])
        queue.push(f"light{visit}", key=f"light{visit}", cost=generator.uniform(1.0, 2000.0), now=0.0)

        assert f"light{visit}" in queue.ordered(0.0)[:2]
        queue.take(f"light{visit}")


@pytest.mark.parametrize("seed", range(8))
def test_a_returning_key_waits_for_at_most_its_last_cost_plus_one_item(seed: int) -> None:
    generator, last_cost, max_cost = Random(seed), 0.0, 2000.0
    queue = FairQueue[str]()
    costs = {f"heavy{number}": generator.uniform(1.0, max_cost) for number in range(1000)}
    for name, cost in costs.items():
        queue.push(name, key="heavy", cost=cost, now=0.0)
    for visit in range(20):
        cost = generator.uniform(1.0, max_cost)
        queue.push(f"light{visit}", key="light", cost=cost, now=0.0)
        served_before = 0.0
        while (head := queue.ordered(0.0)[0]) != f"light{visit}":
            queue.take(head)
            served_before += costs[head]
        queue.take(head)

        assert served_before <= last_cost + max_cost
        last_cost = cost


@pytest.mark.parametrize("seed", range(8))
def test_service_of_backlogged_keys_never_differs_by_more_than_one_item(seed: int) -> None:
    """At every moment, for random costs and random cancellations."""
    generator, max_cost = Random(seed), 500.0
    queue = FairQueue[int]()
    keys: dict[int, str] = {}
    costs: dict[int, float] = {}
    served: Counter[str] = Counter()
    shares: dict[str, float] = dict.fromkeys("abcd", 0.0)

    def push(key: str) -> None:
        number = len(keys)
        keys[number], costs[number] = key, generator.uniform(1.0, max_cost)
        queue.push(number, key=key, cost=costs[number], now=0.0)

    for key in "abcd" * 4:
        push(key)
    for _ in range(1000):
        if generator.random() < 0.1:
            cancelled = generator.choice(queue.ordered(0.0))
            queue.remove(cancelled)
            push(keys[cancelled])
        head = queue.ordered(0.0)[0]
        queue.take(head)
        served[keys[head]] += 1
        shares[keys[head]] += costs[head]
        push(keys[head])
        assert max(shares.values()) - min(shares.values()) <= max_cost

    assert min(served.values()) > 200


@pytest.mark.parametrize("seed", range(4))
def test_a_batch_item_waits_hardly_longer_than_its_patience(seed: int) -> None:
    """
    For an hour, three keys submit more than the one server can serve.

    A batch item past its patience is served next, after the item in service and batch items past theirs earlier.
    """
    generator, now, number = Random(seed), 0.0, 0
    queue = FairQueue[int](patience_s=300.0)
    since: dict[int, float] = {}
    waits: list[float] = []
    while now < 3600.0:
        queue.push(number, key=generator.choice("abc"), cost=100.0, now=now)
        if len(queue) > 60:
            queue.remove(number)
        if number % 40 == 0:
            since[-number - 1] = now
            queue.push(-number - 1, key="night", cost=100.0, batch=True, now=now)
        head = queue.ordered(now)[0]
        queue.take(head)
        if head < 0:
            waits.append(now - since.pop(head))
        now += generator.uniform(1.0, 9.0)
        number += 1
        if number % 2:
            queue.push(number + 1_000_000, key=generator.choice("abc"), cost=100.0, now=now)

    assert len(waits) > 10
    assert min(waits) > 0.0
    assert max(waits) <= 300.0 + 3 * 9.0
    assert all(now - arrival <= 300.0 + 3 * 9.0 for arrival in since.values())
