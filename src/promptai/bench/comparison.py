"""Measure the engines of one machine against each other, so that the faster one is used because it is faster.

Two runs of one engine on a board that warms up differ by more than two engines do.
So they take turns: each round plays every engine once, every other round backwards,
and what is compared are the two figures of the same round. One engine is loaded at a
time, for there may not be room for two, and each is warmed up before it counts.

An engine is only called faster when the interval of that ratio leaves 1 out; else the
usual order stays. Both are asked over HTTP, by the same client, with the same flags,
for the same tokens. Quality is not compared: the answers are not looked at.
"""

import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, Protocol

import msgspec
import numpy as np

from promptai.bench.statistics import MIN_FOR_INTERVAL, Metric, t975
from promptai.engine.choice import Comparison, MeasuredEngine, Round
from promptai.engine.client import EngineClient
from promptai.engine.flags import EngineFlags
from promptai.engine.launch import RunningEngine, free_port
from promptai.engine.locate import EngineBinary, fingerprint_of
from promptai.errors import EngineError, EngineProtocolError

_TEXT = "The mast lost its link at noon and the alarm went out to all who were on duty. "
_WARM_UP_TOKENS = 2
_CONTEXT_STEP = 256


class ComparisonTask(msgspec.Struct, frozen=True, kw_only=True):
    """What every engine has to do: ``repeats`` times a prompt and an answer."""

    model: Path
    prompt_tokens: int
    tokens: int
    repeats: int
    threads: int


class ComparisonObserver(Protocol):
    """Whoever shows how far a comparison is."""

    def share(self, share: float, detail: str) -> None:
        """0 to 1 of it is done."""


class ComparisonResult(NamedTuple):
    """
    What came out of a comparison.

    Attributes:
        comparison: Of those that got through; the fastest first.
        failed: Why the others did not, by name.
    """

    comparison: Comparison
    failed: dict[str, str]


def turns(engines: int, repeats: int) -> list[list[int]]:
    """Who plays when: one list a round, every other one backwards, so that a drift weighs on all alike. Pure."""
    return [list(range(engines))[:: -1 if number % 2 else 1] for number in range(repeats)]


def ratio(ours: Sequence[float], base: Sequence[float]) -> Metric:
    """
    How many times as much ``ours`` is, from values of the same rounds. Pure.

    The geometric mean of the rounds' own ratios; Student's t on their logarithms from five rounds on.
    """
    logs = np.log(np.array(ours) / np.array(base))
    n, mean = logs.size, float(logs.mean())
    if n < MIN_FOR_INTERVAL:
        return Metric(math.exp(mean), "1", n)
    half = t975(n - 1) * float(logs.std(ddof=1)) / math.sqrt(n)
    return Metric(math.exp(mean), "1", n, (math.exp(mean - half), math.exp(mean + half)))


def rank(seconds: Sequence[Sequence[float]]) -> list[int]:
    """
    Put engines in order by the seconds that they took in each round. Pure.

    Nothing stands before what is surely faster, even where noise tells neither from a third.

    Args:
        seconds: Of each engine, in the usual order; it stays where noise does not tell two apart.
    """
    left, order = list(range(len(seconds))), []
    while left:
        # One at least: who is faster has the smaller mean of the logarithms, so that nobody wins in a circle.
        order.append(next(i for i in left if not any(_faster(seconds[other], seconds[i]) for other in left)))
        left.remove(order[-1])
    return order


def first_is_faster(comparison: Comparison) -> bool:
    """Whether the first engine is faster than the second beyond the noise. Pure."""
    took = [
        [round_seconds(r, comparison.prompt_tokens, comparison.generated_tokens) for r in engine.rounds]
        for engine in comparison.engines[:2]
    ]
    return len(took) == 2 and _faster(took[0], took[1])


def round_seconds(measured: Round, prompt_tokens: int, tokens: int) -> float:
    """What one prompt and its answer take at a round's rates. Pure."""
    return prompt_tokens / measured.prefill_tps + tokens / measured.decode_tps


async def compare(
    engines: Sequence[EngineBinary], task: ComparisonTask, observer: ComparisonObserver, *, cpu: str, log: Path
) -> ComparisonResult:
    """
    Let engines take turns.

    Args:
        engines: In the usual order.
        cpu: The ``processor_key`` of this machine.
        log: What the engines print.
    """
    rounds: dict[int, list[Round]] = {number: [] for number in range(len(engines))}
    failed: dict[str, str] = {}
    # Before, not after: one that is built anew meanwhile is not what was measured.
    fingerprints = [fingerprint_of(engine) or "" for engine in engines]
    for number, order in enumerate(turns(len(engines), task.repeats)):
        for place, who in enumerate(order):
            done = number * len(order) + place
            observer.share(
                done / (task.repeats * len(order)), f"round {number + 1}/{task.repeats}, {engines[who].name}"
            )
            if who not in rounds:
                continue
            try:
                rounds[who].append(await _play(engines[who], task, log))
            except EngineError as error:
                failed[engines[who].name] = error.message
                del rounds[who]
    playing = sorted(rounds)
    took = [[round_seconds(r, task.prompt_tokens, task.tokens) for r in rounds[who]] for who in playing]
    ranked = [playing[place] for place in rank(took)]
    return ComparisonResult(
        Comparison(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            cpu=cpu,
            threads=task.threads,
            model=task.model.stem,
            prompt_tokens=task.prompt_tokens,
            generated_tokens=task.tokens,
            engines=[
                MeasuredEngine(engines[who].name, engines[who].label, fingerprints[who], rounds[who]) for who in ranked
            ],
        ),
        failed,
    )


def _faster(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    interval = ratio(ours, theirs).ci95
    return interval is not None and interval[1] < 1


async def _play(binary: EngineBinary, task: ComparisonTask, log: Path) -> Round:
    """Start an engine, warm it up, measure once, stop it."""
    needed = task.prompt_tokens + task.tokens
    flags = EngineFlags(
        model=str(task.model),
        port=free_port(),
        threads=task.threads,
        context=(needed // _CONTEXT_STEP + 1) * _CONTEXT_STEP,
    )
    async with RunningEngine(binary, flags, log=log) as engine, EngineClient(engine.base_url) as client:
        prompt = (await client.tokenize(_TEXT * (task.prompt_tokens // 8 + 1)))[: task.prompt_tokens]
        body = {"prompt": prompt, "temperature": 0, "cache_prompt": False, "ignore_eos": True}
        await client.complete({**body, "n_predict": _WARM_UP_TOKENS})
        timings = (await client.complete({**body, "n_predict": task.tokens})).timings
    if timings is None or timings.prompt_n < len(prompt) or timings.predicted_n < 2:
        raise EngineProtocolError(f"{binary.name} did not do, or did not tell, what it was asked for")
    if min(timings.prompt_ms, timings.predicted_ms) <= 0:
        raise EngineProtocolError(f"{binary.name} says that it took no time")
    return Round(timings.prompt_n / timings.prompt_ms * 1000, (timings.predicted_n - 1) / timings.predicted_ms * 1000)
