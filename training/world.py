"""Scenes of a network edge: facts stated in plain sentences and questions that the facts answer.

Each scene is drawn at random and carries questions with one canonical answer. The key of a question names
the whole combination it asks about (entities, values, wording); `held_out` keeps one key in eight away from
training, so that a held-out question can be answered only by reading its facts or by general knowledge.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from vocabulary import ALARMS, DAYS, METRICS, NUMBER_WORDS, PEOPLE, PLURAL, SINGULAR, SITES

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

    def ask(self, rng: random.Random, kind: str, wordings: tuple[str, ...], answer: str, *key: object) -> None:
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
        if all(b - a >= gap for a, b in zip(ordered, ordered[1:], strict=False)):
            return values


def readings(rng: random.Random) -> Scene:
    """Values of one metric at two or three sites, with a limit."""
    m = rng.choice(METRICS)
    n = rng.choice((1, 2, 2, 3))
    sites = rng.sample(SITES, n)
    limit, *values = spread(rng, n + 1)
    shape = rng.choice((
        "The {m} at {s} is {v} {u}.", "{s} has a {m} of {v} {u}.", "At {s} the {m} is {v} {u}.",
    ))
    facts = [shape.format(m=m.name, s=s, v=v, u=m.unit) for s, v in zip(sites, values, strict=True)]
    with_limit = rng.random() < 0.7
    if with_limit:
        facts.append(rng.choice((
            f"The limit for {m.name} is {limit} {m.unit}.", f"The {m.name} limit is {limit} {m.unit}.",
            f"{m.name.capitalize()} must stay under {limit} {m.unit}.",
        )))
    scene = Scene(facts)
    s, v = rng.choice(list(zip(sites, values, strict=True)))
    scene.ask(rng, "value", (f"What is the {m.name} at {s}?", f"How high is the {m.name} at {s}?",
                             f"Give the {m.name} of {s}.", f"Which {m.name} does {s} have?"),
              f"{v} {m.unit}", m.name, s, v)
    if n > 1:
        compare_sites(scene, rng, m.name, m.most, m.least, sites, values)
    if with_limit:
        compare_limit(scene, rng, m.name, m.unit, sites, values, limit)
    return scene


def compare_sites(scene: Scene, rng: random.Random, name: str, most: str, least: str,
                  sites: list[str], values: list[int]) -> None:
    """Questions on the largest and the smallest value."""
    top, low = sites[values.index(max(values))], sites[values.index(min(values))]
    key = (name, *sites, *values)
    scene.ask(rng, "highest", (f"Which site has the highest {name}?", f"Where is the {name} highest?",
                               f"Which site is the {most}?"), top, *key)
    scene.ask(rng, "lowest", (f"Which site has the lowest {name}?", f"Where is the {name} lowest?",
                              f"Which site is the {least}?"), low, *key)


def compare_limit(scene: Scene, rng: random.Random, name: str, unit: str,
                  sites: list[str], values: list[int], limit: int) -> None:
    """Questions that hold a value against the limit."""
    s, v = rng.choice(list(zip(sites, values, strict=True)))
    over = [a for a, b in zip(sites, values, strict=True) if b > limit]
    scene.ask(rng, "limit", (f"What is the limit for {name}?", f"Which limit does {name} have?",
                             f"How much {name} is allowed?"), f"{limit} {unit}", name, limit, *sites)
    scene.ask(rng, "over", (f"Is {s} over the limit?", f"Is the {name} at {s} too high?",
                            f"Does {s} break the {name} limit?", f"Is {s} above the limit?"),
              "Yes" if v > limit else "No", name, s, v, limit)
    scene.ask(rng, "under", (f"Is {s} within the limit?", f"Is the {name} at {s} fine?",
                             f"Does {s} keep the {name} limit?"),
              "Yes" if v < limit else "No", name, s, v, limit)
    if len(over) == 1 and len(sites) > 1:
        scene.ask(rng, "which_over", ("Which site is over the limit?", f"Where is the {name} too high?",
                                      "Which site breaks the limit?"), over[0], name, *sites, *values, limit)
    scene.ask(rng, "count_over", ("How many sites are over the limit?", "How many sites break the limit?"),
              NUMBER_WORDS[len(over)], name, *sites, *values, limit)


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
    i, j = rng.sample(range(n), 2)
    a, s = names[i], sites[i]
    scene.ask(rng, "where", (f"Where is {a}?", f"At which site is {a}?", f"Which site hosts {a}?",
                             f"Find {a}."), s, a, s)
    scene.ask(rng, "what_at", (f"What is at {sites[j]}?", f"What does {sites[j]} host?",
                               f"What stands at {sites[j]}?"), cap(names[j]), names[j], sites[j])
    asked = s if rng.random() < 0.5 else sites[j]
    scene.ask(rng, "is_at", (f"Is {a} at {asked}?", f"Does {asked} host {a}?"),
              "Yes" if asked == s else "No", a, s, asked)
    return scene


def cap(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[0].upper() + text[1:]


def alarms(rng: random.Random) -> Scene:
    """Alarms at sites; the questions need the facts and what the codes mean."""
    n = rng.choice((1, 2, 2, 3))
    sites, chosen = rng.sample(SITES, n), rng.sample(ALARMS, n)
    shape = rng.choice(("{s} reports {c}.", "{s} has alarm {c}.", "Alarm {c} is active at {s}.",
                        "We see {c} at {s}."))
    facts = [shape.format(s=s, c=a.code) for s, a in zip(sites, chosen, strict=True)]
    scene = Scene(facts)
    s, a = rng.choice(list(zip(sites, chosen, strict=True)))
    key = (s, a.code)
    scene.ask(rng, "which_alarm", (f"Which alarm does {s} have?", f"What is the alarm at {s}?",
                                   f"What does {s} report?"), a.code, *key, n)
    scene.ask(rng, "alarm_site", (f"Which site has alarm {a.code}?", f"Where is {a.code} active?",
                                  f"Which site reports {a.code}?"), s, *key, n)
    scene.ask(rng, "problem", (f"Which site has {article(a.meaning)}?", f"Where do we have {article(a.meaning)}?"),
              s, *key, n)
    scene.ask(rng, "action", (f"What should I do at {s}?", f"What must be done at {s}?",
                              f"Give the next step for {s}.", f"How do I fix {s}?"),
              f"{a.action}.", *key, n)
    scene.ask(rng, "effect", (f"What happens next at {s}?", f"What follows if nobody helps {s}?"),
              f"{a.effect}.", *key, n)
    scene.ask(rng, "severity", (f"How severe is the alarm at {s}?", f"What is the severity at {s}?"),
              cap(a.severity), *key, n)
    return scene


def article(meaning: str) -> str:
    """The meaning of an alarm as a noun phrase inside a sentence."""
    return f"an {meaning}" if meaning[0] in "aeiou" else f"a {meaning}"


def knowledge(rng: random.Random) -> Scene:
    """Questions on the alarm table alone, without facts."""
    scene = Scene([])
    a, m = rng.choice(ALARMS), rng.choice(METRICS)
    scene.ask(rng, "meaning", (f"What does {a.code} mean?", f"What is {a.code}?", f"Explain {a.code} briefly.",
                               f"What does the code {a.code} stand for?", f"Meaning of {a.code}?",
                               f"What is the meaning of alarm {a.code}?", f"Tell me what {a.code} means.",
                               f"What does alarm {a.code} say?"), f"{cap(a.meaning)}.", a.code)
    scene.ask(rng, "code", (f"Which code means {a.meaning}?", f"What is the code for {a.meaning}?",
                            f"Code for {a.meaning}?", f"Which alarm stands for {a.meaning}?",
                            f"Name the alarm for {a.meaning}.", f"Which alarm means {a.meaning}?"),
              a.code, a.code)
    scene.ask(rng, "unit", (f"Which unit does {m.name} have?", f"What is the unit of {m.name}?",
                            f"In which unit is {m.name} measured?", f"Unit of {m.name}?",
                            f"Which unit is used for {m.name}?", f"How is {m.name} measured?",
                            f"Name the unit of {m.name}.", f"Give the unit for {m.name}."), m.unit, m.name)
    scene.ask(rng, "remedy", (f"What should I do about {a.code}?", f"What is the remedy for {a.code}?",
                              f"How do I handle {a.code}?", f"What helps against {a.code}?",
                              f"Next step for {a.code}?", f"What must be done after {a.code}?",
                              f"How do I fix {a.meaning}?", f"What helps against {a.meaning}?"),
              f"{a.action}.", a.code)
    scene.ask(rng, "part", (f"Which part does {a.code} concern?", f"Which part is behind {a.code}?",
                            f"Which part do I look at for {a.code}?", f"Part behind {a.code}?"),
              f"The {a.part}.", a.code)
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
    i = rng.randrange(n)
    a, b, k = ends[2 * i], ends[2 * i + 1], numbers[i]
    scene.ask(rng, "which_link", (f"Which link joins {a} and {b}?", f"Which link connects {a} and {b}?",
                                  f"Which link runs between {a} and {b}?"), f"Link {k}", a, b, k)
    scene.ask(rng, "joins", (f"What does link {k} join?", f"Which sites does link {k} connect?",
                             f"Between which sites is link {k}?"), f"{a} and {b}", a, b, k)
    scene.ask(rng, "other_end", (f"Link {k} starts at {a}. Where does it end?",
                                 f"What is the other end of link {k} from {a}?"), b, a, b, k)
    scene.ask(rng, "link_state", (f"Is link {k} up?", f"Does link {k} work?"),
              "No" if down[i] else "Yes", a, b, k, down[i])
    scene.ask(rng, "count_down", ("How many links are down?", "How many links have failed?"),
              NUMBER_WORDS[sum(down)], *numbers, *down)
    if sum(down) == 1:
        j = down.index(True)
        scene.ask(rng, "link_down", ("Which link is down?", "Which link has failed?"),
                  f"Link {numbers[j]}", *numbers, *down)
        scene.ask(rng, "cut_off", ("Which sites are affected?", "Which sites lost their link?"),
                  f"{ends[2 * j]} and {ends[2 * j + 1]}", *ends, *down)
    return scene


BAD_STATES = ("down", "broken", "old", "noisy", "hot", "dirty", "new", "wet", "loose", "silent")


def pronouns(rng: random.Random) -> Scene:
    """One single thing and one plural thing; "it" and "they" tell which is meant."""
    one, many = rng.choice(SINGULAR), rng.choice(PLURAL)
    (s1, s2), (b1, b2) = rng.sample(SITES, 2), rng.sample(BAD_STATES, 2)
    scene = Scene([f"The {one} at {s1} is {b1}.", f"The {many} at {s2} are {b2}."])
    it, they = (one, s1, b1, many, s2), (many, s2, b2, one, s1)
    scene.ask(rng, "it_where", ("Where is it?", "At which site is it?", "Which site is it at?"), s1, *it)
    scene.ask(rng, "they_where", ("Where are they?", "At which site are they?", "Which site are they at?"),
              s2, *they)
    scene.ask(rng, "it_state", ("How is it?", "What is wrong with it?", "In which state is it?"),
              f"It is {b1}.", *it)
    scene.ask(rng, "they_state", ("How are they?", "What is wrong with them?", "In which state are they?"),
              f"They are {b2}.", *they)
    return scene


def people(rng: random.Random) -> Scene:
    """Who works where, and on which day."""
    n = rng.choice((2, 3))
    names, sites, days = rng.sample(PEOPLE, n), rng.sample(SITES, n), rng.sample(DAYS, n)
    shape = rng.choice(("{p} visits {s} on {d}.", "On {d} {p} visits {s}.", "{p} will be at {s} on {d}."))
    scene = Scene([shape.format(p=p, s=s, d=d) for p, s, d in zip(names, sites, days, strict=True)])
    p, s, d = rng.choice(list(zip(names, sites, days, strict=True)))
    scene.ask(rng, "who", (f"Who visits {s}?", f"Who will be at {s}?", f"Who goes to {s}?"), p, p, s, d)
    scene.ask(rng, "whereto", (f"Where does {p} go?", f"Which site does {p} visit?", f"Where will {p} be?"),
              s, p, s, d)
    scene.ask(rng, "when", (f"When does {p} visit {s}?", f"On which day is {p} at {s}?",
                            f"Which day does {p} go to {s}?"), d, p, s, d)
    return scene


def changes(rng: random.Random) -> Scene:
    """A value then and now."""
    m, s = rng.choice(METRICS), rng.choice(SITES)
    before, now = spread(rng, 2)
    first = rng.choice((f"The {m.name} at {s} was {before} {m.unit}.", f"Before, {s} had {m.name} of {before} {m.unit}."))
    second = rng.choice((f"Now it is {now} {m.unit}.", f"It is {now} {m.unit} now."))
    scene = Scene([first, second], ordered=True)
    key = (m.name, s, before, now)
    scene.ask(rng, "trend", ("Did it rise or fall?", f"Did the {m.name} rise or fall?"),
              "It rose." if now > before else "It fell.", *key)
    scene.ask(rng, "now", ("What is it now?", f"What is the {m.name} now?"), f"{now} {m.unit}", *key)
    scene.ask(rng, "before", ("What was it before?", f"What was the {m.name} before?"), f"{before} {m.unit}", *key)
    return scene


def sequence(rng: random.Random) -> Scene:
    """Three events in order."""
    a, b, c = rng.sample(SINGULAR, 3)
    verb = rng.choice(("failed", "stopped", "restarted"))
    scene = Scene([f"First the {a} {verb}.", f"Then the {b} {verb}.", f"Last the {c} {verb}."], ordered=True)
    key = (a, b, c, verb)
    scene.ask(rng, "first", (f"What {verb} first?", f"Which part {verb} first?"), f"The {a}", *key)
    scene.ask(rng, "last", (f"What {verb} last?", f"Which part {verb} last?"), f"The {c}", *key)
    scene.ask(rng, "after", (f"What {verb} after the {a}?", f"What came after the {a}?"), f"The {b}", *key)
    scene.ask(rng, "prior", (f"What {verb} before the {c}?", f"What came before the {c}?"), f"The {b}", *key)
    return scene


def duty(rng: random.Random) -> Scene:
    """A role given in the system prompt."""
    s, other = rng.sample(SITES, 2)
    limit, value = spread(rng, 2)
    p = rng.choice(PEOPLE)
    scene = Scene([f"You watch {s} for {p}.", f"Raise an alarm above {limit} C."], ordered=True)
    key = (s, p, limit)
    scene.ask(rng, "duty_site", ("Which site do you watch?", "What do you watch?"), s, *key)
    scene.ask(rng, "duty_person", ("Who do you work for?", "Whom do you help?"), p, *key)
    scene.ask(rng, "duty_alarm", (f"{s} is at {value} C. Do you raise an alarm?",
                                  f"Now {s} has {value} C. Is that an alarm?"),
              "Yes" if value > limit else "No", *key, value)
    asked = rng.choice((s, other))
    scene.ask(rng, "duty_mine", (f"Do you watch {asked}?", f"Is {asked} yours?"),
              "Yes" if asked == s else "No", *key, asked)
    return scene


SCENES: tuple[tuple[Callable[[random.Random], Scene], int], ...] = (
    (readings, 8), (places, 4), (alarms, 5), (knowledge, 2), (links, 4), (pronouns, 3), (people, 3),
    (changes, 2), (sequence, 2), (duty, 2),
)
