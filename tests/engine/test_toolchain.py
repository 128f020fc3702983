from pathlib import Path

import pytest

from promptai.engine.build_recipe import PROGRAMS
from promptai.engine.command_log import failure_lines, run_logged
from promptai.engine.toolchain import CompileProgress, check_disk, choose_jobs, missing_tools
from promptai.errors import EngineError

GIB = 1024**3


@pytest.mark.parametrize(
    ("installed", "missing"),
    [
        ((), ["cmake", "a C++ compiler", "make"]),
        (("cmake", "make"), ["a C++ compiler"]),
        (("cmake", "clang++", "ninja"), []),
        (("g++", "make"), ["cmake"]),
        (("cmake", "c++"), ["make"]),
    ],
)
def test_accepts_any_compiler_and_make_or_ninja(
    installed: tuple[str, ...], missing: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)

    assert missing == missing_tools(lambda name: name if name in installed else None)


def test_refuses_a_disk_without_room(tmp_path: Path) -> None:
    """It measures the nearest folder that exists."""
    with pytest.raises(EngineError, match=r"build needs 953674316 MiB .* MiB are free"):
        check_disk(tmp_path / "not" / "made" / "yet", 10**15)

    check_disk(tmp_path, 1)


@pytest.mark.parametrize(
    ("cpus", "quota", "available", "jobs"),
    [
        (4, None, 16 * GIB, 4),
        (4, None, 3 * GIB, 3),
        (4, None, GIB, 1),
        (4, None, 0, 1),
        (4, 2.5, 16 * GIB, 2),
        (4, 0.5, 16 * GIB, 1),
    ],
)
def test_limits_compilers_by_cpus_and_memory(cpus: int, quota: float | None, available: int, jobs: int) -> None:
    assert jobs == choose_jobs(cpus, quota, available)


def test_progress_never_falls() -> None:
    """Although make restarts its count with every program."""
    progress = CompileProgress(PROGRAMS)
    lines = ["[  1%] Building C object a.o", "[ 50%] Built target ggml", "[100%] Built target llama-server"]
    lines += ["[  2%] Built target ggml", "[ 98%] Built target llama-bench-impl", "[100%] Built target llama-bench"]
    lines += ["noise", "[  8%] Built target ggml", "[100%] Built target llama-quantize"]
    lines += ["[100%] Built target llama-perplexity"]

    shares = [progress.see(line) for line in lines]

    assert shares == sorted(shares)
    assert shares[:2] == pytest.approx([0.009, 0.45])
    assert shares[2] == pytest.approx(0.9)
    assert shares[-1] == pytest.approx(1.0)


def test_reads_ninjas_count() -> None:
    progress = CompileProgress(PROGRAMS)

    assert [progress.see("[1/200] Building"), progress.see("[200/200] Linking")] == [0.005, 1.0]


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("", []),
        ("one\ntwo\nthree\nfour\nfive\n", ["two", "three", "four", "five"]),
        (
            "[ 1%] Building\na.cpp:1:1: error: bad\n   1 | int\nmake: *** [x] Error 1\n",
            ["a.cpp:1:1: error: bad"],
        ),
        ("-- ok\nCMake Error at CMakeLists.txt:1:\n  no compiler\n", ["CMake Error at CMakeLists.txt:1:"]),
        ("ERROR: THESE PACKAGES DO NOT MATCH\n", ["ERROR: THESE PACKAGES DO NOT MATCH"]),
        ("[ 1%] Building error_handler.cpp\nlast\n", ["[ 1%] Building error_handler.cpp", "last"]),
    ],
    ids=["empty", "says-nothing", "compiler", "cmake", "pip", "a-file-named-error"],
)
def test_finds_the_reason_in_a_long_log(log: str, expected: list[str]) -> None:
    assert expected == failure_lines(log)


@pytest.mark.real
def test_logs_a_command_that_cannot_be_run(tmp_path: Path) -> None:
    log = tmp_path / "log"

    code = run_logged([str(tmp_path / "absent")], log=log, seen=lambda _: None, tick=lambda: None)

    assert code == 127
    assert "No such file" in log.read_text()


@pytest.mark.real
def test_passes_on_and_logs_every_line(tmp_path: Path) -> None:
    """Also a last line without an end, and bytes that are not text."""
    seen: list[str] = []
    script = r"printf 'one\ntwo\n\377\nlast'; exit 3"

    code = run_logged(["sh", "-c", script], log=tmp_path / "log", seen=seen.append, tick=lambda: None)

    assert (code, seen) == (3, ["one", "two", "\ufffd", "last"])
    assert (tmp_path / "log").read_bytes().endswith(b"one\ntwo\n\xff\nlast\n")
