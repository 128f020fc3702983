"""The house rules as functions of a module's text, so that each can be shown to fail."""

import ast
import re
from collections.abc import Iterator

MOST_LINES = 400
MOST_FUNCTION_LINES = 60
#: What allows a module to be longer; a comment of its own line.
_REASON = re.compile(r"^# Longer than 400 lines: \S", re.MULTILINE)
_TODO = re.compile(r"\b(?:TODO|FIXME|XXX)\b(?!\s?\(?#\d+)")
#: Calls that keep an iterable empty only where their arguments are.
_WRAPPERS = {"enumerate", "list", "range", "reversed", "sorted", "zip"}


def is_too_long(text: str) -> bool:
    """Whether a module exceeds its limit without a reason beside it."""
    return len(text.splitlines()) > MOST_LINES and not _REASON.search(text)


def long_functions(text: str) -> list[str]:
    """Names of the functions that exceed their limit."""
    functions = (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    return [f.name for f in functions if (f.end_lineno or f.lineno) - f.lineno >= MOST_FUNCTION_LINES]


def lacks_an_issue(line: str) -> bool:
    """Whether a line holds a TODO, FIXME or XXX without the number of an issue right behind it: ``TODO(#12)``."""
    return _TODO.search(line) is not None


def hollow_tests(text: str) -> list[str]:
    """
    Names of the tests that pass when a computed collection is empty.

    All their assertions are inside ``for`` loops over something that is not a literal.
    """
    tests = (n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    return [test.name for test in tests if test.name.startswith("test_") and _is_hollow(test)]


def _is_hollow(test: ast.AST) -> bool:
    loops = (n for n in ast.walk(test) if isinstance(n, ast.For | ast.AsyncFor) and not _is_filled(n.iter))
    inside = {check for loop in loops for statement in loop.body for check in _checks(statement)}
    return bool(inside) and inside == set(_checks(test))


def _checks(node: ast.AST) -> Iterator[ast.AST]:
    """Assertions, ``pytest.raises`` and its kin, and calls of functions named ``assert...``."""
    for found in ast.walk(node):
        if isinstance(found, ast.Assert):
            yield found
        elif isinstance(found, ast.Call):
            name = ast.unparse(found.func)
            if name in {"pytest.raises", "pytest.warns", "pytest.fail"} or name.startswith("assert"):
                yield found


def _is_filled(iterable: ast.expr) -> bool:
    """Whether the text alone shows that an iterable has an element."""
    match iterable:
        case ast.Tuple(elts=items) | ast.List(elts=items) | ast.Set(elts=items):
            return any(not isinstance(item, ast.Starred) for item in items)
        case ast.Dict(keys=keys):
            return any(key is not None for key in keys)
        case ast.Constant(value=value):
            return bool(value)
        case ast.Call(func=ast.Attribute(value=ast.Dict() as whole, attr="items" | "keys" | "values")):
            return _is_filled(whole)
        case ast.Call(func=ast.Name(id=name), args=[_, *_] as arguments) if name in _WRAPPERS:
            return all(map(_is_filled, arguments))
    return False
