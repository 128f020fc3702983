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
    """Two layers of random weights, whose rows K-quants would fit."""
    return write_synthetic(tmp_path_factory.mktemp("half") / "synthetic.gguf", SMALL, name="small", quant="f16")


@pytest.mark.parametrize(
    ("value", "kind"),
    [(float("nan"), "q4_0"), (float("inf"), "q8_0"), (1e6, "f16"), (-1e6, "q4_0"), (1e7, "q8_0")],
    ids=["nan", "inf", "too-large", "too-large-for-a-scale-of-4-bits", "too-large-for-a-scale-of-8-bits"],
)
def test_numbers_that_the_type_cannot_hold_are_refused(tmp_path: Path, value: float, kind: str) -> None:
    """A model that answers nonsense is worse than none."""
    source = tmp_path / "source.gguf"
    source.write_bytes(gguf_of([], [tensor("a.weight", (32, 2), TYPE_F32)]) + np.full(64, value, np.float32).tobytes())

    with pytest.raises(ModelError, match=r"holds numbers in 'a\.weight'"):
        quantize(source, tmp_path / "new.gguf", kind, tool=None, progress=Quiet(), threads=1)

    assert [path.name for path in tmp_path.iterdir()] == ["source.gguf"]


def test_the_result_says_what_it_was_made_of(half: Path, tmp_path: Path) -> None:
    """Name, type, SHA-256 and tool; progress adds up to every byte twice, hashed and quantised."""
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


def test_a_name_that_no_tool_takes_is_made_to_fit() -> None:
    """llama-quantize takes 127 bytes, and a terminal no escapes."""
    notes = provenance(Origin("ü" * 100 + "\x1b", "f" * 64), "F16", "x")

    assert len(notes["promptai.source.name"].encode()) <= 127
    assert provenance(Origin("a\nb", ""), "", "")["promptai.source.name"] == "a?b"


@pytest.mark.parametrize("kind", ["q4_0", "q8_0"])
def test_what_is_asked_of_the_disk_is_enough_and_not_twice_as_much(
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
        (already_quantised, "q4_0", "is quantised already .Q4_0."),
        (eight_bits, "f16", "would be larger and no better"),
        (eight_bits, "q4_k_m", "needs llama.cpp's llama-quantize"),
        (eight_bits, "iq4_xs", "needs llama.cpp's llama-quantize"),
    ],
)
def test_what_would_be_spoilt_is_refused_before_anything_is_written(
    tmp_path: Path, make: Callable[[Path], Path], kind: str, words: str
) -> None:
    """With what to do instead."""
    source = make(tmp_path)
    before = sorted(tmp_path.iterdir())

    with pytest.raises(ModelError, match=words) as caught:
        quantize(source, tmp_path / "new.gguf", kind, tool=None, progress=Quiet(), threads=1)

    assert caught.value.hint
    assert before == sorted(tmp_path.iterdir())


def test_a_table_of_integers_is_not_taken_for_quantised_weights(tmp_path: Path) -> None:
    """DeepSeek V4 has one, of experts by token; llama.cpp leaves it alone."""
    source = tmp_path / "source.gguf"
    tensors = [tensor("a.weight", (32, 2), TYPE_F32), tensor("blk.0.ffn_gate_tid2eid.weight", (6, 4), 26, 256)]
    source.write_bytes(gguf_of([], tensors) + bytes(256) + bytes(range(96)))

    done = quantize(source, tmp_path / "new.gguf", "q4_0", tool=None, progress=Quiet(), threads=1)

    assert [found.quantization for found in done.result.tensors] == ["Q4_0", "I32"]
    assert bytes(range(96)) in (tmp_path / "new.gguf").read_bytes()


def test_a_source_is_not_emptied_because_it_has_the_name_of_an_unfinished_result(half: Path, tmp_path: Path) -> None:
    """A download that was whole but for its name, say."""
    source = tmp_path / "new.gguf.part"
    shutil.copyfile(half, source)

    with pytest.raises(ModelError, match="would replace its own source"):
        quantize(source, tmp_path / "new.gguf", "q4_0", tool=None, progress=Quiet(), threads=1)

    assert source.read_bytes() == half.read_bytes()


def test_a_source_is_not_replaced_by_its_own_result(half: Path, tmp_path: Path) -> None:
    """Also under another name."""
    source = tmp_path / "source.gguf"
    shutil.copyfile(half, source)
    (tmp_path / "link.gguf").symlink_to(source)

    with pytest.raises(ModelError, match="would replace its own source"):
        quantize(source, tmp_path / "link.gguf", "q4_0", tool=None, progress=Quiet(), threads=1)


def test_a_disk_without_room_is_refused_with_numbers(
    half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the hashing, which takes minutes."""
    usage = namedtuple("usage", "total used free")  # noqa: PYI024  as shutil has it
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage(10**9, 0, 10**6))

    with pytest.raises(ModelError, match=r"has 1\.0 MB free, new\.gguf needs about"):
        quantize(half, tmp_path / "new.gguf", "q4_0", tool=None, progress=Quiet(), threads=1)


def test_ctrl_c_leaves_what_was_there_before(half: Path, tmp_path: Path) -> None:
    """In the middle of the weights."""
    target = tmp_path / "new.gguf"
    target.write_text("precious")

    with pytest.raises(KeyboardInterrupt):
        quantize(half, target, "q4_0", tool=None, progress=Quiet(interrupt_at=1_000_000), threads=1)

    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("new.gguf", "precious")]


def test_llama_quantize_is_told_what_to_note_and_its_steps_are_progress(half: Path, tmp_path: Path) -> None:
    """Each line that it prints of a tensor counts as that tensor's bytes."""
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
        (lambda half: FakeTool(half, notes=False), "left out tensors or notes"),
        (lambda _: FakeTool(None), "is empty"),
    ],
    ids=["fails", "killed", "without-notes", "writes-nothing"],
)
def test_a_tool_that_fails_leaves_nothing(
    half: Path, tmp_path: Path, make: Callable[[Path], FakeTool], words: str
) -> None:
    """And its last words are the reason."""
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


def test_two_at_once_do_not_write_the_same_file(half: Path, tmp_path: Path) -> None:
    """The second is told so; the first goes on."""
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

    assert refused == [f"{target} is being written by another process"]
    assert read_header(target).quantization == "Q8_0"


def test_a_result_that_another_process_finishes_in_this_moment_stays_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was opened as half a file is a whole one by the time it is locked."""
    target, part = tmp_path / "new.gguf", tmp_path / "new.gguf.part"

    def finished_before(_lock: object, _operation: int) -> None:
        part.write_text("whole")
        part.replace(target)

    monkeypatch.setattr(fcntl, "flock", finished_before)

    with pytest.raises(ModelError, match="is being written by another process"), atomic_output(target):
        pytest.fail("it is not ours")

    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("new.gguf", "whole")]


def test_what_the_next_process_begins_is_not_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may begin as soon as ours has its name."""
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


def test_the_tool_beside_a_named_engine_comes_first_then_what_was_built_then_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build without its engine.json was never finished."""
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
    monkeypatch.chdir(beside.parent)  # a name without a folder would be run from the PATH
    assert find_program(name, engines, beside=Path("llama-server")) == beside


def test_every_type_is_either_offered_or_llama_quantizes(half: Path) -> None:
    """And each is checked against the source before anything else."""
    assert set(requantize.OFFERED) < TYPES.keys()
    for kind in TYPES:
        check_source(read_header(half), kind)
