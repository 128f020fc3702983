"""The official openai package, unchanged, against the gateway with simulated engines."""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from promptai.fleet.replica import State
from promptai.gateway.admission import AdmissionRules
from promptai.gateway.auth import Guard
from promptai.gateway.keys import KeyStore
from promptai.gateway.limits import KeyLimits
from promptai.gateway.streaming import Heartbeat
from promptai.router.schedule.dispatcher import QueueLimits
from promptai.router.selection import Alias, ModelNames
from support_serve import World
from support_simulated_upstream import SimulatedUpstream
from support_site import FAST, SLOW, Threaded, one, threaded

TALK: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Is cell 12 up?"}]
LONG: list[ChatCompletionMessageParam] = [{"role": "user", "content": "cell " * 8400}]
#: One slot; an answer of fifty tokens takes half a second.
BUSY = msgspec.structs.replace(FAST, decode_tps=100.0, slots=1)


class _RecordingUpstream(SimulatedUpstream):
    """Records the bodies that engines receive."""

    def __init__(self, inner: SimulatedUpstream) -> None:
        super().__init__(inner.engines)
        self.bodies: list[dict[str, Any]] = []

    def stream(self, url: str, path: str, body: bytes, **settings: Any) -> Any:
        """Record the body, and pass it on."""
        self.bodies.append(msgspec.json.decode(body))
        return super().stream(url, path, body, **settings)


BODIES: list[_RecordingUpstream] = []


def recording() -> World:
    world = one(FAST)()
    BODIES.append(_RecordingUpstream(world.upstream))
    world.upstream = world.admission.upstream = BODIES[-1]
    return world


@pytest.fixture(scope="module")
def gateway() -> Iterator[Threaded]:
    """A gateway with a fast engine."""
    names = ModelNames(aliases={"gpt-4o": Alias("yi", {"max_tokens": 3})})
    with threaded(recording, rules=AdmissionRules(names=names)) as thread:
        yield thread


@pytest.fixture
def client(gateway: Threaded) -> Iterator[openai.OpenAI]:
    """A client as OpenAI documents it."""
    with new_client(gateway) as found:
        yield found


def new_client(gateway: Threaded, **fields: Any) -> openai.OpenAI:
    settings: dict[str, Any] = {"api_key": "none", "max_retries": 0, **fields}
    return openai.OpenAI(base_url=f"{gateway.url}/v1", **settings)


def test_chat_completion(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="yi", messages=TALK, max_tokens=5)

    assert (answer.object, answer.model, answer.choices[0].finish_reason) == ("chat.completion", "yi", "length")
    assert answer.usage is not None
    assert (answer.usage.completion_tokens, answer.usage.total_tokens) == (5, answer.usage.prompt_tokens + 5)
    assert len((answer.choices[0].message.content or "").split()) == 5
    assert answer.choices[0].message.role == "assistant"


def test_a_streamed_chat_equals_the_complete_one(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="yi", messages=TALK, max_tokens=5)
    with client.chat.completions.create(model="yi", messages=TALK, max_tokens=5, stream=True) as stream:
        chunks = list(stream)

    assert "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices) == whole.choices[0].message.content
    assert [c.finish_reason for chunk in chunks for c in chunk.choices][-1] == "length"
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert [chunk.usage for chunk in chunks if chunk.usage is not None] == []
    assert all(chunk.choices for chunk in chunks)


def test_sends_requested_usage_once_in_the_last_chunk(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="yi", messages=TALK, max_tokens=5, stream=True, stream_options={"include_usage": True}
    )

    chunks = list(stream)

    usages = [chunk.usage for chunk in chunks if chunk.usage is not None]
    assert len(usages) == 1
    assert (usages[0].completion_tokens, chunks[-1].choices, chunks[-1].usage) == (5, [], usages[0])


def test_text_completion(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="yi", prompt="Cell 12", max_tokens=5)
    pieces = list(client.completions.create(model="yi", prompt="Cell 12", max_tokens=5, stream=True))

    assert (whole.object, len(whole.choices[0].text.split())) == ("text_completion", 5)
    assert "".join(choice.text for piece in pieces for choice in piece.choices) == whole.choices[0].text


def test_lists_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["yi", "gpt-4o"]
    assert client.models.retrieve("yi").owned_by == "promptai"
    with pytest.raises(openai.NotFoundError, match="no model named"):
        client.models.retrieve("../yi")


def test_an_alias_answers_with_the_name_of_its_model(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="gpt-4o", messages=TALK)

    assert (answer.model, len((answer.choices[0].message.content or "").split())) == ("yi", 3)


def test_embeddings(client: openai.OpenAI) -> None:
    found = client.embeddings.create(model="yi", input=["Cell 12", "Cell 13"])

    assert [len(one.embedding) for one in found.data] == [8, 8]
    assert found.data[0].embedding != found.data[1].embedding


def test_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="yi", messages=TALK, max_tokens=3, logprobs=True, top_logprobs=1)

    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert "".join(token.token for token in logprobs.content or ()) == answer.choices[0].message.content


def test_unknown_fields_reach_the_engine_unchanged(client: openai.OpenAI) -> None:
    extra = {"mirostat": 2, "unheard_of": {"a": [1, None, "ü"]}, "seed": 10**15}

    client.chat.completions.create(model="yi", messages=TALK, max_tokens=2, stop=["x"], extra_body=extra)

    sent = BODIES[-1].bodies[-1]
    assert {name: sent[name] for name in extra} == extra
    assert (sent["stop"], sent["messages"]) == (["x"], TALK)


def test_status_events_work_with_the_clients_stream_helper(gateway: Threaded) -> None:
    with new_client(gateway, default_headers={"x-promptai-status": "1"}) as client:
        with client.chat.completions.create(model="yi", messages=TALK, max_tokens=4, stream=True) as stream:
            text = "".join(choice.delta.content or "" for chunk in stream for choice in chunk.choices)
        with client.chat.completions.stream(model="yi", messages=TALK, max_tokens=4) as helper:
            helper.until_done()
            streamed_text = helper.current_completion_snapshot.choices[0].message.content

    assert (text, len(text.split())) == (streamed_text, 4)


def test_the_client_can_read_the_response_headers(client: openai.OpenAI) -> None:
    answer = client.chat.completions.with_raw_response.create(model="yi", messages=TALK, max_tokens=1)

    assert (answer.headers["x-promptai-replica"], answer.headers["x-promptai-model"]) == ("a", "yi")


def test_responses_and_errors_have_a_request_id(client: openai.OpenAI) -> None:
    """The client's own id if it sent one; the gateway logs it."""
    named = {"X-Request-Id": "abc-1"}
    answer = client.chat.completions.create(model="yi", messages=TALK, max_tokens=1, extra_headers=named)
    other = client.chat.completions.create(model="yi", messages=TALK, max_tokens=1)
    with client.chat.completions.create(
        model="yi", messages=TALK, max_tokens=1, stream=True, extra_headers=named
    ) as stream:
        streamed = stream.response.headers
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="yo", messages=TALK, extra_headers=named)

    assert (answer._request_id, caught.value.request_id) == ("abc-1", "abc-1")
    assert other._request_id not in {None, "", "abc-1"}
    assert streamed["x-request-id"] == streamed["x-promptai-request-id"] == "abc-1"


def test_the_async_client_sends_concurrent_requests(gateway: Threaded) -> None:
    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none") as client:

            async def ask(number: int) -> str:
                talk: list[ChatCompletionMessageParam] = [{"role": "user", "content": str(number)}]
                whole = await client.chat.completions.create(model="yi", messages=talk, max_tokens=4)
                text = ""
                async for chunk in await client.chat.completions.create(
                    model="yi", messages=talk, max_tokens=4, stream=True
                ):
                    text += "".join(choice.delta.content or "" for choice in chunk.choices)
                assert text == whole.choices[0].message.content
                return text

            return await asyncio.gather(*map(ask, range(20)))

    assert len(set(asyncio.run(main()))) == 20


def test_an_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="yo", messages=TALK)

    assert (caught.value.code, caught.value.param, caught.value.type) == ("model_not_found", "model", "not_found_error")
    assert "did you mean yi?" in caught.value.message


def test_a_too_long_prompt_is_a_bad_request_with_the_context(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="yi holds 8192") as caught:
        client.chat.completions.create(model="yi", messages=LONG * 2)

    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize("stream", [False, True])
def test_an_engine_refusal_is_a_bad_request(client: openai.OpenAI, stream: bool) -> None:  # noqa: FBT001
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="yi", messages=LONG, stream=stream)

    assert isinstance(caught.value.body, dict)
    assert (caught.value.body["src"], caught.value.body["n_ctx"]) == ("engine", 8192)
    assert (caught.value.code, caught.value.type) == ("context_length_exceeded", "exceed_context_size_error")


def test_a_wrong_type_is_a_bad_request_with_the_field(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="yi", messages=TALK, max_tokens="many")  # type: ignore[call-overload]

    assert caught.value.param == "max_tokens"


def busy(gateway: Threaded) -> threading.Thread:
    """Occupy the only slot for half a second."""

    def ask() -> None:
        with new_client(gateway) as client:
            client.chat.completions.create(model="yi", messages=TALK, max_tokens=50)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


def until_busy(client: openai.OpenAI) -> None:
    while not client.get("../api/queue", cast_to=dict[str, Any])["running"]:
        pass


@pytest.mark.timeout(20)
def test_the_client_retries_after_a_full_queue() -> None:
    """The client honours Retry-After, and gets its answer."""
    with threaded(one(BUSY, limits=QueueLimits(queue=0))) as gateway, new_client(gateway) as client:
        other = busy(gateway)
        until_busy(client)
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model="yi", messages=TALK)
        patient = client.with_options(max_retries=2)
        answer = patient.chat.completions.create(model="yi", messages=TALK, max_tokens=1)
        other.join()

    assert (caught.value.code, caught.value.response.headers["retry-after"]) == ("saturated", "1")
    assert answer.choices[0].finish_reason == "length"


def test_unavailable_replicas_are_a_503() -> None:
    def down() -> World:
        world = one(FAST)()
        known = world.source._replicas["a"]
        world.source._replicas["a"] = msgspec.structs.replace(known, state=State.DOWN, reason="is unplugged")
        return world

    with threaded(down) as gateway, new_client(gateway) as client, pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model="yi", messages=TALK, stream=True)

    assert (caught.value.status_code, type(caught.value)) == (503, openai.InternalServerError)
    assert "is unplugged" in caught.value.message


def test_wrong_keys_and_forbidden_models(tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "keys.json")
    _, secret = store.add("app", limits=KeyLimits(models=("other",)))
    with threaded(one(FAST), guard=Guard(store, open=False)) as gateway:
        with new_client(gateway, api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
        with (
            new_client(gateway, api_key=secret) as client,
            pytest.raises(openai.PermissionDeniedError, match="may not use"),
        ):
            client.chat.completions.create(model="yi", messages=TALK)


@pytest.mark.timeout(20)
def test_the_client_ignores_keep_alive_comments() -> None:
    slow = msgspec.structs.replace(SLOW, prefill_tps=10.0, decode_tps=1000.0)
    with threaded(one(slow), heartbeat=Heartbeat(ping_s=0.1)) as gateway, new_client(gateway) as client:
        talk: list[ChatCompletionMessageParam] = [{"role": "user", "content": "a b c d e f g h i"}]
        stream = client.chat.completions.create(model="yi", messages=talk, max_tokens=4, stream=True)
        text = "".join(choice.delta.content or "" for chunk in stream for choice in chunk.choices)

    assert len(text.split()) == 4
