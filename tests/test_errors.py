import re

import pytest

from promptai import errors
from promptai.errors import EngineRefusedError, PromptAIError

#: Indentation, name and exit code (if it differs from the parent's) of each line of the drawn tree.
_DRAWN = re.compile(r"^ {4}([│├└─ ]*)(\w+Error)(?: +(\d+))?", re.MULTILINE)


def drawn() -> dict[str, tuple[str | None, int]]:
    """Parent and exit code by name, as drawn in the module's docstring."""
    tree: dict[str, tuple[str | None, int]] = {}
    path: list[str] = []
    for indent, name, code in _DRAWN.findall(errors.__doc__ or ""):
        path = path[: len(indent) // 4]
        parent = path[-1] if path else None
        tree[name] = (parent, int(code) if code else tree[parent or name][1])
        path.append(name)
    return tree


def family(root: type[PromptAIError]) -> list[type[PromptAIError]]:
    """A class and all its subclasses."""
    return [root, *(below for child in root.__subclasses__() for below in family(child))]


def test_the_drawn_tree_matches_the_classes() -> None:
    """Every class, its parent and its exit code."""
    ours = [kind for kind in family(PromptAIError) if kind.__module__ == errors.__name__]

    assert drawn() == {
        kind.__name__: (kind.__base__.__name__ if kind is not PromptAIError and kind.__base__ else None, kind.exit_code)
        for kind in ours
    }


def test_exit_codes_differ_from_success_and_from_signals() -> None:
    assert all(0 < kind.exit_code < 126 for kind in family(PromptAIError))


@pytest.mark.parametrize("kind", family(PromptAIError), ids=lambda kind: kind.__name__)
def test_every_class_has_a_docstring_of_its_own(kind: type[PromptAIError]) -> None:
    assert kind.__doc__
    assert kind.__doc__ != kind.__mro__[1].__doc__


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (PromptAIError("it broke"), "it broke"),
        (PromptAIError("it broke", hint="mend it"), "it broke (mend it)"),
        (EngineRefusedError("no", status=503, kind=None, hint="wait"), "no (wait)"),
    ],
    ids=["message", "hint", "refusal"],
)
def test_an_error_reads_as_one_line(error: PromptAIError, text: str) -> None:
    assert text == str(error)


def test_a_refusal_keeps_the_engine_s_message_and_kind() -> None:
    refusal = EngineRefusedError("too long", status=400, kind="exceed_context_size_error")

    assert (refusal.message, refusal.hint) == ("too long", "")
    assert (refusal.status, refusal.kind) == (400, "exceed_context_size_error")
