"""``promptai models list`` and ``promptai models synth``."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from promptai.advisor.calibrate import save
from promptai.device.cpu import default_threads, read_cpu
from promptai.engine.locate import locate
from promptai.models.bundled import bundled_model
from promptai.models.catalog import load_catalog
from promptai.models.gguf import read_header
from support_calibration import CALIBRATION
from support_cli import promptai

pytestmark = pytest.mark.real


def listed(tmp_path: Path, *options: str) -> list[dict[str, Any]]:
    """The list as JSON, with the test's own library and cache."""
    done = promptai("models", "list", "--json", *options, cwd=tmp_path, **places(tmp_path))
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def places(tmp_path: Path) -> dict[str, str]:
    return {"PROMPTAI_MODELS": str(tmp_path / "library"), "XDG_CACHE_HOME": str(tmp_path / "cache")}


def test_synth_suggests_the_nearest_names_for_an_unknown_one(tmp_path: Path) -> None:
    done = promptai("models", "synth", "mistrall-7b", cwd=tmp_path)

    assert (done.returncode, done.stdout) == (3, "")
    assert "did you mean mistral-7b" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_lists_a_damaged_file_with_its_problem(tmp_path: Path) -> None:
    folder = tmp_path / "library" / "someone--else"
    folder.mkdir(parents=True)
    (folder / "broken.gguf").write_bytes(b"GGUF")

    (line,) = listed(tmp_path, "--here")

    assert (line["here"], line["outlook"]) == (True, None)
    assert "truncated" in line["problem"]


def test_lists_bounds_without_a_calibration(tmp_path: Path) -> None:
    lines = listed(tmp_path)

    assert [line["name"] for line in lines] == [entry.id for entry in load_catalog().entries]
    assert {line["outlook"]["calibrated"] for line in lines} == {False}
    by_size = sorted(lines, key=lambda line: float(line["outlook"]["file_bytes"]))
    assert by_size[0]["outlook"]["decode_tps"] > by_size[-1]["outlook"]["decode_tps"] > 0
    assert all(line["outlook"]["memory_bytes"] > line["outlook"]["file_bytes"] for line in lines)


def test_lists_forecasts_with_a_calibration_of_this_engine(tmp_path: Path) -> None:
    cpu = read_cpu()
    mine = msgspec.structs.replace(CALIBRATION, engine=locate().label, cpu=cpu.model_name, threads=default_threads(cpu))
    save(tmp_path / "cache" / "promptai" / "calibrations", mine)

    lines = listed(tmp_path)
    table = promptai("models", "list", cwd=tmp_path, **places(tmp_path)).stdout

    assert {line["outlook"]["calibrated"] for line in lines} == {True}
    assert "forecast for" in table


def test_lists_a_stored_file_as_here_and_fitting(tmp_path: Path) -> None:
    folder = tmp_path / "library" / "someone--else"
    folder.mkdir(parents=True)
    (folder / "tiny.gguf").symlink_to(bundled_model())

    (line,) = listed(tmp_path, "--here", "--fits")

    assert line["name"] == "someone--else/tiny.gguf"
    assert line["outlook"]["fits"] is True


def test_synth_writes_a_slice_marked_as_synthetic(tmp_path: Path) -> None:
    done = promptai("models", "synth", "tinyllama-1.1b", "--layers", "1", "--quant", "q4_0", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    header = read_header(tmp_path / "synthetic-tinyllama-1.1b-1-layers-q4_0.gguf")
    assert header.synthetic
    assert (header.metadata["llama.block_count"], header.vocabulary) == (1, 32_000)
    assert "never for accuracy" in done.stdout
