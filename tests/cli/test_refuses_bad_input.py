"""Every invalid input leads to one clear line, a non-zero exit code, and no partial output."""

import json
import os
import re
import resource
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from promptai.models.shape import Shape
from promptai.models.synth import write_synthetic
from support_cli import (
    ONE_THREAD,
    PROMPTAI,
    children_of,
    clean_environment,
    lines,
    only_run,
    promptai,
    simulated,
    start,
    wait_for,
)

pytestmark = pytest.mark.real

MODEL, ENGINE, WORKLOAD, RUN, USAGE = 3, 4, 5, 6, 2


def assert_refused(done: "subprocess.CompletedProcess[str]", code: int, *words: str) -> None:
    """Expect one line with everything in ``words``, and the exit code."""
    errors = [line for line in done.stderr.splitlines() if line.startswith("promptai: error:")]
    assert len(errors) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in errors[0]
    assert code == done.returncode


def kept_log(stdout: str, cwd: Path) -> str:
    """The contents of the engine's log that a message names."""
    named = re.search(r"the engine's log is kept: (.+)", stdout)
    assert named is not None, stdout
    return (cwd / named[1]).read_text()


def assert_nothing_left(cwd: Path) -> None:
    """Expect no run directory."""
    assert not list((cwd / "runs").glob("*"))


def empty(path: Path, _whole: bytes) -> None:
    path.write_bytes(b"")


def truncated(path: Path, whole: bytes) -> None:
    path.write_bytes(whole[: len(whole) * 2 // 3])


def truncated_in_its_header(path: Path, whole: bytes) -> None:
    path.write_bytes(whole[:200])


def not_gguf(path: Path, _whole: bytes) -> None:
    path.write_text("<html>404</html>")


@pytest.mark.parametrize(
    ("damage", "words"),
    [(empty, "empty"), (truncated, "truncated"), (truncated_in_its_header, "truncated"), (not_gguf, "not a GGUF")],
)
def test_rejects_a_damaged_model_with_the_damage(
    damage: Callable[[Path, bytes], None], words: str, small_model: Path, tmp_path: Path
) -> None:
    damage(tmp_path / "bad.gguf", small_model.read_bytes())

    done = promptai("bench", "bad.gguf", cwd=tmp_path)

    assert_refused(done, MODEL, "bad.gguf", words)
    assert_nothing_left(tmp_path)


def test_rejects_a_missing_model(tmp_path: Path) -> None:
    assert_refused(promptai("bench", "nowhere.gguf", cwd=tmp_path), MODEL, "nowhere.gguf", "does not exist")
    assert_nothing_left(tmp_path)


def test_rejects_a_model_larger_than_memory_before_loading(tmp_path: Path) -> None:
    """A sparse file as long as its header claims, larger than the memory of any test machine."""
    path = tmp_path / "huge.gguf"
    shape = Shape(layers=1, width=64, heads=4, kv_heads=2, ffn=128, vocabulary=512)
    write_synthetic(path, shape, name="huge")
    # The last tensor claims so many rows of 128 numbers in Q4_0, 72 bytes each, that they are a TiB: 15 TiB less than
    # ext4 allows but more than any board has.
    data = bytearray(path.read_bytes())
    at = data.rindex(b".weight") + len(b".weight")
    data[at + 12 : at + 20] = ((1 << 40) // 72).to_bytes(8, "little")
    path.write_bytes(data)
    os.truncate(path, (1 << 40) + (1 << 20))

    done = promptai("bench", "huge.gguf", cwd=tmp_path)

    assert_refused(done, MODEL, "huge.gguf", "1024.00", "GiB are available")
    assert_nothing_left(tmp_path)


def test_reports_why_an_engine_died_while_loading(small_model: Path, workload: Path, tmp_path: Path) -> None:
    data = small_model.read_bytes().replace(b"llama", b"lamma")  # an architecture that no engine knows
    (tmp_path / "odd.gguf").write_bytes(data)

    done = promptai("bench", "odd.gguf", "--workload", workload, *ONE_THREAD, cwd=tmp_path)

    assert_refused(done, ENGINE, "odd.gguf", "lamma")
    assert "lamma" in kept_log(done.stdout, tmp_path)
    assert not lines(only_run(tmp_path) / "traces.jsonl")


def test_reports_why_an_engine_died_while_measuring_for_a_budget(
    small_model: Path, workload: Path, tmp_path: Path
) -> None:
    data = small_model.read_bytes().replace(b"llama", b"lamma")
    (tmp_path / "odd.gguf").write_bytes(data)

    done = promptai(
        *("bench", "odd.gguf", "--workload", workload, "--budget=1m", *ONE_THREAD), cwd=tmp_path, TMPDIR=str(tmp_path)
    )

    assert_refused(done, ENGINE, "odd.gguf", "lamma")
    assert "lamma" in kept_log(done.stdout, tmp_path)
    assert_nothing_left(tmp_path)


def test_reports_a_killed_engine_and_keeps_the_results(small_model: Path, workload: Path, tmp_path: Path) -> None:
    bench = start(
        *("bench", small_model, "--workload", workload, "--max-tokens", "500", "--context", "4096"),
        *(*ONE_THREAD, "--ignore-eos"),
        cwd=tmp_path,
    )
    wait_for(lambda: bool(list(tmp_path.glob("runs/*/traces.jsonl"))), what="the run to begin")
    wait_for(lambda: len(lines(only_run(tmp_path) / "traces.jsonl")) >= 2, what="two answers")
    engines = children_of(bench.pid, "promptai.engine.embedded")
    assert len(engines) == 1
    os.kill(engines[0], signal.SIGKILL)
    _, stderr = bench.communicate(timeout=60)

    assert bench.returncode == ENGINE
    assert "the engine of small died: killed by signal 9 (SIGKILL)" in stderr
    assert "Traceback" not in stderr
    assert (only_run(tmp_path) / "report.html").exists()


def test_reports_a_port_that_is_in_use(small_model: Path, workload: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])

        done = promptai("bench", small_model, "--workload", workload, "--port", port, cwd=tmp_path)

    assert_refused(done, ENGINE, f"port {port}", "taken")
    assert_nothing_left(tmp_path)


def test_reports_an_unreachable_url_in_one_line(workload: Path, tmp_path: Path) -> None:
    done = promptai("bench", "http://127.0.0.1:9", "--workload", workload, cwd=tmp_path)

    assert_refused(done, ENGINE, "no connection to http://127.0.0.1:9: Connection refused")
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        pytest.param("{not json", "malformed", id="not JSON"),
        pytest.param('{"messages": [{"role": "assistant", "content": "hi"}]}', "user first", id="wrong order"),
        pytest.param('{"messages": [{"role": "user", "content": 5}]}', "Expected `str`", id="wrong type"),
        pytest.param('{"text": "hi"}', "neither", id="unknown form"),
    ],
)
def test_rejects_a_malformed_workload_with_file_line_and_reason(
    line: str, reason: str, small_model: Path, tmp_path: Path
) -> None:
    good = json.dumps({"messages": [{"role": "user", "content": "hi"}]})
    (tmp_path / "mine.jsonl").write_text(f"{good}\n{line}\n")

    done = promptai("bench", small_model, "--workload", "mine.jsonl", cwd=tmp_path)

    assert_refused(done, WORKLOAD, "mine.jsonl, line 2", reason)
    assert_nothing_left(tmp_path)


def test_reports_an_unwritable_run_directory(workload: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file where a directory should be")

    with simulated("--time-scale", "100", cwd=tmp_path) as url:
        done = promptai("bench", url, "--workload", workload, cwd=tmp_path)

    assert_refused(done, RUN, "runs")


def test_a_full_disk_ends_the_run_with_complete_lines(workload: Path, tmp_path: Path) -> None:
    """The kernel's file size limit simulates a full disk: writes fail in the middle of a line."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))

    with simulated("--time-scale", "100", cwd=tmp_path) as url:
        done = subprocess.run(
            [*PROMPTAI, "bench", url, "--workload", str(workload), "--max-tokens", "5", "--no-report"],
            check=False,
            cwd=tmp_path,
            env=clean_environment(),
            capture_output=True,
            text=True,
            timeout=60,
            preexec_fn=limit,
        )

    assert done.returncode == RUN
    assert "Traceback" not in done.stderr
    data = (only_run(tmp_path) / "traces.jsonl").read_bytes()
    assert data.endswith(b"\n")
    assert len(lines(only_run(tmp_path) / "traces.jsonl")) >= 1


@pytest.mark.parametrize(
    ("toml", "words"),
    [
        pytest.param("[engine]\nthread = 2\n", "did you mean threads?", id="misspelt key"),
        pytest.param("[bench]\nrepeats = 'two'\n", "repeats", id="wrong type"),
        pytest.param("[bench]\nrepeats = 0\n", "above 0", id="out of range"),
        pytest.param("[engine\n", "promptai.toml", id="not TOML"),
    ],
)
def test_rejects_an_invalid_setting(toml: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "promptai.toml").write_text(toml)

    assert_refused(promptai("bench", cwd=tmp_path), USAGE, "promptai.toml", words)
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("budget", ["soon", "-3m", "0"])
def test_rejects_a_budget_that_is_not_a_duration(budget: str, workload: Path, tmp_path: Path) -> None:
    with simulated("--time-scale", "100", cwd=tmp_path) as url:
        done = promptai("bench", url, "--workload", workload, f"--budget={budget}", cwd=tmp_path)

    assert_refused(done, USAGE, budget)
    assert_nothing_left(tmp_path)


@pytest.mark.parametrize("seconds", ["0", "-5", "nan"])
def test_rejects_a_timeout_that_is_not_positive(seconds: str, tmp_path: Path) -> None:
    done = promptai("bench", "http://127.0.0.1:9", f"--timeout={seconds}", cwd=tmp_path)

    assert_refused(done, USAGE, "--timeout must be above 0", seconds)
    assert_nothing_left(tmp_path)


def test_rejects_concurrency_with_open_arrivals(tmp_path: Path) -> None:
    done = promptai("bench", "http://127.0.0.1:9", "--concurrency=4", "--arrivals=poisson:0.2", cwd=tmp_path)

    assert_refused(done, USAGE, "--concurrency 4", "--arrivals poisson:0.2")
    assert_nothing_left(tmp_path)


def test_rejects_an_unknown_option_with_the_usage(tmp_path: Path) -> None:
    done = promptai("bench", "--treads", "2", cwd=tmp_path)

    assert done.returncode == USAGE
    assert "--threads" in done.stderr
