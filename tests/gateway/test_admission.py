"""The model of a request: by alias, by budget, by the length of the prompt."""

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from promptai.errors import NoCapacityError, RequestRefusedError
from promptai.gateway.admission import AdmissionRules, AdmittedRequest, path_for
from promptai.gateway.auth import Caller
from promptai.router.selection import Alias, ModelNames
from support_clients import ALONE, TALK, Clients, play
from support_gateway import Answer
from support_serve import World, listen
from support_site import CHAT, EMBED, TEXT, Door, asking, visit

SMALL = msgspec.structs.replace(ALONE, model="small", decode_tps=40.0)
LARGE = msgspec.structs.replace(ALONE, model="large", context=2048)


def small_and_large(**settings: Any) -> Callable[[], World]:
    """Return a factory of a small fast model and a large slow one."""

    def make() -> World:
        world = World({"s": SMALL, "l": LARGE}, **settings)
        for name, size in (("s", 0.5), ("l", 8.0)):
            known = world.source._replicas[name]
            world.source._replicas[name] = msgspec.structs.replace(known, capability=size)
        return world

    return make


def test_auto_chooses_the_larger_model_when_idle_and_the_smaller_when_busy() -> None:
    async def use(world: World) -> list[AdmittedRequest]:
        clients = Clients(world)
        budget = {"x-promptai-budget": "10s"}
        idle = world.admitted(TALK, model="auto", headers=budget, max_tokens=50)
        clients.ask("before", model="large", tokens=200)
        await asyncio.sleep(1)
        busy = world.admitted(TALK, model="auto", headers=budget, max_tokens=50)
        patient = world.admitted(TALK, model="auto", headers={"x-promptai-budget": "2m"}, max_tokens=50)
        hasty = world.admitted(TALK, model="auto", headers={"x-promptai-budget": "100ms"}, max_tokens=50)
        await clients.all()
        return [idle, busy, patient, hasty]

    idle, busy, patient, hasty = play(small_and_large(), use)

    assert [admitted.model for admitted in (idle, busy, patient, hasty)] == ["large", "small", "large", "small"]
    assert idle.reason.startswith("auto: large, predicted 5.")
    assert "auto: small, predicted 1." in busy.reason
    assert "large would take 2" in busy.reason
    assert "over budget, but the fastest" in hasty.reason


def test_the_response_headers_contain_the_reason() -> None:
    async def use(at: Door) -> Answer:
        return await at.chat(model="auto", headers={"x-promptai-budget": "10s"}, max_tokens=50)

    answer = visit(small_and_large(), use)

    assert answer.headers["x-promptai-model"] == "large"
    assert answer.headers["x-promptai-route-reason"].startswith("auto: large, predicted 5.")
    assert "; lowest cost: first token in" in answer.headers["x-promptai-route-reason"]


def test_an_alias_sets_only_fields_that_the_request_leaves_open() -> None:
    names = ModelNames(aliases={"small:short": Alias("small", {"max_tokens": 3, "temperature": 0.2})})

    async def use(world: World) -> list[Any]:
        open_ = world.admitted(TALK, model="small:short")
        set_ = world.admitted(TALK, model="small:short", max_completion_tokens=7, temperature=0.9)
        answers = [await listen(open_), await listen(set_)]
        return [len(answer.text.split()) for answer in answers] + [
            admitted.routed.client_request.body["temperature"] for admitted in (open_, set_)
        ]

    assert play(small_and_large(rules=AdmissionRules(names=names)), use) == [3, 7, 0.2, 0.9]


def test_a_prompt_too_long_for_its_model_goes_to_the_fallback_or_is_refused() -> None:
    huge = [{"role": "user", "content": "cell " * 3000}]
    fallbacks = {"large": "small"}

    async def use(world: World) -> AdmittedRequest:
        return world.admitted(huge, model="large")

    moved = play(small_and_large(rules=AdmissionRules(fallbacks=fallbacks)), use)
    with pytest.raises(RequestRefusedError) as refused:
        play(small_and_large(), use)

    assert (moved.model, moved.routed.slot_request.model) == ("small", "small")
    assert moved.reason == "large holds 2048 tokens, the prompt has about 4173"
    assert (refused.value.status, refused.value.code) == (400, "context_length_exceeded")
    assert "the prompt has about 4173 tokens" in refused.value.message
    assert "large holds 2048" in refused.value.message


@pytest.mark.parametrize("name", ["auto", "small"])
def test_reports_no_capacity_when_all_replicas_are_down(name: str) -> None:
    async def use(world: World) -> NoCapacityError:
        world.source.fail("s", "is unplugged")
        world.source.fail("l", "is unplugged")
        with pytest.raises(NoCapacityError) as refused:
            await listen(world.admitted(TALK, model=name))
        return refused.value

    assert "can serve now" in play(small_and_large(), use).message


def test_auto_reports_no_capacity_for_an_empty_fleet() -> None:
    async def use(world: World) -> None:
        world.admitted(TALK, model="auto")

    with pytest.raises(NoCapacityError, match="no model is available for auto"):
        play(lambda: World({}), use)


def test_auto_ignores_models_that_are_down() -> None:
    async def use(world: World) -> AdmittedRequest:
        world.source.fail("l", "is unplugged")
        return world.admitted(TALK, model="auto", max_tokens=4)

    assert play(small_and_large(), use).model == "small"


@pytest.mark.parametrize("role", [None, 1, ["user"]])
def test_refuses_a_message_without_a_role(role: Any) -> None:
    async def use(world: World) -> None:
        world.admitted([*TALK, {"role": role, "content": "a"} if role else {"content": "a"}], model="small")

    with pytest.raises(RequestRefusedError, match="message 1 has no role"):
        play(small_and_large(), use)


def test_waits_for_the_replica_whose_context_holds_the_prompt() -> None:
    """The other replica would refuse the prompt."""
    boards = {"short": msgspec.structs.replace(ALONE, context=1024), "long": ALONE}
    prompt = [{"role": "user", "content": "cell " * 1500}]

    async def use(world: World) -> list[str]:
        clients = Clients(world)
        clients.ask("before", tokens=20, messages=[{"role": "user", "content": "cell " * 1400}])
        await asyncio.sleep(0)
        admitted = world.admitted(prompt, model="yi", max_tokens=2)
        await asyncio.gather(listen(admitted), clients.all())
        assert admitted.routed.lease is not None
        return [admitted.routed.lease.replica.id, *admitted.routed.retries]

    assert play(lambda: World(boards), use) == ["long"]


@pytest.mark.parametrize(
    ("path", "field", "value", "home"),
    [
        (CHAT, "prompt", "a", TEXT),
        (CHAT, "input", "", EMBED),
        (TEXT, "messages", TALK, CHAT),
        (TEXT, "messages", [], CHAT),
        (TEXT, "input", ["a"], EMBED),
        (EMBED, "messages", TALK, CHAT),
        (EMBED, "prompt", [1], TEXT),
    ],
)
def test_refuses_a_field_of_another_path_and_names_that_path(path: str, field: str, value: Any, home: str) -> None:
    """If the gateway accepted both fields, it would have to ignore one of them."""

    async def use(world: World) -> None:
        world.admission.admit(path, {**asking(path, {field: value}), "model": "small"}, {}, Caller(key_id="local"))

    with pytest.raises(RequestRefusedError, match=f"{path} does not take {field}") as refused:
        play(small_and_large(), use)

    assert (refused.value.status, refused.value.code, refused.value.param) == (400, "wrong_field", field)
    assert f"send {field} to {home}" in refused.value.hint


@pytest.mark.parametrize(("path", "field"), [(CHAT, "prompt"), (TEXT, "messages"), (EMBED, "messages")])
def test_accepts_a_null_field_of_another_path(path: str, field: str) -> None:
    async def use(world: World) -> AdmittedRequest:
        body = {**asking(path, {field: None}), "model": "small"}
        return world.admission.admit(path, body, {}, Caller(key_id="local"))

    assert play(small_and_large(), use).model == "small"


def test_path_for_follows_the_first_field_that_is_not_null() -> None:
    assert path_for({"messages": None, "prompt": "a"}) == TEXT
    assert path_for({"messages": None, "prompt": None, "input": "a"}) == EMBED
    assert path_for({"messages": None}) == CHAT


def two_contexts_per_model() -> World:
    """Two models, each on one replica with a small and one with a large context."""
    boards = {
        f"{model}-{context}": msgspec.structs.replace(ALONE, model=model, context=context)
        for model in ("small", "large")
        for context in (512, 4096)
    }
    return World(boards)


def test_auto_reports_no_capacity_if_only_unavailable_replicas_hold_the_prompt() -> None:
    long = [{"role": "user", "content": "cell " * 2000}]

    async def use(world: World) -> NoCapacityError:
        for name in ("small-4096", "large-4096"):
            world.source.fail(name, "is unplugged")
        with pytest.raises(NoCapacityError) as refused:
            world.admitted(long, model="auto")
        return refused.value

    assert "is unplugged" in play(two_contexts_per_model, use).message


def test_auto_refuses_a_prompt_longer_than_every_context() -> None:
    async def use(world: World) -> RequestRefusedError:
        world.source.fail("large-4096", "is unplugged")
        with pytest.raises(RequestRefusedError) as refused:
            world.admitted([{"role": "user", "content": "cell " * 9000}], model="auto")
        return refused.value

    refused = play(two_contexts_per_model, use)

    assert (refused.status, refused.code, refused.param) == (400, "context_length_exceeded", "messages")


@pytest.mark.parametrize("limit", [100_000, 2**63 - 1])
def test_auto_limits_the_expected_answer_to_the_remaining_context(limit: int) -> None:
    """The large model generates 10 tokens/s in a context of 2048."""

    async def use(world: World) -> AdmittedRequest:
        return world.admitted(TALK, model="auto", headers={"x-promptai-budget": "4m"}, max_tokens=limit)

    admitted = play(small_and_large(), use)

    assert admitted.model == "large"
    assert admitted.reason.startswith("auto: large, predicted 203")


def admit(path: str, **fields: Any) -> Callable[[World], Any]:
    """Return a function that admits a request for this path."""

    async def use(world: World) -> AdmittedRequest:
        return world.admission.admit(
            path, {**asking(path, fields), "model": fields.get("model", "large")}, {}, Caller()
        )

    return use


BATCHES = pytest.mark.parametrize(
    ("path", "field"), [(EMBED, "input"), (TEXT, "prompt")], ids=["embeddings", "completions"]
)


@BATCHES
@pytest.mark.parametrize("one", ["cell " * 15, list(range(100_000, 100_015))], ids=["text", "ids"])
def test_the_context_only_has_to_hold_the_longest_of_several_prompts(path: str, field: str, one: Any) -> None:
    async def use(world: World) -> tuple[AdmittedRequest, int]:
        admitted = await admit(path, **{field: [one] * 150})(world)
        return admitted, len(world.fleet_state.candidates(admitted.routed.slot_request))

    admitted, boards = play(lambda: World({"l": msgspec.structs.replace(LARGE, context=1024)}), use)

    assert (boards, admitted.model) == (1, "large")
    assert admitted.routed.slot_request.prompt_tokens == pytest.approx(150 * 15, rel=0.5)


@BATCHES
@pytest.mark.parametrize(
    ("given", "tokens"),
    [
        (["a", "cell " * 4000], 6667),
        ("cell " * 4000, 6667),
        ([7] * 3000, 3000),
        ([[7], [123_456] * 2048], 2048),
        (["a", [7] * 2048], 2048),
    ],
    ids=["texts", "text", "ids", "lists-of-ids", "both"],
)
def test_refuses_the_longest_prompt_with_its_field_and_length(path: str, field: str, given: Any, tokens: int) -> None:
    with pytest.raises(RequestRefusedError) as refused:
        play(small_and_large(), admit(path, **{field: given}))

    assert (refused.value.code, refused.value.param) == ("context_length_exceeded", field)
    reported = int(refused.value.message.split("has about ")[1].split()[0])
    assert reported == pytest.approx(tokens, rel=0.2 if tokens > 6000 else 0)


@BATCHES
def test_counts_token_ids_exactly(path: str, field: str) -> None:
    one = play(small_and_large(), admit(path, **{field: [151_643] * 2047}))
    several = play(small_and_large(), admit(path, **{field: [[151_643] * 500, [7] * 300]}))

    assert (one.routed.slot_request.prompt_tokens, several.routed.slot_request.prompt_tokens) == (2047, 800)


@BATCHES
@pytest.mark.parametrize("given", ["", [""], [[]]], ids=str)
def test_accepts_empty_texts(path: str, field: str, given: Any) -> None:
    assert play(small_and_large(), admit(path, **{field: given})).model == "large"


@pytest.mark.parametrize(("path", "field"), [(CHAT, "messages"), (TEXT, "prompt"), (EMBED, "input")])
@pytest.mark.parametrize("nothing", [None, []], ids=str)
def test_refuses_a_request_without_the_required_field(path: str, field: str, nothing: Any) -> None:
    with pytest.raises(RequestRefusedError, match=f"the request has no {field}") as refused:
        play(small_and_large(), admit(path, **{field: nothing}))

    assert (refused.value.code, refused.value.param) == ("missing_field", field)


@pytest.mark.parametrize(
    ("path", "fields", "answers"),
    [
        (CHAT, {}, 1),
        (CHAT, {"n": 3}, 3),
        (TEXT, {"prompt": ["a", "b"], "n": 2}, 4),
        (TEXT, {"prompt": [1, 2]}, 1),
        (EMBED, {"input": ["a", "b"]}, 1),
    ],
)
def test_counts_the_requested_answers(path: str, fields: dict[str, Any], answers: int) -> None:
    assert play(small_and_large(), admit(path, **fields)).routed.slot_request.answers == answers


@pytest.mark.parametrize(
    ("path", "fields", "tokens"),
    [
        (TEXT, {"prompt": [7] * 100, "max_tokens": 50}, 150),
        (TEXT, {"prompt": [7] * 100, "max_tokens": 50, "n": 3}, 250),
        (TEXT, {"prompt": [[7] * 100] * 2, "max_tokens": 50}, 300),
        (TEXT, {"prompt": [7] * 100, "max_tokens": None}, 300),
        (TEXT, {"prompt": [7] * 100, "max_tokens": 2**63 - 1}, 300),
        (TEXT, {"prompt": [7] * 100, "max_tokens": 10**400}, 300),
        (TEXT, {"prompt": [7] * 100, "max_tokens": 50, "n": 10**400}, 100 + 4096 * 50),
        (EMBED, {"input": [7] * 100}, 100),
    ],
)
def test_estimates_the_total_tokens(path: str, fields: dict[str, Any], tokens: int) -> None:
    """Unlimited answers count 200 tokens; limits keep huge numbers from drowning the use of others."""
    assert play(small_and_large(), admit(path, **fields)).tokens == tokens
