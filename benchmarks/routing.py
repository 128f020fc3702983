"""Measure the gain of cache-aware routing: ``make bench-routing``; about half an hour.

Four simulated Raspberry Pi 5, sixteen users, the fifty bundled conversations. First on virtual time, with the same
figures on every machine: each strategy, two model sizes, two kinds of caches, a usual and a busy afternoon, several
seeds. Then one system prompt for all. Then over HTTP, with processes, beside LiteLLM's proxy in front of the same
engines; leave the machine alone meanwhile.

No router can beat the oracle: every token of a conversation is computed once, on an idle board. Its gain over
round-robin is printed beside ours; where it is below the target of 5, no router can reach the target.
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
from benchmarks.routing_http import LITELLM, LITELLM_VERSION, RunResult, install_litellm, measure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from promptai.errors import PromptAIError
from support_clock import run_virtually
from support_routing import RULES, Boards, Played, Script, play_before

STRATEGIES = ("affinity", "least-busy", "round-robin")
#: Mean think time before a question, in seconds: a usual afternoon, and a busy one.
THINK_S = {"1.5b": (60.0, 30.0), "7b": (120.0, 60.0)}
#: Slots, and tokens of prompt cache.
CACHES = ((8, 0), (4, 65536))
#: Settings played over HTTP: model size, think time in seconds, slots, tokens of prompt cache.
OVER_HTTP = ("1.5b:60:4:65536", "7b:120:8:0")
TARGET_ROUND_ROBIN, TARGET_ORACLE, TARGET_SHARE = 5.0, 1.3, 1.5


class Setting(NamedTuple):
    """The setting of one table."""

    kind: str
    think_s: float
    slots: int
    host_cache: int
    system: str = ""

    @property
    def boards(self) -> Boards:
        """The simulated boards."""
        return Boards(kind=self.kind, slots=self.slots, host_cache=self.host_cache)

    def script(self, seed: int) -> Script:
        """The users' questions."""
        return Script(think_s=self.think_s, system=self.system, seed=seed)

    @property
    def title(self) -> str:
        """A description for people."""
        kept = f"{self.host_cache:,} tokens of prompt cache" if self.host_cache else "no prompt cache"
        rates = self.boards.config
        return (
            f"{self.kind} ({rates.prefill_tps:g} tokens/s prefill, {rates.decode_tps:g} decode), {self.slots} slots, "
            f"{kept}, think time {self.think_s:g} s"
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
    """Play one run, in a separate process."""
    return run_virtually(play_before(strategy, setting.script(seed), setting.boards))


def rows(setting: Setting, played: dict[str, list[Played]]) -> Iterator[Row]:
    """A table's rows, the oracle last; ``played`` maps a strategy to its runs, one per seed."""
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
    """Format the rows."""
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
    """Whether each target is reached, and its figures."""
    by_name = {row.name: row for row in found}
    ours, oracle, base = by_name["affinity"], by_name["oracle"], by_name["round-robin"]
    bound = f"{TARGET_ROUND_ROBIN:g}; the oracle reaches {oracle.p95_gain:.1f}"
    yield ours.p95_gain >= TARGET_ROUND_ROBIN, f"p95 {ours.p95_gain:.1f} times lower than round-robin's [{bound}]"
    yield ours.above_oracle <= TARGET_ORACLE, f"p95 {ours.above_oracle:.2f} times the oracle's [{TARGET_ORACLE}]"
    tokens = f"{ours.tokens_per_s:.1f} tokens/s against {base.tokens_per_s:.1f}"
    yield ours.tokens_per_s >= base.tokens_per_s, f"{tokens} [no lower]"


def virtual(console: Console, seeds: int) -> int:
    """Play parts one and two; return the number of missed targets."""
    settings = [Setting(kind, think, *cache) for kind in THINK_S for think in THINK_S[kind] for cache in CACHES]
    shared = [Setting(kind, THINK_S[kind][0], *cache, RULES) for kind in THINK_S for cache in CACHES]
    failed = 0
    jobs = [(one, name, seed) for one in settings for name in STRATEGIES for seed in range(seeds)]
    jobs += [(one, "affinity", seed) for one in shared for seed in range(seeds)]
    with ProcessPoolExecutor(os.cpu_count()) as pool, _progress(console) as progress:
        task = progress.add_task("virtual time", total=len(jobs))
        waiting: dict[tuple[Setting, str, int], Future[Played]] = {
            slot_request: pool.submit(run, *slot_request) for slot_request in jobs
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
            text = (
                f"one system prompt for all, {setting.title}: busiest board {most:.2f} times its share [{TARGET_SHARE}]"
            )
            failed += _say(console, most <= TARGET_SHARE, text)
    return failed


def setting_of(text: str) -> Setting:
    """Parse ``1.5b:60:4:65536``; raise ``ValueError`` if it is invalid."""
    kind, think_s, slots, host_cache = text.split(":")
    if kind not in THINK_S:
        raise ValueError(f"unknown model size {kind!r}")
    return Setting(kind, float(think_s), int(slots), int(host_cache))


async def over_http(console: Console, setting: Setting, *, seed: int, faster: float, routers: Sequence[str]) -> int:
    """Play part three; return the number of missed targets."""
    script, boards = setting.script(seed), setting.boards
    questions = sum(conversation.user_turns for conversation in script.order())
    seen: dict[str, RunResult] = {}
    console.print(f"\nover HTTP, {faster:g} times as fast as a board: {setting.title}, seed {seed}", highlight=False)
    shown = Table()
    shown.add_column("router")
    for name in ("n", "p50, s", "p95, s", "p95 in engine, s", "tokens/s", "p95 to oracle", "cached", "busiest"):
        shown.add_column(name, justify="right")
    with tempfile.TemporaryDirectory() as folder, _progress(console) as progress:
        task = progress.add_task("over HTTP", total=questions * len(routers))
        for router in routers:
            progress.update(task, description=f"over HTTP: {router}")
            seen[router] = one = await measure(
                router, script, boards, faster=faster, folder=Path(folder), heard=lambda _: progress.advance(task)
            )
            played = one.played
            shown.add_row(
                router,
                str(len(played.exchanges)),
                f"{played.ttft_s(50):.2f}",
                f"{played.ttft_s(95):.2f}",
                f"{np.percentile(one.engine_s, 95):.2f}",
                f"{played.tokens_per_s:.1f}",
                f"{played.ttft_s(95) / played.oracle_s(95, boards.prefill_tps):.2f}",
                f"{one.cached:.0%}",
                f"{one.busiest:.2f}",
            )
            console.print(f"{router}: p50 {played.ttft_s(50):.2f} s, p95 {played.ttft_s(95):.2f} s", highlight=False)
    console.print(shown)
    failed = 0
    for router in routers:
        if router in {LITELLM, "round-robin"}:
            failed += _say(console, *against(router, seen[router], seen["affinity"], boards.prefill_tps))
    return failed


def against(router: str, other: RunResult, ours: RunResult, prefill_tps: float) -> tuple[bool, str]:
    """
    Whether our p95 reaches the target, and the figures.

    All our seconds count, but only the other router's seconds in its engines: time that a router itself computes is
    scaled by ``faster`` here, and must not count against it.
    """
    theirs = min(other.played.ttft_s(95), float(np.percentile(other.engine_s, 95)))
    gain, possible = theirs / ours.played.ttft_s(95), theirs / ours.played.oracle_s(95, prefill_tps)
    bound = f"{TARGET_ROUND_ROBIN:g}; the oracle reaches {possible:.1f}"
    return gain >= TARGET_ROUND_ROBIN, f"p95 {gain:.1f} times lower than in the engines of {router} [{bound}]"


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def _say(console: Console, holds: bool, text: str) -> int:  # noqa: FBT001  the verdict of the text
    verdict = "[green]holds[/]" if holds else "[yellow]falls short[/]"
    console.print(f"{verdict}  ", end="")
    console.print(text, highlight=False, soft_wrap=True, markup=False)
    return int(not holds)


def main() -> int:
    """Print each table once measured; return 1 when a target is missed."""
    parser = argparse.ArgumentParser(description="Measure the gain of cache-aware routing.")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds on virtual time; 0 skips this part")
    parser.add_argument("--faster", type=float, default=20.0, help="times a board's speed, over HTTP; 0 skips HTTP")
    parser.add_argument("--seed", type=int, default=0, help="seed over HTTP")
    parser.add_argument(
        "--routers", "--doors", default=",".join([*STRATEGIES, LITELLM]), help="over HTTP, besides affinity"
    )
    parser.add_argument(
        "--over-http",
        type=setting_of,
        nargs="+",
        default=[setting_of(one) for one in OVER_HTTP],
        metavar="CLASS:THINK_S:SLOTS:CACHE",
        help=f"settings over HTTP ({' '.join(OVER_HTTP)})",
    )
    options = parser.parse_args()
    console, failed = Console(width=None if sys.stdout.isatty() else 140), 0
    if options.seeds:
        failed += virtual(console, options.seeds)
    if options.faster:
        with console.status("installing LiteLLM, once"):
            installed = install_litellm()
        asked = dict.fromkeys(["affinity", *options.routers.split(",")])
        routers = [name for name in asked if installed or name != LITELLM]
        what = f"LiteLLM {LITELLM_VERSION} with its defaults"
        console.print(what if installed else "LiteLLM cannot be installed here and is left out", highlight=False)
        try:
            for one in options.over_http:
                played = over_http(console, one, seed=options.seed, faster=options.faster, routers=routers)
                failed += asyncio.run(played)
        except PromptAIError as error:
            console.print(f"{error.message}\n{error.hint}", style="red", markup=False)
            return 1
    console.print(f"{failed} targets missed" if failed else "every target reached")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
