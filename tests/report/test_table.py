from io import StringIO

import pytest
from msgspec.structs import replace
from rich.console import Console

from promptai.bench.summary import RecordedRun, summarize
from promptai.report.rows import ROWS
from promptai.report.table import print_summary
from support_runs import COST, FACTS, MODEL, make_failure, make_manifest, make_run, talk

RUN = make_run()


def printed(run: RecordedRun) -> str:
    """What a wide terminal shows."""
    out = StringIO()
    print_summary(summarize(run), Console(file=out, width=200))
    return out.getvalue()


def named(run: RecordedRun, name: str) -> RecordedRun:
    """The same run, its target called otherwise."""
    facts = replace(FACTS, name=name)
    return replace(
        run,
        manifest=replace(run.manifest, targets=(facts,)),
        traces=[replace(trace, target=name) for trace in run.traces],
    )


@pytest.mark.parametrize("name", ["a[/b]", "[red]a", "a[bold"])
def test_a_name_is_shown_as_it_is_whatever_it_looks_like(name: str) -> None:
    assert f"{name}\n" in printed(named(RUN, name)).replace(" \n", "\n").replace(" ", "")


def test_an_unfinished_run_says_so() -> None:
    unfinished = printed(replace(RUN, traces=RUN.traces[:-1]))

    assert "not complete" in unfinished
    assert "not complete" not in printed(RUN)


def test_failures_are_counted_and_doubted() -> None:
    shown = printed(replace(RUN, traces=[*RUN.traces[:-1], make_failure(conversation="c5", turn=4, cache="warm")]))

    assert "1 failed" in shown
    assert "doubt  1 of 60 requests failed (EngineDied)" in shown


def test_a_target_without_requests_is_named_all_the_same() -> None:
    """A table without columns must not squeeze the name into four letters a line."""
    absent = replace(FACTS, name="never-reached")
    manifest = make_manifest([talk("a", "one")], [absent])

    assert "never-reached" in printed(replace(RUN, manifest=manifest, traces=[], samples=[], events=[]))


def test_every_row_of_a_whole_run_is_shown_with_its_count() -> None:
    shown = printed(RUN)

    assert [label for label in ROWS.values() if label not in shown] == []
    assert "cold (n = 30)" in shown
    assert "warm (n = 30)" in shown
    assert "loaded in 2.00 s" in " ".join(shown.split())


def test_what_was_not_measured_has_no_row() -> None:
    shown = printed(make_run(with_telemetry=False))

    assert ROWS["decode_tps"] in shown
    assert ROWS["temperature_c_max"] not in shown


def test_synthetic_weights_stand_in_the_title() -> None:
    facts = replace(FACTS, model=replace(MODEL, synthetic=True))
    shown = printed(replace(RUN, manifest=replace(RUN.manifest, targets=(facts,))))

    assert "m (synthetic weights)" in shown
    assert "note" in shown


def test_the_cost_of_measuring_is_shown() -> None:
    assert "measuring took 1.50 % of one core, 47.7 MiB for the client and 17.2 MiB for telemetry" in printed(RUN)
    silent = replace(COST, telemetry_cpu_s=None, telemetry_wall_s=None)
    assert "measuring took – of one core" in printed(replace(RUN, events=[silent]))
