"""``promptai engine``: what can run models here, and a pretended one."""

import click

from promptai.cli.lazy import LazyGroup

_VERBS = {
    "list": ("promptai.cli.engine_list:list_engines", "The llama-servers of this machine, the one that is used first."),
    "simulate": ("promptai.cli.engine_simulate:simulate", "Run a pretended llama-server with chosen rates."),
}


@click.group(cls=LazyGroup, verbs=_VERBS)
def engine() -> None:
    """Engines: list them, or simulate one."""
