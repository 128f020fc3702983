"""Is anything lost when boards die in the middle of answers? ``make bench-failover``; six minutes.

Real engines with the bundled model behind a gateway, and a client that kills the engine it hears
from with SIGKILL, again and again, until enough answers were interrupted after three tokens and
before their end. Each of them is compared with what the same prompt gives undisturbed, and every
token after the joint is given to an engine that took no part: it must be the likeliest one there,
or tie with it. Then the failures that a real engine cannot be told to have, on pretended ones:
silence, a cut connection, lines that are no JSON, errors in the middle.

``--streams N`` for fewer than 100 of each.
"""

import argparse
import asyncio
import logging
import statistics
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Literal, NamedTuple

from rich.console import Console

from promptai.engine.simulated import Fault, SimulatedEngine
from promptai.engine.simulation import SimulationConfig
from promptai.fleet.replica import Rates
from support_failover import HANG_S, MAX_TOKENS, Boards, ask, chat, front
from support_referee import TIE_NATS, Question, Referee, Run, Tally

BOARDS = 2
PRETENDED = SimulationConfig(prefill_tps=20_000, decode_tps=1000, slots=2)
#: Slots, who tells the tokens, and whether any token may follow any other: half characters, marks of the template.
CONFIGURATIONS: tuple[tuple[int, Literal["ids", "text"], bool], ...] = (
    (1, "text", False),
    (1, "ids", False),
    (3, "text", False),
    (1, "text", True),
    (1, "ids", True),
)
#: Of the promises, so many hold for an answer of chance as well.
_OF_CHANCE = 5
STALL_S = 0.3
#: Of a board whose speed is not known, a silence of a minute may be computing.
RATES = Rates(prefill_tps=PRETENDED.prefill_tps, decode_tps=PRETENDED.decode_tps, source="settings")


class Row(NamedTuple):
    """One promise and what was seen."""

    promise: str
    limit: str
    seen: str
    holds: bool


def rows(tally: Tally, wanted: int) -> list[Row]:
    """What is promised of real engines, and what was seen."""
    least = round(0.95 * wanted)
    beyond = sum(worse > TIE_NATS for worse in tally.worse)
    ties = sum(0 < worse <= TIE_NATS for worse in tally.worse)
    scored = len(tally.worse)
    pauses = [1000 * pause for pause in tally.pauses_s]
    pause = f"median {statistics.median(pauses):.0f} ms, worst {max(pauses):.0f} ms" if pauses else "none"
    return [
        Row("answers that were interrupted", f">= {wanted}", f"{tally.interrupted}", tally.interrupted >= wanted),
        Row("requests that failed", "0", f"{len(tally.failed)} of {tally.asked} {tally.failed[:1]}", not tally.failed),
        Row("requests that hung", "0", f"{tally.hung} (limit {HANG_S:g} s)", not tally.hung),
        Row("repeated or missing at the joint", "0", f"{tally.torn} (n {tally.interrupted})", not tally.torn),
        Row("ended twice, or beyond max_tokens", "0", f"{tally.odd} (n {tally.asked})", not tally.odd),
        Row(
            f"tokens after the joint that are not the model's choice by more than {TIE_NATS} nats",
            "0",
            f"{beyond} (n {scored}; {ties} ties; worst {max(tally.worse, default=0):.4f}; {tally.unscored} not told)",
            not beyond and scored > 0,
        ),
        Row("text equal to the undisturbed one", f">= {least}", f"{tally.same} (n {tally.interrupted})", tally.same
            >= least),
        Row("the same of those that nothing interrupted", "no limit", f"{tally.calm_same} (n {tally.calm})", True),
        Row("longest silence of an interrupted answer", "no limit", pause, True),
    ]  # fmt: skip


async def real(
    asked: list[Question],
    referee: Referee,
    folder: Path,
    slots: int,
    how: Literal["ids", "text"],
    wanted: int,
    *,
    hot: bool = False,
) -> Tally:
    """One configuration."""
    run = Run(asked, referee, how, wanted, hot=hot)
    async with Boards(BOARDS, slots, folder) as boards:
        await run.play(boards, slots)
    return run.tally


async def pretended(kind: Literal["stall", "cut", "malformed", "error", "refuse"], wanted: int) -> Row:
    """
    One failure for each answer, on pretended engines over HTTP.

    Both have it in store: where what is left is long enough, the one that goes on fails too.
    """
    failed: list[str] = []
    same = hung = interrupted = twice = 0
    async with (
        SimulatedEngine(PRETENDED) as one,
        SimulatedEngine(PRETENDED) as other,
        SimulatedEngine(PRETENDED) as reference,
        front([one.base_url, other.base_url], stall_s=STALL_S, rates=RATES) as (server, _, recorder),
    ):
        for number in range(wanted):
            messages = [{"role": "user", "content": f"How is site {number}?"}]
            usual = await ask(reference.base_url, chat(messages))
            after = 0 if kind == "refuse" else 3 + number % (MAX_TOKENS - 6)
            for engine in (one, other):
                engine.simulator.fault = Fault(kind=kind, after_tokens=after, times=1, stall_s=HANG_S)
            try:
                heard = await asyncio.wait_for(ask(server.url, chat(messages, seed=number)), HANG_S)
            except TimeoutError:
                hung += 1
                continue
            failed += [heard.failure] if heard.failure else []
            same += heard.text == usual.text and heard.ended == 1
            joints = len(recorder.joints.get(number, ()))
            interrupted += joints > 0 or kind == "refuse"
            twice += joints > 1
    seen = f"{len(failed)} failed, {hung} hung, {same} equal (n {interrupted}, {twice} of them twice) {failed[:1]}"
    return Row(f"pretended engines, {kind}", "all equal", seen, not failed and same == interrupted == wanted)


async def measured(wanted: int, folder: Path) -> AsyncIterator[tuple[str, list[Row]]]:
    """Everything, part by part."""
    async with Referee(folder) as referee:
        asked = await referee.questions(200)
        for slots, how, hot in CONFIGURATIONS:
            tally = await real(asked, referee, folder, slots, how, wanted, hot=hot)
            name = f"{BOARDS} engines, {slots} slot{'s' * (slots > 1)} each, joined by {how}, {tally.asked} requests"
            found = rows(tally, wanted)
            yield name + ", any token" * hot, found[:_OF_CHANCE] if hot else found
    for kind in ("refuse", "stall", "cut", "malformed", "error"):
        yield "", [await pretended(kind, wanted)]


async def report(console: Console, wanted: int) -> int:
    """Print every promise as soon as it was tried; how many do not hold."""
    fell = 0
    with tempfile.TemporaryDirectory() as folder:
        async for name, found in measured(wanted, Path(folder)):
            if name:
                console.print(f"\n[bold]{name}[/]", highlight=False)
            for row in found:
                fell += not row.holds
                verdict = "[green]holds[/]" if row.holds else "[red]FAILS[/]"
                seen = row.seen.replace("[", "\\[")
                console.print(
                    f"{verdict}  {row.promise}: {seen} [dim]\\[{row.limit}][/]", highlight=False, soft_wrap=True
                )
    return fell


def main() -> int:
    """Exit code 1 when a promise does not hold."""
    parser = argparse.ArgumentParser(description="Is anything lost when boards die in the middle of answers?")
    parser.add_argument("--streams", type=int, default=100, help="interrupted answers of each kind")
    console = Console()
    # The pretended engine tells of each connection that it was told to break.
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
    fell = asyncio.run(report(console, parser.parse_args().streams))
    console.print(f"[red]{fell} promises do not hold[/]" if fell else "[green]every promise holds[/]")
    return int(fell > 0)


if __name__ == "__main__":
    sys.exit(main())
