"""The nouns and facts of the small world: one table each, so that text, questions and answers agree.

Names are short common words, because a two-million-weight model learns a name best when it is one token.
"""

from __future__ import annotations

from dataclasses import dataclass


def words(text: str) -> tuple[str, ...]:
    """The words of a text; shorter to read and to write than a list of strings."""
    return tuple(text.split())


SITES = words(
    "Harbor Hill Lake Mill North South East West River Bridge Park Station Tower Market Castle Forest "
    "Valley Airport Garden Beach Church School Stadium Museum"
)
PEOPLE = words("Anna Ben Clara David Emma Frank Grace Henry Iris Jack Karen Leo Maria Nina Oscar Paul")
DAYS = words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
SINGULAR = words("router switch modem server battery antenna radio camera pump rectifier gateway heater")
PLURAL = words("fans cables filters sensors doors lamps panels ports meters masts")
NUMBER_WORDS = ("None", "One", "Two", "Three", "Four")


@dataclass(frozen=True)
class Metric:
    """A measured quantity: its name in running text and its unit."""

    name: str
    unit: str


METRICS = (
    Metric("temperature", "C"),
    Metric("latency", "ms"),
    Metric("packet loss", "percent"),
    Metric("load", "percent"),
    Metric("humidity", "percent"),
    Metric("jitter", "ms"),
    Metric("voltage", "V"),
    Metric("traffic", "Mbps"),
)


@dataclass(frozen=True)
class Alarm:
    """An alarm code with everything the world knows about it."""

    code: str
    meaning: str
    action: str
    severity: str
    part: str
    effect: str


ALARMS = (
    Alarm("LOS", "loss of signal", "Check the cable", "critical", "cable", "Calls will drop"),
    Alarm("HTEMP", "high temperature", "Clean the filter", "major", "filter", "The radio will slow down"),
    Alarm("LDOWN", "link down", "Check the port", "critical", "port", "Traffic will stop"),
    Alarm("PLOSS", "high packet loss", "Test the link", "major", "link", "Video will break up"),
    Alarm("LBAT", "low battery", "Charge the battery", "minor", "battery", "The site will lose its backup"),
    Alarm("PFAIL", "power failure", "Start the generator", "critical", "generator", "The site will go dark"),
    Alarm("FANF", "fan failure", "Replace the fan", "major", "fan", "The temperature will rise"),
    Alarm("HLAT", "high latency", "Check the route", "minor", "router", "Games will lag"),
    Alarm("SYNC", "clock lost", "Reset the clock", "major", "clock", "Cells will drift"),
    Alarm("VSWR", "antenna mismatch", "Inspect the antenna", "minor", "antenna", "The range will shrink"),
    Alarm("DOOR", "open door", "Close the door", "warning", "door", "Water may get in"),
    Alarm("CPUH", "processor overload", "Move some traffic", "minor", "server", "Answers will be late"),
    Alarm("DISK", "full disk", "Delete old logs", "warning", "disk", "New logs will be lost"),
    Alarm("CERT", "expired certificate", "Renew the certificate", "warning", "certificate", "Logins will fail"),
)

SYSTEMS = (
    "You are a helpful assistant for a network edge.",
    "Answer briefly.",
    "You help operators of radio sites.",
    "Use short answers.",
    "You are a network assistant.",
    "Be concise and precise.",
    "You answer questions about an edge network.",
)
NOISE = (
    "It rained last night.",
    "The crew had lunch at noon.",
    "The road to the site is closed.",
    "A new manual came by mail.",
    "The shift was quiet.",
    "We had visitors today.",
    "The phone rang twice.",
    "The report is not finished.",
    "The gate key is in the office.",
    "The weather is fine.",
    "The van needs fuel.",
    "Nobody called in the morning.",
    "The meeting moved to next week.",
    "The coffee machine is new.",
)
NOTED = ("Noted.", "Understood.", "OK.", "Thanks, noted.")
