"""A request outlives its board: the client gets the same answer, whichever attempt fails and when."""

import asyncio
from typing import Any

import msgspec
import pytest

from promptai.engine.upstream import Reply
from promptai.errors import BrokenOffError, EngineProtocolError, EngineRefusedError
from support_clock import run_virtually
from support_routed import (
    PACE,
    RULES,
    TOKENS,
    Received,
    accept,
    arm,
    assert_one_answer,
    chat,
    cut_off,
    failing,
    first,
    receive,
    undisturbed,
    world,
)
from support_serve import World

TEXT = "/v1/completions"
LIVE_FAULTS = ["stall", "cut", "malformed", "error", "die"]


@pytest.mark.parametrize("after", [0, 1, 7, TOKENS - 1])
@pytest.mark.parametrize("kind", LIVE_FAULTS)
def test_an_answer_is_resumed_on_another_board_unchanged(kind: str, after: int) -> None:
    received = failing(kind, after, chat())

    assert_one_answer(undisturbed(chat()), received)
    assert received.routed.continuations == (["text"] if after else [])
    assert len(received.routed.retries) == (0 if after else 1)
    assert received.took_s < 15  # the limit of a silence is 5 s and four times the pending work


def test_a_refusing_board_is_not_tried_twice() -> None:
    received = failing("refuse", 0, chat())

    assert_one_answer(undisturbed(chat()), received)
    assert received.routed.retries == ["busy"]
    assert received.took_s < 3


@pytest.mark.parametrize("after", [1, 7])
def test_reported_token_ids_are_used_to_resume(after: int) -> None:
    body = chat(logprobs=True, top_logprobs=1)

    received = failing("cut", after, body)

    assert undisturbed(body).text == received.text
    assert received.routed.continuations == ["ids"]


@pytest.mark.parametrize("kind", ["cut", "malformed", "error"])
@pytest.mark.parametrize("second", [1, 5])
def test_the_resuming_board_may_fail_too(kind: str, second: int) -> None:
    async def play() -> Received:
        async with world("one", "two", "three").running() as running:
            admitted = accept(running, chat())
            for name in ("one", "two", "three"):
                arm(running, name, kind, 6 if name == first(running, admitted) else second)
            return await receive(admitted)

    received = run_virtually(play())

    assert_one_answer(undisturbed(chat()), received)
    assert received.routed.continuations == ["text", "ids", "ids"]


@pytest.mark.parametrize("kind", ["cut", "stall", "error", "die"])
@pytest.mark.parametrize("after", [0, 6])
def test_a_complete_response_survives_too(kind: str, after: int) -> None:
    body = chat(stream=False)

    async def play(*, fails: bool) -> dict[str, Any]:
        async with world().running() as running:
            admitted = accept(running, body)
            if fails:
                arm(running, first(running, admitted), kind, after)
            return msgspec.json.decode((await admitted.routed.response()).body, type=dict[str, Any])

    usual, received = run_virtually(play(fails=False)), run_virtually(play(fails=True))

    assert usual["choices"] == received["choices"]
    assert received["choices"][0]["message"]["content"] == undisturbed(chat()).text
    assert usual["usage"]["completion_tokens"] == received["usage"]["completion_tokens"] == TOKENS
    assert usual["usage"]["prompt_tokens"] == received["usage"]["prompt_tokens"]


@pytest.mark.parametrize("prompt", ["The mast was", [7, 8, 9]])
@pytest.mark.parametrize("after", [0, 1, TOKENS - 1])
def test_a_completion_is_resumed_like_a_chat(prompt: str | list[int], after: int) -> None:
    body = {"prompt": prompt, "max_tokens": TOKENS}

    usual, received = undisturbed(body, TEXT), failing("cut", after, body, TEXT)

    assert received.error is None
    assert usual.text == received.text
    assert usual.ends == received.ends == ["length"]
    assert usual.usage == received.usage
    assert {chunk["object"] for chunk in received.chunks} == {"text_completion"}


def test_a_resumed_answer_ends_where_the_model_ends_it() -> None:
    config = msgspec.structs.replace(PACE, answer_tokens=12)
    body = chat(max_tokens=None)
    usual = undisturbed(body, config=config)
    assert usual.ends == ["stop"]

    async def play() -> Received:
        async with world(config=config).running() as running:
            admitted = accept(running, body)
            arm(running, first(running, admitted), "cut", 2)
            return await receive(admitted)

    assert_one_answer(usual, run_virtually(play()))


@pytest.mark.parametrize(
    "missing",
    ['"finish_reason":"length"', '"usage"', "[DONE]"],
    ids=["finish reason", "usage", "done"],
)
def test_the_missing_end_of_a_chat_is_added(missing: str) -> None:
    """No engine gets a request for more tokens than the client wanted."""
    received, streams = cut_off(lambda data: missing in data, chat())

    assert_one_answer(undisturbed(chat()), received)
    assert len(streams) == 1


def test_the_missing_end_of_a_completion_is_added() -> None:
    body = {"prompt": "The mast was", "max_tokens": TOKENS}

    received, streams = cut_off(lambda data: '"finish_reason":"length"' in data, body, TEXT)

    assert undisturbed(body, TEXT).text == received.text
    assert received.ends == ["length"]
    assert undisturbed(body, TEXT).usage == received.usage
    assert len(streams) == 1


@pytest.mark.parametrize("tokens", [1, 5, TOKENS])
def test_chunks_that_arrive_with_the_failure_are_sent_once(tokens: int) -> None:
    """A busy gateway reads the tokens and the malformed line after them at once."""
    seen = []

    def before(data: str) -> bool:
        seen.append(data)
        return len([one for one in seen if '"content":" ' in one]) == tokens + 1 or '"length"' in data

    received, streams = cut_off(before, chat(), lumped=True)

    assert_one_answer(undisturbed(chat()), received)
    assert len(streams) == (2 if tokens < TOKENS else 1)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"functions": [{}]}, "functions"),
        ({"grammar": "root ::= x"}, "grammar"),
        ({"json_schema": {"type": "object"}}, "json_schema"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"n": 2}, "several answers"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "text": "up?"}]}]}, "images or audio"),
    ],
)
def test_an_answer_that_cannot_be_resumed_ends_with_the_reason(fields: dict[str, Any], word: str) -> None:
    received = failing("cut", 5, chat(**fields))

    assert isinstance(received.error, BrokenOffError)
    assert word in received.error.hint
    assert received.text  # a part has been sent
    assert received.ends == []


@pytest.mark.parametrize("fields", [{"tools": [{"type": "function"}]}, {"response_format": {"type": "json_object"}}])
def test_before_its_first_token_any_request_can_be_retried(fields: dict[str, Any]) -> None:
    received = failing("cut", 0, chat(**fields))

    assert received.error is None
    assert undisturbed(chat()).text == received.text


def test_a_tag_beside_progress_is_sent_once() -> None:
    """llama-server sends it so if the client wants reasoning as text."""

    def rewrite(data: str) -> str:
        first_progress = '"processed":0' in data
        return data.replace('"content":null', '"content":"<think>"') if first_progress else data

    received, _ = cut_off(lambda _: False, chat(), rewrite=rewrite)

    assert received.text == "<think>" + undisturbed(chat()).text
    assert not any("prompt_progress" in chunk for chunk in received.chunks)
    assert received.usage == undisturbed(chat()).usage


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_sent_reasoning_cannot_be_resumed(name: str) -> None:
    seen = []

    def rewrite(data: str) -> str:
        seen.append(data)
        return data.replace('"content":" ', f'"{name}":" ')

    received, _ = cut_off(lambda _: len(seen) == 6, chat(), rewrite=rewrite)

    assert isinstance(received.error, BrokenOffError)
    assert "reasoning" in received.error.hint


def test_a_tool_call_is_relayed_but_not_resumed() -> None:
    call = '{"index":0,"id":"a","function":{"name":"ping","arguments":"{"}}'
    seen = []

    def rewrite(data: str) -> str:
        seen.append(data)
        return data.replace('"delta":{"content":" ', f'"delta":{{"tool_calls":[{call}],"x":" ')

    received, _ = cut_off(lambda _: len(seen) == 6, chat(), rewrite=rewrite)

    assert isinstance(received.error, BrokenOffError)
    assert "a tool call" in received.error.hint
    assert any(choice["delta"].get("tool_calls") for choice in received.choices)


def test_a_refused_request_is_not_retried() -> None:
    async def play() -> Received:
        async with world().running() as running:
            return await receive(accept(running, chat(logprobs="yes")))

    received = run_virtually(play())

    assert isinstance(received.error, EngineRefusedError)
    assert received.error.status == 400
    assert received.routed.retries == []


def test_a_context_too_small_to_resume_is_reported() -> None:
    async def play() -> Received:
        small = msgspec.structs.replace(PACE, context=24)
        async with World({"large": PACE, "small": small}, rules=RULES).running() as running:
            running.source.fail("small")

            def on_chunk(chunks: int) -> None:
                if chunks == TOKENS - 2:
                    running.kill("large")
                    running.source.recover("small")

            return await receive(accept(running, chat()), on_chunk)

    received = run_virtually(play())

    assert isinstance(received.error, BrokenOffError)
    assert "context size" in received.error.message
    assert "an answer that another replica began" in received.error.hint


def test_a_loading_board_is_left_for_a_loaded_one() -> None:
    async def play() -> Received:
        async with world().running() as running:
            admitted = accept(running, chat())
            engine = running.engines[f"sim://{first(running, admitted)}"]
            engine.kill()
            engine.config = msgspec.structs.replace(PACE, load_s=60)
            engine.start()
            return await receive(admitted)

    received = run_virtually(play())

    assert_one_answer(undisturbed(chat()), received)
    assert received.routed.retries == ["busy"]


OPENAI = {"two": "openai"}


def test_llama_server_resumes_an_answer_of_another_server() -> None:
    async def play() -> tuple[Received, str]:
        boards = {"one": msgspec.structs.replace(PACE, prefill_tps=10.0), "two": PACE}
        async with World(boards, rules=RULES, dialects=OPENAI).running() as running:
            admitted = accept(running, chat())
            began = first(running, admitted)
            arm(running, began, "cut", 5)
            return await receive(admitted), began

    received, began = run_virtually(play())

    assert began == "two"
    assert undisturbed(chat()).text == received.text
    assert [lease.replica.id for lease in received.routed.leases] == ["two", "one"]


def test_an_answer_is_resumed_only_by_llama_server_however_fast_others_are() -> None:
    async def play() -> Received:
        slow, fast = (msgspec.structs.replace(PACE, prefill_tps=tps) for tps in (10.0, 1000.0))
        boards = {"one": slow, "two": fast, "three": slow}
        async with World(boards, rules=RULES, dialects=OPENAI).running() as running:
            busy = [accept(running, chat(max_tokens=200)) for _ in range(2)]
            async with (
                running.dispatcher.acquire(busy[0].routed.slot_request),
                running.dispatcher.acquire(busy[1].routed.slot_request),
            ):
                admitted = accept(running, chat())
                began = first(running, admitted)
                assert began != "two"
                arm(running, began, "cut", 5)
                receiving = asyncio.create_task(receive(admitted))
                await asyncio.sleep(0)
            return await receiving

    received = run_virtually(play())

    assert undisturbed(chat()).text == received.text
    assert {lease.replica.id for lease in received.routed.leases} == {"one", "three"}


def test_the_error_names_the_lack_of_a_board_that_can_resume() -> None:
    async def play() -> Received:
        boards = {"two": PACE, "three": PACE}
        openai = dict.fromkeys(boards, "openai")
        async with World(boards, rules=RULES, dialects=openai).running() as running:
            admitted = accept(running, chat())
            arm(running, first(running, admitted), "cut", 5)
            return await receive(admitted)

    received = run_virtually(play())

    assert isinstance(received.error, BrokenOffError)
    assert "only llama-server" in received.error.hint


def test_an_image_does_not_change_characters_per_token() -> None:
    """The engine counts the image's tokens, for which there is no text."""

    async def play() -> tuple[float, float]:
        async with world().running() as running:
            book, before = running.fleet_state.book, running.fleet_state.book.chars_per_token("yi")
            picture = {"type": "image_url", "image_url": {"url": "data:,"}, "text": "x " * 400}
            for _ in range(3):
                await receive(accept(running, chat(messages=[{"role": "user", "content": [picture]}])))
            return before, book.chars_per_token("yi")

    before, after = run_virtually(play())

    assert before == after


def test_an_embedding_has_a_short_time_limit() -> None:
    limits: list[float] = []

    async def play() -> None:
        async with world(config=msgspec.structs.replace(PACE, context=8192), known_rates=False).running() as running:
            post = running.upstream.post

            async def recorded(url: str, path: str, body: bytes, *, limit_s: float) -> Reply:
                limits.append(limit_s)
                return await post(url, path, body, limit_s=limit_s)

            running.upstream.post = recorded  # type: ignore[method-assign]
            await accept(running, {"input": "Is cell 12 up?", "stream": False}, "/v1/embeddings").routed.response()

    run_virtually(play())

    assert [limit < 120 for limit in limits] == [True]


def test_an_oversized_response_counts_as_a_failure_of_its_board() -> None:
    async def play() -> tuple[int, list[str]]:
        async with world().running() as running:
            admitted = accept(running, {"input": "Is cell 12 up?", "stream": False}, "/v1/embeddings")
            post, broken = running.upstream.post, f"sim://{first(running, admitted)}"

            async def oversized(url: str, path: str, body: bytes, *, limit_s: float) -> Reply:
                if url == broken:
                    raise EngineProtocolError(f"{url}{path} answered with more than 1 bytes")
                return await post(url, path, body, limit_s=limit_s)

            running.upstream.post = oversized  # type: ignore[method-assign]
            return (await admitted.routed.response()).status, admitted.routed.retries

    assert run_virtually(play()) == (200, ["protocol"])
