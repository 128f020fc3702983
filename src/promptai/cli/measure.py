"""Measure and show: the common part of ``demo`` and ``bench``.

Runs the recorder, runner, progress display, summary and report in order. Another process renders
the report: its JavaScript bundle takes over 200 MB for a second, which must not burden a board
while an engine is loaded.
"""

import asyncio
import contextlib
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import click
import msgspec
from rich.console import Console

from promptai.bench.prepare import Prepared
from promptai.bench.recorder import Recorder, discard
from promptai.bench.runner import Runner
from promptai.bench.summary import read_run, summarize, write_summary
from promptai.cli.progress import REDRAW_EVERY_S, RunProgress, print_kept_log
from promptai.errors import PromptAIError
from promptai.report.table import print_summary


class OutputOptions(NamedTuple):
    """
    How results are shown.

    Attributes:
        console: For people; stderr if the JSON goes to stdout.
        as_json: Print the summary as JSON to stdout.
        write_report: Also render report.html.
    """

    console: Console
    as_json: bool
    write_report: bool


def measure(prepared: Prepared, output: OutputOptions) -> None:
    """
    Play the rest of a run, then summarise it, print the summary and write the report.

    Results are kept and shown even if an interrupt or a dead engine ends the run early.
    """
    directory, conversations = prepared.directory, prepared.conversations
    ended: BaseException | None = None
    fresh = not (directory / "traces.jsonl").exists()
    with Recorder(directory) as recorder, RunProgress(output.console) as progress:
        runner = Runner(
            prepared.manifest,
            conversations,
            recorder,
            progress,
            api_key=prepared.api_key,
            silence_s=prepared.silence_s,
        )
        progress.begin(runner, conversations, prepared.manifest.protocol)
        try:
            asyncio.run(_run(runner, progress))
        except (PromptAIError, KeyboardInterrupt) as error:
            ended = error
    if ended is not None and not recorder.traces:
        if fresh and (log := discard(directory, ended)) is not None:
            print_kept_log(output.console, log)
        raise ended
    show(directory, output)
    if ended is not None:
        line = f"the results so far are kept; continue with: promptai bench --resume {directory}"
        output.console.print(line, highlight=False, soft_wrap=True, markup=False)
        raise ended


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


def show(directory: Path, output: OutputOptions) -> None:
    """Derive the summary, write it and the report, and print it."""
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
    """Write report.html in another process; a failure is printed, and the numbers stay."""
    done = subprocess.run(  # noqa: S603  ourselves
        [sys.executable, "-P", "-m", "promptai", "report", str(directory), "--quiet"],
        check=False,
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode != 0:
        click.echo(
            f"promptai: cannot write the report: {done.stderr.decode(errors='replace').strip()}",
            err=True,
        )
    return done.returncode == 0
