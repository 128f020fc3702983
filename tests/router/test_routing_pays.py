"""Routing pays off: a small simulation on virtual time; ``make bench-routing`` gives the full-size figures.

The limits hold with a margin for each of the seeds 0 to 9; one seed runs here.
"""

import asyncio

import msgspec
import pytest

from support_clock import run_virtually
from support_routing import RULES, Boards, Played, Script, play_before, play_in

#: Each test takes half a second on an idle machine.
pytestmark = pytest.mark.timeout(20)

#: Sixteen users with one conversation each, of about six questions with answers of 80 tokens.
SCRIPT = Script(conversations=16, max_tokens=160)
BOARDS = Boards(answer_tokens=80)
SLOW_SCRIPT = Script(conversations=16, turns=5, think_s=120.0, max_tokens=80)
SLOW_BOARDS = Boards(kind="7b", answer_tokens=40)


@pytest.fixture(scope="module")
def results() -> dict[str, Played]:
    """Results of each strategy with the same conversations."""
    strategies = ("affinity", "least-busy", "round-robin")
    return {name: run_virtually(play_before(name, SCRIPT, BOARDS)) for name in strategies}


def test_ttft_is_much_shorter_than_with_round_robin(results: dict[str, Played]) -> None:
    affinity, other = results["affinity"], results["round-robin"]

    assert other.ttft_s(50) >= 3 * affinity.ttft_s(50)
    assert other.ttft_s(95) >= 2 * affinity.ttft_s(95)


def test_ttft_is_much_shorter_than_with_least_busy(results: dict[str, Played]) -> None:
    affinity, other = results["affinity"], results["least-busy"]

    assert other.ttft_s(50) >= 1.7 * affinity.ttft_s(50)
    assert other.ttft_s(95) >= 1.4 * affinity.ttft_s(95)


def test_throughput_is_no_lower(results: dict[str, Played]) -> None:
    assert results["affinity"].tokens_per_s >= 0.98 * max(result.tokens_per_s for result in results.values())


def test_p95_ttft_is_close_to_an_oracle(results: dict[str, Played]) -> None:
    affinity = results["affinity"]

    assert affinity.ttft_s(95) <= 1.3 * affinity.oracle_s(95, BOARDS.prefill_tps)


def test_all_strategies_get_the_same_requests(results: dict[str, Played]) -> None:
    """The comparison depends on it."""
    affinity, *others = (_requests(result) for result in results.values())

    assert others == [affinity, affinity]


def test_a_prefix_shared_by_all_does_not_attract_all_to_one_replica() -> None:
    script = Script(turns=3, max_tokens=80, think_s=30.0, system=RULES)

    result = run_virtually(play_before("affinity", script, Boards(answer_tokens=40, host_cache=65536)))

    assert result.busiest(4) <= 1.5


def test_unknown_rates_are_learned_and_route_nearly_as_well() -> None:
    """The rates assumed at first are six times as fast as these boards."""
    learned: list[float] = []

    async def without_rates() -> Played:
        async with msgspec.structs.replace(SLOW_BOARDS, known=False).world("affinity").running() as world:
            result = await play_in(world, SLOW_SCRIPT)
            book, fleet = world.fleet_state.book, world.registry.snapshot
            learned.extend(book.prefill_tps(replica) or 0.0 for replica in fleet.replicas)
            return result

    known, learning = run_virtually(play_before("affinity", SLOW_SCRIPT, SLOW_BOARDS)), run_virtually(without_rates())

    assert [pytest.approx(SLOW_BOARDS.prefill_tps, rel=0.1)] * 4 == learned
    assert learning.ttft_s(50) <= 1.5 * known.ttft_s(50)
    assert learning.ttft_s(95) <= 2 * known.ttft_s(95)


def test_no_request_and_no_token_is_lost_when_a_replica_dies_during_answers() -> None:
    script = Script(conversations=16, turns=4, max_tokens=80)
    boards = Boards(answer_tokens=40)
    cut_off: list[int] = []  # requests running on the replica when it was killed

    async def with_outage() -> Played:
        async with boards.world("affinity").running() as world:
            loop = asyncio.get_running_loop()

            def kill() -> None:
                if world.fleet_state.running("pi-2"):
                    cut_off.append(world.fleet_state.running("pi-2"))
                    world.kill("pi-2")
                else:
                    loop.call_later(1, kill)

            loop.call_later(100, kill)
            return await play_in(world, script)

    outage, undisturbed = run_virtually(with_outage()), run_virtually(play_before("affinity", script, boards))

    assert cut_off
    assert _requests(undisturbed) == _requests(outage)


def _requests(result: Played) -> list[tuple[int, int, int, int]]:
    return sorted((exchange.turn, exchange.new, exchange.prompt, exchange.tokens) for exchange in result.exchanges)
