"""Sentences whose last clause fits only one of two nouns, by what is known about things: the benchmark's items.

A rule is a verb with things that do it, things it is done to, and one reason that fits each side. Training sees
the sentence with the noun spelled out; an item leaves a blank, and its twin differs only in the reason, which
flips the answer. A pair of nouns is held out from a rule as a whole, with both reasons.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from vocabulary import words
from world import cap, held_out

NOUNS = {
    "source": words("battery generator panel inverter rectifier turbine charger"),
    "load": words("radio heater lamp camera pump fan amplifier"),
    "box": words("router modem switch recorder server gateway controller"),
    "case": words("cabinet rack drawer shelf case locker slot"),
    "tall": words("tower mast crane wall tree building chimney"),
    "dish": words("antenna dish receiver sensor beacon repeater transmitter"),
    "senior": words("manager engineer instructor supervisor expert inspector director"),
    "junior": words("trainee visitor intern guard driver operator helper"),
    "client": words("client agent app script browser worker job"),
    "service": words("database master scheduler cache backup registry logger"),
    "line": words("cable fiber link port line tunnel connector"),
    "traffic": words("stream video download call update transfer message"),
    "weather": words("storm rain ice wind flood snow hail"),
    "structure": words("roof fence shelter door pole bracket window"),
    "tool": words("wrench drill key saw hammer cutter knife"),
    "part": words("bolt lock screw hinge nut lid plate"),
    "cooler": words("cooler filter vent blower conditioner chiller radiator"),
    "hot": words("processor transformer laser engine motor oven chip"),
}


@dataclass(frozen=True)
class Rule:
    """`The DOER verb the OTHER because the DOER doer_reason.` or `... because the OTHER other_reason.`"""

    doers: str
    verb: str
    others: str
    doer_reason: str
    other_reason: str


RULES = (
    Rule("source", "could not feed", "load", "was empty", "drew too much"),
    Rule("source", "could not start", "load", "was too weak", "was jammed"),
    Rule("source", "stopped feeding", "load", "was drained", "was switched off"),
    Rule("box", "did not fit into", "case", "was too wide", "was too narrow"),
    Rule("case", "could not hold", "box", "was too flimsy", "was too heavy"),
    Rule("box", "fell out of", "case", "was not fastened", "was tilted"),
    Rule("tall", "blocked", "dish", "was too tall", "was too low"),
    Rule("tall", "could not carry", "dish", "was rusty", "was too big"),
    Rule("tall", "shaded", "dish", "stood too close", "was mounted low"),
    Rule("senior", "taught", "junior", "knew the job", "was new"),
    Rule("junior", "called", "senior", "needed advice", "gave advice"),
    Rule("senior", "corrected", "junior", "was watchful", "made a mistake"),
    Rule("junior", "obeyed", "senior", "was a beginner", "was in charge"),
    Rule("senior", "praised", "junior", "was pleased", "worked well"),
    Rule("client", "asked", "service", "lacked the data", "had the data"),
    Rule("service", "rejected", "client", "was strict", "was not signed in"),
    Rule("client", "waited for", "service", "needed a reply", "replied late"),
    Rule("client", "overloaded", "service", "asked too often", "had little memory"),
    Rule("line", "could not carry", "traffic", "was too slow", "was too large"),
    Rule("line", "dropped", "traffic", "was broken", "was not urgent"),
    Rule("traffic", "filled", "line", "was huge", "was thin"),
    Rule("weather", "damaged", "structure", "was fierce", "was fragile"),
    Rule("structure", "survived", "weather", "was solid", "was mild"),
    Rule("weather", "moved", "structure", "came suddenly", "was loose"),
    Rule("tool", "could not open", "part", "was blunt", "was stuck"),
    Rule("tool", "scratched", "part", "was sharp", "was soft"),
    Rule("cooler", "could not cool", "hot", "was clogged", "was overheated"),
    Rule("cooler", "saved", "hot", "kept running", "was near its limit"),
    Rule("junior", "dropped", "tool", "was clumsy", "was slippery"),
    Rule("junior", "carried", "box", "was strong", "was light"),
    Rule("senior", "repaired", "load", "had time", "was faulty"),
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
        """What is said of the doer or of the other."""
        return self.rule.doer_reason if doer_side else self.rule.other_reason

    def twisted(self, *, doer_side: bool) -> tuple[str, str]:
        """The wrong noun before the same reason."""
        noun = self.other if doer_side else self.doer
        return f"{self.start()} the {noun}", f" {self.reason(doer_side=doer_side)}."


def pair_key(rule: Rule, doer: str, other: str) -> str:
    """What decides whether this combination is held out."""
    return f"pronoun|{doer}|{rule.verb}|{other}"


def draw(rng: random.Random, *, want_held_out: bool) -> Fill:
    """A random fill on the wanted side of the split."""
    while True:
        rule = rng.choice(RULES)
        doer, other = rng.choice(NOUNS[rule.doers]), rng.choice(NOUNS[rule.others])
        if held_out(pair_key(rule, doer, other)) == want_held_out:
            return Fill(rule, doer, other, rng.choice(OPENINGS))


def items(rng: random.Random, per_rule: int) -> Iterator[dict[str, str]]:
    """Twin items on held-out noun pairs: each twin flips the answer, and the options' order alternates."""
    number = 0
    for rule in RULES:
        pairs = [(a, b) for a in NOUNS[rule.doers] for b in NOUNS[rule.others] if held_out(pair_key(rule, a, b))]
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
