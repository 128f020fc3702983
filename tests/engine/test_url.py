"""The rule for URLs that measuring and serving share."""

import pytest

from promptai.engine.url import EngineUrl, looks_like_url
from promptai.errors import SettingsError


@pytest.mark.parametrize(
    "url",
    [
        pytest.param("pi-1:8080", id="no-scheme"),
        pytest.param("ftp://pi", id="another-scheme"),
        pytest.param("", id="empty"),
        pytest.param("http://", id="no-host"),
        pytest.param("http://:8080", id="port-without-host"),
        pytest.param("http://[::1", id="unclosed-bracket"),
        pytest.param("http://pi:eight", id="port-in-words"),
        pytest.param("http://pi:99999", id="port-too-high"),
        pytest.param("http://pi:0", id="port-0"),
    ],
)
def test_rejects_an_invalid_url(url: str) -> None:
    with pytest.raises(SettingsError, match=r" is not an engine URL \(write it as http://host:port\)$") as refusal:
        EngineUrl.parse(url)

    assert refusal.value.message.startswith(repr(url))


@pytest.mark.parametrize("url", ["http://me:secret@pi:8080", "http://secret@pi:8080", "http://me:se/cret@pi:8080"])
def test_rejects_credentials_without_repeating_them(url: str) -> None:
    with pytest.raises(SettingsError, match="the URL of pi:8080 contains a user name or a password") as refusal:
        EngineUrl.parse(url)

    assert "cret" not in str(refusal.value)


@pytest.mark.parametrize(
    ("url", "base", "address"),
    [
        ("http://pi-1", "http://pi-1", "pi-1:80"),
        ("https://pi-1/v1", "https://pi-1", "pi-1:443"),
        ("http://Pi-1:8080/v1/", "http://Pi-1:8080", "Pi-1:8080"),
        ("http://[::1]:8080", "http://[::1]:8080", "[::1]:8080"),
        ("http://[::1]", "http://[::1]", "[::1]:80"),
        ("http://hub/a/v1", "http://hub/a", "hub:80"),
    ],
)
def test_derives_base_and_address(url: str, base: str, address: str) -> None:
    parsed = EngineUrl.parse(url)

    assert (parsed.base, parsed.address) == (base, address)


def test_two_spellings_of_one_url_have_the_same_location() -> None:
    spellings = ["http://pi-1", "HTTP://Pi-1:80/v1/", "http://PI-1/"]

    assert {EngineUrl.parse(url).location for url in spellings} == {("http", "pi-1", 80, "")}


@pytest.mark.parametrize(("text", "expected"), [("http://pi", True), ("https://pi", True), ("http.gguf", False)])
def test_a_url_is_distinguished_from_a_file(text: str, expected: object) -> None:
    assert looks_like_url(text) is expected
