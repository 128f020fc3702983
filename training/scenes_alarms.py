"""Scenes of alarms: some questions need the facts, some the meaning of the codes, some both.

The meaning of a code is never stated beside the question: the model must have learned the table.
"""

from __future__ import annotations

import random

from vocabulary import ALARMS, METRICS, SITES
from world import Scene, cap


def alarms(rng: random.Random) -> Scene:
    """Alarms at sites; the questions need the facts and the meaning of the codes."""
    n = rng.choice((1, 2, 2, 3))
    sites, chosen = rng.sample(SITES, n), rng.sample(ALARMS, n)
    by_site = rng.random() < 0.7
    shape = rng.choice(("{s} reports {c}.", "{s} has {c}.", "{s} shows alarm {c}.")) if by_site else "{c} is at {s}."
    scene = Scene([shape.format(s=s, c=a.code) for s, a in zip(sites, chosen, strict=True)])
    for s, a in zip(sites, chosen, strict=True):
        key = (s, a.code, n)
        if not by_site:
            scene.ask(rng, "alarm_site", (f"Where is {a.code}?", f"Which site has {a.code}?"), s, key)
            continue
        scene.ask(rng, "which_alarm", (f"Which alarm is at {s}?", f"What is the alarm at {s}?"), a.code, key)
        scene.ask(rng, "action", (f"What should I do at {s}?", f"How do I fix {s}?"), f"{a.action}.", key)
        scene.ask(rng, "effect", (f"What happens next at {s}?", f"What follows at {s}?"), f"{a.effect}.", key)
        severity = (f"How severe is the alarm at {s}?", f"What is the severity at {s}?")
        scene.ask(rng, "severity", severity, cap(a.severity), key)
    return scene


def knowledge(rng: random.Random) -> Scene:
    """Questions on the alarm table alone, without facts."""
    scene = Scene([])
    a, m = rng.choice(ALARMS), rng.choice(METRICS)
    meaning = (
        f"What does {a.code} mean?",
        f"What is {a.code}?",
        f"Explain {a.code} briefly.",
        f"What does the code {a.code} stand for?",
        f"Meaning of {a.code}?",
        f"What is the meaning of {a.code}?",
        f"Tell me what {a.code} means.",
        f"What does alarm {a.code} say?",
    )
    scene.ask(rng, "meaning", meaning, f"{cap(a.meaning)}.", (a.code,))
    code = (
        f"Which code means {a.meaning}?",
        f"What is the code for {a.meaning}?",
        f"Code for {a.meaning}?",
        f"Which alarm stands for {a.meaning}?",
        f"Name the alarm for {a.meaning}.",
        f"Which alarm means {a.meaning}?",
    )
    scene.ask(rng, "code", code, a.code, (a.code,))
    unit = (
        f"Which unit does {m.name} have?",
        f"What is the unit of {m.name}?",
        f"In which unit is {m.name} measured?",
        f"Unit of {m.name}?",
        f"Which unit is used for {m.name}?",
        f"How is {m.name} measured?",
        f"Name the unit of {m.name}.",
        f"Give the unit for {m.name}.",
    )
    scene.ask(rng, "unit", unit, m.unit, (m.name,))
    remedy = (
        f"What should I do about {a.code}?",
        f"What is the remedy for {a.code}?",
        f"How do I handle {a.code}?",
        f"What helps against {a.code}?",
        f"Next step for {a.code}?",
        f"What must be done after {a.code}?",
        f"How do I fix {a.meaning}?",
        f"What helps against {a.meaning}?",
    )
    scene.ask(rng, "remedy", remedy, f"{a.action}.", (a.code,))
    part = (
        f"Which part is behind {a.code}?",
        f"Which part do I look at for {a.code}?",
        f"Part behind {a.code}?",
    )
    scene.ask(rng, "part", part, f"The {a.part}.", (a.code,))
    return scene
