"""Which models a key may use: by their own names, by what stands for them, and what is chosen for it."""

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
from support_party import ALONE, TALK, play
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


def taken(made: Callable[[], World], models: tuple[str, ...], words: int = 1, **fields: Any) -> str:
    """The model that a request of a key is for."""

    async def use(world: World) -> str:
        messages = [{"role": "user", "content": "cell " * words}]
        body = {"messages": messages, "max_tokens": 4, **fields}
        caller = Caller(key_id="k", limits=KeyLimits(models=models))
        return world.admission.admit(CHAT, body, {}, caller).model

    return play(made, use)


def refused(made: Callable[[], World], models: tuple[str, ...], **fields: Any) -> str:
    """What a key is told that may not use what it asks for."""
    with pytest.raises(ApiError) as caught:
        taken(made, models, **fields)
    assert (caught.value.status, caught.value.code) == (403, "model_not_allowed")
    return caught.value.message


@pytest.mark.parametrize("fields", [{}, {"model": None}, {"model": ""}, {"model": "default"}], ids=str)
def test_a_request_without_a_model_needs_permission_for_the_default_alone(fields: dict[str, Any]) -> None:
    default = world(msgspec.structs.replace(NAMES, default="small"))

    assert taken(only_small, ("small",), **fields) == "small"
    assert taken(default, ("small",), **fields) == "small"
    assert refused(only_small, ("large",), **fields) == "this API key may not use small"
    assert refused(default, ("large",), **fields) == "this API key may not use small"


@pytest.mark.parametrize("default", ["quick", "best", "auto"])
def test_a_default_that_is_an_alias_or_auto_may_be_used_by_whoever_may_use_that(default: str) -> None:
    made = world(msgspec.structs.replace(NAMES, default=default))

    assert taken(made, (default,)) in {"small", "large"}


@pytest.mark.parametrize("words", [1, 900])
def test_a_fallback_that_a_key_may_not_use_is_none_for_it(words: int) -> None:
    """A prompt that may well fit stays with the model that it may use."""
    assert taken(world(small="large"), ("small",), words, model="small") == "small"
    assert taken(world(small="large"), ("small", "large"), words, model="small") == ("small", "large")[words > 1]


def test_a_prompt_that_only_a_forbidden_fallback_holds_is_too_long() -> None:
    with pytest.raises(RequestRefusedError, match="small holds 1024, the answer included") as caught:
        taken(world(small="large"), ("small",), 2000, model="small")

    assert caught.value.code == "context_length_exceeded"


@pytest.mark.parametrize("alias", ["quick", "small:short"])
def test_permission_for_an_alias_is_one_for_what_it_stands_for_by_that_name_alone(alias: str) -> None:
    assert taken(world(), (alias,), model=alias) == "small"
    for other in ("small", "large", "auto", "best", *({"quick", "small:short"} - {alias})):
        assert refused(world(), (alias,), model=other) == f"this API key may not use {other}"


def test_permission_for_a_model_is_none_for_its_aliases() -> None:
    assert refused(world(), ("small",), model="quick") == "this API key may not use quick"


@pytest.mark.parametrize("name", ["auto", "best"])
def test_permission_for_auto_lets_it_take_any_model(name: str) -> None:
    long = 2000

    assert taken(world(), (name,), long, model=name) == "large"
    assert taken(world(), (name, "small"), long, model=name) == "large"


def test_a_default_of_auto_takes_only_what_a_key_may_use() -> None:
    made = world(msgspec.structs.replace(NAMES, default="auto"))

    assert [taken(made, (model,)) for model in ("small", "large")] == ["small", "large"]
    assert refused(made, ("other",)) == "this API key may not use auto"


@pytest.mark.parametrize("models", [("small",), ("other",), ()])
def test_a_key_that_may_not_use_auto_is_told_so(models: tuple[str, ...]) -> None:
    assert refused(world(), models, model="auto") == "this API key may not use auto"


def test_where_nothing_is_served_it_is_not_the_key_that_is_blamed() -> None:
    with pytest.raises(NoCapacityError, match="no model is available for auto"):
        taken(lambda: World({}), ("auto",), model="auto")


@pytest.mark.parametrize("models", [("quick",), ("auto",), ("small",), ("best", "large"), None])
def test_what_a_key_is_shown_it_may_ask_for_and_nothing_else(models: tuple[str, ...] | None, tmp_path: Path) -> None:
    store = KeyStore(tmp_path / "keys.json")
    _, secret = store.add("a", limits=KeyLimits(models=models))
    headers = {"Authorization": f"Bearer {secret}"}
    names = ("small", "large", "quick", "small:short", "best", "auto")

    async def use(at: Door) -> tuple[set[str], set[str]]:
        listed = msgspec.json.decode((await at.ask("/v1/models", headers=headers)).body)["data"]
        asked = {name: await at.chat(model=name, messages=TALK, headers=headers) for name in names}
        return {entry["id"] for entry in listed}, {name for name, answer in asked.items() if answer.status == 200}

    shown, answered = visit(world(), use, guard=Guard(store, open=False), rules=AdmissionRules(names=NAMES))

    assert shown == answered == (set(names) if models is None else set(models))
