"""A small synthetic model for tests that only read it, and a measurement of memory."""

import importlib
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from promptai.models.shape import Shape
from promptai.models.synth import write_synthetic

SMALL = Shape(layers=2, width=64, heads=4, kv_heads=2, ffn=128, vocabulary=512)


@pytest.fixture(scope="session", autouse=True)
def _numpy_is_loaded() -> None:
    """Import NumPy up front: on a busy machine the import alone may exceed a unit test's time limit."""
    importlib.import_module("gguf")


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of random weights, 90 kB."""
    return write_synthetic(tmp_path_factory.mktemp("models") / "small.gguf", SMALL, name="small", seed=7)


@pytest.fixture
def traced_peak() -> Iterator[Callable[[], Callable[[], int]]]:
    """Start tracing Python's memory; the returned function reports the peak since then, in bytes."""

    def begin() -> Callable[[], int]:
        tracemalloc.start()
        return lambda: tracemalloc.get_traced_memory()[1]

    yield begin
    tracemalloc.stop()
