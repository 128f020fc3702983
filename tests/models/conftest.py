"""One small synthetic model for the tests that only read it, and a measure of memory."""

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
    """NumPy comes in with the first model; on a busy machine that alone may take longer than a unit test may."""
    importlib.import_module("gguf")


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of random weights, 90 kB."""
    return write_synthetic(tmp_path_factory.mktemp("models") / "small.gguf", SMALL, name="small", seed=7)


@pytest.fixture
def traced_peak() -> Iterator[Callable[[], Callable[[], int]]]:
    """Begin to count the bytes that Python holds; what comes back tells the most there were since."""

    def begin() -> Callable[[], int]:
        tracemalloc.start()
        return lambda: tracemalloc.get_traced_memory()[1]

    yield begin
    tracemalloc.stop()
