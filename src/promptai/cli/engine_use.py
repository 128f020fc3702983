"""``promptai engine use``: choose the engine, or leave the choice to promptai."""

import difflib

import click

from promptai.engine.choice import write_choice
from promptai.engine.locate import find_engines
from promptai.errors import EngineError, EngineNotFoundError
from promptai.settings import cache_directory, load_settings


@click.command(
    "use",
    epilog="""\b
Examples:
  promptai engine use llama-cpp-python-0.3.36-native
  promptai engine use embedded
  promptai engine use auto
""",
)
@click.argument("name")
def use_engine(*, name: str) -> None:
    """
    Use the engine NAME from promptai engine list from now on; auto leaves the choice to promptai.

    An engine named with --engine, PROMPTAI_ENGINE or in promptai.toml still takes precedence.
    """
    engines = cache_directory() / "engines"
    found = {engine.name: engine for engine in find_engines(cache=engines)}
    if name != "auto" and name not in found:
        near = difflib.get_close_matches(name, [*found, "auto"], n=1, cutoff=0.3)
        raise EngineNotFoundError(
            f"no engine named '{name}' on this machine",
            hint=f"did you mean {near[0]}?" if near else f"available: {', '.join(found)}",
        )
    trouble = found[name].trouble if name != "auto" else None
    if trouble is not None:
        raise EngineError(f"engine {name} does not start: {trouble}", hint="see promptai engine list")
    try:
        write_choice(engines, None if name == "auto" else name)
    except OSError as error:
        raise EngineError(f"cannot store the choice in {engines}: {error.strerror}", hint="free disk space") from None
    used = find_engines(cache=engines)[0]
    click.echo(f"used from now on: {used.name}, {used.label} ({used.reason})")
    if load_settings().engine.path:
        click.echo("note: the engine named in promptai.toml or PROMPTAI_ENGINE takes precedence", err=True)
