"""Settings from ``promptai.toml`` and the environment; the only module that reads either.

If a misspelt key were silently ignored, a benchmark would measure something else. So unknown keys are rejected, and the
error suggests the closest known key. Every setting has a default, and the file is optional: ``--config``, else
``$PROMPTAI_CONFIG``, else ``./promptai.toml``. Options on the command line override the file.

The attribute lines of the docstrings are the reference: docs/reference/settings.md is generated from them.
"""

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from promptai.errors import SettingsError
from promptai.wire.malformed import MALFORMED

CONFIG_NAME = "promptai.toml"


def _positive(section: str, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value > 0:  # NaN is not above 0 either
            raise ValueError(f"{section}.{name} must be above 0, not {value}")


def _not_negative(section: str, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value >= 0:
            raise ValueError(f"{section}.{name} must be at least 0, not {value}")


class EngineSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """
    How engines are started.

    Attributes:
        path: Path of the llama-server to use; absent: the first one found; ``$PROMPTAI_ENGINE``.
        threads: CPU threads; absent: the physical cores within the cpuset and CPU quota of the process.
        context: Context of one slot in tokens, limited to that of the model; absent: as the workload needs, or 4096
            when serving.
        slots: Slots (concurrent conversations) per engine.
        batch: Maximum prompt tokens per step; serving uses fewer if a step would take longer than half a second.
        cache_type: Type of the KV cache: f16, or q8_0 for half the memory.
        cache_ram_mib: Prompt cache when measuring, in MiB, in addition to the KV cache; 0 turns it off.
        mmap: Map the model file into memory instead of reading it.
    """

    path: str | None = None
    threads: int | None = None
    context: int | None = None
    slots: int = 1
    batch: int = 512
    cache_type: Literal["f16", "bf16", "q8_0"] = "f16"
    cache_ram_mib: int = 0
    mmap: bool = True

    def __post_init__(self) -> None:
        _positive("engine", slots=self.slots, batch=self.batch, threads=self.threads, context=self.context)
        _not_negative("engine", cache_ram_mib=self.cache_ram_mib)  # llama-server takes -1 as "no limit"


class BenchSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """
    How ``promptai bench`` measures; the defaults are the paper's.

    Attributes:
        workload: edge-50, oasst1 or the path of a .jsonl file.
        max_tokens: Maximum generated tokens per answer.
        repeats: Number of times the workload runs.
        seed: Seed of the engine's sampler, the arrivals and the choice of conversations.
        timeout_s: Longest pause within an answer, in seconds.
    """

    workload: str = "edge-50"
    max_tokens: int = 500
    repeats: int = 1
    seed: int = 0
    timeout_s: float = 1800.0

    def __post_init__(self) -> None:
        _positive("bench", max_tokens=self.max_tokens, repeats=self.repeats, timeout_s=self.timeout_s)


class GatewaySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """
    How ``promptai serve`` handles requests.

    Attributes:
        host: Address to listen on; any address other than loopback requires API keys.
        port: Port to listen on; 0: any free port.
        strategy: How a request is assigned to a replica: affinity (least estimated seconds, caches included),
            least-busy or round-robin.
        queue: Maximum queued requests per model, in addition to those that have a slot.
        wait_s: Longest time in the queue, in seconds.
        outage_s: Longest time that an accepted request waits for a replica to return, in seconds.
        stall_s: Silence of an engine, beyond its expected computing time, after which it counts as dead, in seconds.
        attempts: Maximum number of times a request is sent to an engine before it fails.
        drain_s: Time for answers in progress to finish when the gateway stops, in seconds.
        ping_s: Interval of the comments that keep a waiting stream open, in seconds; 0: no comments, for clients that
            reject them.
        body_mib: Maximum size of a request body, in MiB.
        keys: File with the API keys; absent: ``$XDG_CONFIG_HOME/promptai/keys.json``; ``$PROMPTAI_KEYS``.
        hosts: Additional host names of a gateway on loopback, for example behind a proxy.
        cors_origins: Origins whose web pages may use the gateway, as ``https://host``; ``*``: all.
        default: Model of requests that name no model; absent: the only model, if there is just one.
        cache_ram_mib: Prompt cache per engine when serving, in MiB, for conversations that have left their slot;
            absent: a sixteenth of the memory, at most 1024; 0 turns it off.
        memory_mib: Memory that all engines of this machine may take together, in MiB; absent: the available memory
            less a tenth of the total.
    """

    host: str = "127.0.0.1"
    port: int = 8400
    strategy: Literal["affinity", "least-busy", "round-robin"] = "affinity"
    queue: int = 64
    wait_s: float = 600.0
    outage_s: float = 30.0
    stall_s: float = 15.0
    attempts: int = 4
    drain_s: float = 30.0
    ping_s: float = 5.0
    body_mib: int = 16
    keys: str | None = None
    hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    default: str | None = None
    cache_ram_mib: int | None = None
    memory_mib: int | None = None

    def __post_init__(self) -> None:
        _positive(
            "gateway",
            wait_s=self.wait_s,
            stall_s=self.stall_s,
            attempts=self.attempts,
            body_mib=self.body_mib,
            memory_mib=self.memory_mib,
        )
        _not_negative("gateway", queue=self.queue, outage_s=self.outage_s, drain_s=self.drain_s, ping_s=self.ping_s)
        _not_negative("gateway", cache_ram_mib=self.cache_ram_mib)
        if not 0 <= self.port <= 65535:
            raise ValueError(f"gateway.port must be between 0 and 65535, not {self.port}")


class FleetEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """
    A running llama-server, another PromptAI or another OpenAI-compatible server; one ``[[fleet]]`` each.

    Attributes:
        url: URL of the server, as ``http://pi-1:8080``.
        name: Name in responses and logs; absent: host and port.
        model: Model to use; absent: the one that the server reports.
        slots: Concurrent streams; absent: as the server reports, otherwise 1.
        prefill_tps: Expected prompt tokens per second; absent: learned from its answers.
        decode_tps: Expected generated tokens per second of a single stream; absent: learned from its answers.
        capability: Rank of the model for ``auto``, in billions of parameters; absent: as the server reports.
        api_key_env: Environment variable with its API key; the file never contains keys.
    """

    url: str
    name: str | None = None
    model: str | None = None
    slots: int | None = None
    prefill_tps: float | None = None
    decode_tps: float | None = None
    capability: float | None = None
    api_key_env: str | None = None

    def __post_init__(self) -> None:
        _positive(
            "fleet",
            slots=self.slots,
            prefill_tps=self.prefill_tps,
            decode_tps=self.decode_tps,
            capability=self.capability,
        )


class ServeEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """
    A model that this machine serves; one ``[[serve]]`` each.

    Attributes:
        model: A model of the library (its name or its name in the catalogue), or the path of a .gguf file.
        slots: Slots (concurrent conversations) of its engine; absent: as in ``[engine]``.
        context: Context of one slot in tokens; absent: as in ``[engine]``.
        pinned: Keep the model loaded; it is never evicted.
        preload: Load the model at the start if it fits; otherwise it loads on its first request.
        ttl_s: Idle time before the model is unloaded, in seconds; absent: until another model needs its memory.
        capability: Rank of the model for ``auto``; absent: its parameters in billions.
    """

    model: str
    slots: int | None = None
    context: int | None = None
    pinned: bool = False
    preload: bool = False
    ttl_s: float | None = None
    capability: float | None = None

    def __post_init__(self) -> None:
        _positive("serve", slots=self.slots, context=self.context, ttl_s=self.ttl_s, capability=self.capability)


class AliasEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """
    Another name of a model; one ``[aliases.NAME]`` each.

    Attributes:
        model: The model, another alias or ``auto``.
        params: Default fields of a request, such as ``temperature``.
    """

    model: str
    params: dict[str, Any] = {}


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """
    All settings.

    Attributes:
        engine: How engines are started.
        bench: How ``promptai bench`` measures.
        runs: Directory of the runs; ``$PROMPTAI_RUNS``.
        models: Library: the directory of the models; absent: ``$XDG_DATA_HOME/promptai/models``; ``$PROMPTAI_MODELS``.
        gateway: How ``promptai serve`` handles requests.
        fleet: Servers that PromptAI does not start.
        serve: Models of this machine.
        aliases: Other names of models.
        fallbacks: Model name -> model that takes the prompts that exceed its context.
    """

    engine: EngineSettings = EngineSettings()
    bench: BenchSettings = BenchSettings()
    runs: str = "runs"
    models: str | None = None
    gateway: GatewaySettings = GatewaySettings()
    fleet: tuple[FleetEntry, ...] = ()
    serve: tuple[ServeEntry, ...] = ()
    aliases: dict[str, AliasEntry] = {}
    fallbacks: dict[str, str] = {}


#: Sections by their name in the file.
SECTIONS: dict[str, type[msgspec.Struct]] = {
    "engine": EngineSettings,
    "bench": BenchSettings,
    "gateway": GatewaySettings,
    "fleet": FleetEntry,
    "serve": ServeEntry,
    "aliases": AliasEntry,
}


class Secrets(msgspec.Struct, frozen=True):
    """Secrets, which never belong in a file or on a command line: ``$PROMPTAI_API_KEY`` for servers that require it."""

    api_key: str | None = None


def load_settings(
    config: Path | None = None, environ: Mapping[str, str] = os.environ, *, refuse_empty: bool = False
) -> Settings:
    """
    Read the settings.

    Args:
        config: A file that must exist; ``None``: search for one.
        refuse_empty: Reject an empty file: on a reload, it may be the result of a full disk or of an editor that is
            still writing.

    Raises:
        SettingsError: The file cannot be read, has an unknown key or an invalid value, or is empty.
    """
    path = settings_file(config, environ)
    settings = _read(path, refuse_empty=refuse_empty) if path is not None else Settings()
    if environ.get("PROMPTAI_ENGINE"):
        engine = msgspec.structs.replace(settings.engine, path=environ["PROMPTAI_ENGINE"])
        settings = msgspec.structs.replace(settings, engine=engine)
    if environ.get("PROMPTAI_RUNS"):
        settings = msgspec.structs.replace(settings, runs=environ["PROMPTAI_RUNS"])
    if environ.get("PROMPTAI_MODELS"):
        settings = msgspec.structs.replace(settings, models=environ["PROMPTAI_MODELS"])
    return settings


def settings_file(config: Path | None = None, environ: Mapping[str, str] = os.environ) -> Path | None:
    """Return the file that ``load_settings`` reads; ``None`` if there is none."""
    if config is not None:
        return config
    if environ.get("PROMPTAI_CONFIG"):
        return Path(environ["PROMPTAI_CONFIG"])
    return Path(CONFIG_NAME) if Path(CONFIG_NAME).is_file() else None


def is_empty(path: Path | None) -> bool:
    """Whether a settings file has no content, not even a comment; a missing file counts as empty."""
    try:
        # A pipe can be read only once.
        return path is None or not path.is_file() or not path.read_bytes().strip()
    except OSError:
        return True


def load_secrets(environ: Mapping[str, str] = os.environ) -> Secrets:
    """Read the secrets from the environment."""
    return Secrets(api_key=environ.get("PROMPTAI_API_KEY") or None)


def board_key(entry: FleetEntry, environ: Mapping[str, str] = os.environ) -> str | None:
    """
    Return the API key of a server of the fleet; ``None`` if it needs no key.

    Raises:
        SettingsError: The environment variable with the key is not set.
    """
    if entry.api_key_env is None:
        return None
    key = environ.get(entry.api_key_env)
    if not key:
        raise SettingsError(
            f"${entry.api_key_env}, the API key of {entry.name or entry.url}, is not set",
            hint="set it in the environment of the gateway, or remove api_key_env",
        )
    return key


def models_directory(settings: Settings, environ: Mapping[str, str] = os.environ) -> Path:
    """Return the directory of the models: as set, else ``$XDG_DATA_HOME/promptai/models``."""
    if settings.models is not None:
        return Path(settings.models).expanduser()
    base = environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "promptai" / "models"


def keys_path(environ: Mapping[str, str] = os.environ, settings: Settings | None = None) -> Path:
    """Return the file of the API keys: ``$PROMPTAI_KEYS``, as set, else ``$XDG_CONFIG_HOME/promptai/keys.json``."""
    named = environ.get("PROMPTAI_KEYS") or (settings.gateway.keys if settings is not None else None)
    if named:
        return Path(named).expanduser()
    base = environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "promptai" / "keys.json"


def cache_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the directory of files that can be recreated: ``$XDG_CACHE_HOME/promptai``."""
    base = environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "promptai"


def _read(path: Path, *, refuse_empty: bool) -> Settings:
    try:
        text = path.read_bytes()
        if refuse_empty and not text.strip():
            raise SettingsError(f"settings {path} is empty", hint="to use no settings, write a comment such as # none")
        return msgspec.toml.decode(text, type=Settings)
    except OSError as error:
        raise SettingsError(f"settings {path} cannot be read: {error.strerror}", hint="check the path") from None
    except MALFORMED as error:
        raise SettingsError(f"settings {path}: {error}", hint=_suggest(str(error))) from None


def _suggest(error: str) -> str:
    unknown = re.search(r"unknown field `([^`]+)`(?: - at `\$\.?([a-z]*)[^`]*`)?", error)
    if unknown is None:
        return "see docs/reference/settings.md"
    section = SECTIONS.get(unknown[2] or "", Settings)
    names = [field.encode_name for field in msgspec.structs.fields(section)]
    near = difflib.get_close_matches(unknown[1], names, n=1)
    return f"did you mean {near[0]}?" if near else f"known keys: {', '.join(names)}"
