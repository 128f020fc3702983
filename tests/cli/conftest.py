"""Workloads and models for the command line's tests."""

import json
from pathlib import Path

import pytest

from promptai.models.shape import Shape
from promptai.models.synth import write_synthetic

#: Small enough to load in a tenth of a second.
SMALL = Shape(layers=2, width=64, heads=4, kv_heads=2, ffn=128, vocabulary=512, context=4096)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic model that the real engine loads at once."""
    return write_synthetic(tmp_path_factory.mktemp("models") / "small.gguf", SMALL, name="small")


@pytest.fixture
def workload(tmp_path: Path) -> Path:
    """Four conversations of three short turns."""
    path = tmp_path / "workload.jsonl"
    conversations = [
        {
            "id": f"c{number}",
            "messages": [
                {"role": role, "content": f"{text} {number} {turn}"}
                for turn in range(3)
                for role, text in (("user", "is cell up at site"), ("assistant", "yes it is"))
            ],
        }
        for number in range(4)
    ]
    path.write_text("\n".join(map(json.dumps, conversations)) + "\n")
    return path
