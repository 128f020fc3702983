"""Engines for the tests: fake executables, a small model, and the real embedded llama.cpp."""

import sys
from pathlib import Path

import pytest

from promptai.engine.locate import EngineBinary
from promptai.models.shape import Shape
from promptai.models.synth import write_synthetic
from support_engine import Script

SMALL = Shape(layers=2, width=64, heads=4, kv_heads=2, ffn=128, vocabulary=512)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of random weights, 90 kB: the real engine loads it at once."""
    return write_synthetic(tmp_path_factory.mktemp("models") / "small.gguf", SMALL, name="small")


@pytest.fixture
def script(tmp_path: Path) -> Script:
    """Write an executable shell script: its path below the test's folder, and its lines."""

    def write(name: str, *lines: str, mode: int = 0o755) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(("#!/bin/sh", *lines, "")))
        path.chmod(mode)
        return path

    return write


@pytest.fixture(scope="session")
def embedded() -> EngineBinary:
    """The wheel as ``engine.locate`` finds it."""
    return EngineBinary("embedded", (sys.executable, "-m", "promptai.engine.embedded"), None, None)
