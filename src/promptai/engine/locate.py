"""Find the llama-servers on this machine and identify them.

There may be several: one named in the settings, those that ``promptai engine build`` made, ``llama-server`` on PATH,
and the embedded wheel, which is always installed. ``engine.choice`` orders them. A build for every CPU is slower than
it could be (the wheel's aarch64 build has no dot-product instructions, on which a Raspberry Pi 5 depends), so each
engine lists the SIMD features it uses, and ``missing_features`` lists those that only the CPU has.

Each engine runs for a moment without a model. That also finds engines that do not start, because of a missing library
or a build for another processor; they stay in the list with the reason and are not used. Nothing is downloaded or
built.
"""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import msgspec

from promptai.device.cpu import CpuFacts, read_cpu
from promptai.engine.choice import Candidate, arrange, processor_key, read_choice, read_comparison
from promptai.engine.flags import EngineFlags, newer_switches
from promptai.errors import EngineNotFoundError, EngineStartError

#: Features that change the speed of llama.cpp's kernels, in its own names.
_SPEED_FEATURES = frozenset(
    (
        *("AVX2", "AVX_VNNI", "AVX512", "AVX512_VBMI", "AVX512_VNNI", "AVX512_BF16", "AMX_INT8", "FMA", "F16C"),
        *("NEON", "ARM_FMA", "FP16_VA", "DOTPROD", "MATMUL_INT8", "SVE", "SME"),
    )
)
_PROBE_TIMEOUT_S = 20.0
#: Exit codes of a shell and of the dynamic linker when a program cannot be run.
_NOT_RUN = (126, 127)
_NO_OUTPUT = "no output"


class EngineBinary(msgspec.Struct, frozen=True):
    """
    One llama-server on this machine.

    Attributes:
        source: ``settings``, ``built``, ``PATH`` or ``embedded``.
        command: The command line before the flags; includes the switches that only newer builds need.
        build: The version that the engine reports; ``None``: not reported.
        features: SIMD features it was built with, in llama.cpp's names; ``None``: not reported.
        trouble: Why it does not start; ``None`` when it does.
        reason: Why it has its place in the order.
    """

    source: str
    command: tuple[str, ...]
    build: str | None
    features: tuple[str, ...] | None
    trouble: str | None = None
    reason: str = ""

    @property
    def embedded(self) -> bool:
        """Whether it is the wheel, which takes its flags as JSON."""
        return self.source == "embedded"

    @property
    def name(self) -> str:
        """Name for ``promptai engine use``: the folder of a built engine, else the source."""
        return Path(self.command[0]).parents[1].name if self.source == "built" else self.source

    @property
    def label(self) -> str:
        """Short description for tables."""
        does = f", does not start: {self.trouble}" if self.trouble is not None else ""
        return f"{'xllamacpp wheel' if self.embedded else 'llama-server'} {self.build or 'of unknown build'}{does}"

    def arguments(self, flags: EngineFlags) -> list[str]:
        """Return the whole command line for ``flags``."""
        if self.embedded:
            return [*self.command, msgspec.json.encode(flags).decode()]
        return flags.to_argv(self.command)


class CommandOutput(NamedTuple):
    """
    The output of a command.

    Attributes:
        code: The exit code; ``None``: the command was killed after the time limit, or could not be run.
        error: Why it has no exit code.
    """

    text: str
    code: int | None
    error: str | None = None


def fingerprint_of(engine: EngineBinary) -> str | None:
    """Identify the engine's file by path, build, size and time; ``None`` when there is no file."""
    path = Path(engine.command[0])
    if engine.embedded:
        spec = importlib.util.find_spec("xllamacpp")
        if spec is None or spec.origin is None:
            return None
        path = Path(spec.origin)
    try:
        facts = path.stat()
    except OSError:
        return None
    return f"{path} {engine.build} {facts.st_size} {facts.st_mtime_ns}"


def wrong_processor(engine: EngineBinary, cpu_features: tuple[str, ...]) -> str | None:
    """
    Return why an engine that was built on another processor cannot be used here; ``None`` when it can.

    Such an engine may start, and crash in the middle of an answer at the first missing instruction.
    """
    beyond = sorted((set(engine.features or ()) & _SPEED_FEATURES) - set(cpu_features))
    return f"built for another processor: it uses {', '.join(beyond)}" if beyond else None


def missing_features(engine: EngineBinary, cpu_features: tuple[str, ...]) -> list[str]:
    """Return the SIMD features that the CPU has and the engine does not use; empty when unknown."""
    if engine.features is None:
        return []
    return sorted((set(cpu_features) & _SPEED_FEATURES) - set(engine.features))


def find_engines(named: Path | None = None, *, cache: Path | None = None) -> list[EngineBinary]:
    """
    Return every engine of this machine, best first; those that do not start come last.

    Args:
        named: A ``llama-server`` named in the settings; always first.
        cache: The folder of built engines, of the choice and of the last comparison; ``None``: there is none.

    Raises:
        EngineNotFoundError: The named engine is not an executable file, or there is no engine.
    """
    cpu = read_cpu()
    found = _found(named, cache, cpu)
    if not found:
        raise EngineNotFoundError(
            "no llama-server on this machine, and the xllamacpp wheel is not installed",
            hint="pip install xllamacpp, or name a llama-server with --engine",
        )
    places = arrange(
        [Candidate(e.name, fingerprint_of(e), e.source == "settings", e.trouble is None) for e in found],
        chosen=read_choice(cache) if cache is not None else None,
        comparison=read_comparison(cache) if cache is not None else None,
        cpu=processor_key(cpu.model_name, cpu.features),
    )
    return [msgspec.structs.replace(found[place.number], reason=place.reason) for place in places]


def locate(named: Path | None = None, *, cache: Path | None = None) -> EngineBinary:
    """
    Return the engine to use; arguments and further errors as in ``find_engines``.

    Raises:
        EngineStartError: The named engine, or every engine, does not start.
    """
    engine = find_engines(named, cache=cache)[0]
    if engine.trouble is not None:
        library = re.search(r"(lib\S+\.so[.\d]*): cannot open shared object", engine.trouble)
        raise EngineStartError(
            f"engine {engine.command[0]} does not start: {engine.trouble}",
            hint=f"install the system library {library[1]}; libgomp.so.1 comes with apt-get install libgomp1"
            if library
            else "see promptai engine list",
        )
    return engine


def _found(named: Path | None, cache: Path | None, cpu: CpuFacts) -> list[EngineBinary]:
    """Return all engines in the default order: named, built (newest first, names do not sort), on PATH, embedded."""
    found: list[EngineBinary] = []
    if named is not None:
        if not (named.is_file() and os.access(named, os.X_OK)):
            raise EngineNotFoundError(
                f"engine {named} is not an executable file",
                hint="give the path of a llama-server, or leave the option out",
            )
        found.append(probe("settings", named.resolve()))
    built = list(cache.glob("*/bin/llama-server")) if cache is not None else []
    built.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for path in built:
        if os.access(path, os.X_OK):
            engine = probe("built", path)
            trouble = engine.trouble or wrong_processor(engine, cpu.features)
            found.append(msgspec.structs.replace(engine, trouble=trouble))
    on_path = shutil.which("llama-server")
    if on_path is not None:
        found.append(probe("PATH", Path(on_path)))
    wheel = _wheel()
    return [*found, wheel] if wheel is not None else found


def parse_features(log: str) -> tuple[str, ...] | None:
    """Return the features marked ``X = 1`` in llama.cpp's ``system_info`` line; ``None`` without such a line."""
    for line in log.splitlines():
        if "system_info" in line:
            return tuple(re.findall(r"\b([A-Z][A-Z0-9_]*) = 1\b", line))
    return None


def parse_build(log: str) -> str | None:
    """
    Return the build as ``bNUMBER (COMMIT)``; ``None`` when the log does not name one.

    Reads ``build: 4321 (abc) with`` of 2024 and ``build 1 (abc) with`` of 2026.
    """
    match = re.search(r"\bbuild:? (\d+) \(([^)\s]+)\)", log)
    return f"b{match[1]} ({match[2]})" if match else None


def probe(source: str, path: Path) -> EngineBinary:
    """Run a native llama-server for a moment to identify it and to see whether it starts."""
    # At this verbosity every build since 2024 prints its features before it looks for the model, and ends at once
    # because there is none.
    output = output_of([str(path), "--verbosity", "4", "--offline", "--model", "/dev/null/none"])
    features, trouble = parse_features(output.text), None
    switches: tuple[str, ...] = ()
    if features is None:
        trouble = probe_failure(output)
    if trouble is None:
        switches = newer_switches(output_of([str(path), "--help"]).text)
    return EngineBinary(source, (str(path), *switches), parse_build(output.text), features, trouble)


def probe_failure(output: CommandOutput) -> str | None:
    """Return why an engine that did not report its features does not start; ``None`` when it may start."""
    lines = [line.strip() for line in output.text.splitlines() if line.strip()]
    last_line = lines[-1][:200] if lines else _NO_OUTPUT
    if output.error is not None:
        return output.error
    if output.code is not None and output.code < 0:
        if -output.code == signal.SIGILL:
            return "illegal instruction: it was built for another processor"
        return f"killed by signal {-output.code}: {last_line}"
    if output.code in _NOT_RUN:
        return last_line
    return None


def _wheel() -> EngineBinary | None:
    try:
        release = version("xllamacpp")
    except PackageNotFoundError:
        return None
    # -P: a file called signal.py in the user's folder must not replace the standard library's module.
    command = (sys.executable, "-P", "-m", "promptai.engine.embedded")
    output = output_of([*command, "--probe"])
    features = parse_features(output.text)
    trouble = None
    if features is None and output.code != 0:
        trouble = probe_failure(output) or (output.text.strip().splitlines() or [_NO_OUTPUT])[-1][:200]
    return EngineBinary("embedded", command, release, features, trouble)


def output_of(command: list[str]) -> CommandOutput:
    """Run a command with a time limit, and kill its whole process group when that has passed."""
    try:
        process = subprocess.Popen(  # noqa: S603  the user's own engine
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # a wrapper script's llama-server is in its group too
        )
    except OSError as error:
        return CommandOutput("", None, f"cannot be run: {error.strerror}")
    with process:
        try:
            printed, errors = process.communicate(timeout=_PROBE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return CommandOutput("", None, f"still running {_PROBE_TIMEOUT_S:.0f} s after its start")
    return CommandOutput((printed + errors).decode("utf-8", "replace"), process.returncode)
