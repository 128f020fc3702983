from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from promptai.models import requantize
from promptai.models.gguf import GgufHeader, read_header
from promptai.models.ggufbytes import Tensor
from promptai.models.requantize import rewrite, target_type
from support_gguf import F32, STRING, TYPE_F32, U32, array, entry, llama, tensor, text
from support_gguf import gguf as gguf_of
from support_quantize import write_half

NOTES = {"promptai.source.name": "x", "promptai.quantized_by": "a test"}
TracedPeak = Callable[[], Callable[[], int]]


@pytest.fixture(scope="session")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model in 16 bits."""
    return write_half(tmp_path_factory.mktemp("half") / "tiny-f16.gguf")


def numbers_of(path: Path, found: Tensor, header: GgufHeader) -> "np.ndarray[tuple[int, ...], np.dtype[np.float32]]":
    data = path.read_bytes()[header.data_offset + found.offset :][: found.size_bytes]
    kind = gguf.GGMLQuantizationType[found.quantization]
    plain = {"F32": np.float32, "F16": np.float16}.get(found.quantization, np.uint8)
    values: np.ndarray[tuple[int, ...], np.dtype[np.float32]] = gguf.quants.dequantize(
        np.frombuffer(data, plain), kind
    ).ravel()
    return values


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("blk.0.attn_q.weight", (256, 256), "Q4_0"),
        ("blk.0.ffn_down_exps.weight", (256, 256, 8), "Q4_0"),
        ("token_embd.weight", (256, 512), "Q4_0"),
        ("output.weight", (256, 512), "Q8_0"),
        ("blk.0.attn_q.weight", (40, 256), "F16"),
        ("blk.0.attn_norm.weight", (256,), "F32"),
        ("blk.0.attn_q_norm.weight", (64, 2), "F32"),
        ("blk.0.attn_q.bias", (256, 2), "F32"),
        ("blk.0.ffn_gate_inp.weight", (256, 8), "F32"),
        ("blk.0.ssm_conv1d.weight", (4, 256), "F32"),
        ("position_embd.weight", (256, 512), "F32"),
        ("blk.0.time_mix_v1.weight", (32, 256), "F32"),
        ("blk.0.time_mix_decay_w2.weight", (32, 256), "F32"),
        ("blk.0.time_mix_value.weight", (256, 256), "Q4_0"),
        ("blk.0.time_mix_gate.weight", (256, 256), "Q4_0"),
        ("w.weight", (256, 1, 1), "F32"),
    ],
)
def test_small_and_sensitive_tensors_keep_their_type(name: str, shape: tuple[int, ...], expected: str) -> None:
    """As in llama.cpp, except for the output matrix: Q8_0 instead of Q6_K."""
    assert expected == target_type(Tensor(name, shape, "F32", 0, 0), "q4_0", tied=False)


def test_tied_embeddings_and_eight_experts_get_better_types() -> None:
    """Two further rules of llama.cpp."""
    embedding, value = (Tensor(name, (256, 256), "F16", 0, 0) for name in ("token_embd.weight", "blk.0.attn_v.weight"))

    assert target_type(embedding, "q4_0", tied=True) == "Q8_0"
    assert [target_type(value, "q4_0", tied=True, experts=count) for count in (0, 8)] == ["Q4_0", "Q8_0"]


@pytest.mark.parametrize("kind", ["q4_0", "q8_0"])
def test_each_tensor_equals_the_gguf_package_s_conversion(
    half: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when it is converted in many chunks."""
    monkeypatch.setattr(requantize, "_CHUNK_WEIGHTS", 4096)
    old = read_header(half)

    rewrite(half, old, tmp_path / "new.gguf", kind, NOTES, lambda _: None)

    new = read_header(tmp_path / "new.gguf")
    assert [(t.name, t.shape) for t in old.tensors] == [(t.name, t.shape) for t in new.tensors]
    for before, after in zip(old.tensors[:12], new.tensors[:12], strict=True):
        wanted = gguf.GGMLQuantizationType[after.quantization]
        values = numbers_of(half, before, old)
        expected = gguf.quants.dequantize(gguf.quants.quantize(values, wanted), wanted)
        assert np.array_equal(expected, numbers_of(tmp_path / "new.gguf", after, new))
    assert {"q4_0": {"Q4_0", "Q8_0", "F32"}, "q8_0": {"Q8_0", "F32"}}[kind] == {t.quantization for t in new.tensors}


def test_the_metadata_is_copied_byte_for_byte(half: Path, tmp_path: Path) -> None:
    """Except for the keys with the file's type; the notes are added."""
    new_path = tmp_path / "new.gguf"
    rewrite(half, read_header(half), new_path, "q4_0", NOTES, lambda _: None)

    old, new = read_header(half), read_header(new_path)
    old_bytes, new_bytes = half.read_bytes(), new_path.read_bytes()
    copied = old.key_spans.keys() - {"general.file_type", "general.quantization_version"}
    assert len(copied) > 25
    assert all(old_bytes[slice(*old.key_spans[key])] == new_bytes[slice(*new.key_spans[key])] for key in copied)
    assert {key: new.metadata[key] for key in NOTES} == NOTES
    assert (new.metadata["general.file_type"], new.metadata["general.quantization_version"]) == (2, 2)
    assert new.key_spans.keys() == old.key_spans.keys() | NOTES.keys()


def test_keeps_a_custom_alignment(tmp_path: Path) -> None:
    """Tensors start at multiples of it."""
    source = tmp_path / "source.gguf"
    tensors = [tensor("a.weight", (32, 2), TYPE_F32), tensor("b.weight", (32, 2), TYPE_F32, 256)]
    whole = gguf_of([entry("general.alignment", U32, 128)], tensors)
    source.write_bytes(whole.ljust(-(-len(whole) // 128) * 128, b"\0") + bytes(512))

    rewrite(source, read_header(source), tmp_path / "new.gguf", "q4_0", {}, lambda _: None)

    new = read_header(tmp_path / "new.gguf")
    assert new.data_offset % 128 == 0
    assert [found.offset for found in new.tensors] == [0, 128]


def test_holds_one_chunk_of_a_tensor_in_memory(
    half: Path, tmp_path: Path, traced_peak: TracedPeak, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A board can quantise a model that it could not load."""
    monkeypatch.setattr(requantize, "_CHUNK_WEIGHTS", 16 * 1024)

    peak = traced_peak()
    rewrite(half, read_header(half), tmp_path / "new.gguf", "q8_0", {}, lambda _: None)

    assert peak() < half.stat().st_size / 4


def test_copies_a_vocabulary_without_parsing_it(tmp_path: Path) -> None:
    """Bytes that are not valid text included."""
    vocabulary = array("tokenizer.ggml.tokens", STRING, [text(b"\xff\xfe"), text("b")])
    source = tmp_path / "source.gguf"
    source.write_bytes(gguf_of([*llama(), vocabulary, array("s", F32, [bytes(4)] * 2000)]))

    rewrite(source, read_header(source), tmp_path / "new.gguf", "q8_0", NOTES, lambda _: None)

    header = read_header(tmp_path / "new.gguf")
    assert vocabulary == (tmp_path / "new.gguf").read_bytes()[slice(*header.key_spans["tokenizer.ggml.tokens"])]
    assert header.array_lengths["s"] == 2000
