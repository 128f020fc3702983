"""Scenes of alarms: some ask what the facts say, some what the codes mean, some both at once.

What a code means is never stated beside the question: the model has to have learned the table.
"""

from __future__ import annotations

import random

from vocabulary import ALARMS, METRICS, SITES, Alarm
from world import Scene, article, cap


def alarms(rng: random.Random) -> Scene:
    """Alarms at sites; the questions need the facts and what the codes mean."""
    n = rng.choice((1, 2, 2, 3))
    sites, chosen = rng.sample(SITES, n), rng.sample(ALARMS, n)
    shape = rng.choice(("{s} reports {c}.", "{s} has alarm {c}.", "Alarm {c} is active at {s}.", "We see {c} at {s}."))
    facts = [shape.format(s=s, c=a.code) for s, a in zip(sites, chosen, strict=True)]
    scene = Scene(facts)
    for s, a in zip(sites, chosen, strict=True):
        key = (s, a.code)
        scene.ask(
            rng,
            "which_alarm",
            (f"Which alarm does {s} have?", f"What is the alarm at {s}?", f"What does {s} report?"),
            a.code,
            (*key, n),
        )
        scene.ask(
            rng,
            "alarm_site",
            (f"Which site has alarm {a.code}?", f"Where is {a.code} active?", f"Which site reports {a.code}?"),
            s,
            (*key, n),
        )
        scene.ask(
            rng,
            "problem",
            (f"Which site has {article(a.meaning)}?", f"Where do we have {article(a.meaning)}?"),
            s,
            (*key, n),
        )
        scene.ask(
            rng,
            "action",
            (
                f"What should I do at {s}?",
                f"What must be done at {s}?",
                f"Give the next step for {s}.",
                f"How do I fix {s}?",
            ),
            f"{a.action}.",
            (*key, n),
        )
        scene.ask(
            rng,
            "effect",
            (f"What happens next at {s}?", f"What follows if nobody helps {s}?"),
            f"{a.effect}.",
            (*key, n),
        )
        scene.ask(
            rng,
            "severity",
            (f"How severe is the alarm at {s}?", f"What is the severity at {s}?"),
            cap(a.severity),
            (*key, n),
        )
    return scene


def knowledge(rng: random.Random) -> Scene:
    """Questions on the alarm table alone, without facts."""
    scene = Scene([])
    a, m = rng.choice(ALARMS), rng.choice(METRICS)
    scene.ask(
        rng,
        "meaning",
        (
            f"What does {a.code} mean?",
            f"What is {a.code}?",
            f"Explain {a.code} briefly.",
            f"What does the code {a.code} stand for?",
            f"Meaning of {a.code}?",
            f"What is the meaning of alarm {a.code}?",
            f"Tell me what {a.code} means.",
            f"What does alarm {a.code} say?",
        ),
        f"{cap(a.meaning)}.",
        (a.code,),
    )
    scene.ask(
        rng,
        "code",
        (
            f"Which code means {a.meaning}?",
            f"What is the code for {a.meaning}?",
            f"Code for {a.meaning}?",
            f"Which alarm stands for {a.meaning}?",
            f"Name the alarm for {a.meaning}.",
            f"Which alarm means {a.meaning}?",
        ),
        a.code,
        (a.code,),
    )
    scene.ask(
        rng,
        "unit",
        (
            f"Which unit does {m.name} have?",
            f"What is the unit of {m.name}?",
            f"In which unit is {m.name} measured?",
            f"Unit of {m.name}?",
            f"Which unit is used for {m.name}?",
            f"How is {m.name} measured?",
            f"Name the unit of {m.name}.",
            f"Give the unit for {m.name}.",
        ),
        m.unit,
        (m.name,),
    )
    remedies(scene, rng, a)
    return scene


def remedies(scene: Scene, rng: random.Random, a: Alarm) -> None:
    """Questions on what to do about an alarm, and where."""
    scene.ask(
        rng,
        "remedy",
        (
            f"What should I do about {a.code}?",
            f"What is the remedy for {a.code}?",
            f"How do I handle {a.code}?",
            f"What helps against {a.code}?",
            f"Next step for {a.code}?",
            f"What must be done after {a.code}?",
            f"How do I fix {a.meaning}?",
            f"What helps against {a.meaning}?",
        ),
        f"{a.action}.",
        (a.code,),
    )
    scene.ask(
        rng,
        "part",
        (
            f"Which part does {a.code} concern?",
            f"Which part is behind {a.code}?",
            f"Which part do I look at for {a.code}?",
            f"Part behind {a.code}?",
        ),
        f"The {a.part}.",
        (a.code,),
    )
