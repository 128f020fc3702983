"""Select the models of this machine for ``promptai serve`` and estimate their memory and speed.

The speed is the one measured in an earlier run (``promptai bench``), otherwise the forecast of a calibration
(``promptai models calibrate``), otherwise unknown until the gateway learns it from the first answers. Only the headers
of model files are read; nothing is loaded.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import msgspec

from promptai.advisor.calibrate import load
from promptai.advisor.calibration import Calibration
from promptai.advisor.cost import cost_of_file
from promptai.advisor.fit import MachineCapacity, model_fit
from promptai.advisor.profile import ProfileKey, Profiles
from promptai.device.cpu import default_threads, read_cpu
from promptai.device.memory import read_memory
from promptai.engine.flags import BYTES_PER_VALUE, EngineFlags
from promptai.engine.locate import EngineBinary, locate
from promptai.engine.url import looks_like_url
from promptai.errors import ModelError, SettingsError
from promptai.fleet.local import LocalModel
from promptai.fleet.replica import Rates
from promptai.models.bundled import NAME, bundled_model
from promptai.models.gguf import GgufHeader, join_parts, part_names, read_header
from promptai.models.library import Library, StoredModel, resolve
from promptai.settings import EngineSettings, ServeEntry, Settings, cache_directory, models_directory

CONTEXT = 4096
#: Depth of the forecast in tokens: the middle of a short conversation.
_DEPTH = 512
#: Memory beyond the lower bound, as a share of it.
_UNBOUNDED_SHARE = 0.1
_MAX_CACHE_MIB = 1024
_MIN_BATCH, _DEFAULT_BATCH, _STEP_S = 32, 128, 0.5


class EngineSetup(msgspec.Struct, frozen=True, kw_only=True):
    """
    How engines are started on this machine; determined once, so that reloaded settings do not affect running engines.

    Attributes:
        engine: Engine settings with the options of the command line applied.
        cache_ram_mib: Prompt cache of each engine.
        calibration: Calibration of this engine; ``None``: not calibrated.
        profiles: Speeds measured in earlier runs.
    """

    binary: EngineBinary
    threads: int
    engine: EngineSettings
    cache_ram_mib: int
    calibration: Calibration | None
    profiles: Profiles


def find_engine_setup(settings: Settings, note: Callable[[str], None]) -> EngineSetup:
    """
    Find the engine, its calibration and its profiles.

    Raises:
        EngineError: No engine was found that starts.
    """
    cpu = read_cpu()
    threads = settings.engine.threads or default_threads(cpu)
    named = settings.engine.path
    binary = locate(Path(named) if named else None, cache=cache_directory() / "engines")
    key = ProfileKey(cpu=cpu.model_name, label=binary.label, threads=threads)
    return EngineSetup(
        binary=binary,
        threads=threads,
        engine=settings.engine,
        cache_ram_mib=_prompt_cache_mib(settings),
        calibration=load(cache_directory() / "calibrations", engine=binary.label, cpu=cpu.model_name, threads=threads),
        profiles=Profiles(Path(settings.runs), key, note),
    )


class ServedModel(msgspec.Struct, frozen=True, kw_only=True):
    """
    A model file to serve.

    Attributes:
        name: Model name in requests.
        sha256: Checksum from its sidecar; ``None``: no sidecar.
        entry: Its settings.
    """

    path: Path
    name: str
    sha256: str | None
    entry: ServeEntry


def select_models(settings: Settings, note: Callable[[str], None]) -> list[ServedModel]:
    """
    Return the models named in the settings; if neither models nor boards are named, the library or the bundled model.

    Raises:
        ModelError: A model does not exist, or its name is ambiguous.
        SettingsError: A model is named twice, or is not a model.
    """
    library = Library(models_directory(settings))
    if settings.serve:
        found = [_named(entry, library) for entry in settings.serve]
    elif settings.fleet:
        found = []
    else:
        found = [_kept(kept, ServeEntry(kept.name)) for kept in library.models() if _usable(kept, note)]
        found = found or [_bundled(ServeEntry(NAME, preload=True))]
    return _with_unique_names(found)


def describe_model(model: ServedModel, setup: EngineSetup) -> LocalModel:
    """
    Estimate memory, speed and limits of a model before it runs.

    Raises:
        ModelError: The model file cannot be used.
    """
    header, entry = _header(model.path), model.entry
    slots = entry.slots or setup.engine.slots
    requested_context = entry.context or setup.engine.context or CONTEXT
    context = min(requested_context, header.context_length or requested_context)
    here = MachineCapacity(
        available_bytes=read_memory().available_for_new_process(), read_bytes_per_s=0.0, calibration=setup.calibration
    )
    cost = cost_of_file(header)
    expected = model_fit(cost, here, context=context * slots, depth=min(_DEPTH, context))
    profile = setup.profiles.find(model.path, sha256=model.sha256)
    rates = Rates()
    if profile is not None:
        rates = Rates(prefill_tps=profile.prefill_tps, decode_tps=profile.decode_tps, source="profile")
    elif expected.calibrated and expected.decode_tps is not None:
        rates = Rates(prefill_tps=expected.prefill_tps, decode_tps=expected.decode_tps, source="forecast")
    bound = header.file_bytes
    if expected.memory_bytes:
        bound = expected.memory_bytes - _saved_bytes(cost.kv_bytes(context * slots) or 0, setup.engine.cache_type)
    margin = 0.0 if expected.calibrated and expected.memory_bytes else _UNBOUNDED_SHARE
    return LocalModel(
        name=model.name,
        path=model.path,
        needed_bytes=round(bound * (1 + margin)) + setup.cache_ram_mib * 1024**2,
        slots=slots,
        context=context,
        cache_ram_mib=setup.cache_ram_mib,
        host_cache_tokens=_cached_tokens(header, setup),
        rates=rates,
        load_s=profile.load_s if profile is not None else None,
        capability=entry.capability or round(header.parameters / 1e9, 4),
        accuracy=profile.accuracy if profile is not None else None,
        pinned=entry.pinned,
        ttl_s=entry.ttl_s,
        preload=entry.preload,
    )


def flags_for(setup: EngineSetup) -> Callable[[LocalModel, int], EngineFlags]:
    """Return the function that makes the engine flags for a model and a port."""
    engine = setup.engine

    def flags(model: LocalModel, port: int) -> EngineFlags:
        batch = batch_for(model.rates.prefill_tps, at_most=engine.batch)
        return EngineFlags(
            model=str(model.path),
            port=port,
            threads=setup.threads,
            context=(model.context or CONTEXT) * model.slots,
            slots=model.slots,
            batch=batch,
            ubatch=batch,
            cache_type_k=engine.cache_type,
            cache_type_v=engine.cache_type,
            cache_ram_mib=model.cache_ram_mib,
            mmap=engine.mmap,
        )

    return flags


def batch_for(prefill_tps: float | None, *, at_most: int = 512) -> int:
    """
    Return the prompt tokens per step of a serving engine: about half a second of prefill, a power of two.

    Only between two steps does an engine detect a disconnected client and send the tokens of its other streams. A step
    of 512 tokens on a Pi would delay both by ten seconds.
    """
    if prefill_tps is None:
        return min(_DEFAULT_BATCH, at_most)
    fitting = 1 << round(math.log2(max(1.0, _STEP_S * prefill_tps)))
    return min(max(fitting, _MIN_BATCH), at_most)


def _prompt_cache_mib(settings: Settings) -> int:
    """As set, else 1/16 of the memory: 512 MiB on an 8 GiB board hold some 18,000 tokens of a 1.5 B model."""
    if settings.gateway.cache_ram_mib is not None:
        return settings.gateway.cache_ram_mib
    return min(_MAX_CACHE_MIB, read_memory().total_bytes // 16 // 1024**2)


def _cached_tokens(header: GgufHeader, setup: EngineSetup) -> int:
    """Capacity of the prompt cache in tokens; 0 if the size of a token is unknown."""
    per_token = header.kv_bytes_per_token(bytes_per_value=BYTES_PER_VALUE[setup.engine.cache_type])
    return int(setup.cache_ram_mib * 1024**2 // per_token) if per_token else 0


def _saved_bytes(f16_bytes: int, cache_type: str) -> int:
    """Memory that a smaller cache type saves compared with f16, which forecasts assume."""
    return round(f16_bytes * (1 - BYTES_PER_VALUE[cache_type] / BYTES_PER_VALUE["f16"]))


def _named(entry: ServeEntry, library: Library) -> ServedModel:
    if looks_like_url(entry.model):
        shown = entry.model.rpartition("@")[2]  # without a password
        raise SettingsError(f"{shown} is a server, not a model", hint="pass it with --board or list it in [[fleet]]")
    # Not Path.exists: it raises for a name that is too long, and for a path in a folder without permission.
    exists = os.path.exists(entry.model)  # noqa: PTH110
    kept = None if exists else library.find(entry.model)
    if kept is not None:
        return _kept(kept, entry)
    if entry.model == NAME:
        return _bundled(entry)
    path = resolve(entry.model, library)
    return ServedModel(path=path.absolute(), name=path.name.removesuffix(".gguf"), sha256=None, entry=entry)


def _kept(kept: StoredModel, entry: ServeEntry) -> ServedModel:
    sidecar = kept.sidecar
    return ServedModel(
        path=kept.path.absolute(),
        name=(sidecar.catalog if sidecar is not None else None) or kept.path.stem,
        sha256=sidecar.sha256 if sidecar is not None else None,
        entry=entry,
    )


def _bundled(entry: ServeEntry) -> ServedModel:
    return ServedModel(path=bundled_model(), name=NAME, sha256=None, entry=entry)


def _usable(kept: StoredModel, note: Callable[[str], None]) -> bool:
    """Whether a library file can be served; for a split model, only its first part can."""
    try:
        header = _header(kept.path)
    except ModelError as error:
        note(f"not serving {kept.name}: {error.message}")
        return False
    return header.split is None or header.split[0] == 0


def _header(path: Path) -> GgufHeader:
    header = read_header(path)
    if header.split is None or header.split[0] != 0:
        return header
    return join_parts([header, *(read_header(path.with_name(name)) for name in part_names(path.name)[1:])])


def _with_unique_names(found: Sequence[ServedModel]) -> list[ServedModel]:
    """
    Give every model a unique name: two quantisations of one model are named after their files, if needed with folders.

    Raises:
        SettingsError: A model is listed twice, or two have no distinct names.
    """
    named: dict[str, ServedModel] = {}
    paths = [model.path for model in found]
    repeated = next((path for path in paths if paths.count(path) > 1), None)
    if repeated is not None:
        raise SettingsError(f"{repeated.name} is listed twice", hint="list it once")
    for model, name in zip(found, _shortest_unique_names(found), strict=True):
        if name in named:
            raise SettingsError(
                f"{named[name].path} and {model.path} would both be named {name}", hint="rename one of the files"
            )
        named[name] = msgspec.structs.replace(model, name=name)
    return list(named.values())


def _shortest_unique_names(found: Sequence[ServedModel]) -> Iterator[str]:
    """Yield the shortest unique name of each model: its name, its file name, or the file name below its folders."""
    deepest = max((len(model.path.parts) for model in found), default=0)
    namings: list[Callable[[ServedModel], str]] = [lambda one: one.name]
    namings += [partial(_name_below_folders, folders=folders) for folders in range(deepest - 1)]
    for model in found:
        names = (naming(model) for naming in namings if [naming(other) for other in found].count(naming(model)) == 1)
        yield next(names, model.name)


def _name_below_folders(model: ServedModel, folders: int) -> str:
    path = model.path
    folders_above = path.parts[1:-1]
    return "/".join((*folders_above[max(0, len(folders_above) - folders) :], path.stem))
