"""The real huggingface_hub against a stand-in that implements the hub's protocol.

In this process, because separate processes would cost a second each;
tests/cli/test_models_pull.py does the same with processes, through the environment.
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
from support_hub import COMMIT, TOKEN, Faults, Hub, Repository, hub_with, point_at, unused_url

TALKS = b"one line of a data set\n" * 1000
WEIGHTS = bytes(range(256)) * 1000
#: The library resumes a download at multiples of this size.
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
def test_reports_a_missing_connection_at_once(
    ask: Callable[[], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within the two seconds of a unit test; the library alone would retry for 24 s."""
    point_at(unused_url(), tmp_path, monkeypatch)

    with pytest.raises(HubUnreachableError, match=r"no connection: .*Connection refused"):
        ask()


@ASK
def test_offline_mode_sends_no_requests(hub: Hub, ask: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    with pytest.raises(HubUnreachableError, match="offline mode is set"):
        ask()

    assert hub.seen == []


@pytest.mark.parametrize(
    ("refusal", "kind"),
    [
        pytest.param((404, "EntryNotFound"), HubNotFoundError, id="no-such-file"),
        pytest.param((401, "RepoNotFound"), HubNotFoundError, id="no-such-repository"),
        pytest.param((401, "GatedRepo"), HubGatedError, id="gated-without-token"),
        pytest.param((403, "GatedRepo"), HubGatedError, id="gated-to-this-token"),
        pytest.param((403, ""), HubGatedError, id="forbidden"),
        pytest.param((503, ""), HubUnreachableError, id="overloaded"),
        pytest.param((429, ""), HubUnreachableError, id="too-many-requests"),
        pytest.param((400, ""), HubError, id="bad-request"),
    ],
)
@ASK
def test_reports_a_refusal_with_its_status(
    hub: Hub, ask: Callable[[], object], refusal: tuple[int, str], kind: type[HubError]
) -> None:
    """A hub that responds was reached: "no connection" would make users check their cables."""
    hub.faults.refuse = refusal

    with pytest.raises(HubError) as raised:
        ask()

    assert type(raised.value) is kind
    assert f"HTTP {refusal[0]}" in raised.value.message
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("ask", [talks, size, facts], ids=lambda ask: ask.__name__)
def test_distinguishes_a_sign_in_page_from_no_connection(hub: Hub, ask: Callable[[], object]) -> None:
    """A hotel's sign-in page responds with 200 to every request."""
    hub.faults.sign_in_page = True

    with pytest.raises(HubUnreachableError, match="the server is not a model hub"):
        ask()


def test_gives_up_on_a_hub_that_never_responds(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("promptai.models.hub._API_TIMEOUT_S", 0.2)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        point_at(f"http://127.0.0.1:{mute.getsockname()[1]}", tmp_path, monkeypatch)
        for ask in (talks, size, start_of_weights, facts):
            with pytest.raises(HubUnreachableError):
                ask()
    assert hub.seen == []


def test_reads_a_repository_in_one_request(hub: Hub) -> None:
    found = repository_facts("people/model-GGUF")

    assert found.files == {"model-Q4_K_M.gguf": 256_000, "README.md": 9}
    assert (found.repository, found.revision, found.license, found.gated) == (
        *("people/model-GGUF", COMMIT),
        *("apache-2.0", False),
    )
    assert list(found.sha256) == ["model-Q4_K_M.gguf"]
    assert len(hub.seen) == 1


def test_reads_a_gated_repository_without_a_token(hub: Hub) -> None:
    hub.repositories["people/model-GGUF"].gated = True

    assert repository_facts("people/model-GGUF").gated


def test_a_card_may_declare_no_licence_or_several(hub: Hub) -> None:
    hub.repositories["people/model-GGUF"].license = None
    assert repository_facts("people/model-GGUF").license is None


@pytest.mark.parametrize("name", ["a/b/c", "../../etc", "", "a b/c", "people/-", "people/a..b"])
def test_an_invalid_repository_name_sends_no_request(hub: Hub, name: str) -> None:
    with pytest.raises(HubNotFoundError) as refusal:
        repository_facts(name)

    assert "owner/name" in refusal.value.hint
    assert hub.seen == []


def test_lists_an_owners_repositories_and_ignores_errors(hub: Hub) -> None:
    hub.repositories["people/other"] = Repository({})
    assert repositories_like("people", "model-3b") == ["people/model-GGUF"]

    hub.faults.sign_in_page = True
    assert repositories_like("people", "model-3b") == []
    hub.faults = Faults(refuse=(500, ""))
    assert repositories_like("people", "model-3b") == []


@pytest.mark.parametrize(("start", "length"), [(0, 1), (0, 256_000), (1000, 16), (255_990, 10), (255_990, 99)])
def test_reads_only_the_requested_range(hub: Hub, start: int, length: int) -> None:
    part = WEIGHTS[start : start + length]

    assert read_range("people/model-GGUF", "model-Q4_K_M.gguf", start, length) == part
    assert [seen.bytes for seen in hub.bodies()] == [len(part)]


def test_the_size_is_the_file_s_and_not_its_pointer_s(hub: Hub) -> None:
    assert file_size("people/model-GGUF", "model-Q4_K_M.gguf") == 256_000
    assert file_size("people/model-GGUF", "README.md") == 9
    assert sum(seen.bytes for seen in hub.seen) == 0


def test_reads_no_more_than_requested_from_a_server_without_ranges(hub: Hub) -> None:
    """Otherwise reading a header would download gigabytes."""
    large = bytes(64 << 20)
    hub.repositories["people/model-GGUF"].files["large-Q4_0.gguf"] = large
    hub.faults.no_ranges = True

    assert read_range("people/model-GGUF", "large-Q4_0.gguf", 0, 1000) == large[:1000]
    close_session()
    assert hub.bodies()[0].bytes < len(large) / 2
    with pytest.raises(HubError, match="does not support range requests"):
        read_range("people/model-GGUF", "large-Q4_0.gguf", 10, 1000)


def test_gives_up_on_a_dripping_response_after_the_time_limit(hub: Hub) -> None:
    """No single read times out, but the whole range would take an hour."""
    hub.faults.bytes_per_s = 3000

    with pytest.raises(HubUnreachableError, match=r"of 200,000 bytes in 0 s"):
        read_range("people/model-GGUF", "model-Q4_K_M.gguf", 0, 200_000, limit_s=0.3)


def test_reports_a_range_beyond_the_end(hub: Hub) -> None:
    with pytest.raises(HubError, match="the file ends before"):
        read_range("people/model-GGUF", "model-Q4_K_M.gguf", 256_000, 10)
    assert len(hub.bodies()) == 1


def test_sends_the_token_to_the_hub_only(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Storage belongs to another company, and any other web server to strangers."""
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
        ("ftp://127.0.0.1/x.gguf", "is not an http"),
        ("file:///etc/passwd", "is not an http"),
        ("http://mirror.example/x.gguf", "is not encrypted"),
        ("/around", "more than 10 redirects"),
    ],
)
def test_checks_a_redirect_before_following_it(hub: Hub, target: str, word: str) -> None:
    hub.redirects["/around"] = target

    with pytest.raises(HubError, match=word), open_body(f"{hub.url}/around", label="a model"):
        pass


def test_uses_a_proxy(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's name does not resolve here: only the proxy knows it."""
    point_at("http://hub.invalid", tmp_path, monkeypatch)
    monkeypatch.setenv("http_proxy", hub.url)
    close_session()  # a session reads the proxies when it is created
    try:
        assert repository_facts("people/model-GGUF").revision == COMMIT
    finally:
        close_session()
    assert hub.seen[0].path.startswith("http://hub.invalid/")


def test_escapes_special_characters_in_a_url(hub: Hub) -> None:
    assert hub_url("people/model", "a b#c?.gguf", "refs/pr/1").endswith("/resolve/refs%2Fpr%2F1/a%20b%23c%3F.gguf")
    assert hub.seen == []


def test_downloads_a_data_set_once_and_then_works_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark's data does not change between runs, and a board without a network can use it."""
    first = talks()
    asked = len(hub.seen)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    assert first.read_bytes() == TALKS
    assert (talks(), len(hub.seen)) == (first, asked)


def test_rejects_a_data_set_shorter_than_announced(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line, although the library's message has two; the partial file is not used."""
    hub.faults.shorter_by = 18_000

    with pytest.raises(HubError, match="should be of size 23000 but has size 5000") as refusal:
        talks()
    assert "\n" not in str(refusal.value)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnreachableError, match="is not on this machine"):
        talks()


@pytest.mark.timeout(10)  # the library waits a second before it resumes
def test_resumes_a_data_set_after_a_lost_connection(hub: Hub) -> None:
    large = TALKS * 500
    hub.repositories["datasets/people/talks"].files["trees.jsonl"] = large
    hub.faults = Faults(cut_at=0.95, cut_first=1)

    assert large == talks().read_bytes()
    assert [seen.range for seen in hub.bodies()] == [None, f"bytes={PIECE}-"]
