import pytest
from msgspec.structs import replace

from promptai.bench.trace import TraceKey
from support_runs import make_trace

ANSWER = make_trace(
    t_sent=10.0,
    t_first=12.0,
    t_last=17.0,
    prompt_tokens=120,
    cached_tokens=20,
    generated_tokens=51,
    prompt_n=100,
    prompt_ms=1500.0,
)
DERIVED = {
    "ttft_s": 2.0,
    "latency_s": 7.0,
    "decode_s": 5.0,
    "decode_steps": 50,
    "decode_tps": 10.0,
    "uncached_tokens": 100,
    "prompt_s": 1.5,
    "prefill_tps": 100 / 1.5,
    "total_tps": (120 + 51) / 7.0,
}


#: Field that a server may not report -> metrics that need it.
UNKNOWN_WITHOUT: dict[str, set[str]] = {
    "t_first": {"ttft_s", "decode_s", "decode_tps"},
    "t_last": {"latency_s", "decode_s", "decode_tps", "total_tps"},
    "prompt_tokens": {"total_tps"},
    "cached_tokens": set(),
    "generated_tokens": {"decode_steps", "decode_tps", "total_tps"},
    "prompt_n": set(),
    "prompt_ms": {"prompt_s", "prefill_tps"},
}


@pytest.mark.parametrize("missing", UNKNOWN_WITHOUT)
def test_only_values_that_depend_on_a_missing_field_are_none(missing: str) -> None:
    trace = replace(ANSWER, **{missing: None})

    assert {name: None if name in UNKNOWN_WITHOUT[missing] else value for name, value in DERIVED.items()} == {
        name: getattr(trace, name) for name in DERIVED
    }


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"generated_tokens": 1}, id="one-token"),
        pytest.param({"generated_tokens": 0}, id="no-token"),
        pytest.param({"t_first": 3.0, "t_last": 3.0}, id="all-in-one-instant"),
    ],
)
def test_an_answer_of_one_token_has_no_decode_rate(changes: dict[str, float]) -> None:
    """Neither 0 nor infinite: nothing was measured."""
    assert make_trace(**changes).decode_tps is None


def test_uncached_tokens_fall_back_to_prompt_minus_cached() -> None:
    assert make_trace(prompt_n=None, cached_tokens=None).uncached_tokens is None


def test_each_rate_matches_its_definition() -> None:
    assert pytest.approx(DERIVED) == {name: getattr(ANSWER, name) for name in DERIVED}


def test_prefers_the_engines_count_of_computed_tokens() -> None:
    assert make_trace(prompt_n=97, prompt_tokens=100, cached_tokens=0).uncached_tokens == 97


def test_decoding_begins_with_reasoning_but_ttft_ends_with_content() -> None:
    """A reasoning model decodes long before the user sees a word."""
    trace = make_trace(t_first_reasoning=0.5, t_first=2.0, t_last=4.5, generated_tokens=41)

    assert (trace.ttft_s, trace.decode_s, trace.decode_tps) == (2.0, 4.0, 10.0)


def test_an_answer_of_reasoning_only_has_a_decode_rate_but_no_ttft() -> None:
    trace = make_trace(t_first_reasoning=1.0, t_first=None)

    assert (trace.ttft_s, trace.decode_tps) == (None, 10.0)


def test_the_key_names_the_request() -> None:
    trace = make_trace(target="m", cache="warm", repeat=2, conversation="edge-07", turn=3)

    assert TraceKey("m", "warm", 2, "edge-07", 3) == trace.key
