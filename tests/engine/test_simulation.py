import os
import subprocess
import sys
from collections.abc import Iterator

import msgspec
import pytest

from promptai.engine.simulation import Emission, Request, Scheduler, SimulationConfig, fold, render, tokenize
from promptai.wire.llamaserver import Timings
from promptai.wire.openai import Message

EXACT = 1e-9
CONFIG = SimulationConfig(prefill_tps=50.0, decode_tps=10.0, batch=512)
TALK = [
    Message("system", "You watch a network edge."),
    Message("user", "Is cell 12 up? <yes|no>\n"),
    Message("assistant", " cell 12 is up, since 08:15"),
    Message("user", "  And  the\tmast?"),
]


def request(tokens: int, answer: int = 1, *, first: int = 0, cache: bool = True) -> Request:
    """Return a request whose prompt counts up from ``first``."""
    return Request(list(range(first, first + tokens)), max_tokens=answer, use_cache=cache)


def play(scheduler: Scheduler, *requests: Request, start: float = 100.0) -> list[tuple[float, list[Emission]]]:
    """Add these requests at once; return the time at the end of each step, and its tokens."""
    for one in requests:
        scheduler.add(one)
    return list(steps(scheduler, start))


def steps(scheduler: Scheduler, now: float) -> Iterator[tuple[float, list[Emission]]]:
    while not scheduler.idle:
        duration, emissions = scheduler.step(now)
        now += duration
        yield now, emissions


def ends(played: list[tuple[float, list[Emission]]]) -> list[float]:
    """Return the seconds from the start to the end of each step."""
    return [now - 100.0 for now, _ in played]


def text(played: list[tuple[float, list[Emission]]], wanted: Request) -> str:
    """Return the answer to one request."""
    return "".join(emission.text for _, emissions in played for emission in emissions if emission.request is wanted)


@pytest.mark.parametrize(
    "fields",
    [{"prefil_tps": 1.0}, {"slots": "2"}, {"time_scale": "fast"}],
    ids=["misspelt", "text-slots", "text-scale"],
)
def test_rejects_invalid_settings(fields: dict[str, object]) -> None:
    """A simulated engine with another speed than intended is not ground truth."""
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(fields, SimulationConfig)


def test_an_idle_engine_does_nothing() -> None:
    """And takes no time."""
    assert Scheduler(CONFIG).step(5.0) == (0.0, [])


@pytest.mark.parametrize("scale", [1.0, 20.0], ids=["as-set", "twenty-times-as-fast"])
def test_one_stream_has_exactly_the_configured_rates(scale: float) -> None:
    """100 tokens at 50 per second, then one token each tenth of a second; the first belongs to prefill."""
    config = msgspec.structs.replace(CONFIG, time_scale=scale)
    asked = request(100, answer=4)

    played = play(Scheduler(config), asked)

    assert ends(played) == pytest.approx([2.0 / scale, 2.1 / scale, 2.2 / scale, 2.3 / scale], abs=EXACT)
    assert [emissions[0].last for _, emissions in played] == [False, False, False, True]
    timings = asked.timings
    assert (timings.cache_n, timings.prompt_n, timings.predicted_n) == (0, 100, 4)
    assert (timings.prompt_ms, timings.predicted_ms) == pytest.approx((2000 / scale, 300 / scale), abs=EXACT * 1000)


def test_timings_are_zero_before_the_first_step() -> None:
    """Reading them early is not an error."""
    assert Timings(10, 0.0, 0, 0.0, cache_n=0) == request(10).timings


@pytest.mark.parametrize(
    ("streams", "slowdown", "step_s"),
    [(1, 0.5, 0.1), (2, 0.5, 0.15), (3, 0.5, 0.2), (4, 0.0, 0.1), (4, 1.0, 0.4)],
    ids=["alone", "two", "three", "free-batching", "no-gain"],
)
def test_each_further_stream_slows_the_step(streams: int, slowdown: float, step_s: float) -> None:
    """One step computes one token of every stream."""
    config = msgspec.structs.replace(CONFIG, slots=4, decode_slowdown=slowdown)

    played = play(Scheduler(config), *(request(1, 3, first=1000 * n) for n in range(streams)))

    first = streams / 50
    assert ends(played) == pytest.approx([first, first + step_s, first + 2 * step_s], abs=EXACT)
    assert [streams] * 3 == [len(emissions) for _, emissions in played]


def test_requests_beyond_the_slots_wait_in_order() -> None:
    """Waiting is not part of the timings."""
    asked = [request(50, 2, first=1000 * n) for n in range(3)]

    play(Scheduler(CONFIG), *asked)

    assert pytest.approx([one.t_first for one in asked], abs=EXACT) == [101.0, 102.1, 103.2]
    assert pytest.approx([one.timings.prompt_ms for one in asked], abs=EXACT * 1000) == [1000.0] * 3


def test_decodes_between_the_batches_of_a_long_prompt() -> None:
    """1200 tokens in steps of 512, 512 and 176; the other stream gets a token with each."""
    scheduler = Scheduler(msgspec.structs.replace(CONFIG, slots=2))
    talking, long = request(1, 5), request(1200, 1, first=5000)
    scheduler.add(talking)
    first, _ = scheduler.step(0.0)

    played = play(scheduler, long)

    assert first == pytest.approx(1 / 50, abs=EXACT)
    assert ends(played) == pytest.approx([10.34, 20.68, 24.3, 24.4], abs=EXACT)
    assert [[talking], [talking], [talking, long], [talking]] == [
        [emission.request for emission in emissions] for _, emissions in played
    ]


def test_prompts_share_the_batch_in_slot_order() -> None:
    """The second gets what the first leaves."""
    scheduler = Scheduler(msgspec.structs.replace(CONFIG, slots=2, batch=100))
    one, two = request(150, 1), request(80, 1, first=5000)

    played = play(scheduler, one, two)

    assert ends(played) == pytest.approx([2.0, 4.0, 4.6], abs=EXACT)
    assert [[], [one], [two]] == [[emission.request for emission in emissions] for _, emissions in played]


@pytest.mark.parametrize(
    ("earlier", "prompt", "cached"),
    [
        pytest.param([1, 2, 3], [1, 2, 3], 2, id="the-same-computes-its-last-token"),
        pytest.param([1, 2, 3], [1, 2, 9, 3], 2, id="common-start"),
        pytest.param([1, 2, 3], [9, 1, 2, 3], 0, id="other-start"),
        pytest.param([1, 2, 3], [1], 0, id="one-token"),
        pytest.param([1, 2, 3], [1, 2], 1, id="shorter"),
    ],
)
def test_a_slot_reuses_the_shared_prefix(earlier: list[int], prompt: list[int], cached: int) -> None:
    """Except for the last token, whose logits are needed."""
    scheduler = Scheduler(CONFIG)
    play(scheduler, Request(earlier, max_tokens=1, use_cache=True))

    for use_cache, expected in ((False, 0), (True, cached)):
        asked = Request(prompt, max_tokens=1, use_cache=use_cache)
        play(scheduler, Request(earlier, max_tokens=1, use_cache=False), asked)

        assert (expected, len(prompt) - expected) == (asked.timings.cache_n, asked.timings.prompt_n)
        assert asked.timings.prompt_ms == pytest.approx((len(prompt) - expected) / 50 * 1000, abs=EXACT * 1000)


def test_the_next_turn_finds_the_conversation_in_the_cache() -> None:
    """Prompt and answer, as a client returns them."""
    scheduler = Scheduler(CONFIG)
    first = Request(tokenize(render(TALK)), max_tokens=20, use_cache=True)
    answer = text(play(scheduler, first), first)
    turn = [*TALK, Message("assistant", answer), Message("user", "and now?")]

    second = Request(tokenize(render(turn)), max_tokens=1, use_cache=True)
    play(scheduler, second)

    assert len(first.prompt) + 20 == second.cached


def test_a_request_goes_to_the_slot_with_the_longest_prefix() -> None:
    """Not to the first free one."""
    scheduler = Scheduler(msgspec.structs.replace(CONFIG, slots=3))
    play(scheduler, *(request(100, 1, first=1000 * n) for n in range(3)))

    asked = request(120, 1, first=2000)
    play(scheduler, asked)

    assert asked.cached == 100
    assert scheduler.slots[2].cache[0] == 2000


@pytest.mark.parametrize(("template", "slot"), [(10, 1), (11, 2)], ids=["a tenth", "more"])
def test_a_short_shared_prefix_takes_the_oldest_slot(template: int, slot: int) -> None:
    """Up to a tenth, like llama-server: otherwise the words of a template would cost a conversation its cache."""
    scheduler = Scheduler(msgspec.structs.replace(CONFIG, slots=3))
    marks = list(range(template))
    lives = [[n] * 50 for n in (1000, 2000)] + [marks + [3000] * 50]
    # The second one ends first, then the third, then the first.
    play(
        scheduler,
        *(Request(life, max_tokens=most, use_cache=True) for life, most in zip(lives, (3, 1, 2), strict=True)),
    )

    question = Request(marks + [4000] * (100 - template), max_tokens=1, use_cache=True)
    play(scheduler, question)

    assert question.slot == slot


def test_a_dropped_request_leaves_only_its_computed_tokens() -> None:
    """In the middle of prefill, with one request waiting and another waiting one dropped."""
    scheduler = Scheduler(msgspec.structs.replace(CONFIG, batch=64))
    left, waits, leaves_too = request(200), request(200), request(1)
    for one in (left, waits, leaves_too):
        scheduler.add(one)
    scheduler.step(0.0)

    scheduler.drop(left)
    scheduler.drop(leaves_too)
    play(scheduler)

    assert waits.cached == 64
    assert (left.t_first, leaves_too.t_first) == (None, None)
    assert scheduler.idle


def test_a_request_for_one_slot_lets_others_pass() -> None:
    """Requests for the same slot keep their order; an unknown slot number is ignored."""
    scheduler = Scheduler(msgspec.structs.replace(CONFIG, slots=2))
    first, pinned, again, free = (
        Request([n] * 10, max_tokens=2, use_cache=True, id_slot=slot) for n, slot in enumerate((0, 0, 0, 9))
    )

    play(scheduler, first, pinned, again, free)

    assert [one.slot for one in (first, pinned, again, free)] == [0, 0, 0, 1]
    assert first.t_start == free.t_start == 100.0
    assert first.t_last == pinned.t_start
    assert pinned.t_last == again.t_start


def test_a_step_lists_started_and_prompted_requests() -> None:
    """Progress is made from these."""
    scheduler = Scheduler(msgspec.structs.replace(CONFIG, slots=2, batch=100))
    one, two = request(150, 1), request(80, 1, first=5000)
    scheduler.add(one)
    scheduler.add(two)

    found = []
    for _ in range(3):
        scheduler.step(0.0)
        found.append((scheduler.started, scheduler.prompted))

    assert found == [([one, two], [one]), ([], [one, two]), ([], [two])]


def test_an_empty_prompt_uses_no_cache() -> None:
    """The number of cached tokens is never negative."""
    asked = Request([], max_tokens=1, use_cache=True)

    play(Scheduler(CONFIG), asked)

    assert (asked.timings.cache_n, asked.timings.prompt_n) == (0, 0)


def test_an_answer_continues_the_same_from_any_cut() -> None:
    """As tokens and as the text of a trailing assistant message, to the same end."""
    config = msgspec.structs.replace(CONFIG, answer_tokens=25)
    whole = Request(tokenize(render(TALK)), max_tokens=200, use_cache=True)
    pieces = [emissions[0].text for _, emissions in play(Scheduler(config), whole)]
    assert ("stop", len(pieces)) == (whole.finish_reason, len(whole.generated))
    assert len(pieces) > 5

    for cut in range(1, len(pieces)):
        continued = render([*TALK, Message("assistant", "".join(pieces[:cut]))])
        rest = Request(tokenize(continued), max_tokens=200, use_cache=True)
        assert whole.prompt + whole.generated[:cut] == rest.prompt
        assert "".join(pieces[cut:]) == text(play(Scheduler(config), rest), rest)
        assert rest.finish_reason == "stop"


def test_an_answer_depends_only_on_its_prompt() -> None:
    """Not on cache, slots or other streams, but on every single word."""
    other = [Message("system", "You watch a network hedge."), *TALK[1:]]
    alone, accompanied, changed = (
        Request(tokenize(render(talk)), max_tokens=30, use_cache=True) for talk in (TALK, TALK, other)
    )
    one = text(play(Scheduler(CONFIG), alone), alone)

    played = play(Scheduler(msgspec.structs.replace(CONFIG, slots=2, batch=7)), changed, accompanied)

    assert one == text(played, accompanied)
    assert one != text(played, changed)


def test_answers_have_the_configured_mean_length() -> None:
    """Over 2000 prompts, within 10 %; max_tokens still holds."""
    config = msgspec.structs.replace(CONFIG, answer_tokens=20, slots=100)
    asked = [request(3, 100, first=7 * n) for n in range(2000)]

    play(Scheduler(config), *asked)

    lengths = [len(one.generated) for one in asked]
    assert sum(lengths) / 2000 == pytest.approx(20, rel=0.1)
    assert max(lengths) == 100
    assert {"stop", "length"} == {one.finish_reason for one in asked}


@pytest.mark.parametrize(
    ("string", "count"),
    [
        ("", 0),
        ("<|user|>", 1),
        ("<|user|><|end|>", 2),
        ("abcdef", 1),
        ("abcdefg", 2),
        (" abcdef", 1),
        ("a b", 2),
        ("  a", 2),
        ("a<b", 3),
        ("a\n\n", 3),
        ("üöäßêé🚀", 2),
    ],
)
def test_cuts_text_into_pieces_of_at_most_six_characters(string: str, count: int) -> None:
    """White space belongs to the following word; template marks are one token."""
    assert count == len(tokenize(string))


def test_the_template_leaves_a_trailing_answer_open() -> None:
    """It can be continued; otherwise the template begins a new answer."""
    assert render([Message("user", "a"), Message("assistant", "b")]) == "<|user|>a<|end|><|assistant|>b"
    assert render([Message("user", "a")]) == "<|user|>a<|end|><|assistant|>"
    assert render([]) == "<|assistant|>"


def test_folding_in_two_parts_equals_folding_at_once() -> None:
    """This allows an answer to be continued."""
    tokens = tokenize(render(TALK))

    assert {fold(0, tokens)} == {fold(fold(0, tokens[:cut]), tokens[cut:]) for cut in range(len(tokens))}
    assert fold(0, tokens) != fold(0, tokens[::-1])


@pytest.mark.real
def test_every_process_generates_the_same_answer() -> None:
    """Whatever the seed of Python's own hashes."""
    program = (
        "from promptai.engine.simulation import *\n"
        "r = Request(tokenize('is the mast up?'), max_tokens=20, use_cache=True); s = Scheduler(SimulationConfig())\n"
        "s.add(r)\n"
        "while not s.idle: print(*(e.text for e in s.step(0.0)[1]))\n"
    )
    answers = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
            timeout=60,
        ).stdout
        for seed in ("1", "2")
    }

    assert len(answers) == 1
    assert answers.pop().count(b"\n") == 20
