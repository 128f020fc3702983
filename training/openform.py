"""Requests that the small world cannot answer, with careful general advice as the answer.

Real users ask about things outside the small world, in words that training never had. Prompts here are filled
with invented words, so that unknown input leads to a modest, well-formed paragraph and not to a site's name.
"""

from __future__ import annotations

import random

from longform import TOPICS as KNOWN
from longform import WORDS, explanation
from vocabulary import words
from world import cap

LINKING = words("the a of to in for with and our is are we you it that this when if on at from by or not as")
SYLLABLES = words(
    "ka lo mi ter ven ast or il pro con dis re in un ed ing er est al ity tion ment ble ist ous com per sta gra "
    "cho the qu sh bu wi ze ja ny fo hu pi do ra et on an us um ix ax Ke Sa To Re Un Mo Ba"
)
FRAMES = (
    "What is {x} good for?",
    "How do I {x} the {y}?",
    "Can you help me with {x}?",
    "Should we use {x} or {y}?",
    "Why is {x} {y}?",
    "Write a short note about {x}.",
    "Tell our team how {x} works with {y}.",
    "Which {x} should we choose, and why?",
    "Explain the difference between {x} and {y}.",
    "Our {x} is {y}. What would you do?",
    "Give me three reasons for {x}.",
    "What happens if {x} meets {y}?",
    "What does {x} mean for a {y}?",
    "I need a plan for {x}.",
    "Is {x} better than {y}?",
    "Please draft a message about {x} to {y}.",
)
AGAIN = (
    "And then?",
    "Please go on.",
    "Can you say more?",
    "Why?",
    "What else?",
    "Make it shorter.",
    "Thanks. What next?",
)
OPENERS = (
    "I know only a small part of this, so take it as a hint.",
    "There is no single answer, but a few steps help in most cases.",
    "It depends on the site, so start with what you can see.",
    "I am a small model, so please check this with your team.",
)
FIRST = (
    "First collect the facts: what changed, when it changed, and which sites are affected.",
    "Start by writing down what you know and what you only guess.",
    "Begin with the simplest check, because it often shows the reason.",
    "Look at the alarms and at the values of the last day.",
)
THEN = (
    "Then compare the site with a neighbor that works well.",
    "After that, change one thing at a time and watch what happens.",
    "Next, agree with the team on who does what and until when.",
    "Then test the change on one node before you touch the others.",
)
CARE = (
    "Keep a way back, so that you can undo the change.",
    "Choose a quiet hour, so that few users notice the work.",
    "Do not open the cabinet without the right tools.",
    "If users are affected, tell them early and in plain words.",
)
LAST = (
    "Write down the result, so that the next shift can learn from it.",
    "If the problem returns, plan a visit to the site.",
    "When the values are back to normal, close the ticket.",
    "In the end, a short report saves time for everyone.",
)


def word(rng: random.Random) -> str:
    """An ordinary word or an invented one."""
    if rng.random() < 0.4:
        return rng.choice(WORDS)
    return "".join(rng.choices(SYLLABLES, k=rng.randint(1, 4)))


def phrase(rng: random.Random, low: int, high: int) -> str:
    """Words and linking words in turn."""
    return " ".join(rng.choice(LINKING) if rng.random() < 0.4 else word(rng) for _ in range(rng.randint(low, high)))


def request(rng: random.Random) -> str:
    """A question or an order about something unknown, sometimes after a few sentences."""
    lead = [cap(phrase(rng, 4, 14)) + rng.choice((".", ".", ",")) for _ in range(rng.choice((0, 0, 1, 2, 3)))]
    ask = rng.choice(FRAMES).format(x=phrase(rng, 1, 3), y=phrase(rng, 1, 2))
    return " ".join([*lead, ask])


def advice(rng: random.Random) -> str:
    """General advice in five to seven sentences."""
    parts = [rng.choice(OPENERS)]
    for pool in (FIRST, THEN, CARE, LAST):
        parts += rng.sample(pool, rng.choice((1, 1, 2)))
    return " ".join(parts)


def turns(rng: random.Random) -> list[tuple[str, str]]:
    """One to three requests with their answers; a known subject is answered from the table."""
    out = []
    for number in range(rng.choice((1, 1, 2, 3))):
        if number and rng.random() < 0.4:
            out.append((rng.choice(AGAIN), advice(rng)))
        elif rng.random() < 0.25:
            topic = rng.choice(KNOWN)
            ask = f"{cap(phrase(rng, 3, 12))}. {rng.choice(FRAMES).format(x=topic.name, y=word(rng))}"
            out.append((ask, explanation(topic, rng)))
        else:
            out.append((request(rng), advice(rng)))
    return out
