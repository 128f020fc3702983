"""Fifty conversations of OpenAssistant/oasst1, the paper's data set, selected by a fixed rule.

The paper names "50 multi-turn conversations (>= 5 turns)" without listing them. The data set
consists of trees: each message has several ranked replies. The rule below turns trees into
conversations without human choice; every run records it with the message ids that it selects:

1. trees of the file ``2023-04-12_oasst_ready.trees.jsonl.gz`` whose root is English and not deleted;
2. from the root on, the best-ranked reply that is English and not deleted (``rank`` 0 is
   the best; replies without a rank come last, ties by message id);
3. at least 5 messages;
4. ordered by the SHA-256 of the tree's id, the first 50.

Trees are shallow, so "5 turns" means messages here: three of the user and two of the assistant
between them. A final user message without an answer counts, because it is a prompt.
Data set: Apache-2.0, https://huggingface.co/datasets/OpenAssistant/oasst1.
"""

import gzip
import hashlib
import zlib
from pathlib import Path
from typing import Literal

import msgspec

from promptai.bench.workload import Conversation, Workload, check_turns
from promptai.errors import WorkloadError
from promptai.wire.malformed import MALFORMED
from promptai.wire.openai import Message

NAME = "oasst1"
REPOSITORY = "OpenAssistant/oasst1"
FILENAME = "2023-04-12_oasst_ready.trees.jsonl.gz"
RULE = (
    "English, not deleted, best-ranked reply at every step, at least 5 messages, "
    "first 50 by SHA-256 of the message tree id"
)
_MIN_MESSAGES = 5
_COUNT = 50


class _Node(msgspec.Struct):
    message_id: str
    text: str
    role: Literal["prompter", "assistant"]
    lang: str
    deleted: bool = False
    rank: int | None = None
    replies: list["_Node"] = []


class _Tree(msgspec.Struct):
    message_tree_id: str
    prompt: _Node


def load_oasst1(path: Path, *, source: str = NAME) -> Workload:
    """
    Read the fifty conversations from the trees in ``path`` (JSON Lines, gzipped or not).

    The id of a conversation is that of its last message, which identifies the whole path.

    Raises:
        WorkloadError: The file cannot be read, a line is malformed, or too few trees qualify.
    """
    decoder = msgspec.json.Decoder(_Tree)
    eligible: list[tuple[str, Conversation]] = []
    number = 0
    try:
        with path.open("rb") as probe:
            zipped = probe.read(2) == b"\x1f\x8b"
        with gzip.open(path) if zipped else path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):  # noqa: B007  the except clause below names it
                tree = decoder.decode(line)
                conversation = _best_path(tree.prompt)
                if conversation is not None:
                    eligible.append((hashlib.sha256(tree.message_tree_id.encode()).hexdigest(), conversation))
    except MALFORMED as error:
        raise WorkloadError(f"workload {path}, line {number}: {error}", hint=f"check that it is {FILENAME}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise WorkloadError(f"cannot read workload {path}: {error}", hint="download it again") from None
    if len(eligible) < _COUNT:
        raise WorkloadError(
            f"workload {path} contains {len(eligible)} eligible conversations ({_COUNT} are needed)",
            hint=f"check that it is the whole {FILENAME}",
        )
    eligible.sort(key=lambda pair: pair[0])
    return Workload(NAME, source, RULE, tuple(conversation for _, conversation in eligible[:_COUNT]))


def _best_path(root: _Node) -> Conversation | None:
    nodes: list[_Node] = []
    node: _Node | None = root if _usable(root) else None
    while node is not None:
        nodes.append(node)
        usable = [reply for reply in node.replies if _usable(reply)]
        node = min(usable, key=_preference, default=None)
    if len(nodes) < _MIN_MESSAGES:
        return None
    messages = [Message("user" if n.role == "prompter" else "assistant", n.text) for n in nodes]
    return None if check_turns(messages) else Conversation(nodes[-1].message_id, tuple(messages))


def _usable(node: _Node) -> bool:
    return node.lang == "en" and not node.deleted


def _preference(node: _Node) -> tuple[bool, int, str]:
    return (node.rank is None, node.rank or 0, node.message_id)
