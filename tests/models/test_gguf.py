import contextlib
import os
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from promptai.errors import ModelFormatError, ModelNotFoundError
from promptai.models.gguf import part_names, read_header
from support_gguf import (
    ARRAY,
    BOOL,
    F32,
    PACKED,
    RICH,
    STRING,
    TYPE_F32,
    TYPE_Q4_0,
    U8,
    U16,
    U32,
    U64,
    Store,
    array,
    entry,
    gguf,
    llama,
    tensor,
    text,
)

SHORT = gguf(
    [*llama(), array("t", STRING, [text("a"), text("b")]), array("n", ARRAY, [struct.pack("<IQ", U8, 1) + b"x"])],
    [tensor("w", (64, 2), TYPE_Q4_0), tensor("n", (4,), TYPE_F32, 96)],
    data=96 + 16,
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Write bytes to a file, always at the same path."""

    def write(data: bytes) -> Path:
        path = tmp_path / "model.gguf"
        path.write_bytes(data)
        return path

    return write


@pytest.mark.parametrize(
    ("name", "word"),
    [("absent.gguf", "does not exist"), ("", "is a directory"), ("x" * 300, "x"), ("a\0b", "does not exist")],
    ids=["absent", "directory", "name-too-long", "null-byte"],
)
def test_reports_a_missing_file(tmp_path: Path, name: str, word: str) -> None:
    """An impossible path is an ordinary "not found" error, never a traceback."""
    with pytest.raises(ModelNotFoundError, match=word):
        read_header(tmp_path / name)


@pytest.mark.parametrize(
    ("data", "word"),
    [
        pytest.param(b"", "is empty", id="empty"),
        pytest.param(b"<!DOCTYPE html><title>Sign in</title>", "not a GGUF", id="web-page"),
        pytest.param(b"GGU", "truncated", id="three-bytes"),
        pytest.param(b"ggml" + bytes(100), "not a GGUF", id="ancestor-format"),
        pytest.param(gguf([], version=1), "version 1 ", id="version-1"),
        pytest.param(gguf([], version=4), "version 4 ", id="version-4"),
        pytest.param(b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian", id="big-endian"),
        pytest.param(gguf([], counts=(2**63, 0)), "tensors", id="absurd-tensor-count"),
        pytest.param(gguf([], counts=(0, 2**64 - 1)), "metadata keys", id="absurd-key-count"),
        pytest.param(gguf([entry("k", U8, 1)], counts=(0, 3)), "empty key", id="fewer-keys-than-claimed"),
        pytest.param(gguf([entry("", U8, 1)]), "empty key", id="empty-key"),
        pytest.param(gguf([entry("k", U8, 1), entry("k", U8, 2)]), "the key 'k' twice", id="key-twice"),
        pytest.param(gguf([entry("k\0y", U8, 1)]), "NUL character in the key", id="null-in-a-key"),
        pytest.param(gguf([struct.pack("<Q", 2**40)], counts=(0, 1)), "bytes at 'key'", id="huge-key"),
        pytest.param(gguf([text("k") + struct.pack("<IQ", STRING, 2**62)]), "bytes at 'k'", id="huge-string"),
        pytest.param(gguf([text("k") + struct.pack("<IQ", STRING, 4_000_000)]), "truncated", id="long-string"),
        pytest.param(gguf([array("k", F32, [], claimed=2**61)]), "items at 'k'", id="huge-array"),
        pytest.param(gguf([array("k", F32, [], claimed=4_000_000)]), "truncated", id="long-array"),
        pytest.param(gguf([array("k", STRING, [], claimed=4_000_000)]), "limit of 2,000,000", id="long-text-array"),
        pytest.param(gguf([array("k", STRING, [], claimed=2_000_000)]), "truncated", id="cut-text-array"),
        pytest.param(gguf([array("k", STRING, [struct.pack("<Q", 2**63)])]), "bytes at 'k'", id="huge-text-item"),
        pytest.param(
            gguf([array("k", ARRAY, [struct.pack("<IQ", ARRAY, 1) + struct.pack("<IQ", U8, 0)])]),
            "nests arrays",
            id="arrays-three-deep",
        ),
        pytest.param(gguf([text("k") + struct.pack("<I", 13)]), "value type 13", id="unknown-value-type"),
        pytest.param(gguf([array("k", 99, [b"x"])]), "value type 99", id="unknown-item-type"),
        pytest.param(gguf([], [tensor("w", (32,), 250)]), "unknown type 250", id="unknown-tensor-type"),
        pytest.param(gguf([], [tensor("w", (1,) * 5, TYPE_F32)]), "dimensions at 'w'", id="five-dimensions"),
        pytest.param(gguf([], [tensor("w", (2**63, 2**63), TYPE_F32)]), "invalid shape", id="huge-tensor"),
        pytest.param(gguf([], [tensor("w", (33,), TYPE_Q4_0)]), "invalid shape", id="half-a-block"),
        pytest.param(gguf([], [tensor("w", (16, 2), TYPE_Q4_0)], 18), "invalid shape", id="rows-of-half-a-block"),
        pytest.param(gguf([], [tensor("w", (32,), TYPE_Q4_0)], 17), "truncated: its tensors end", id="data-missing"),
        pytest.param(gguf([], [tensor("w", (1,), TYPE_F32, 2**63)], 4), "expected 0", id="offset-beyond"),
        pytest.param(gguf([], [tensor("w", (1,), TYPE_F32)] * 2, 36), "tensor 'w' twice", id="tensor-twice"),
        pytest.param(gguf([], [tensor("w\0", (1,), TYPE_F32)], 4), "NUL character in", id="null-in-a-tensor"),
        pytest.param(
            gguf([], [tensor("v", (64,), TYPE_F32), tensor("w", (64,), TYPE_F32, 32)], 512),
            "'w' at offset 32, expected 256",
            id="tensors-overlap",
        ),
        pytest.param(gguf([], [tensor("w", (2**63, 0), TYPE_F32)]), "invalid shape", id="huge-side-of-nothing"),
        pytest.param(gguf([entry("general.alignment", U32, 0)]), "alignment", id="alignment-0"),
        pytest.param(gguf([entry("general.alignment", U32, 48)]), "alignment", id="alignment-48"),
        pytest.param(gguf([entry("general.alignment", BOOL, True)]), "alignment", id="alignment-true"),
        pytest.param(gguf([entry("general.alignment", U64, 2**63)]), "alignment", id="alignment-huge"),
        pytest.param(gguf([entry("general.alignment", F32, 32.0)]), "alignment", id="alignment-fraction"),
    ],
)
def test_rejects_a_damaged_file_with_the_reason(store: Store, data: bytes, word: str) -> None:
    """Every number in the file may be wrong."""
    with pytest.raises(ModelFormatError, match=word):
        read_header(store(data))


def test_rejects_a_file_truncated_at_any_length(store: Store) -> None:
    """In the header or in the weights: only the full length passes."""
    path = store(SHORT)
    passed = []
    for length in reversed(range(len(SHORT))):
        os.truncate(path, length)
        try:
            read_header(path)
        except ModelFormatError:
            continue
        passed.append(length)

    assert passed == []
    assert len(SHORT) == read_header(store(SHORT)).file_bytes


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(gguf([text("k\n" * 50_000) + struct.pack("<I", 99)]), id="key"),
        pytest.param(
            gguf([array("k\n" * 50_000, ARRAY, [struct.pack("<IQ", ARRAY, 1) + struct.pack("<IQ", U8, 0)])]),
            id="array",
        ),
        pytest.param(gguf([], [tensor("w\n" * 50_000, (33,), TYPE_Q4_0)]), id="tensor"),
        pytest.param(gguf([entry("general.alignment", STRING, "a\n" * 50_000)]), id="alignment"),
    ],
)
def test_a_hostile_name_does_not_lengthen_the_message(store: Store, data: bytes) -> None:
    """The message is one short line, regardless of the file."""
    with pytest.raises(ModelFormatError) as caught:
        read_header(store(data))

    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 600


def many(*, keys: int = 0, tensors: int = 0) -> bytes:
    """The start of a file with these counts."""
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys)


def long_texts() -> Iterator[bytes | int]:
    yield many(keys=20)
    for number in range(20):
        yield text(f"k{number}") + struct.pack("<IQ", STRING, 4_000_000)
        yield 4_000_000


def empty_texts() -> Iterator[bytes | int]:
    yield many(keys=9)
    for number in range(9):
        yield text(f"k{number}") + struct.pack("<IIQ", ARRAY, STRING, 249_999)
        yield 249_999 * 8


def empty_lists() -> Iterator[bytes | int]:
    yield many(keys=9)
    for number in range(9):
        yield text(f"k{number}") + struct.pack("<IIQ", ARRAY, ARRAY, 9_999)
        yield 9_999 * 12


def short_lists() -> Iterator[bytes | int]:
    yield many(keys=16_384)
    for number in range(16_384):
        yield text(f"k{number}") + struct.pack("<IIQ", ARRAY, F32, 1024)
        yield 4096


def far_apart_texts() -> Iterator[bytes | int]:
    yield many(keys=1) + text("k") + struct.pack("<IIQ", ARRAY, STRING, 300)
    for _ in range(300):
        yield struct.pack("<Q", 260_000)
        yield 260_000


def keys_without_end() -> Iterator[bytes | int]:
    yield many(keys=16_384)
    for number in range(16_384):
        yield entry(f"k{number:0500}", STRING, "x" * 500)


def tensors_without_end() -> Iterator[bytes | int]:
    yield many(tensors=32_768)
    for number in range(32_768):
        yield tensor(f"w{number:050}", (1, 0, 1, 1), TYPE_F32)


@pytest.mark.parametrize(
    "pieces",
    [long_texts, empty_texts, empty_lists, short_lists, far_apart_texts, keys_without_end, tensors_without_end],
)
def test_files_within_every_single_limit_take_less_than_a_second(
    tmp_path: Path, pieces: Callable[[], Iterator[bytes | int]]
) -> None:
    """Each number is allowed, but together they must not overload the machine. Zeros are holes in the file."""
    path = tmp_path / "large.gguf"
    with path.open("wb") as file:
        for piece in pieces():
            if isinstance(piece, int):
                file.seek(piece, 1)
            else:
                file.write(piece)
        file.truncate()
    started = time.process_time()
    with contextlib.suppress(ModelFormatError):  # rejecting the file is as good as reading it
        read_header(path)

    assert time.process_time() - started < 1.0


def test_skips_a_vocabulary_of_256_k(tmp_path: Path) -> None:
    """As in the largest real models: tokens, scores, types and twice as many merges."""
    tokens, merges = 262_144, 514_906
    path = tmp_path / "large.gguf"
    entries = [
        *llama(context_length=8192),
        array("tokenizer.ggml.tokens", STRING, [text("token")] * tokens),
        array("tokenizer.ggml.scores", F32, [bytes(4)] * tokens),
        array("tokenizer.ggml.merges", STRING, [text("to ken")] * merges),
    ]
    path.write_bytes(gguf(entries))

    header = read_header(path)

    assert (header.vocabulary, header.array_lengths["tokenizer.ggml.merges"]) == (tokens, merges)


def test_reads_the_part_number_of_a_split_model(store: Store) -> None:
    """Numbered from 0, as in llama.cpp; a model in one file has no part number."""
    parts = [entry("split.no", U16, 1), entry("split.count", U16, 3)]

    assert read_header(store(gguf(parts))).split == (1, 3)
    assert read_header(store(gguf([entry("split.count", U16, 1), entry("split.no", U16, 0)]))).split is None
    assert read_header(store(gguf([]))).split is None


def test_records_the_position_of_each_entry(store: Store) -> None:
    """For copying a vocabulary without parsing it."""
    entries = [entry("a", U32, 7), array("b", STRING, [text("x" * 300_000), text("")]), entry("c", STRING, "d")]
    whole = gguf(entries)

    spans = read_header(store(whole)).key_spans

    assert entries == [whole[start:end] for start, end in spans.values()]
    assert list(spans) == ["a", "b", "c"]


def test_reads_every_value_type_and_only_counts_long_arrays(store: Store) -> None:
    """A vocabulary would take most of the memory, and no caller uses it."""
    header = read_header(store(RICH))

    assert [header.metadata[f"x.{kind}"] for kind in sorted(PACKED)] == [1, 1, 1, 1, 1, 1, 1.0, True, 1, 1, 1.0]
    assert (header.array_lengths) == {
        "llama.attention.head_count_kv": 4,
        "tokenizer.ggml.tokens": 100,
        "x.scores": 1025,
        "x.nested": 2,
    }
    assert {"tokenizer.ggml.tokens", "x.scores", "x.nested"}.isdisjoint(header.metadata)
    assert header.chat_template == "{{ messages }}"
    assert header.sliding_window == 512
    assert not header.synthetic


def test_an_unnamed_model_is_named_after_its_file(store: Store) -> None:
    """A version 2 file without keys or tensors is complete."""
    header = read_header(store(gguf([], version=2)))

    assert (header.architecture, header.name, header.quantization) == ("unknown", "model", "unknown")
    assert (
        header.parameters,
        header.tensor_bytes,
        header.context_length,
        header.kv_bytes_per_token(),
    ) == (0, 0, None, None)


def test_a_custom_alignment_moves_the_data(store: Store) -> None:
    """64 instead of 32."""
    header = read_header(store(gguf([entry("general.alignment", U32, 64)]) + bytes(64)))

    assert header.data_offset == 64


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        pytest.param(llama(attention__head_count=0), None, id="no-attention"),
        pytest.param(llama()[:2], None, id="no-shape"),
        pytest.param(llama(block_count=0), None, id="no-layers"),
        pytest.param(llama(attention__head_count=-4), None, id="negative-heads"),
        pytest.param(llama(attention__head_count_kv=-2), None, id="negative-kv-heads"),
        pytest.param(llama(), 4 * 4 * (16 + 16) * 2, id="as-many-kv-heads-as-heads"),
        pytest.param(llama(attention__head_count_kv=1), 4 * 1 * (16 + 16) * 2, id="one-kv-head"),
        pytest.param(llama(attention__head_count_kv=[2, 0, 1, 2]), 5 * (16 + 16) * 2, id="kv-heads-by-layer"),
        pytest.param(
            llama(attention__head_count=[4, 0, 2, 4], attention__head_count_kv=[2, 0, 1, 2]),
            5 * (16 + 16) * 2,
            id="both-by-layer",
        ),
        pytest.param(
            llama(attention__head_count_kv=2, attention__key_length=24, attention__value_length=8),
            4 * 2 * (24 + 8) * 2,
            id="own-head-lengths",
        ),
        pytest.param(llama(ssm__state_size=128), None, id="recurrent-layers-that-are-not-named"),
        pytest.param(
            llama(shortconv__l_cache=3, attention__head_count_kv=[2, 0, 1, 2]),
            5 * (16 + 16) * 2,
            id="recurrent-layers-without-heads",
        ),
    ],
)
def test_the_kv_cache_of_a_token_is_summed_over_the_layers(
    store: Store, entries: list[bytes], expected: int | None
) -> None:
    """KV heads times the lengths of key and value, two bytes each; None for other kinds of cache."""
    assert expected == read_header(store(gguf(entries))).kv_bytes_per_token()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("m.gguf", ["m.gguf"]),
        ("m-00002-of-00003.gguf", ["m-00001-of-00003.gguf", "m-00002-of-00003.gguf", "m-00003-of-00003.gguf"]),
        ("m-00004-of-00003.gguf", ["m-00004-of-00003.gguf"]),
        ("m-00000-of-00003.gguf", ["m-00000-of-00003.gguf"]),
        ("m-00001-of-99999.gguf", ["m-00001-of-99999.gguf"]),
        ("m-1-of-3.gguf", ["m-1-of-3.gguf"]),
    ],
    ids=["whole", "part", "beyond", "before", "absurd", "other-numbers"],
)
def test_derives_the_names_of_all_parts(name: str, expected: list[str]) -> None:
    """As llama.cpp's splitter names them."""
    assert expected == part_names(name)
