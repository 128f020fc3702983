"""Print the table of a run to the terminal."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from promptai.bench.summary import CacheSummary, Summary, TargetSummary
from promptai.report import format as fmt
from promptai.report.rows import ROWS


def print_summary(summary: Summary, console: Console) -> None:
    """Print the main metrics, the findings, and the cost of measuring."""
    for target in summary.targets:
        name = f"[bold]{escape(target.name)}[/]{' (synthetic weights)' if target.synthetic else ''}"
        if target.cold is None and target.warm is None:
            console.print(f"{name}: no results", highlight=False)
            continue
        console.print(name, highlight=False)
        console.print(_table(target))
        console.print(_caption(target), highlight=False, style="dim")
        for finding in target.findings:
            mark = "[yellow]warning[/]" if finding.serious else "[cyan]note[/]   "
            console.print(f"{mark}  {escape(finding.message)}: {escape(finding.action)}", highlight=False)
    if not summary.complete:
        console.print("[yellow]warning[/]  the run is incomplete: these are the results so far", highlight=False)
    harness = summary.harness
    console.print(
        f"measuring used {fmt.quantity(harness.cpu_percent_of_one_core.value, '%')} of one core, "
        f"{fmt.quantity(harness.client_max_rss_bytes.value, 'bytes')} for the client and "
        f"{fmt.quantity(harness.telemetry_max_rss_bytes.value, 'bytes')} for telemetry",
        highlight=False,
    )


def _table(target: TargetSummary) -> Table:
    parts = [(name, part) for name, part in (("cold", target.cold), ("warm", target.warm)) if part is not None]
    table = Table("")
    for name, part in parts:
        table.add_column(f"{name} (n = {part.answered})", justify="right")
    for name, label in ROWS.items():
        if any(part.metrics[name].value is not None for _, part in parts):
            unit, texts = fmt.row([part.metrics[name] for _, part in parts])
            table.add_row(f"{label}, {unit}", *texts)
    return table


def _caption(target: TargetSummary) -> str:
    failed = sum(part.failed for part in (target.cold, target.warm) if isinstance(part, CacheSummary))
    words = ["cold: KV cache off; warm: the cache may contain earlier turns; in brackets: 95 % interval"]
    if target.load_s.value is not None:
        words.append(f"loaded in {fmt.quantity(target.load_s.value, 's')}")
    if failed:
        words.append(f"{failed} requests failed")
    return "; ".join(words)
