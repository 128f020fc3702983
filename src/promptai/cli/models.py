"""``promptai models``: find, fetch, check, quantise and imitate model files."""

import click

from promptai.cli.lazy import LazyGroup

_VERBS = {
    "pull": ("promptai.cli.models_pull:pull", "Fetch a model; goes on where an earlier try stopped."),
    "inspect": (
        "promptai.cli.models_inspect:inspect",
        "What a GGUF file is, from its header, and whether it is whole.",
    ),
    "synth": ("promptai.cli.models_synth:synth", "Write a model of true shape and random weights."),
}


@click.group(cls=LazyGroup, verbs=_VERBS)
def models() -> None:
    """Model files: inspect one, or write a synthetic one."""
