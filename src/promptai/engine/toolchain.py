"""Check that this machine can build an engine, and read the progress from the build's output.

A missing compiler, a full disk or too many parallel compilers for a small memory fail a build after minutes, in the
middle of a wall of text. The checks here find them before anything starts, each with the command that fixes it. The
percentages of make, which restart with every program, become one that only grows.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from promptai.errors import EngineError

#: The oldest cmake that llama.cpp's build files accept.
CMAKE_AT_LEAST = (3, 14)
#: Memory of one compiler; GCC 12 took at most 694 MB, on llama.cpp's largest file (httplib.cpp).
BYTES_PER_JOB = 1_000_000_000
_TIMEOUT_S = 20.0
_MIB = 2**20
#: The first program's share of the work: it includes the libraries that the others use.
_FIRST_SHARE = 0.9


def missing_tools(which: Callable[[str], str | None] = shutil.which) -> list[str]:
    """Return the build tools that are not installed: ``cmake``, ``a C++ compiler``, ``make``."""
    compilers = [(os.environ.get("CXX") or "").split(" ")[0], "c++", "g++", "clang++"]
    found = {
        "cmake": which("cmake"),
        "a C++ compiler": next((path for name in compilers if name and (path := which(name))), None),
        "make": which("ninja") or which("make"),
    }
    return [name for name, path in found.items() if path is None]


def check_tools() -> None:
    """
    Check that the build tools are installed.

    Raises:
        EngineError: A tool is missing or too old; names it and how to install it.
    """
    missing = missing_tools()
    if missing:
        packages = {"a C++ compiler": "g++"}
        names = " ".join(packages.get(name, name) for name in missing)
        raise EngineError(
            f"cannot build an engine without {' and '.join(missing)}",
            hint=f"sudo apt-get install {names} (Debian, Ubuntu, Raspberry Pi OS); "
            f"sudo dnf install {names.replace('g++', 'gcc-c++')} (Fedora)",
        )
    version = cmake_version()
    if version is not None and version < CMAKE_AT_LEAST:
        raise EngineError(
            f"cmake {'.'.join(map(str, version))} is too old; {'.'.join(map(str, CMAKE_AT_LEAST))} or newer is needed",
            hint="pip install cmake installs a newer one",
        )


def ninja_or_make() -> tuple[str, ...]:
    """Return cmake's generator option: ninja where installed, because it counts the whole build; else the default."""
    return ("-G", "Ninja") if shutil.which("ninja") and "CMAKE_GENERATOR" not in os.environ else ()


def cmake_version() -> tuple[int, ...] | None:
    """Return the version of cmake on PATH; ``None``: unknown."""
    try:
        done = subprocess.run(["cmake", "--version"], check=False, capture_output=True, timeout=_TIMEOUT_S)  # noqa: S607
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(rb"version (\d+)\.(\d+)", done.stdout)
    return (int(match[1]), int(match[2])) if match else None


def check_disk(folder: Path, needed_bytes: int) -> None:
    """
    Check that the disk has room for the build.

    Raises:
        EngineError: Less than ``needed_bytes`` are free.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed_bytes:
        raise EngineError(
            f"the build needs {needed_bytes / _MIB:.0f} MiB in {folder}, but only {free / _MIB:.0f} MiB are free",
            hint="free disk space, or set XDG_CACHE_HOME to a larger disk",
        )


def choose_jobs(cpus: int, quota_cpus: float | None, available_bytes: int) -> int:
    """Return how many compilers CPUs and memory allow in parallel; at least 1. Pure."""
    cpus = min(cpus, int(quota_cpus)) if quota_cpus is not None else cpus
    return max(1, min(cpus, available_bytes // BYTES_PER_JOB))


class CompileProgress:
    """
    The finished share of a build, from the output of make or ninja.

    Args:
        programs: The programs in the order in which they are built.
    """

    def __init__(self, programs: Sequence[str]) -> None:
        self._programs = list(programs)
        self._finished: set[str] = set()
        self.share = 0.0

    def see(self, line: str) -> float:
        """Take a line of output, and return the finished share, which never falls."""
        if steps := re.match(r"\[(\d+)/(\d+)\]", line):  # ninja counts the whole
            self.share = max(self.share, int(steps[1]) / max(1, int(steps[2])))
        elif percent := re.match(r"\[ *(\d+)%\]", line):  # make counts each program separately
            if (built := re.search(r"Built target (\S+)$", line)) and built[1] in self._programs:
                self._finished.add(built[1])
                within = 0.0
            else:
                within = int(percent[1]) / 100
            self.share = max(self.share, self._of_whole(within))
        return self.share

    def _of_whole(self, within: float) -> float:
        done = len(self._finished)
        if done == 0:
            return within * _FIRST_SHARE
        rest = (1 - _FIRST_SHARE) / max(1, len(self._programs) - 1)
        return min(1.0, _FIRST_SHARE + rest * (done - 1 + within))
