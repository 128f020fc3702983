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
def test_parses_a_hub_name(name: str, repository: str, choice: str | None, revision: str | None) -> None:
    """Also a URL copied from the browser: the hub provides a checksum, a web server does not."""
    assert parse_reference(name) == ModelReference(name, repository=repository, choice=choice, revision=revision)


@pytest.mark.parametrize("name", ["https://example.org/a.gguf", "http://127.0.0.1:8000/a.gguf", "http://[::1]/a.gguf"])
def test_accepts_https_urls_and_plain_http_on_this_machine(name: str) -> None:
    assert parse_reference(name).url == name


@pytest.mark.parametrize(
    "name", ["http://example.org/a.gguf", "ftp://example.org/a.gguf", "file:///etc/passwd", "https://", "http://[bad/a"]
)
def test_rejects_other_urls(name: str) -> None:
    with pytest.raises(HubError, match="is not"):
        parse_reference(name)


@pytest.mark.parametrize("name", ["people/tiny", "hub:tiny", "hub:a/b/c", "hub:", "../../etc"])
def test_rejects_a_malformed_name_with_an_example(name: str) -> None:
    with pytest.raises(ModelError) as refusal:
        parse_reference(name)
    assert "hub:owner/name" in refusal.value.hint


def test_a_catalogue_name_resolves_to_its_file() -> None:
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
def test_a_quantisation_or_file_name_selects_one_file(choice: str | None, file: str) -> None:
    assert choose_file(facts(*FILES), choice) == file


def test_falls_back_to_the_next_default_and_then_to_the_only_file() -> None:
    assert choose_file(facts("a-Q4_0.gguf", "a-Q8_0.gguf"), None) == "a-Q4_0.gguf"
    assert choose_file(facts("a-f16.gguf", "README.md"), None) == "a-f16.gguf"


@pytest.mark.parametrize(
    ("files", "choice", "kind", "words"),
    [
        pytest.param(FILES, "Q4_K", HubNotFoundError, "tiny-Q4_K_M.gguf", id="half-a-name"),
        pytest.param(FILES, "tiny_Q4_0.gguf", HubNotFoundError, "did you mean tiny-Q4_0.gguf", id="misspelt"),
        pytest.param(("a-Q4_0.gguf", "b-Q4_0.gguf"), "q4_0", HubNotFoundError, "a-Q4_0.gguf, b-Q4_0", id="two"),
        pytest.param(("a-Q2_K.gguf", "a-Q8_0.gguf"), None, HubNotFoundError, ": a-Q2_K.gguf", id="no-default"),
        pytest.param(("README.md",), None, HubNotFoundError, "contains no .gguf files", id="no-model"),
        pytest.param(("a-Q4_0-00001-of-00002.gguf",), "Q4_0", ModelError, "one part of a split model", id="split"),
    ],
)
def test_rejects_ambiguous_missing_and_split_files_with_the_candidates(
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


def test_a_download_is_pinned_to_a_commit(hub: Hub) -> None:
    download = resolve_download(parse_reference("hub:people/tiny-GGUF:q4_0"))

    assert download.url == f"{hub.url}/people/tiny-GGUF/resolve/{COMMIT}/sub/tiny-Q4_0.gguf"
    assert (download.folder, download.name) == ("people--tiny-GGUF", "sub--tiny-Q4_0.gguf")
    assert (download.sidecar.bytes, download.sidecar.licence, download.sidecar.promised) == (14, "apache-2.0", True)


def test_compares_a_given_checksum_before_downloading(hub: Hub) -> None:
    with pytest.raises(ModelChecksumError, match="on the hub, not 000000000000"):
        resolve_download(parse_reference("hub:people/tiny-GGUF"), sha256="0" * 64)
    assert hub.bodies() == []


def test_suggests_similar_repositories_for_a_misspelt_one(hub: Hub) -> None:
    hub.repositories["people/tinier-GGUF"] = Repository({})

    with pytest.raises(HubNotFoundError) as refusal:
        resolve_download(parse_reference("hub:people/tiny-GUF"))
    assert "hub:people/tiny-GGUF" in refusal.value.hint


def test_a_private_repository_is_not_found_without_a_token(hub: Hub) -> None:
    hub.repositories["people/tiny-GGUF"].private = True

    with pytest.raises(HubNotFoundError) as refusal:
        resolve_download(parse_reference("hub:people/other"))
    assert "private repositories need HF_TOKEN" in refusal.value.hint


def test_a_url_has_no_checksum_and_its_secrets_are_not_recorded(hub: Hub) -> None:
    hub.plain["m.gguf"] = b"GGUF"
    address = hub.url.replace("http://", "http://me:password@")

    download = resolve_download(parse_reference(f"{address}/plain/m.gguf?signature=secret"))

    assert download.sidecar.source == f"{hub.url}/plain/m.gguf"
    assert (download.sidecar.bytes, download.sidecar.sha256, download.sidecar.promised) == (4, "", False)
    assert (download.folder, download.name, download.resumable) == ("url--127.0.0.1", "m.gguf", True)
    assert [seen.range for seen in hub.bodies()] == ["bytes=0-0"]
