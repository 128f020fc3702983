from collections.abc import Iterator
from pathlib import Path

import pytest

from promptai.errors import HubError, HubNotFoundError, ModelChecksumError, ModelError, ModelNotFoundError
from promptai.models.catalog import load_catalog
from promptai.models.hub import RepositoryFacts
from promptai.models.source_selection import ModelReference, choose_file, parse_reference, resolve_download
from support_hub import COMMIT, Hub, Repository, hub_with, point_at

FILES = ("tiny-Q4_K_M.gguf", "tiny-Q4_0.gguf", "tiny-IQ4_XS.gguf", "tiny.Q8_0.gguf", "README.md")


def facts(*files: str) -> RepositoryFacts:
    return RepositoryFacts("people/tiny", False, None, dict.fromkeys(files, 1), COMMIT)


@pytest.mark.parametrize(
    ("name", "repository", "choice", "revision"),
    [
        ("hub:people/tiny", "people/tiny", None, None),
        ("hub:people/tiny:", "people/tiny", None, None),
        ("hub:people/tiny:q8_0", "people/tiny", "q8_0", None),
        ("hub:people/tiny:part/a:b.gguf", "people/tiny", "part/a:b.gguf", None),
        ("https://huggingface.co/people/tiny/resolve/main/a.gguf?download=true", "people/tiny", "a.gguf", "main"),
        ("https://huggingface.co/people/tiny/blob/refs%2Fpr%2F1/b/a.gguf", "people/tiny", "b/a.gguf", "refs/pr/1"),
    ],
)
def test_a_name_on_the_hub_is_understood(name: str, repository: str, choice: str | None, revision: str | None) -> None:
    """Also the address that people copy from their browser: the hub knows the checksum, a web server does not."""
    assert parse_reference(name) == ModelReference(name, repository=repository, choice=choice, revision=revision)


@pytest.mark.parametrize("name", ["https://example.org/a.gguf", "http://127.0.0.1:8000/a.gguf", "http://[::1]/a.gguf"])
def test_any_encrypted_address_will_do_and_this_machine_needs_no_encryption(name: str) -> None:
    assert parse_reference(name).url == name


@pytest.mark.parametrize(
    "name", ["http://example.org/a.gguf", "ftp://example.org/a.gguf", "file:///etc/passwd", "https://", "http://[bad/a"]
)
def test_other_addresses_are_refused(name: str) -> None:
    with pytest.raises(HubError, match="is not"):
        parse_reference(name)


@pytest.mark.parametrize("name", ["people/tiny", "hub:tiny", "hub:a/b/c", "hub:", "../../etc"])
def test_what_is_no_name_is_refused_with_an_example(name: str) -> None:
    with pytest.raises(ModelError) as refusal:
        parse_reference(name)
    assert "hub:owner/name" in refusal.value.hint


def test_a_name_of_the_catalogue_becomes_its_file() -> None:
    entry = load_catalog().entries[0]

    assert parse_reference(entry.id.upper()) == ModelReference(
        entry.id.upper(),
        repository=entry.gguf,
        choice=entry.files.get("Q4_K_M") or entry.files["Q4_0"],
        catalog=entry.id,
        licence=entry.licence,
    )
    quant, file = next(iter(entry.files.items()))
    assert parse_reference(f"{entry.id}:{quant.lower()}").choice == file
    assert parse_reference(f"{entry.id}:Q6_K").choice == "Q6_K"
    with pytest.raises(ModelNotFoundError) as refusal:
        parse_reference(entry.id[:-1])
    assert entry.id in refusal.value.hint


@pytest.mark.parametrize(
    ("choice", "file"),
    [
        (None, "tiny-Q4_K_M.gguf"),
        ("q4_k_m", "tiny-Q4_K_M.gguf"),
        ("Q4_0", "tiny-Q4_0.gguf"),
        ("iq4_xs", "tiny-IQ4_XS.gguf"),
        ("q8_0", "tiny.Q8_0.gguf"),
        ("tiny.Q8_0.gguf", "tiny.Q8_0.gguf"),
        ("TINY.q8_0.gguf", "tiny.Q8_0.gguf"),
    ],
)
def test_a_quantisation_or_a_name_means_one_file(choice: str | None, file: str) -> None:
    assert choose_file(facts(*FILES), choice) == file


def test_the_next_default_is_taken_and_then_the_only_one_there_is() -> None:
    assert choose_file(facts("a-Q4_0.gguf", "a-Q8_0.gguf"), None) == "a-Q4_0.gguf"
    assert choose_file(facts("a-f16.gguf", "README.md"), None) == "a-f16.gguf"


@pytest.mark.parametrize(
    ("files", "choice", "kind", "words"),
    [
        pytest.param(FILES, "Q4_K", HubNotFoundError, "tiny-Q4_K_M.gguf", id="half-a-name"),
        pytest.param(FILES, "tiny_Q4_0.gguf", HubNotFoundError, "did you mean tiny-Q4_0.gguf", id="misspelt"),
        pytest.param(("a-Q4_0.gguf", "b-Q4_0.gguf"), "q4_0", HubNotFoundError, "may mean a-Q4_0.gguf, b-", id="two"),
        pytest.param(("a-Q2_K.gguf", "a-Q8_0.gguf"), None, HubNotFoundError, "may mean a-Q2_K.gguf", id="no-default"),
        pytest.param(("README.md",), None, HubNotFoundError, "no .gguf file at all", id="no-model"),
        pytest.param(("a-Q4_0-00001-of-00002.gguf",), "Q4_0", ModelError, "one piece of a model", id="split"),
    ],
)
def test_what_is_not_one_whole_file_is_refused_with_what_is_there(
    files: tuple[str, ...], choice: str | None, kind: type[ModelError], words: str
) -> None:
    with pytest.raises(kind) as refusal:
        choose_file(facts(*files), choice)
    assert words in str(refusal.value)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_with(people__tiny_GGUF={"sub/tiny-Q4_0.gguf": b"GGUF and so on"}) as hub:
        point_at(hub.url, tmp_path, monkeypatch)
        yield hub


def test_an_order_names_the_commit_so_that_a_later_part_is_of_the_same_file(hub: Hub) -> None:
    download = resolve_download(parse_reference("hub:people/tiny-GGUF:q4_0"))

    assert download.url == f"{hub.url}/people/tiny-GGUF/resolve/{COMMIT}/sub/tiny-Q4_0.gguf"
    assert (download.folder, download.name) == ("people--tiny-GGUF", "sub--tiny-Q4_0.gguf")
    assert (download.sidecar.bytes, download.sidecar.licence, download.sidecar.promised) == (14, "apache-2.0", True)


def test_a_checksum_that_a_person_knows_is_compared_before_anything_is_fetched(hub: Hub) -> None:
    with pytest.raises(ModelChecksumError, match="on the hub, not 000000000000"):
        resolve_download(parse_reference("hub:people/tiny-GGUF"), sha256="0" * 64)
    assert hub.bodies() == []


def test_a_misspelt_repository_is_told_with_the_near_ones(hub: Hub) -> None:
    hub.repositories["people/tinier-GGUF"] = Repository({})

    with pytest.raises(HubNotFoundError) as refusal:
        resolve_download(parse_reference("hub:people/tiny-GUF"))
    assert "hub:people/tiny-GGUF" in refusal.value.hint


def test_a_private_repository_stays_unknown_to_strangers(hub: Hub) -> None:
    hub.repositories["people/tiny-GGUF"].private = True

    with pytest.raises(HubNotFoundError) as refusal:
        resolve_download(parse_reference("hub:people/other"))
    assert "a private one needs HF_TOKEN" in refusal.value.hint


def test_a_web_server_promises_nothing_and_its_secrets_are_not_noted(hub: Hub) -> None:
    hub.plain["m.gguf"] = b"GGUF"
    address = hub.url.replace("http://", "http://me:password@")

    download = resolve_download(parse_reference(f"{address}/plain/m.gguf?signature=secret"))

    assert download.sidecar.source == f"{hub.url}/plain/m.gguf"
    assert (download.sidecar.bytes, download.sidecar.sha256, download.sidecar.promised) == (4, "", False)
    assert (download.folder, download.name, download.resumable) == ("url--127.0.0.1", "m.gguf", True)
    assert [seen.range for seen in hub.bodies()] == ["bytes=0-0"]
