"""What the gateway reads in what passes through it: no more than it needs, and nothing breaks at the rest."""

import msgspec
import pytest

from promptai.wire.openai import PromptTokensDetails
from promptai.wire.passing import PassingChunk, PassingReply, PassingUsage

KINDS = pytest.mark.parametrize("kind", [PassingChunk, PassingReply])


@KINDS
@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        pytest.param(
            b'{"prompt_tokens": 52, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 7}}',
            PassingUsage(52, 3, PromptTokensDetails(7)),
            id="whole",
        ),
        pytest.param(b'{"prompt_tokens": 52, "total_tokens": 52}', PassingUsage(52), id="embeddings"),
        pytest.param(b"{}", PassingUsage(), id="empty"),
        pytest.param(b'{"prompt_tokens": null, "completion_tokens": null}', PassingUsage(), id="nulls"),
        pytest.param(b'{"prompt_tokens_details": null}', PassingUsage(), id="details-null"),
        pytest.param(
            b'{"prompt_tokens_details": {}}', PassingUsage(None, None, PromptTokensDetails()), id="no-details"
        ),
        pytest.param(b'{"prompt_tokens": 1, "queue_time": 0.1}', PassingUsage(1), id="more"),
    ],
)
def test_an_account_of_tokens_may_lack_whatever_it_likes(
    kind: type[PassingChunk] | type[PassingReply], usage: bytes, expected: PassingUsage
) -> None:
    assert msgspec.json.decode(b'{"choices": [], "usage": %b}' % usage, type=kind).usage == expected


@KINDS
@pytest.mark.parametrize("fields", [b"", b'"usage": null'], ids=["missing", "null"])
def test_without_an_account_there_is_none(kind: type[PassingChunk] | type[PassingReply], fields: bytes) -> None:
    assert msgspec.json.decode(b"{%b}" % fields, type=kind).usage is None


@KINDS
@pytest.mark.parametrize("usage", [b'"52"', b"52", b"[]", b'{"prompt_tokens": "52"}', b'{"completion_tokens": 1.5}'])
def test_an_account_of_another_kind_is_refused(kind: type[PassingChunk] | type[PassingReply], usage: bytes) -> None:
    with pytest.raises(msgspec.ValidationError, match="usage"):
        msgspec.json.decode(b'{"usage": %b}' % usage, type=kind)
