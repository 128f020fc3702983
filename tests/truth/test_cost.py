"""The cost of measuring in processor time and memory, and the start-up time of ``--help``."""

import json
import subprocess
import time
from pathlib import Path

import pytest

from support_cli import PROMPTAI, clean_environment, promptai, simulated

pytestmark = [pytest.mark.real, pytest.mark.timed]


def test_client_and_telemetry_take_at_most_3_percent_of_a_core_at_the_speed_of_a_1b_model(tmp_path: Path) -> None:
    """
    A 1 B model decodes 40 tokens/s on two good cores.

    The engine is simulated: with a real one, the figure would include its competition for two cores
    (``make bench`` measures that).
    """
    workload = tmp_path / "one.jsonl"
    workload.write_text(json.dumps({"messages": [{"role": "user", "content": "how is the cell"}]}) + "\n")
    with simulated("--decode-tps", "40", "--prefill-tps", "1000", cwd=tmp_path) as url:
        done = promptai(
            *("bench", url, "--workload", workload, "--max-tokens", "400", "--cache", "cold", "--json", "--no-report"),
            cwd=tmp_path,
        )

    assert done.returncode == 0, done.stderr
    harness = json.loads(done.stdout)["harness"]
    assert harness["cpu_percent_of_one_core"]["value"] <= 3.0
    assert harness["client_max_rss_bytes"]["value"] <= 150e6


def test_help_takes_at_most_0_3_seconds(tmp_path: Path) -> None:
    """The best of five runs, to exclude other work of the machine."""
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        done = subprocess.run(
            [*PROMPTAI, "--help"], check=True, cwd=tmp_path, env=clean_environment(), capture_output=True, text=True
        )
        taken.append(time.perf_counter() - start)
        assert "promptai demo" in done.stdout

    assert min(taken) <= 0.3
