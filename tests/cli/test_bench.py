"""How the command line becomes options; whole runs are in the other files of this directory."""

from pathlib import Path

import pytest
from click.testing import CliRunner

from promptai.bench.arrivals import Arrivals
from promptai.bench.options import BenchOptions
from promptai.cli import bench, demo
from promptai.cli.measure import OutputOptions
from promptai.errors import SettingsError


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[BenchOptions]:
    """The options of every run that would start, in a directory without settings."""
    found: list[BenchOptions] = []

    def start(options: BenchOptions, _output: OutputOptions) -> None:
        found.append(options)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "start", start)
    monkeypatch.setattr(demo, "start", start)
    return found


def run(*arguments: str) -> str:
    """The refusal of ``promptai bench``, or an empty string."""
    result = CliRunner().invoke(bench.bench, list(arguments))
    if isinstance(result.exception, SettingsError):
        return str(result.exception)
    assert result.exception is None, result.output
    return ""


def test_the_command_line_overrides_the_settings_where_given(started: list[BenchOptions]) -> None:
    Path("promptai.toml").write_text("[bench]\nseed = 7\nrepeats = 3\n[engine]\nthreads = 2\n")

    run("a.gguf", "http://pi:8080", "--seed=0", "--cache=warm")
    run("--budget=30m", "--arrivals=constant:0.2", "--timeout=5")

    first, second = started
    assert (first.targets, first.seed, first.caches) == (("a.gguf", "http://pi:8080"), 0, ("warm",))
    assert (first.repeats, first.threads) == (3, 2)
    assert (second.budget_s, second.arrivals, second.silence_s) == (1800.0, Arrivals("constant", 0.2), 5.0)
    assert second.seed == 7


@pytest.mark.parametrize(
    ("arguments", "slots"), [([], 2), (["--concurrency=4"], 4), (["--concurrency=4", "--slots=1"], 1)]
)
def test_there_is_a_slot_for_every_conversation_by_default(
    arguments: list[str], slots: int, started: list[BenchOptions]
) -> None:
    Path("promptai.toml").write_text("[engine]\nslots = 2\n")

    run(*arguments)

    assert [options.slots for options in started] == [slots]


def test_the_demo_ignores_the_protocol_of_the_settings(started: list[BenchOptions]) -> None:
    Path("promptai.toml").write_text("[bench]\nrepeats = 3\n[engine]\nthreads = 2\n")

    assert CliRunner().invoke(demo.demo).exit_code == 0

    (options,) = started
    assert (options.conversations, options.repeats, options.threads) == (10, 1, 2)


@pytest.mark.parametrize("value", ["zz", "constant", "constant:0", "poisson:-1"])
def test_rejects_unknown_arrivals(value: str, started: list[BenchOptions]) -> None:
    expected = f"invalid --arrivals '{value}' (expected closed, constant:RATE or poisson:RATE)"

    assert (run(f"--arrivals={value}"), started) == (expected, [])


def test_resume_names_every_option_that_it_does_not_take(started: list[BenchOptions]) -> None:
    refusal = run("m.gguf", "--resume=runs/x", "--seed=0", "--cache=cold", "--json")

    assert refusal.startswith("--resume cannot be combined with targets, --cache, --seed (")
    assert not started
