"""Keep-alives of a waiting stream: comments, or status events if the client requests them."""

import asyncio
import itertools
from typing import Any

import pytest
from aiohttp import web

from promptai.engine.simulator import Fault
from promptai.gateway.streaming import Heartbeat
from support_cold import Cold
from support_fleet import model
from support_serve import World
from support_site import SLOW, Door, Streamed, one, visit

LONG = [{"role": "user", "content": "cell " * 600}]
WITH_STATUS = {"x-promptai-status": "1"}


def stages(answer: Streamed) -> list[str]:
    """Return each stage once, in order."""
    found: list[str] = []
    for line in answer.of("promptai.status"):
        if found[-1:] != [line.value["stage"]]:
            found.append(line.value["stage"])
    return found


def test_status_events_report_every_stage() -> None:
    """The model loads for ten seconds, another request is ahead, and prefill takes six seconds."""

    async def use(at: Door) -> Any:
        before = asyncio.create_task(at.chat(max_tokens=40))
        await asyncio.sleep(0.5)
        answer = await at.stream(messages=LONG, headers=WITH_STATUS)
        await before
        return answer

    answer = visit(lambda: Cold(model("yi", load_s=10.0), config=SLOW), use)

    assert answer.whole
    assert stages(answer) == ["loading", "queued", "prefill", "decode"]
    found = [line.value for line in answer.of("promptai.status")]
    assert answer.lines[0].kind == "promptai.status"
    loading = [one["percent"] for one in found if one["stage"] == "loading" and "percent" in one]
    assert loading == sorted(loading) != []
    assert {one["place"] for one in found if one["stage"] in {"loading", "queued"}} <= {0, 1}
    assert all(one["replica"] == "local/yi" for one in found if one["stage"] in {"prefill", "decode"})
    assert all(one["choices"] == [] and one["object"] == "promptai.status" for one in found)
    assert answer.of("comment") == []


def test_the_estimated_time_left_is_accurate_and_decreases() -> None:
    async def use(at: Door) -> Any:
        before = [asyncio.create_task(at.chat(max_tokens=100)) for _ in range(3)]
        await asyncio.sleep(0.5)
        answer = await at.stream(messages=LONG, headers=WITH_STATUS)
        await asyncio.wait(before)
        return answer

    answer = visit(one(), use)

    first = answer.of("")[0].t
    estimates = [(line.t, line.value["left_s"]) for line in answer.of("promptai.status") if "left_s" in line.value]
    assert len(estimates) > 30
    assert all(later <= earlier + 1.5 for (_, earlier), (_, later) in itertools.pairwise(estimates))
    assert all(left == pytest.approx(first - t, rel=0.25, abs=3.0) for t, left in estimates)
    places = [line.value["place"] for line in answer.of("promptai.status") if "place" in line.value]
    assert places == sorted(places, reverse=True)
    assert {2, 1, 0} == set(places)


def test_sends_comments_from_the_first_second_on() -> None:
    answer = visit(one(), lambda at: at.stream(messages=LONG * 3), heartbeat=Heartbeat(ping_s=2.0))

    times = [line.t for line in answer.of("comment")]
    assert times[0] == pytest.approx(1.0, abs=0.05)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert gaps == [pytest.approx(2.0, abs=0.05)] * len(gaps) != []
    assert (answer.whole, answer.status) == (True, 200)


def test_sends_comments_during_a_silence_within_the_answer() -> None:
    def world() -> World:
        made = one()()
        made.engines["sim://a"].fault = Fault(kind="stall", after_tokens=2, stall_s=11.0)
        return made

    answer = visit(world, lambda at: at.stream(max_tokens=6), heartbeat=Heartbeat(ping_s=3.0))

    kinds = ["comment" if line.kind else "chunk" for line in answer.lines]
    assert kinds.count("comment") == 3
    assert "chunk" in kinds[: kinds.index("comment")]
    assert answer.whole


def test_sends_no_comment_after_the_end_of_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slow client would read it as the beginning of the next response on its connection."""
    end = web.StreamResponse.write_eof

    async def late(self: web.StreamResponse, data: bytes = b"") -> None:
        await asyncio.sleep(10.0)
        await end(self, data)

    monkeypatch.setattr(web.StreamResponse, "write_eof", late)

    answer = visit(one(), lambda at: at.stream(max_tokens=6), heartbeat=Heartbeat(ping_s=3.0))

    assert (answer.of("comment"), answer.whole) == ([], True)


def test_sends_no_comments_if_they_are_disabled() -> None:
    answer = visit(one(), lambda at: at.stream(messages=LONG * 3), heartbeat=Heartbeat(ping_s=0.0))

    assert (answer.of("comment"), answer.of("promptai.status"), answer.whole) == ([], [], True)


@pytest.mark.parametrize("headers", [{}, WITH_STATUS], ids=["comments", "status"])
def test_a_failure_after_a_comment_is_an_error_event(headers: dict[str, str]) -> None:
    """The HTTP status has been sent; the client reads an error instead of a chunk, and the end."""

    async def use(at: Door) -> tuple[Streamed, str]:
        before = asyncio.create_task(at.chat(max_tokens=100))
        await asyncio.sleep(0.5)
        found = await at.stream(headers={"x-promptai-deadline": "3s", **headers})
        await before
        return found, (await at.ask("/metrics")).body.decode()

    answer, metrics = visit(one(), use)

    assert 'promptai_requests_total{model="yi",replica="unknown",status="429"} 1.0' in metrics

    assert (answer.status, answer.whole, len(answer.chunks)) == (200, True, 1)
    error = answer.chunks[0]["error"]
    assert (error["code"], error["type"], error["src"]) == ("saturated", "rate_limit_error", "gateway")


@pytest.mark.parametrize("deadline", ["300ms", "3s"])
def test_sends_no_status_after_an_error(deadline: str) -> None:
    """Decoding never began, and the stream ends right after the error."""

    async def use(at: Door) -> Streamed:
        before = asyncio.create_task(at.chat(max_tokens=100))
        await asyncio.sleep(0.5)
        found = await at.stream(headers={"x-promptai-deadline": deadline, **WITH_STATUS})
        await before
        return found

    answer = visit(one(), use)

    *waited, failed, end = answer.lines
    assert {line.kind for line in waited} == {"promptai.status"}
    assert (stages(answer), failed.value["error"]["code"], end.data) == (["queued"], "saturated", "[DONE]")


def test_sends_no_status_while_a_slow_client_reads_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    write = web.StreamResponse.write

    async def slow(self: web.StreamResponse, data: bytes) -> None:
        await write(self, data)
        await asyncio.sleep(5.0 if b'"error"' in data else 0.0)

    monkeypatch.setattr(web.StreamResponse, "write", slow)

    async def use(at: Door) -> Streamed:
        before = asyncio.create_task(at.chat(max_tokens=100))
        await asyncio.sleep(0.5)
        found = await at.stream(headers={"x-promptai-deadline": "300ms", **WITH_STATUS})
        await before
        return found

    answer = visit(one(), use)

    assert (len(answer.of("promptai.status")), len(answer.chunks), answer.whole) == (1, 1, True)


def test_a_failure_before_the_first_byte_is_an_http_status() -> None:
    async def use(at: Door) -> Streamed:
        before = asyncio.create_task(at.chat(max_tokens=100))
        await asyncio.sleep(0.5)
        found = await at.stream(headers={"x-promptai-deadline": "500ms"})
        await before
        return found

    answer = visit(one(), use)

    assert (answer.status, answer.headers["content-type"]) == (429, "application/json")
    assert int(answer.headers["retry-after"]) in range(5, 20)
