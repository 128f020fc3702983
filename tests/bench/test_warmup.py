import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from promptai.bench.plan import Protocol, WarmUpRates
from promptai.bench.target import OpenTarget
from promptai.bench.warmup import _rates, refine_rates, warm_up
from promptai.engine.client import Arrival, EngineClient
from promptai.wire.openai import ChunkChoice, CompletionChunk, Delta, Message, PromptTokensDetails, Usage
from support_runs import make_trace


class Cached(EngineClient):
    """A server with 60 of 100 prompt tokens in its cache, which takes half a second for the rest."""

    async def stream_chat(self, body: dict[str, Any]) -> AsyncGenerator[Arrival, None]:
        """Answer with 21 tokens in 2 s."""
        now, model = time.monotonic(), body["model"]
        yield Arrival(now + 0.5, CompletionChunk([ChunkChoice(Delta(model))]))
        yield Arrival(
            now + 2.5, CompletionChunk([ChunkChoice(Delta(""), "length")], Usage(100, 21, PromptTokensDetails(60)))
        )


def test_cached_tokens_do_not_raise_the_warm_up_rates() -> None:
    opened = OpenTarget(Cached("http://none"), "m", False, None, None, lambda: None)
    client = opened.turn_client(Protocol(), origin=0.0, nonce="")

    rates, _ = asyncio.run(warm_up(client, answer_tokens=5))
    closer = asyncio.run(refine_rates(client, rates, [Message("user", "x" * 300)], at_most_s=4.0))

    assert pytest.approx(80.0, rel=0.05) == rates.prefill_tps
    assert pytest.approx(10.0) == rates.decode_tps
    assert pytest.approx(80.0, rel=0.05) == closer.prefill_tps
    assert closer.chars_per_token == 3.0


@pytest.mark.parametrize(("tokens", "decode_tps"), [(21, 10.5), (1, 50.0)], ids=["all-at-once", "one-token"])
def test_an_answer_without_a_decode_rate_gets_an_estimate(tokens: int, decode_tps: float) -> None:
    """A prompt of 100 tokens takes 2 s, and the answer arrives with it."""
    trace = make_trace(t_first=2.0, t_last=2.0, generated_tokens=tokens)

    assert _rates(trace, 2.0, 300, 500).decode_tps == decode_tps


def test_keeps_the_warm_up_rates_if_refining_them_takes_too_long() -> None:
    """100 characters at 10 per token and 10 tokens/s, and an answer of one second."""
    opened = OpenTarget(EngineClient("http://none"), "m", False, None, None, lambda: None)
    client, rates = opened.turn_client(Protocol(), origin=0.0, nonce=""), WarmUpRates(10.0, 10.0, 10.0, 10.0)

    assert asyncio.run(refine_rates(client, rates, [Message("user", "x" * 100)], at_most_s=1.9)) is rates
