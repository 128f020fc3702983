"""Models that a key permits: by name, by alias, as a default or fallback, and chosen by auto."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from promptai.errors import NoCapacityError, RequestRefusedError
from promptai.gateway.admission import AdmissionRules
from promptai.gateway.auth import Caller, Guard
from promptai.gateway.errors import ApiError
from promptai.gateway.keys import KeyStore
from promptai.gateway.limits import KeyLimits
from promptai.router.selection import Alias, ModelNames
from support_clients import ALONE, TALK, play
from support_serve import World
from support_site import CHAT, Door, visit

SMALL = msgspec.structs.replace(ALONE, model="small", context=1024)
LARGE = msgspec.structs.replace(ALONE, model="large")
NAMES = ModelNames(
    aliases={"quick": Alias("small"), "small:short": Alias("quick", {"max_tokens": 3}), "best": Alias("auto")}
)


def world(names: ModelNames = NAMES, **fallbacks: str) -> Callable[[], World]:
    return lambda: World({"s": SMALL, "l": LARGE}, rules=AdmissionRules(names=names, fallbacks=fallbacks))


def only_small() -> World:
    return World({"s": SMALL})


def admitted_model(new_world: Callable[[], World], models: tuple[str, ...], words: int = 1, **fields: Any) -> str:
    """Return the model that a request with a key is admitted for."""

    async def use(world: World) -> str:
        messages = [{"role": "user", "content": "cell " * words}]
        body = {"messages": messages, "max_tokens": 4, **fields}
        caller = Caller(key_id="k", limits=KeyLimits(models=models))
        return world.admission.admit(CHAT, body, {}, caller).model

    return play(new_world, use)


def refusal(new_world: Callable[[], World], models: tuple[str, ...], **fields: Any) -> str:
    """Return the message for a model that a key does not permit."""
    with pytest.raises(ApiError) as caught:
        admitted_model(new_world, models, **fields)
    assert (caught.value.status, caught.value.code) == (403, "model_not_allowed")
    return caught.value.message


@pytest.mark.parametrize("fields", [{}, {"model": None}, {"model": ""}, {"model": "default"}], ids=str)
def test_a_request_without_a_model_needs_permission_for_the_default(fields: dict[str, Any]) -> None:
    default = world(msgspec.structs.replace(NAMES, default="small"))

    assert admitted_model(only_small, ("small",), **fields) == "small"
    assert admitted_model(default, ("small",), **fields) == "small"
    assert refusal(only_small, ("large",), **fields) == "this API key may not use small"
    assert refusal(default, ("large",), **fields) == "this API key may not use small"


@pytest.mark.parametrize("default", ["quick", "best", "auto"])
def test_permission_for_an_alias_permits_it_as_the_default(default: str) -> None:
    new_world = world(msgspec.structs.replace(NAMES, default=default))

    assert admitted_model(new_world, (default,)) in {"small", "large"}


@pytest.mark.parametrize("words", [1, 900])
def test_ignores_a_fallback_that_the_key_does_not_permit(words: int) -> None:
    """A prompt that probably fits stays with the permitted model."""
    assert admitted_model(world(small="large"), ("small",), words, model="small") == "small"
    assert (
        admitted_model(world(small="large"), ("small", "large"), words, model="small") == ("small", "large")[words > 1]
    )


def test_a_prompt_that_fits_only_a_forbidden_fallback_is_too_long() -> None:
    with pytest.raises(RequestRefusedError, match="small holds 1024, the answer included") as caught:
        admitted_model(world(small="large"), ("small",), 2000, model="small")

    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize("alias", ["quick", "small:short"])
def test_permission_for_an_alias_permits_only_that_name(alias: str) -> None:
    assert admitted_model(world(), (alias,), model=alias) == "small"
    for other in ("small", "large", "auto", "best", *({"quick", "small:short"} - {alias})):
        assert refusal(world(), (alias,), model=other) == f"this API key may not use {other}"


def test_permission_for_a_model_does_not_permit_its_aliases() -> None:
    assert refusal(world(), ("small",), model="quick") == "this API key may not use quick"


@pytest.mark.parametrize("name", ["auto", "best"])
def test_permission_for_auto_permits_any_model_that_auto_chooses(name: str) -> None:
    long = 2000

    assert admitted_model(world(), (name,), long, model=name) == "large"
    assert admitted_model(world(), (name, "small"), long, model=name) == "large"


def test_a_default_of_auto_chooses_among_permitted_models() -> None:
    new_world = world(msgspec.structs.replace(NAMES, default="auto"))

    assert [admitted_model(new_world, (model,)) for model in ("small", "large")] == ["small", "large"]
    assert refusal(new_world, ("other",)) == "this API key may not use auto"


@pytest.mark.parametrize("models", [("small",), ("other",), ()])
def test_refuses_auto_without_permission(models: tuple[str, ...]) -> None:
    assert refusal(world(), models, model="auto") == "this API key may not use auto"


def test_an_empty_fleet_is_no_capacity_rather_than_a_missing_permission() -> None:
    with pytest.raises(NoCapacityError, match="no model is available for auto"):
        admitted_model(lambda: World({}), ("auto",), model="auto")


@pytest.mark.parametrize("models", [("quick",), ("auto",), ("small",), ("best", "large"), None])
def test_a_key_may_use_exactly_the_listed_models(models: tuple[str, ...] | None, tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "keys.json")
    _, secret = store.add("a", limits=KeyLimits(models=models))
    headers = {"Authorization": f"Bearer {secret}"}
    names = ("small", "large", "quick", "small:short", "best", "auto")

    async def use(at: Door) -> tuple[set[str], set[str]]:
        listed = msgspec.json.decode((await at.ask("/v1/models", headers=headers)).body)["data"]
        answers = {name: await at.chat(model=name, messages=TALK, headers=headers) for name in names}
        return {entry["id"] for entry in listed}, {name for name, answer in answers.items() if answer.status == 200}

    listed, usable = visit(world(), use, guard=Guard(store, open=False), rules=AdmissionRules(names=NAMES))

    assert listed == usable == (set(names) if models is None else set(models))
