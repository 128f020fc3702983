"""Odd values in every field against the real engine: it may refuse them, but engine and gateway must survive."""

from collections.abc import Iterator
from typing import Any

import pytest

from promptai.gateway.openapi import document
from promptai.models.bundled import NAME
from support_hostile import FIELDS, ODD
from support_real_site import RealSite, asked, real_site
from support_site import CHAT, TEXT

pytestmark = pytest.mark.real

SCHEMAS = {CHAT: "ChatRequest", TEXT: "CompletionRequest"}
#: Undocumented fields that have a meaning for llama-server.
FURTHER = [
    "n_predict",
    "t_max_predict_ms",
    "samplers",
    "lora",
    "id_slot",
    "n_probs",
    "n_keep",
    "chat_template",
    "n_cmpl",
]
TALK = [{"role": "user", "content": "What is a base station?"}]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealSite]:
    """A short context, for answers without a limit."""
    with real_site(tmp_path_factory.mktemp("engine") / "engine.log", context=256) as found:
        yield found


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_any_type_in_any_field(site: RealSite, path: str, stream: bool) -> None:  # noqa: FBT001
    """Every refusal has the envelope; refusals of the gateway itself are never 5xx."""
    required: dict[str, Any] = {"messages": TALK} if path == CHAT else {"prompt": "A base station"}
    found = set()
    for field in [*document()["components"]["schemas"][SCHEMAS[path]]["properties"], *FURTHER]:
        for value in ODD:
            status, answer = asked(
                site.gateway, path, {"model": NAME, "max_tokens": 2, **required, "stream": stream, field: value}
            )
            if status != 200:
                assert set(answer["error"]) >= FIELDS, (field, value)
                found.add((status, answer["error"]["src"]))

    assert found <= {(400, "gateway"), (400, "engine"), (404, "gateway"), (502, "engine")}
    assert asked(site.gateway, path, {"model": NAME, "max_tokens": 2, **required})[0] == 200
    assert asked(site.gateway, "/api/decide", {"messages": TALK})[1]["replica"] is not None
