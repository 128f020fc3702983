"""The limits of the house: sizes, tests that cannot fail, and the prose (``docs/prose.py``)."""

import ast
import subprocess
from pathlib import Path

import pytest
from docs.prose import HABITS, count, duplicate_classes

from support_house_rules import MOST_LINES, hollow_tests, is_too_long, lacks_an_issue, long_functions

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    path for folder in ("src", "tests", "training", "docs", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)
TESTS = [path for path in MODULES if path.name.startswith("test_")]


def named(path: Path) -> str:
    """The ID of a case: the file below the repository's root."""
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", MODULES, ids=named)
def test_a_module_has_at_most_400_lines_and_its_functions_60(path: Path) -> None:
    text = path.read_text()

    assert not is_too_long(text)
    assert long_functions(text) == []


def test_a_long_module_needs_a_reason_beside_it() -> None:
    longest = "x = 1\n" * MOST_LINES

    assert not is_too_long(longest)
    assert is_too_long(longest + "x = 1\n")
    assert is_too_long(longest + "# Longer than 400 lines:\n")
    assert not is_too_long(longest + "# Longer than 400 lines: one table of a standard\n")


@pytest.mark.parametrize(("lines", "found"), [(60, []), (61, ["f"])])
def test_a_long_function_is_found(lines: int, found: list[str]) -> None:
    assert long_functions("def f():\n" + "    pass\n" * (lines - 1)) == found


def test_every_module_of_the_product_begins_with_its_promise() -> None:
    modules = [path for path in MODULES if ROOT / "src" in path.parents]

    assert len(modules) > 50
    assert [path.name for path in modules if not ast.get_docstring(ast.parse(path.read_text()))] == []


def test_every_todo_names_an_issue() -> None:
    here = ("src", "tests", "training", "docs", "benchmarks", ":!tests/*house_rules.py")
    command = ["git", "grep", "-nIE", r"\b(TODO|FIXME|XXX)\b", "--", *here]
    found = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)

    assert found.returncode in {0, 1}, found.stderr
    assert [line for line in found.stdout.splitlines() if lacks_an_issue(line)] == []


@pytest.mark.parametrize(
    ("line", "lacking"),
    [
        ("x = 1  # TODO: later", True),
        ("# FIXME", True),
        ("# XXX see issue 12", True),
        ("# TODO later, as #12 does", True),
        ("# TODO(#12): later", False),
        ("x = 1  # TODO #12: later", False),
        ("TODOS = XXXL  # nothing to do", False),
    ],
)
def test_a_todo_without_an_issue_is_found(line: str, lacking: bool) -> None:  # noqa: FBT001
    assert lacks_an_issue(line) == lacking


@pytest.mark.parametrize("path", TESTS, ids=named)
def test_no_test_passes_because_a_collection_is_empty(path: Path) -> None:
    assert hollow_tests(path.read_text()) == []


@pytest.mark.parametrize(
    ("body", "hollow"),
    [
        ("for x in found(): assert x", True),
        ("for x in [*found()]: assert x", True),
        ("for n, x in enumerate(found()): assert x", True),
        ("for x in found():\n        with pytest.raises(ValueError): x()", True),
        ("for x in found():\n        for y in (1, 2): assert x == y", True),
        ("assert found()\n    for x in found(): assert x", False),
        ("for x in (1, *found()): assert x", False),
        ("for n, x in enumerate({'a': 1}.items()): assert x", False),
        ("for x in range(3): assert x", False),
        ("for x in found():\n        if x: return\n    pytest.fail('none')", False),
        ("for x in found(): x()", False),
        ("assert 1", False),
    ],
)
def test_a_test_that_may_assert_nothing_is_found(body: str, hollow: bool) -> None:  # noqa: FBT001
    assert hollow_tests(f"def test_it():\n    {body}\n") == (["test_it"] if hollow else [])


@pytest.mark.parametrize("habit", HABITS)
def test_docstrings_keep_the_limit_of_each_habit(habit: str) -> None:
    words, hits = count()

    assert words > 10_000
    assert 1000 * len(hits[habit]) / words <= HABITS[habit][1]


def test_a_public_class_name_means_one_thing() -> None:
    assert duplicate_classes() == {}


def test_habits_and_duplicates_are_counted(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text(
        '"""Nobody knows; of these, one.\n\nOf all.\n"""\n\n\nclass Work:\n    """It tells what Bob said."""\n'
    )
    (tmp_path / "two.py").write_text('class Work:\n    """Most of all."""\n\n\nclass _Private: ...\n')
    (tmp_path / "three.py").write_text("# Nobody says\nclass _Private: ...\n")

    words, hits = count(tmp_path)

    assert words == 15
    assert {habit: [(hit.path.name, hit.line) for hit in found] for habit, found in hits.items()} == {
        "vague subjects": [("one.py", 1)],
        "programs that talk": [("one.py", 8), ("one.py", 8)],
        "clauses beginning with Of": [("one.py", 1), ("one.py", 3)],
    }
    assert duplicate_classes(tmp_path) == {"Work": [tmp_path / "one.py", tmp_path / "two.py"]}
