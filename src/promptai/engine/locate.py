"""Find a llama-server on this machine and learn what it is.

In order: the one named in the settings, one that ``promptai engine build``
made, ``llama-server`` on PATH, and last the embedded wheel, which is always
there. A build for every CPU leaves speed on the table (the wheel's aarch64
build has no dot-product instructions, and a Raspberry Pi 5 lives by them), so
each engine also tells which SIMD features it uses, and ``missing_features``
says what the CPU has beyond that.

Finding runs the engine for a moment without a model; nothing is downloaded or built.
"""

import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

from promptai.engine.flags import EngineFlags
from promptai.errors import EngineNotFoundError

#: Features that change the speed of llama.cpp's kernels, in its own names.
_SPEED_FEATURES = frozenset(
    (
        *("AVX2", "AVX_VNNI", "AVX512", "AVX512_VBMI", "AVX512_VNNI", "AVX512_BF16", "AMX_INT8", "FMA", "F16C"),
        *("NEON", "ARM_FMA", "FP16_VA", "DOTPROD", "MATMUL_INT8", "SVE", "SME"),
    )
)
_PROBE_TIMEOUT_S = 20.0


class EngineBinary(msgspec.Struct, frozen=True):
    """
    One llama-server that could be started.

    Attributes:
        source: ``settings``, ``built``, ``PATH`` or ``embedded``.
        command: What to run, before the flags.
        build: Its own words for its version; ``None`` when it does not say.
        features: SIMD features it was built with, in llama.cpp's names; ``None`` when it does not say.
    """

    source: str
    command: tuple[str, ...]
    build: str | None
    features: tuple[str, ...] | None

    @property
    def embedded(self) -> bool:
        """True for the wheel, which takes its flags as JSON."""
        return self.source == "embedded"

    @property
    def label(self) -> str:
        """Short, for tables."""
        return f"{'xllamacpp wheel' if self.embedded else 'llama-server'} {self.build or 'of unknown build'}"

    def arguments(self, flags: EngineFlags) -> list[str]:
        """The whole command line for ``flags``."""
        if self.embedded:
            return [*self.command, msgspec.json.encode(flags).decode()]
        return [*self.command, *flags.to_argv()]


def missing_features(engine: EngineBinary, cpu_features: tuple[str, ...]) -> list[str]:
    """SIMD features that the CPU has and the engine does not use; empty when unknown."""
    if engine.features is None:
        return []
    return sorted((set(cpu_features) & _SPEED_FEATURES) - set(engine.features))


def find_engines(named: Path | None = None, *, cache: Path | None = None) -> list[EngineBinary]:
    """
    Every usable engine of this machine, best first.

    Args:
        named: A ``llama-server`` named in the settings.
        cache: Where ``promptai engine build`` keeps its engines, one folder each.

    Raises:
        EngineNotFoundError: The named engine is not an executable file, or there is none at all.
    """
    found: list[EngineBinary] = []
    if named is not None:
        if not (named.is_file() and os.access(named, os.X_OK)):
            raise EngineNotFoundError(
                f"engine {named} is not an executable file",
                hint="give the path of a llama-server, or leave it out",
            )
        found.append(_native("settings", named.resolve()))
    built = list(cache.glob("*/bin/llama-server")) if cache is not None else []
    built.sort(key=lambda path: path.stat().st_mtime, reverse=True)  # the newest first; build names do not sort
    found += [_native("built", path) for path in built if os.access(path, os.X_OK)]
    on_path = shutil.which("llama-server")
    if on_path is not None:
        found.append(_native("PATH", Path(on_path)))
    wheel = _wheel()
    if wheel is not None:
        found.append(wheel)
    if not found:
        raise EngineNotFoundError(
            "there is no llama-server on this machine and the xllamacpp wheel is not installed",
            hint="pip install xllamacpp, or name a llama-server with --engine",
        )
    return found


def locate(named: Path | None = None, *, cache: Path | None = None) -> EngineBinary:
    """The engine to use; arguments and errors as in ``find_engines``."""
    return find_engines(named, cache=cache)[0]


def parse_features(log: str) -> tuple[str, ...] | None:
    """The features named ``X = 1`` in llama.cpp's ``system_info`` line; ``None`` without such a line."""
    for line in log.splitlines():
        if "system_info" in line:
            return tuple(re.findall(r"\b([A-Z][A-Z0-9_]*) = 1\b", line))
    return None


def parse_build(log: str) -> str | None:
    """
    The build as ``NUMBER (COMMIT)``; ``None`` when the log does not name one.

    Understands ``build: 4321 (abc) with`` of 2024 and ``build 1 (abc) with`` of 2026.
    """
    match = re.search(r"\bbuild:? (\d+) \(([^)\s]+)\)", log)
    return f"b{match[1]} ({match[2]})" if match else None


def _native(source: str, path: Path) -> EngineBinary:
    # At this verbosity every build since 2024 prints its features before it
    # looks for the model; that there is none ends it at once.
    log = _output([str(path), "--verbosity", "4", "--offline", "--model", "/dev/null/none"])
    return EngineBinary(source, (str(path),), parse_build(log), parse_features(log))


def _wheel() -> EngineBinary | None:
    try:
        release = version("xllamacpp")
    except PackageNotFoundError:
        return None
    command = (sys.executable, "-m", "promptai.engine.embedded")
    return EngineBinary("embedded", command, release, parse_features(_output([*command, "--probe"])))


def _output(command: list[str]) -> str:
    """Whatever the command printed; empty when it cannot be run."""
    try:
        done = subprocess.run(  # noqa: S603  the user's own engine
            command, check=False, capture_output=True, stdin=subprocess.DEVNULL, timeout=_PROBE_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return (done.stdout + done.stderr).decode("utf-8", "replace")
