"""``promptai report``: rebuild the summary and the report from a run's raw data."""

from pathlib import Path

import click
import msgspec
from rich.console import Console

from promptai.bench.summary import read_run, summarize, write_summary
from promptai.errors import SettingsError


@click.command(
    epilog="""\b
Examples:
  promptai report runs/2026-11-20T12-00-00_yi-coder-1.5b_pi5
  promptai report runs/2026-11-20T12-00-00_yi-coder-1.5b_pi5 --json | jq .targets[0].cold.metrics
"""
)
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON instead of writing a report.")
@click.option("--quiet", is_flag=True, help="Print nothing.")
@click.option("--figures", is_flag=True, help="Also write each figure as SVG and PNG to RUN/figures/.")
def report(run: Path, *, as_json: bool, quiet: bool, figures: bool) -> None:
    """Rebuild summary.json and report.html of RUN, and print the table."""
    if as_json and figures:
        raise SettingsError("--json cannot be combined with --figures", hint="leave one of them out")
    data = read_run(run)
    summary = summarize(data)
    write_summary(run, summary)
    if as_json:
        click.echo(msgspec.json.encode(summary))
        return
    from promptai.report.html import write_figures, write_report  # noqa: PLC0415  a second of imports
    from promptai.report.table import print_summary  # noqa: PLC0415

    page = write_report(run, data, summary)
    written = write_figures(run, data, summary) if figures else []
    if not quiet:
        console = Console()
        print_summary(summary, console)
        for what, path in [("report", page), *(("figure", path) for path in written)]:
            console.print(f"{what}:  {path}", highlight=False, soft_wrap=True, markup=False)
