"""That routing pays, at small size and on virtual time; the figures of full size are ``make bench-routing``'s.

The limits hold for each of the seeds 0 to 9 with a margin; one of them is played here.
"""

import asyncio

import msgspec
import pytest

from support_clock import run_virtually
from support_routing import RULES, Boards, Played, Script, play_before, play_in

#: Half a second each where nobody else computes.
pytestmark = pytest.mark.timeout(20)

#: Sixteen people in one conversation each, of about six questions and answers of 80 tokens.
SCRIPT = Script(conversations=16, max_tokens=160)
BOARDS = Boards(answer_tokens=80)
SLOW_SCRIPT = Script(conversations=16, turns=5, think_s=120.0, max_tokens=80)
SLOW_BOARDS = Boards(kind="7b", answer_tokens=40)


@pytest.fixture(scope="module")
def afternoons() -> dict[str, Played]:
    """The same people before each strategy."""
    strategies = ("affinity", "least-busy", "round-robin")
    return {name: run_virtually(play_before(name, SCRIPT, BOARDS)) for name in strategies}


def test_first_tokens_are_much_earlier_than_with_round_robin(afternoons: dict[str, Played]) -> None:
    ours, other = afternoons["affinity"], afternoons["round-robin"]

    assert other.ttft_s(50) >= 3 * ours.ttft_s(50)
    assert other.ttft_s(95) >= 2 * ours.ttft_s(95)


def test_first_tokens_are_much_earlier_than_with_least_busy(afternoons: dict[str, Played]) -> None:
    ours, other = afternoons["affinity"], afternoons["least-busy"]

    assert other.ttft_s(50) >= 1.7 * ours.ttft_s(50)
    assert other.ttft_s(95) >= 1.4 * ours.ttft_s(95)


def test_throughput_is_not_lower(afternoons: dict[str, Played]) -> None:
    assert afternoons["affinity"].tokens_per_s >= 0.98 * max(one.tokens_per_s for one in afternoons.values())


def test_the_slowest_first_tokens_are_close_to_the_oracle(afternoons: dict[str, Played]) -> None:
    ours = afternoons["affinity"]

    assert ours.ttft_s(95) <= 1.3 * ours.oracle_s(95, BOARDS.prefill_tps)


def test_every_strategy_gets_the_same_questions(afternoons: dict[str, Played]) -> None:
    """The comparison rests on it."""
    ours, *others = (_asked(played) for played in afternoons.values())

    assert others == [ours, ours]


def test_a_common_prefix_does_not_attract_all_requests_to_one_board() -> None:
    script = Script(turns=3, max_tokens=80, think_s=30.0, system=RULES)

    played = run_virtually(play_before("affinity", script, Boards(answer_tokens=40, host_cache=65536)))

    assert played.busiest(4) <= 1.5


def test_learned_rates_route_nearly_as_well_as_known_ones() -> None:
    """What is assumed of a board is six times as fast as these are."""
    learned: list[float] = []

    async def unknown() -> Played:
        async with msgspec.structs.replace(SLOW_BOARDS, known=False).world("affinity").running() as world:
            played = await play_in(world, SLOW_SCRIPT)
            book, fleet = world.fleet_state.book, world.registry.snapshot
            learned.extend(book.prefill_tps(one) or 0.0 for one in fleet.replicas)
            return played

    known, played = run_virtually(play_before("affinity", SLOW_SCRIPT, SLOW_BOARDS)), run_virtually(unknown())

    assert [pytest.approx(SLOW_BOARDS.prefill_tps, rel=0.1)] * 4 == learned
    assert played.ttft_s(50) <= 1.5 * known.ttft_s(50)
    assert played.ttft_s(95) <= 2 * known.ttft_s(95)


def test_a_dying_board_loses_no_answer_and_no_word() -> None:
    script = Script(conversations=16, turns=4, max_tokens=80)
    boards = Boards(answer_tokens=40)
    cut_off: list[int] = []

    async def dying() -> Played:
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

    died, lived = run_virtually(dying()), run_virtually(play_before("affinity", script, boards))

    assert cut_off
    assert _asked(lived) == _asked(died)


def _asked(played: Played) -> list[tuple[int, int, int, int]]:
    return sorted((one.turn, one.new, one.prompt, one.tokens) for one in played.exchanges)
