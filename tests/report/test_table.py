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
    """The output on a wide terminal."""
    out = StringIO()
    print_summary(summarize(run), Console(file=out, width=200))
    return out.getvalue()


def named(run: RecordedRun, name: str) -> RecordedRun:
    """The same run with another target name."""
    facts = replace(FACTS, name=name)
    return replace(
        run,
        manifest=replace(run.manifest, targets=(facts,)),
        traces=[replace(trace, target=name) for trace in run.traces],
    )


@pytest.mark.parametrize("name", ["a[/b]", "[red]a", "a[bold"])
def test_shows_markup_in_a_name_literally(name: str) -> None:
    assert f"{name}\n" in printed(named(RUN, name)).replace(" \n", "\n").replace(" ", "")


def test_warns_of_an_incomplete_run() -> None:
    unfinished = printed(replace(RUN, traces=RUN.traces[:-1]))

    assert "incomplete" in unfinished
    assert "incomplete" not in printed(RUN)


def test_counts_failures_and_warns_of_them() -> None:
    shown = printed(replace(RUN, traces=[*RUN.traces[:-1], make_failure(conversation="c5", turn=4, cache="warm")]))

    assert "1 requests failed" in shown
    assert "warning  1 of 60 requests failed (EngineDied)" in shown


def test_names_a_target_without_requests() -> None:
    """A table without columns must not wrap the name after four letters."""
    absent = replace(FACTS, name="never-reached")
    manifest = make_manifest([talk("a", "one")], [absent])

    assert "never-reached" in printed(replace(RUN, manifest=manifest, traces=[], samples=[], events=[]))


def test_shows_every_row_of_a_complete_run_with_its_count() -> None:
    shown = printed(RUN)

    assert [label for label in ROWS.values() if label not in shown] == []
    assert "cold (n = 30)" in shown
    assert "warm (n = 30)" in shown
    assert "loaded in 2.00 s" in " ".join(shown.split())


def test_omits_rows_without_values() -> None:
    shown = printed(make_run(with_telemetry=False))

    assert ROWS["decode_tps"] in shown
    assert ROWS["temperature_c_max"] not in shown


def test_the_title_mentions_synthetic_weights() -> None:
    facts = replace(FACTS, model=replace(MODEL, synthetic=True))
    shown = printed(replace(RUN, manifest=replace(RUN.manifest, targets=(facts,))))

    assert "m (synthetic weights)" in shown
    assert "note" in shown


def test_shows_the_cost_of_measuring() -> None:
    assert "measuring used 1.50 % of one core, 47.7 MiB for the client and 17.2 MiB for telemetry" in printed(RUN)
    silent = replace(COST, telemetry_cpu_s=None, telemetry_wall_s=None)
    assert "measuring used – of one core" in printed(replace(RUN, events=[silent]))
