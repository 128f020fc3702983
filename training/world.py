"""Scenes: facts in plain sentences, questions that the facts answer, and the rule of the split.

The key of a question names its whole combination (entities, values, wording); `held_out` keeps
one key in eight out of training, so that a held-out question can be answered only by reading its facts or
by knowing the world, never by recall.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from dataclasses import dataclass, field

HOLD_OUT_ONE_IN = 8


@dataclass(frozen=True)
class Question:
    """One question, its only right answer, and the key that decides the split."""

    kind: str
    text: str
    answer: str
    key: str


@dataclass
class Scene:
    """Facts, in any order unless `ordered`, and questions about them."""

    facts: list[str]
    questions: list[Question] = field(default_factory=list)
    ordered: bool = False

    def ask(
        self, rng: random.Random, kind: str, wordings: tuple[str, ...], answer: str, key: tuple[object, ...]
    ) -> None:
        """Add one question in a random wording."""
        which = rng.randrange(len(wordings))
        parts = "|".join(str(part) for part in (kind, which, *key))
        self.questions.append(Question(kind, wordings[which], answer, parts))


def held_out(key: str) -> bool:
    """True for one key in eight, by the first bytes of its SHA-256."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") % HOLD_OUT_ONE_IN == 0


def spread(rng: random.Random, n: int, gap: int = 4, low: int = 10, high: int = 99) -> list[int]:
    """`n` numbers that differ by at least `gap`, in random order."""
    while True:
        values = rng.sample(range(low, high + 1), n)
        ordered = sorted(values)
        if all(b - a >= gap for a, b in itertools.pairwise(ordered)):
            return values


def cap(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[0].upper() + text[1:]
