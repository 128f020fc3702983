"""Synthetic copies of the paper's eight models on the real engine: each loads and decodes.

The slices have one layer, or the layers of one period of the architecture's pattern, and a small vocabulary; they
contain everything that can be wrong in a file (names, dimensions, types, metadata). benchmarks/forecast.py runs
whole shapes.
"""

import asyncio
from pathlib import Path

import msgspec
import pytest

from promptai.engine.client import EngineClient
from promptai.engine.flags import EngineFlags
from promptai.engine.launch import RunningEngine, free_port
from promptai.engine.locate import locate
from promptai.models.catalog import Entry, load_catalog
from promptai.models.synth import write_synthetic
from promptai.models.tensors import Quant, plan_tensors, tensor_bytes
from promptai.wire.llamaserver import Completion

PAPER = [entry for entry in load_catalog().entries if entry.paper is not None]
OTHER_ARCHITECTURES = [
    next(entry for entry in load_catalog().entries if entry.shape.architecture == name)
    for name in sorted(
        {entry.shape.architecture for entry in load_catalog().entries} - {entry.shape.architecture for entry in PAPER}
    )
]


def test_all_eight_models_of_the_paper_have_a_candidate() -> None:
    assert len({entry.paper for entry in PAPER}) == 8


@pytest.mark.parametrize("entry", PAPER, ids=lambda entry: entry.id)
def test_the_size_in_q4_0_is_within_1_percent_of_the_arithmetic(entry: Entry) -> None:
    """4.5 bits per weight, 6.5625 in the output matrix; norms and biases are within the tolerance."""
    output = entry.shape.width * entry.shape.vocabulary
    weights = sum(tensor.weights for tensor in plan_tensors(entry.shape, "q4_0"))
    bits = (weights - output) * 4.5 + output * 6.5625

    assert tensor_bytes(entry.shape, "q4_0") == pytest.approx(bits / 8, rel=0.01)


@pytest.mark.real
@pytest.mark.parametrize(
    ("entry", "quant"),
    [(entry, "q4_0") for entry in PAPER] + [(entry, "q4_k_m") for entry in OTHER_ARCHITECTURES],
    ids=lambda value: value.id if isinstance(value, Entry) else value,
)
def test_a_slice_loads_and_decodes(tmp_path: Path, entry: Entry, quant: Quant) -> None:
    layers = 6 if entry.shape.architecture == "gemma3" else 2 if entry.shape.architecture == "gemma2" else 1
    shape = msgspec.structs.replace(entry.shape, layers=layers, vocabulary=4096)
    path = write_synthetic(tmp_path / "slice.gguf", shape, name=f"synthetic-{entry.id}", quant=quant)

    answer = asyncio.run(complete(path, tmp_path / "log"))

    assert answer.timings is not None
    assert (answer.timings.prompt_n, answer.timings.predicted_n) == (64, 4)


async def complete(path: Path, log: Path) -> Completion:
    flags = EngineFlags(model=str(path), port=free_port(), threads=1, context=256, batch=64, ubatch=64)
    async with RunningEngine(locate(), flags, log=log) as engine, EngineClient(engine.base_url) as client:
        body = {"prompt": list(range(300, 364)), "n_predict": 4, "temperature": 0, "ignore_eos": True}
        return await client.complete(body)
