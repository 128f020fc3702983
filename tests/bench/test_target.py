import asyncio
import hashlib
from pathlib import Path

import pytest
from msgspec.structs import replace

from promptai.bench.manifest import TargetFacts
from promptai.bench.target import OpenTarget, describe_url, is_url, open_target, sha256_of, verify_unchanged
from promptai.errors import EngineRefusedError, ModelError, ModelNotFoundError, SettingsError
from promptai.models.shape import Shape
from promptai.models.synth import write_synthetic
from support_engine import answer, raw_server
from support_runs import FACTS, MODEL

SHAPE = Shape(layers=1, width=32, heads=1, kv_heads=1, ffn=32, vocabulary=258)


@pytest.fixture
def measured(tmp_path: Path) -> TargetFacts:
    """A target whose model file is on the disk, with its hash."""
    path = write_synthetic(tmp_path / "m.gguf", SHAPE, name="m")
    return replace(FACTS, model=replace(MODEL, path=str(path), sha256=sha256_of(path)))


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        pytest.param("http://", "is not a server's URL", id="no-host"),
        pytest.param("http://[::1", "is not a server's URL", id="half-an-address"),
        pytest.param("http://pi:eight", "is not a server's URL", id="port-in-words"),
        pytest.param("http://pi:99999", "is not a server's URL", id="port-too-high"),
        pytest.param("http://me:secret@pi:8080", "a URL with a password", id="password"),
    ],
)
def test_a_url_that_cannot_be_used_or_shared_is_refused(url: str, reason: str) -> None:
    with pytest.raises(SettingsError, match=reason) as refusal:
        describe_url(url, "pi")

    assert "secret" not in str(refusal.value)


def test_a_model_that_changed_is_not_measured_on(measured: TargetFacts) -> None:
    assert measured.model is not None
    write_synthetic(Path(measured.model.path), SHAPE, name="m", seed=1)

    with pytest.raises(ModelError, match="has changed since the run began"):
        verify_unchanged(measured)


def test_a_model_that_has_gone_is_not_measured_on(measured: TargetFacts) -> None:
    assert measured.model is not None
    Path(measured.model.path).unlink()

    with pytest.raises(ModelNotFoundError):
        verify_unchanged(measured)


def test_an_untouched_model_and_a_server_are_measured_on(measured: TargetFacts) -> None:
    verify_unchanged(measured)
    verify_unchanged(TargetFacts("pi", url="http://pi:8080"))


def test_a_server_is_described_by_its_url_alone() -> None:
    assert TargetFacts("pi", url="http://pi:8080") == describe_url("http://pi:8080", "pi")


@pytest.mark.parametrize(("target", "expected"), [("http://pi", True), ("https://pi", True), ("http.gguf", False)])
def test_a_server_is_told_from_a_file(target: str, expected: object) -> None:
    assert is_url(target) is expected


def opened(*answers: bytes) -> OpenTarget:
    """What is made of a server that gives these answers."""

    async def play() -> OpenTarget:
        async with raw_server(*answers) as server:
            facts = TargetFacts("s", url=server.url)
            async with open_target(facts, log=Path("unused"), api_key=None, silence_s=1.0) as target:
                return target

    return asyncio.run(play())


@pytest.mark.parametrize(
    "props",
    [
        pytest.param(answer("404 Not Found", b"404 page not found"), id="no-such-address"),
        pytest.param(
            answer("200 OK", b'{"error": "Unexpected endpoint or method. (GET /props)"}'), id="an-error-in-200"
        ),
        pytest.param(answer("200 OK", b'{"status": "ok"}'), id="an-object-of-its-own"),
    ],
)
def test_a_server_that_is_no_llama_server_is_spoken_to_in_plain_openai(props: bytes) -> None:
    """LM Studio answers HTTP 200 to every address; its cache cannot be switched off, its model has a name."""
    target = opened(props, answer("200 OK", b'{"data": [{"id": "yi"}]}'))

    assert (target.llama_server, target.model) == (False, "yi")


def test_a_llama_server_is_known_by_what_it_says_of_itself() -> None:
    target = opened(answer("200 OK", b'{"model_path": "/yi.gguf", "model_alias": "yi"}'))

    assert (target.llama_server, target.model) == (True, "yi")


@pytest.mark.parametrize("status", ["401 Unauthorized", "503 Unavailable"])
def test_a_missing_key_and_a_loading_model_are_no_matter_of_dialect(status: str) -> None:
    with pytest.raises(EngineRefusedError, match=status[:3]):
        opened(answer(status, b"{}"))


def test_a_server_without_a_model_cannot_be_measured() -> None:
    with pytest.raises(SettingsError, match="serves no model"):
        opened(answer("404 Not Found", b""), answer("200 OK", b'{"object": "list", "data": null}'))


def test_a_hash_tells_its_progress(tmp_path: Path) -> None:
    data = b"x" * (5 << 20)
    (tmp_path / "file").write_bytes(data)
    pieces: list[int] = []

    assert hashlib.sha256(data).hexdigest() == sha256_of(tmp_path / "file", pieces.append)
    assert pieces == [4 << 20, 1 << 20]


@pytest.mark.parametrize(
    ("facts", "here"),
    [
        pytest.param(FACTS, True, id="a-file"),
        pytest.param(TargetFacts("s", url="http://localhost:8080"), True, id="localhost"),
        pytest.param(TargetFacts("s", url="http://127.0.0.1:8080/v1"), True, id="loopback"),
        pytest.param(TargetFacts("s", url="http://[::1]:8080"), True, id="loopback-6"),
        pytest.param(TargetFacts("s", url="http://pi.local:8080"), False, id="another-machine"),
    ],
)
def test_a_target_is_on_this_machine_or_on_another(facts: TargetFacts, here: object) -> None:
    assert facts.here is here
