"""What was asked, of what, on what: everything needed to believe a run and to repeat it.

A rate without the engine's build, its flags, the file's hash and the board's
governor cannot be compared with anything, not even with itself next month. The
manifest is written before the first request, and it alone decides how a run
resumes. Nothing in it is derived from measurements.
"""

import platform
import sys
from importlib.metadata import version
from urllib.parse import urlsplit

import msgspec

from promptai import __version__
from promptai.bench.plan import Protocol
from promptai.bench.workload import Conversation, Workload
from promptai.device.cpu import CpuFacts, board_name, read_cpu
from promptai.device.memory import read_memory
from promptai.engine.flags import EngineFlags
from promptai.errors import RunError

SCHEMA = 1


class MachineFacts(msgspec.Struct, frozen=True):
    """The machine that the client ran on; for local targets also the measured one."""

    board: str
    cpu: CpuFacts
    memory_bytes: int
    kernel: str
    python: str


class ModelFacts(msgspec.Struct, frozen=True):
    """
    The model file, by its own header and hash.

    Attributes:
        path: Absolute, for resuming from anywhere.
        synthetic: Random weights: its accuracy means nothing.
    """

    path: str
    sha256: str
    file_bytes: int
    name: str
    architecture: str
    parameters: int
    quantization: str
    context_length: int | None
    synthetic: bool


class EngineFacts(msgspec.Struct, frozen=True):
    """The engine of a local target; ``missing_features`` is what the CPU has and it does not use."""

    source: str
    command: tuple[str, ...]
    build: str | None
    features: tuple[str, ...] | None
    missing_features: tuple[str, ...]
    flags: EngineFlags


class TargetFacts(msgspec.Struct, frozen=True):
    """
    What was measured.

    Attributes:
        name: Unique within the run; traces carry it.
        url: Where it was, for a server that somebody else started.
        model, engine: For a model file that was measured on an engine of this machine.
    """

    name: str
    url: str | None = None
    model: ModelFacts | None = None
    engine: EngineFacts | None = None

    @property
    def here(self) -> bool:
        """Whether it runs on the client's machine, so that this machine's telemetry is about it."""
        return self.url is None or urlsplit(self.url).hostname in ("localhost", "127.0.0.1", "::1")


class WorkloadFacts(msgspec.Struct, frozen=True):
    """
    What was asked.

    Attributes:
        sha256: Fingerprint of the whole workload.
        selected: The ids that are played, in order, with their user turns.
        selection: How they were selected, in words.
    """

    name: str
    source: str
    rule: str
    sha256: str
    total: int
    selected: dict[str, int]
    selection: str

    @property
    def turns(self) -> int:
        """User turns of the selected conversations: requests of one pass."""
        return sum(self.selected.values())


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """
    One run as it was asked for.

    Attributes:
        created: UTC, ISO 8601, to the millisecond: it tells this run's salts from another's.
        command: The command line that makes it again.
        budget_s: Time limit that the workload was cut to; ``None`` without one.
    """

    created: str
    command: tuple[str, ...]
    machine: MachineFacts
    workload: WorkloadFacts
    protocol: Protocol
    targets: tuple[TargetFacts, ...]
    budget_s: float | None = None
    schema: int = SCHEMA
    promptai: str = __version__
    packages: dict[str, str] = {}


def describe_machine() -> MachineFacts:
    """This machine, now."""
    return MachineFacts(
        board=board_name(),
        cpu=read_cpu(),
        memory_bytes=read_memory().total_bytes,
        kernel=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
    )


def verify_same_machine(then: MachineFacts, now: MachineFacts) -> None:
    """
    Refuse to go on with a run on another machine; kernel and governor may change, and are noted.

    Raises:
        RunError: It is another board, or another processor.
    """
    for began, here in ((then.board, now.board), (then.cpu.model_name, now.cpu.model_name)):
        if began != here:
            raise RunError(
                f"the run began on {began}, this is {here}", hint="go on where it began, or start a new run here"
            )


def describe_workload(workload: Workload, selected: list[Conversation], selection: str) -> WorkloadFacts:
    """The workload and the part of it that is played."""
    return WorkloadFacts(
        name=workload.name,
        source=workload.source,
        rule=workload.rule,
        sha256=workload.sha256,
        total=len(workload.conversations),
        selected={conversation.id: conversation.user_turns for conversation in selected},
        selection=selection,
    )


def describe_packages() -> dict[str, str]:
    """Versions of what measures, so that a change of it can be told from a change of the board."""
    return {name: version(name) for name in ("aiohttp", "msgspec", "numpy")} | {"python": sys.version.split()[0]}
