import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from promptai.errors import ModelError
from promptai.models.bundled import bundled_model
from promptai.models.gguf import read_header
from promptai.models.shape import Shape
from promptai.models.synth import LLAMA_1B, write_synthetic
from promptai.models.tensors import ARCHITECTURES, QUANTS, Quant, plan_tensors, tensor_bytes

TracedPeak = Callable[[], Callable[[], int]]

TINY = Shape(layers=1, width=32, heads=2, kv_heads=1, ffn=32, vocabulary=258)
#: Seven matrices of similar size, each a small part of the whole.
EVEN = Shape(layers=12, width=256, heads=4, kv_heads=4, ffn=256, vocabulary=258)

#: Writes to a disk that is full after 20 kB, and makes resource leaks visible.
FULL_DISK = """
    import gc, resource, sys
    from pathlib import Path
    from promptai.errors import ModelError
    from promptai.models.shape import Shape
    from promptai.models.synth import write_synthetic
    shape = Shape(layers=2, width=64, heads=4, kv_heads=2, ffn=128, vocabulary=512)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        write_synthetic(Path(sys.argv[1]), shape, name="x")
    except ModelError as error:
        print(error.message)
    gc.collect()
"""


def files(folder: Path) -> list[str]:
    """List a folder."""
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        {"width": 65},
        {"width": 0},
        {"width": -64},
        {"ffn": 100},
        {"ffn": 0},
        {"heads": 3},
        {"heads": 0},
        {"heads": -4},
        {"heads": 64},
        {"kv_heads": 0},
        {"kv_heads": 3},
        {"kv_heads": 8},
        {"layers": 0},
        {"layers": -1},
        {"context": 0},
        {"vocabulary": 257},
    ],
    ids=lambda change: "-".join(f"{key}-{value}" for key, value in change.items()),
)
def test_rejects_an_impossible_shape(tmp_path: Path, change: dict[str, int]) -> None:
    """Engines cannot load such models; for example, heads of length one cannot be rotated."""
    shape = Shape(**(msgspec.structs.asdict(TINY) | {"width": 64, "heads": 4, "kv_heads": 2} | change))

    with pytest.raises(ModelError, match="cannot be written"):
        write_synthetic(tmp_path / "model.gguf", shape, name="x")

    assert files(tmp_path) == []


@pytest.mark.parametrize("target", ["occupied/model.gguf", "folder", "/proc/model.gguf"])
def test_leaves_no_file_where_it_cannot_write(tmp_path: Path, target: str) -> None:
    """A file in the folder's place, a folder in the file's place, a file system that accepts no files."""
    (tmp_path / "occupied").write_text("not a folder")
    (tmp_path / "folder").mkdir()

    with pytest.raises(ModelError, match="cannot write"):
        write_synthetic(tmp_path / target, TINY, name="x")

    assert files(tmp_path) == ["folder", "occupied"]


@pytest.mark.real
def test_a_full_disk_leaves_the_previous_state(tmp_path: Path) -> None:
    """One line of error, no partial model, no file left open."""
    path = tmp_path / "model.gguf"
    path.write_text("precious")

    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", textwrap.dedent(FULL_DISK), str(path)],
        capture_output=True,
        check=True,
        text=True,
        timeout=60,
    )

    what, _, why = done.stdout.strip().rpartition(": ")
    assert what == f"cannot write {path}"
    assert why not in ("", "None")
    assert (files(tmp_path), path.read_text()) == (["model.gguf"], "precious")
    assert done.stderr == ""


def test_the_same_seed_produces_the_same_bytes(tmp_path: Path) -> None:
    """Another seed produces other weights in a file of the same layout."""
    one, two, other = (
        write_synthetic(tmp_path / folder / "model.gguf", TINY, name="x", seed=seed).read_bytes()
        for folder, seed in (("one", 3), ("two", 3), ("other", 4))
    )

    assert one == two
    assert one != other
    assert len(one) == len(other)
    assert files(tmp_path) == ["one", "other", "two"]
    assert files(tmp_path / "one") == ["model.gguf"]


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_file_matches_the_plan(tmp_path: Path, architecture: str, quant: Quant) -> None:
    """Names, types, offsets and sizes of all tensors; the rest is the header."""
    shape = msgspec.structs.replace(EVEN, layers=2, architecture=architecture)
    planned = plan_tensors(shape, quant)

    header = read_header(write_synthetic(tmp_path / "model.gguf", shape, name="x", quant=quant))

    assert [(t.name, t.shape, t.quantization) for t in header.tensors] == [
        (t.name, t.shape, t.quantization) for t in planned
    ]
    assert header.file_bytes == header.data_offset + tensor_bytes(shape, quant)
    assert header.synthetic
    assert (header.architecture, header.vocabulary) == (architecture, shape.vocabulary)


def test_a_large_vocabulary_uses_the_bundled_model_s_tokens(tmp_path: Path) -> None:
    """A prompt has a realistic number of tokens, the same in every synthetic model."""
    shape = msgspec.structs.replace(TINY, vocabulary=5000)

    header = read_header(write_synthetic(tmp_path / "model.gguf", shape, name="x"))

    bundled = read_header(bundled_model())
    assert header.array_lengths["tokenizer.ggml.tokens"] == 5000
    assert header.array_lengths["tokenizer.ggml.merges"] == bundled.array_lengths["tokenizer.ggml.merges"]
    assert header.chat_template == bundled.chat_template


def test_rejects_a_full_disk_before_writing_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=1000))

    with pytest.raises(ModelError, match=r"it needs 3.1 MiB, 1 KiB are free"):
        write_synthetic(tmp_path / "model.gguf", EVEN, name="x")

    assert files(tmp_path) == []


def test_progress_covers_every_byte_of_data(tmp_path: Path) -> None:
    progress: list[int] = []

    write_synthetic(tmp_path / "model.gguf", EVEN, name="x", progress=progress.append)

    assert sum(progress) == sum(tensor.size_bytes for tensor in plan_tensors(EVEN, "q4_0"))


def test_the_shape_of_tinyllama_has_its_number_of_weights() -> None:
    """1,100,048,384 according to its card."""
    assert sum(tensor.weights for tensor in plan_tensors(LLAMA_1B, "f16")) == 1_100_048_384


def test_holds_one_chunk_in_memory(tmp_path: Path, traced_peak: TracedPeak) -> None:
    """Can write models larger than the memory."""
    write_synthetic(tmp_path / "warm-up.gguf", TINY, name="x")

    peak = traced_peak()
    shape = msgspec.structs.replace(EVEN, layers=2, ffn=40_960, width=512)
    path = write_synthetic(tmp_path / "model.gguf", shape, name="x", quant="q8_0")

    assert path.stat().st_size > 120e6
    assert peak() < 64e6
