"""Which of a machine's engines is used: what was chosen, else what was measured, else a fixed order.

Two builds of one program can differ by a factor of two, and which is faster on a
board is known only after measuring both there. So ``promptai engine compare`` leaves
its result here, and it counts until something that it rests on changes: the engine's
file or the processor. A person's word (``promptai engine use``) beats it, and a named
engine beats both.

The decisions are functions of plain values. Both files are written as a whole, in the
cache; a damaged one counts as none, for it can be made again.
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
        fingerprint: Of its file, to know it again.
        rounds: In the order in which they were played: the same place in two engines' lists is the same round.
    """

    name: str
    label: str
    fingerprint: str
    rounds: list[Round]


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """
    What ``promptai engine compare`` found.

    Attributes:
        created: UTC, ISO 8601.
        cpu: The processor that it was measured on, by ``processor_key``.
        engines: The fastest first; those that noise does not tell apart in the fixed order.
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
    An engine that was found, as far as choosing needs it.

    Attributes:
        named: Whether the settings, the environment or an option name it.
        works: Whether it started when it was looked at.
    """

    name: str
    fingerprint: str | None
    named: bool = False
    works: bool = True


class Place(NamedTuple):
    """Where an engine stands: its number in what was found, and why it stands there."""

    number: int
    reason: str


class _Choice(msgspec.Struct, frozen=True):
    engine: str


def arrange(found: Sequence[Candidate], *, chosen: str | None, comparison: Comparison | None, cpu: str) -> list[Place]:
    """
    Put engines in the order in which they are used. Pure.

    Named, then chosen, then the others in the order of ``found``, in which those that were compared with
    each other take each other's places; what does not start comes last, a named one excepted.

    Args:
        found: In the fixed order: named, built (the newest first), on PATH, embedded.
        chosen: The name that ``promptai engine use`` wrote.
        cpu: This machine's ``processor_key``.
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
    Names of the compared engines that are still what was measured, the fastest first. Pure.

    None of them on another processor, and none when only one is left: it was compared with nothing.
    """
    if comparison is None or comparison.cpu != cpu:
        return []
    here = {engine.name: engine.fingerprint for engine in found if engine.fingerprint is not None}
    names = [engine.name for engine in comparison.engines if here.get(engine.name) == engine.fingerprint]
    return names if len(names) > 1 else []


def processor_key(model_name: str, features: Sequence[str]) -> str:
    """What a processor is for a comparison: its name and what it can do."""
    return " ".join((model_name, *features))


def read_choice(engines: Path) -> str | None:
    """The engine that was chosen; ``None`` when the choice is left to us."""
    choice = _read(engines / _CHOICE, _Choice)
    return choice.engine if choice is not None else None


def write_choice(engines: Path, name: str | None) -> None:
    """Remember a choice; ``None`` forgets it. Raises OSError."""
    if name is None:
        (engines / _CHOICE).unlink(missing_ok=True)
    else:
        _write(engines / _CHOICE, msgspec.json.encode(_Choice(name)))


def read_comparison(engines: Path) -> Comparison | None:
    """The last comparison on this machine; ``None`` when there was none."""
    return _read(engines / _COMPARISON, Comparison)


def write_comparison(engines: Path, comparison: Comparison) -> None:
    """Keep a comparison. Raises OSError."""
    _write(engines / _COMPARISON, msgspec.json.format(msgspec.json.encode(comparison), indent=2) + b"\n")


def _rank(name: str, ranked: Sequence[str]) -> str:
    if name not in ranked:
        return "by the usual order"
    return "first in the comparison" if name == ranked[0] else "behind in the comparison"


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
