"""Run the command line as a user does: in a process of its own, without a terminal, on real files."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

PROMPTAI = (sys.executable, "-m", "promptai")
#: Two cores are the smallest machine that the suite runs on; one thread leaves the other to the client.
ONE_THREAD = ("--threads", "1")
TIMEOUT_S = 90.0


def promptai(*arguments: str | Path, cwd: Path, **environ: str) -> "subprocess.CompletedProcess[str]":
    """Run a command to its end."""
    return subprocess.run(
        [*PROMPTAI, *map(str, arguments)],
        check=False,
        cwd=cwd,
        env=clean_environment() | environ,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        stdin=subprocess.DEVNULL,
    )


def start(*arguments: str | Path, cwd: Path) -> "subprocess.Popen[str]":
    """Start a command in a process group of its own."""
    return subprocess.Popen(
        [*PROMPTAI, *map(str, arguments)],
        cwd=cwd,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )


def clean_environment() -> dict[str, str]:
    """The environment without the PromptAI settings of the developer's shell."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PROMPTAI_")} | {"COLUMNS": "200"}


@contextlib.contextmanager
def simulated(*arguments: str, cwd: Path) -> Iterator[str]:
    """Run a simulated engine in another process; yield its URL."""
    process = start("engine", "simulate", *arguments, cwd=cwd)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        match = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert match is not None, line
        yield match[0]
    finally:
        process.kill()
        process.communicate()


def only_run(cwd: Path) -> Path:
    """The only run directory below ``cwd``."""
    runs = sorted((cwd / "runs").iterdir())
    assert len(runs) == 1, runs
    return runs[0]


def lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a JSON Lines file; empty while the file does not exist."""
    if not path.exists():
        return []
    data = path.read_bytes()
    return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]


def keys(traces: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """The key that identifies each request."""
    return [tuple(t[name] for name in ("target", "cache", "repeat", "conversation", "turn")) for t in traces]


def wait_for(condition: Callable[[], bool], *, what: str, seconds: float = 60.0) -> None:
    """Poll until a condition holds."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError(f"{what} did not happen within {seconds:.0f} s")


def children_of(pid: int, name: str) -> list[int]:
    """Live descendants of a process whose command line contains ``name``."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            parent = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
            if name in command and (parent == pid or parent in children_of_any(pid)):
                found.append(int(directory.name))
    return found


def children_of_any(pid: int) -> set[int]:
    """Every direct child of a process."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found.update(int(child) for child in task.read_text().split())
    return found


def alive(pid: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
