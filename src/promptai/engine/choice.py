"""Decide which engine of this machine is used: the chosen one, else the fastest measured, else a fixed order.

Two builds of one program can differ by a factor of two, and only a measurement on the board shows which is faster.
So ``promptai engine compare`` stores its result here. It is valid until an engine's file or the processor changes. The
user's choice (``promptai engine use``) takes precedence over it, and a named engine over both.

The decisions are functions of plain values. Both files lie in the cache and are replaced as a whole; a damaged file is
ignored, because it can be made again.
"""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from promptai.wire.malformed import MALFORMED

_CHOICE = "choice.json"
_COMPARISON = "comparison.json"
T = TypeVar("T")


class Round(msgspec.Struct, frozen=True):
    """One measurement of one engine, in tokens a second."""

    prefill_tps: float
    decode_tps: float


class MeasuredEngine(msgspec.Struct, frozen=True):
    """
    One engine of a comparison.

    Attributes:
        fingerprint: Identifies the engine's file.
        rounds: In the order of measurement: the same index in two engines' lists is the same round.
    """

    name: str
    label: str
    fingerprint: str
    rounds: list[Round]


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """
    The result of ``promptai engine compare``.

    Attributes:
        created: UTC, ISO 8601.
        cpu: ``processor_key`` of the processor.
        engines: Fastest first; engines whose difference is within the noise keep the fixed order.
    """

    created: str
    cpu: str
    threads: int
    model: str
    prompt_tokens: int
    generated_tokens: int
    engines: list[MeasuredEngine]


class Candidate(NamedTuple):
    """
    An engine that can be chosen.

    Attributes:
        named: Whether the settings, the environment or an option name it.
        works: Whether it started when it was probed.
    """

    name: str
    fingerprint: str | None
    named: bool = False
    works: bool = True


class Place(NamedTuple):
    """An engine's place in the order: its index among the candidates, and the reason."""

    number: int
    reason: str


class _Choice(msgspec.Struct, frozen=True):
    engine: str


def arrange(found: Sequence[Candidate], *, chosen: str | None, comparison: Comparison | None, cpu: str) -> list[Place]:
    """
    Return the engines in the order in which they are used. Pure.

    Named engines come first, then the chosen one, then the others in the order of ``found``, in which engines that were
    compared with each other swap places by speed. Engines that do not start come last, unless they are named.

    Args:
        found: In the fixed order: named, built (newest first), on PATH, embedded.
        chosen: The name that ``promptai engine use`` stored; ``None``: no choice.
        cpu: ``processor_key`` of this machine.
    """
    named = [i for i, engine in enumerate(found) if engine.named]
    works = [i for i, engine in enumerate(found) if engine.works and not engine.named]
    wanted = [i for i in works if found[i].name == chosen]
    rest = [i for i in works if i not in wanted]
    ranked = still_valid(comparison, cpu, [found[i] for i in rest])
    turns = iter([next(i for i in rest if found[i].name == name) for name in ranked])
    ordered = [next(turns) if found[i].name in ranked else i for i in rest]
    broken = [i for i, engine in enumerate(found) if not engine.works and not engine.named]
    return [
        *(Place(i, "named in the settings") for i in named),
        *(Place(i, "chosen with promptai engine use") for i in wanted),
        *(Place(i, _rank(found[i].name, ranked)) for i in ordered),
        *(Place(i, "does not start") for i in broken),
    ]


def still_valid(comparison: Comparison | None, cpu: str, found: Sequence[Candidate]) -> list[str]:
    """
    Return the names of the compared engines that have not changed since, fastest first. Pure.

    Empty on another processor, and when only one engine is left, because there is nothing to compare it with.
    """
    if comparison is None or comparison.cpu != cpu:
        return []
    here = {engine.name: engine.fingerprint for engine in found if engine.fingerprint is not None}
    names = [engine.name for engine in comparison.engines if here.get(engine.name) == engine.fingerprint]
    return names if len(names) > 1 else []


def processor_key(model_name: str, features: Sequence[str]) -> str:
    """Identify a processor for comparisons, by name and features."""
    return " ".join((model_name, *features))


def read_choice(engines: Path) -> str | None:
    """Return the name of the chosen engine; ``None``: no choice."""
    choice = _read(engines / _CHOICE, _Choice)
    return choice.engine if choice is not None else None


def write_choice(engines: Path, name: str | None) -> None:
    """Store the choice; ``None`` removes it. Raises ``OSError``."""
    if name is None:
        (engines / _CHOICE).unlink(missing_ok=True)
    else:
        _write(engines / _CHOICE, msgspec.json.encode(_Choice(name)))


def read_comparison(engines: Path) -> Comparison | None:
    """Return the last comparison on this machine; ``None``: there is none."""
    return _read(engines / _COMPARISON, Comparison)


def write_comparison(engines: Path, comparison: Comparison) -> None:
    """Store a comparison. Raises ``OSError``."""
    _write(engines / _COMPARISON, msgspec.json.format(msgspec.json.encode(comparison), indent=2) + b"\n")


def _rank(name: str, ranked: Sequence[str]) -> str:
    if name not in ranked:
        return "default order"
    return "fastest in the comparison" if name == ranked[0] else "slower in the comparison"


def _read(path: Path, kind: type[T]) -> T | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError:
        return None
    except MALFORMED:
        return None


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
