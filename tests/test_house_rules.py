"""The limits of the house, so that nobody has to be told: sizes, and what may stand in a file."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    path for folder in ("src", "tests", "training", "docs", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_has_at_most_400_lines_and_its_functions_60(path: Path) -> None:
    text = path.read_text()
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]

    assert len(text.splitlines()) <= 400
    assert [f.name for f in functions if (f.end_lineno or 0) - f.lineno >= 60] == []


def test_every_module_of_the_product_begins_with_its_promise() -> None:
    modules = [path for path in MODULES if ROOT / "src" in path.parents]

    assert len(modules) > 50
    assert [path.name for path in modules if not ast.get_docstring(ast.parse(path.read_text()))] == []


def test_no_tracked_file_names_a_todo_without_an_issue() -> None:
    command = ["git", "grep", "-nIE", r"\b(TODO|FIXME|XXX)\b", "--", "src", "tests", "training", "docs"]
    found = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)

    assert [line for line in found.stdout.splitlines() if "test_house_rules" not in line and "#" not in line] == []
