"""Scenes of things and people: places, links, visits and the order of events.

Every answer is a name that occurs in the facts, or a count, or yes or no. Questions end with the name they ask
about, which a very small model finds more easily than a name in the middle.
"""

from __future__ import annotations

import random

from vocabulary import DAYS, NUMBER_WORDS, PEOPLE, PLURAL, SINGULAR, SITES
from world import Scene, cap

BAD_STATES = ("down", "broken", "old", "noisy", "hot", "dirty", "new", "wet", "loose", "silent")


def places(rng: random.Random) -> Scene:
    """Cells and devices at sites."""
    n = rng.choice((2, 2, 3, 3))
    sites, numbers = rng.sample(SITES, n), rng.sample(range(1, 61), n)
    roll = rng.random()
    if roll < 0.3:
        scene = Scene([f"{s} hosts cell {k}." for s, k in zip(sites, numbers, strict=True)])
        for s, k in zip(sites, numbers, strict=True):
            scene.ask(rng, "which_cell", (f"Which cell is at {s}?", f"What is the cell at {s}?"), str(k), (s, k))
        return scene
    names = [f"cell {k}" for k in numbers] if roll < 0.65 else [f"the {d}" for d in rng.sample(SINGULAR, n)]
    verb = rng.choice(("is", "stands"))
    scene = Scene([f"{cap(a)} {verb} at {s}." for a, s in zip(names, sites, strict=True)])
    for a, s in zip(names, sites, strict=True):
        scene.ask(rng, "where", (f"Where is {a}?", f"At which site is {a}?", f"Which site has {a}?"), s, (a, s))
    return scene


def links(rng: random.Random) -> Scene:
    """Links between pairs of sites, or links that are up or down."""
    n = rng.choice((2, 2, 3))
    ends, numbers = rng.sample(SITES, 2 * n), rng.sample(range(1, 61), n)
    pairs = list(zip(ends[:n], ends[n:], numbers, strict=True))
    roll = rng.random()
    if roll < 0.3:
        scene = Scene([f"Link {k} joins {a} and {b}." for a, b, k in pairs])
        for a, b, k in pairs:
            joins = (f"Which sites are on link {k}?", f"What is joined by link {k}?")
            scene.ask(rng, "joins", joins, f"{a} and {b}", (a, b, k))
        return scene
    if roll < 0.6:
        scene = Scene([f"{a} and {b} share link {k}." for a, b, k in pairs])
        for a, b, k in pairs:
            which = (f"Which link joins {a} and {b}?", f"What is the link of {a} and {b}?")
            scene.ask(rng, "which_link", which, str(k), (a, b, k))
        return scene
    return link_states(rng, numbers)


def link_states(rng: random.Random, numbers: list[int]) -> Scene:
    """Links by number, each up or down."""
    down = [rng.random() < 0.4 for _ in numbers]
    scene = Scene([f"Link {k} is {'down' if d else 'up'}." for k, d in zip(numbers, down, strict=True)])
    for k, d in zip(numbers, down, strict=True):
        state = (f"What is the state of link {k}?", f"How is link {k}?")
        scene.ask(rng, "link_state", state, "Down" if d else "Up", (k, d, *numbers))
        works = (f"Is there traffic on link {k}?", f"Can we use link {k}?")
        scene.ask(rng, "link_works", works, "No" if d else "Yes", (k, d, *numbers))
    count = ("How many links are down?", "How many links have failed?")
    scene.ask(rng, "count_down", count, NUMBER_WORDS[sum(down)], (*numbers, *down))
    return scene


def pronouns(rng: random.Random) -> Scene:
    """One single thing and one plural thing; "it" and "they" decide which is meant."""
    one, many = rng.choice(SINGULAR), rng.choice(PLURAL)
    (s1, s2), (b1, b2) = rng.sample(SITES, 2), rng.sample(BAD_STATES, 2)
    scene = Scene([f"The {one} at {s1} is {b1}.", f"The {many} at {s2} are {b2}."])
    it, they = (one, s1, b1, many, s2), (many, s2, b2, one, s1)
    scene.ask(rng, "it_where", ("Where is it?", "At which site is it?", "Which site is it at?"), s1, it)
    scene.ask(rng, "they_where", ("Where are they?", "At which site are they?", "Which site are they at?"), s2, they)
    scene.ask(rng, "it_state", ("How is it?", "What is wrong with it?", "In which state is it?"), f"It is {b1}.", it)
    scene.ask(
        rng,
        "they_state",
        ("How are they?", "What is wrong with them?", "In which state are they?"),
        f"They are {b2}.",
        they,
    )
    return scene


def people(rng: random.Random) -> Scene:
    """People, their workplaces and days."""
    n = rng.choice((2, 2, 3))
    trips = list(zip(rng.sample(PEOPLE, n), rng.sample(SITES, n), rng.sample(DAYS, n), strict=True))
    if rng.random() < 0.5:
        scene = Scene([f"{p} visits {s} on {d}." for p, s, d in trips])
        for p, s, d in trips:
            scene.ask(rng, "whereto", (f"Where is {p}?", f"Which site is visited by {p}?"), s, (p, s, d))
            scene.ask(rng, "when", (f"On which day is the visit at {s}?", f"When is the visit at {s}?"), d, (p, s, d))
        return scene
    scene = Scene([f"{s} expects {p} on {d}." for p, s, d in trips])
    for p, s, d in trips:
        scene.ask(rng, "who", (f"Who comes to {s}?", f"Who is expected at {s}?"), p, (p, s, d))
        scene.ask(rng, "when", (f"On which day comes {p}?", f"When is the visit by {p}?"), d, (p, s, d))
    return scene


def sequence(rng: random.Random) -> Scene:
    """Three events in order."""
    a, b, c = rng.sample(SINGULAR, 3)
    verb = rng.choice(("failed", "stopped", "restarted"))
    scene = Scene([f"First the {a} {verb}.", f"Then the {b} {verb}.", f"Last the {c} {verb}."], ordered=True)
    key = (a, b, c, verb)
    scene.ask(rng, "first", (f"What {verb} first?", f"Which part {verb} first?"), f"The {a}", key)
    scene.ask(rng, "last", (f"What {verb} last?", f"Which part {verb} last?"), f"The {c}", key)
    scene.ask(rng, "after", (f"What {verb} after the {a}?", f"What came after the {a}?"), f"The {b}", key)
    scene.ask(rng, "prior", (f"What {verb} before the {c}?", f"What came before the {c}?"), f"The {b}", key)
    return scene
