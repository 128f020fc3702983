import asyncio
import itertools
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from promptai.errors import SettingsError
from promptai.fleet.registry import Registry
from promptai.fleet.replica import Rates, Replica, State
from promptai.fleet.static import StaticServer, StaticSource
from support_clock import run_virtually
from support_fleet import FakeUpstream, Host, Watch, beside, llama_server

PI = "http://pi-1:8080"
PROMPTAI = {"/health": (200, {}), "/api/fleet": (200, {"gateway": "promptai", "models": []})}


def play(
    targets: list[StaticServer],
    hosts: dict[str, Host],
    test: Callable[[Watch, FakeUpstream], Coroutine[Any, Any, None]],
) -> None:
    """Run a source during a test."""
    watch, upstream = Watch(), FakeUpstream(hosts)

    async def main() -> None:
        await beside(StaticSource(targets, upstream).run(watch), lambda: test(watch, upstream))

    run_virtually(main())


def found(hosts: dict[str, Host], *targets: StaticServer) -> list[Replica]:
    """Return what a source publishes after five seconds."""
    published: list[Replica] = []

    async def test(watch: Watch, _upstream: FakeUpstream) -> None:
        await asyncio.sleep(5)
        published.extend(watch.seen[-1][1])

    play(list(targets) or [StaticServer(url) for url in hosts], hosts, test)
    return published


def test_a_dead_server_is_down_and_probed_less_and_less_often() -> None:
    """Up to every 15 seconds."""
    hosts = {PI: Host(dead=True)}

    async def test(watch: Watch, upstream: FakeUpstream) -> None:
        await asyncio.sleep(100)
        assert (watch.now("pi-1:8080").state, watch.now("pi-1:8080").reason) == (State.DOWN, "does not answer")
        times = [at for at, _, _ in upstream.asked]
        pauses = [after - before for before, after in itertools.pairwise(times)]
        assert pauses[:6] == [2.0, 4.0, 8.0, 15.0, 15.0, 15.0]

    play([StaticServer(PI)], hosts, test)


def test_a_dead_or_slow_server_delays_no_other() -> None:
    """Neither the first publication nor later ones."""
    hosts = {"http://slow:1": Host(slow_s=60), "http://dead:2": Host(dead=True), "http://well:3": llama_server()}

    async def test(watch: Watch, upstream: FakeUpstream) -> None:
        await asyncio.sleep(1.1)
        assert watch.now("well:3").state is State.READY
        assert watch.now("slow:1").reason == "not probed yet"
        await asyncio.sleep(20)
        assert watch.now("slow:1").reason == "does not answer"
        health = [at for at, url, path in upstream.asked if (url, path) == ("http://well:3", "/health")]
        assert health == [2.0 * n for n in range(11)]

    play([StaticServer(url) for url in hosts], hosts, test)


@pytest.mark.parametrize("status", [500, 401, 302])
def test_an_unexpected_health_status_is_down_and_reported(status: int) -> None:
    [replica] = found({PI: Host({"/health": (status, {})})})

    assert (replica.state, replica.model) == (State.DOWN, "")
    assert replica.reason.startswith(f"HTTP {status} from /health")


def test_reads_slots_context_and_model_of_a_llama_server() -> None:
    """And sends no request that could wake or load a model."""
    hosts = {PI: llama_server("yi", slots=4, context=2048)}

    async def test(watch: Watch, upstream: FakeUpstream) -> None:
        await asyncio.sleep(9)
        expected = Replica(id="pi-1:8080", url=PI, model="yi", slots=4, context=2048)
        assert watch.now("pi-1:8080") == expected
        assert upstream.paths(PI) == ["/health", "/props", *["/health"] * 4]
        assert len(watch.seen) >= 1

    play([StaticServer(f"{PI}/v1/")], hosts, test)


def test_a_server_that_loads_is_loading_until_it_is_ready() -> None:
    hosts = {PI: Host({"/health": (503, {"error": {"message": "Loading model"}})})}

    async def test(watch: Watch, upstream: FakeUpstream) -> None:
        await asyncio.sleep(11)
        assert (watch.now("pi-1:8080").state, watch.now("pi-1:8080").reason) == (State.LOADING, "loading its model")
        assert set(upstream.paths(PI)) == {"/health"}
        hosts[PI] = llama_server()
        await asyncio.sleep(2)
        assert watch.states("pi-1:8080") == [State.LOADING, State.READY]

    play([StaticServer(PI)], hosts, test)


def test_reads_the_model_again_after_an_outage() -> None:
    """The server may have come back with another model."""
    hosts = {PI: llama_server("yi")}

    async def test(watch: Watch, upstream: FakeUpstream) -> None:
        await asyncio.sleep(1)
        hosts[PI].dead = True
        await asyncio.sleep(2)
        assert (watch.now("pi-1:8080").state, watch.now("pi-1:8080").model) == (State.DOWN, "yi")
        hosts[PI] = llama_server("qwen", slots=1)
        await asyncio.sleep(5)
        assert (watch.now("pi-1:8080").model, watch.now("pi-1:8080").slots) == ("qwen", 1)
        assert upstream.paths(PI).count("/props") == 2

    play([StaticServer(PI)], hosts, test)


def test_a_busy_board_may_miss_one_time_limit() -> None:
    hosts = {PI: llama_server()}

    async def test(watch: Watch, _upstream: FakeUpstream) -> None:
        await asyncio.sleep(1)
        hosts[PI].slow_s = 60
        await asyncio.sleep(4.5)
        hosts[PI].slow_s = 0
        await asyncio.sleep(4.5)
        assert watch.states("pi-1:8080") == [State.READY]
        hosts[PI].slow_s = 60
        await asyncio.sleep(12)
        assert watch.states("pi-1:8080") == [State.READY, State.DOWN]

    play([StaticServer(PI)], hosts, test)


def test_a_recovered_server_is_probed_at_the_usual_period() -> None:
    """The long pause of the outage is not repeated."""
    hosts = {PI: Host(dead=True)}

    async def test(watch: Watch, upstream: FakeUpstream) -> None:
        await asyncio.sleep(30)
        hosts[PI] = llama_server()
        await asyncio.sleep(30)
        health = [at for at, _, path in upstream.asked if path == "/health"]
        answered = next(at for at, seen in watch.seen if seen[0].state is State.READY)
        later = [at for at in health if at >= answered]
        assert [after - before for before, after in itertools.pairwise(later)][:3] == [2.0, 2.0, 2.0]

    play([StaticServer(PI)], hosts, test)


def test_a_server_that_was_not_probed_yet_is_not_down() -> None:
    """Nor when its first response is late: a source that takes over would drop it."""
    hosts = {"http://slow:1": Host(slow_s=60), "http://well:3": llama_server()}

    async def test(watch: Watch, _upstream: FakeUpstream) -> None:
        await asyncio.sleep(1.1)
        assert watch.now("slow:1").state is State.LOADING
        await asyncio.sleep(3.4)
        hosts["http://slow:1"] = llama_server("qwen")
        await asyncio.sleep(6)
        assert watch.states("slow:1") == [State.LOADING, State.READY]

    play([StaticServer(url) for url in hosts], hosts, test)


def test_changing_a_slow_board_keeps_its_model_in_the_fleet() -> None:
    hosts = {PI: llama_server("yi"), "http://well:3": llama_server("qwen")}
    upstream = FakeUpstream(hosts)
    registry = Registry([StaticSource([StaticServer(url) for url in hosts], upstream)])
    seen: list[dict[str, State]] = []

    async def test() -> None:
        await asyncio.sleep(3)
        registry.subscribe(lambda snapshot: seen.append({one.model: one.state for one in snapshot.replicas}))
        hosts[PI].slow_s = 2.5
        registry.replace([StaticSource([StaticServer(url, slots=3) for url in hosts], upstream)])
        await asyncio.sleep(20)
        assert [(one.model, one.slots) for one in registry.snapshot.replicas] == [("yi", 3), ("qwen", 3)]
        assert {tuple(models.items()) for models in seen} == {(("yi", State.READY), ("qwen", State.READY))}

    run_virtually(beside(registry.run(), test))


@pytest.mark.parametrize(
    ("before", "after", "asked"),
    [
        (llama_server("yi"), llama_server("qwen"), "/props"),
        (
            Host({"/health": (200, {}), "/v1/models": (200, {"data": [{"id": "yi"}]})}),
            Host({"/health": (200, {}), "/v1/models": (200, {"data": [{"id": "qwen"}]})}),
            "/v1/models",
        ),
    ],
)
def test_notices_a_server_restarted_with_another_model_between_two_checks(
    before: Host, after: Host, asked: str
) -> None:
    """With one extra request in ten seconds."""
    hosts = {PI: before}

    async def test(watch: Watch, upstream: FakeUpstream) -> None:
        await asyncio.sleep(41)
        assert upstream.paths(PI).count(asked) == 5
        assert len(upstream.paths(PI)) <= 21 + 4 + 3
        hosts[PI] = after
        await asyncio.sleep(10)
        assert watch.now("pi-1:8080").model == "qwen"
        assert watch.states("pi-1:8080") == [State.READY]

    play([StaticServer(PI)], hosts, test)


def test_settings_override_what_a_server_reports() -> None:
    rates = Rates(prefill_tps=30.0, source="settings")
    target = StaticServer(PI, name="kitchen", model="coder", slots=1, rates=rates, capability=1.5)

    [replica] = found({PI: llama_server()}, target)

    assert (replica.id, replica.model, replica.slots, replica.rates) == ("kitchen", "coder", 1, rates)
    assert (replica.capability, replica.context) == (1.5, 4096)


def test_a_model_without_an_alias_is_named_as_listed_or_after_its_file() -> None:
    named = llama_server()
    named.answers["/props"] = (200, {"total_slots": 1, "model_path": "/models/yi-1.5b.Q4_0.gguf"})
    named.answers["/v1/models"] = (200, {"data": [{"id": "/models/listed-0.5.gguf"}]})
    unlisted = Host({**named.answers, "/v1/models": (200, {"data": []})})

    replicas = found({"http://a:1": named, "http://b:1": unlisted})

    assert [replica.model for replica in replicas] == ["listed-0.5", "yi-1.5b.Q4_0"]
    assert [replica.context for replica in replicas] == [None, None]


def test_any_other_server_has_one_slot_unless_settings_give_more() -> None:
    """Also if it has no health check, or answers 200 to unknown paths."""
    models = (200, {"data": [{"id": "phi"}]})
    bare = Host({"/v1/models": models})
    chatty = Host({path: (200, {"error": "unexpected endpoint"}) for path in ("/health", "/props", "/api/fleet")})
    chatty.answers["/v1/models"] = models

    replicas = found(
        {"http://bare:1": bare, "http://chatty:1": chatty},
        StaticServer("http://bare:1", slots=3),
        StaticServer("http://chatty:1"),
    )

    assert [(r.dialect, r.model, r.slots, r.state) for r in replicas] == [
        ("openai", "phi", 3, State.READY),
        ("openai", "phi", 1, State.READY),
    ]


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ({"/v1/models": (200, {"data": [{"id": "a"}, {"id": "b"}]})}, "serves 2 models; set model in [[fleet]]"),
        ({"/v1/models": (200, {"data": None})}, "serves no model"),
        ({"/v1/models": (401, {})}, "HTTP 401 from /v1/models; check its API key"),
        ({"/props": (401, {})}, "HTTP 401 from /props; check its API key"),
        ({"/v1/models": (200, b"<html>\xff")}, "/v1/models returns no list of models"),
        (
            {
                "/props": (200, {"role": "router", "model_alias": "llama-server", "model_path": "none"}),
                "/v1/models": (200, {"data": [{"id": "a"}, {"id": "b"}, {"id": "c"}]}),
            },
            "serves 3 models; set model in [[fleet]]",
        ),
        ({"/props": (200, {"total_slots": "many"})}, "HTTP 404 from /v1/models"),
        (PROMPTAI, "serves no model"),
    ],
)
def test_reports_why_a_server_cannot_be_used(answers: dict[str, tuple[int, object]], reason: str) -> None:
    [replica] = found({PI: Host({"/health": (200, {}), **answers})})

    assert (replica.state, replica.reason) == (State.DOWN, reason)


def test_a_server_without_health_check_that_stops_listing_its_models_is_down() -> None:
    hosts = {PI: Host({"/v1/models": (200, {"data": [{"id": "phi"}]})})}

    async def test(watch: Watch, _upstream: FakeUpstream) -> None:
        await asyncio.sleep(1)
        hosts[PI].answers = {"/v1/models": (500, {})}
        await asyncio.sleep(2)
        assert watch.now("pi-1:8080").reason == "HTTP 500 from /v1/models"

    play([StaticServer(PI)], hosts, test)


def test_another_gateway_is_one_replica_per_model_and_follows_its_reports() -> None:
    """Its slots change with its boards; a model whose engines are all down is down."""
    served = [{"id": "yi", "slots": 6, "context": 2048, "capability": 1.5, "more": 1}, {"id": "qwen", "slots": 0}]
    inside = [{"model": "yi", "state": "ready", "slots": 6}, {"model": "qwen", "state": "down", "slots": 2}]
    answer = {"gateway": "promptai", "models": served, "replicas": inside}
    hosts = {PI: Host({**PROMPTAI, "/api/fleet": (200, answer)})}

    async def test(watch: Watch, _upstream: FakeUpstream) -> None:
        await asyncio.sleep(1)
        yi, qwen = watch.now("pi-1:8080/yi"), watch.now("pi-1:8080/qwen")
        assert (yi.dialect, yi.url, yi.slots, yi.context, yi.capability) == ("promptai", PI, 6, 2048, 1.5)
        assert (yi.state, qwen.state, qwen.reason) == (State.READY, State.DOWN, "no engine is ready")
        inside[1]["state"] = "cold"
        await asyncio.sleep(2)
        assert (watch.now("pi-1:8080/qwen").state, watch.now("pi-1:8080/qwen").slots) == (State.READY, 2)
        hosts[PI].dead = True
        await asyncio.sleep(2)
        assert {replica.state for replica in watch.seen[-1][1]} == {State.DOWN}
        assert len(watch.seen[-1][1]) == 2

    play([StaticServer(PI)], hosts, test)


def test_counts_every_replica_of_another_gateway_that_may_answer() -> None:
    """Including those loaded on demand; excluding those of a third gateway and those that end."""
    states = ["ready", "loading", "cold", "draining", "down"]
    inside = [{"model": "yi", "state": state, "slots": 1, "dialect": "llama-server"} for state in states]
    inside += [
        {"model": "yi", "state": "ready", "slots": 8, "dialect": "promptai"},
        {"model": "qwen", "state": "ready", "slots": 8, "dialect": "llama-server"},
    ]
    answer = {"gateway": "promptai", "models": [{"id": "yi", "slots": 1}], "replicas": inside}

    [replica] = found({PI: Host({**PROMPTAI, "/api/fleet": (200, answer)})})

    assert (replica.id, replica.state, replica.slots) == ("pi-1:8080/yi", State.READY, 3)


def test_uses_the_slots_of_a_gateway_that_lists_no_replicas() -> None:
    served = [{"id": "yi", "slots": 6}, {"id": "qwen", "slots": 0}]
    host = Host({**PROMPTAI, "/api/fleet": (200, {"gateway": "promptai", "models": served})})

    assert [(one.slots, one.state) for one in found({PI: host})] == [(6, State.READY), (1, State.DOWN)]


def test_uses_only_the_configured_model_of_another_gateway() -> None:
    served = [{"id": "yi", "slots": 6}, {"id": "qwen", "slots": 1}]
    host = Host({**PROMPTAI, "/api/fleet": (200, {"gateway": "promptai", "models": served})})

    assert [replica.id for replica in found({PI: host}, StaticServer(PI, model="qwen", name="far"))] == ["far"]
    assert found({PI: host}, StaticServer(PI, model="phi"))[0].reason == "does not serve phi"


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("http://pi-1", "pi-1:80"),
        ("https://pi-1/v1", "pi-1:443"),
        ("http://[::1]:8080", "[::1]:8080"),
    ],
)
def test_a_replica_is_named_by_host_and_port(url: str, name: str) -> None:
    assert StaticServer(url).replica_id == name


@pytest.mark.parametrize("url", ["pi-1:8080", "http://", "http://pi:port", "ftp://pi", ""])
def test_rejects_an_invalid_url_at_once(url: str) -> None:
    with pytest.raises(SettingsError, match="is not an engine URL"):
        StaticSource([StaticServer(url)], FakeUpstream({}))


def test_the_same_list_is_the_same_configuration() -> None:
    """So that a reload keeps the source running."""
    one, two = (StaticSource([StaticServer(PI)], FakeUpstream({})) for _ in range(2))

    assert one.configuration == two.configuration
    assert one.configuration != StaticSource([StaticServer(PI, slots=2)], FakeUpstream({})).configuration


def test_an_empty_list_publishes_nothing_and_keeps_running() -> None:
    async def test(watch: Watch, _upstream: FakeUpstream) -> None:
        await asyncio.sleep(5)
        assert watch.seen == [(1.0, ())]

    play([], {}, test)
