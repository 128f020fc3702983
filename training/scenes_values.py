"""Scenes of measured values: readings against a limit, a value then and now, a duty with a threshold.

Values differ by at least four, so that each comparison has one clear answer. Questions end with the name they
ask about, which a very small model finds more easily than a name in the middle.
"""

from __future__ import annotations

import random

from vocabulary import METRICS, PEOPLE, SITES
from world import Scene, spread


def readings(rng: random.Random) -> Scene:
    """Values of one metric at up to three sites, with a limit."""
    m = rng.choice(METRICS)
    sites = rng.sample(SITES, rng.choice((1, 2, 2, 3)))
    limit, *values = spread(rng, len(sites) + 1)
    shape = rng.choice(("The {m} at {s} is {v} {u}.", "At {s} the {m} is {v} {u}.", "{s} has {m} {v} {u}."))
    facts = [shape.format(m=m.name, s=s, v=v, u=m.unit) for s, v in zip(sites, values, strict=True)]
    with_limit = rng.random() < 0.7
    if with_limit:
        facts.append(rng.choice((f"The limit is {limit} {m.unit}.", f"The {m.name} limit is {limit} {m.unit}.")))
    scene = Scene(facts)
    for s, v in zip(sites, values, strict=True):
        values_asked = (
            f"What is the {m.name} at {s}?",
            f"How high is the {m.name} at {s}?",
            f"Give the {m.name} at {s}.",
        )
        scene.ask(rng, "value", values_asked, f"{v} {m.unit}", (m.name, s, v))
        if with_limit:
            compared = (m.name, s, v, limit)
            over = (f"Is the {m.name} too high at {s}?", f"Is the limit broken at {s}?")
            scene.ask(rng, "over", over, "Yes" if v > limit else "No", compared)
            under = (f"Is the {m.name} fine at {s}?", f"Is the limit kept at {s}?")
            scene.ask(rng, "under", under, "Yes" if v < limit else "No", compared)
    if with_limit:
        scene.ask(
            rng, "limit", ("What is the limit?", "Which limit is set?"), f"{limit} {m.unit}", (m.name, limit, *sites)
        )
    return scene


def changes(rng: random.Random) -> Scene:
    """A value then and now."""
    m, s = rng.choice(METRICS), rng.choice(SITES)
    before, now = spread(rng, 2)
    facts = [f"The {m.name} at {s} was {before} {m.unit}.", f"Now it is {now} {m.unit}."]
    scene = Scene(facts, ordered=True)
    key = (m.name, s, before, now)
    scene.ask(rng, "trend", ("Did it rise or fall?",), "It rose." if now > before else "It fell.", key)
    scene.ask(rng, "now", ("What is it now?", f"What is the {m.name} now?"), f"{now} {m.unit}", key)
    scene.ask(rng, "before", ("What was it before?", f"What was the {m.name} before?"), f"{before} {m.unit}", key)
    return scene


def duty(rng: random.Random) -> Scene:
    """A role given in the system prompt."""
    s, other = rng.sample(SITES, 2)
    limit, value = spread(rng, 2)
    p = rng.choice(PEOPLE)
    scene = Scene([f"You watch {s} for {p}.", f"Raise an alarm above {limit} C."], ordered=True)
    key = (s, p, limit)
    scene.ask(rng, "duty_site", ("Which site do you watch?", "What do you watch?"), s, key)
    scene.ask(rng, "duty_person", ("Who do you work for?", "Whom do you help?"), p, key)
    alarm = (f"{s} is at {value} C. Do you raise an alarm?", f"Now {s} has {value} C. Is that an alarm?")
    scene.ask(rng, "duty_alarm", alarm, "Yes" if value > limit else "No", (*key, value))
    asked = rng.choice((s, other))
    mine = (f"Do you watch {asked}?", f"Is your site {asked}?")
    scene.ask(rng, "duty_mine", mine, "Yes" if asked == s else "No", (*key, asked))
    return scene
