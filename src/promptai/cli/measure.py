"""Measure and show: what ``demo`` and ``bench`` have in common.

Puts the parts together in their order (recorder, runner, progress, summary, report)
and prints. The report is rendered by a process of its own: its JavaScript bundle
takes over 200 MB for a second, which must not weigh on the board while an engine is loaded.
"""

import asyncio
import contextlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import click
import msgspec
from rich.console import Console

from promptai.bench.manifest import Manifest
from promptai.bench.plan import WarmUpRates
from promptai.bench.recorder import Recorder
from promptai.bench.runner import Runner, look_closer, turn_client, warm_up
from promptai.bench.summary import read_run, summarize, write_summary
from promptai.bench.target import open_target
from promptai.bench.workload import Conversation
from promptai.cli.progress import REDRAW_EVERY_S, RunProgress
from promptai.errors import EngineDiedError, EngineError, PromptAIError
from promptai.report.table import print_summary
from promptai.wire.openai import Message


class OutputOptions(NamedTuple):
    """
    Where results go.

    Attributes:
        console: For people; stderr when stdout carries JSON.
        as_json: Print the summary as JSON on stdout.
        write_report: Also render report.html.
    """

    console: Console
    as_json: bool
    write_report: bool


def measure(
    directory: Path,
    manifest: Manifest,
    conversations: list[Conversation],
    *,
    api_key: str | None,
    silence_s: float,
    output: OutputOptions,
) -> None:
    """
    Play what remains of a run, then print and write what it says.

    Whatever ends the playing early (Ctrl-C, a dead engine), what was measured is kept and shown.
    """
    ended: BaseException | None = None
    fresh = not (directory / "traces.jsonl").exists()
    with Recorder(directory) as recorder, RunProgress(output.console) as progress:
        runner = Runner(manifest, conversations, recorder, progress, api_key=api_key, silence_s=silence_s)
        progress.begin(runner, conversations, manifest.protocol)
        try:
            asyncio.run(_run(runner, progress))
        except (PromptAIError, KeyboardInterrupt) as error:
            ended = error
    if ended is not None and not recorder.traces:
        if fresh:
            _drop(directory, ended, output.console)
        raise ended
    show(directory, output)
    if ended is not None:
        line = f"what was measured is kept; go on with: promptai bench --resume {directory}"
        output.console.print(line, highlight=False, soft_wrap=True, markup=False)
        raise ended


def _drop(directory: Path, ended: BaseException, console: Console) -> None:
    """Remove what holds no measurement, so that nothing half-written stays, unless an engine's log in it says why."""
    logs = [log for log in directory.glob("*.log") if log.stat().st_size]
    if not logs or not isinstance(ended, EngineError):
        shutil.rmtree(directory)
        return
    last = max(logs, key=lambda log: log.stat().st_mtime)
    console.print(f"the engine's log is kept: {last}", highlight=False, soft_wrap=True, markup=False)


async def _run(runner: Runner, progress: RunProgress) -> None:
    async def redraw() -> None:
        while True:
            progress.redraw()
            await asyncio.sleep(REDRAW_EVERY_S)

    drawing = asyncio.create_task(redraw())
    try:
        await runner.run()
    finally:
        drawing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await drawing


def calibrate(
    manifest: Manifest,
    prompt: list[Message],
    *,
    at_most_s: float,
    api_key: str | None,
    silence_s: float,
    console: Console,
) -> dict[str, WarmUpRates]:
    """
    Open every target for a moment and see what it does, to know what fits a budget.

    Args:
        prompt: One as long as the workload's are on average.
        at_most_s: Longest answer to it that is waited for.
    """

    async def look(logs: Path) -> dict[str, WarmUpRates]:
        found = {}
        for facts in manifest.targets:
            log = logs / f"{facts.name}.log"
            async with open_target(facts, log=log, api_key=api_key, silence_s=silence_s) as opened:
                nonce = f"{manifest.created}/budget/{facts.name}"
                client = turn_client(opened, manifest.protocol, origin=0.0, nonce=nonce)
                try:
                    rates, _ = await warm_up(client, answer_tokens=manifest.protocol.max_tokens)
                    found[facts.name] = await look_closer(client, rates, prompt, at_most_s=at_most_s)
                except EngineDiedError as error:
                    raise await asyncio.to_thread(opened.death) or error from None
        return found

    logs = Path(tempfile.mkdtemp(prefix="promptai-"))
    try:
        with console.status("looking at what the targets can do"):
            found = asyncio.run(look(logs))
    except BaseException as error:
        _drop(logs, error, console)
        raise
    shutil.rmtree(logs)
    return found


def show(directory: Path, output: OutputOptions) -> None:
    """Derive the summary, write it and the report, print it."""
    console = output.console
    summary = summarize(read_run(directory))
    write_summary(directory, summary)
    rendered = False
    if output.write_report:
        with console.status("writing the report"):
            rendered = _render(directory)
    if output.as_json:
        click.echo(msgspec.json.encode(summary))
        return
    print_summary(summary, console)
    if rendered:
        console.print(f"report:  {directory / 'report.html'}", highlight=False, soft_wrap=True, markup=False)


def _render(directory: Path) -> bool:
    """Write report.html in another process; say why when that fails, but keep the numbers."""
    done = subprocess.run(  # noqa: S603  ourselves
        [sys.executable, "-P", "-m", "promptai", "report", str(directory), "--quiet"],
        check=False,
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode != 0:
        click.echo(
            f"promptai: the report could not be written: {done.stderr.decode(errors='replace').strip()}",
            err=True,
        )
    return done.returncode == 0
