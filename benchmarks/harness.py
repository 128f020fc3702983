"""Check every guarantee of the measuring harness on this machine: ``make bench``.

Absolute figures depend on the machine, so they belong here and not in tests. Each row shows a guarantee, the
measured value, the number of values behind it, and whether it holds. Takes about five minutes on two cores. Leave the
machine alone meanwhile: a second job on the same cores makes the engine many times slower.
"""

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from rich.console import Console

from promptai.bench.selftest import selftest
from promptai.bench.workload import load_bundled
from promptai.models.bundled import bundled_model
from promptai.models.synth import LLAMA_1B, write_synthetic

PROMPTAI = (sys.executable, "-m", "promptai")


class Row(NamedTuple):
    """One guarantee and the measured value."""

    guarantee: str
    limit: str
    measured: str
    holds: bool


def ground_truth() -> Iterator[Row]:
    """Compare with the simulated engine, three times: worst error of each metric and prompt length."""
    worst: dict[tuple[int, str], list[float]] = {}
    for _ in range(3):
        for check in asyncio.run(selftest()):
            worst.setdefault((check.case.prompt_tokens, check.metric), []).append(check.error)
    for (tokens, metric), errors in worst.items():
        largest = max(errors, key=abs)
        name = f"truth: {metric} at {tokens} prompt tokens"
        yield Row(name, "2 %", f"{largest:+.2%} (n {len(errors)})", abs(largest) <= 0.02)


def real_engine(model: Path, folder: Path, *options: str) -> Iterator[Row]:
    """Compare with the engine's own timings, and report the cost of measuring."""
    summary = bench(model, folder, "--cache", "cold", "--ignore-eos", *options)
    metrics = summary["targets"][0]["cold"]["metrics"]
    client, engine = metrics["decode_tps"], metrics["engine_decode_tps"]
    name = summary["targets"][0]["name"]
    error = client["value"] / engine["value"] - 1
    yield Row(
        f"{name}: decode, client against engine",
        "1 %",
        f"{error:+.2%} at {client['value']:,.1f} tokens/s (n {client['n']})",
        abs(error) <= 0.01,
    )
    traces = [json.loads(line) for line in (only(folder / "runs") / "traces.jsonl").read_text().splitlines()]
    waits = [t["t_first"] - t["t_sent"] for t in traces]
    # The wait for the first token is prefill plus a constant: HTTP, template, queue of the engine's threads. The slope
    # compares the client's clock with the engine's; a ratio of sums would measure the constant instead.
    slope, rest_s = statistics.linear_regression([t["prompt_ms"] / 1000 for t in traces], waits)
    yield Row(
        f"{name}: prefill, client's wait against engine",
        "1 %" if "1b" in name else "no limit: at this speed the wait includes tokenising",
        f"{slope - 1:+.2%} at {metrics['prefill_tps']['value']:,.1f} tokens/s, beside {1000 * rest_s:.1f} ms a request"
        f" (n {len(traces)})",
        abs(slope - 1) <= 0.01 or "1b" not in name,
    )
    harness = summary["harness"]
    cpu, memory = harness["cpu_percent_of_one_core"]["value"], harness["client_max_rss_bytes"]["value"]
    yield Row(
        f"{name}: client and telemetry while it runs",
        "3 % of one core" if "1b" in name else "no limit at this speed",
        f"{cpu:.2f} % of one core",
        cpu <= 3 or "1b" not in name,
    )
    yield Row(f"{name}: memory of the client", "143 MiB", f"{memory / 2**20:.0f} MiB", memory <= 150e6)


def same_twice(model: Path, folder: Path) -> Row:
    """Compare the texts of two runs with one seed and one slot."""
    hashes = []
    for name in ("first", "second"):
        bench(model, folder / name, "--conversations", "5", "--max-tokens", "64")
        lines = (only(folder / name / "runs") / "traces.jsonl").read_text().splitlines()
        traces = [json.loads(line) for line in lines]
        hashes.append({(t["cache"], t["conversation"], t["turn"]): t["text_sha256"] for t in traces})
    same = sum(hashes[0][key] == hashes[1].get(key) for key in hashes[0])
    return Row("same seed, same texts, byte for byte", "all", f"{same} of {len(hashes[0])}", same == len(hashes[0]))


def help_time() -> Row:
    """Time ``promptai --help``."""
    taken = []
    for _ in range(7):
        start = time.perf_counter()
        subprocess.run([*PROMPTAI, "--help"], check=True, capture_output=True)
        taken.append(time.perf_counter() - start)
    median = statistics.median(taken)
    return Row("promptai --help", "0.3 s", f"{median:.2f} s (median of {len(taken)})", median <= 0.3)


def demo_time(folder: Path) -> Row:
    """Time ``promptai demo``, from start to report."""
    start = time.perf_counter()
    subprocess.run([*PROMPTAI, "demo"], check=True, capture_output=True, cwd=folder)
    taken = time.perf_counter() - start
    return Row("promptai demo", "60 s", f"{taken:.0f} s", taken <= 60)


def bench(model: Path, folder: Path, *options: str) -> dict[str, Any]:
    """Run ``promptai bench`` in ``folder`` and return its summary."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [*PROMPTAI, "bench", str(model), "--json", "--no-report", *options]
    done = subprocess.run(command, check=True, capture_output=True, cwd=folder)
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


def shortest(folder: Path) -> Path:
    """Write a workload with the shortest bundled conversation, which a large model finishes first."""
    path = folder / "shortest.jsonl"
    conversations = load_bundled().conversations
    chosen = min(conversations, key=lambda c: c.prompt_chars(c.user_turns - 1))
    path.write_bytes(msgspec.json.encode({"id": chosen.id, "messages": chosen.messages}) + b"\n")
    return path


def only(folder: Path) -> Path:
    """The only entry of a folder."""
    (entry,) = folder.iterdir()
    return entry


def stages(folder: Path) -> Iterator[tuple[str, Callable[[], Iterable[Row]]]]:
    """Name and function of each stage, in order; each stage has its own folder."""
    tiny, large = bundled_model(), folder / "synthetic-llama-1b.gguf"
    yield "simulated engine, three times", ground_truth
    yield "bundled model", lambda: real_engine(tiny, folder / "t", "--conversations", "10", "--max-tokens", "400")
    write_synthetic(large, LLAMA_1B, name="synthetic-llama-1b")
    workload = ("--workload", str(shortest(folder)))
    yield "1.1 B shape", lambda: real_engine(large, folder / "l", *workload, "--max-tokens", "128")
    yield "two equal runs", lambda: [same_twice(tiny, folder / "twice")]
    yield "promptai --help", lambda: [help_time()]
    yield "promptai demo", lambda: [demo_time(folder)]


def main() -> int:
    """Print each guarantee once it is checked; return 1 when one does not hold."""
    console = Console()
    failed = 0
    with tempfile.TemporaryDirectory() as folder, console.status("") as status:
        for what, measure in stages(Path(folder)):
            status.update(f"checking the harness: {what}")
            for row in measure():
                failed += not row.holds
                verdict = "[green]holds[/]" if row.holds else "[red]FAILS[/]"
                console.print(
                    f"{verdict}  {row.guarantee}: {row.measured} [dim]\\[{row.limit}][/]",
                    highlight=False,
                    soft_wrap=True,
                )
    console.print(f"[red]{failed} guarantees do not hold[/]" if failed else "[green]every guarantee holds[/]")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
