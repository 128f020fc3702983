"""What comes from outside, without what would steer a terminal: escapes, bells, marks that turn the writing round."""

import unicodedata

#: Joiners hold letters of Persian and Hindi together, and the parts of an emoji.
_HARMLESS = "\n\t\u200c\u200d"


def strip_controls(text: str) -> str:
    """Somebody's words, such as a model's; what steers is left out."""
    return "".join(c for c in text if c.isprintable() or c in _HARMLESS or unicodedata.category(c) == "Zs")


def one_line(text: str) -> str:
    """A name or a reason, which stands in a line of ours; what steers is a question mark there."""
    return "".join(c if c.isprintable() else "?" for c in text)
