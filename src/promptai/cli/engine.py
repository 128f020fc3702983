"""``promptai engine``: what can run models here, and a pretended one."""

import click

from promptai.cli.lazy import LazyGroup

_VERBS = {
    "build": ("promptai.cli.engine_build:build_engine", "Build a llama-server for exactly this processor."),
    "list": ("promptai.cli.engine_list:list_engines", "The llama-servers of this machine, the one that is used first."),
    "use": ("promptai.cli.engine_use:use_engine", "Choose the engine that is used, or leave the choice to promptai."),
    "compare": ("promptai.cli.engine_compare:compare_engines", "Measure the engines of this machine side by side."),
    "simulate": ("promptai.cli.engine_simulate:simulate", "Run a pretended llama-server with chosen rates."),
}


@click.group(cls=LazyGroup, verbs=_VERBS)
def engine() -> None:
    """Engines: build one, list, compare and choose them, or simulate one."""
