import struct
from pathlib import Path

import msgspec
import pytest

from promptai.errors import HubUnreachableError, ModelFormatError
from promptai.models.gguf import read_header
from promptai.models.remote import read_remote_header
from support_gguf import F32, RICH, STRING, TYPE_F32, U8, array, entry, gguf, llama, tensor, text

MIB = 1024 * 1024


class Elsewhere:
    """A remote file that records the requested ranges."""

    def __init__(self, data: bytes, *, file_bytes: int | None = None) -> None:
        self.data = data
        self.file_bytes = len(data) if file_bytes is None else file_bytes
        self.asked: list[tuple[int, int]] = []

    def fetch(self, start: int, length: int) -> bytes:
        """Return a range of the file, as its server would."""
        self.asked.append((start, length))
        return self.data[start : start + length]


def large_vocabulary(tokens: int) -> bytes:
    """A model of 16 MiB with a header of this vocabulary's tokens, scores and merges."""
    return gguf(
        [
            *llama(context_length=8192),
            array("tokenizer.ggml.tokens", STRING, [text("token")] * tokens),
            array("tokenizer.ggml.scores", F32, [bytes(4)] * tokens),
            array("tokenizer.ggml.merges", STRING, [text("to ken")] * tokens),
            entry("tokenizer.chat_template", STRING, "{{ messages }}"),
        ],
        [tensor("w", (4 * MIB,), TYPE_F32)],
        16 * MIB,
    )


@pytest.mark.parametrize("data", [RICH, large_vocabulary(300), large_vocabulary(60_000)], ids=["small", "300", "60k"])
def test_equals_a_local_read(tmp_path: Path, data: bytes) -> None:
    """Only the path differs."""
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    elsewhere = Elsewhere(data)

    header = read_remote_header(elsewhere.fetch, elsewhere.file_bytes, "hub:a/b:model.gguf")

    assert msgspec.structs.replace(read_header(path), path="hub:a/b:model.gguf") == header


def test_a_small_header_takes_one_small_request() -> None:
    """A quarter of a MiB for a model of 16 MiB."""
    elsewhere = Elsewhere(large_vocabulary(300))

    read_remote_header(elsewhere.fetch, elsewhere.file_bytes, "x")

    assert elsewhere.asked == [(0, MIB // 4)]


def test_a_large_header_takes_a_few_growing_requests_and_no_weights() -> None:
    """Consecutive ranges, each twice the last up to 4 MiB; at most one extends beyond the header."""
    data = large_vocabulary(250_000)
    elsewhere = Elsewhere(data)

    header = read_remote_header(elsewhere.fetch, elsewhere.file_bytes, "x")

    lengths = [length for _, length in elsewhere.asked]
    assert lengths[:3] == [MIB // 4, MIB // 2, MIB]
    assert max(lengths) <= 4 * MIB
    assert len(lengths) <= 7
    assert [start for start, _ in elsewhere.asked] == sorted({start for start, _ in elsewhere.asked})
    assert sum(lengths) < header.data_offset + 4 * MIB


def test_does_not_request_long_arrays_of_numbers() -> None:
    """Scores and types of tokens take a tenth of a header."""
    numbers = 8 * MIB
    data = gguf([array("x", U8, [bytes(numbers // 4)], claimed=numbers // 4), entry("y", STRING, "z")])
    elsewhere = Elsewhere(data)

    header = read_remote_header(elsewhere.fetch, elsewhere.file_bytes, "x")

    assert header.metadata["y"] == "z"
    assert sum(length for _, length in elsewhere.asked) <= MIB // 4 + MIB // 2


def test_reports_every_byte_received() -> None:
    """For a progress bar."""
    elsewhere = Elsewhere(large_vocabulary(60_000))
    came: list[int] = []

    read_remote_header(elsewhere.fetch, elsewhere.file_bytes, "x", progress=came.append)

    assert [length for _, length in elsewhere.asked] == came


def test_rejects_a_file_truncated_on_upload_by_its_size() -> None:
    """The header is complete; the missing rest is detected without requesting it."""
    elsewhere = Elsewhere(RICH, file_bytes=len(RICH) - 1)

    with pytest.raises(ModelFormatError, match=r"hub:a/b:c\.gguf is truncated: its tensors end"):
        read_remote_header(elsewhere.fetch, elsewhere.file_bytes, "hub:a/b:c.gguf")


@pytest.mark.parametrize(
    ("data", "size", "word"),
    [
        (b"", 0, "is empty"),
        (b"<!DOCTYPE html><title>Sign in</title>", 37, "not a GGUF"),
        (RICH[:100], len(RICH), "shrank while it was read"),
        (RICH[:100], 100, "truncated inside its header"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0), 10**9, "tensors"),
    ],
    ids=["empty", "web-page", "server-stops-short", "cut", "absurd"],
)
def test_rejects_incomplete_models(data: bytes, size: int, word: str) -> None:
    """As for local files, and after two requests at most."""
    elsewhere = Elsewhere(data, file_bytes=size)

    with pytest.raises(ModelFormatError, match=word):
        read_remote_header(elsewhere.fetch, elsewhere.file_bytes, "x")

    assert len(elsewhere.asked) <= 2


def test_gives_up_on_an_endless_header_after_64_mib() -> None:
    """An untrusted file does not determine how much is requested."""
    fetched = 0
    strings = struct.pack("<Q", 100_000) + bytes(100_000)

    def fetch(start: int, length: int) -> bytes:
        nonlocal fetched
        fetched += length
        if start == 0:
            begin = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("k") + struct.pack("<IIQ", 9, STRING, 1_000_000)
            return (begin + strings * 3)[:length]
        shift = (start - 57) % len(strings)
        return (strings * (length // len(strings) + 2))[shift : shift + length]

    with pytest.raises(ModelFormatError, match="larger than 64 MiB"):
        read_remote_header(fetch, 10**12, "x")

    assert 50 * MIB < fetched < 70 * MIB


def test_ignores_bytes_beyond_the_requested_range() -> None:
    """Some servers respond to a range request with the whole file."""
    header = read_remote_header(lambda start, _length: RICH[start:] + b"more", len(RICH), "x")

    assert len(header.tensors) == 2


def test_passes_connection_errors_through() -> None:
    """The error of the hub's client is unchanged."""

    def fetch(_start: int, _length: int) -> bytes:
        raise HubUnreachableError("the hub cannot be reached", hint="connect")

    with pytest.raises(HubUnreachableError, match="cannot be reached"):
        read_remote_header(fetch, 10**6, "x")
