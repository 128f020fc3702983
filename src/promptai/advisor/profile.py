"""Speed of a model in earlier runs on this machine: better than a forecast, because it was measured.

``promptai bench`` leaves a directory per run. Before the gateway has served a model, it uses the figures of the newest
run with the same file, processor, engine and number of threads. Runs that differ in any of these are ignored: rates of
another board are worse than none, because they look like rates of this one. Runs with concurrent conversations are
ignored too, because they do not measure a single stream.

Reads the needed parts of ``manifest.json`` and ``summary.json``; a run without a summary is skipped silently. Measures
nothing.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from promptai.engine.locate import EngineBinary
from promptai.wire.malformed import MALFORMED


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """
    Measured performance of a model.

    Attributes:
        run: Name of the run's directory.
        prefill_tps, decode_tps: Tokens per second of a single stream, with the cache off.
        load_s: Load time in seconds; ``None``: not measured.
        accuracy: Share of items solved; ``None``: not measured.
    """

    run: str
    prefill_tps: float | None
    decode_tps: float | None
    load_s: float | None = None
    accuracy: float | None = None


class ProfileKey(msgspec.Struct, frozen=True, kw_only=True):
    """
    The configuration that a profile is valid for.

    Attributes:
        cpu: Processor name.
        label: Engine, as in ``EngineBinary.label``.
    """

    cpu: str
    label: str
    threads: int


class Profiles:
    """
    Profiles of one configuration from a directory of runs.

    Args:
        note: Called with a line for each run that cannot be read.
    """

    def __init__(self, runs: Path, key: ProfileKey, note: Callable[[str], None]) -> None:
        self._measured: list[_MeasuredModel] = []
        for directory in _directories(runs):
            try:
                self._measured += _read(directory, key)
            except OSError as error:
                note(f"run {directory.name} is ignored: {error.strerror}")
            except MALFORMED as error:
                note(f"run {directory.name} is ignored: {error}")

    def find(self, path: Path, *, sha256: str | None) -> Profile | None:
        """
        Return the newest profile of a model file; ``None`` if there is none.

        Args:
            sha256: Checksum of the file; ``None``: unknown, file name and size must match instead.
        """
        try:
            size = path.stat().st_size
        except OSError:
            return None
        for seen in self._measured:
            model = seen.model
            same = model.sha256 == sha256 if sha256 else (Path(model.path).name, model.file_bytes) == (path.name, size)
            if same:
                return seen.profile
        return None


class _Cpu(msgspec.Struct, frozen=True):
    model_name: str


class _Machine(msgspec.Struct, frozen=True):
    cpu: _Cpu


class _Model(msgspec.Struct, frozen=True):
    path: str
    sha256: str
    file_bytes: int


class _Flags(msgspec.Struct, frozen=True):
    threads: int


class _EngineFacts(msgspec.Struct, frozen=True):
    source: str
    command: tuple[str, ...]
    build: str | None
    features: tuple[str, ...] | None
    flags: _Flags


class _TargetFacts(msgspec.Struct, frozen=True):
    name: str
    model: _Model | None = None
    engine: _EngineFacts | None = None


class _Arrivals(msgspec.Struct, frozen=True):
    kind: str = "closed"


class _Protocol(msgspec.Struct, frozen=True):
    concurrency: int = 1
    arrivals: _Arrivals = _Arrivals()


class _Manifest(msgspec.Struct, frozen=True):
    created: str
    machine: _Machine
    protocol: _Protocol
    targets: tuple[_TargetFacts, ...]


class _Metric(msgspec.Struct, frozen=True):
    value: float | None


class _Part(msgspec.Struct, frozen=True):
    metrics: dict[str, _Metric]

    def value(self, name: str) -> float | None:
        found = self.metrics.get(name)
        return found.value if found is not None and found.value else None


class _Target(msgspec.Struct, frozen=True):
    name: str
    cold: _Part | None = None
    load_s: _Metric | None = None
    accuracy: _Metric | None = None


class _Summary(msgspec.Struct, frozen=True):
    targets: list[_Target]


class _MeasuredModel(msgspec.Struct, frozen=True):
    model: _Model
    profile: Profile


def _directories(runs: Path) -> list[Path]:
    """Run directories, newest first; their names begin with the time."""
    try:
        return sorted((entry for entry in runs.iterdir() if entry.is_dir()), key=lambda entry: entry.name, reverse=True)
    except OSError:
        return []


def _read(directory: Path, key: ProfileKey) -> Iterator[_MeasuredModel]:
    if not (directory / "summary.json").is_file():
        return
    manifest = msgspec.json.decode((directory / "manifest.json").read_bytes(), type=_Manifest)
    alone = manifest.protocol.concurrency == 1 and manifest.protocol.arrivals.kind == "closed"
    if manifest.machine.cpu.model_name != key.cpu or not alone:
        return
    summary = msgspec.json.decode((directory / "summary.json").read_bytes(), type=_Summary)
    measured = {target.name: target for target in summary.targets}
    for facts in manifest.targets:
        target = measured.get(facts.name)
        if facts.model is None or facts.engine is None or target is None or not _has_key(facts.engine, key):
            continue
        cold = target.cold or _Part({})
        profile = Profile(
            run=directory.name,
            prefill_tps=cold.value("prefill_tps"),
            decode_tps=cold.value("engine_decode_tps") or cold.value("decode_tps"),
            load_s=target.load_s.value if target.load_s is not None else None,
            accuracy=target.accuracy.value if target.accuracy is not None else None,
        )
        if profile.prefill_tps is not None and profile.decode_tps is not None:
            yield _MeasuredModel(facts.model, profile)


def _has_key(facts: _EngineFacts, key: ProfileKey) -> bool:
    label = EngineBinary(facts.source, facts.command, facts.build, facts.features).label
    return (label, facts.flags.threads) == (key.label, key.threads)
