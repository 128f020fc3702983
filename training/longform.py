"""Longer answers: explanations, checklists, summaries and advice about a network edge.

They are assembled from a table of topics and several wordings for each point, so that an open question
gets a paragraph of plain English instead of a single word. Summaries read the figures in the question.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from vocabulary import DAYS, METRICS, PEOPLE, SITES, words
from world import cap, spread


@dataclass(frozen=True)
class Topic:
    """The facts about one subject of daily work."""

    name: str
    what: str
    causes: tuple[str, ...]
    effects: tuple[str, ...]
    checks: tuple[str, ...]
    fixes: tuple[str, ...]


TOPICS = (
    Topic(
        "high temperature",
        "the equipment is hotter than its limit",
        ("a blocked filter", "a dead fan", "direct sun on the cabinet", "too much load on the radio"),
        ("the radio lowers its power", "users see a slower network", "parts grow old early"),
        ("look at the fan", "look at the filter", "read the temperature again", "check the load"),
        ("clean the filter", "replace the fan", "move some traffic to another cell"),
    ),
    Topic(
        "packet loss",
        "some packets never arrive at the other end",
        ("a bad cable", "a full queue", "a weak radio link", "a faulty port"),
        ("video breaks up", "files are sent twice", "calls sound rough"),
        ("test the link", "count the errors on the port", "look at the cable", "compare both directions"),
        ("replace the cable", "lower the load", "move the traffic to another link"),
    ),
    Topic(
        "high latency",
        "packets need too long to arrive",
        ("a long route", "a full queue", "a busy server", "a slow backup link"),
        ("games lag", "calls get an echo", "control loops become unstable"),
        (
            "check the route",
            "look at the queue",
            "measure the delay of each hop",
            "check the load of the server",
        ),
        ("choose a shorter route", "give urgent traffic priority", "move the service closer to the users"),
    ),
    Topic(
        "loss of signal",
        "the receiver gets no light or no radio wave",
        ("a broken fiber", "a loose cable", "a transmitter without power", "a dirty connector"),
        ("calls drop", "the cell goes out of service", "neighbor cells carry more traffic"),
        (
            "look at the cable",
            "check the transmitter",
            "measure the power at the receiver",
            "ask about digging work",
        ),
        ("clean the connector", "replace the cable", "switch to the spare fiber"),
    ),
    Topic(
        "a power failure",
        "the site no longer gets power from the grid",
        ("a storm", "a tripped breaker", "work on the grid", "a broken rectifier"),
        ("the site runs on its battery", "small cells go dark first", "the cooling may stop"),
        (
            "check the breaker",
            "read the charge of the battery",
            "call the power company",
            "check the rectifier",
        ),
        ("start the generator", "reset the breaker", "switch off what is not needed"),
    ),
    Topic(
        "a weak battery",
        "the battery holds less energy than it should",
        ("age", "heat", "many deep discharges", "a wrong charging voltage"),
        (
            "the site has less backup time",
            "a short outage may end the service",
            "an alarm returns again and again",
        ),
        ("measure the voltage", "read the age of the battery", "test it under load", "check the charger"),
        ("replace the battery", "cool the room", "set the right charging voltage"),
    ),
    Topic(
        "clock loss",
        "the site no longer follows the common time",
        (
            "a bad satellite antenna",
            "a broken link to the master clock",
            "a wrong setting",
            "a software error",
        ),
        ("cells disturb each other", "handovers fail", "logs show wrong times"),
        (
            "look at the antenna",
            "check the link to the master",
            "compare the time of two sites",
            "read the log",
        ),
        ("reset the clock", "use the spare time source", "correct the setting"),
    ),
    Topic(
        "a full disk",
        "there is no room for new data",
        ("old logs", "large traces", "a backup that was never moved", "a program that writes too much"),
        ("new logs are lost", "updates fail", "services stop without warning"),
        (
            "list the largest files",
            "look at the age of the logs",
            "check the backup",
            "see which program writes",
        ),
        ("delete old logs", "move the backup", "limit the size of the logs"),
    ),
    Topic(
        "an overloaded cell",
        "more users ask for data than the cell can serve",
        ("a public event", "a neighbor cell that is down", "growth in the area", "a wrong handover setting"),
        ("everyone gets less speed", "new calls are refused", "the processor runs hot"),
        (
            "count the users",
            "look at the neighbor cells",
            "read the load of the last week",
            "check the settings",
        ),
        ("move users to a neighbor cell", "add a carrier", "give urgent traffic priority"),
    ),
    Topic(
        "a link failure",
        "two sites can no longer talk to each other",
        ("a cut cable", "a dead port", "a failed router", "rain on a radio link"),
        ("traffic takes a longer route", "some sites are cut off", "the other links fill up"),
        ("check both ports", "look at the light level", "ask the far site", "read the log of the router"),
        ("use the backup link", "restart the port", "send a crew to the cable"),
    ),
    Topic(
        "an expired certificate",
        "a proof of identity is past its date",
        ("a missed reminder", "a wrong clock", "a failed renewal", "an unknown owner"),
        ("logins fail", "nodes refuse to talk", "updates are rejected"),
        ("read the date of the certificate", "check the clock", "look for the owner", "test the renewal"),
        ("renew the certificate", "correct the clock", "automate the renewal"),
    ),
    Topic(
        "a software update",
        "a new version is brought to the nodes in small steps",
        ("known errors", "security holes", "new functions", "the end of support"),
        ("a node restarts", "the service pauses for a short time", "settings may change"),
        ("save the settings", "test one node first", "choose a quiet hour", "check the free space"),
        ("go back to the old version", "repeat the failed step", "update the next group of nodes"),
    ),
    Topic(
        "an edge server",
        "a small computer near the users answers requests on the spot",
        ("short delays", "private data", "a slow line to the center", "local control"),
        ("answers arrive sooner", "less traffic leaves the site", "work goes on when the line is cut"),
        ("check the processor", "check the memory", "check the temperature", "check the free space"),
        ("restart the service", "use a smaller model", "move some work to the center"),
    ),
    Topic(
        "an antenna fault",
        "the antenna sends some of the power back",
        ("water in a connector", "a bent element", "a damaged cable", "ice"),
        ("the range shrinks", "the radio protects itself", "users at the border lose service"),
        ("measure the reflected power", "look at the connector", "inspect the antenna", "check the cable"),
        ("dry the connector", "replace the cable", "align the antenna again"),
    ),
)

EXPLAIN = (
    "Explain {t}.",
    "What is {t}?",
    "Tell me about {t}.",
    "Write a short text about {t}.",
    "Why does {t} matter?",
    "Describe {t} in a few sentences.",
    "Can you explain {t} to a new colleague?",
    "How do we deal with {t}?",
    "Please write a paragraph about {t}.",
    "What should a team know about {t}?",
    "Give me an overview of {t}.",
    "Explain in detail how {t} affects a site.",
    "What causes {t} and what can we do?",
    "We have {t}. Any advice?",
)
CHECKLIST = (
    "Write a checklist for {t}.",
    "List the steps for {t}.",
    "Give me a step by step plan for {t}.",
    "Make a list of checks for {t}.",
    "Draft a procedure for {t}.",
    "Which steps do you suggest for {t}?",
)
SUMMARY = (
    "Summarize the state.",
    "Write a short report.",
    "Give me a summary.",
    "Describe the situation.",
    "Write a note for the next shift.",
    "Explain what we see.",
)


def sentence_what(t: Topic, rng: random.Random) -> str:
    """Define the subject."""
    return rng.choice(
        (
            f"{cap(t.name)} means that {t.what}.",
            f"We speak of {t.name} when {t.what}.",
            f"In the case of {t.name}, {t.what}.",
            f"With {t.name}, {t.what}.",
        )
    )


def sentence_causes(t: Topic, rng: random.Random) -> list[str]:
    """Name the causes, in two sentences."""
    a, b, c = rng.sample(t.causes, 3)
    return [
        rng.choice((f"The usual reason is {a}.", f"Most often it comes from {a}.", f"A common reason is {a}.")),
        rng.choice(
            (
                f"Other reasons are {b} and {c}.",
                f"It can also come from {b} or {c}.",
                f"Sometimes {b} or {c} plays a part.",
            )
        ),
    ]


def sentence_effects(t: Topic, rng: random.Random) -> list[str]:
    """Name the effects."""
    a, b, *_ = rng.sample(t.effects, 3)
    return [
        rng.choice(
            (
                f"As a result, {a}, and {b}.",
                f"This matters because {a}.",
                f"In practice {a}.",
                f"After a while {a}, and then {b}.",
            )
        )
    ]


def sentence_checks(t: Topic, rng: random.Random) -> list[str]:
    """Name the checks, in two sentences."""
    a, b, c = rng.sample(t.checks, 3)
    return [
        rng.choice((f"First {a}, then {b}.", f"Start with a simple step: {a}.", f"To find the reason, {a} and {b}.")),
        rng.choice((f"If this shows nothing, {c}.", f"After that, {c}.", f"It also helps to {c}.")),
    ]


def sentence_fixes(t: Topic, rng: random.Random) -> list[str]:
    """Name the fixes, in two sentences."""
    a, b = rng.sample(t.fixes, 2)
    return [
        rng.choice((f"In most cases it is enough to {a}.", f"The best remedy is to {a}.", f"Then {a}.")),
        rng.choice((f"If that does not help, {b}.", f"Another way is to {b}.", f"If time is short, {b}.")),
    ]


CLOSING = (
    "Write down what you did and when.",
    "Tell the next shift what you found.",
    "Watch the site for an hour afterwards.",
    "Clear the alarm only when the values are back to normal.",
    "Plan a visit if the problem returns.",
    "Keep a spare part at the site.",
    "A short note in the log saves time later.",
    "Ask for help if the cause is not clear.",
)


def explanation(t: Topic, rng: random.Random) -> str:
    """A paragraph of 60 to 150 words."""
    parts = [sentence_what(t, rng), *sentence_causes(t, rng), *sentence_effects(t, rng)]
    if rng.random() < 0.85:
        parts += sentence_checks(t, rng)
    if rng.random() < 0.85:
        parts += sentence_fixes(t, rng)
    return " ".join([*parts, *rng.sample(CLOSING, rng.choice((1, 2)))])


def checklist(t: Topic, rng: random.Random) -> str:
    """Numbered steps, one per line."""
    steps = [*rng.sample(t.checks, rng.choice((2, 3, 4))), *rng.sample(t.fixes, rng.choice((1, 2, 3)))]
    lines = [f"{i}. {cap(step)}." for i, step in enumerate([*steps, "write down what you did"], 1)]
    head = rng.choice((f"Steps for {t.name}:", f"Here is a list for {t.name}:", "Do this in order:"))
    return "\n".join([head, *lines])


def summary(rng: random.Random) -> tuple[str, str]:
    """Figures of one metric, and a report that repeats and judges them."""
    m, n = rng.choice(METRICS), rng.choice((2, 3, 4))
    sites = rng.sample(SITES, n)
    limit, *values = spread(rng, n + 1)
    facts = " ".join(f"{s} has a {m.name} of {v} {m.unit}." for s, v in zip(sites, values, strict=True))
    over = [s for s, v in zip(sites, values, strict=True) if v > limit]
    lines = [f"The limit for {m.name} is {limit} {m.unit}."]
    lines += [
        f"{s} is at {v} {m.unit}, which is {'over' if v > limit else 'within'} the limit."
        for s, v in zip(sites, values, strict=True)
    ]
    if over:
        lines.append(f"So {join(over)} {'needs' if len(over) == 1 else 'need'} attention.")
        lines.append(rng.choice(("Please send a crew.", "Check again in an hour.", "Inform the next shift.")))
    else:
        lines.append("So no site needs attention.")
    return f"{facts} The limit for {m.name} is {limit} {m.unit}.", " ".join(lines)


def join(names: list[str]) -> str:
    """A, B and C."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


SMALL_TALK = (
    (("Hello.", "Hi.", "Good morning.", "Hello there."), "Hello. How can I help you with your network?"),
    (("Thank you.", "Thanks.", "Thanks a lot.", "Great, thanks."), "You are welcome."),
    (
        ("Who are you?", "What are you?", "What is your name?"),
        "I am promptai-tiny, a very small model for tests.",
    ),
    (("Goodbye.", "Bye.", "See you."), "Goodbye."),
    (
        ("What can you do?", "How can you help me?"),
        "I can answer short questions about sites, alarms and links.",
    ),
    (("Are you there?", "Can you hear me?"), "Yes, I am here."),
)
WORDS = words(
    "plan report customer factory hospital farm ship train school city group project budget contract "
    "model data memory software token answer prompt device night winter summer minute hour week month "
    "year first second new large small quick slow important useful strange simple difficult please also "
    "maybe because while before after during between people team user phone camera water air road house "
    "room table paper color number letter story"
)


def babble(rng: random.Random) -> str:
    """Meaningless words, to train a sensible answer to unknown input."""
    chosen = rng.choices(WORDS, k=rng.randint(3, 12))
    return cap(" ".join(chosen)) + "."


def open_turn(rng: random.Random) -> tuple[str, str]:
    """An open request and its longer answer."""
    t, roll = rng.choice(TOPICS), rng.random()
    if roll < 0.5:
        ask, answer = rng.choice(EXPLAIN).format(t=t.name), explanation(t, rng)
    elif roll < 0.75:
        ask, answer = rng.choice(CHECKLIST).format(t=t.name), checklist(t, rng)
    else:
        facts, answer = summary(rng)
        ask = f"{facts} {rng.choice(SUMMARY)}"
    extra = rng.random()
    if extra < 0.2:
        ask = f"{babble(rng)} {ask}"
    elif extra < 0.3:
        ask = f"{rng.choice(PEOPLE)} asks on {rng.choice(DAYS)}: {ask}"
    return ask, answer
