"""Scenes of measured values: readings against a limit, a value then and now, a duty with a threshold.

Values differ by at least four, so that each comparison has one clear answer.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from vocabulary import METRICS, NUMBER_WORDS, PEOPLE, SITES, Metric
from world import Scene, spread


@dataclass(frozen=True)
class Figures:
    """One metric's values at some sites, and its limit."""

    metric: Metric
    sites: list[str]
    values: list[int]
    limit: int


def readings(rng: random.Random) -> Scene:
    """Values of one metric at two or three sites, with a limit."""
    m = rng.choice(METRICS)
    n = rng.choice((1, 2, 2, 3))
    sites = rng.sample(SITES, n)
    limit, *values = spread(rng, n + 1)
    shape = rng.choice(
        (
            "The {m} at {s} is {v} {u}.",
            "{s} has a {m} of {v} {u}.",
            "At {s} the {m} is {v} {u}.",
        )
    )
    facts = [shape.format(m=m.name, s=s, v=v, u=m.unit) for s, v in zip(sites, values, strict=True)]
    with_limit = rng.random() < 0.7
    if with_limit:
        facts.append(
            rng.choice(
                (
                    f"The limit for {m.name} is {limit} {m.unit}.",
                    f"The {m.name} limit is {limit} {m.unit}.",
                    f"{m.name.capitalize()} must stay under {limit} {m.unit}.",
                )
            )
        )
    scene = Scene(facts)
    for s, v in zip(sites, values, strict=True):
        scene.ask(
            rng,
            "value",
            (
                f"What is the {m.name} at {s}?",
                f"How high is the {m.name} at {s}?",
                f"Give the {m.name} of {s}.",
                f"Which {m.name} does {s} have?",
            ),
            f"{v} {m.unit}",
            (m.name, s, v),
        )
    figures = Figures(m, sites, values, limit)
    if n > 1:
        compare_sites(scene, rng, figures)
    if with_limit:
        compare_limit(scene, rng, figures)
    return scene


def compare_sites(scene: Scene, rng: random.Random, figures: Figures) -> None:
    """Questions on the largest and the smallest value."""
    name, most, least = figures.metric.name, figures.metric.most, figures.metric.least
    sites, values = figures.sites, figures.values
    top, low = sites[values.index(max(values))], sites[values.index(min(values))]
    key = (name, *sites, *values)
    scene.ask(
        rng,
        "highest",
        (
            f"Which site has the highest {name}?",
            f"Where is the {name} highest?",
            f"Which site is the {most}?",
        ),
        top,
        key,
    )
    scene.ask(
        rng,
        "lowest",
        (f"Which site has the lowest {name}?", f"Where is the {name} lowest?", f"Which site is the {least}?"),
        low,
        key,
    )


def compare_limit(scene: Scene, rng: random.Random, figures: Figures) -> None:
    """Questions that hold a value against the limit."""
    name, unit = figures.metric.name, figures.metric.unit
    sites, values, limit = figures.sites, figures.values, figures.limit
    over = [a for a, b in zip(sites, values, strict=True) if b > limit]
    scene.ask(
        rng,
        "limit",
        (f"What is the limit for {name}?", f"Which limit does {name} have?", f"How much {name} is allowed?"),
        f"{limit} {unit}",
        (name, limit, *sites),
    )
    for s, v in zip(sites, values, strict=True):
        scene.ask(
            rng,
            "over",
            (
                f"Is {s} over the limit?",
                f"Is the {name} at {s} too high?",
                f"Does {s} break the {name} limit?",
                f"Is {s} above the limit?",
            ),
            "Yes" if v > limit else "No",
            (name, s, v, limit),
        )
        scene.ask(
            rng,
            "under",
            (f"Is {s} within the limit?", f"Is the {name} at {s} fine?", f"Does {s} keep the {name} limit?"),
            "Yes" if v < limit else "No",
            (name, s, v, limit),
        )
    if len(over) == 1 and len(sites) > 1:
        scene.ask(
            rng,
            "which_over",
            (
                "Which site is over the limit?",
                f"Where is the {name} too high?",
                "Which site breaks the limit?",
            ),
            over[0],
            (name, *sites, *values, limit),
        )
    scene.ask(
        rng,
        "count_over",
        ("How many sites are over the limit?", "How many sites break the limit?"),
        NUMBER_WORDS[len(over)],
        (name, *sites, *values, limit),
    )


def changes(rng: random.Random) -> Scene:
    """A value then and now."""
    m, s = rng.choice(METRICS), rng.choice(SITES)
    before, now = spread(rng, 2)
    first = rng.choice(
        (f"The {m.name} at {s} was {before} {m.unit}.", f"Before, {s} had {m.name} of {before} {m.unit}.")
    )
    second = rng.choice((f"Now it is {now} {m.unit}.", f"It is {now} {m.unit} now."))
    scene = Scene([first, second], ordered=True)
    key = (m.name, s, before, now)
    scene.ask(
        rng,
        "trend",
        ("Did it rise or fall?", f"Did the {m.name} rise or fall?"),
        "It rose." if now > before else "It fell.",
        key,
    )
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
    scene.ask(
        rng,
        "duty_alarm",
        (f"{s} is at {value} C. Do you raise an alarm?", f"Now {s} has {value} C. Is that an alarm?"),
        "Yes" if value > limit else "No",
        (*key, value),
    )
    asked = rng.choice((s, other))
    scene.ask(
        rng,
        "duty_mine",
        (f"Do you watch {asked}?", f"Is {asked} yours?"),
        "Yes" if asked == s else "No",
        (*key, asked),
    )
    return scene
