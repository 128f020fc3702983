"""What does the gateway cost? ``make bench-gateway``; some minutes, on a quiet machine.

The same requests go to an engine directly and through ``promptai serve`` in turn, then directly and through LiteLLM's
proxy, in the same run, so that whatever else the machine does meets both of a pair. (With all three in turn, who comes
after LiteLLM's 12 to 26 ms finds the processor's caches emptied: 2.2 ms were added by us then instead of 1.1.) What is
added is a difference of quantiles with a
95 % interval (bootstrap). The engine answers at once (``gateway_engine.py``); for one stream the bundled model is
asked as well. Engine, gateways and client are processes; the client's own share of a core stands beside.

    --small      for continuous integration: few requests, no LiteLLM, times may be eight times as long
    --alone      without LiteLLM
    --soak N     instead, N requests of every kind (10,000) in one process: what do they leave behind?
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
from benchmarks.gateway_client import Order, Seen, Target
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
from support_real_door import site
from support_soak import SOAKED, Left, grown, look, soak

OURS, DIRECT, PEER = "promptai", "directly", "LiteLLM"
MEDIAN_MS, P99_MS, MEMORY = 1.5, 5.0, 100e6
#: A process with clients, gateway and engines in it, after the first 2,000 requests.
SOAK_MEMORY = 8e6
_BUSY = 0.9
_RESAMPLES, _ENOUGH = 2000, 300


class Row(NamedTuple):
    """One figure; ``holds`` is ``None`` where nothing is promised."""

    what: str
    limit: str
    seen: str
    holds: bool | None = None


class Size(NamedTuple):
    """
    How much is done.

    Attributes:
        requests: Of one stream, each kind; ``real`` of the bundled model.
        lenient: Limits of times are multiplied by it.
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


class Course:
    """Everybody who is asked, and how much."""

    def __init__(self, doors: dict[str, Running], tiny: str, size: Size) -> None:
        self.doors = doors
        self.tiny = tiny
        self.size = size

    def targets(self, *, real: bool = False, **fields: object) -> list[Target]:
        """The same question to all of them."""
        words = "What is a base station?"
        if "pace" in fields:
            words += f" [[pace {fields.pop('pace')}]]"
        model = MODEL if not real else bundled_model().stem
        body = {"model": model, "messages": [{"role": "user", "content": words}], **fields}
        text = msgspec.json.encode(body).decode()
        return [
            Target(name, self.tiny if real and name == DIRECT else door.url, text) for name, door in self.doors.items()
        ]

    async def one_stream(self) -> AsyncIterator[Row]:
        """One request at a time."""
        for what, real, fields in (
            ("1 stream of 16 words", False, {"max_tokens": 16, "stream": True}),
            ("1 answer of 16 words", False, {"max_tokens": 16}),
            ("bundled model, 1 stream of 1 token", True, {"max_tokens": 1, "stream": True}),
            ("bundled model, 1 answer of 1 token", True, {"max_tokens": 1}),
        ):
            rounds = self.size.real if real else self.size.requests
            directly, *doors = self.targets(real=real, **fields)
            for door in doors:
                result = await client(Order(kind="one", targets=[directly, door], rounds=rounds))
                for row in self._added(what, result.seen, result.cpu, first="stream" in fields):
                    yield row

    async def many_streams(self) -> AsyncIterator[Row]:
        """Streams at a pace, all at once: of a hundred boards (limits), and four times that (no limits)."""
        for pace in (5, 20):
            async for row in self._paced(pace, promised=pace == 5):
                yield row

    async def _paced(self, pace: int, *, promised: bool) -> AsyncIterator[Row]:
        streams, seconds = self.size.streams, self.size.seconds
        # An answer lasts as long as it takes until all have begun, so that they begin and end evenly.
        words = round(pace * seconds / 2)
        targets = self.targets(max_tokens=words, stream=True, pace=pace)
        order = Order(kind="many", targets=[], rounds=1, streams=streams, seconds=seconds, ramp_s=words / pace)
        seen = {target.name: Seen() for target in targets}
        used = dict.fromkeys(seen, 0.0)
        cpu = 0.0
        for number in range(self.size.rounds):
            for target in targets if number % 2 else reversed(targets):
                before = self.doors[target.name].cpu_s()
                result = await client(msgspec.structs.replace(order, targets=[target]))
                used[target.name] += self.doors[target.name].cpu_s() - before
                _add(seen[target.name], result.seen[target.name])
                cpu = max(cpu, result.cpu)
        for row in self._added(f"{streams} streams of {pace} words/s", seen, cpu, first=True):
            yield row if promised or not row.limit else Row(row.what, "", row.seen)
        for name in (OURS, PEER):
            if name in seen:
                what = f"each word by itself ({streams} streams of {pace}/s)"
                yield self._per_core(name, what, seen[name], used[name], cpu)

    async def full_speed(self) -> AsyncIterator[Row]:
        """Streams as fast as they can be had."""
        targets = self.targets(max_tokens=500, stream=True, pace=0)
        for target in targets[1:]:
            order = Order(
                kind="many", targets=[target], rounds=1, streams=min(32, self.size.streams), seconds=self.size.seconds
            )
            before = self.doors[target.name].cpu_s()
            result = await client(order)
            used = self.doors[target.name].cpu_s() - before
            yield self._per_core(target.name, "at full speed", result.seen[target.name], used, result.cpu)

    async def memory(self) -> AsyncIterator[Row]:
        """After all of this."""
        for name in (OURS, PEER):
            if name in self.doors:
                now, most = self.doors[name].memory()
                seen = f"{now / 1e6:.0f} MB, at most {most / 1e6:.0f} MB"
                ours = name == OURS
                yield Row(
                    f"{name}: memory after all of this",
                    "100 MB" if ours else "",
                    seen,
                    most <= MEMORY if ours else None,
                )

    def _added(self, what: str, seen: dict[str, Seen], cpu: float, *, first: bool) -> list[Row]:
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
            rows.append(Row(what, "", f"the client used {cpu:.0%} of a core: it is a part of what was measured"))
        return rows

    def _compared(self, what: str, name: str, direct: list[float], through: list[float]) -> list[Row]:
        rows = []
        for label, percent, limit in (("median", 50, MEDIAN_MS), ("99th percentile", 99, P99_MS)):
            if not direct or not through:
                continue
            added, low, high, plain = difference(direct, through, percent)
            seen = f"+{added:.2f} ms ({low:.2f} to {high:.2f}; {plain:.2f} ms directly; n {len(through)})"
            most = limit * self.size.lenient
            # Of a few requests the 99th percentile is the worst, and that is the machine's.
            promised = name == OURS and (percent == 50 or len(through) >= _ENOUGH)
            verdict = added <= most if promised else None
            rows.append(Row(f"{name}: {what}, {label}", f"{most:g} ms" if promised else "", seen, verdict))
        return rows

    def _per_core(self, name: str, what: str, seen: Seen, used: float, cpu: float) -> Row:
        if not seen.chunks or not used:
            return Row(f"{name}: words a second and core, {what}", "", f"nothing came: {seen.why}", name != OURS)
        speed = f"{seen.chunks / used:,.0f} ({1e3 * used / seen.chunks * 1e3:.0f} ms a 1,000 words"
        return Row(
            f"{name}: words a second and core, {what}",
            "",
            f"{speed}; {seen.chunks:,} words; client {cpu:.0%} of a core)",
        )


def difference(direct: list[float], through: list[float], percent: int) -> tuple[float, float, float, float]:
    """What one has more than the other in a percentile, in ms, its 95 % interval, and the percentile without it."""
    one, other = np.array(direct) * 1e3, np.array(through) * 1e3
    random = np.random.default_rng(0)

    def resampled(values: NDArray[np.float64]) -> NDArray[np.float64]:
        picked = random.integers(0, len(values), (_RESAMPLES, len(values)))
        return np.asarray(np.percentile(values[picked], percent, axis=1))

    low, high = np.percentile(resampled(other) - resampled(one), (2.5, 97.5))
    plain = float(np.percentile(one, percent))
    return float(np.percentile(other, percent)) - plain, float(low), float(high), plain


def _add(to: Seen, more: Seen) -> None:
    to.first_s += more.first_s
    to.whole_s += more.whole_s
    to.chunks += more.chunks
    to.busy_s += more.busy_s
    to.failed += more.failed
    to.why = more.why or to.why


async def measure(size: Size, folder: Path, note: Console) -> AsyncIterator[Row]:
    """Start everybody and measure."""
    peer = size.peer and install_litellm()
    if size.peer and not peer:
        note.print(f"{PEER} cannot be installed here, and is left out")
    flags = EngineFlags(model=str(bundled_model()), port=free_port(), threads=1, context=1024)
    async with contextlib.AsyncExitStack() as stack:
        nothing = await stack.enter_async_context(engine())
        real = await stack.enter_async_context(RunningEngine(locate(), flags, log=folder / "engine.log"))
        doors = {DIRECT: nothing}
        doors[OURS] = await stack.enter_async_context(gateway([nothing.url, real.base_url], folder))
        if peer:
            models = {MODEL: nothing.url, flags.alias: real.base_url}
            try:
                doors[PEER] = await stack.enter_async_context(litellm(models, folder))
            except (PromptAIError, TimeoutError) as error:
                note.print(f"{PEER} does not start here, and is left out: {error}")
        course = Course(doors, real.base_url, size)
        for stage in (course.one_stream, course.many_streams, course.full_speed, course.memory):
            async for row in stage():
                yield row


async def soaked(requests: int) -> AsyncIterator[Row]:
    """Look again and again at what requests leave behind."""
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)  # of engines, whose clients leave
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
    yield Row(f"{name}: memory", f"+{SOAK_MEMORY / 1e6:.0f} MB", f"{memory / 1e6:+.1f} MB", memory <= SOAK_MEMORY)


async def show(rows: AsyncIterator[Row], console: Console) -> int:
    """Print every figure as soon as it is there; how many promises do not hold."""
    failed = 0
    async for row in rows:
        verdict = {True: "[green]holds[/]", False: "[red]FAILS[/]", None: "     "}[row.holds]
        failed += row.holds is False
        limit = f" [dim]\\[{row.limit}][/]" if row.limit else ""
        console.print(f"{verdict}  {escape(row.what)}: {escape(row.seen)}{limit}", highlight=False, soft_wrap=True)
    console.print(f"[red]{failed} promises do not hold[/]" if failed else "[green]every promise holds[/]")
    return int(failed > 0)


def main() -> int:
    """Measure; exit code 1 when a promise does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="for continuous integration")
    parser.add_argument("--alone", action="store_true", help="without LiteLLM")
    parser.add_argument("--soak", type=int, metavar="N", help="so many requests of every kind instead")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the processes that were started, too
    console = Console()
    console.print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before it began")
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
