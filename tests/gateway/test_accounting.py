"""Metrics and charges of finished requests, also if they had two engines or were cancelled."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
import pytest

from promptai.engine.simulation import SimulationConfig
from promptai.engine.upstream import Piece, Reply
from promptai.gateway.accounting import charged_tokens, request_record
from promptai.gateway.auth import Caller
from promptai.gateway.metrics import RequestRecord
from promptai.wire.sse import SseEvent
from support_clock import run_virtually
from support_serve import World, listen

PI = SimulationConfig(prefill_tps=100.0, decode_tps=10.0, model="yi")
TALK = [{"role": "user", "content": "Is cell 12 up? " * 30}]


def test_counts_an_answer_resumed_on_another_engine_as_one() -> None:
    """At 10 tokens/s, the first engine dies three seconds after the first token."""

    async def play() -> tuple[RequestRecord, float | None]:
        world = World({"a": PI, "b": PI})
        async with world.running():
            admitted = world.admitted(TALK, max_tokens=50)
            listening = asyncio.create_task(listen(admitted))
            arrived = asyncio.get_running_loop().time()
            await asyncio.sleep(5.0)
            (first,) = admitted.routed.leases
            world.kill(first.replica.id)
            answer = await listening
            assert len(admitted.routed.leases) == 2
            return request_record(admitted, 200, arrived), answer.first_s

    record, first_s = run_virtually(play())

    assert record.ttft_s == first_s
    assert record.generated_tokens == 50
    assert record.queue_s == 0.0
    assert record.prompt_tokens is not None
    assert abs(record.prompt_tokens - 124) < 5


def test_charges_the_computed_prompt_after_a_disconnect() -> None:
    async def play() -> tuple[RequestRecord, int]:
        world = World({"a": PI})
        async with world.running():
            admitted = world.admitted(TALK, max_tokens=50)
            listening = asyncio.create_task(listen(admitted))
            await asyncio.sleep(3.0)
            listening.cancel()
            await asyncio.wait([listening])
            record = request_record(admitted, 499, 0.0)
            return record, charged_tokens(admitted, record)

    record, charged = run_virtually(play())

    assert record.prompt_tokens is not None
    assert record.generated_tokens is not None
    assert abs(record.prompt_tokens - 124) < 5
    assert charged == record.prompt_tokens + record.generated_tokens > 130


def test_charges_embeddings_as_counted_by_the_engine() -> None:
    """Embeddings have no timings, only usage."""

    async def play() -> tuple[RequestRecord, int]:
        world = World({"a": PI})
        async with world.running():
            body = {"model": "yi", "input": "Is cell 12 up? " * 30}
            admitted = world.admission.admit("/v1/embeddings", body, {}, Caller())
            reply = await admitted.routed.response()
            assert reply.status == 200
            record = request_record(admitted, 200, 0.0)
            return record, charged_tokens(admitted, record)

    record, charged = run_virtually(play())

    assert record.prompt_tokens is not None
    assert 90 < record.prompt_tokens == charged


def test_adds_up_several_prompts_and_answers() -> None:
    """llama-server reports timings per answer; those of the last one alone are a fraction."""

    async def play() -> tuple[RequestRecord, int]:
        world = World({"a": PI})
        async with world.running():
            world.admission.upstream = TwoAnswersPerPrompt()  # type: ignore[assignment]
            admitted = world.admission.admit(
                "/v1/completions", {"model": "yi", "prompt": ["a", "b"], "n": 2}, {}, Caller()
            )
            await admitted.routed.response()
            record = request_record(admitted, 200, 0.0)
            return record, charged_tokens(admitted, record)

    record, charged = run_virtually(play())

    assert (record.prompt_tokens, record.cached_tokens, record.generated_tokens) == (19, 3, 16)
    assert charged == 35


@pytest.mark.parametrize(
    ("usage", "status", "generated", "charged"),
    [
        ({"prompt_tokens": 9, "completion_tokens": 40}, 200, 40, 9 + 40),
        (None, 200, None, None),
        (None, 400, 0, None),
    ],
    ids=["reported", "unreported", "refused"],
)
def test_several_answers_without_usage_are_unknown_rather_than_zero(
    usage: dict[str, int] | None, status: int, generated: int | None, charged: int | None
) -> None:
    """Engines other than llama-server get no streaming request; 200 tokens per answer are expected."""

    async def play() -> tuple[RequestRecord, int, int]:
        world = World({"a": PI}, dialects={"a": "openai"})
        async with world.running():
            world.admission.upstream = CompleteResponse(status, usage)  # type: ignore[assignment]
            admitted = world.admission.admit("/v1/completions", {"model": "yi", "prompt": "up?", "n": 2}, {}, Caller())
            reply = await admitted.routed.response()
            assert reply.status == status
            record = request_record(admitted, status, 0.0)
            return record, charged_tokens(admitted, record), round(admitted.routed.slot_request.prompt_tokens)

    record, found, prompt = run_virtually(play())

    assert record.generated_tokens == generated
    assert found == (charged or prompt + (0 if generated == 0 else 400))


def test_charges_the_generated_tokens_of_several_answers_after_a_disconnect() -> None:
    """One of two answers has ended after one token, with timings; the other has 200 so far."""

    async def play() -> tuple[RequestRecord, int]:
        world = World({"a": PI})
        async with world.running():
            world.admission.upstream = EndlessSecondAnswer()  # type: ignore[assignment]
            admitted = world.admitted(TALK, n=2)
            listening = asyncio.create_task(listen(admitted))
            await asyncio.sleep(1.0)
            listening.cancel()
            await asyncio.wait([listening])
            record = request_record(admitted, 499, 0.0)
            return record, round(admitted.routed.slot_request.prompt_tokens)

    record, prompt = run_virtually(play())

    assert (record.prompt_tokens, record.generated_tokens) == (prompt, 201)


def test_cached_tokens_never_exceed_the_prompt_after_a_resumed_answer() -> None:
    """The cache of the second engine also contains the resumed answer, which is not part of the prompt."""

    async def play() -> RequestRecord:
        world = World({"a": PI})
        async with world.running():
            admitted = world.admitted(TALK, max_tokens=50)
            listening = asyncio.create_task(listen(admitted))
            await asyncio.sleep(4.0)
            world.kill("a")
            await asyncio.sleep(3.0)
            world.upstream.revive("sim://a")
            await listening
            timings = admitted.routed.timings
            assert timings is not None
            admitted.routed._state.tally.record(timings=msgspec.structs.replace(timings, prompt_n=1, cache_n=500))
            return request_record(admitted, 200, 0.0)

    record = run_virtually(play())

    assert record.cached_tokens == record.prompt_tokens
    assert record.generated_tokens == 50


class TwoAnswersPerPrompt:
    """An engine that answers two prompts twice each, with timings for each answer."""

    async def stream(self, *_args: Any, **_settings: Any) -> AsyncGenerator[Piece, None]:
        """Return the same for every request."""
        for index, (computed, cached) in enumerate(((8, 3), (1, 10), (8, 0), (1, 7))):
            choice = {"index": index, "text": " up", "finish_reason": "length"}
            timings = {"prompt_n": computed, "prompt_ms": 1, "cache_n": cached, "predicted_n": 4, "predicted_ms": 1}
            data = msgspec.json.encode({"choices": [choice], "timings": timings}).decode()
            yield Piece(0.0, [SseEvent(event="message", data=data)])


class EndlessSecondAnswer:
    """An engine whose second answer never ends."""

    async def stream(self, *_args: Any, **_settings: Any) -> AsyncGenerator[Piece, None]:
        """Return the same for every request."""
        for number in range(201):
            choice = {"index": int(number > 0), "delta": {"content": " up"}}
            timings = {"prompt_n": 9, "prompt_ms": 1, "predicted_n": 1, "predicted_ms": 1}
            end = {"timings": timings} if number == 0 else {}
            choice |= {"finish_reason": "stop"} if number == 0 else {}
            yield Piece(
                0.0, [SseEvent(event="message", data=msgspec.json.encode({"choices": [choice], **end}).decode())]
            )
        await asyncio.get_running_loop().create_future()


class CompleteResponse:
    """An engine that returns a complete response."""

    def __init__(self, status: int, usage: dict[str, int] | None) -> None:
        self._reply = Reply(status, msgspec.json.encode({"choices": [], "usage": usage}), "application/json")

    async def post(self, *_args: Any, **_settings: Any) -> Reply:
        """Return the same for every request."""
        return self._reply
