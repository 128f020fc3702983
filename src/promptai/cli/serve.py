"""``promptai serve``: run the gateway for models of this machine, for boards or for simulated boards."""

import asyncio
import logging
import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

import click
import msgspec
from rich.console import Console

from promptai.cli.keys import add_command
from promptai.cli.serve_models import EngineSetup
from promptai.cli.serve_run import ServePlan, ServeSession, file_identity, make_plan
from promptai.cli.serve_show import (
    LoadingProgress,
    LogHandler,
    curl_line,
    down_reasons,
    example_model,
    external_url,
    legend,
    table,
    why_unavailable,
)
from promptai.cli.terminal_text import one_line
from promptai.gateway.auth import Guard, is_loopback
from promptai.gateway.keys import KeyStore
from promptai.gateway.server import GatewayServer
from promptai.settings import FleetEntry, ServeEntry, Settings, is_empty, keys_path, load_settings, settings_file

_log = logging.getLogger("promptai.serve")

_POSITIVE = click.IntRange(min=1)


class ServeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Options of ``promptai serve``; ``None``: not given, so the settings apply."""

    models: tuple[str, ...] = ()
    config: Path | None = None
    host: str | None = None
    port: int | None = None
    boards: tuple[str, ...] = ()
    slots: int | None = None
    context: int | None = None
    threads: int | None = None
    strategy: Literal["affinity", "least-busy", "round-robin"] | None = None
    simulate: int = 0
    quiet: bool = False


@click.command(
    epilog="""\b
Examples:
  promptai serve                               all models of the library, each loaded on its first request
  promptai serve tinyllama-1.1b                one model, loaded at once
  promptai serve --board http://pi-1:8080 --board http://pi-2:8080
  promptai serve --simulate 4                  four simulated Raspberry Pi 5, to try it out
  promptai serve --host 0.0.0.0                for other machines; creates an API key if there is none
"""
)
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option("--config", type=click.Path(path_type=Path), help="Settings file; reloaded when it changes.")
@click.option("--host", help="Address to listen on.  [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), help="Port to listen on; 0: any free port.  [default: 8400]")
@click.option("--board", "boards", multiple=True, metavar="URL", help="A running llama-server or PromptAI; repeatable.")
@click.option("--slots", type=_POSITIVE, help="Slots (concurrent conversations) per engine.  [default: 1]")
@click.option("--context", type=click.IntRange(min=64), help="Context of one slot in tokens.  [default: 4096]")
@click.option(
    "--threads", type=_POSITIVE, help="CPU threads per engine.  [default: physical cores available to this process]"
)
@click.option(
    "--strategy",
    type=click.Choice(["affinity", "least-busy", "round-robin"]),
    help="How a request is assigned to a replica.  [default: affinity]",
)
@click.option("--simulate", type=click.IntRange(0, 64), default=0, metavar="N", help="Start N simulated boards.")
@click.option("--quiet", is_flag=True, help="Do not log requests.")
def serve(**given: Any) -> int:
    """
    Serve models over an OpenAI-compatible API.

    A MODEL is the name of a model in the library (promptai models list) or a .gguf file. Models on the command
    line are loaded at once, those of the settings and the library on their first request. If nothing is named,
    the whole library is served, or the bundled promptai-tiny if the library is empty.
    """
    options = ServeOptions(**given)
    console = Console(stderr=True, emoji=False)
    _log_to(console, quiet=options.quiet)
    file = settings_file(options.config)
    seen = file_identity(file)  # before the file is read, so that a later change causes a reload
    was_filled = not is_empty(file)
    settings = _with_options(load_settings(options.config), options)
    plan = _plan(settings, None, options)
    access = _access(settings, options.config)

    def find() -> Path | None:
        """Return the settings file, which may appear later; a deleted one counts as missing, not as empty."""
        nonlocal file
        file = settings_file(options.config) or file
        return file

    def replan(setup: EngineSetup | None) -> ServePlan:
        nonlocal was_filled
        found = find()
        settings = load_settings(found, refuse_empty=was_filled)
        plan = _plan(_with_options(settings, options), setup, options)
        was_filled = was_filled or not is_empty(found)
        return plan

    session = ServeSession(plan, access.guard, simulated=options.simulate, file=find, seen=seen, replan=replan)
    with LoadingProgress(console) as loading:
        return asyncio.run(session.run(lambda one, server: _print_greeting(one, server, access), loading))


class _Access(NamedTuple):
    """
    Who may use the gateway.

    Attributes:
        loopback: It is reachable from this machine only.
        add_command: The command that adds a key.
    """

    guard: Guard
    store: KeyStore
    loopback: bool
    add_command: str


def _access(settings: Settings, config: Path | None) -> _Access:
    """
    Load the API keys; an address other than loopback always requires one.

    Raises:
        SettingsError: The key file is damaged, or readable by other users.
    """
    gateway, store = settings.gateway, KeyStore(keys_path(os.environ, settings))
    loopback = is_loopback(gateway.host)
    guard = Guard(store, open=loopback, bind=gateway.host, hosts=gateway.hosts, cors_origins=gateway.cors_origins)
    return _Access(guard, store, loopback, add_command(config))


def _plan(settings: Settings, setup: EngineSetup | None, options: ServeOptions) -> ServePlan:
    return make_plan(settings, setup=setup, simulated=options.simulate > 0, note=lambda line: _log.warning("%s", line))


def _with_options(settings: Settings, options: ServeOptions) -> Settings:
    """Apply the command line: its values override those of the file, its models and boards are added."""
    gateway = _given(host=options.host, port=options.port, strategy=options.strategy)
    engine = _given(slots=options.slots, context=options.context, threads=options.threads)
    key_env = "PROMPTAI_API_KEY" if os.environ.get("PROMPTAI_API_KEY") else None
    boards = tuple(FleetEntry(url, api_key_env=key_env) for url in options.boards)
    overridden = {name: None for name in ("slots", "context") if name in engine}
    entries = tuple(msgspec.structs.replace(entry, **overridden) for entry in settings.serve)
    listed = {entry.model: entry for entry in entries}
    named = tuple(
        msgspec.structs.replace(listed.get(model, ServeEntry(model)), preload=True) for model in options.models
    )
    return msgspec.structs.replace(
        settings,
        gateway=msgspec.structs.replace(settings.gateway, **gateway),
        engine=msgspec.structs.replace(settings.engine, **engine),
        fleet=(*settings.fleet, *boards),
        serve=(*named, *(entry for entry in entries if entry.model not in options.models)),
    )


def _given(**values: str | int | None) -> dict[str, str | int]:
    return {name: value for name, value in values.items() if value is not None}


def _print_greeting(session: ServeSession, server: GatewayServer, access: _Access) -> None:
    """Print what is served and how to use it."""
    gateway, snapshot = session.plan.settings.gateway, session.registry.snapshot
    # Only once the gateway listens: a start that fails would create a key that is never shown.
    secret = access.store.add("first")[1] if not (access.loopback or access.store.list()) else None
    out = Console(highlight=False, soft_wrap=True, emoji=False)
    out.print(table(snapshot.replicas, session.plan.models, session.plan.boards.targets))
    out.print(legend(snapshot.replicas, session.budget() if session.plan.models else None), style="dim")
    for problem in (*down_reasons(snapshot.replicas), *session.registry.problems):
        out.print(one_line(problem), markup=False)
    lines, key = ["", f"serving at {server.url}/v1"], secret
    if secret is not None:
        where = f"This key cannot be shown again; {access.store.path} holds its digest."
        lines += ["", f"API key: {secret}", where, f"add more with: {access.add_command}"]
    elif access.store.list():
        key = "$PROMPTAI_API_KEY"
        lines.append(f"an API key is required: export PROMPTAI_API_KEY=pk-...; create one with {access.add_command}")
    else:
        lines.append("reachable from this machine only; no API key required")
    if not access.loopback:
        lines.append(f"from other machines: {external_url(gateway.host, server.port)}/v1")
    why_not = why_unavailable(snapshot.replicas)
    curl = curl_line(server.url, example_model(snapshot.replicas), key)
    lines += ["", one_line(why_not)] if why_not else ["", "try it:", curl]
    lines += ["", f"{'then' if why_not else 'or'}: promptai chat --url {server.url}"]
    lines += [f"API: {server.url}/docs    fleet: {server.url}/api/fleet    metrics: {server.url}/metrics"]
    lines.append(f"Ctrl-C stops the gateway; answers in progress may finish for up to {gateway.drain_s:g} s")
    click.echo("\n".join(lines))


def _log_to(console: Console, *, quiet: bool) -> None:
    """Log to stderr; prompts are never logged."""
    log = logging.getLogger("promptai")
    log.handlers = [LogHandler(console)]
    log.setLevel(logging.INFO)
    log.propagate = False
    logging.getLogger("promptai.access").setLevel(logging.WARNING if quiet else logging.INFO)
