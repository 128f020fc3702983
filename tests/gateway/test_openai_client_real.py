"""The official openai package through the gateway: the responses equal those of the real engine itself."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam

from promptai.models.bundled import NAME
from support_real_site import RealSite, asked, real_site
from support_site import CHAT, EMBED, TEXT

pytestmark = pytest.mark.real

TALK: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is a base station?"}]
TOOL: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "state_of_cell",
        "description": "Tells whether a cell is up.",
        "parameters": {"type": "object", "properties": {"cell": {"type": "integer"}}, "required": ["cell"]},
    },
}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"cell": {"type": "integer"}, "up": {"type": "boolean"}},
    "required": ["cell", "up"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "state", "schema": SCHEMA, "strict": True}}
#: Fields that differ from one response to the next.
VARIABLE = {"id", "created", "timings"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealSite]:
    """The bundled model with two slots."""
    with real_site(tmp_path_factory.mktemp("engine") / "engine.log") as found:
        yield found


@pytest.fixture
def client(site: RealSite) -> Iterator[openai.OpenAI]:
    """A client as OpenAI documents it."""
    with openai.OpenAI(base_url=f"{site.gateway}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {}),
        (CHAT, {"logprobs": True, "top_logprobs": 2}),
        (CHAT, {"stop": [" is"], "max_tokens": 40}),
        (CHAT, {"n": 2}),
        (CHAT, {"response_format": FORMAT, "max_tokens": 60}),
        (CHAT, {"json_schema": SCHEMA, "max_tokens": 60}),
        (CHAT, {"grammar": 'root ::= "yes" | "no"'}),
        (CHAT, {"tools": [TOOL]}),
        (CHAT, {"tools": [TOOL], "tool_choice": "required", "logprobs": True}),
        (CHAT, {"messages": [*TALK, {"role": "assistant", "content": "A base"}]}),
        (CHAT, {"timings_per_token": True, "return_progress": True}),
        (CHAT, {"logit_bias": [[300, -100]], "min_p": 0.1, "top_k": 5, "repeat_penalty": 1.2}),
        (TEXT, {}),
        (TEXT, {"logprobs": 2}),
        (TEXT, {"prompt": ["A base", "The cell"]}),
        (TEXT, {"prompt": [292, 275]}),
        (TEXT, {"stop": ["\n"], "max_tokens": 40}),
    ],
    ids=lambda value: str(value)[:48],
)
def test_a_complete_response_equals_the_engines_response(site: RealSite, path: str, fields: dict[str, Any]) -> None:
    """Except id and times; and of several answers the gateway counts all in usage, llama-server one."""
    given: dict[str, dict[str, Any]] = {CHAT: {"messages": TALK}, TEXT: {"prompt": "A base station"}}
    body = {"model": NAME, "max_tokens": 8, "temperature": 0, "cache_prompt": False, "seed": 7, **given[path], **fields}

    status, direct = asked(site.engine, path, body)
    _, through = asked(site.gateway, path, body)

    assert status == 200
    several = len(direct["choices"]) > 1
    for answer in (direct, through):
        for name in (*VARIABLE, *(["usage"] if several else [])):
            answer.pop(name)
    assert through == direct


@pytest.mark.parametrize("fields", [{"n": 2}, {"n": 1}])
def test_usage_counts_every_answer(site: RealSite, fields: dict[str, Any]) -> None:
    _, found = asked(site.gateway, CHAT, {"messages": TALK, "max_tokens": 8, "temperature": 0, **fields})

    assert found["usage"]["completion_tokens"] == 8 * fields["n"]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "cell " * 1200}]}, 400),
        (CHAT, {"messages": TALK, "grammar": "root ::= ((("}, 400),
        (CHAT, {"messages": TALK, "temperature": "hot"}, 400),
        (CHAT, {"messages": TALK, "n": 1000}, 400),
        (TEXT, {"prompt": [-5]}, 400),
        (EMBED, {"input": "hello"}, 501),
    ],
    ids=lambda value: str(value)[:48],
)
@pytest.mark.parametrize("stream", [False, True])
def test_passes_on_engine_refusals_unchanged(
    site: RealSite,
    path: str,
    body: dict[str, Any],
    status: int,
    stream: bool,  # noqa: FBT001
) -> None:
    sent = {"model": NAME, "max_tokens": 4, **body, "stream": stream}

    direct, through = asked(site.engine, path, sent), asked(site.gateway, path, sent)

    assert (direct[0], through[0]) == (status, status)
    error, expected = through[1]["error"], direct[1]["error"]
    assert error["src"] == "engine"
    if expected["type"] == "exceed_context_size_error":  # clients compare OpenAI's code
        expected["code"] = "context_length_exceeded"
    assert error | expected == error


@pytest.mark.parametrize(
    "fields",
    [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/"}}]}
            ]
        },
        {"messages": TALK, "tools": [1]},
        {"messages": [{"role": "assistant", "tool_calls": [{"id": 1}]}, *TALK]},
        {"messages": TALK, "grammar": "root ::= [\\x00]"},
    ],
    ids=lambda value: str(value)[:48],
)
def test_requests_that_fail_in_the_engine_do_not_open_its_breaker(site: RealSite, fields: dict[str, Any]) -> None:
    """llama-server answers these with HTTP 500, the last within the stream; repeated, it would look broken."""
    for _ in range(4):
        status, found = asked(site.gateway, CHAT, {"model": NAME, "max_tokens": 2, **fields})
        assert (status, found["error"]["src"]) == (502, "engine")

    status, _ = asked(site.gateway, CHAT, {"model": NAME, "messages": TALK, "max_tokens": 2})

    assert status == 200


def test_a_streamed_chat_equals_the_complete_one(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=NAME, messages=TALK, max_tokens=16, temperature=0)
    stream = client.chat.completions.create(
        model=NAME, messages=TALK, max_tokens=16, temperature=0, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)

    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens == 16


def test_sends_no_usage_unless_requested(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model=NAME, messages=TALK, max_tokens=4, stream=True)

    assert [chunk.usage for chunk in stream if chunk.usage is not None] == []


def test_streams_several_prompts(client: openai.OpenAI) -> None:
    """llama-server begins such a stream with ``null``."""
    stream = client.completions.create(model=NAME, prompt=["A base", "The cell"], max_tokens=4, stream=True)

    assert {choice.index for piece in stream for choice in piece.choices} == {0, 1}


def test_the_answer_follows_a_json_schema(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=NAME,
        messages=TALK,
        max_tokens=80,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "state", "schema": SCHEMA, "strict": True}},
    )

    found = json.loads(answer.choices[0].message.content or "")
    assert set(found) == {"cell", "up"}
    assert isinstance(found["up"], bool)


def test_accepts_tools(client: openai.OpenAI) -> None:
    """The bundled model does not support tools and answers with text; the request is valid."""
    answer = client.chat.completions.create(model=NAME, messages=TALK, tools=[TOOL], tool_choice="auto", max_tokens=8)

    assert answer.choices[0].message.content or answer.choices[0].message.tool_calls


def test_embeddings_without_engine_support_are_an_engine_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.InternalServerError) as caught:
        client.embeddings.create(model=NAME, input="Cell 12")

    assert caught.value.status_code == 501
    assert isinstance(caught.value.body, dict)
    assert (caught.value.body["src"], caught.value.body["type"]) == ("engine", "not_supported_error")


def test_the_async_client_receives_logprobs(site: RealSite) -> None:
    async def main() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=f"{site.gateway}/v1", api_key="none") as client:
            stream = await client.chat.completions.create(
                model=NAME, messages=TALK, max_tokens=8, temperature=0, logprobs=True, top_logprobs=2, stream=True
            )
            text, tokens = "", ""
            async for chunk in stream:
                for choice in chunk.choices:
                    text += choice.delta.content or ""
                    tokens += "".join(
                        token.token for token in (choice.logprobs.content if choice.logprobs else ()) or ()
                    )
            return text, tokens

    text, tokens = asyncio.run(main())

    assert text == tokens != ""


def test_status_events_do_not_disturb_the_client(site: RealSite) -> None:
    headers = {"x-promptai-status": "1"}
    with openai.OpenAI(base_url=f"{site.gateway}/v1", api_key="none", default_headers=headers) as client:
        stream = client.chat.completions.create(model=NAME, messages=TALK, max_tokens=8, stream=True)
        text = "".join(choice.delta.content or "" for chunk in stream for choice in chunk.choices)

    assert text
