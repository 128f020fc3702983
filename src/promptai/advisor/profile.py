"""What earlier runs say of a model on this machine: the best forecast there is, because it was measured.

``promptai bench`` leaves a directory for each run. Whoever plans (the gateway, before it has seen a
model at work) wants three numbers of the newest run of the same file, on the same processor, with the
same engine and as many threads. Everything else is foreign: another board's rates are worse than none,
for they look like ours. Rates that were measured with several conversations at once are not a stream's
that is alone, and are left out too.

Reads ``manifest.json`` and ``summary.json`` as far as they are needed; a run that has no summary, or
not yet, is not told of. Measures nothing.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from promptai.engine.locate import EngineBinary
from promptai.wire.malformed import MALFORMED


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """
    One model as it was seen at work.

    Attributes:
        run: The run's directory, by its name.
        prefill_tps, decode_tps: With the cache off, of one stream that is alone.
        load_s: Seconds that loading took.
        accuracy: Share of items solved; ``None``: not measured.
    """

    run: str
    prefill_tps: float | None
    decode_tps: float | None
    load_s: float | None = None
    accuracy: float | None = None


class ProfileKey(msgspec.Struct, frozen=True, kw_only=True):
    """
    What a profile holds for.

    Attributes:
        cpu: The processor's name; ``label`` is the engine's, see ``EngineBinary.label``.
    """

    cpu: str
    label: str
    threads: int


class Profiles:
    """
    The runs of one engine here, the newest first.

    Args:
        note: Told of runs that cannot be read, one line each.
    """

    def __init__(self, runs: Path, engine: ProfileKey, note: Callable[[str], None]) -> None:
        self._measured: list[_MeasuredModel] = []
        for directory in _directories(runs):
            try:
                self._measured += _read(directory, engine)
            except OSError as error:
                note(f"run {directory.name} is left out: {error.strerror}")
            except MALFORMED as error:
                note(f"run {directory.name} is left out: {error}")

    def of(self, path: Path, *, sha256: str | None) -> Profile | None:
        """
        The newest profile of a model file.

        Args:
            sha256: Of the file where it is known; otherwise its name and size must be the same.
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
    """Directories of runs; their names begin with the time, so that the newest come first."""
    try:
        return sorted((entry for entry in runs.iterdir() if entry.is_dir()), key=lambda entry: entry.name, reverse=True)
    except OSError:
        return []


def _read(directory: Path, engine: ProfileKey) -> Iterator[_MeasuredModel]:
    if not (directory / "summary.json").is_file():
        return
    manifest = msgspec.json.decode((directory / "manifest.json").read_bytes(), type=_Manifest)
    alone = manifest.protocol.concurrency == 1 and manifest.protocol.arrivals.kind == "closed"
    if manifest.machine.cpu.model_name != engine.cpu or not alone:
        return
    summary = msgspec.json.decode((directory / "summary.json").read_bytes(), type=_Summary)
    measured = {target.name: target for target in summary.targets}
    for facts in manifest.targets:
        target = measured.get(facts.name)
        if facts.model is None or facts.engine is None or target is None or not _has_key(facts.engine, engine):
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


def _has_key(facts: _EngineFacts, engine: ProfileKey) -> bool:
    label = EngineBinary(facts.source, facts.command, facts.build, facts.features).label
    return (label, facts.flags.threads) == (engine.label, engine.threads)
