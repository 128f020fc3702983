"""Results survive Ctrl-C, kill -9 and dead engines, and no request is measured twice."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from support_cli import ONE_THREAD, alive, children_of, keys, lines, only_run, promptai, simulated, start, wait_for

pytestmark = pytest.mark.real

#: 4 conversations of 3 turns, cold and warm.
REQUESTS = 24


def traces(cwd: Path) -> list[dict[str, Any]]:
    return lines(only_run(cwd) / "traces.jsonl")


def start_and_wait_for(answers: int, url: str, workload: Path, cwd: Path, *more: str) -> "Any":
    bench = start("bench", url, "--workload", workload, "--max-tokens", "20", *more, cwd=cwd)
    wait_for(lambda: bool(list(cwd.glob("runs/*/traces.jsonl"))), what="the run to begin")
    wait_for(lambda: len(traces(cwd)) >= answers, what=f"{answers} answers")
    return bench


def test_ctrl_c_keeps_the_results_reports_them_and_exits_130(workload: Path, tmp_path: Path) -> None:
    with simulated("--decode-tps", "200", "--prefill-tps", "2000", cwd=tmp_path) as url:
        bench = start_and_wait_for(4, url, workload, tmp_path)
        os.killpg(bench.pid, signal.SIGINT)
        stdout, stderr = bench.communicate(timeout=60)

    assert bench.returncode == 130
    assert "Traceback" not in stderr
    assert "--resume" in stdout
    assert (only_run(tmp_path) / "report.html").exists()
    assert len(traces(tmp_path)) < REQUESTS


@pytest.mark.parametrize("history", ["data", "own"])
def test_a_killed_run_resumes_and_loses_at_most_the_request_in_flight(
    history: str, workload: Path, tmp_path: Path
) -> None:
    with simulated("--decode-tps", "200", "--prefill-tps", "2000", cwd=tmp_path) as url:
        bench = start_and_wait_for(7, url, workload, tmp_path, "--history", history)
        os.killpg(bench.pid, signal.SIGKILL)
        bench.communicate()
        before = traces(tmp_path)

        done = promptai("bench", "--resume", only_run(tmp_path), "--no-report", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    after = traces(tmp_path)
    assert before == after[: len(before)]
    assert len(after) == REQUESTS
    assert len(set(keys(after))) == REQUESTS
    # The run's clock continues: the sessions do not overlap.
    assert min(t["t_sent"] for t in after[len(before) :]) > max(t["t_end"] for t in before)


def test_a_resumed_warm_conversation_finds_its_cache(workload: Path, tmp_path: Path) -> None:
    """Its next turn reuses the earlier ones from the cache, as without an interruption."""
    with simulated("--decode-tps", "200", "--prefill-tps", "2000", cwd=tmp_path) as url:
        bench = start_and_wait_for(2, url, workload, tmp_path, "--cache", "warm")
        os.killpg(bench.pid, signal.SIGKILL)
        bench.communicate()
    with simulated("--decode-tps", "200", "--prefill-tps", "2000", "--port", url.rsplit(":", 1)[1], cwd=tmp_path):
        promptai("bench", "--resume", only_run(tmp_path), "--no-report", cwd=tmp_path)

    found = traces(tmp_path)
    assert len(found) == REQUESTS // 2
    first = {t["cached_tokens"] for t in found if t["turn"] == 0}
    assert max(first) <= 1  # at most the template's first marker
    for turn in (1, 2):
        assert {t["cached_tokens"] for t in found if t["turn"] == turn and t["conversation"] == "c3"} == {
            t["cached_tokens"] for t in found if t["turn"] == turn and t["conversation"] == "c0"
        }


def test_resuming_a_finished_run_measures_nothing(workload: Path, tmp_path: Path) -> None:
    with simulated("--time-scale", "50", cwd=tmp_path) as url:
        promptai("bench", url, "--workload", workload, "--max-tokens", "3", "--no-report", cwd=tmp_path)
        before = (only_run(tmp_path) / "traces.jsonl").read_bytes()
        done = promptai("bench", "--resume", only_run(tmp_path), "--no-report", cwd=tmp_path)

    assert done.returncode == 0
    assert before == (only_run(tmp_path) / "traces.jsonl").read_bytes()


def test_refuses_to_resume_with_a_changed_workload(workload: Path, tmp_path: Path) -> None:
    with simulated("--time-scale", "50", cwd=tmp_path) as url:
        promptai("bench", url, "--workload", workload, "--max-tokens", "3", "--no-report", cwd=tmp_path)
    workload.write_text(workload.read_text().replace("is cell up", "is cell down"))

    done = promptai("bench", "--resume", only_run(tmp_path), "--no-report", cwd=tmp_path)

    assert done.returncode == 5
    assert "has changed since the run began" in done.stderr


def test_refuses_to_resume_on_another_board(workload: Path, tmp_path: Path) -> None:
    with simulated("--time-scale", "50", cwd=tmp_path) as url:
        promptai("bench", url, "--workload", workload, "--max-tokens", "3", "--no-report", cwd=tmp_path)
        manifest = only_run(tmp_path) / "manifest.json"
        told = json.loads(manifest.read_text())
        told["machine"]["board"] = "Raspberry Pi 5"
        manifest.write_text(json.dumps(told))
        done = promptai("bench", "--resume", only_run(tmp_path), "--no-report", cwd=tmp_path)

    assert done.returncode == 6
    assert "the run began on Raspberry Pi 5, this is" in done.stderr


def test_engine_and_sampler_end_with_a_killed_bench(small_model: Path, workload: Path, tmp_path: Path) -> None:
    bench = start(
        *("bench", small_model, "--workload", workload, "--max-tokens", "1000", "--ignore-eos", *ONE_THREAD),
        cwd=tmp_path,
    )
    wait_for(lambda: bool(children_of(bench.pid, "promptai.engine.embedded")), what="the engine to start")
    wait_for(lambda: len(children_of(bench.pid, "promptai.")) >= 2, what="telemetry beside the engine")
    helpers = children_of(bench.pid, "promptai.")
    bench.kill()
    bench.communicate()

    wait_for(lambda: not any(map(alive, helpers)), what="the end of engine and sampler", seconds=10)


@pytest.mark.parametrize("fault", ["cut", "malformed", "error"])
def test_a_server_that_keeps_failing_ends_the_run_with_its_error(fault: str, workload: Path, tmp_path: Path) -> None:
    with simulated("--time-scale", "100", "--fault", fault, "--after-tokens", "3", cwd=tmp_path) as url:
        done = promptai("bench", url, "--workload", workload, "--max-tokens", "10", "--no-report", cwd=tmp_path)

    assert done.returncode == 4, done.stdout
    assert "Traceback" not in done.stderr
    assert url in done.stderr
