"""Make foreign text safe to print: without escapes, bells and marks that reverse the writing direction."""

import unicodedata

#: Joiners hold letters of Persian and Hindi together, and the parts of an emoji.
_HARMLESS = "\n\t\u200c\u200d"


def strip_controls(text: str) -> str:
    """Remove control characters from text such as a model's answer; line feeds and tabs stay."""
    return "".join(c for c in text if c.isprintable() or c in _HARMLESS or unicodedata.category(c) == "Zs")


def one_line(text: str) -> str:
    """Replace control characters by question marks, in a name or reason that is printed within a line."""
    return "".join(c if c.isprintable() else "?" for c in text)
