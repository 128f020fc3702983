"""The HTTP application: headers of responses, metrics, views, draining and the access log."""

import asyncio
import logging
import re
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from promptai.fleet.replica import State
from promptai.gateway.admission import Admission, AdmissionRules
from promptai.gateway.auth import Guard
from promptai.gateway.keys import KeyStore
from promptai.router.failover.request import RoutedRequest
from promptai.router.selection import Alias, ModelNames
from support_cold import Cold
from support_fleet import model
from support_serve import World
from support_site import CHAT, EMBED, FAST, SLOW, TALK, TEXT, Door, one, visit

LONG = [{"role": "user", "content": "cell " * 600}]
ROUTED = {
    f"x-promptai-{name}" for name in ("request-id", "model", "replica", "route-reason", "cached-tokens", "queue-ms")
}


def gateway_headers(headers: dict[str, str]) -> set[str]:
    """Return the names of the gateway's own headers."""
    return {name for name in headers if name.startswith("x-promptai-")}


def counters(text: str) -> dict[str, float]:
    """Parse every series of a metrics page."""
    return {name: float(value) for name, value in re.findall(r"^([^#\s]\S*(?: \S+=\S+)*?) (\S+)$", text, re.MULTILINE)}


async def metrics(at: Door) -> dict[str, float]:
    answer = await at.ask("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    return counters(answer.body.decode())


async def gather(*work: Awaitable[Any]) -> list[Any]:
    return list(await asyncio.gather(*work))


@pytest.mark.parametrize("path", [CHAT, TEXT, EMBED])
def test_response_headers_name_model_replica_and_reason(path: str) -> None:
    answer = visit(one(), lambda at: at.chat(path))

    assert (answer.status, gateway_headers(answer.headers)) == (200, ROUTED)
    assert answer.headers["x-promptai-model"] == "yi"
    assert answer.headers["x-promptai-replica"] == "a"
    assert "first token in" in answer.headers["x-promptai-route-reason"]


def test_response_headers_report_cached_tokens_and_queue_time() -> None:
    async def use(at: Door) -> list[Any]:
        await at.chat(messages=LONG)
        return await gather(at.chat(messages=LONG, max_tokens=50), at.chat(messages=LONG))

    first, second = visit(one(), use)

    cached = msgspec.json.decode(first.body)["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert int(first.headers["x-promptai-cached-tokens"]) == cached > 600
    assert first.headers["x-promptai-queue-ms"] == "0"
    assert 4900 <= int(second.headers["x-promptai-queue-ms"]) <= 5500


def test_a_stream_has_the_same_headers() -> None:
    answer = visit(one(FAST), lambda at: at.stream())

    assert (answer.status, gateway_headers(answer.headers), answer.whole) == (200, ROUTED, True)
    assert answer.headers["x-accel-buffering"] == "no"


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        ("/healthz", "GET", 200),
        ("/readyz", "GET", 200),
        ("/metrics", "GET", 200),
        ("/openapi.json", "GET", 200),
        ("/docs", "GET", 200),
        ("/v1/models", "GET", 200),
        ("/v1/models/yi", "GET", 200),
        ("/api/fleet", "GET", 200),
        ("/api/queue", "GET", 200),
        ("/nowhere", "GET", 404),
        ("/v1/models/none", "GET", 404),
        (CHAT, "GET", 405),
        (CHAT, "POST", 400),
    ],
)
def test_every_response_has_the_request_id(path: str, method: str, status: int) -> None:
    answer = visit(one(), lambda at: at.ask(path, method, headers={"X-Request-Id": "abc-1"}))

    assert (answer.status, answer.headers["x-promptai-request-id"]) == (status, "abc-1")


def test_an_engine_refusal_names_its_source() -> None:
    answer = visit(one(msgspec.structs.replace(SLOW, context=580)), lambda at: at.chat(messages=LONG))

    assert (answer.status, answer.error["src"], answer.error["n_ctx"]) == (400, "engine", 580)
    assert gateway_headers(answer.headers) == ROUTED


def test_metrics_count_events_and_show_current_state() -> None:
    async def use(at: Door) -> tuple[dict[str, float], dict[str, float]]:
        await at.chat(messages=LONG)
        await at.chat(messages=LONG)
        await at.chat(model="unknown")
        busy = asyncio.gather(at.chat(max_tokens=100), at.chat(max_tokens=10), at.chat(max_tokens=10))
        await asyncio.sleep(1)
        return await metrics(at), (await busy, await metrics(at))[1]

    during, after = visit(one(), use)

    both = 'model="yi",replica="a"'
    assert during[f'promptai_requests_total{{{both},status="200"}}'] == 2
    assert after[f'promptai_requests_total{{{both},status="200"}}'] == 5
    assert after[f"promptai_ttft_seconds_count{{{both}}}"] == 5
    assert during[f"promptai_ttft_seconds_sum{{{both}}}"] == pytest.approx(6.03 + 0.01, rel=0.01)
    assert during['promptai_requests_total{model="unknown",replica="unknown",status="404"}'] == 1
    assert during[f"promptai_queue_seconds_sum{{{both}}}"] == 0
    assert after[f"promptai_queue_seconds_sum{{{both}}}"] == pytest.approx(10 + 11, rel=0.05)
    assert during[f"promptai_decode_seconds_per_token_sum{{{both}}}"] == pytest.approx(0.2)
    assert during['promptai_tokens_total{kind="generated",model="yi"}'] == 8
    assert during['promptai_tokens_total{kind="cached",model="yi"}'] > 600
    assert during[f"promptai_prefill_seconds_saved_total{{{both}}}"] > 5
    gauges = ("promptai_queue_depth", "promptai_slots", "promptai_slots_busy", "promptai_replica_up")
    labels = ('model="yi"', *['model="yi",replica="a"'] * 3)
    assert [during[f"{name}{{{label}}}"] for name, label in zip(gauges, labels, strict=True)] == [2, 1, 1, 1]
    assert [after[f"{name}{{{label}}}"] for name, label in zip(gauges, labels, strict=True)] == [0, 1, 0, 1]
    assert during['promptai_breaker_state{replica="a"}'] == 0


def test_reading_state_never_loads_a_model_or_keeps_it_loaded() -> None:
    """Polling every read-only endpoint neither loads a model nor keeps it from being unloaded."""
    world: list[Cold] = []

    def cold() -> Cold:
        world.append(Cold(model("yi", ttl_s=60.0), config=SLOW))
        return world[-1]

    async def use(at: Door) -> list[str]:
        async def look(seconds: int) -> None:
            for _ in range(seconds):
                await metrics(at)
                for path in ("/readyz", "/healthz", "/api/fleet", "/api/queue", "/v1/models"):
                    await at.get(path)
                assert (await at.ask("/api/decide", "POST", json={"messages": TALK})).status == 200
                await asyncio.sleep(10.0)

        await look(2)
        started = list(world[0].launcher.starts)
        assert (await at.chat()).status == 200
        await look(8)
        return [*started, *[what for _, what, _ in world[0].launcher.log]]

    assert visit(cold, use) == ["start", "stop"]


def test_the_fleet_view_contains_learned_rates() -> None:
    async def use(at: Door) -> Any:
        await at.chat(messages=LONG)
        return await at.get("/api/fleet")

    names = ModelNames(aliases={"gpt-4o": Alias("yi")})
    found = visit(one(), use, rules=AdmissionRules(names=names))

    assert (found["gateway"], found["aliases"]) == ("promptai", {"gpt-4o": "yi"})
    assert [found["models"][0][name] for name in ("id", "slots", "context")] == ["yi", 1, 8192]
    replica = found["replicas"][0]
    assert [replica[name] for name in ("id", "state", "busy", "slots", "breaker")] == ["a", "ready", 0, 1, "closed"]
    assert replica["rates"]["prefill_tps"] == pytest.approx(100, rel=0.05)
    assert replica["cached_chars"] > 3000


def test_the_queue_view_contains_key_ids_but_no_text(tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "keys.json")
    key, secret = store.add("radio team", scopes=("admin",))
    headers = {"Authorization": f"Bearer {secret}"}

    async def use(at: Door) -> Any:
        busy = asyncio.gather(*[at.chat(headers=headers, messages=LONG, max_tokens=50) for _ in range(3)])
        await asyncio.sleep(7)
        answer = await at.ask("/api/queue", headers=headers)
        await busy
        return answer

    answer = visit(one(), use, guard=Guard(store, open=False))

    found = msgspec.json.decode(answer.body)
    assert [entry["key"] for entry in found["waiting"]] == [key.id, key.id]
    assert [entry["place"] for entry in found["waiting"]] == [0, 1]
    assert [entry["for"] for entry in found["waiting"]] == ["a", "a"]
    assert found["waiting"][0]["left_s"] < found["waiting"][1]["left_s"]
    assert [[run[name] for name in ("key", "replica", "stage")] for run in found["running"]] == [
        [key.id, "a", "decode"]
    ]
    for word in (secret, secret[:7], "radio team", "cell"):
        assert word not in answer.body.decode()


@pytest.mark.parametrize("body", [{"messages": TALK}, {"prompt": "a"}, {"input": "a"}], ids=str)
def test_decide_shows_the_route_without_sending_the_request(body: dict[str, Any]) -> None:
    worlds: list[World] = []

    def world() -> World:
        worlds.append(one()())
        return worlds[-1]

    answer = visit(world, lambda at: at.ask("/api/decide", "POST", json=body))

    found = msgspec.json.decode(answer.body)
    assert (answer.status, found["model"], found["replica"], found["now"]) == (200, "yi", "a", True)
    assert worlds[0].engines["sim://a"].sent == []


def test_draining_refuses_new_requests_and_finishes_running_ones() -> None:
    async def use(at: Door) -> Any:
        running = asyncio.create_task(at.stream(max_tokens=50))
        await asyncio.sleep(1)
        drain = asyncio.create_task(at.gateway.drain(100))
        await asyncio.sleep(0)
        refused, ready, alive = await at.chat(), await at.ask("/readyz"), await at.ask("/healthz")
        under_way = at.gateway.open_requests
        answer = await running
        await asyncio.wait_for(drain, 0.1)
        return refused, ready, alive, under_way, answer

    refused, ready, alive, under_way, answer = visit(one(), use)

    assert (refused.status, refused.error["code"], refused.headers["retry-after"]) == (503, "draining", "10")
    assert (ready.status, alive.status, under_way) == (503, 200, 1)
    assert (answer.whole, len(answer.text.split())) == (True, 50)


def test_draining_refuses_a_request_whose_body_is_incomplete() -> None:
    async def use(at: Door) -> tuple[bytes, float]:
        body = b'{"messages": [{"role": "user", "content": "a"}]}'
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        coming = asyncio.create_task(at.raw(head, body[:5], body[5:], pause_s=1.0))
        await asyncio.sleep(1.5)
        await at.gateway.drain(100)
        return await coming, asyncio.get_running_loop().time()

    answer, _ = visit(one(), use)

    assert answer.startswith(b"HTTP/1.1 503")
    assert b'"code":"draining"' in answer


def test_draining_stops_at_its_limit(caplog: pytest.LogCaptureFixture) -> None:
    async def use(at: Door) -> float:
        running = asyncio.create_task(at.stream(max_tokens=500))
        await asyncio.sleep(1)
        await at.gateway.drain(5)
        end = asyncio.get_running_loop().time()
        running.cancel()
        await asyncio.wait([running])
        await asyncio.sleep(1)
        assert at.gateway.open_requests == 0
        return end

    assert visit(one(), use) == pytest.approx(6, abs=0.1)
    assert "1 requests were still running after 5 s" in caplog.text


def test_the_docs_page_has_examples_with_this_gateways_url() -> None:
    async def use(at: Door) -> tuple[str, bytes]:
        return at.url, (await at.ask("/docs")).body

    url, page = visit(one(), use)

    assert f"curl {url}/v1/chat/completions".encode() in page


def test_is_ready_while_a_replica_is_usable() -> None:
    worlds: list[World] = []

    def world() -> World:
        worlds.append(one()())
        return worlds[-1]

    async def use(at: Door) -> list[int]:
        found = [(await at.ask("/readyz")).status]
        worlds[0].source.fail("a")
        found.append((await at.ask("/readyz")).status)
        assert worlds[0].registry.snapshot.replicas[0].state is State.DOWN
        worlds[0].source.recover("a")
        return [*found, (await at.ask("/readyz")).status]

    assert visit(world, use) == [200, 503, 200]


def test_a_disconnected_client_frees_its_slot_and_is_counted() -> None:
    async def use(at: Door) -> tuple[dict[str, float], Any]:
        leaving = [asyncio.create_task(at.stream(messages=LONG * 5)) for _ in range(2)]
        await asyncio.sleep(3)
        for task in leaving:
            task.cancel()
        await asyncio.wait(leaving)
        await asyncio.sleep(1)
        return await metrics(at), await at.get("/api/queue")

    found, queue = visit(one(), use)

    assert (queue["waiting"], queue["running"]) == ([], [])
    assert found['promptai_requests_total{model="yi",replica="a",status="499"}'] == 1
    assert found['promptai_requests_total{model="yi",replica="unknown",status="499"}'] == 1


def test_the_access_log_has_one_line_per_request_and_no_text(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="promptai")

    visit(one(), lambda at: at.chat(headers={"X-Request-Id": "abc-1"}))

    visit(one(), lambda at: at.chat(model="none", headers={"X-Request-Id": "abc-2"}))

    lines = [record.getMessage() for record in caplog.records if record.name == "promptai.access"]
    assert len(lines) == 2
    assert lines[1].startswith(f"abc-2 local {CHAT} model=- replica=- status=404 queue=- ttft=- total=0.0")
    assert lines[0].startswith(f"abc-1 local {CHAT} model=yi replica=a status=200 queue=0.000s ttft=0.0")
    assert "cell" not in caplog.text


@pytest.mark.parametrize(
    ("owner", "name", "fields"),
    [
        (Admission, "admit", {}),
        (RoutedRequest, "response", {}),
        (RoutedRequest, "events", {"stream": True}),
    ],
    ids=["admission", "response", "stream"],
)
def test_an_internal_error_is_recorded_once_as_500(
    owner: type,
    name: str,
    fields: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(*_args: object) -> None:
        raise RuntimeError("a bug")

    async def use(at: Door) -> int:
        monkeypatch.setattr(owner, name, fail)
        return (await at.chat(**fields)).status

    with caplog.at_level(logging.INFO, "promptai.access"):
        status = visit(one(), use)

    lines = [record.getMessage() for record in caplog.records if record.name == "promptai.access"]
    assert status == 500
    assert ["status=500" in line for line in lines] == [True]
