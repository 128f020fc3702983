"""Measure the overhead of the gateway: ``make bench-gateway``; a few minutes, on a quiet machine.

The same requests go to an engine directly and through ``promptai serve`` in turn, then directly and through LiteLLM's
proxy, in the same run, so that other load on the machine affects both of a pair. (With all three in turn, the target
after LiteLLM's 12 to 26 ms finds the processor's caches emptied: the gateway then added 2.2 ms instead of 1.1.) The
overhead is a difference of quantiles with a 95 % interval (bootstrap). The engine answers at once
(``gateway_engine.py``); single streams also go to the bundled model. Engine, gateways and client are processes; the
client's share of a core is printed with the figures.

    --small      for continuous integration: few requests, no LiteLLM, eightfold time limits
    --alone      without LiteLLM
    --soak N     instead, N requests of every kind (10,000) in one process, to find leaks
"""

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from benchmarks.gateway_client import LoadPlan, Measured, Target
from benchmarks.gateway_engine import MODEL
from benchmarks.gateway_processes import Running, client, engine, gateway, litellm
from benchmarks.routing_http import install_litellm
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape

from promptai.engine.flags import EngineFlags
from promptai.engine.launch import RunningEngine, free_port
from promptai.engine.locate import locate
from promptai.errors import PromptAIError
from promptai.models.bundled import bundled_model
from support_soak import SOAKED, Left, grown, look, soak
from support_sockets import site

OURS, DIRECT, PEER = "promptai", "directly", "LiteLLM"
MEDIAN_MS, P99_MS, MEMORY = 1.5, 5.0, 100e6
#: Allowed growth of a process with clients, gateway and engines after the first 2,000 requests.
SOAK_MEMORY = 8e6
_BUSY = 0.9
_RESAMPLES, _ENOUGH = 2000, 300


class Row(NamedTuple):
    """One figure; ``holds`` is ``None`` if it has no limit."""

    what: str
    limit: str
    seen: str
    holds: bool | None = None


class Size(NamedTuple):
    """
    The extent of a run.

    Attributes:
        requests: Single-stream requests of each kind; ``real`` with the bundled model.
        lenient: Factor on all time limits.
    """

    requests: int
    real: int
    streams: int
    seconds: float
    rounds: int
    lenient: float
    peer: bool


FULL = Size(requests=600, real=500, streams=200, seconds=5.0, rounds=4, lenient=1.0, peer=True)
SMALL = Size(requests=60, real=20, streams=20, seconds=1.0, rounds=1, lenient=8.0, peer=False)


class Comparison:
    """The measurements of all endpoints at one size."""

    def __init__(self, endpoints: dict[str, Running], tiny: str, size: Size) -> None:
        self.endpoints = endpoints
        self.tiny = tiny
        self.size = size

    def targets(self, *, real: bool = False, **fields: object) -> list[Target]:
        """The same request for every endpoint."""
        words = "What is a base station?"
        if "pace" in fields:
            words += f" [[pace {fields.pop('pace')}]]"
        model = MODEL if not real else bundled_model().stem
        body = {"model": model, "messages": [{"role": "user", "content": words}], **fields}
        text = msgspec.json.encode(body).decode()
        return [
            Target(name, self.tiny if real and name == DIRECT else endpoint.url, text)
            for name, endpoint in self.endpoints.items()
        ]

    async def one_stream(self) -> AsyncIterator[Row]:
        """Measure one request at a time."""
        for what, real, fields in (
            ("1 stream of 16 words", False, {"max_tokens": 16, "stream": True}),
            ("1 answer of 16 words", False, {"max_tokens": 16}),
            ("bundled model, 1 stream of 1 token", True, {"max_tokens": 1, "stream": True}),
            ("bundled model, 1 answer of 1 token", True, {"max_tokens": 1}),
        ):
            rounds = self.size.real if real else self.size.requests
            directly, *endpoints = self.targets(real=real, **fields)
            for endpoint in endpoints:
                result = await client(LoadPlan(kind="one", targets=[directly, endpoint], rounds=rounds))
                for row in self._added(what, result.measured, result.cpu, first="stream" in fields):
                    yield row

    async def many_streams(self) -> AsyncIterator[Row]:
        """Measure concurrent streams at the pace of a hundred boards (limits) and at four times that (no limits)."""
        for pace in (5, 20):
            async for row in self._paced(pace, limited=pace == 5):
                yield row

    async def _paced(self, pace: int, *, limited: bool) -> AsyncIterator[Row]:
        streams, seconds = self.size.streams, self.size.seconds
        # Answers last as long as the ramp, so that streams begin and end evenly.
        words = round(pace * seconds / 2)
        targets = self.targets(max_tokens=words, stream=True, pace=pace)
        plan = LoadPlan(kind="many", targets=[], rounds=1, streams=streams, seconds=seconds, ramp_s=words / pace)
        seen = {target.name: Measured() for target in targets}
        used = dict.fromkeys(seen, 0.0)
        cpu = 0.0
        for number in range(self.size.rounds):
            for target in targets if number % 2 else reversed(targets):
                before = self.endpoints[target.name].cpu_s()
                result = await client(msgspec.structs.replace(plan, targets=[target]))
                used[target.name] += self.endpoints[target.name].cpu_s() - before
                _add(seen[target.name], result.measured[target.name])
                cpu = max(cpu, result.cpu)
        for row in self._added(f"{streams} streams of {pace} words/s", seen, cpu, first=True):
            yield row if limited or not row.limit else Row(row.what, "", row.seen)
        for name in (OURS, PEER):
            if name in seen:
                what = f"one write per word ({streams} streams of {pace}/s)"
                yield self._per_core(name, what, seen[name], used[name], cpu)

    async def full_speed(self) -> AsyncIterator[Row]:
        """Measure streams at full speed."""
        targets = self.targets(max_tokens=500, stream=True, pace=0)
        for target in targets[1:]:
            plan = LoadPlan(
                kind="many", targets=[target], rounds=1, streams=min(32, self.size.streams), seconds=self.size.seconds
            )
            before = self.endpoints[target.name].cpu_s()
            result = await client(plan)
            used = self.endpoints[target.name].cpu_s() - before
            yield self._per_core(target.name, "at full speed", result.measured[target.name], used, result.cpu)

    async def memory(self) -> AsyncIterator[Row]:
        """Report memory after all measurements."""
        for name in (OURS, PEER):
            if name in self.endpoints:
                now, most = self.endpoints[name].memory()
                seen = f"{now / 2**20:.0f} MiB, at most {most / 2**20:.0f} MiB"
                ours = name == OURS
                yield Row(
                    f"{name}: memory after all of this",
                    f"{MEMORY / 2**20:.0f} MiB" if ours else "",
                    seen,
                    most <= MEMORY if ours else None,
                )

    def _added(self, what: str, seen: dict[str, Measured], cpu: float, *, first: bool) -> list[Row]:
        rows = []
        for name in (DIRECT, OURS, PEER):
            if name in seen and seen[name].failed:
                why = f"{seen[name].failed}: {seen[name].why}"
                rows.append(Row(f"{name}: {what}", "none fails", why, False if name != PEER else None))
        for name in (OURS, PEER):
            if name not in seen:
                continue
            for part, values in (("first word", "first_s"), ("whole", "whole_s")):
                if part == "whole" or first:
                    rows += self._compared(
                        f"{what}, {part}", name, getattr(seen[DIRECT], values), getattr(seen[name], values)
                    )
        if cpu > _BUSY:
            rows.append(Row(what, "", f"the client used {cpu:.0%} of a core, so the figures include its own limits"))
        return rows

    def _compared(self, what: str, name: str, direct: list[float], through: list[float]) -> list[Row]:
        rows = []
        for label, percent, limit in (("median", 50, MEDIAN_MS), ("99th percentile", 99, P99_MS)):
            if not direct or not through:
                continue
            added, low, high, plain = difference(direct, through, percent)
            seen = f"+{added:.2f} ms ({low:.2f} to {high:.2f}; {plain:.2f} ms directly; n {len(through)})"
            most = limit * self.size.lenient
            # With few requests the 99th percentile is the maximum, which depends on the machine.
            limited = name == OURS and (percent == 50 or len(through) >= _ENOUGH)
            verdict = added <= most if limited else None
            rows.append(Row(f"{name}: {what}, {label}", f"{most:g} ms" if limited else "", seen, verdict))
        return rows

    def _per_core(self, name: str, what: str, seen: Measured, used: float, cpu: float) -> Row:
        if not seen.chunks or not used:
            return Row(f"{name}: words a second and core, {what}", "", f"no answer: {seen.why}", name != OURS)
        speed = f"{seen.chunks / used:,.0f} ({1e3 * used / seen.chunks * 1e3:.0f} ms a 1,000 words"
        return Row(
            f"{name}: words a second and core, {what}",
            "",
            f"{speed}; {seen.chunks:,} words; client {cpu:.0%} of a core)",
        )


def difference(direct: list[float], through: list[float], percent: int) -> tuple[float, float, float, float]:
    """Difference of a percentile in ms, its 95 % interval (low, high), and the percentile of ``direct``."""
    one, other = np.array(direct) * 1e3, np.array(through) * 1e3
    random = np.random.default_rng(0)

    def resampled(values: NDArray[np.float64]) -> NDArray[np.float64]:
        picked = random.integers(0, len(values), (_RESAMPLES, len(values)))
        return np.asarray(np.percentile(values[picked], percent, axis=1))

    low, high = np.percentile(resampled(other) - resampled(one), (2.5, 97.5))
    plain = float(np.percentile(one, percent))
    return float(np.percentile(other, percent)) - plain, float(low), float(high), plain


def _add(to: Measured, more: Measured) -> None:
    to.first_s += more.first_s
    to.whole_s += more.whole_s
    to.chunks += more.chunks
    to.busy_s += more.busy_s
    to.failed += more.failed
    to.why = more.why or to.why


async def measure(size: Size, folder: Path, note: Console) -> AsyncIterator[Row]:
    """Start all processes and measure."""
    peer = size.peer and install_litellm()
    if size.peer and not peer:
        note.print(f"{PEER} cannot be installed here and is left out")
    flags = EngineFlags(model=str(bundled_model()), port=free_port(), threads=1, context=1024)
    async with contextlib.AsyncExitStack() as stack:
        nothing = await stack.enter_async_context(engine())
        real = await stack.enter_async_context(RunningEngine(locate(), flags, log=folder / "engine.log"))
        endpoints = {DIRECT: nothing}
        endpoints[OURS] = await stack.enter_async_context(gateway([nothing.url, real.base_url], folder))
        if peer:
            models = {MODEL: nothing.url, flags.alias: real.base_url}
            try:
                endpoints[PEER] = await stack.enter_async_context(litellm(models, folder))
            except (PromptAIError, TimeoutError) as error:
                note.print(f"{PEER} does not start here and is left out: {error}")
        comparison = Comparison(endpoints, real.base_url, size)
        for stage in (comparison.one_stream, comparison.many_streams, comparison.full_speed, comparison.memory):
            async for row in stage():
                yield row


async def soaked(requests: int) -> AsyncIterator[Row]:
    """Compare resources before and after requests, several times."""
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)  # engines whose clients disconnect
    warm_up, step = min(2000, max(1, requests // 5)), max(1, requests // 5)
    async with site(*SOAKED) as found:
        await soak(found, warm_up)
        before = await look(found)
        for sent in range(step, requests + 1, step):
            await soak(found, step, first=warm_up + sent - step)
            after = await look(found)
            for row in _left(sent, before, after):
                yield row


def _left(sent: int, before: Left, after: Left) -> Iterator[Row]:
    name = f"{sent:,} requests"
    for what, one, other, spare in (
        ("file descriptors", before.files, after.files, 0),
        ("tasks", before.tasks, after.tasks, 0),
        ("timers", before.timers, after.timers, 2),
    ):
        yield Row(f"{name}: {what}", str(one), str(other), other <= one + spare)
    more = grown(before, after, at_least=max(10, sent // 100))
    yield Row(f"{name}: containers that grow", "none", ", ".join(more) or "none", not more)
    memory = after.rss - before.rss
    yield Row(f"{name}: memory", f"+{SOAK_MEMORY / 2**20:.1f} MiB", f"{memory / 2**20:+.1f} MiB", memory <= SOAK_MEMORY)


async def show(rows: AsyncIterator[Row], console: Console) -> int:
    """Print each figure once measured; return 1 when a guarantee does not hold."""
    failed = 0
    async for row in rows:
        verdict = {True: "[green]holds[/]", False: "[red]FAILS[/]", None: "     "}[row.holds]
        failed += row.holds is False
        limit = f" [dim]\\[{row.limit}][/]" if row.limit else ""
        console.print(f"{verdict}  {escape(row.what)}: {escape(row.seen)}{limit}", highlight=False, soft_wrap=True)
    console.print(f"[red]{failed} guarantees do not hold[/]" if failed else "[green]every guarantee holds[/]")
    return int(failed > 0)


def main() -> int:
    """Measure; return 1 when a guarantee does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="for continuous integration")
    parser.add_argument("--alone", action="store_true", help="without LiteLLM")
    parser.add_argument("--soak", type=int, metavar="N", help="instead, N requests of every kind")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # also ends the started processes
    console = Console()
    console.print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the start")
    with tempfile.TemporaryDirectory() as folder:
        size = SMALL if given.small else FULL._replace(peer=not given.alone)
        rows = soaked(given.soak) if given.soak else measure(size, Path(folder), console)
        try:
            return asyncio.run(show(rows, console))
        except PromptAIError as error:
            console.print(f"[red]{escape(str(error))}[/]")
            return 1


if __name__ == "__main__":
    sys.exit(main())
