import asyncio
from pathlib import Path

import pytest

from promptai.bench.manifest import TargetFacts
from promptai.bench.target import OpenTarget, open_target
from promptai.errors import EngineRefusedError, SettingsError
from support_engine import answer, raw_server
from support_runs import FACTS


def opened(*answers: bytes) -> OpenTarget:
    """The target opened on a server that gives these answers."""

    async def play() -> OpenTarget:
        async with raw_server(*answers) as server:
            facts = TargetFacts("s", url=server.url)
            async with open_target(facts, log=Path("unused"), api_key=None, silence_s=1.0) as target:
                return target

    return asyncio.run(play())


@pytest.mark.parametrize(
    "props",
    [
        pytest.param(answer("404 Not Found", b"404 page not found"), id="no-such-path"),
        pytest.param(
            answer("200 OK", b'{"error": "Unexpected endpoint or method. (GET /props)"}'), id="an-error-in-200"
        ),
        pytest.param(answer("200 OK", b'{"status": "ok"}'), id="an-object-of-its-own"),
    ],
)
def test_uses_plain_openai_with_other_servers(props: bytes) -> None:
    """LM Studio answers HTTP 200 on every path; its cache cannot be disabled, and its model has a name."""
    target = opened(props, answer("200 OK", b'{"data": [{"id": "yi"}]}'))

    assert (target.llama_server, target.model) == (False, "yi")


def test_recognises_a_llama_server_by_its_props() -> None:
    target = opened(answer("200 OK", b'{"model_path": "/yi.gguf", "model_alias": "yi"}'))

    assert (target.llama_server, target.model) == (True, "yi")


@pytest.mark.parametrize("status", ["401 Unauthorized", "503 Unavailable"])
def test_a_missing_key_or_a_loading_model_does_not_imply_a_dialect(status: str) -> None:
    with pytest.raises(EngineRefusedError, match=status[:3]):
        opened(answer(status, b"{}"))


def test_rejects_a_server_without_a_model() -> None:
    with pytest.raises(SettingsError, match="serves no model"):
        opened(answer("404 Not Found", b""), answer("200 OK", b'{"object": "list", "data": null}'))


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
def test_recognises_targets_on_this_machine(facts: TargetFacts, here: object) -> None:
    assert facts.here is here
