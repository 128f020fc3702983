"""Measure a machine's engines against each other and rank them by speed, as far as noise allows.

Two runs of one engine on a board that warms up differ more than two engines do. So engines take
turns: each round measures every engine once, every other round in reverse order, and the
comparison uses figures of the same round. One engine is loaded at a time, because memory may not
hold two, and each is warmed up before it counts.

An engine counts as faster only if the interval of that ratio excludes 1; otherwise the default
order stays. All are measured over HTTP by the same client with the same flags and tokens. Quality
is not compared: the answers are ignored.
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
    """The work of every engine: a prompt and an answer, ``repeats`` times."""

    model: Path
    prompt_tokens: int
    tokens: int
    repeats: int
    threads: int


class ComparisonObserver(Protocol):
    """A display of a comparison's progress."""

    def share(self, share: float, detail: str) -> None:
        """Show the finished share, 0 to 1."""


class ComparisonResult(NamedTuple):
    """
    The result of a comparison.

    Attributes:
        comparison: The engines that finished, fastest first.
        failed: Errors of the others, by engine name.
    """

    comparison: Comparison
    failed: dict[str, str]


def turns(engines: int, repeats: int) -> list[list[int]]:
    """Return the order of engines in each round, every other one reversed: drift affects all alike. Pure."""
    return [list(range(engines))[:: -1 if number % 2 else 1] for number in range(repeats)]


def ratio(ours: Sequence[float], base: Sequence[float]) -> Metric:
    """
    Return ``ours`` / ``base`` from values of the same rounds. Pure.

    The geometric mean of the rounds' ratios; with at least five rounds, an interval by Student's t on their logarithms.
    """
    logs = np.log(np.array(ours) / np.array(base))
    n, mean = logs.size, float(logs.mean())
    if n < MIN_FOR_INTERVAL:
        return Metric(math.exp(mean), "1", n)
    half = t975(n - 1) * float(logs.std(ddof=1)) / math.sqrt(n)
    return Metric(math.exp(mean), "1", n, (math.exp(mean - half), math.exp(mean + half)))


def rank(seconds: Sequence[Sequence[float]]) -> list[int]:
    """
    Rank engines by their seconds in each round. Pure.

    A significantly faster engine always comes first, even if neither differs significantly from a third.

    Args:
        seconds: Seconds of each engine by round, in the default order, which decides where the difference is noise.
    """
    left, order = list(range(len(seconds))), []
    while left:
        # Never empty: a faster engine has the smaller mean of logarithms, so there is no cycle.
        order.append(next(i for i in left if not any(_faster(seconds[other], seconds[i]) for other in left)))
        left.remove(order[-1])
    return order


def first_is_faster(comparison: Comparison) -> bool:
    """Whether the first engine is significantly faster than the second. Pure."""
    took = [
        [round_seconds(r, comparison.prompt_tokens, comparison.generated_tokens) for r in engine.rounds]
        for engine in comparison.engines[:2]
    ]
    return len(took) == 2 and _faster(took[0], took[1])


def round_seconds(measured: Round, prompt_tokens: int, tokens: int) -> float:
    """Seconds of one prompt and its answer at a round's rates. Pure."""
    return prompt_tokens / measured.prefill_tps + tokens / measured.decode_tps


async def compare(
    engines: Sequence[EngineBinary], task: ComparisonTask, observer: ComparisonObserver, *, cpu: str, log: Path
) -> ComparisonResult:
    """
    Measure engines in turns; an engine that fails is left out of the rest.

    Args:
        engines: In the default order.
        cpu: The ``processor_key`` of this machine.
        log: File for the engines' output.
    """
    rounds: dict[int, list[Round]] = {number: [] for number in range(len(engines))}
    failed: dict[str, str] = {}
    # Before, not after: an engine rebuilt in the meantime is not the one measured.
    fingerprints = [fingerprint_of(engine) or "" for engine in engines]
    for number, order in enumerate(turns(len(engines), task.repeats)):
        for place, index in enumerate(order):
            done = number * len(order) + place
            observer.share(
                done / (task.repeats * len(order)), f"round {number + 1}/{task.repeats}, {engines[index].name}"
            )
            if index not in rounds:
                continue
            try:
                rounds[index].append(await _play(engines[index], task, log))
            except EngineError as error:
                failed[engines[index].name] = error.message
                del rounds[index]
    finished = sorted(rounds)
    seconds = [[round_seconds(r, task.prompt_tokens, task.tokens) for r in rounds[index]] for index in finished]
    ranked = [finished[place] for place in rank(seconds)]
    return ComparisonResult(
        Comparison(
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            cpu=cpu,
            threads=task.threads,
            model=task.model.stem,
            prompt_tokens=task.prompt_tokens,
            generated_tokens=task.tokens,
            engines=[
                MeasuredEngine(engines[index].name, engines[index].label, fingerprints[index], rounds[index])
                for index in ranked
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
        raise EngineProtocolError(f"{binary.name} did not process the requested tokens, or did not report them")
    if min(timings.prompt_ms, timings.predicted_ms) <= 0:
        raise EngineProtocolError(f"{binary.name} reports a duration of 0 ms")
    return Round(timings.prompt_n / timings.prompt_ms * 1000, (timings.predicted_n - 1) / timings.predicted_ms * 1000)
