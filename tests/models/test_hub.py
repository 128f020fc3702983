"""The real huggingface_hub against a stand-in that speaks the hub's protocol.

In this process, pointed at the stand-in, as each process of its own would cost a second;
tests/cli/test_models_pull.py does the same from outside, through the environment.
"""

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import close_session, constants

from promptai.errors import HubError, HubGatedError, HubNotFoundError, HubUnreachableError
from promptai.models.hub import (
    fetch_dataset_file,
    file_size,
    hub_url,
    open_body,
    read_range,
    repositories_like,
    repository_facts,
)
from support_hub import COMMIT, TOKEN, Faults, Hub, Repository, hub_with, nobody, point_at

TALKS = b"one line of a data set\n" * 1000
WEIGHTS = bytes(range(256)) * 1000
#: The library takes up a download at whole pieces of this size.
PIECE = 10 * 1024 * 1024


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with a model repository and a data set."""
    files = {"model-Q4_K_M.gguf": WEIGHTS, "README.md": b"# A model"}
    with hub_with(people__model_GGUF=files, datasets__people__talks={"trees.jsonl": TALKS}) as hub:
        point_at(hub.url, tmp_path, monkeypatch)
        yield hub


def talks() -> Path:
    return fetch_dataset_file("people/talks", "trees.jsonl")


def size() -> int:
    return file_size("people/model-GGUF", "model-Q4_K_M.gguf")


def start_of_weights() -> bytes:
    return read_range("people/model-GGUF", "model-Q4_K_M.gguf", 0, 4)


def facts() -> object:
    return repository_facts("people/model-GGUF")


ASK = pytest.mark.parametrize("ask", [talks, size, start_of_weights, facts], ids=lambda ask: ask.__name__)


@ASK
def test_without_a_connection_it_is_said_at_once(
    ask: Callable[[], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the two seconds of a unit test; the library alone would try for 24 s."""
    point_at(nobody(), tmp_path, monkeypatch)

    with pytest.raises(HubUnreachableError, match=r"no connection: .*Connection refused"):
        ask()


@ASK
def test_told_to_be_offline_it_asks_nobody(
    hub: Hub, ask: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    with pytest.raises(HubUnreachableError, match="told to stay offline"):
        ask()

    assert hub.seen == []


@pytest.mark.parametrize(
    ("refusal", "kind"),
    [
        pytest.param((404, "EntryNotFound"), HubNotFoundError, id="no-such-file"),
        pytest.param((401, "RepoNotFound"), HubNotFoundError, id="no-such-repository"),
        pytest.param((401, "GatedRepo"), HubGatedError, id="gated-to-strangers"),
        pytest.param((403, "GatedRepo"), HubGatedError, id="gated-to-this-token"),
        pytest.param((403, ""), HubGatedError, id="forbidden"),
        pytest.param((503, ""), HubUnreachableError, id="overloaded"),
        pytest.param((429, ""), HubUnreachableError, id="too-many-requests"),
        pytest.param((400, ""), HubError, id="no-sense"),
    ],
)
@ASK
def test_a_refusal_is_told_with_its_status(
    hub: Hub, ask: Callable[[], object], refusal: tuple[int, str], kind: type[HubError]
) -> None:
    """A hub that answers was reached: "no connection" would send people to their cables."""
    hub.faults.refuse = refusal

    with pytest.raises(HubError) as raised:
        ask()

    assert type(raised.value) is kind
    assert f"HTTP {refusal[0]}" in raised.value.message
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("ask", [talks, size, facts], ids=lambda ask: ask.__name__)
def test_a_page_that_is_no_hub_is_told_apart_from_no_connection(hub: Hub, ask: Callable[[], object]) -> None:
    """The sign-in page of a hotel answers 200 to everything."""
    hub.faults.sign_in_page = True

    with pytest.raises(HubUnreachableError, match="what answered is not a hub"):
        ask()


def test_a_hub_that_accepts_and_then_says_nothing_is_given_up(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("promptai.models.hub._API_TIMEOUT_S", 0.2)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        point_at(f"http://127.0.0.1:{mute.getsockname()[1]}", tmp_path, monkeypatch)
        for ask in (talks, size, start_of_weights, facts):
            with pytest.raises(HubUnreachableError):
                ask()
    assert hub.seen == []


def test_a_repository_is_told_in_one_request(hub: Hub) -> None:
    found = repository_facts("people/model-GGUF")

    assert found.files == {"model-Q4_K_M.gguf": 256_000, "README.md": 9}
    assert (found.repository, found.revision, found.license, found.gated) == (
        *("people/model-GGUF", COMMIT),
        *("apache-2.0", False),
    )
    assert list(found.sha256) == ["model-Q4_K_M.gguf"]
    assert len(hub.seen) == 1


def test_a_gated_repository_says_so_to_everybody(hub: Hub) -> None:
    hub.repositories["people/model-GGUF"].gated = True

    assert repository_facts("people/model-GGUF").gated


def test_a_card_may_name_no_licence_or_several(hub: Hub) -> None:
    hub.repositories["people/model-GGUF"].license = None
    assert repository_facts("people/model-GGUF").license is None


@pytest.mark.parametrize("name", ["a/b/c", "../../etc", "", "a b/c", "people/-", "people/a..b"])
def test_what_cannot_be_a_repository_is_not_asked_for(hub: Hub, name: str) -> None:
    with pytest.raises(HubNotFoundError) as refusal:
        repository_facts(name)

    assert "owner/name" in refusal.value.hint
    assert hub.seen == []


def test_repositories_of_an_owner_are_listed_as_a_courtesy(hub: Hub) -> None:
    hub.repositories["people/other"] = Repository({})
    assert repositories_like("people", "model-3b") == ["people/model-GGUF"]

    hub.faults.sign_in_page = True
    assert repositories_like("people", "model-3b") == []
    hub.faults = Faults(refuse=(500, ""))
    assert repositories_like("people", "model-3b") == []


@pytest.mark.parametrize(("start", "length"), [(0, 1), (0, 256_000), (1000, 16), (255_990, 10), (255_990, 99)])
def test_a_part_of_a_file_is_fetched_and_nothing_else(hub: Hub, start: int, length: int) -> None:
    part = WEIGHTS[start : start + length]

    assert read_range("people/model-GGUF", "model-Q4_K_M.gguf", start, length) == part
    assert [seen.bytes for seen in hub.bodies()] == [len(part)]


def test_the_size_is_that_of_the_file_and_not_of_its_pointer(hub: Hub) -> None:
    assert file_size("people/model-GGUF", "model-Q4_K_M.gguf") == 256_000
    assert file_size("people/model-GGUF", "README.md") == 9
    assert sum(seen.bytes for seen in hub.seen) == 0


def test_no_more_is_read_than_was_asked_for_although_the_server_sends_everything(hub: Hub) -> None:
    """Gigabytes would come down a slow line for the sake of a header."""
    large = bytes(64 << 20)
    hub.repositories["people/model-GGUF"].files["large-Q4_0.gguf"] = large
    hub.faults.no_ranges = True

    assert read_range("people/model-GGUF", "large-Q4_0.gguf", 0, 1000) == large[:1000]
    close_session()
    assert hub.bodies()[0].bytes < len(large) / 2
    with pytest.raises(HubError, match="gives no parts of files"):
        read_range("people/model-GGUF", "large-Q4_0.gguf", 10, 1000)


def test_a_part_that_drips_is_given_up_after_its_time(hub: Hub) -> None:
    """Each byte comes in time, all together would take an hour."""
    hub.faults.bytes_per_s = 3000

    with pytest.raises(HubUnreachableError, match=r"of 200,000 bytes came in 0 s"):
        read_range("people/model-GGUF", "model-Q4_K_M.gguf", 0, 200_000, limit_s=0.3)


def test_a_part_beyond_the_end_is_said_to_be_there(hub: Hub) -> None:
    with pytest.raises(HubError, match="the file ends before"):
        read_range("people/model-GGUF", "model-Q4_K_M.gguf", 256_000, 10)
    assert len(hub.bodies()) == 1


def test_a_token_goes_to_the_hub_and_nowhere_else(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Storage is another company's machine; a web server that somebody named is anybody's."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.repositories["people/model-GGUF"].gated = True
    hub.plain["model.gguf"] = WEIGHTS

    start_of_weights()
    with open_body(f"{hub.storage}/plain/model.gguf", label="a model") as body:
        next(body.chunks)

    tokens = {seen.path.split("/")[1]: seen.token for seen in hub.seen}
    assert tokens == {"people": TOKEN, "storage": None, "plain": None}


@pytest.mark.parametrize(
    ("target", "word"),
    [
        ("ftp://127.0.0.1/x.gguf", "is not a web address"),
        ("file:///etc/passwd", "is not a web address"),
        ("http://mirror.example/x.gguf", "is not encrypted"),
        ("/around", "redirected more than"),
    ],
)
def test_a_redirect_is_checked_before_it_is_followed(hub: Hub, target: str, word: str) -> None:
    hub.redirects["/around"] = target

    with pytest.raises(HubError, match=word), open_body(f"{hub.url}/around", label="a model"):
        pass


def test_a_proxy_is_asked_instead_of_the_hub(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of the hub means nothing here: only the proxy can know it."""
    point_at("http://hub.invalid", tmp_path, monkeypatch)
    monkeypatch.setenv("http_proxy", hub.url)
    close_session()  # proxies are read when a session is made
    try:
        assert repository_facts("people/model-GGUF").revision == COMMIT
    finally:
        close_session()
    assert hub.seen[0].path.startswith("http://hub.invalid/")


def test_an_address_has_its_special_characters_written_out(hub: Hub) -> None:
    assert hub_url("people/model", "a b#c?.gguf", "refs/pr/1").endswith("/resolve/refs%2Fpr%2F1/a%20b%23c%3F.gguf")
    assert hub.seen == []


def test_a_data_set_is_fetched_once_and_then_found_without_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a benchmark plays does not change under its feet, and an old board in a cellar can play it."""
    first = talks()
    asked = len(hub.seen)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    assert first.read_bytes() == TALKS
    assert (talks(), len(hub.seen)) == (first, asked)


def test_a_data_set_that_is_shorter_than_announced_is_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line, although the library says it in two; nothing of it is taken for the file."""
    hub.faults.shorter_by = 18_000

    with pytest.raises(HubError, match="should be of size 23000 but has size 5000") as refusal:
        talks()
    assert "\n" not in str(refusal.value)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnreachableError, match="is not on this machine"):
        talks()


@pytest.mark.timeout(10)  # the library waits a second before it goes on
def test_a_data_set_whose_connection_is_cut_goes_on_where_it_stopped(hub: Hub) -> None:
    large = TALKS * 500
    hub.repositories["datasets/people/talks"].files["trees.jsonl"] = large
    hub.faults = Faults(cut_at=0.95, cut_first=1)

    assert large == talks().read_bytes()
    assert [seen.range for seen in hub.bodies()] == [None, f"bytes={PIECE}-"]
