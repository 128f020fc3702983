"""Run a model for a few seconds and measure its cost: seconds per token, bytes of memory.

A forecast is only as good as its calibration, so a probe uses the same engine, flags and client as a benchmark. Prompts
are random tokens of known number. ``probe`` takes the median of a few tries, ``probe_depths`` the minimum.
"""

from collections.abc import Sequence
from pathlib import Path
from random import Random
from statistics import median

import msgspec

from promptai.device.process import ProcessMemory, ProcessTree
from promptai.engine.client import EngineClient
from promptai.engine.flags import EngineFlags
from promptai.engine.launch import RunningEngine
from promptai.engine.locate import EngineBinary
from promptai.errors import EngineProtocolError
from promptai.wire.llamaserver import Timings

#: Ordinary tokens of promptai-tiny's vocabulary, which every synthetic model has.
_FIRST_TOKEN, _LAST_TOKEN = 300, 1999


class Probed(msgspec.Struct, frozen=True, kw_only=True):
    """
    The measured cost of one engine with one model.

    Attributes:
        decode_s: Seconds per generated token, median of the tries.
        prefill_s: Seconds per prompt token, median of the tries.
        loaded, peak: Memory after loading, and after the prompts.
    """

    decode_s: float
    prefill_s: float
    loaded: ProcessMemory
    peak: ProcessMemory


async def probe(
    binary: EngineBinary,
    flags: EngineFlags,
    *,
    log: Path,
    prompt_tokens: int,
    answer_tokens: int,
    tries: int,
) -> Probed:
    """
    Start an engine, measure it, and stop it.

    Args:
        prompt_tokens: Length of each prompt.
        answer_tokens: Length of each answer.

    Raises:
        EngineError: The engine cannot be started, died, or does not report timings.
    """
    generator = Random(0)  # noqa: S311  the same prompts every time
    async with RunningEngine(binary, flags, log=log) as engine, EngineClient(engine.base_url) as client:
        tree = ProcessTree(engine.pid or 0)
        try:
            loaded = _memory(tree, engine)
            await _play(client, generator, prompt_tokens, 2)  # pages the weights in
            timings = [await _play(client, generator, prompt_tokens, answer_tokens) for _ in range(tries)]
            peak = _memory(tree, engine)
        finally:
            tree.close()
    return Probed(
        decode_s=median(map(_decode_s, timings)),
        prefill_s=median(t.prompt_ms / t.prompt_n / 1000 for t in timings),
        loaded=loaded,
        peak=peak,
    )


async def probe_depths(
    binary: EngineBinary, flags: EngineFlags, *, log: Path, depths: Sequence[int], answer_tokens: int, tries: int
) -> dict[int, float]:
    """
    Start an engine, measure its decoding at several depths, and stop it.

    Each depth extends the previous one, whose tokens are still in the KV cache, so further tries cost almost nothing.
    The minimum of the tries counts: other programs only ever add time, and the differences between depths are small.

    Args:
        depths: Tokens before the answer, ascending.

    Returns:
        Seconds per generated token, by depth.

    Raises:
        EngineError: The engine cannot be started, died, or does not report timings.
    """
    generator = Random(0)  # noqa: S311  the same prompts every time
    prompt = [generator.randint(_FIRST_TOKEN, _LAST_TOKEN) for _ in range(max(depths))]
    found = {}
    async with RunningEngine(binary, flags, log=log) as engine, EngineClient(engine.base_url) as client:
        for depth in depths:
            await _ask(client, prompt[:depth], 2, cached=True)
            timings = [await _ask(client, prompt[:depth], answer_tokens, cached=True) for _ in range(tries)]
            found[depth] = min(map(_decode_s, timings))
    return found


def _decode_s(timings: Timings) -> float:
    return timings.predicted_ms / (timings.predicted_n - 1) / 1000


async def _play(client: EngineClient, generator: Random, prompt_tokens: int, answer_tokens: int) -> Timings:
    prompt = [generator.randint(_FIRST_TOKEN, _LAST_TOKEN) for _ in range(prompt_tokens)]
    return await _ask(client, prompt, answer_tokens, cached=False)


async def _ask(client: EngineClient, prompt: list[int], answer_tokens: int, *, cached: bool) -> Timings:
    body = {"n_predict": answer_tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": cached}
    timings = (await client.complete({"prompt": prompt, **body})).timings
    if timings is None or timings.predicted_n < 2 or not timings.prompt_n:
        raise EngineProtocolError(f"{client.base_url} does not report timings", hint="use another llama-server")
    return timings


def _memory(tree: ProcessTree, engine: RunningEngine) -> ProcessMemory:
    reading = tree.read()
    if reading is None:
        raise engine.death() or EngineProtocolError(f"cannot read the memory of the engine at {engine.base_url}")
    return reading.memory
