"""Count the habits of prose that make this code hard to read, in the docstrings of the package.

A sentence about ``whoever`` or ``nobody`` hides its subject, a program that ``tells`` or ``says`` hides what it does
(it reports, returns, declares), and a clause that begins with ``Of`` makes the reader wait for its verb. Each habit is
counted per 1,000 words of docstrings in ``src/``, and has a limit; so have public class names that mean two things.
``tests/test_house_rules.py`` keeps the limits, ``python docs/prose.py`` prints the counts and, with ``-v``, each hit.

It counts words, not meaning: ``say`` of a person counts, too.
"""

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SOURCES = Path(__file__).parents[1] / "src"
#: Habit: pattern, and how often it may occur in 1,000 words.
HABITS: dict[str, tuple[re.Pattern[str], float]] = {
    "vague subjects": (re.compile(r"\b(?:whoever|whomever|nobody|somebody|everybody)\b", re.IGNORECASE), 0.1),
    "programs that talk": (re.compile(r"\b(?:tells?|told|telling|say|says|said|saying)\b", re.IGNORECASE), 0.5),
    "clauses beginning with Of": (re.compile(r"(?:^|[.:;]\s+|\n\s*\n\s*)Of\b|[.:;] of\b"), 0.0),
}


class Hit(NamedTuple):
    """One occurrence of a habit: the file, the line and the words around it."""

    path: Path
    line: int
    words: str


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """First line and text of every docstring of a module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield node.body[0].lineno, text


def count(sources: Path = SOURCES) -> tuple[int, dict[str, list[Hit]]]:
    """Words of all docstrings under ``sources``, and the hits of each habit."""
    words, hits = 0, {name: list[Hit]() for name in HABITS}
    for path in sorted(sources.rglob("*.py")):
        for line, text in docstrings(path):
            words += len(text.split())
            for name, (pattern, _) in HABITS.items():
                for found in pattern.finditer(text):
                    around = " ".join(text[max(0, found.start() - 40) : found.end() + 40].split())
                    hits[name].append(Hit(path, line + text.count("\n", 0, found.end()), around))
    return words, hits


def duplicate_classes(sources: Path = SOURCES) -> dict[str, list[Path]]:
    """Public class names that more than one module defines, with those modules."""
    places: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(sources.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(path)
    return {name: paths for name, paths in sorted(places.items()) if len(paths) > 1}


def main() -> int:
    """Print the counts; 1 when a limit is exceeded."""
    words, hits = count()
    print(f"{words:,} words of docstrings in {SOURCES.name}/")
    exceeded = False
    for name, (_, limit) in HABITS.items():
        rate = 1000 * len(hits[name]) / words
        exceeded |= rate > limit
        print(f"{name:26} {len(hits[name]):4}  {rate:5.2f} per 1,000 words (limit {limit:g})")
        for hit in hits[name] if "-v" in sys.argv[1:] else ():
            print(f"    {hit.path.relative_to(SOURCES.parent)}:{hit.line}: {hit.words}")
    duplicates = duplicate_classes()
    for name, paths in duplicates.items():
        print(f"    class {name}: {', '.join(str(path.relative_to(SOURCES)) for path in paths)}")
    print(f"{'duplicate public classes':26} {len(duplicates):4}  (limit 0)")
    return int(exceeded or bool(duplicates))


if __name__ == "__main__":
    sys.exit(main())
