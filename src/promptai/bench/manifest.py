"""Everything needed to trust a run and to repeat it: requests, targets and machine.

A rate without the engine's build, its flags, the file's hash and the board's governor compares
with nothing, not even with itself next month. The manifest is written before the first request,
and alone determines how a run resumes. It contains nothing derived from measurements.
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
    """The machine on which the client runs; for local targets also the measured machine."""

    board: str
    cpu: CpuFacts
    memory_bytes: int
    kernel: str
    python: str


class ModelFacts(msgspec.Struct, frozen=True):
    """
    A model file, by its header and hash.

    Attributes:
        path: Absolute, so a run can be resumed from any directory.
        synthetic: The weights are random: accuracy means nothing.
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
    """The engine of a local target; ``missing_features``: SIMD of the CPU that the engine does not use."""

    source: str
    command: tuple[str, ...]
    build: str | None
    features: tuple[str, ...] | None
    missing_features: tuple[str, ...]
    flags: EngineFlags


class TargetFacts(msgspec.Struct, frozen=True):
    """
    A target.

    Attributes:
        name: Unique within the run; the ``target`` of its traces.
        url: URL of a running server; ``None`` for a model file.
        model, engine: A model file and the engine on this machine that serves it; ``None`` for a server.
    """

    name: str
    url: str | None = None
    model: ModelFacts | None = None
    engine: EngineFacts | None = None

    @property
    def here(self) -> bool:
        """Whether it runs on the client's machine, which this machine's telemetry describes."""
        return self.url is None or urlsplit(self.url).hostname in ("localhost", "127.0.0.1", "::1")


class WorkloadFacts(msgspec.Struct, frozen=True):
    """
    The workload and the selected part of it.

    Attributes:
        sha256: Fingerprint of the whole workload.
        selected: Ids of the selected conversations, in order, with their user turns.
        selection: The rule of the selection, in words.
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
        """User turns of the selected conversations, which is the number of requests per pass."""
        return sum(self.selected.values())


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """
    A run as requested.

    Attributes:
        created: UTC, ISO 8601, to the millisecond: makes the salts of two runs differ.
        command: The command line that started it.
        budget_s: Time limit that the workload was cut to; ``None``: unlimited.
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
    """Describe this machine in its present state."""
    return MachineFacts(
        board=board_name(),
        cpu=read_cpu(),
        memory_bytes=read_memory().total_bytes,
        kernel=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
    )


def verify_same_machine(then: MachineFacts, now: MachineFacts) -> None:
    """
    Refuse to resume a run on another machine; kernel and governor may change, and are recorded per session.

    Raises:
        RunError: Board or processor differ.
    """
    for began, here in ((then.board, now.board), (then.cpu.model_name, now.cpu.model_name)):
        if began != here:
            raise RunError(f"the run began on {began}, this is {here}", hint="resume it there, or start a new run here")


def describe_workload(workload: Workload, selected: list[Conversation], selection: str) -> WorkloadFacts:
    """Describe a workload and the selected part of it."""
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
    """Versions of the packages that measure, to separate their changes from changes of the board."""
    return {name: version(name) for name in ("aiohttp", "msgspec", "numpy")} | {"python": sys.version.split()[0]}
