"""What a build needs of this machine, and what its output says of how far it is.

A missing compiler, a full disk or too many compilers at once for a small memory
are found out after minutes, in the middle of a wall of text. Here they are found
before anything starts, each with the line that mends it. And the percentages of
make, which begin again with every program, become one that only grows.
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
#: One compiler at work: 694 MB at most was seen on llama.cpp's largest files (GCC 12, its httplib.cpp).
BYTES_PER_JOB = 1_000_000_000
_TIMEOUT_S = 20.0
#: Share of the work that the first program is: it brings the libraries that the others use too.
_FIRST_SHARE = 0.9


def missing_tools(which: Callable[[str], str | None] = shutil.which) -> list[str]:
    """What is not installed of that which a build needs: ``cmake``, ``a C++ compiler``, ``make``."""
    compilers = [(os.environ.get("CXX") or "").split(" ")[0], "c++", "g++", "clang++"]
    found = {
        "cmake": which("cmake"),
        "a C++ compiler": next((path for name in compilers if name and (path := which(name))), None),
        "make": which("ninja") or which("make"),
    }
    return [name for name, path in found.items() if path is None]


def check_tools() -> None:
    """
    Refuse to begin without the tools.

    Raises:
        EngineError: Names what is missing, and how to install it.
    """
    missing = missing_tools()
    if missing:
        packages = {"a C++ compiler": "g++"}
        names = " ".join(packages.get(name, name) for name in missing)
        raise EngineError(
            f"an engine cannot be built here without {' and '.join(missing)}",
            hint=f"sudo apt-get install {names} (Debian, Ubuntu, Raspberry Pi OS); "
            f"sudo dnf install {names.replace('g++', 'gcc-c++')} (Fedora)",
        )
    version = cmake_version()
    if version is not None and version < CMAKE_AT_LEAST:
        raise EngineError(
            f"cmake {'.'.join(map(str, version))} is too old, {'.'.join(map(str, CMAKE_AT_LEAST))} is needed",
            hint="pip install cmake brings a newer one",
        )


def ninja_or_make() -> tuple[str, ...]:
    """What to tell cmake of its generator: ninja where there is one, for it counts better; else its own default."""
    return ("-G", "Ninja") if shutil.which("ninja") and "CMAKE_GENERATOR" not in os.environ else ()


def cmake_version() -> tuple[int, ...] | None:
    """The version of cmake on PATH; ``None`` when it does not say."""
    try:
        done = subprocess.run(["cmake", "--version"], check=False, capture_output=True, timeout=_TIMEOUT_S)  # noqa: S607
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.search(rb"version (\d+)\.(\d+)", done.stdout)
    return (int(match[1]), int(match[2])) if match else None


def check_disk(folder: Path, needed_bytes: int) -> None:
    """
    Refuse to begin on a disk that will be full before the end.

    Raises:
        EngineError: Says how much is free and how much is needed.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed_bytes:
        raise EngineError(
            f"building takes {needed_bytes / 1e6:.0f} MB in {folder}, {free / 1e6:.0f} MB are free",
            hint="make room, or set XDG_CACHE_HOME to a larger disk",
        )


def choose_jobs(cpus: int, quota_cpus: float | None, available_bytes: int) -> int:
    """Compilers at once: as many as there are CPUs to run them and memory to hold them; at least 1. Pure."""
    cpus = min(cpus, int(quota_cpus)) if quota_cpus is not None else cpus
    return max(1, min(cpus, available_bytes // BYTES_PER_JOB))


class CompileProgress:
    """
    How much of a build is done, from what make or ninja print.

    Args:
        programs: What is built, in this order.
    """

    def __init__(self, programs: Sequence[str]) -> None:
        self._programs = list(programs)
        self._finished: set[str] = set()
        self.share = 0.0

    def see(self, line: str) -> float:
        """Take a line into account; give the share of the work that is done, which never falls."""
        if steps := re.match(r"\[(\d+)/(\d+)\]", line):  # ninja counts the whole
            self.share = max(self.share, int(steps[1]) / max(1, int(steps[2])))
        elif percent := re.match(r"\[ *(\d+)%\]", line):  # make counts each program by itself
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
