"""What a request took is the sum of what its answers took, whoever tells it and in whichever order."""

from promptai.router.failover.usage import UsageTally
from promptai.wire.llamaserver import Timings
from promptai.wire.openai import ChunkChoice, CompletionChunk


def told(prompt: int, cached: int | None, generated: int) -> Timings:
    return Timings(
        prompt_n=prompt, prompt_ms=10.0 * prompt, predicted_n=generated, predicted_ms=100.0 * generated, cache_n=cached
    )


def test_the_last_report_of_an_answer_counts() -> None:
    """With ``timings_per_token`` there is one in every chunk."""
    tally = UsageTally()
    assert tally.timings() is None

    for generated in (1, 2, 3):
        tally.add(CompletionChunk(choices=[ChunkChoice()], timings=told(7, 2, generated)))

    assert tally.timings() == told(7, 2, 3)


def test_answers_to_one_prompt_share_its_tokens() -> None:
    """The second one found all of it computed."""
    tally = UsageTally(alternatives=2)
    for index, prompt, cached in ((1, 1, 6), (0, 5, 2)):
        tally.add(CompletionChunk(choices=[ChunkChoice(index=index)], timings=told(prompt, cached, 20)))

    total = tally.timings()

    assert total is not None
    assert (total.prompt_n, total.cache_n, total.predicted_n) == (5, 2, 40)
    assert (total.prompt_ms, total.predicted_ms) == (50.0, 4000.0)


def test_every_prompt_counts() -> None:
    tally = UsageTally()
    for index in range(40):
        tally.add(CompletionChunk(choices=[ChunkChoice(index=index)], timings=told(100, 14, 40)))

    total = tally.timings()

    assert total is not None
    assert (total.prompt_n, total.cache_n, total.predicted_n) == (4000, 560, 1600)


def test_a_report_without_choices_belongs_to_the_previous_answer() -> None:
    tally = UsageTally(alternatives=2)
    for index in (1, 0):
        tally.add(CompletionChunk(choices=[ChunkChoice(index=index)]))
        tally.add(CompletionChunk(choices=[], timings=told(5, None, 10 + index)))

    total = tally.timings()

    assert total is not None
    assert (total.prompt_n, total.cache_n, total.predicted_n) == (5, None, 21)
