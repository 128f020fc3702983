import contextlib
import random
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from promptai.errors import ModelError, ModelFormatError, ModelNotFoundError
from promptai.models.gguf import GgufHeader, Tensor, read_header

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
TYPE_F32, TYPE_Q4_0 = 0, 2
PACKED = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}

Store = Callable[[bytes], Path]
TracedPeak = Callable[[], Callable[[], int]]


def text(value: str | bytes) -> bytes:
    """A string as GGUF writes it."""
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def entry(key: str | bytes, kind: int, value: float | str) -> bytes:
    """One key with a scalar or a string."""
    packed = text(value) if isinstance(value, str) else struct.pack(f"<{PACKED[kind]}", value)
    return text(key) + struct.pack("<I", kind) + packed


def array(key: str, kind: int, items: list[bytes], *, claimed: int | None = None) -> bytes:
    """One key with an array, which may claim another length than it has."""
    length = len(items) if claimed is None else claimed
    return text(key) + struct.pack("<IIQ", ARRAY, kind, length) + b"".join(items)


def integers(key: str, values: list[int]) -> bytes:
    """One key with an array of 32-bit numbers."""
    return array(key, I32, [struct.pack("<i", value) for value in values])


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int = 0, *, rank: int | None = None) -> bytes:
    """One line of the tensor table."""
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape) if rank is None else rank, *shape)
    return text(name) + dimensions + struct.pack("<IQ", kind, offset)


def gguf(
    entries: list[bytes],
    tensors: list[bytes] | None = None,
    data: int = 0,
    *,
    counts: tuple[int, int] | None = None,
    version: int = 3,
) -> bytes:
    """A file of these entries and tensors, aligned to 32, with ``data`` bytes of weights."""
    tensors = tensors or []
    tensor_count, key_count = counts or (len(tensors), len(entries))
    head = b"GGUF" + struct.pack("<IQQ", version, tensor_count, key_count) + b"".join(entries + tensors)
    return head.ljust(-(-len(head) // 32) * 32, b"\0") + bytes(data)


def llama(**shape: int | list[int]) -> list[bytes]:
    """The entries of a llama of 4 layers, 64 wide, with 4 heads, and what else is given."""
    facts: dict[str, int | list[int]] = {"block_count": 4, "embedding_length": 64, "attention.head_count": 4}
    facts |= {key.replace("__", "."): value for key, value in shape.items()}
    return [
        entry("general.architecture", STRING, "llama"),
        *(
            integers(f"llama.{key}", value) if isinstance(value, list) else entry(f"llama.{key}", I32, value)
            for key, value in facts.items()
        ),
    ]


#: Every kind of value, nested and long arrays, two tensors.
RICH = gguf(
    [
        *llama(context_length=8192, attention__sliding_window=512, attention__head_count_kv=[2, 0, 2, 2]),
        *(entry(f"x.{kind}", kind, 1) for kind in PACKED),
        entry("tokenizer.chat_template", STRING, "{{ messages }}"),
        array("tokenizer.ggml.tokens", STRING, [text(f"token {number}") for number in range(100)]),
        array("x.scores", F32, [struct.pack("<f", number) for number in range(1025)]),
        array("x.nested", ARRAY, [struct.pack("<IQ", U8, 2) + b"ab", struct.pack("<IQ", STRING, 1) + text("c")]),
    ],
    [tensor("token_embd.weight", (64, 4), TYPE_Q4_0), tensor("output_norm.weight", (64,), TYPE_F32, 160)],
    data=160 + 256,
)
SHORT = gguf(
    [*llama(), array("t", STRING, [text("a"), text("b")]), array("n", ARRAY, [struct.pack("<IQ", U8, 1) + b"x"])],
    [tensor("w", (64, 2), TYPE_Q4_0), tensor("n", (4,), TYPE_F32, 96)],
    data=96 + 16,
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Write bytes to a file; the same path every time."""

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
def test_where_no_file_is_it_says_so(tmp_path: Path, name: str, word: str) -> None:
    """A path that cannot be a file is one that was not found, never a traceback."""
    with pytest.raises(ModelNotFoundError, match=word):
        read_header(tmp_path / name)


@pytest.mark.parametrize(
    ("data", "word"),
    [
        pytest.param(b"", "is empty", id="empty"),
        pytest.param(b"<!DOCTYPE html><title>Sign in</title>", "not a GGUF", id="web-page"),
        pytest.param(b"GGU", "cut short", id="three-bytes"),
        pytest.param(b"ggml" + bytes(100), "not a GGUF", id="ancestor-format"),
        pytest.param(gguf([], version=1), "version 1;", id="version-1"),
        pytest.param(gguf([], version=4), "version 4;", id="version-4"),
        pytest.param(b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version", id="big-endian"),
        pytest.param(gguf([], counts=(2**63, 0)), "tensors", id="absurd-tensor-count"),
        pytest.param(gguf([], counts=(0, 2**64 - 1)), "metadata keys", id="absurd-key-count"),
        pytest.param(gguf([], counts=(0, 3)), "cut short", id="fewer-keys-than-claimed"),
        pytest.param(gguf([struct.pack("<Q", 2**40)], counts=(0, 1)), "bytes in 'key'", id="huge-key"),
        pytest.param(gguf([text("k") + struct.pack("<IQ", STRING, 2**62)]), "bytes in 'k'", id="huge-string"),
        pytest.param(gguf([text("k") + struct.pack("<IQ", STRING, 4_000_000)]), "cut short", id="long-string"),
        pytest.param(gguf([array("k", F32, [], claimed=2**61)]), "items in 'k'", id="huge-array"),
        pytest.param(gguf([array("k", F32, [], claimed=4_000_000)]), "cut short", id="long-array"),
        pytest.param(gguf([array("k", STRING, [], claimed=4_000_000)]), "cut short", id="long-text-array"),
        pytest.param(gguf([array("k", STRING, [struct.pack("<Q", 2**63)])]), "bytes in 'k'", id="huge-text-item"),
        pytest.param(
            gguf([array("k", ARRAY, [struct.pack("<IQ", ARRAY, 1) + struct.pack("<IQ", U8, 0)])]),
            "nests arrays",
            id="arrays-three-deep",
        ),
        pytest.param(gguf([text("k") + struct.pack("<I", 13)]), "value type 13", id="unknown-value-type"),
        pytest.param(gguf([array("k", 99, [b"x"])]), "value type 99", id="unknown-item-type"),
        pytest.param(gguf([], [tensor("w", (32,), 250)]), "tensor type 250", id="unknown-tensor-type"),
        pytest.param(gguf([], [tensor("w", (1,) * 5, TYPE_F32)]), "dimensions of 'w'", id="five-dimensions"),
        pytest.param(gguf([], [tensor("w", (2**63, 2**63), TYPE_F32)]), "impossible shape", id="huge-tensor"),
        pytest.param(gguf([], [tensor("w", (33,), TYPE_Q4_0)]), "impossible shape", id="half-a-block"),
        pytest.param(gguf([], [tensor("w", (16, 2), TYPE_Q4_0)], 18), "impossible shape", id="rows-of-half-a-block"),
        pytest.param(gguf([], [tensor("w", (32,), TYPE_Q4_0)], 17), "cut short: its tensors end", id="data-missing"),
        pytest.param(gguf([], [tensor("w", (1,), TYPE_F32, 2**63)], 4), "cut short: its tensors", id="offset-beyond"),
        pytest.param(gguf([entry("general.alignment", U32, 0)]), "alignment", id="alignment-0"),
        pytest.param(gguf([entry("general.alignment", U64, 2**63)]), "alignment", id="alignment-huge"),
        pytest.param(gguf([entry("general.alignment", F32, 32.0)]), "alignment", id="alignment-fraction"),
    ],
)
def test_a_damaged_file_is_refused_with_its_reason(store: Store, data: bytes, word: str) -> None:
    """Every number in the file may lie."""
    with pytest.raises(ModelFormatError, match=word):
        read_header(store(data))


def test_a_file_cut_at_any_length_is_refused(store: Store) -> None:
    """In the header or in the weights: no length but the whole one passes."""
    passed = []
    for length in range(len(SHORT)):
        path = store(SHORT[:length])
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
def test_a_hostile_name_does_not_flood_the_message(store: Store, data: bytes) -> None:
    """What a person reads is one short line, whatever the file holds."""
    with pytest.raises(ModelFormatError) as caught:
        read_header(store(data))

    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 600


def test_strings_that_together_are_huge_take_bounded_memory(tmp_path: Path, traced_peak: TracedPeak) -> None:
    """Each is within its limit; a sparse file of 80 MB on disk, which may as well be 80 GB."""
    path, size = tmp_path / "sparse.gguf", 4 * 1024 * 1024
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 0, 20))
        for number in range(20):
            file.write(text(f"k{number}") + struct.pack("<IQ", STRING, size))
            file.seek(size, 1)
        file.truncate()

    peak = traced_peak()
    with contextlib.suppress(ModelFormatError):  # to refuse it is as good as to skip it
        read_header(path)

    assert peak() < 50e6


def mutate(generator: random.Random) -> bytes:
    """A rich header with up to eight wounds, most of them where the lengths are."""
    data = bytearray(RICH)
    for _ in range(generator.choice([1, 1, 2, 8])):
        place = generator.randrange(generator.choice([len(data), 1000]) if len(data) > 1000 else len(data))
        wound = generator.randrange(6)
        if wound == 0:
            data[place] ^= 1 << generator.randrange(8)
        elif wound == 1:
            data[place : place + 8] = struct.pack("<Q", generator.choice([0, 2**31, 2**63, 2**64 - 1, 65_535, 4096]))
        elif wound == 2:
            data[place : place + 4] = struct.pack("<I", generator.randrange(16))
        elif wound == 3:
            del data[place : place + generator.randint(1, 40)]
        elif wound == 4:
            data[place:place] = generator.randbytes(generator.randint(1, 40))
        else:
            del data[max(place, 24) :]
    return bytes(data)


@pytest.mark.timeout(30)  # each has a second of its own, below
def test_500_mutated_headers_end_in_a_model_error_or_a_header(store: Store, traced_peak: TracedPeak) -> None:
    """Fast, in little memory, and what is read can be asked everything; the seed names the culprit."""
    read_header(store(RICH))  # imports count for nobody
    refused: dict[int, str] = {}
    slowest = 0.0
    peak = traced_peak()
    for seed in range(500):
        path = store(mutate(random.Random(seed)))
        started = time.monotonic()
        try:
            ask_everything(read_header(path))
        except ModelError as error:
            refused[seed] = error.message
        except Exception as error:  # noqa: BLE001  whatever it is, it is the finding
            pytest.fail(f"seed {seed}: {error!r}")
        slowest = max(slowest, time.monotonic() - started)

    assert 20 < len(refused) < 480
    assert [seed for seed, message in refused.items() if "\n" in message] == []
    assert slowest < 1.0
    assert peak() < 50e6


def ask_everything(header: GgufHeader) -> None:
    """Every property, as the command line does."""
    assert header.kv_bytes_per_token() is None or header.parameters >= 0
    assert all((header.architecture, header.name, header.quantization)) or header.synthetic
    assert header.tensor_bytes >= 0
    for value in (header.context_length, header.vocabulary, header.chat_template):
        assert value is None or value or value == 0


def test_a_synthetic_model_reads_back_as_what_was_written(small_model: Path) -> None:
    """Counted by hand for 2 layers, 64 wide, 4 heads over 2, 128 in the middle, 512 tokens."""
    header = read_header(small_model)
    matrices = 2 * 512 * 64 + 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128)
    norms = 5 * 64

    assert (header.version, header.architecture, header.name) == (3, "llama", "small")
    assert matrices + norms == header.parameters
    assert matrices // 32 * 18 + norms * 4 == header.tensor_bytes
    assert header.quantization == "Q4_0"
    assert header.kv_bytes_per_token() == 2 * 2 * (16 + 16) * 2
    assert header.kv_bytes_per_token(bytes_per_value=1.0625) == 2 * 2 * (16 + 16) * 1.0625
    assert (header.context_length, header.vocabulary) == (8192, 512)
    assert header.chat_template is None
    assert header.synthetic
    assert small_model.stat().st_size == header.file_bytes
    assert Tensor("blk.1.attn_k.weight", (64, 32), "Q4_0", 59904, 1152) == next(
        found for found in header.tensors if found.name == "blk.1.attn_k.weight"
    )


def test_every_kind_of_value_is_read_and_long_arrays_are_only_counted(store: Store) -> None:
    """A vocabulary would be most of the memory and nobody asks for it."""
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


def test_a_file_that_says_nothing_is_named_after_itself(store: Store) -> None:
    """Version 2 without keys or tensors is a whole file all the same."""
    header = read_header(store(gguf([], version=2)))

    assert (header.architecture, header.name, header.quantization) == ("unknown", "model", "unknown")
    assert (
        header.parameters,
        header.tensor_bytes,
        header.context_length,
        header.kv_bytes_per_token(),
    ) == (0, 0, None, None)


def test_an_alignment_of_its_own_moves_the_data(store: Store) -> None:
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
    ],
)
def test_the_kv_cache_of_a_token_is_counted_over_the_layers(
    store: Store, entries: list[bytes], expected: int | None
) -> None:
    """Kv heads times the lengths of key and value, two bytes each; None where there is no such cache."""
    assert expected == read_header(store(gguf(entries))).kv_bytes_per_token()
