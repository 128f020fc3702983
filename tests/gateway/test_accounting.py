"""What is written down of a request that had two engines."""

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


def test_an_answer_that_went_on_elsewhere_is_counted_as_one_from_its_first_token() -> None:
    """Ten tokens a second; the first board dies three seconds after the first one."""

    async def play() -> tuple[RequestRecord, float | None]:
        world = World({"a": PI, "b": PI})
        async with world.running():
            admitted = world.admitted(TALK, max_tokens=50)
            hearing = asyncio.create_task(listen(admitted))
            arrived = asyncio.get_running_loop().time()
            await asyncio.sleep(5.0)
            (first,) = admitted.routed.leases
            world.kill(first.replica.id)
            heard = await hearing
            assert len(admitted.routed.leases) == 2
            return request_record(admitted, 200, arrived), heard.first_s

    outcome, first_s = run_virtually(play())

    assert outcome.ttft_s == first_s
    assert outcome.generated_tokens == 50
    assert outcome.queue_s == 0.0
    assert outcome.prompt_tokens is not None
    assert abs(outcome.prompt_tokens - 124) < 5


def test_a_client_that_leaves_in_the_middle_is_charged_the_prompt_that_was_computed_for_it() -> None:
    async def play() -> tuple[RequestRecord, int]:
        world = World({"a": PI})
        async with world.running():
            admitted = world.admitted(TALK, max_tokens=50)
            hearing = asyncio.create_task(listen(admitted))
            await asyncio.sleep(3.0)
            hearing.cancel()
            await asyncio.wait([hearing])
            outcome = request_record(admitted, 499, 0.0)
            return outcome, charged_tokens(admitted, outcome)

    outcome, charged = run_virtually(play())

    assert outcome.prompt_tokens is not None
    assert outcome.generated_tokens is not None
    assert abs(outcome.prompt_tokens - 124) < 5
    assert charged == outcome.prompt_tokens + outcome.generated_tokens > 130


def test_embeddings_are_charged_what_the_engine_counted() -> None:
    """They come in one piece, with no account but the usage."""

    async def play() -> tuple[RequestRecord, int]:
        world = World({"a": PI})
        async with world.running():
            body = {"model": "yi", "input": "Is cell 12 up? " * 30}
            admitted = world.admission.admit("/v1/embeddings", body, {}, Caller())
            reply = await admitted.routed.response()
            assert reply.status == 200
            outcome = request_record(admitted, 200, 0.0)
            return outcome, charged_tokens(admitted, outcome)

    outcome, charged = run_virtually(play())

    assert outcome.prompt_tokens is not None
    assert 90 < outcome.prompt_tokens == charged


def test_several_prompts_and_answers_are_counted_and_charged_together() -> None:
    """llama-server tells of each answer by itself; the last account alone would be a fraction."""

    async def play() -> tuple[RequestRecord, int]:
        world = World({"a": PI})
        async with world.running():
            world.admission.upstream = Several()  # type: ignore[assignment]
            admitted = world.admission.admit(
                "/v1/completions", {"model": "yi", "prompt": ["a", "b"], "n": 2}, {}, Caller()
            )
            await admitted.routed.response()
            outcome = request_record(admitted, 200, 0.0)
            return outcome, charged_tokens(admitted, outcome)

    outcome, charged = run_virtually(play())

    assert (outcome.prompt_tokens, outcome.cached_tokens, outcome.generated_tokens) == (19, 3, 16)
    assert charged == 35


@pytest.mark.parametrize(
    ("usage", "status", "generated", "charged"),
    [
        ({"prompt_tokens": 9, "completion_tokens": 40}, 200, 40, 9 + 40),
        (None, 200, None, None),
        (None, 400, 0, None),
    ],
    ids=["told", "untold", "refused"],
)
def test_of_several_answers_in_one_piece_what_is_not_told_is_not_nothing(
    usage: dict[str, int] | None, status: int, generated: int | None, charged: int | None
) -> None:
    """Another engine than llama-server, which is not asked for a stream; 200 tokens are expected of each answer."""

    async def play() -> tuple[RequestRecord, int, int]:
        world = World({"a": PI}, dialects={"a": "openai"})
        async with world.running():
            world.admission.upstream = OnePiece(status, usage)  # type: ignore[assignment]
            admitted = world.admission.admit("/v1/completions", {"model": "yi", "prompt": "up?", "n": 2}, {}, Caller())
            reply = await admitted.routed.response()
            assert reply.status == status
            outcome = request_record(admitted, status, 0.0)
            return outcome, charged_tokens(admitted, outcome), round(admitted.routed.route_request.prompt_tokens)

    outcome, found, prompt = run_virtually(play())

    assert outcome.generated_tokens == generated
    assert found == (charged or prompt + (0 if generated == 0 else 400))


def test_whoever_leaves_in_the_middle_of_several_answers_pays_what_was_made_for_them() -> None:
    """One of two has ended after a token and told its account; the other had 200."""

    async def play() -> tuple[RequestRecord, int]:
        world = World({"a": PI})
        async with world.running():
            world.admission.upstream = Lopsided()  # type: ignore[assignment]
            admitted = world.admitted(TALK, n=2)
            hearing = asyncio.create_task(listen(admitted))
            await asyncio.sleep(1.0)
            hearing.cancel()
            await asyncio.wait([hearing])
            outcome = request_record(admitted, 499, 0.0)
            return outcome, round(admitted.routed.route_request.prompt_tokens)

    outcome, prompt = run_virtually(play())

    assert (outcome.prompt_tokens, outcome.generated_tokens) == (prompt, 201)


def test_what_was_cached_is_a_part_of_the_prompt_also_after_a_joint() -> None:
    """What the first engine said lies in the second one's cache as well, and is no part of the prompt."""

    async def play() -> RequestRecord:
        world = World({"a": PI})
        async with world.running():
            admitted = world.admitted(TALK, max_tokens=50)
            hearing = asyncio.create_task(listen(admitted))
            await asyncio.sleep(4.0)
            world.kill("a")
            await asyncio.sleep(3.0)
            world.upstream.revive("sim://a")
            await hearing
            timings = admitted.routed.timings
            assert timings is not None
            admitted.routed._state.tally.record(timings=msgspec.structs.replace(timings, prompt_n=1, cache_n=500))
            return request_record(admitted, 200, 0.0)

    outcome = run_virtually(play())

    assert outcome.cached_tokens == outcome.prompt_tokens
    assert outcome.generated_tokens == 50


class Several:
    """An engine that answers two prompts twice each, with an account of each answer."""

    async def stream(self, *_args: Any, **_settings: Any) -> AsyncGenerator[Piece, None]:
        """Whatever it is asked."""
        for index, (computed, cached) in enumerate(((8, 3), (1, 10), (8, 0), (1, 7))):
            choice = {"index": index, "text": " up", "finish_reason": "length"}
            timings = {"prompt_n": computed, "prompt_ms": 1, "cache_n": cached, "predicted_n": 4, "predicted_ms": 1}
            data = msgspec.json.encode({"choices": [choice], "timings": timings}).decode()
            yield Piece(0.0, [SseEvent(event="message", data=data)])


class Lopsided:
    """An engine whose second answer does not end."""

    async def stream(self, *_args: Any, **_settings: Any) -> AsyncGenerator[Piece, None]:
        """Whatever it is asked."""
        for number in range(201):
            choice = {"index": int(number > 0), "delta": {"content": " up"}}
            timings = {"prompt_n": 9, "prompt_ms": 1, "predicted_n": 1, "predicted_ms": 1}
            end = {"timings": timings} if number == 0 else {}
            choice |= {"finish_reason": "stop"} if number == 0 else {}
            yield Piece(
                0.0, [SseEvent(event="message", data=msgspec.json.encode({"choices": [choice], **end}).decode())]
            )
        await asyncio.get_running_loop().create_future()


class OnePiece:
    """An engine that answers in one piece."""

    def __init__(self, status: int, usage: dict[str, int] | None) -> None:
        self._reply = Reply(status, msgspec.json.encode({"choices": [], "usage": usage}), "application/json")

    async def post(self, *_args: Any, **_settings: Any) -> Reply:
        """Whatever it is asked."""
        return self._reply
