from pathlib import Path
from typing import Any

import msgspec
import pytest

from promptai.advisor.profile import Profile, ProfileKey, Profiles
from promptai.bench.manifest import TargetFacts
from promptai.bench.recorder import write_manifest
from promptai.bench.statistics import Metric
from promptai.bench.summary import CacheSummary, HarnessCost, Summary, TargetSummary, write_summary
from promptai.engine.locate import EngineBinary
from support_runs import ENGINE, FACTS, MACHINE, MODEL, make_manifest, talk

NOTHING = Metric(None, "1", 0)
LABEL = EngineBinary(ENGINE.source, ENGINE.command, ENGINE.build, ENGINE.features).label
HERE = ProfileKey(cpu=MACHINE.cpu.model_name, label=LABEL, threads=ENGINE.flags.threads)


def write_run(
    runs: Path,
    name: str,
    *,
    prefill: float | None = 60.0,
    decode: float | None = 10.0,
    facts: TargetFacts = FACTS,
    **protocol: Any,
) -> Path:
    """Write a finished run like those of ``promptai bench``."""
    directory = runs / name
    directory.mkdir(parents=True)
    write_manifest(directory, make_manifest([talk("a", "hi")], [facts], **protocol))
    metrics = {"prefill_tps": Metric(prefill, "tokens/s", 1), "engine_decode_tps": Metric(decode, "tokens/s", 1)}
    part = CacheSummary(planned=1, answered=1, failed=0, metrics=metrics, buckets=[])
    summary = Summary(
        run=name,
        complete=True,
        targets=[TargetSummary(facts.name, False, Metric(2.5, "s", 1), part, None, [])],
        harness=HarnessCost(NOTHING, NOTHING, NOTHING),
        energy_source=None,
    )
    write_summary(directory, summary)
    return directory


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A sparse file with the name and size of the measured model."""
    path = tmp_path / "models" / MODEL.path
    path.parent.mkdir()
    with path.open("wb") as hole:
        hole.truncate(MODEL.file_bytes)
    return path


def profile(runs: Path, path: Path, *, sha256: str | None = None, engine: ProfileKey = HERE) -> Profile | None:
    """Look up a profile and expect no notes."""
    notes: list[str] = []
    found = Profiles(runs, engine, notes.append).find(path, sha256=sha256)
    assert notes == []
    return found


def test_uses_the_newest_run_of_a_model(tmp_path: Path, file: Path) -> None:
    write_run(tmp_path / "runs", "2026-11-21T08-00-00_m_pi5", prefill=61.0, decode=11.0)
    write_run(tmp_path / "runs", "2026-11-20T08-00-00_m_pi5")

    expected = Profile(run="2026-11-21T08-00-00_m_pi5", prefill_tps=61.0, decode_tps=11.0, load_s=2.5)
    assert expected == profile(tmp_path / "runs", file)


def test_identifies_a_model_by_its_checksum_under_any_name(tmp_path: Path, file: Path) -> None:
    write_run(tmp_path / "runs", "r")
    renamed = file.rename(file.with_name("other.gguf"))

    assert profile(tmp_path / "runs", renamed) is None
    assert profile(tmp_path / "runs", renamed, sha256=MODEL.sha256) is not None
    assert profile(tmp_path / "runs", renamed, sha256="ab12") is None
    assert profile(tmp_path / "runs", tmp_path / "absent.gguf") is None


@pytest.mark.parametrize(
    "elsewhere",
    [
        ProfileKey(cpu="Cortex-A72", label=LABEL, threads=4),
        ProfileKey(cpu=HERE.cpu, label="xllamacpp wheel 1", threads=4),
        ProfileKey(cpu=HERE.cpu, label=LABEL, threads=3),
    ],
    ids=["processor", "engine", "threads"],
)
def test_ignores_runs_of_another_processor_engine_or_number_of_threads(
    tmp_path: Path, file: Path, elsewhere: ProfileKey
) -> None:
    write_run(tmp_path / "runs", "r")

    assert profile(tmp_path / "runs", file, engine=elsewhere) is None


@pytest.mark.parametrize(
    "change",
    [
        {"concurrency": 2},
        {"prefill": None},
        {"decode": None},
        {"facts": TargetFacts("m", url="http://127.0.0.1:8080")},
        {"facts": msgspec.structs.replace(FACTS, model=msgspec.structs.replace(MODEL, file_bytes=1))},
    ],
    ids=["several at once", "no prefill", "no decode", "a server", "another size"],
)
def test_ignores_runs_without_single_stream_rates_of_the_file(
    tmp_path: Path, file: Path, change: dict[str, Any]
) -> None:
    write_run(tmp_path / "runs", "r2", **change)
    write_run(tmp_path / "runs", "r1", decode=9.0)

    found = profile(tmp_path / "runs", file)
    assert found is not None
    assert found.run == "r1"


def test_reports_broken_runs_and_uses_the_others(tmp_path: Path, file: Path) -> None:
    runs = tmp_path / "runs"
    write_run(runs, "good")
    for name, text in {"summary.json": "{", "manifest.json": '{"created": 1}'}.items():
        (write_run(runs, f"x-{name}") / name).write_text(text)
    (write_run(runs, "y-no-manifest") / "manifest.json").unlink()
    (write_run(runs, "z-unfinished") / "summary.json").unlink()
    (runs / "a file").touch()
    notes: list[str] = []

    found = Profiles(runs, HERE, notes.append).find(file, sha256=None)

    assert found is not None
    assert found.run == "good"
    assert [note.partition(" is ignored: ")[0] for note in notes] == [
        "run y-no-manifest",
        "run x-summary.json",
        "run x-manifest.json",
    ]


def test_reports_the_accuracy_of_a_run(tmp_path: Path, file: Path) -> None:
    directory = write_run(tmp_path / "runs", "r")
    summary = msgspec.json.decode((directory / "summary.json").read_bytes())
    summary["targets"][0]["accuracy"] = {"value": 0.61, "unit": "1", "n": 1267}
    (directory / "summary.json").write_bytes(msgspec.json.encode(summary))

    found = profile(tmp_path / "runs", file)

    assert found is not None
    assert found.accuracy == 0.61


def test_has_no_profile_without_runs(tmp_path: Path, file: Path) -> None:
    assert profile(tmp_path / "absent", file) is None
