import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from promptai.bench.manifest import TargetFacts
from promptai.bench.summary import RecordedRun, summarize
from promptai.errors import RunError
from promptai.report import figures
from promptai.report.figures import Figure, draw, thin, to_png, to_svg
from promptai.report.html import write_figures
from support_runs import make_failure, make_run

RUN = make_run()
ABOUT_ANSWERS = ["prompt-lengths", "throughput", "latency", "first-token", "steadiness"]
ABOUT_THE_MACHINE = ["memory", "cpu", "temperature"]


def drawn(run: RecordedRun) -> dict[str, Figure]:
    """Figures by name, in order."""
    return {figure.name: figure for figure in draw(run, summarize(run))}


def rows_of(figure: Figure) -> list[dict[str, Any]]:
    """The data of a figure."""
    (rows,) = figure.spec["datasets"].values()
    return list(rows)


@pytest.fixture(scope="module")
def whole() -> dict[str, Figure]:
    """The figures of a complete run."""
    return drawn(RUN)


def test_raises_run_error_if_figures_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "figures").touch()

    with pytest.raises(RunError, match="cannot write to"):
        write_figures(tmp_path, RUN, summarize(RUN))


def test_draws_nothing_if_every_request_failed() -> None:
    assert drawn(replace(RUN, traces=[make_failure()], samples=[])) == {}


def test_omits_the_figures_of_the_machine_without_telemetry() -> None:
    assert list(drawn(make_run(with_telemetry=False))) == ABOUT_ANSWERS


def test_omits_the_figures_of_this_machine_for_a_server_elsewhere() -> None:
    """The processor measured here is not the one that answers."""
    manifest = replace(RUN.manifest, targets=(TargetFacts("m", url="http://pi:8080"),))

    assert list(drawn(replace(RUN, manifest=manifest))) == ABOUT_ANSWERS


def test_omits_the_temperature_without_a_sensor() -> None:
    samples = [replace(sample, temperature_c=None) for sample in RUN.samples]

    assert [*ABOUT_ANSWERS, "memory", "cpu"] == list(drawn(replace(RUN, samples=samples)))


def test_draws_every_figure_of_a_complete_run(whole: dict[str, Figure]) -> None:
    assert [*ABOUT_ANSWERS, *ABOUT_THE_MACHINE] == list(whole)
    assert all(figure.title and figure.caption for figure in whole.values())


def test_a_figure_contains_its_data_and_fetches_nothing(whole: dict[str, Figure]) -> None:
    assert whole
    for figure in whole.values():
        assert rows_of(figure)
        assert '"url"' not in json.dumps(figure.spec)


def test_the_throughput_figure_shows_the_summary(whole: dict[str, Figure]) -> None:
    """The bars are the numbers of the table, with their intervals."""
    part = summarize(RUN).targets[0].warm
    assert part is not None
    metric = part.metrics["prefill_tps"]
    assert metric.ci95 is not None

    (bar,) = [row for row in rows_of(whole["throughput"]) if (row["cache"], row["rate"]) == ("warm", "prefill")]

    assert (metric.value, *metric.ci95, metric.n) == (bar["tps"], bar["low"], bar["high"], bar["n"])


def test_splits_memory_as_the_kernel_does(whole: dict[str, Figure]) -> None:
    assert {row["value"] for row in rows_of(whole["memory"]) if row["t"] == 0} == {200.0, 900.0}


@pytest.mark.parametrize("count", [0, 1, 1500, 1501, 3000, 100_000])
def test_thins_long_series_evenly(count: int) -> None:
    """A run of a day must not make a page of 100 MB."""
    kept = thin(range(count))
    steps = {after - before for before, after in pairwise(kept)}

    assert len(kept) <= figures._MOST_POINTS
    assert len(steps) <= 1
    assert (len(kept) == count) is (count <= figures._MOST_POINTS)


@pytest.mark.real
def test_every_figure_renders_as_an_image(tmp_path: Path) -> None:
    """The renderer takes a second or two to start."""
    written = write_figures(tmp_path, RUN, summarize(RUN))

    names = [f"{name}{suffix}" for name in (*ABOUT_ANSWERS, *ABOUT_THE_MACHINE) for suffix in (".svg", ".png")]
    assert [tmp_path / "figures" / name for name in names] == written
    for path in written:
        assert path.read_bytes().startswith(b"<svg" if path.suffix == ".svg" else b"\x89PNG")


@pytest.mark.real
def test_an_image_contains_its_axis_titles(whole: dict[str, Figure]) -> None:
    assert "prompt tokens, including history" in to_svg(whole["prompt-lengths"])
    assert len(to_png(whole["prompt-lengths"])) > 10_000
