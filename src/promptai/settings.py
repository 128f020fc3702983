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
from typing import Literal

import msgspec

from promptai.errors import SettingsError
from promptai.wire.malformed import MALFORMED

CONFIG_NAME = "promptai.toml"


def _positive(section: str, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value > 0:  # NaN is not above 0 either
            raise ValueError(f"{section}.{name} must be above 0, not {value}")


class EngineSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """
    How engines are started.

    Attributes:
        path: A llama-server to use instead of looking for one; ``$PROMPTAI_ENGINE``.
        threads: CPU threads; absent: the physical cores that cpuset and CPU quota leave.
        context: Tokens of context of one slot; absent: what the workload needs, up to the model's own.
        slots: Conversations that one engine holds at once.
        batch: Most prompt tokens of one step.
        cache_type: Type of the KV cache's numbers: f16, or q8_0 for half the memory.
        cache_ram_mib: Prompt cache beside the KV cache, in MiB; 0 turns it off.
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


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """
    All settings.

    Attributes:
        engine: How engines are started.
        bench: How ``promptai bench`` measures.
        runs: Directory where runs are collected; ``$PROMPTAI_RUNS``.
        models: Directory where models are kept; absent: ``$XDG_DATA_HOME/promptai/models``; ``$PROMPTAI_MODELS``.
    """

    engine: EngineSettings = EngineSettings()
    bench: BenchSettings = BenchSettings()
    runs: str = "runs"
    models: str | None = None


class Secrets(msgspec.Struct, frozen=True):
    """What must not stand in a file or a command line: ``$PROMPTAI_API_KEY``, for servers that demand one."""

    api_key: str | None = None


def load_settings(config: Path | None = None, environ: Mapping[str, str] = os.environ) -> Settings:
    """
    Read the settings.

    Args:
        config: A file that must exist; ``None``: wherever one is found, if at all.

    Raises:
        SettingsError: The file cannot be read, has an unknown key or a value of the wrong kind.
    """
    named = config or (Path(environ["PROMPTAI_CONFIG"]) if environ.get("PROMPTAI_CONFIG") else None)
    path = named or Path(CONFIG_NAME)
    settings = _read(path) if named is not None or path.is_file() else Settings()
    if environ.get("PROMPTAI_ENGINE"):
        engine = msgspec.structs.replace(settings.engine, path=environ["PROMPTAI_ENGINE"])
        settings = msgspec.structs.replace(settings, engine=engine)
    if environ.get("PROMPTAI_RUNS"):
        settings = msgspec.structs.replace(settings, runs=environ["PROMPTAI_RUNS"])
    if environ.get("PROMPTAI_MODELS"):
        settings = msgspec.structs.replace(settings, models=environ["PROMPTAI_MODELS"])
    return settings


def load_secrets(environ: Mapping[str, str] = os.environ) -> Secrets:
    """Read the secrets, which come from the environment alone."""
    return Secrets(api_key=environ.get("PROMPTAI_API_KEY") or None)


def models_directory(settings: Settings, environ: Mapping[str, str] = os.environ) -> Path:
    """Where models are kept: as set, else ``$XDG_DATA_HOME/promptai/models``."""
    if settings.models is not None:
        return Path(settings.models).expanduser()
    base = environ.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "promptai" / "models"


def cache_directory(environ: Mapping[str, str] = os.environ) -> Path:
    """Where things that can be made again are kept: ``$XDG_CACHE_HOME/promptai``."""
    base = environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "promptai"


def _read(path: Path) -> Settings:
    try:
        return msgspec.toml.decode(path.read_bytes(), type=Settings)
    except OSError as error:
        raise SettingsError(f"settings {path} cannot be read: {error.strerror}", hint="check the path") from None
    except MALFORMED as error:
        raise SettingsError(f"settings {path}: {error}", hint=_suggest(str(error))) from None


def _suggest(error: str) -> str:
    unknown = re.search(r"unknown field `([^`]+)`(?: - at `\$\.?([^`]*)`)?", error)
    if unknown is None:
        return "see docs/reference/settings.md"
    sections: dict[str, type[msgspec.Struct]] = {"engine": EngineSettings, "bench": BenchSettings}
    section = sections.get(unknown[2] or "", Settings)
    names = [field.encode_name for field in msgspec.structs.fields(section)]
    near = difflib.get_close_matches(unknown[1], names, n=1)
    return f"did you mean {near[0]}?" if near else f"known here: {', '.join(names)}"
