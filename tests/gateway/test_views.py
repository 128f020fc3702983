"""The list of models."""

import pytest

from promptai.engine.simulation import SimulationConfig
from promptai.gateway.views import models_view
from promptai.router.selection import Alias, ModelNames
from support_clock import run_virtually
from support_serve import World


@pytest.mark.parametrize(
    ("aliases", "listed"),
    [
        ({}, [("phi", None), ("yi", None), ("auto", None)]),
        ({"gpt": "yi"}, [("phi", None), ("yi", None), ("gpt", "yi"), ("auto", None)]),
        ({"yi": "yi"}, [("phi", None), ("yi", None), ("auto", None)]),
        ({"yi": "phi"}, [("phi", None), ("yi", "phi"), ("auto", None)]),
    ],
    ids=["none", "another-name", "with-parameters", "for-another"],
)
def test_lists_every_name_once_with_its_model(aliases: dict[str, str], listed: list[tuple[str, str | None]]) -> None:
    async def play() -> list[tuple[str, str | None]]:
        async with World({name: SimulationConfig(model=name) for name in ("phi", "yi")}).running() as world:
            names = ModelNames(aliases={alias: Alias(model=model) for alias, model in aliases.items()})
            view = models_view(world.dispatcher, names, lambda _: True)
            return [(entry["id"], entry.get("alias_of")) for entry in view["data"]]

    assert run_virtually(play()) == listed
