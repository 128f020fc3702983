"""``promptai engine``: build, list, compare, choose and simulate engines."""

import click

from promptai.cli.lazy import LazyGroup

_VERBS = {
    "build": ("promptai.cli.engine_build:build_engine", "Build a llama-server for exactly this processor."),
    "list": ("promptai.cli.engine_list:list_engines", "List the llama-servers of this machine, the one in use first."),
    "use": ("promptai.cli.engine_use:use_engine", "Choose the engine, or leave the choice to promptai."),
    "compare": ("promptai.cli.engine_compare:compare_engines", "Measure the engines of this machine side by side."),
    "simulate": ("promptai.cli.engine_simulate:simulate", "Run a simulated llama-server with chosen rates."),
}


@click.group(cls=LazyGroup, verbs=_VERBS)
def engine() -> None:
    """Build, list, compare, choose and simulate engines."""
