import fcntl
import re
import shutil
from collections import namedtuple
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from promptai.errors import ModelError
from promptai.models import requantize
from promptai.models.bundled import bundled_model
from promptai.models.gguf import read_header
from promptai.models.quantize import (
    TYPES,
    Origin,
    QuantizeTool,
    atomic_output,
    check_source,
    expected_bytes,
    find_program,
    provenance,
    quantize,
)
from promptai.models.shape import Shape
from promptai.models.synth import write_synthetic
from support_gguf import TYPE_F32, TYPE_Q4_0, U16, entry, tensor
from support_gguf import gguf as gguf_of
from support_quantize import FakeTool, Quiet, write_half

SMALL = Shape(layers=2, width=256, heads=4, kv_heads=2, ffn=512, vocabulary=512)


@pytest.fixture(scope="session")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in 16 bits."""
    return write_half(tmp_path_factory.mktemp("half") / "tiny-f16.gguf")


@pytest.fixture(scope="session")
def half_synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of random weights, with rows suitable for K-quants."""
    return write_synthetic(tmp_path_factory.mktemp("half") / "synthetic.gguf", SMALL, name="small", quant="f16")


@pytest.mark.parametrize(
    ("value", "kind"),
    [(float("nan"), "q4_0"), (float("inf"), "q8_0"), (1e6, "f16"), (-1e6, "q4_0"), (1e7, "q8_0")],
    ids=["nan", "inf", "too-large", "too-large-for-a-scale-of-4-bits", "too-large-for-a-scale-of-8-bits"],
)
def test_rejects_numbers_that_the_type_cannot_represent(tmp_path: Path, value: float, kind: str) -> None:
    """A model that generates nonsense is worse than none."""
    source = tmp_path / "source.gguf"
    source.write_bytes(gguf_of([], [tensor("a.weight", (32, 2), TYPE_F32)]) + np.full(64, value, np.float32).tobytes())

    with pytest.raises(ModelError, match=r"'a\.weight' contains numbers"):
        quantize(source, tmp_path / "new.gguf", kind, tool=None, progress=Quiet(), threads=1)

    assert [path.name for path in tmp_path.iterdir()] == ["source.gguf"]


def test_the_result_records_its_source(half: Path, tmp_path: Path) -> None:
    """Name, type, SHA-256 and tool; progress counts every byte twice, hashed and quantised."""
    progress = Quiet()

    done = quantize(half, tmp_path / "sub" / "new.gguf", "q4_0", tool=None, progress=progress, threads=1)

    noted = {key: value for key, value in done.result.metadata.items() if key.startswith("promptai.")}
    assert noted == {
        "promptai.source.name": "tiny-f16.gguf",
        "promptai.source.quantization": "F16",
        "promptai.source.sha256": done.source_sha256,
        "promptai.quantized_by": done.by,
    }
    assert re.fullmatch(r"[0-9a-f]{64}", done.source_sha256)
    assert progress.begun == [
        ("hashing tiny-f16.gguf", half.stat().st_size),
        ("quantising to q4_0", done.source.tensor_bytes),
    ]
    assert progress.done == done.source.tensor_bytes
    assert [path.name for path in (tmp_path / "sub").iterdir()] == ["new.gguf"]


def test_shortens_and_escapes_names_for_the_tool() -> None:
    """llama-quantize accepts 127 bytes, and a terminal must not see escapes."""
    notes = provenance(Origin("ü" * 100 + "\x1b", "f" * 64), "F16", "x")

    assert len(notes["promptai.source.name"].encode()) <= 127
    assert provenance(Origin("a\nb", ""), "", "")["promptai.source.name"] == "a?b"


@pytest.mark.parametrize("kind", ["q4_0", "q8_0"])
def test_the_estimated_size_is_sufficient_and_less_than_twice_the_real_one(
    half: Path, half_synthetic: Path, tmp_path: Path, kind: str
) -> None:
    """Before anything is written."""
    for source in (half, half_synthetic):
        done = quantize(source, tmp_path / "new.gguf", kind, tool=None, progress=Quiet(), threads=1)
        notes = 1024
        assert done.result.file_bytes - notes <= expected_bytes(done.source, kind) < 2 * done.result.file_bytes


def split_part(folder: Path) -> Path:
    path = folder / "part.gguf"
    path.write_bytes(gguf_of([entry("split.no", U16, 0), entry("split.count", U16, 2)]))
    return path


def already_quantised(folder: Path) -> Path:
    path = folder / "q4.gguf"
    path.write_bytes(gguf_of([], [tensor("a.weight", (64, 2), TYPE_Q4_0)], 72))
    return path


def eight_bits(_folder: Path) -> Path:
    return bundled_model()


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (split_part, "q4_0", "is part 1 of 2"),
        (already_quantised, "q4_0", "is already quantised .Q4_0."),
        (eight_bits, "f16", "would be larger and no better"),
        (eight_bits, "q4_k_m", "needs llama.cpp's llama-quantize"),
        (eight_bits, "iq4_xs", "needs llama.cpp's llama-quantize"),
    ],
)
def test_rejects_unsuitable_sources_before_writing_anything(
    tmp_path: Path, make: Callable[[Path], Path], kind: str, words: str
) -> None:
    """The hint names an alternative."""
    source = make(tmp_path)
    before = sorted(tmp_path.iterdir())

    with pytest.raises(ModelError, match=words) as caught:
        quantize(source, tmp_path / "new.gguf", kind, tool=None, progress=Quiet(), threads=1)

    assert caught.value.hint
    assert before == sorted(tmp_path.iterdir())


def test_a_table_of_integers_does_not_count_as_quantised(tmp_path: Path) -> None:
    """DeepSeek V4 has one (experts by token); llama.cpp does not quantise it."""
    source = tmp_path / "source.gguf"
    tensors = [tensor("a.weight", (32, 2), TYPE_F32), tensor("blk.0.ffn_gate_tid2eid.weight", (6, 4), 26, 256)]
    source.write_bytes(gguf_of([], tensors) + bytes(256) + bytes(range(96)))

    done = quantize(source, tmp_path / "new.gguf", "q4_0", tool=None, progress=Quiet(), threads=1)

    assert [found.quantization for found in done.result.tensors] == ["Q4_0", "I32"]
    assert bytes(range(96)) in (tmp_path / "new.gguf").read_bytes()


def test_does_not_truncate_a_source_that_has_the_name_of_a_partial_result(half: Path, tmp_path: Path) -> None:
    """For example a complete download that was not renamed yet."""
    source = tmp_path / "new.gguf.part"
    shutil.copyfile(half, source)

    with pytest.raises(ModelError, match="would overwrite its own source"):
        quantize(source, tmp_path / "new.gguf", "q4_0", tool=None, progress=Quiet(), threads=1)

    assert source.read_bytes() == half.read_bytes()


def test_does_not_overwrite_the_source(half: Path, tmp_path: Path) -> None:
    """Nor under another name."""
    source = tmp_path / "source.gguf"
    shutil.copyfile(half, source)
    (tmp_path / "link.gguf").symlink_to(source)

    with pytest.raises(ModelError, match="would overwrite its own source"):
        quantize(source, tmp_path / "link.gguf", "q4_0", tool=None, progress=Quiet(), threads=1)


def test_rejects_a_full_disk_with_both_figures(half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before hashing, which takes minutes."""
    usage = namedtuple("usage", "total used free")  # noqa: PYI024  like shutil's
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**9, 0, 10**6))

    with pytest.raises(ModelError, match=r"has 977 KiB free, new\.gguf needs about"):
        quantize(half, tmp_path / "new.gguf", "q4_0", tool=None, progress=Quiet(), threads=1)


def test_ctrl_c_restores_the_previous_state(half: Path, tmp_path: Path) -> None:
    """Interrupted in the middle of the weights."""
    target = tmp_path / "new.gguf"
    target.write_text("precious")

    with pytest.raises(KeyboardInterrupt):
        quantize(half, target, "q4_0", tool=None, progress=Quiet(interrupt_at=1_000_000), threads=1)

    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("new.gguf", "precious")]


def test_passes_metadata_to_llama_quantize_and_reports_its_progress(half: Path, tmp_path: Path) -> None:
    """Each line about a tensor counts as that tensor's bytes."""
    steps = ["noise", "[   1/  47] output_norm.weight - [ 192, 1, 1, 1], type = f32, size = 0.001 MiB", "[ 2/ 47] gone"]
    fake, progress, target = FakeTool(half, lines=steps), Quiet(), tmp_path / "new.gguf"

    done = quantize(half, target, "q4_k_m", tool=QuantizeTool(Path("/bin/lq"), fake), progress=progress, threads=3)

    assert done.by == "llama-quantize 1.2 (build 7, commit abc)"
    assert fake.commands[-1][:2] == ["/bin/lq", "--allow-requantize"]
    assert fake.commands[-1][-4:] == [str(half), f"{target}.part", "Q4_K_M", "3"]
    assert done.result.metadata["promptai.quantized_by"] == done.by
    assert (progress.begun[-1][1], progress.done) == (done.source.tensor_bytes, 192 * 4)
    assert [path.name for path in tmp_path.iterdir()] == ["new.gguf"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda _: FakeTool(None, lines=["main: out of paper", ""], code=1), "exit code 1: main: out of paper"),
        (lambda _: FakeTool(None, code=-9), "exit code -9: it printed nothing"),
        (lambda half: FakeTool(half, notes=False), "dropped tensors or metadata"),
        (lambda _: FakeTool(None), "is empty"),
    ],
    ids=["fails", "killed", "without-notes", "writes-nothing"],
)
def test_a_failing_tool_leaves_no_file(
    half: Path, tmp_path: Path, make: Callable[[Path], FakeTool], words: str
) -> None:
    """The error is its last line of output."""
    with pytest.raises(ModelError, match=words):
        quantize(
            half,
            tmp_path / "new.gguf",
            "q4_k_m",
            tool=QuantizeTool(Path("lq"), make(half)),
            progress=Quiet(),
            threads=1,
        )

    assert list(tmp_path.iterdir()) == []


def test_two_processes_do_not_write_the_same_file(half: Path, tmp_path: Path) -> None:
    """The second fails; the first continues."""
    target = tmp_path / "new.gguf"
    refused: list[str] = []

    class Second(FakeTool):
        def __call__(self, command: Sequence[str], *, seen: Callable[[str], None], tick: Callable[[], None]) -> int:
            if "--dry-run" not in command:
                with pytest.raises(ModelError) as caught:
                    quantize(half, target, "q4_0", tool=None, progress=Quiet(), threads=1)
                refused.append(caught.value.message)
            return super().__call__(command, seen=seen, tick=tick)

    quantize(half, target, "q4_k_m", tool=QuantizeTool(Path("lq"), Second(half)), progress=Quiet(), threads=1)

    assert refused == [f"another process is writing {target}"]
    assert read_header(target).quantization == "Q8_0"


def test_does_not_damage_a_result_that_another_process_just_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file was partial when opened, and is complete by the time it is locked."""
    target, part = tmp_path / "new.gguf", tmp_path / "new.gguf.part"

    def finished_before(_lock: object, _operation: int) -> None:
        part.write_text("whole")
        part.replace(target)

    monkeypatch.setattr(fcntl, "flock", finished_before)

    with pytest.raises(ModelError, match="another process is writing"), atomic_output(target):
        pytest.fail("the lock is not ours")

    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("new.gguf", "whole")]


def test_does_not_delete_the_next_process_s_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next process may start as soon as our file is renamed."""
    replace = Path.replace

    def and_the_next_begins(path: Path, target: Path) -> Path:
        done = replace(path, target)
        path.write_text("the next")
        return done

    monkeypatch.setattr(Path, "replace", and_the_next_begins)

    with atomic_output(tmp_path / "new.gguf") as part:
        part.write_text("whole")

    assert (part.read_text(), (tmp_path / "new.gguf").read_text()) == ("the next", "whole")


def program(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def test_searches_beside_the_engine_then_builds_then_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build without engine.json is incomplete."""
    engines, name = tmp_path / "engines", "llama-quantize"
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert find_program(name, engines) is None

    on_path = program(tmp_path / "path" / name)
    program(engines / "unfinished" / "bin" / name)
    assert find_program(name, engines) == on_path

    built = program(engines / "done" / "bin" / name)
    (engines / "done" / "engine.json").write_text("{}")
    assert find_program(name, engines) == built

    beside = program(tmp_path / "own" / name)
    assert find_program(name, engines, beside=tmp_path / "own" / "llama-server") == beside
    assert find_program(name, engines, beside=tmp_path / "llama-server") == built
    monkeypatch.chdir(beside.parent)  # a name without a folder would be resolved on the PATH
    assert find_program(name, engines, beside=Path("llama-server")) == beside


def test_every_type_is_offered_or_needs_llama_quantize(half: Path) -> None:
    """Each is first checked against the source."""
    assert set(requantize.OFFERED) < TYPES.keys()
    for kind in TYPES:
        check_source(read_header(half), kind)
