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
    """A file on another machine that notes what was asked of it."""

    def __init__(self, data: bytes, *, file_bytes: int | None = None) -> None:
        self.data = data
        self.file_bytes = len(data) if file_bytes is None else file_bytes
        self.asked: list[tuple[int, int]] = []

    def fetch(self, start: int, length: int) -> bytes:
        """What its server would answer."""
        self.asked.append((start, length))
        return self.data[start : start + length]


def large_vocabulary(tokens: int) -> bytes:
    """A model of 16 MiB whose header takes tokens, scores and merges of this vocabulary."""
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
def test_it_reads_the_same_as_from_a_disk(tmp_path: Path, data: bytes) -> None:
    """Only where it was read differs."""
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    elsewhere = Elsewhere(data)

    header = read_remote_header(elsewhere.fetch, elsewhere.file_bytes, "hub:a/b:model.gguf")

    assert msgspec.structs.replace(read_header(path), path="hub:a/b:model.gguf") == header


def test_a_small_header_is_one_small_request() -> None:
    """Of a model of 16 MiB, a quarter of one."""
    elsewhere = Elsewhere(large_vocabulary(300))

    read_remote_header(elsewhere.fetch, elsewhere.file_bytes, "x")

    assert elsewhere.asked == [(0, MIB // 4)]


def test_a_large_header_is_a_few_growing_requests_and_no_weights() -> None:
    """Each twice the last, up to 4 MiB, one after the other; beyond the header at most one piece."""
    data = large_vocabulary(250_000)
    elsewhere = Elsewhere(data)

    header = read_remote_header(elsewhere.fetch, elsewhere.file_bytes, "x")

    lengths = [length for _, length in elsewhere.asked]
    assert lengths[:3] == [MIB // 4, MIB // 2, MIB]
    assert max(lengths) <= 4 * MIB
    assert len(lengths) <= 7
    assert [start for start, _ in elsewhere.asked] == sorted({start for start, _ in elsewhere.asked})
    assert sum(lengths) < header.data_offset + 4 * MIB


def test_long_lists_of_numbers_are_skipped_unfetched() -> None:
    """Scores and types of tokens are a tenth of a header."""
    numbers = 8 * MIB
    data = gguf([array("x", U8, [bytes(numbers // 4)], claimed=numbers // 4), entry("y", STRING, "z")])
    elsewhere = Elsewhere(data)

    header = read_remote_header(elsewhere.fetch, elsewhere.file_bytes, "x")

    assert header.metadata["y"] == "z"
    assert sum(length for _, length in elsewhere.asked) <= MIB // 4 + MIB // 2


def test_every_byte_that_comes_is_reported() -> None:
    """To a progress line."""
    elsewhere = Elsewhere(large_vocabulary(60_000))
    came: list[int] = []

    read_remote_header(elsewhere.fetch, elsewhere.file_bytes, "x", progress=came.append)

    assert [length for _, length in elsewhere.asked] == came


def test_a_file_that_was_cut_when_it_was_uploaded_is_refused_by_its_size() -> None:
    """The header is whole; nobody has to fetch the rest to find that it is not there."""
    elsewhere = Elsewhere(RICH, file_bytes=len(RICH) - 1)

    with pytest.raises(ModelFormatError, match=r"hub:a/b:c\.gguf is cut short: its tensors end"):
        read_remote_header(elsewhere.fetch, elsewhere.file_bytes, "hub:a/b:c.gguf")


@pytest.mark.parametrize(
    ("data", "size", "word"),
    [
        (b"", 0, "is empty"),
        (b"<!DOCTYPE html><title>Sign in</title>", 37, "not a GGUF"),
        (RICH[:100], len(RICH), "became shorter while it was read"),
        (RICH[:100], 100, "cut short inside its header"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0), 10**9, "tensors"),
    ],
    ids=["empty", "web-page", "server-stops-short", "cut", "absurd"],
)
def test_what_is_no_whole_model_is_refused(data: bytes, size: int, word: str) -> None:
    """As from a disk, and after two requests at most."""
    elsewhere = Elsewhere(data, file_bytes=size)

    with pytest.raises(ModelFormatError, match=word):
        read_remote_header(elsewhere.fetch, elsewhere.file_bytes, "x")

    assert len(elsewhere.asked) <= 2


def test_a_header_without_end_is_given_up_after_64_mib() -> None:
    """A stranger's file decides how long it is, not how much is fetched."""
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

    with pytest.raises(ModelFormatError, match="more than 64 MiB"):
        read_remote_header(fetch, 10**12, "x")

    assert 50 * MIB < fetched < 70 * MIB


def test_a_server_that_sends_more_than_asked_changes_nothing() -> None:
    """Some answer a range with everything."""
    header = read_remote_header(lambda start, _length: RICH[start:] + b"more", len(RICH), "x")

    assert len(header.tensors) == 2


def test_the_line_that_breaks_is_named_as_such() -> None:
    """What the hub's door says passes through."""

    def fetch(_start: int, _length: int) -> bytes:
        raise HubUnreachableError("the hub cannot be reached", hint="connect")

    with pytest.raises(HubUnreachableError, match="cannot be reached"):
        read_remote_header(fetch, 10**6, "x")
