import msgspec
import pytest

from promptai.wire.malformed import MALFORMED
from promptai.wire.openai import CompletionChunk


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{nope",
        b"[]",
        b'{"choices": 1}',
        b'{"error": {"message": "\xff"}}',
        b"\xff\xfe",
        b'{"x": ' + b"[" * 100_000,
        b'{"x": ' + b'{"y": ' * 100_000,
    ],
    ids=["empty", "half", "list", "type", "not-utf-8-inside", "not-utf-8", "arrays-without-end", "objects-without-end"],
)
def test_catches_the_failure_of_any_bytes(data: bytes) -> None:
    """So code that decodes untrusted bytes never shows a traceback."""
    with pytest.raises(MALFORMED):
        msgspec.json.decode(data, type=CompletionChunk)
