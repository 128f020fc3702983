"""The usage of a request is the sum over its answers, in any order of their reports."""

from typing import Any

import msgspec
import pytest

from promptai.router.failover.response import ResponseBuilder
from promptai.router.failover.usage import UsageTally
from promptai.wire.llamaserver import Timings
from promptai.wire.openai import ChunkChoice, CompletionChunk, Usage


def timings_of(prompt: int, cached: int | None, generated: int) -> Timings:
    return Timings(
        prompt_n=prompt, prompt_ms=10.0 * prompt, predicted_n=generated, predicted_ms=100.0 * generated, cache_n=cached
    )


def test_the_last_report_of_an_answer_counts() -> None:
    """With ``timings_per_token`` every chunk has a report."""
    tally = UsageTally()
    assert tally.timings() is None

    for generated in (1, 2, 3):
        tally.add(CompletionChunk(choices=[ChunkChoice()], timings=timings_of(7, 2, generated)))

    assert tally.timings() == timings_of(7, 2, 3)


def test_answers_to_one_prompt_share_its_tokens() -> None:
    """The second answer found the whole prompt computed."""
    tally = UsageTally(alternatives=2)
    for index, prompt, cached in ((1, 1, 6), (0, 5, 2)):
        tally.add(CompletionChunk(choices=[ChunkChoice(index=index)], timings=timings_of(prompt, cached, 20)))

    total = tally.timings()

    assert total is not None
    assert (total.prompt_n, total.cache_n, total.predicted_n) == (5, 2, 40)
    assert (total.prompt_ms, total.predicted_ms) == (50.0, 4000.0)


def test_every_prompt_counts() -> None:
    tally = UsageTally()
    for index in range(40):
        tally.add(CompletionChunk(choices=[ChunkChoice(index=index)], timings=timings_of(100, 14, 40)))

    total = tally.timings()

    assert total is not None
    assert (total.prompt_n, total.cache_n, total.predicted_n) == (4000, 560, 1600)


def test_a_report_without_choices_belongs_to_the_previous_answer() -> None:
    tally = UsageTally(alternatives=2)
    for index in (1, 0):
        tally.add(CompletionChunk(choices=[ChunkChoice(index=index)]))
        tally.add(CompletionChunk(choices=[], timings=timings_of(5, None, 10 + index)))

    total = tally.timings()

    assert total is not None
    assert (total.prompt_n, total.cache_n, total.predicted_n) == (5, None, 21)


def report(index: int, prompt: int | None, cached: int | None, generated: int | None) -> dict[str, Any]:
    """A chunk with the usage and the timings of one answer, as llama-server sends them."""
    usage = {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
    timings = timings_of((prompt or 0) - (cached or 0), cached, generated or 0)
    return {"choices": [{"index": index, "text": "x"}], "usage": usage, "timings": msgspec.to_builtins(timings)}


@pytest.mark.parametrize(
    ("alternatives", "reports", "totals"),
    [
        (2, [report(0, 10, 8, 20), report(1, 10, 2, 30)], (10, 2, 50)),
        (1, [report(0, 10, 8, 20), report(1, 40, 2, 30)], (50, 10, 50)),
        (2, [report(0, 10, 0, 1), report(1, 10, 9, 2), report(2, 7, 6, 3), report(3, 7, 1, 4)], (17, 1, 10)),
    ],
    ids=["two answers to one prompt", "two prompts", "two answers to each of two prompts"],
)
def test_response_and_charge_agree_on_several_answers(
    alternatives: int, reports: list[dict[str, Any]], totals: tuple[int, int, int]
) -> None:
    """A prompt counts once; the answer that computed most of it decides its cached tokens."""
    tally, builder = UsageTally(alternatives), ResponseBuilder(chat=False, alternatives=alternatives)
    for chunk in reports:
        tally.add(msgspec.convert(chunk, CompletionChunk))
        builder.add([msgspec.json.encode(chunk)])

    timings, usage = tally.timings(), tally.usage()
    built = msgspec.convert(msgspec.json.decode(builder.build())["usage"], Usage)

    assert timings is not None
    assert usage is not None
    assert totals == (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)
    assert totals == (timings.prompt_n + (timings.cache_n or 0), timings.cache_n, timings.predicted_n)
    assert totals == (built.prompt_tokens, built.cached_tokens, built.completion_tokens)


@pytest.mark.parametrize(
    ("alternatives", "second", "totals"),
    [
        (1, report(1, None, 0, 30), (None, 2, 50)),
        (1, report(1, 10, None, 30), (20, None, 50)),
        (1, report(1, 10, 0, None), (20, 2, None)),
        (2, report(1, 10, None, 30), (10, None, 50)),
        (2, report(1, 10, 0, None), (10, 0, None)),
    ],
    ids=["prompt", "cached", "completion", "cached, one prompt", "completion, one prompt"],
)
def test_a_count_that_one_answer_lacks_is_unknown_for_all(
    alternatives: int, second: dict[str, Any], totals: tuple[int | None, int | None, int | None]
) -> None:
    tally, builder = UsageTally(alternatives), ResponseBuilder(chat=False, alternatives=alternatives)
    for chunk in (report(0, 10, 2, 20), second):
        tally.add(msgspec.convert(chunk, CompletionChunk))
        builder.add([msgspec.json.encode(chunk)])

    timings, usage = tally.timings(), tally.usage()
    built = msgspec.convert(msgspec.json.decode(builder.build())["usage"], Usage)

    assert timings is not None
    assert usage is not None
    assert totals == (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens)
    assert totals == (built.prompt_tokens, built.cached_tokens, built.completion_tokens)
    assert totals[1] == timings.cache_n
