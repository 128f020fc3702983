from collections import Counter
from collections.abc import Sequence
from itertools import product
from random import Random
from typing import Any

import pytest

from promptai.bench.arrivals import Arrivals
from promptai.bench.plan import (
    Protocol,
    Stage,
    WarmUpRates,
    arrival_seed,
    chars_per_token,
    context_needed,
    conversation_seconds,
    fit_budget,
    plan_stages,
    stratified,
    typical_prompt,
)
from promptai.bench.trace import Cache
from promptai.bench.workload import Conversation, History
from support_runs import long_talk, talk

RATES = WarmUpRates(prefill_tps=100.0, decode_tps=10.0, chars_per_token=4.0, answer_tokens=50.0)
#: Fifty conversations of lengths 1 to 50, not in that order.
FIFTY = [talk(f"c{n}", "x" * (n * 7 % 51)) for n in range(1, 51)]


def length(conversation: Conversation) -> float:
    """One second per character."""
    return float(conversation.prompt_chars(0))


def fitting(budget_s: float, conversations: Sequence[Conversation] = FIFTY, seed: int = 0) -> list[Conversation]:
    """The selection at one second per character."""
    return fit_budget(conversations, budget_s, length, lambda count: Random(f"{seed}/{count}"))


@pytest.mark.parametrize("seed", range(4))
def test_a_budget_for_the_shortest_conversation_selects_it(seed: int) -> None:
    """A draw of a single conversation could select one that is too long."""
    long_and_short = [talk("long", "x" * 100), talk("short", "x")]

    assert [conversation.id for conversation in fitting(50.0, long_and_short, seed)] == ["short"]


def test_selects_nothing_if_nothing_fits() -> None:
    assert fitting(0.5) == []


def test_selects_everything_if_everything_fits() -> None:
    assert fitting(sum(map(length, FIFTY))) == FIFTY


def test_a_larger_budget_never_selects_fewer_conversations() -> None:
    budgets = range(25, 1300, 25)
    chosen = [fitting(float(budget)) for budget in budgets]

    assert sorted(map(len, chosen)) == [len(part) for part in chosen]
    assert all(sum(map(length, part)) <= budget for part, budget in zip(chosen, budgets, strict=True))


def test_targets_take_turns_forwards_and_backwards() -> None:
    """A board that heats up must not penalise the last target."""
    stages = plan_stages(["A", "B"], list("12345678"), Protocol(caches=("cold",)))

    assert [stage.target + "".join(stage.conversations) for stage in stages] == [
        "A12",
        "B12",
        "B34",
        "A34",
        "A56",
        "B56",
        "B78",
        "A78",
    ]


def blocks(targets: int, count: int, **protocol: Any) -> list[int]:
    """Number of conversations in each stage of the first target."""
    stages = plan_stages(
        [f"t{n}" for n in range(targets)], [f"c{n}" for n in range(count)], Protocol(caches=("cold",), **protocol)
    )
    return [len(stage.conversations) for stage in stages if stage.target == "t0"]


@pytest.mark.parametrize(
    ("targets", "count", "sizes"),
    [
        pytest.param(2, 3, [1, 1, 1], id="few"),
        pytest.param(2, 20, [5, 5, 5, 5], id="four-turns"),
        pytest.param(3, 100, [10] * 10, id="reloading-must-cost-little"),
    ],
)
def test_stages_of_several_targets_allow_four_turns_and_have_at_most_ten_conversations(
    targets: int, count: int, sizes: list[int]
) -> None:
    assert sizes == blocks(targets, count)


@pytest.mark.parametrize("protocol", [{}, {"concurrency": 20}], ids=["one-at-a-time", "twenty-at-once"])
def test_a_single_target_plays_one_block(protocol: dict[str, Any]) -> None:
    """A block ends with its last conversation: with blocks of ten, a concurrency of twenty is never reached."""
    assert blocks(1, 25, **protocol) == [25]


def test_a_block_holds_several_rounds_of_concurrent_conversations() -> None:
    assert blocks(2, 100, concurrency=8) == [32, 32, 32, 4]


def test_open_arrivals_play_one_block() -> None:
    """New arrivals must overlap earlier conversations, or the load is not the requested one."""
    assert blocks(2, 30, arrivals=Arrivals("poisson", 1.0)) == [30]


def test_arrivals_are_equal_for_all_targets_and_caches_and_differ_by_pass() -> None:
    a = Stage("A", "cold", 0, ("c1", "c2"))

    assert arrival_seed(a, 7) == arrival_seed(Stage("B", "warm", 0, ("c1", "c2")), 7)
    assert len({arrival_seed(s, n) for s in (a, Stage("A", "cold", 1, ("c1", "c2"))) for n in (7, 8)}) == 4


def test_cold_and_warm_of_a_target_share_one_loaded_engine() -> None:
    stages = plan_stages(["A", "B"], ["c"], Protocol(caches=("cold", "warm")))

    assert [(s.target, s.cache) for s in stages] == [("A", "cold"), ("A", "warm"), ("B", "cold"), ("B", "warm")]


def test_plans_every_request_exactly_once() -> None:
    targets, ids = ["A", "B", "C"], [f"c{n}" for n in range(25)]
    stages = plan_stages(targets, ids, Protocol(repeats=2))

    assert Counter(product(targets, ("cold", "warm"), (0, 1), ids)) == Counter(
        (stage.target, stage.cache, stage.repeat, id_) for stage in stages for id_ in stage.conversations
    )


@pytest.mark.parametrize("count", [1, 5, 25])
@pytest.mark.parametrize("seed", range(3))
def test_draws_one_conversation_from_each_stratum_in_the_original_order(count: int, seed: int) -> None:
    part = stratified(FIFTY, count, Random(seed))

    assert list(range(count)) == sorted(int(length(c) - 1) * count // 50 for c in part)
    assert sorted(part, key=FIFTY.index) == part


@pytest.mark.parametrize("count", [50, 51])
def test_drawing_all_conversations_returns_all(count: int) -> None:
    assert stratified(FIFTY, count, Random(0)) == FIFTY


def test_draws_the_full_count_from_strata_of_uneven_size() -> None:
    assert [*range(1, 50)] == [len({c.id for c in stratified(FIFTY, n, Random(0))}) for n in range(1, 50)]


def test_the_draw_repeats_with_the_same_seed_and_differs_with_another() -> None:
    one, again, other = (stratified(FIFTY, 10, Random(seed)) for seed in (1, 1, 2))

    assert one == again
    assert one != other


@pytest.mark.parametrize(
    ("cache", "prefill_s"),
    [
        ("cold", (400 + 1200 + 2000) / 4 / 100),  # every prompt again, history included
        ("warm", 2000 / 4 / 100),  # every character once
    ],
)
def test_estimates_prefill_and_answers_of_a_conversation(cache: Cache, prefill_s: float) -> None:
    conversation = long_talk("c", turns=3, chars=400)

    assert pytest.approx(prefill_s + 3 * 50 / 10) == conversation_seconds(conversation, cache, RATES, "data")


@pytest.mark.parametrize(
    ("cache", "prefill_s"),
    [
        ("cold", (100 + 250 + 400) / 100),  # 100 tokens per message, 50 per answer, all prefilled again
        ("warm", 300 / 100),  # its own answers are in the cache already
    ],
)
def test_own_history_adds_earlier_answers_to_the_prefill(cache: Cache, prefill_s: float) -> None:
    conversation = long_talk("c", turns=3, chars=400)

    assert pytest.approx(prefill_s + 3 * 50 / 10) == conversation_seconds(conversation, cache, RATES, "own")


def test_the_typical_prompt_has_the_mean_length() -> None:
    """Prompts of 10, 20, 30, 100 and 300 characters have a mean of 92."""
    conversations = [
        long_talk("a", turns=2, chars=10),
        talk("b", "x" * 20),
        *(talk(str(n), "x" * n) for n in (300, 100)),
    ]

    assert [len(message.content) for message in typical_prompt(conversations, "data")] == [100]


@pytest.mark.parametrize(
    ("chars", "max_tokens", "tokens"),
    [
        pytest.param(560, 212, 512, id="just-full"),
        pytest.param(560, 213, 1024, id="one-token-more"),
        pytest.param(8960, 400, 5120, id="long-prompt"),
    ],
)
def test_context_fits_the_longest_prompt_and_its_answer(chars: int, max_tokens: int, tokens: int) -> None:
    """Two characters per token, 40 of template per message, rounded up to 512."""
    conversations = [talk("short", "x"), talk("long", "x" * chars)]

    assert tokens == context_needed(conversations, max_tokens, chars_per_token=2.0, history="data")


@pytest.mark.parametrize(("history", "tokens"), [("data", 1024), ("own", 2560)])
def test_context_fits_all_answers_with_own_history(history: History, tokens: int) -> None:
    """Four answers of 500 tokens and four messages of 100 characters; the data's answers are 100 characters too."""
    assert tokens == context_needed([long_talk("a", turns=4, chars=100)], 500, chars_per_token=2.0, history=history)


def test_context_without_conversations_fits_an_answer() -> None:
    assert context_needed([], 500, chars_per_token=3.0, history="data") == 512


def test_a_small_vocabulary_needs_more_tokens_for_the_same_text() -> None:
    assert chars_per_token(2_000) < chars_per_token(None) == chars_per_token(128_000)
