import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from promptai.bench.oasst1 import RULE, load_oasst1
from promptai.errors import WorkloadError

Node = dict[str, Any]

#: Ids of 60 trees in the order of rule 4: an eligible tree with the first id comes first.
NAMES = sorted((f"tree-{n}" for n in range(60)), key=lambda name: hashlib.sha256(name.encode()).hexdigest())


def node(id_: str, *replies: Node, role: str = "prompter", **fields: Any) -> Node:
    """A message whose text is its id."""
    return {"message_id": id_, "text": id_, "role": role, "lang": "en", "replies": list(replies)} | fields


def chain(*ids: str, then: tuple[Node, ...] = (), **fields: Any) -> Node:
    """A chain of replies; ``fields`` override those of the first message."""
    first, *rest = ids
    replies = (chain(*rest, then=then),) if rest else then
    return node(first, *replies, **fields) | {"role": role_of(first)} | fields


def role_of(id_: str) -> str:
    """Ids of user messages begin with u, the others with a."""
    return "prompter" if id_.startswith("u") else "assistant"


def reply(id_: str, **fields: Any) -> Node:
    """One of several replies."""
    return node(id_, role=role_of(id_)) | fields


def line(name: str, root: Node) -> bytes:
    """A line of the file."""
    return json.dumps({"message_tree_id": name, "tree_state": "ready_for_export", "prompt": root}).encode() + b"\n"


def plain(name: str) -> bytes:
    """An eligible tree with a single path, whose last message has the tree's id."""
    return line(name, chain("u1", "a1", "u2", "a2", "u3", f"a-{name}"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Write the trees to a file."""
    return tmp_path / "trees.jsonl"


@pytest.fixture
def ids_of(path: Path) -> Callable[[Node], list[str] | None]:
    """The message ids selected from a tree among 50 others; ``None`` if it is not eligible."""

    def ids_of(root: Node) -> list[str] | None:
        path.write_bytes(line(NAMES[0], root) + b"".join(map(plain, NAMES[1:51])))
        first = load_oasst1(path).conversations[0]
        return None if first.id == f"a-{NAMES[1]}" else [message.content for message in first.messages]

    return ids_of


def test_rejects_too_few_trees_with_both_numbers(path: Path) -> None:
    path.write_bytes(b"".join(map(plain, NAMES[:49])))

    with pytest.raises(WorkloadError, match=r"contains 49 eligible conversations \(50 are needed\)"):
        load_oasst1(path)


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(b"{\n", id="not-json"),
        pytest.param(b'{"message_tree_id": "x"}\n', id="no-prompt"),
        pytest.param(line("x", chain("u1", "a1") | {"role": "system"}), id="unknown-role"),
        pytest.param(line("x", chain("u1", "a1")).replace(b'"text": "u1"', b'"text": "\xff"'), id="not-utf-8"),
    ],
)
def test_rejects_a_malformed_line_with_its_number(path: Path, bad: bytes) -> None:
    path.write_bytes(plain("x") + bad)

    with pytest.raises(WorkloadError, match=r"trees\.jsonl, line 2: "):
        load_oasst1(path)


def test_rejects_a_truncated_download(path: Path) -> None:
    whole = gzip.compress(b"".join(map(plain, NAMES)))
    path.write_bytes(whole[: len(whole) // 2])

    with pytest.raises(WorkloadError, match="cannot read") as refusal:
        load_oasst1(path)

    assert refusal.value.hint == "download it again"


def test_rejects_a_damaged_download(path: Path) -> None:
    whole = bytearray(gzip.compress(b"".join(map(plain, NAMES))))
    whole[len(whole) // 2] ^= 0xFF
    path.write_bytes(whole)

    with pytest.raises(WorkloadError):
        load_oasst1(path)


def test_rejects_a_missing_file(path: Path) -> None:
    with pytest.raises(WorkloadError, match="cannot read"):
        load_oasst1(path)


@pytest.mark.parametrize(
    "root",
    [
        pytest.param(chain("u1", "a1", "u2", "a2", "u3", "a3", lang="de"), id="root-not-english"),
        pytest.param(chain("u1", "a1", "u2", "a2", "u3", "a3", deleted=True), id="root-deleted"),
        pytest.param(chain("u1", "a1", "u2", "a2"), id="four-messages"),
        pytest.param(chain("u1", "a1", "u2", "a2", then=(reply("u3", lang="de"),)), id="continues-in-german"),
        pytest.param(chain("u1", "a1", "u2", "a2", "a3", "u3", "a4"), id="two-answers-in-a-row"),
        pytest.param(chain("u1", "a1", "u2", "a2", then=(node("u3", reply("a3"), text=" "),)), id="a-blank-message"),
    ],
)
def test_skips_a_tree_that_breaks_a_rule(ids_of: Callable[[Node], list[str] | None], root: Node) -> None:
    assert ids_of(root) is None


@pytest.mark.parametrize(
    ("replies", "best"),
    [
        pytest.param([reply("a4", rank=1), reply("a3", rank=0)], "a3", id="rank-0-is-best"),
        pytest.param([reply("a3"), reply("a4", rank=7)], "a4", id="no-rank-comes-last"),
        pytest.param([reply("a5", rank=2), reply("a4", rank=2)], "a4", id="ties-by-message-id"),
        pytest.param([reply("a5"), reply("a4")], "a4", id="ties-without-ranks"),
        pytest.param([reply("a3", rank=0, deleted=True), reply("a4", rank=1)], "a4", id="deleted-passed-over"),
        pytest.param([reply("a3", rank=0, lang="es"), reply("a4", rank=1)], "a4", id="spanish-passed-over"),
    ],
)
def test_follows_the_best_ranked_usable_reply(
    ids_of: Callable[[Node], list[str] | None], replies: list[Node], best: str
) -> None:
    root = chain("u1", "a1", "u2", "a2", "u3", then=tuple(replies))

    assert ["u1", "a1", "u2", "a2", "u3", best] == ids_of(root)


@pytest.mark.parametrize(
    "ids", [["u1", "a1", "u2", "a2", "u3"], ["u1", "a1", "u2", "a2", "u3", "a3"]], ids=["user", "assistant"]
)
def test_five_messages_suffice_with_either_role_last(
    ids_of: Callable[[Node], list[str] | None], ids: list[str]
) -> None:
    """A final user message without an answer is a prompt, too."""
    assert ids == ids_of(chain(*ids))


@pytest.mark.parametrize("pack", [gzip.compress, bytes], ids=["gzip", "plain"])
def test_selects_the_first_fifty_by_hash_of_the_tree_id(path: Path, pack: Callable[[bytes], bytes]) -> None:
    """In any order of the file; the id is that of the last message."""
    path.write_bytes(pack(b"".join(map(plain, sorted(NAMES)))))

    found = load_oasst1(path, source="oasst1:trees")

    assert [f"a-{name}" for name in NAMES[:50]] == [conversation.id for conversation in found.conversations]
    assert (found.name, found.source, found.rule) == ("oasst1", "oasst1:trees", RULE)
