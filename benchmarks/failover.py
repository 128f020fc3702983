"""Check that no text is lost or repeated when engines die mid-answer: ``make bench-failover``; six minutes.

Real engines run the bundled model behind a gateway. The client kills the engine that answers it with SIGKILL, again
and again, until enough answers have been interrupted after three tokens and before their end. Each is compared with
the answer to the same prompt undisturbed, and an engine that took no part scores every token after the resume: it must
be the likeliest one there, or tie with it. Then simulated engines produce the failures that a real engine cannot:
silence, a cut connection, lines that are not JSON, errors in the middle.

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
SIMULATED = SimulationConfig(prefill_tps=20_000, decode_tps=1000, slots=2)
#: Slots, source of the token ids, and whether any token may follow any other (half characters, template markers).
CONFIGURATIONS: tuple[tuple[int, Literal["ids", "text"], bool], ...] = (
    (1, "text", False),
    (1, "ids", False),
    (3, "text", False),
    (1, "text", True),
    (1, "ids", True),
)
#: The first rows of ``rows`` that also apply to answers at high temperature.
_RANDOM_ROWS = 5
STALL_S = 0.3
#: Without known rates, a minute of silence could be computing.
RATES = Rates(prefill_tps=SIMULATED.prefill_tps, decode_tps=SIMULATED.decode_tps, source="settings")


class Row(NamedTuple):
    """One guarantee and the measured value."""

    guarantee: str
    limit: str
    measured: str
    holds: bool


def rows(tally: Tally, wanted: int) -> list[Row]:
    """Guarantees for real engines, and the measured values."""
    least = round(0.95 * wanted)
    beyond = sum(worse > TIE_NATS for worse in tally.worse)
    ties = sum(0 < worse <= TIE_NATS for worse in tally.worse)
    scored = len(tally.worse)
    pauses = [1000 * pause for pause in tally.pauses_s]
    pause = f"median {statistics.median(pauses):.0f} ms, worst {max(pauses):.0f} ms" if pauses else "none"
    return [
        Row("interrupted answers", f">= {wanted}", f"{tally.interrupted}", tally.interrupted >= wanted),
        Row("requests that failed", "0", f"{len(tally.failed)} of {tally.asked} {tally.failed[:1]}", not tally.failed),
        Row("requests that hung", "0", f"{tally.hung} (limit {HANG_S:g} s)", not tally.hung),
        Row("repeated or missing text at the resume", "0", f"{tally.torn} (n {tally.interrupted})", not tally.torn),
        Row("ended twice, or beyond max_tokens", "0", f"{tally.odd} (n {tally.asked})", not tally.odd),
        Row(
            f"tokens after the resume that are worse than the model's choice by more than {TIE_NATS} nats",
            "0",
            f"{beyond} (n {scored}; {ties} ties; worst {max(tally.worse, default=0):.4f}; {tally.unscored} not scored)",
            not beyond and scored > 0,
        ),
        Row("text equal to the undisturbed one", f">= {least}", f"{tally.same} (n {tally.interrupted})", tally.same
            >= least),
        Row("the same for uninterrupted answers", "no limit", f"{tally.calm_same} (n {tally.calm})", True),
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
    """Run one configuration."""
    run = Run(asked, referee, how, wanted, hot=hot)
    async with Boards(BOARDS, slots, folder) as boards:
        await run.play(boards, slots)
    return run.tally


async def simulated(kind: Literal["stall", "cut", "malformed", "error", "refuse"], wanted: int) -> Row:
    """
    Inject one failure into each answer, on simulated engines over HTTP.

    Both engines have the fault: if the rest of the answer is long enough, the engine that resumes it fails, too.
    """
    failed: list[str] = []
    same = hung = interrupted = twice = 0
    async with (
        SimulatedEngine(SIMULATED) as one,
        SimulatedEngine(SIMULATED) as other,
        SimulatedEngine(SIMULATED) as reference,
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
            resumed = len(recorder.continuations.get(number, ()))
            interrupted += resumed > 0 or kind == "refuse"
            twice += resumed > 1
    seen = f"{len(failed)} failed, {hung} hung, {same} equal (n {interrupted}, {twice} of them twice) {failed[:1]}"
    return Row(f"simulated engines, {kind}", "all equal", seen, not failed and same == interrupted == wanted)


async def measured(wanted: int, folder: Path) -> AsyncIterator[tuple[str, list[Row]]]:
    """Yield each part's name and rows."""
    async with Referee(folder) as referee:
        asked = await referee.questions(200)
        for slots, how, hot in CONFIGURATIONS:
            tally = await real(asked, referee, folder, slots, how, wanted, hot=hot)
            name = f"{BOARDS} engines, {slots} slot{'s' * (slots > 1)} each, resumed by {how}, {tally.asked} requests"
            found = rows(tally, wanted)
            yield name + ", any token" * hot, found[:_RANDOM_ROWS] if hot else found
    for kind in ("refuse", "stall", "cut", "malformed", "error"):
        yield "", [await simulated(kind, wanted)]


async def report(console: Console, wanted: int) -> int:
    """Print each guarantee once checked; return the number that do not hold."""
    failures = 0
    with tempfile.TemporaryDirectory() as folder:
        async for name, found in measured(wanted, Path(folder)):
            if name:
                console.print(f"\n[bold]{name}[/]", highlight=False)
            for row in found:
                failures += not row.holds
                verdict = "[green]holds[/]" if row.holds else "[red]FAILS[/]"
                seen = row.measured.replace("[", "\\[")
                console.print(
                    f"{verdict}  {row.guarantee}: {seen} [dim]\\[{row.limit}][/]", highlight=False, soft_wrap=True
                )
    return failures


def main() -> int:
    """Return 1 when a guarantee does not hold."""
    parser = argparse.ArgumentParser(description="Check that no text is lost or repeated when engines die mid-answer.")
    parser.add_argument("--streams", type=int, default=100, help="interrupted answers of each kind")
    console = Console()
    # The simulated engine logs each connection that it breaks on purpose.
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)
    failures = asyncio.run(report(console, parser.parse_args().streams))
    console.print(f"[red]{failures} guarantees do not hold[/]" if failures else "[green]every guarantee holds[/]")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
