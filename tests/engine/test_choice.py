from itertools import permutations
from pathlib import Path

import pytest

from promptai.engine.choice import (
    Candidate,
    Comparison,
    MeasuredEngine,
    Round,
    arrange,
    processor_key,
    read_choice,
    read_comparison,
    still_valid,
    write_choice,
    write_comparison,
)

NEW, OLD, PATH, WHEEL = (Candidate(name, f"print of {name}") for name in ("new", "old", "PATH", "embedded"))
NAMED = Candidate("settings", "print of settings", named=True)


def compared(*fastest_first: Candidate, cpu: str = "cpu") -> Comparison:
    engines = [MeasuredEngine(e.name, e.name, e.fingerprint or "", [Round(2.0, 1.0)]) for e in fastest_first]
    return Comparison(
        created="2026-11-21", cpu=cpu, threads=2, model="m", prompt_tokens=9, generated_tokens=9, engines=engines
    )


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"engine": 3}', b"\xff\xfe", b"[" * 10_000])
def test_ignores_a_damaged_file(tmp_path: Path, content: bytes) -> None:
    """Both files can be made again."""
    (tmp_path / "choice.json").write_bytes(content)
    (tmp_path / "comparison.json").write_bytes(content)

    assert read_choice(tmp_path) is None
    assert read_comparison(tmp_path) is None


def test_stores_choice_and_comparison_and_forgets_the_choice(tmp_path: Path) -> None:
    """Files are replaced as a whole, and no temporary file remains."""
    folder = tmp_path / "engines"

    write_choice(folder, "mine")
    write_comparison(folder, compared(NEW, WHEEL))

    assert read_choice(folder) == "mine"
    assert read_comparison(folder) == compared(NEW, WHEEL)
    assert sorted(path.name for path in folder.iterdir()) == ["choice.json", "comparison.json"]
    write_choice(folder, None)
    write_choice(folder, None)
    assert read_choice(folder) is None


@pytest.mark.parametrize(
    ("found", "chosen", "comparison", "expected"),
    [
        pytest.param([NEW, OLD, PATH, WHEEL], None, None, "new old PATH embedded", id="usual-order"),
        pytest.param([NAMED, NEW, WHEEL], "embedded", compared(WHEEL, NEW), "settings embedded new", id="named-first"),
        pytest.param([NEW, OLD, WHEEL], "old", None, "old new embedded", id="chosen"),
        pytest.param([NEW, OLD, WHEEL], "old", compared(WHEEL, OLD, NEW), "old embedded new", id="chosen-and-compared"),
        pytest.param([NEW, WHEEL], "gone", None, "new embedded", id="chosen-has-gone"),
        pytest.param([NEW, OLD, WHEEL], None, compared(WHEEL, OLD, NEW), "embedded old new", id="compared"),
        pytest.param([NEW, OLD, WHEEL], None, compared(WHEEL, OLD), "new embedded old", id="newest-not-compared"),
        pytest.param([NEW, OLD, WHEEL], None, compared(WHEEL, NEW), "embedded old new", id="one-between-not-compared"),
        pytest.param([NEW, WHEEL], None, compared(WHEEL, NEW, cpu="other"), "new embedded", id="another-processor"),
        pytest.param([NEW, WHEEL], None, compared(WHEEL, OLD), "new embedded", id="compared-with-what-has-gone"),
        pytest.param([NEW._replace(works=False), OLD], None, None, "old new", id="does-not-start"),
        pytest.param([NEW._replace(works=False), OLD], "new", None, "old new", id="chosen-does-not-start"),
        pytest.param(
            [NEW._replace(works=False), OLD, WHEEL],
            None,
            compared(NEW, WHEEL, OLD),
            "embedded old new",
            id="compared-does-not-start",
        ),
        pytest.param([NAMED._replace(works=False), NEW], None, None, "settings new", id="named-does-not-start"),
    ],
)
def test_order_is_named_chosen_measured_default(
    found: list[Candidate], chosen: str | None, comparison: Comparison | None, expected: str
) -> None:
    places = arrange(found, chosen=chosen, comparison=comparison, cpu="cpu")

    assert expected.split() == [found[place.number].name for place in places]
    assert all(place.reason for place in places)


@pytest.mark.parametrize("order", list(permutations((NEW, OLD, WHEEL))))
def test_every_engine_has_exactly_one_place(order: tuple[Candidate, ...]) -> None:
    """Whatever was chosen or measured."""
    for chosen in (None, *(engine.name for engine in order)):
        for comparison in (None, compared(*order), compared(*order[1:])):
            places = arrange([NEW, OLD, WHEEL], chosen=chosen, comparison=comparison, cpu="cpu")

            assert sorted(place.number for place in places) == [0, 1, 2]


def test_a_rebuilt_engine_leaves_the_comparison() -> None:
    """The others keep their order."""
    comparison = compared(WHEEL, NEW, OLD)

    found = still_valid(comparison, "cpu", [NEW._replace(fingerprint="another"), OLD, WHEEL])

    assert found == ["embedded", "old"]
    assert still_valid(comparison, "cpu", [WHEEL, NEW._replace(fingerprint=None)]) == []
    assert still_valid(None, "cpu", [WHEEL, NEW]) == []


def test_a_processor_that_lost_a_feature_is_another_one() -> None:
    """For example a virtual machine that was moved to an older host of the same name."""
    assert processor_key("EPYC", ("AVX2", "AVX512")) != processor_key("EPYC", ("AVX2",))
