"""What does it gain to send people where their cache is? ``make bench-routing``; about half an hour.

Four simulated Raspberry Pi 5, sixteen people, the fifty bundled conversations. First on virtual time, where the
same figures come out on every machine: each strategy, two classes of models, two ways of keeping caches, a usual
and a busy afternoon, several seeds. Then one system prompt for all. Then over HTTP, with processes, and LiteLLM's
proxy beside ours before the same engines; leave the machine alone meanwhile.

The oracle is what no router can beat: every token of a conversation is computed once, on a board that is idle. How
much better than round-robin that would be stands beside what we reach; where it is below the aim of 5, nobody
can reach the aim.
"""

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from benchmarks.routing_http import LITELLM, LITELLM_VERSION, Seen, install_litellm, measure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from promptai.errors import PromptAIError
from support_clock import run_virtually
from support_routing import RULES, Boards, Played, Script, play_before

STRATEGIES = ("affinity", "least-busy", "round-robin")
#: Mean seconds of thought before a question: a usual afternoon, and a busy one.
THINK_S = {"1.5b": (60.0, 30.0), "7b": (120.0, 60.0)}
#: Slots, and tokens of prompt cache beside them.
CACHES = ((8, 0), (4, 65536))
#: What is played over HTTP: class of model, seconds of thought, slots, tokens of prompt cache.
OVER_HTTP = ("1.5b:60:4:65536", "7b:120:8:0")
AIM_ROUND_ROBIN, AIM_ORACLE, AIM_SHARE = 5.0, 1.3, 1.5


class Setting(NamedTuple):
    """One table."""

    kind: str
    think_s: float
    slots: int
    host_cache: int
    system: str = ""

    @property
    def boards(self) -> Boards:
        """What it is played before."""
        return Boards(kind=self.kind, slots=self.slots, host_cache=self.host_cache)

    def script(self, seed: int) -> Script:
        """What is played."""
        return Script(think_s=self.think_s, system=self.system, seed=seed)

    @property
    def title(self) -> str:
        """In words."""
        kept = f"{self.host_cache:,} tokens of prompt cache" if self.host_cache else "no prompt cache"
        rates = self.boards.config
        return (
            f"{self.kind} ({rates.prefill_tps:g} tokens/s prefill, {rates.decode_tps:g} decode), {self.slots} slots, "
            f"{kept}, thinking {self.think_s:g} s"
        )


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One strategy in one setting; medians over seeds, ratios too."""

    name: str
    n: int
    p50_s: float
    p95_s: float
    tokens_per_s: float
    p50_gain: float
    p95_gain: float
    above_oracle: float
    busiest: float


def run(setting: Setting, strategy: str, seed: int) -> Played:
    """One run, in a process of its own."""
    return run_virtually(play_before(strategy, setting.script(seed), setting.boards))


def rows(setting: Setting, played: dict[str, list[Played]]) -> Iterator[Row]:
    """A table's rows, the oracle last; ``played``: by strategy, a run for each seed."""
    rate, boards, base = setting.boards.prefill_tps, setting.boards.boards, played["round-robin"]
    middle = statistics.median
    for name, runs in played.items():
        yield Row(
            name=name,
            n=sum(len(one.exchanges) for one in runs),
            p50_s=middle(one.ttft_s(50) for one in runs),
            p95_s=middle(one.ttft_s(95) for one in runs),
            tokens_per_s=middle(one.tokens_per_s for one in runs),
            p50_gain=middle(b.ttft_s(50) / one.ttft_s(50) for one, b in zip(runs, base, strict=True)),
            p95_gain=middle(b.ttft_s(95) / one.ttft_s(95) for one, b in zip(runs, base, strict=True)),
            above_oracle=middle(one.ttft_s(95) / one.oracle_s(95, rate) for one in runs),
            busiest=max(one.busiest(boards) for one in runs),
        )
    yield Row(
        name="oracle",
        n=sum(len(one.exchanges) for one in base),
        p50_s=middle(one.oracle_s(50, rate) for one in base),
        p95_s=middle(one.oracle_s(95, rate) for one in base),
        tokens_per_s=float("nan"),
        p50_gain=middle(one.ttft_s(50) / one.oracle_s(50, rate) for one in base),
        p95_gain=middle(one.ttft_s(95) / one.oracle_s(95, rate) for one in base),
        above_oracle=1.0,
        busiest=float("nan"),
    )


def table(title: str, found: Sequence[Row]) -> Table:
    """For people."""
    shown = Table(title=title, title_justify="left", min_width=len(title) + 2)
    shown.add_column("routing")
    for name in ("n", "p50, s", "p95, s", "tokens/s", "p50 gain", "p95 gain", "p95 to oracle", "busiest"):
        shown.add_column(name, justify="right")
    for row in found:
        bounded = row.name == "oracle"
        shown.add_row(
            row.name,
            str(row.n),
            f"{row.p50_s:.2f}",
            f"{row.p95_s:.2f}",
            "–" if bounded else f"{row.tokens_per_s:.1f}",
            f"{row.p50_gain:.1f}×",  # noqa: RUF001  times
            f"{row.p95_gain:.1f}×",  # noqa: RUF001
            f"{row.above_oracle:.2f}",
            "–" if bounded else f"{row.busiest:.2f}",
            style="dim" if bounded else "bold" if row.name == "affinity" else "",
        )
    return shown


def verdicts(found: Sequence[Row]) -> Iterator[tuple[bool, str]]:
    """Which aims hold."""
    by_name = {row.name: row for row in found}
    ours, oracle, base = by_name["affinity"], by_name["oracle"], by_name["round-robin"]
    bound = f"{AIM_ROUND_ROBIN:g}; no router can do better than {oracle.p95_gain:.1f}"
    yield ours.p95_gain >= AIM_ROUND_ROBIN, f"p95 {ours.p95_gain:.1f} times lower than round-robin's [{bound}]"
    yield ours.above_oracle <= AIM_ORACLE, f"p95 {ours.above_oracle:.2f} times the oracle's [{AIM_ORACLE}]"
    tokens = f"{ours.tokens_per_s:.1f} tokens/s against {base.tokens_per_s:.1f}"
    yield ours.tokens_per_s >= base.tokens_per_s, f"{tokens} [no lower]"


def virtual(console: Console, seeds: int) -> int:
    """Parts one and two; how many aims do not hold."""
    settings = [Setting(kind, think, *cache) for kind in THINK_S for think in THINK_S[kind] for cache in CACHES]
    shared = [Setting(kind, THINK_S[kind][0], *cache, RULES) for kind in THINK_S for cache in CACHES]
    failed = 0
    jobs = [(one, name, seed) for one in settings for name in STRATEGIES for seed in range(seeds)]
    jobs += [(one, "affinity", seed) for one in shared for seed in range(seeds)]
    with ProcessPoolExecutor(os.cpu_count()) as pool, _progress(console) as progress:
        task = progress.add_task("virtual time", total=len(jobs))
        waiting: dict[tuple[Setting, str, int], Future[Played]] = {
            route_request: pool.submit(run, *route_request) for route_request in jobs
        }
        for future in waiting.values():
            future.add_done_callback(lambda _: progress.advance(task))
        for setting in settings:
            runs = {name: [waiting[setting, name, seed].result() for seed in range(seeds)] for name in STRATEGIES}
            found = list(rows(setting, runs))
            console.print(table(f"{setting.title}, {seeds} seeds", found))
            failed += sum(_say(console, holds, text) for holds, text in verdicts(found))
        for setting in shared:
            most = max(waiting[setting, "affinity", seed].result().busiest(4) for seed in range(seeds))
            text = f"one system prompt for all, {setting.title}: busiest board {most:.2f} times its share [{AIM_SHARE}]"
            failed += _say(console, most <= AIM_SHARE, text)
    return failed


def setting_of(text: str) -> Setting:
    """``1.5b:60:4:65536``; raises ``ValueError`` where it is none."""
    kind, think_s, slots, host_cache = text.split(":")
    if kind not in THINK_S:
        raise ValueError(f"no class of models is called {kind}")
    return Setting(kind, float(think_s), int(slots), int(host_cache))


async def over_http(console: Console, setting: Setting, *, seed: int, faster: float, doors: Sequence[str]) -> int:
    """Part three; how many aims do not hold."""
    script, boards = setting.script(seed), setting.boards
    questions = sum(conversation.user_turns for conversation in script.order())
    seen: dict[str, Seen] = {}
    console.print(f"\nover HTTP, {faster:g} times as fast as a board: {setting.title}, seed {seed}", highlight=False)
    shown = Table()
    shown.add_column("door")
    for name in ("n", "p50, s", "p95, s", "p95 in engine, s", "tokens/s", "p95 to oracle", "cached", "busiest"):
        shown.add_column(name, justify="right")
    with tempfile.TemporaryDirectory() as folder, _progress(console) as progress:
        task = progress.add_task("over HTTP", total=questions * len(doors))
        for door in doors:
            progress.update(task, description=f"over HTTP: {door}")
            seen[door] = one = await measure(
                door, script, boards, faster=faster, folder=Path(folder), heard=lambda _: progress.advance(task)
            )
            played = one.played
            shown.add_row(
                door,
                str(len(played.exchanges)),
                f"{played.ttft_s(50):.2f}",
                f"{played.ttft_s(95):.2f}",
                f"{np.percentile(one.engine_s, 95):.2f}",
                f"{played.tokens_per_s:.1f}",
                f"{played.ttft_s(95) / played.oracle_s(95, boards.prefill_tps):.2f}",
                f"{one.cached:.0%}",
                f"{one.busiest:.2f}",
            )
            console.print(f"{door}: p50 {played.ttft_s(50):.2f} s, p95 {played.ttft_s(95):.2f} s", highlight=False)
    console.print(shown)
    failed = 0
    for door in doors:
        if door in {LITELLM, "round-robin"}:
            failed += _say(console, *against(door, seen[door], seen["affinity"], boards.prefill_tps))
    return failed


def against(door: str, other: Seen, ours: Seen, prefill_tps: float) -> tuple[bool, str]:
    """
    Whether ours is as much better as it should be.

    All of our seconds count, and of the other's those in its engines alone: what a door itself computes counts
    ``faster`` times here, and must not be held against it.
    """
    theirs = min(other.played.ttft_s(95), float(np.percentile(other.engine_s, 95)))
    gain, possible = theirs / ours.played.ttft_s(95), theirs / ours.played.oracle_s(95, prefill_tps)
    bound = f"{AIM_ROUND_ROBIN:g}; no router can do better than {possible:.1f}"
    return gain >= AIM_ROUND_ROBIN, f"p95 {gain:.1f} times lower than in the engines of {door} [{bound}]"


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def _say(console: Console, holds: bool, text: str) -> int:  # noqa: FBT001  a verdict and its words
    verdict = "[green]holds[/]" if holds else "[yellow]falls short[/]"
    console.print(f"{verdict}  ", end="")
    console.print(text, highlight=False, soft_wrap=True, markup=False)
    return int(not holds)


def main() -> int:
    """Print each table as soon as it is there; exit code 1 when an aim does not hold."""
    parser = argparse.ArgumentParser(description="What routing by caches gains.")
    parser.add_argument("--seeds", type=int, default=3, help="of the runs on virtual time; 0 leaves them out")
    parser.add_argument("--faster", type=float, default=20.0, help="than a board, over HTTP; 0 leaves HTTP out")
    parser.add_argument("--seed", type=int, default=0, help="of the runs over HTTP")
    parser.add_argument("--doors", default=",".join([*STRATEGIES, LITELLM]), help="over HTTP, beside affinity")
    parser.add_argument(
        "--over-http",
        type=setting_of,
        nargs="+",
        default=[setting_of(one) for one in OVER_HTTP],
        metavar="CLASS:THINK_S:SLOTS:CACHE",
        help=f"what is played there ({' '.join(OVER_HTTP)})",
    )
    options = parser.parse_args()
    console, failed = Console(width=None if sys.stdout.isatty() else 140), 0
    if options.seeds:
        failed += virtual(console, options.seeds)
    if options.faster:
        with console.status("LiteLLM is being installed, once"):
            installed = install_litellm()
        asked = dict.fromkeys(["affinity", *options.doors.split(",")])
        doors = [door for door in asked if installed or door != LITELLM]
        what = f"LiteLLM {LITELLM_VERSION}, as it is by default"
        console.print(what if installed else "LiteLLM cannot be installed here; its row is left out", highlight=False)
        try:
            for one in options.over_http:
                played = over_http(console, one, seed=options.seed, faster=options.faster, doors=doors)
                failed += asyncio.run(played)
        except PromptAIError as error:
            console.print(f"{error.message}\n{error.hint}", style="red", markup=False)
            return 1
    console.print(f"{failed} aims are missed" if failed else "every aim is reached")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
