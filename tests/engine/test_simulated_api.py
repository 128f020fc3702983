"""The simulated engine's API in llama-server's formats, on virtual time."""

import asyncio
from typing import Any

import msgspec
import pytest

from promptai.engine.upstream import Piece
from support_simulated_upstream import SimulatedUpstream
from support_simulator import (
    CHAT,
    CONFIG,
    NATIVE,
    TALK,
    TEXT,
    A,
    B,
    against,
    ask,
    chunks,
    ids,
    listen,
    text,
)


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "tool", "content": "ok"}, {"role": "developer", "content": "x"}]},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]},
        {"messages": TALK, "tools": [], "temperature": 0.3, "stop": ["x"], "foo": None},
    ],
    ids=["roles", "null", "parts", "unknown-fields"],
)
def test_accepts_messages_in_every_format(body: dict[str, Any]) -> None:
    """And ignores unknown fields."""
    answer = against(lambda upstream: ask(upstream, max_tokens=3, **body))

    assert len(answer["choices"][0]["message"]["content"].split()) == 3


def test_joins_the_parts_of_a_message_with_line_feeds() -> None:
    """Like llama-server."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]

    found = against(lambda up: ask(up, "/apply-template", messages=[{"role": "user", "content": parts}]))

    assert found == {"prompt": "<|user|>a\nb<|end|><|assistant|>"}


def test_a_pinned_request_waits_without_blocking_others() -> None:
    """Slot 0 is busy for long; later requests take slot 1 meanwhile; an unknown slot number is ignored."""

    async def play(upstream: SimulatedUpstream) -> list[tuple[int, float]]:
        loop = asyncio.get_running_loop()

        async def native(tokens: int, slot: int) -> tuple[int, float]:
            answer = await ask(upstream, NATIVE, prompt=[tokens] * 10, n_predict=tokens, id_slot=slot)
            return answer["id_slot"], loop.time()

        return list(await asyncio.gather(native(100, 0), native(1, 0), native(2, -1), native(3, 7)))

    long, pinned, free, unknown = against(play)

    assert [long[0], pinned[0], free[0], unknown[0]] == [0, 0, 1, 1]
    assert free[1] < unknown[1] < long[1] < pinned[1]


def test_reports_progress_with_the_slot_and_after_each_batch() -> None:
    """In every format: at once, after 40 tokens, and at the end of the prompt; then the first token."""
    prompt = list(range(1, 61))

    async def play(upstream: SimulatedUpstream) -> dict[str, list[Piece]]:
        body: dict[str, Any] = {"return_progress": True, "cache_prompt": False, "prompt": prompt}
        said = [{"role": "user", "content": "x " * 56}]
        return {
            CHAT: await listen(upstream, messages=said, max_tokens=1, **body),
            TEXT: await listen(upstream, TEXT, max_tokens=1, **body),
            NATIVE: await listen(upstream, NATIVE, n_predict=1, **body),
        }

    for path, pieces in against(play).items():
        told = [(piece.t - pieces[0].t, chunk["prompt_progress"]) for piece in pieces[:3] for chunk in chunks([piece])]
        assert pytest.approx([t for t, _ in told], abs=1e-6) == [0.0, 0.4, 0.6], path
        assert [(p["total"], p["cache"], p["processed"]) for _, p in told] == [(60, 0, 0), (60, 0, 40), (60, 0, 60)]
        assert pytest.approx([p["time_ms"] for _, p in told], abs=1e-3) == [0.0, 400.0, 600.0]
        assert len(text(pieces).split()) == 1
    first = chunks(against(play)[CHAT])[0]["choices"]
    assert first == [{"index": 0, "delta": {"role": "assistant", "content": None}, "finish_reason": None}]


def test_progress_starts_with_the_cached_tokens() -> None:
    """The second time only the last token is computed."""

    async def play(upstream: SimulatedUpstream) -> list[Any]:
        await listen(upstream, max_tokens=1)
        return chunks(await listen(upstream, max_tokens=1, return_progress=True))

    begin, end = [chunk["prompt_progress"] for chunk in against(play)[:2]]

    assert begin["cache"] == begin["processed"] == begin["total"] - 1 == end["cache"]
    assert end["processed"] == end["total"]


def test_places_usage_and_timings_like_llama_server() -> None:
    """With usage in a separate chunk when requested; otherwise timings beside the finish reason."""

    async def play(upstream: SimulatedUpstream) -> tuple[list[Any], list[Any]]:
        plain = await listen(upstream, max_tokens=2)
        return chunks(plain), chunks(await listen(upstream, max_tokens=2, stream_options={"include_usage": True}))

    plain, counted = against(play)

    assert "usage" not in plain[-1]
    assert (plain[-1]["choices"][0]["finish_reason"], plain[-1]["timings"]["predicted_n"]) == ("length", 2)
    assert (counted[-1]["choices"], counted[-1]["usage"]["completion_tokens"]) == ([], 2)
    assert "timings" not in counted[-2]


def test_three_streams_and_three_responses_agree() -> None:
    """For one prompt as messages, as text and as ids."""

    async def play(upstream: SimulatedUpstream) -> set[str]:
        prompt = await ids(upstream)
        plain = (await ask(upstream, "/apply-template", messages=TALK))["prompt"]
        found = {
            text(await listen(upstream, max_tokens=9)),
            (await ask(upstream, messages=TALK, max_completion_tokens=9))["choices"][0]["message"]["content"],
        }
        for one in (prompt, plain):
            found.add(text(await listen(upstream, TEXT, prompt=one, max_tokens=9)))
            found.add(text(await listen(upstream, NATIVE, prompt=one, n_predict=9)))
            found.add((await ask(upstream, TEXT, prompt=one, max_tokens=9))["choices"][0]["text"])
            found.add((await ask(upstream, NATIVE, prompt=one, n_predict=9))["content"])
        return found

    assert len(against(play)) == 1


@pytest.mark.parametrize("cut", [1, 7, 26])
def test_continues_an_answer_on_another_engine_by_ids(cut: int) -> None:
    """A chat that lost its engine continues with the same text to the same end."""
    config = msgspec.structs.replace(CONFIG, answer_tokens=60)

    async def play(upstream: SimulatedUpstream) -> tuple[str, str, str, str]:
        whole = await listen(upstream, logprobs=True, top_logprobs=1)
        upstream.kill(A)
        logged = [c["logprobs"]["content"][0] for chunk in chunks(whole) for c in chunk["choices"] if "logprobs" in c]
        joined = await ids(upstream, B) + [token["id"] for token in logged[:cut]]
        rest = await listen(upstream, NATIVE, B, prompt=joined, n_predict=-1)
        begun = "".join(token["token"] for token in logged[:cut])
        at_once = await ask(upstream, NATIVE, B, prompt=joined, n_predict=-1, return_tokens=True)
        assert [c["tokens"][0] for c in chunks(rest)[:-1]] == at_once["tokens"] == [t["id"] for t in logged[cut:]]
        return text(whole), begun + text(rest), chunks(rest)[-1]["stop_type"], begun + at_once["content"]

    whole, joined, stop_type, at_once = against(play, config=config)

    assert len(whole.split()) == 27
    assert whole == joined == at_once
    assert stop_type == "eos"


def test_embeddings_are_deterministic_unit_vectors() -> None:
    """For one text, several, one as ids, several as ids."""

    async def play(upstream: SimulatedUpstream) -> list[Any]:
        tokens = (await ask(upstream, "/tokenize", content="mast"))["tokens"]
        inputs: list[Any] = ["mast", ["mast", "link"], tokens, [tokens, [1]]]
        return [await ask(upstream, "/v1/embeddings", input=one) for one in inputs]

    one, two, three, four = [[entry["embedding"] for entry in answer["data"]] for answer in against(play)]

    assert one == three == [two[0]] == [four[0]]
    assert two[0] != two[1] != four[1]
    assert sum(number**2 for number in one[0]) == pytest.approx(1.0)
