"""Warm a target up, and measure the rates that forecasts start from.

These rates are rough: one or two short requests, connecting and tokenising included. They
decide what fits a time budget and what a progress display forecasts; no report contains them.
"""

import asyncio
from pathlib import Path

from promptai.bench.client import TurnClient
from promptai.bench.manifest import Manifest
from promptai.bench.plan import RequestWork, WarmUpRates
from promptai.bench.target import open_target
from promptai.bench.trace import Trace
from promptai.errors import EngineDiedError
from promptai.wire.openai import Message

_WARM_UP_TOKENS = 24
#: About a hundred tokens: enough to page the weights in and to see both rates.
_WARM_UP = (
    "Before the shift begins, list what you would look at first on a small network edge: the mains and the "
    "battery, the temperature of the cabinet, the links to the neighbours, the clock, the free memory and the "
    "free disk, the radio's own alarms, and what the last shift wrote down. Say for each in a few words why it "
    "matters, which value would worry you, and whom you would call when it is out of range at night."
)


async def warm_up(client: TurnClient, *, answer_tokens: float) -> tuple[WarmUpRates, float]:
    """
    Let a target page its weights in, then measure its rates.

    Returns:
        The rates, and the seconds of the very first request.

    Raises:
        EngineError: The target does not answer.
    """
    first = await client.warm_up([Message("user", _WARM_UP)], "cold", max_tokens=_WARM_UP_TOKENS)
    # The second request is measured; the first includes paging.
    trace = await client.warm_up([Message("user", _WARM_UP)], "cold", max_tokens=_WARM_UP_TOKENS)
    return _rates(trace, trace.prompt_s, len(_WARM_UP), answer_tokens), first.t_end - first.t_sent


async def measure_rates(
    manifest: Manifest,
    prompt: list[Message],
    *,
    at_most_s: float,
    api_key: str | None,
    silence_s: float,
    logs: Path,
) -> dict[str, WarmUpRates]:
    """
    Open every target once and measure its rates.

    Args:
        prompt: A prompt of the workload's mean length.
        at_most_s: Longest expected answer to it; a slower target keeps its warm-up rates.
        logs: Directory for the logs of engines.

    Raises:
        EngineError: A target cannot be opened or does not answer.
    """
    rates = {}
    for facts in manifest.targets:
        log = logs / f"{facts.name}.log"
        async with open_target(facts, log=log, api_key=api_key, silence_s=silence_s) as opened:
            nonce = f"{manifest.created}/budget/{facts.name}"
            client = opened.turn_client(manifest.protocol, origin=0.0, nonce=nonce)
            try:
                rough, _ = await warm_up(client, answer_tokens=manifest.protocol.max_tokens)
                rates[facts.name] = await refine_rates(client, rough, prompt, at_most_s=at_most_s)
            except EngineDiedError as error:
                raise await asyncio.to_thread(opened.death) or error from None
    return rates


async def refine_rates(
    client: TurnClient, rates: WarmUpRates, prompt: list[Message], *, at_most_s: float
) -> WarmUpRates:
    """
    Measure a target's rates at a length of the workload: decoding is slower after long prompts.

    These rates include everything that a request waits for, such as tokenising and connecting.

    Args:
        rates: From the warm-up; returned unchanged if the measurement would take longer than ``at_most_s``.

    Raises:
        EngineError: The target does not answer.
    """
    chars = sum(len(message.content) for message in prompt)
    if RequestWork(chars, 0, 1).seconds(rates) > at_most_s:
        return rates
    trace = await client.warm_up(prompt, "cold", max_tokens=round(rates.answer_tokens))
    return _rates(trace, trace.ttft_s, chars, rates.answer_tokens)


def _rates(trace: Trace, prefill_s: float | None, chars: int, answer_tokens: float) -> WarmUpRates:
    tokens = trace.prompt_tokens or chars / 4
    # Cached tokens took no time.
    prefill_tps = (trace.uncached_tokens or tokens) / (prefill_s or trace.ttft_s or 1.0)
    # All chunks may arrive at once at a client that was not scheduled in time: then the decode rate includes prefill.
    # An answer of one token shows no decode rate; the prefill rate is its upper bound.
    steps, latency_s = trace.decode_steps, trace.latency_s
    whole_tps = (steps + 1) / latency_s if steps and latency_s else None
    return WarmUpRates(
        prefill_tps=prefill_tps,
        decode_tps=trace.decode_tps or whole_tps or prefill_tps,
        chars_per_token=chars / tokens,
        answer_tokens=answer_tokens,
    )
