"""Measure our own harness against an engine with known, configured speed.

The truth is the configuration of the simulated engine and, independently, the times at which the
engine really wrote each chunk. Any difference between truth and measurement is the harness's own
error on this machine at this moment: scheduling, parsing, a busy processor.
"""

from collections.abc import Callable

import msgspec

from promptai.bench.client import TurnClient
from promptai.bench.plan import Protocol
from promptai.bench.trace import Trace, TraceKey
from promptai.engine.client import EngineClient
from promptai.engine.simulated import SimulatedEngine
from promptai.engine.simulation import SimulationConfig, render, tokenize
from promptai.errors import PromptAIError
from promptai.wire.openai import Message

#: Largest relative error with which results may be published.
TOLERANCE = 0.02


class SelftestCase(msgspec.Struct, frozen=True):
    """A prompt length, with rates at which a request takes one to two seconds."""

    prompt_tokens: int
    prefill_tps: float
    decode_tps: float
    generated_tokens: int


CASES = (
    SelftestCase(prompt_tokens=20, prefill_tps=40, decode_tps=40, generated_tokens=41),
    SelftestCase(prompt_tokens=200, prefill_tps=400, decode_tps=40, generated_tokens=41),
    SelftestCase(prompt_tokens=2000, prefill_tps=2000, decode_tps=40, generated_tokens=41),
)


class SelftestCheck(msgspec.Struct, frozen=True):
    """One metric and its true value."""

    case: SelftestCase
    metric: str
    unit: str
    expected: float
    measured: float

    @property
    def error(self) -> float:
        """(measured - expected) / expected."""
        return self.measured / self.expected - 1


async def selftest(cases: tuple[SelftestCase, ...] = CASES) -> list[SelftestCheck]:
    """
    Play every case once, each on a new simulated engine.

    Raises:
        PromptAIError: A token count is wrong or an answer is missing, which is a bug, not noise.
    """
    found: list[SelftestCheck] = []
    for case in cases:
        config = SimulationConfig(prefill_tps=case.prefill_tps, decode_tps=case.decode_tps, batch=4096)
        async with SimulatedEngine(config) as engine, EngineClient(engine.base_url) as client:
            protocol = Protocol(max_tokens=case.generated_tokens)
            turns = TurnClient(client, protocol, model=config.model, llama_server=True, origin=0.0)
            key = TraceKey("simulated", "cold", 0, "selftest", 0)
            played = await turns.play(key, prompt_of(case.prompt_tokens), t_scheduled=turns.now())
            if played.failure is not None:
                raise played.failure
            found += _compare(case, played.trace, engine.sent[-1].t_chunks)
    return found


def prompt_of(tokens: int) -> list[Message]:
    """Return a prompt of exactly ``tokens`` tokens on the simulated engine, template included."""
    marks = len(tokenize(render([Message("user", "")])))
    return [Message("user", "word" + " word" * (tokens - marks - 1))]


def _compare(case: SelftestCase, trace: Trace, sent: list[float]) -> list[SelftestCheck]:
    counts = (trace.prompt_tokens, trace.cached_tokens, trace.generated_tokens, trace.chunks)
    expected_counts = (case.prompt_tokens, 0, case.generated_tokens, case.generated_tokens)
    if counts != expected_counts:
        raise PromptAIError(f"token counts are {counts}, expected {expected_counts}", hint="please report this bug")
    prefill_s = case.prompt_tokens / case.prefill_tps
    decode_s = (case.generated_tokens - 1) / case.decode_tps
    truths: dict[str, tuple[str, float, Callable[[Trace], float | None]]] = {
        "ttft_s": ("s", prefill_s, lambda t: t.ttft_s),
        "prefill_tps": ("tokens/s", case.prefill_tps, lambda t: t.prefill_tps),
        "decode_tps": ("tokens/s", case.decode_tps, lambda t: t.decode_tps),
        "total_tps": (
            "tokens/s",
            (case.prompt_tokens + case.generated_tokens) / (prefill_s + decode_s),
            lambda t: t.total_tps,
        ),
        # The actual times of the first and last chunk, not the configured ones.
        "decode_s, as sent": ("s", sent[-1] - sent[0], lambda t: t.decode_s),
    }
    checks = []
    for name, (unit, expected, read) in truths.items():
        measured = read(trace)
        if measured is None:
            raise PromptAIError(f"{name} was not measured", hint="please report this bug")
        checks.append(SelftestCheck(case, name, unit, expected, measured))
    return checks
