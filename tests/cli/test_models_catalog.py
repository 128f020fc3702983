"""``promptai models check-catalog``, with fakes, and with a hub on loopback through the real library."""

import json
import threading
from pathlib import Path
from typing import Any, Self

import pytest

from promptai.cli.models_catalog import check
from promptai.errors import HubNotFoundError, HubUnreachableError
from promptai.models.catalog import Entry, load_catalog
from promptai.models.hub import RepositoryFacts
from support_cli import promptai
from support_hub import Hub, Repository, hub_with

ENTRIES = load_catalog().entries
HUB_TROUBLE = 7


def facts(entries: tuple[Entry, ...] = ENTRIES) -> dict[str, RepositoryFacts]:
    """Metadata from a hub that agrees with the catalogue."""
    found = {}
    for entry in entries:
        files: dict[str, int | None] = {name: entry.expected_bytes(quant) for quant, name in entry.files.items()}
        found[entry.repository] = RepositoryFacts(entry.repository, entry.gated, entry.licence, {}, "c0ffee")
        found[entry.gguf] = RepositoryFacts(entry.gguf, entry.gguf_gated, None, files, "c0ffee")
    return found


def test_requests_each_repository_once_and_keeps_the_catalogues_order() -> None:
    said, asked = facts(), []

    def ask(name: str) -> RepositoryFacts:
        asked.append(name)
        return said[name]

    found = check(ENTRIES, ask)

    assert [checked.id for checked in found] == [entry.id for entry in ENTRIES]
    assert [checked.differences for checked in found] == [[]] * len(ENTRIES)
    assert sorted(asked) == sorted(said)


def test_sends_at_most_eight_concurrent_requests() -> None:
    said, lock, asking, most = facts(), threading.Lock(), [0], [0]
    together = threading.Barrier(8, timeout=1)

    def ask(name: str) -> RepositoryFacts:
        with lock:
            asking[0] += 1
            most[0] = max(most[0], asking[0])
        together.wait()
        with lock:
            asking[0] -= 1
        return said[name]

    check(ENTRIES[:12], ask)  # 24 repositories: three rounds of eight

    assert most == [8]


def test_gives_up_when_the_first_request_has_no_connection() -> None:
    asked = []

    def ask(name: str) -> RepositoryFacts:
        asked.append(name)
        if len(asked) > 1:
            threading.Event().wait(0.2)  # the first response arrives before the others
        raise HubUnreachableError("no connection")

    with pytest.raises(HubUnreachableError, match="no connection"):
        check(ENTRIES, ask)
    assert len(asked) <= 16


def test_a_missing_or_unreachable_repository_only_affects_its_own_entries() -> None:
    said = facts()
    gone, silent = ENTRIES[3].gguf, ENTRIES[5].repository
    first = threading.Event()

    def ask(name: str) -> RepositoryFacts:
        if name == gone:
            raise HubNotFoundError("there is no such thing")
        if name == silent:
            first.wait(1)
            raise HubUnreachableError("the server is busy")
        return said[name]

    found = check(ENTRIES, ask, answered=first.set)

    assert {checked.id: checked.differences for checked in found if checked.differences} == {
        ENTRIES[3].id: [f"the hub has no repository {gone}"],
        ENTRIES[5].id: ["not checked: the server is busy"],
    }
    assert set(found[3].file_bytes.values()) == {None}


class Claimed(bytes):
    """Empty content that claims a size: the hub only reports sizes here."""

    size: int

    def __new__(cls, size: int) -> Self:  # noqa: D102
        found = super().__new__(cls)
        found.size = size
        return found

    def __len__(self) -> int:
        return self.size


def agreeing_hub(entries: tuple[Entry, ...]) -> dict[str, Repository]:
    """Repositories of a hub that agrees with the catalogue."""
    found = {}
    for entry in entries:
        files: dict[str, bytes] = {name: Claimed(entry.expected_bytes(quant)) for quant, name in entry.files.items()}
        found[entry.repository] = Repository({}, license=entry.licence.lower(), gated=entry.gated)
        found[entry.gguf] = Repository(files, license=None)
    return found


def run(hub: Hub, home: Path, *arguments: str) -> tuple[int, Any, str]:
    done = promptai("models", "check-catalog", *arguments, cwd=home, **hub.environment(home))
    return done.returncode, json.loads(done.stdout) if "--json" in arguments else done.stdout, done.stderr


@pytest.mark.real
def test_exits_with_0_when_the_hub_agrees(tmp_path: Path) -> None:
    """For the whole catalogue, with requests of the real library."""
    with hub_with() as hub:
        hub.repositories = agreeing_hub(ENTRIES)
        code, found, errors = run(hub, tmp_path, "--json")

    assert (code, errors) == (0, "")
    assert [checked["differences"] for checked in found] == [[]] * len(ENTRIES)
    assert found[0]["file_bytes"] == found[0]["expected_bytes"]
    assert len(hub.seen) == len(hub.repositories)


@pytest.mark.real
def test_shows_differences_and_exits_with_1(tmp_path: Path) -> None:
    entry = load_catalog().find("llama-3.2-3b")
    with hub_with() as hub:
        hub.repositories = agreeing_hub((entry,))
        del hub.repositories[entry.gguf].files[entry.files["Q4_0"]]
        hub.repositories[entry.repository].license = "llama3.3"
        code, shown, errors = run(hub, tmp_path, "Llama-3.2-3B")

    assert (code, errors) == (1, "")
    assert f"{entry.gguf} has no {entry.files['Q4_0']}" in shown
    assert "licence llama3.3 on the hub, llama3.2 in the catalogue" in shown
    assert "Q4_K_M 1.88 GiB" in shown


@pytest.mark.real
@pytest.mark.parametrize("offline", ["1", "0"], ids=["offline", "connection-refused"])
def test_reports_a_missing_hub_in_one_line(offline: str, tmp_path: Path) -> None:
    with hub_with() as hub:
        environ = hub.environment(tmp_path) | {"HF_HUB_OFFLINE": offline}

    done = promptai("models", "check-catalog", cwd=tmp_path, **environ)

    assert done.returncode == HUB_TROUBLE
    assert done.stdout == ""
    assert done.stderr.startswith("promptai: error: model repository ")
    assert done.stderr.count("\n") == 1


@pytest.mark.real
def test_rejects_an_unknown_name_before_any_request(tmp_path: Path) -> None:
    with hub_with() as hub:
        code, _, errors = run(hub, tmp_path, "llama-3.2-3bb")

    assert code == 3
    assert "did you mean llama-3.2-3b?" in errors
    assert hub.seen == []
