"""Calibration of the real engine on small probes; test_calibration covers the arithmetic without an engine."""

import asyncio
from pathlib import Path

import msgspec
import pytest

from promptai.advisor import calibrate as module
from promptai.advisor.attention import ATTENTION_PROBES
from promptai.advisor.calibrate import calibrate, load, save
from promptai.advisor.calibration import PROBES
from promptai.engine.locate import locate
from promptai.errors import LibraryError
from support_calibration import CALIBRATION

KEY = {"engine": CALIBRATION.engine, "cpu": CALIBRATION.cpu, "threads": CALIBRATION.threads}


def test_a_calibration_that_cannot_be_stored_is_a_one_line_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(LibraryError, match="Not a directory"):
        save(tmp_path / "file" / "calibrations", CALIBRATION)


@pytest.mark.parametrize("change", [{"engine": "another"}, {"cpu": "another"}, {"threads": 2}], ids=str)
def test_a_calibration_is_valid_only_for_its_engine_processor_and_threads(
    tmp_path: Path, change: dict[str, object]
) -> None:
    save(tmp_path, CALIBRATION)

    assert load(tmp_path, **KEY) == CALIBRATION  # type: ignore[arg-type]
    assert load(tmp_path, **(KEY | change)) is None  # type: ignore[arg-type]


def test_ignores_a_calibration_that_is_damaged_or_of_another_version(tmp_path: Path) -> None:
    save(tmp_path, msgspec.structs.replace(CALIBRATION, schema=0))
    assert load(tmp_path, **KEY) is None  # type: ignore[arg-type]

    (path,) = tmp_path.iterdir()
    path.write_bytes(b"\xff{")
    assert load(tmp_path, **KEY) is None  # type: ignore[arg-type]


@pytest.mark.real
def test_calibrates_the_real_engine_and_removes_probe_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = (
        msgspec.structs.replace(
            probe.shape,
            layers=2,
            width=256,
            heads=4,
            kv_heads=4,
            ffn=512,
            vocabulary=min(probe.shape.vocabulary, 30_000),
        )
        for probe in PROBES
    )
    small = [msgspec.structs.replace(probe, shape=shape) for probe, shape in zip(PROBES, shapes, strict=True)]
    monkeypatch.setattr(module, "PROBES", small)
    # Heads of 64, which the small ones have too.
    monkeypatch.setattr(module, "ATTENTION_PROBES", ATTENTION_PROBES[:2])
    monkeypatch.setattr(module, "_DEPTHS", (8, 776))
    monkeypatch.setattr(module, "_ANSWER_TOKENS", 4)
    monkeypatch.setattr(module, "_TRIES", 1)
    monkeypatch.setattr(module, "_DEPTH_TRIES", 2)
    observed: list[str] = []

    found = asyncio.run(
        calibrate(
            locate(), cpu="a processor", threads=1, cache=tmp_path, observe=lambda *event: observed.append(event[2])
        )
    )

    names = [*(probe.name for probe in PROBES), *(probe.name for probe in ATTENTION_PROBES[:2])]
    assert observed == [*names, *reversed(names)]
    assert list(tmp_path.iterdir()) == []
    assert found.decode_s_per_byte.keys() == {"Q4_0", "Q4_K", "Q6_K", "Q8_0"}
    assert found.attention.by_head.keys() == {"64"}
    assert sum(found.prefill_s_per_weight.values()) > 0
    # An interpreter, the wheel and its buffers: tens of megabytes.
    assert 5e6 < found.base_anon_bytes < 200e6
    assert set(found.copied_share.values()) <= {0.0, 1.0}
