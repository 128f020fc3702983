"""All scenes with their weights, which decide how often each is drawn."""

from __future__ import annotations

import random
from collections.abc import Callable

from scenes_alarms import alarms, knowledge
from scenes_things import links, people, places, pronouns, sequence
from scenes_values import changes, duty, readings
from world import Scene

SCENES: tuple[tuple[Callable[[random.Random], Scene], int], ...] = (
    (readings, 8),
    (places, 4),
    (alarms, 5),
    (knowledge, 3),
    (links, 4),
    (pronouns, 3),
    (people, 3),
    (changes, 2),
    (sequence, 2),
    (duty, 2),
)
LOOKUPS = (places, people, readings, links, alarms)
LOOKUP_KINDS = frozenset(
    (
        "where",
        "which_cell",
        "who",
        "whereto",
        "when",
        "value",
        "which_link",
        "joins",
        "link_state",
        "which_alarm",
        "alarm_site",
    )
)
