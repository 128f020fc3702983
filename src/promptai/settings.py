"""Settings from ``promptai.toml`` and the environment; the only module that reads either.

A misspelt key that is silently ignored is a benchmark that measured something
else. So unknown keys are refused, with the nearest known one. Everything has a
default; the file is optional. Looked for: ``--config``, else ``$PROMPTAI_CONFIG``,
else ``./promptai.toml``. An option on the command line beats the file.

Every field's docstring line is its documentation: docs/reference/settings.md is
generated from here.
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
            raise ValueError(f"{section}.{name} must not be below 0, but is {value}")


class EngineSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """
    How engines are started.

    Attributes:
        path: A llama-server to use instead of looking for one; ``$PROMPTAI_ENGINE``.
        threads: CPU threads; absent: the physical cores that cpuset and CPU quota leave.
        context: Tokens of context of one slot; absent: what the workload needs, or 4096 when serving; the model's own
            at most.
        slots: Conversations that one engine holds at once.
        batch: Most prompt tokens of one step; serving takes fewer where that many take longer than half a second.
        cache_type: Type of the KV cache's numbers: f16, or q8_0 for half the memory.
        cache_ram_mib: Prompt cache beside the KV cache when measuring, in MiB; 0 turns it off.
        mmap: Map the model file instead of reading it.
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
        max_tokens: Cap of generated tokens an answer.
        repeats: Times the workload is played.
        seed: For the engine's sampler, arrivals and the choice of conversations.
        timeout_s: Longest silence in the middle of an answer, in seconds.
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
    How ``promptai serve`` takes requests.

    Attributes:
        host: Address to listen at; one that is not loopback demands API keys.
        port: Port to listen at; 0 takes a free one.
        strategy: How a replica is chosen: affinity (by estimated seconds, caches included), least-busy or round-robin.
        queue: Requests for one model that may wait, beside those that have a slot.
        wait_s: The longest that one waits, in seconds.
        outage_s: The longest that an accepted one waits for a replica to come back, in seconds.
        stall_s: Silence of an engine beyond what computing explains, after which it counts as dead, in seconds.
        attempts: How often one request may be sent to an engine before it fails.
        drain_s: How long answers that are under way may go on when the gateway ends, in seconds.
        ping_s: Between comments that keep a waiting stream open, in seconds; 0: none, for clients that choke on them.
        body_mib: Largest body of a request, in MiB.
        keys: File of the API keys; absent: ``$XDG_CONFIG_HOME/promptai/keys.json``; ``$PROMPTAI_KEYS``.
        hosts: Further names under which a gateway on loopback may be called, behind a proxy for instance.
        cors_origins: Origins whose pages may use it, as ``https://host``; ``*``: all.
        default: The model of requests that name none; absent: the only one, if there is just one.
        cache_ram_mib: Prompt cache of each engine that is started for serving, in MiB, where conversations go that
            leave their slot; absent: a sixteenth of the memory, at most 1024; 0 turns it off.
        memory_mib: What all engines of this machine together may take, in MiB; absent: what is available, less a
            tenth of the memory.
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
    A running llama-server, another PromptAI, or another OpenAI-compatible server; one ``[[fleet]]`` each.

    Attributes:
        url: Where it is, as ``http://pi-1:8080``.
        name: What it is called in answers and logs; absent: host and port.
        model: The model that it is asked for; absent: the one that it says it serves.
        slots: Streams at once; absent: as it says, 1 where it does not.
        prefill_tps: Prompt tokens a second that are expected of it; absent: learned from what it does.
        decode_tps: Generated tokens a second of one stream that are expected of it; absent: learned.
        capability: What ``auto`` orders models by, in billions of parameters; absent: as it says.
        api_key_env: Name of the environment variable that holds its API key; keys never stand in the file.
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
    A model that this machine serves itself; one ``[[serve]]`` each.

    Attributes:
        model: A model of the library, by its name or its name in the catalogue, or the path of a .gguf file.
        slots: Conversations that its engine holds at once; absent: as in ``[engine]``.
        context: Tokens of context of one slot; absent: as in ``[engine]``.
        pinned: It is always loaded and makes room for no other.
        preload: It is loaded at the start if there is room; otherwise when it is asked for.
        ttl_s: How long it stays loaded without being used, in seconds; absent: until another needs the room.
        capability: What ``auto`` orders models by; absent: its parameters in billions.
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
    Another name of a model; ``[aliases.NAME]`` each.

    Attributes:
        model: The model that is meant, another alias, or ``auto``.
        params: Fields of a request, such as ``temperature``, for those that do not set them.
    """

    model: str
    params: dict[str, Any] = {}


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """
    All settings.

    Attributes:
        engine: How engines are started.
        bench: How ``promptai bench`` measures.
        runs: Directory where runs are collected; ``$PROMPTAI_RUNS``.
        models: Directory where models are kept; absent: ``$XDG_DATA_HOME/promptai/models``; ``$PROMPTAI_MODELS``.
        gateway: How ``promptai serve`` takes requests.
        fleet: Engines that somebody else starts and stops.
        serve: Models of this machine.
        aliases: Other names of models.
        fallbacks: For prompts that a model cannot hold: the model that takes them, by the name of the first.
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


#: Sections by the word that they begin with in the file.
SECTIONS: dict[str, type[msgspec.Struct]] = {
    "engine": EngineSettings,
    "bench": BenchSettings,
    "gateway": GatewaySettings,
    "fleet": FleetEntry,
    "serve": ServeEntry,
    "aliases": AliasEntry,
}


class Secrets(msgspec.Struct, frozen=True):
    """What must not stand in a file or a command line: ``$PROMPTAI_API_KEY``, for servers that demand one."""

    api_key: str | None = None


def load_settings(
    config: Path | None = None, environ: Mapping[str, str] = os.environ, *, refuse_empty: bool = False
) -> Settings:
    """
    Read the settings.

    Args:
        config: A file that must exist; ``None``: wherever one is found, if at all.
        refuse_empty: A file without a word is an error: it had some before, and a full disk or an editor that is
            just writing it leaves none.

    Raises:
        SettingsError: The file cannot be read, has an unknown key or a value of the wrong kind, or is empty.
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
    """The file that ``load_settings`` reads; ``None``: there is none, and none was named."""
    if config is not None:
        return config
    if environ.get("PROMPTAI_CONFIG"):
        return Path(environ["PROMPTAI_CONFIG"])
    return Path(CONFIG_NAME) if Path(CONFIG_NAME).is_file() else None


def is_empty(path: Path | None) -> bool:
    """Whether a file of settings holds nothing, not even a comment; one that is not there holds nothing either."""
    try:
        # A pipe can be read only once.
        return path is None or not path.is_file() or not path.read_bytes().strip()
    except OSError:
        return True


def load_secrets(environ: Mapping[str, str] = os.environ) -> Secrets:
    """Read the secrets, which come from the environment alone."""
    return Secrets(api_key=environ.get("PROMPTAI_API_KEY") or None)


def board_key(entry: FleetEntry, environ: Mapping[str, str] = os.environ) -> str | None:
    """
    The API key of a server of the fleet.

    Raises:
        SettingsError: The variable that should hold it is not set.
    """
    if entry.api_key_env is None:
        return None
    key = environ.get(entry.api_key_env)
    if not key:
        raise SettingsError(
            f"the API key of {entry.name or entry.url} should be in ${entry.api_key_env}, which is not set",
            hint="set it where the gateway is started, or leave out api_key_env",
        )
    return key


def models_directory(settings: Settings, environ: Mapping[str, str] = os.environ) -> Path:
    """Where models are kept: as set, else ``$XDG_DATA_HOME/promptai/models``."""
    if settings.models is not None:
        return Path(settings.models).expanduser()
    base = environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "promptai" / "models"


def keys_path(environ: Mapping[str, str] = os.environ, settings: Settings | None = None) -> Path:
    """The file with the API keys: ``$PROMPTAI_KEYS``, as set, else ``$XDG_CONFIG_HOME/promptai/keys.json``."""
    named = environ.get("PROMPTAI_KEYS") or (settings.gateway.keys if settings is not None else None)
    if named:
        return Path(named).expanduser()
    base = environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "promptai" / "keys.json"


def cache_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """Where things that can be made again are kept: ``$XDG_CACHE_HOME/promptai``."""
    base = environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "promptai"


def _read(path: Path, *, refuse_empty: bool) -> Settings:
    try:
        text = path.read_bytes()
        if refuse_empty and not text.strip():
            raise SettingsError(f"settings {path} is empty", hint="for no settings at all write a comment: # none")
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
    return f"did you mean {near[0]}?" if near else f"known here: {', '.join(names)}"
