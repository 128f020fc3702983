"""Sentences whose last clause fits only one of two nouns, by rules of the form verb + two reasons.

A rule states which reason belongs to the doer and which to the other thing; its nouns come from one list, so only
a noun's place in the sentence decides. Training sees the sentence with the noun spelled out; an item leaves a
blank, and its twin differs only in the reason, which flips the answer. Every pair of nouns is held out or not
as a whole, in both orders and with both reasons.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from world import cap, held_out


@dataclass(frozen=True)
class Rule:
    """A verb, the reason that refers to its doer, the reason that refers to the other, and a noun group."""

    verb: str
    doer_reason: str
    other_reason: str
    group: str


GROUPS = {
    "box": ["router", "switch", "modem", "gateway", "server", "firewall", "recorder", "controller"],
    "power": ["battery", "charger", "rectifier", "generator", "inverter", "panel", "turbine", "converter"],
    "radio": ["radio", "antenna", "repeater", "receiver", "beacon", "handset", "transmitter", "sensor"],
    "body": ["mast", "tower", "cabinet", "fence", "shelter", "wall", "pole", "bracket"],
    "person": ["engineer", "operator", "technician", "manager", "driver", "guard", "planner", "visitor"],
    "program": ["client", "scheduler", "backup", "monitor", "database", "agent", "service", "logger"],
}

RULES = (
    Rule("replaced", "was newer", "was older", "box"),
    Rule("overloaded", "was too busy", "was too slow", "box"),
    Rule("took over from", "was healthy", "was broken", "box"),
    Rule("was configured after", "came later", "came earlier", "box"),
    Rule("did not fit into", "was too large", "was too small", "box"),
    Rule("could not charge", "was empty", "was full", "power"),
    Rule("could not feed", "gave too little", "drew too much", "power"),
    Rule("drained", "was hungry", "was exhausted", "power"),
    Rule("relieved", "was fresh", "was tired", "power"),
    Rule("could not cool", "was too weak", "was too hot", "power"),
    Rule("could not hear", "was deaf", "was silent", "radio"),
    Rule("could not reach", "was too faint", "was too far", "radio"),
    Rule("disturbed", "was too loud", "was too sensitive", "radio"),
    Rule("drowned out", "was strong", "was weak", "radio"),
    Rule("waited for", "was early", "was late", "radio"),
    Rule("blocked", "was too tall", "was too low", "body"),
    Rule("could not carry", "was thin", "was heavy", "body"),
    Rule("crushed", "was hard", "was soft", "body"),
    Rule("was hidden behind", "was narrow", "was wide", "body"),
    Rule("outlasted", "was solid", "was rusty", "body"),
    Rule("asked", "needed the answer", "knew the answer", "person"),
    Rule("helped", "was idle", "was overworked", "person"),
    Rule("obeyed", "was junior", "was senior", "person"),
    Rule("warned", "was watchful", "was careless", "person"),
    Rule("thanked", "received help", "gave help", "person"),
    Rule("copied", "was incomplete", "was complete", "program"),
    Rule("rejected", "was strict", "was invalid", "program"),
    Rule("restarted", "was in charge", "was stuck", "program"),
    Rule("overtook", "was fast", "was sluggish", "program"),
    Rule("trusted", "was naive", "was honest", "program"),
)

OPENINGS = ("", "", "On Monday ", "Last night ", "At the site ", "Once again ")


@dataclass(frozen=True)
class Fill:
    """One rule with its two nouns and an opening."""

    rule: Rule
    doer: str
    other: str
    opening: str

    def start(self) -> str:
        """The sentence up to and including "because"."""
        return cap(f"{self.opening}the {self.doer} {self.rule.verb} the {self.other} because")

    def resolved(self, *, doer_side: bool) -> tuple[str, str]:
        """The text up to and including the noun, and the text after it."""
        noun = self.doer if doer_side else self.other
        return f"{self.start()} the {noun}", f" {self.reason(doer_side=doer_side)}."

    def reason(self, *, doer_side: bool) -> str:
        """The reason that refers to the doer or to the other."""
        return self.rule.doer_reason if doer_side else self.rule.other_reason


def pair_key(rule: Rule, a: str, b: str) -> str:
    """The same key for both orders of the nouns."""
    first, second = sorted((a, b))
    return f"pronoun|{rule.verb}|{first}|{second}"


def draw(rng: random.Random, *, want_held_out: bool) -> Fill:
    """A random fill on the wanted side of the split."""
    while True:
        rule = rng.choice(RULES)
        doer, other = rng.sample(GROUPS[rule.group], 2)
        if held_out(pair_key(rule, doer, other)) == want_held_out:
            return Fill(rule, doer, other, rng.choice(OPENINGS))


def chat_question(rng: random.Random) -> tuple[str, str, str, str]:
    """A trained pronoun sentence, a question on it, the answer, and the key."""
    fill = draw(rng, want_held_out=False)
    return question_on(fill, doer_side=rng.random() < 0.5)


def question_on(fill: Fill, *, doer_side: bool) -> tuple[str, str, str, str]:
    """Sentence with "it" or "this person", question, answer, key."""
    person = fill.rule.group == "person"
    reason = fill.reason(doer_side=doer_side)
    sentence = f"{fill.start()} {'this person' if person else 'it'} {reason}."
    answer = f"The {fill.doer if doer_side else fill.other}"
    return (
        sentence,
        f"{'Who' if person else 'What'} {reason}?",
        answer,
        pair_key(fill.rule, fill.doer, fill.other),
    )


def items(rng: random.Random, per_rule: int) -> Iterator[dict[str, str]]:
    """Twin items on held-out noun pairs: each twin flips the answer, and the options' order alternates."""
    number = 0
    for rule in RULES:
        nouns = GROUPS[rule.group]
        pairs = [(a, b) for a in nouns for b in nouns if a != b and held_out(pair_key(rule, a, b))]
        rng.shuffle(pairs)
        for doer, other in pairs[:per_rule]:
            fill = Fill(rule, doer, other, rng.choice(OPENINGS))
            options = [f"the {doer}", f"the {other}"]
            swapped = number % 2 == 1
            if swapped:
                options.reverse()
            for twin, doer_side in enumerate((True, False)):
                yield {
                    "id": f"edge-pronouns-{number:03d}{'ab'[twin]}",
                    "sentence": f"{fill.start()} _ {fill.reason(doer_side=doer_side)}.",
                    "option1": options[0],
                    "option2": options[1],
                    "answer": "1" if doer_side != swapped else "2",
                    "pair": f"edge-pronouns-{number:03d}",
                }
            number += 1
