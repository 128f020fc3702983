"""The gateway's cost, measured small and with wide limits; ``make bench-gateway`` has the full size."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.real, pytest.mark.timed]

ROOT = Path(__file__).parents[2]


def benchmark(*options: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gateway_cost", *options],
        check=False,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT / "tests"), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_adds_milliseconds_and_takes_less_than_100_mb() -> None:
    done = benchmark("--small")

    assert done.returncode == 0, done.stdout + done.stderr
    for figure in ("1 stream of 16 words, first word, median: +", "20 streams", "at full speed", "memory after all"):
        assert figure in done.stdout
    assert "every guarantee holds" in done.stdout


def test_the_soak_reports_the_resources_that_remain() -> None:
    """A few requests are enough to test the command; ``tests/gateway/test_stays_flat.py`` sends a thousand."""
    done = benchmark("--soak", "250")

    assert done.returncode == 0, done.stdout + done.stderr
    assert "250 requests: file descriptors" in done.stdout
