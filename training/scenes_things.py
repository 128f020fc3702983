"""Scenes of things and people: what stands where, which link joins what, who visits when, what came first.

Every answer is a name that occurs in the facts, or a count, or yes or no.
"""

from __future__ import annotations

import random

from vocabulary import DAYS, NUMBER_WORDS, PEOPLE, PLURAL, SINGULAR, SITES
from world import Scene, cap

BAD_STATES = ("down", "broken", "old", "noisy", "hot", "dirty", "new", "wet", "loose", "silent")


def places(rng: random.Random) -> Scene:
    """Cells and devices at sites."""
    n = rng.choice((2, 3, 3, 4))
    sites = rng.sample(SITES, n)
    if rng.random() < 0.6:
        names = [f"cell {i}" for i in rng.sample(range(1, 61), n)]
    else:
        names = [f"the {d}" for d in rng.sample(SINGULAR, n)]
    shape = rng.choice(("{a} is at {s}.", "{a} stands at {s}.", "{s} hosts {b}."))
    facts = [shape.format(a=cap(a), b=a, s=s) for a, s in zip(names, sites, strict=True)]
    scene = Scene(facts)
    for a, s in zip(names, sites, strict=True):
        scene.ask(
            rng,
            "where",
            (f"Where is {a}?", f"At which site is {a}?", f"Which site hosts {a}?", f"Find {a}."),
            s,
            (a, s),
        )
        scene.ask(
            rng,
            "what_at",
            (f"What is at {s}?", f"What does {s} host?", f"What stands at {s}?"),
            cap(a),
            (a, s),
        )
        asked = s if rng.random() < 0.5 else rng.choice(sites)
        scene.ask(
            rng,
            "is_at",
            (f"Is {a} at {asked}?", f"Does {asked} host {a}?"),
            "Yes" if asked == s else "No",
            (a, s, asked),
        )
    return scene


def links(rng: random.Random) -> Scene:
    """Links between pairs of sites, each up or down."""
    n = rng.choice((2, 2, 3))
    ends, numbers = rng.sample(SITES, 2 * n), rng.sample(range(1, 61), n)
    down = [rng.random() < 0.4 for _ in range(n)]
    facts = []
    verb = rng.choice(("joins", "connects"))
    for i in range(n):
        state = "down" if down[i] else "up"
        facts.append(f"Link {numbers[i]} {verb} {ends[2 * i]} and {ends[2 * i + 1]} and is {state}.")
    scene = Scene(facts)
    for i in range(n):
        a, b, k = ends[2 * i], ends[2 * i + 1], numbers[i]
        scene.ask(
            rng,
            "which_link",
            (
                f"Which link joins {a} and {b}?",
                f"Which link connects {a} and {b}?",
                f"Which link runs between {a} and {b}?",
            ),
            f"Link {k}",
            (a, b, k),
        )
        scene.ask(
            rng,
            "joins",
            (
                f"What does link {k} join?",
                f"Which sites does link {k} connect?",
                f"Between which sites is link {k}?",
            ),
            f"{a} and {b}",
            (a, b, k),
        )
        scene.ask(
            rng,
            "other_end",
            (f"Link {k} starts at {a}. Where does it end?", f"What is the other end of link {k} from {a}?"),
            b,
            (a, b, k),
        )
        scene.ask(
            rng,
            "link_state",
            (f"Is link {k} up?", f"Does link {k} work?"),
            "No" if down[i] else "Yes",
            (a, b, k, down[i]),
        )
    link_totals(scene, rng, ends, numbers, down)
    return scene


def link_totals(scene: Scene, rng: random.Random, ends: list[str], numbers: list[int], down: list[bool]) -> None:
    """Questions on all links at once."""
    scene.ask(
        rng,
        "count_down",
        ("How many links are down?", "How many links have failed?"),
        NUMBER_WORDS[sum(down)],
        (*numbers, *down),
    )
    if sum(down) == 1:
        j = down.index(True)
        scene.ask(
            rng,
            "link_down",
            ("Which link is down?", "Which link has failed?"),
            f"Link {numbers[j]}",
            (*numbers, *down),
        )
        scene.ask(
            rng,
            "cut_off",
            ("Which sites are affected?", "Which sites lost their link?"),
            f"{ends[2 * j]} and {ends[2 * j + 1]}",
            (*ends, *down),
        )


def pronouns(rng: random.Random) -> Scene:
    """One single thing and one plural thing; "it" and "they" tell which is meant."""
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
    """Who works where, and on which day."""
    n = rng.choice((2, 3))
    names, sites, days = rng.sample(PEOPLE, n), rng.sample(SITES, n), rng.sample(DAYS, n)
    shape = rng.choice(("{p} visits {s} on {d}.", "On {d} {p} visits {s}.", "{p} will be at {s} on {d}."))
    scene = Scene([shape.format(p=p, s=s, d=d) for p, s, d in zip(names, sites, days, strict=True)])
    for p, s, d in zip(names, sites, days, strict=True):
        scene.ask(rng, "who", (f"Who visits {s}?", f"Who will be at {s}?", f"Who goes to {s}?"), p, (p, s, d))
        scene.ask(
            rng,
            "whereto",
            (f"Where does {p} go?", f"Which site does {p} visit?", f"Where will {p} be?"),
            s,
            (p, s, d),
        )
        scene.ask(
            rng,
            "when",
            (f"When does {p} visit {s}?", f"On which day is {p} at {s}?", f"Which day does {p} go to {s}?"),
            d,
            (p, s, d),
        )
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
