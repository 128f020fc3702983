import asyncio
import hashlib
import re
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import pytest
from msgspec.structs import replace

from promptai.bench.arrivals import Arrivals
from promptai.bench.client import PlayedTurn, TurnClient, describe, salted
from promptai.bench.plan import Protocol
from promptai.bench.trace import Cache, TraceKey
from promptai.engine.client import Arrival, EngineClient
from promptai.errors import EngineDiedError, EngineError, EngineProtocolError, EngineRefusedError
from promptai.wire.llamaserver import Timings
from promptai.wire.openai import ChunkChoice, CompletionChunk, Delta, Message, PromptTokensDetails, Usage

KEY = TraceKey("m", "cold", 0, "a", 0)
ASKED = [Message("user", "why?")]


class Script(EngineClient):
    """A server that sends these chunks one second apart, then fails or ends."""

    def __init__(self, chunks: Sequence[CompletionChunk], failure: EngineError | None = None) -> None:
        super().__init__("http://scripted")
        self.chunks, self.failure = chunks, failure

    async def stream_chat(self, body: dict[str, Any]) -> AsyncGenerator[Arrival, None]:
        """Send every chunk."""
        self.asked: list[Message] = body["messages"]
        for second, chunk in enumerate(self.chunks, start=1):
            yield Arrival(float(second), chunk)
        if self.failure is not None:
            raise self.failure


def client(server: EngineClient, *, llama_server: bool = True, **protocol: Any) -> TurnClient:
    return TurnClient(server, Protocol(**protocol), model="m", llama_server=llama_server, origin=0.0)


def play(*chunks: CompletionChunk, failure: EngineError | None = None) -> PlayedTurn:
    return asyncio.run(client(Script(chunks, failure)).play(KEY, ASKED, t_scheduled=0.0))


def says(
    content: str | None = None, *, reasoning: str | None = None, thinks: str | None = None, end: str | None = None
) -> CompletionChunk:
    """A chunk with one choice; ``thinks`` uses the field for reasoning of Ollama and vLLM."""
    return CompletionChunk([ChunkChoice(Delta(content, reasoning, thinks), end)])


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        pytest.param(
            EngineRefusedError("too long", status=400, kind="exceed_context_size_error"),
            "ContextExceeded: too long",
            id="context",
        ),
        pytest.param(EngineRefusedError("busy", status=503, kind=None), "EngineRefused: busy", id="refused"),
        pytest.param(EngineDiedError("gone"), "EngineDied: gone", id="died"),
        pytest.param(EngineProtocolError("odd"), "EngineProtocol: odd", id="protocol"),
    ],
)
def test_describes_a_failure_by_kind_and_sentence(failure: EngineError, words: str) -> None:
    assert words == describe(failure)


def test_a_failed_turn_keeps_its_timestamps_but_has_no_answer() -> None:
    failure = EngineDiedError("gone", hint="look")
    played = play(says("be"), failure=failure)

    assert (played.failure, played.text, played.trace.error) == (failure, "be", "EngineDied: gone")
    assert (played.trace.t_first, played.trace.t_last, played.trace.text_sha256) == (1.0, None, None)


def test_the_first_token_is_the_first_with_content() -> None:
    """Role-only, empty and reasoning chunks contain nothing for the user to read."""
    chunks = [says(), says(""), says(reasoning="hm"), says(reasoning="so"), says("be"), says("cause"), says(end="stop")]
    trace = play(*chunks).trace

    assert (trace.t_first_reasoning, trace.t_first, trace.t_last) == (3.0, 5.0, 7.0)
    assert (trace.chunks, trace.finish_reason) == (2, "stop")


def test_decoding_begins_with_reasoning_in_either_field() -> None:
    """Otherwise reasoning tokens would count without their seconds."""
    account = CompletionChunk(usage=Usage(5, 4))
    answers = [
        play(says(**{name: "hm"}), says(**{name: "so"}), says("be"), says("cause", end="stop"), account).trace
        for name in ("reasoning", "thinks")
    ]

    assert [(trace.t_first_reasoning, trace.t_first, trace.decode_tps) for trace in answers] == [(1.0, 3.0, 1.0)] * 2


def test_generation_ends_with_the_finish_reason_not_with_usage() -> None:
    trace = play(says("why"), says(end="length"), CompletionChunk(usage=Usage(5, 1))).trace

    assert (trace.t_last, trace.finish_reason, trace.prompt_tokens) == (2.0, "length", 5)


def test_hashes_the_assembled_answer() -> None:
    played = play(says("Wört"), says("chen"), says(end="stop"))

    assert played.text == "Wörtchen"
    assert hashlib.sha256("Wörtchen".encode()).hexdigest() == played.trace.text_sha256


def test_values_that_a_plain_server_does_not_report_are_none() -> None:
    trace = play(says("yes"), says(end="stop")).trace

    assert {None} == {trace.prompt_tokens, trace.cached_tokens, trace.generated_tokens, trace.prompt_ms, trace.error}


def test_the_trace_contains_the_engines_timings() -> None:
    account = CompletionChunk(
        usage=Usage(120, 21, PromptTokensDetails(99)), timings=Timings(100, 500.0, 21, 2000.0, 20)
    )
    trace = play(says("yes"), account, says(end="stop")).trace

    assert (trace.prompt_tokens, trace.generated_tokens, trace.cached_tokens) == (120, 21, 20)
    assert (trace.prompt_n, trace.prompt_ms, trace.predicted_n, trace.predicted_ms) == (100, 500.0, 21, 2000.0)


def test_reads_cached_tokens_of_a_plain_server_from_usage() -> None:
    trace = play(says("yes"), says(end="stop"), CompletionChunk(usage=Usage(120, 21, PromptTokensDetails(99)))).trace

    assert trace.cached_tokens == 99


def test_a_warm_up_is_measured_like_a_turn_but_marked() -> None:
    turns = client(Script([says("yes"), says(end="stop")]))

    assert asyncio.run(turns.warm_up(ASKED, "cold", max_tokens=1)).conversation == "warm-up"


def test_a_failed_warm_up_raises() -> None:
    with pytest.raises(EngineDiedError):
        asyncio.run(client(Script([], EngineDiedError("gone"))).warm_up(ASKED, "cold", max_tokens=1))


def test_a_progress_display_sees_the_turn_in_progress() -> None:
    turns = client(Script([says("be"), says("cause")]))
    asyncio.run(turns.play(KEY, ASKED, t_scheduled=0.0))

    assert (turns.live.key, turns.live.chunks, turns.live.t_first) == (KEY, 2, 1.0)


def test_sends_only_standard_fields_to_a_plain_server() -> None:
    body = client(Script([]), llama_server=False, seed=7, ignore_eos=True).body(ASKED, "cold", max_tokens=9)

    assert body == {"model": "m", "messages": ASKED, "max_tokens": 9, "temperature": 0, "seed": 7}


@pytest.mark.parametrize(
    ("cache", "llama_server", "same"),
    [("cold", True, True), ("warm", True, True), ("warm", False, True), ("cold", False, False)],
    ids=["cold-llama-server", "warm-llama-server", "warm-plain", "cold-plain"],
)
def test_salts_a_cold_prompt_if_the_cache_cannot_be_disabled(cache: Cache, llama_server: object, same: object) -> None:
    server = Script([says("yes"), says(end="stop")])
    turns = client(server, llama_server=bool(llama_server))
    asyncio.run(turns.play(replace(KEY, cache=cache), ASKED, t_scheduled=0.0))

    assert (server.asked == ASKED) is same


def test_every_prompt_of_every_run_has_a_different_salt() -> None:
    """Role and text stay the same."""
    prompts = [*ASKED, Message("assistant", "because."), Message("user", "really?")]
    keys = [KEY, *(replace(KEY, **{part: 1}) for part in ("repeat", "turn")), replace(KEY, conversation="b")]
    salts = {salted(prompts, key, run)[0].content.removesuffix(" why?") for key in keys for run in ("one", "two")}

    assert len(salts) == 2 * len(keys)
    assert prompts[1:] == salted(prompts, KEY, "one")[1:]
    assert all(re.fullmatch(r"\[[0-9a-f]{8}\]", salt) for salt in salts)


def test_every_cold_warm_up_has_a_different_salt() -> None:
    """Otherwise the second warm-up, which is timed, would find the first in the cache."""
    server = Script([says("yes"), says(end="stop")])
    turns, asked = client(server, llama_server=False), []
    for _ in range(2):
        asyncio.run(turns.warm_up(ASKED, "cold", max_tokens=1))
        asked.append(server.asked[0].content)

    assert len({*asked, ASKED[0].content}) == 3


@pytest.mark.parametrize(("cache", "cached"), [("cold", False), ("warm", True)])
def test_sets_sampler_and_cache_of_a_llama_server(cache: Cache, cached: object) -> None:
    """Temperature 0 alone leaves the other samplers in the chain."""
    body = client(Script([])).body(ASKED, cache, max_tokens=9)

    assert (body["samplers"], body["top_k"], body["temperature"]) == (["top_k"], 1, 0)
    assert body["cache_prompt"] is cached
    assert "ignore_eos" not in body


def test_ignore_eos_is_sent_to_a_llama_server() -> None:
    assert client(Script([]), ignore_eos=True).body(ASKED, "cold", max_tokens=9)["ignore_eos"] is True


@pytest.mark.parametrize(
    ("protocol", "slot"),
    [({}, 0), ({"concurrency": 2}, None), ({"arrivals": Arrivals("poisson", 1.0)}, None)],
    ids=["one-at-a-time", "side-by-side", "open-arrivals"],
)
def test_pins_one_slot_if_requests_run_one_at_a_time(protocol: dict[str, Any], slot: int | None) -> None:
    """With several slots, "warm" would depend on the slot that the server picks."""
    assert slot == client(Script([]), **protocol).body(ASKED, "warm", max_tokens=9).get("id_slot")
