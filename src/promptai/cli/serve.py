"""``promptai serve``: the gateway, on this machine's models, on boards, or on pretended ones."""

import asyncio
import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

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


@click.command(
    epilog="""\b
Examples:
  promptai serve                               all models that are kept here, each loaded when it is asked for
  promptai serve tinyllama-1.1b                one model, loaded at once
  promptai serve --board http://pi-1:8080 --board http://pi-2:8080
  promptai serve --simulate 4                  four pretended Raspberry Pi 5, to see how it behaves
  promptai serve --host 0.0.0.0                for other machines; makes an API key if there is none
"""
)
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option("--config", type=click.Path(path_type=Path), help="A promptai.toml; read again when it changes.")
@click.option("--host", help="Address to listen at.  [default: 127.0.0.1]")
@click.option("--port", type=click.IntRange(0, 65535), help="Port; 0 takes a free one.  [default: 8400]")
@click.option("--board", "boards", multiple=True, metavar="URL", help="A running llama-server or PromptAI; repeatable.")
@click.option("--slots", type=_POSITIVE, help="Conversations that an engine holds at once.  [default: 1]")
@click.option("--context", type=click.IntRange(min=64), help="Tokens of context of a slot.  [default: 4096]")
@click.option("--threads", type=_POSITIVE, help="CPU threads of an engine.  [default: the cores that are ours]")
@click.option(
    "--strategy", type=click.Choice(["affinity", "least-busy", "round-robin"]), help="How a replica is chosen."
)
@click.option("--simulate", type=click.IntRange(0, 64), default=0, metavar="N", help="Start N pretended boards.")
@click.option("--quiet", is_flag=True, help="No line for each request.")
def serve(**options: Any) -> int:
    """
    Serve models over an OpenAI-compatible API.

    A MODEL is one that is kept here (promptai models list) or a .gguf file. Those that are named are loaded at
    once, those of the settings and of the library when they are asked for. Without anything named, everything
    in the library is served, or the bundled promptai-tiny.
    """
    console = Console(stderr=True, emoji=False)
    _log_to(console, quiet=options["quiet"])
    file = settings_file(options["config"])
    seen = file_identity(file)  # before it is read: what changes meanwhile is read again
    filled = not is_empty(file)
    settings = _with_options(load_settings(options["config"]), options)
    plan = _plan(settings, None, options)
    access = _access(settings, options["config"])

    def find() -> Path | None:
        """One may appear; one that has gone is missed, not taken for an empty one."""
        nonlocal file
        file = settings_file(options["config"]) or file
        return file

    def replan(setup: EngineSetup | None) -> ServePlan:
        nonlocal filled
        found = find()
        settings = load_settings(found, refuse_empty=filled)
        plan = _plan(_with_options(settings, options), setup, options)
        filled = filled or not is_empty(found)
        return plan

    running = ServeSession(plan, access.guard, simulated=options["simulate"], file=find, seen=seen, replan=replan)
    with LoadingProgress(console) as loading:
        return asyncio.run(running.run(lambda one, server: _print_greeting(one, server, access), loading))


class _Access(NamedTuple):
    """
    Who may come in.

    Attributes:
        adding: The command that makes another key.
    """

    guard: Guard
    store: KeyStore
    loopback: bool
    add_command: str


def _access(settings: Settings, config: Path | None) -> _Access:
    """
    The gateway's keys; bound beyond loopback nobody is served without one.

    Raises:
        SettingsError: The file of keys is broken, or others may read it.
    """
    gateway, store = settings.gateway, KeyStore(keys_path(os.environ, settings))
    loopback = is_loopback(gateway.host)
    guard = Guard(store, open=loopback, bind=gateway.host, hosts=gateway.hosts, cors_origins=gateway.cors_origins)
    return _Access(guard, store, loopback, add_command(config))


def _plan(settings: Settings, setup: EngineSetup | None, options: dict[str, Any]) -> ServePlan:
    return make_plan(
        settings, setup=setup, simulated=options["simulate"] > 0, note=lambda line: _log.warning("%s", line)
    )


def _with_options(settings: Settings, options: dict[str, Any]) -> Settings:
    """The command line beats the file, and adds to what it lists."""
    gateway = {name: options[name] for name in ("host", "port", "strategy") if options[name] is not None}
    engine = {name: options[name] for name in ("slots", "context", "threads") if options[name] is not None}
    key_env = "PROMPTAI_API_KEY" if os.environ.get("PROMPTAI_API_KEY") else None
    given = tuple(FleetEntry(url, api_key_env=key_env) for url in options["boards"])
    own = {name: None for name in ("slots", "context") if name in engine}
    entries = tuple(msgspec.structs.replace(entry, **own) for entry in settings.serve)
    listed = {entry.model: entry for entry in entries}
    named = tuple(
        msgspec.structs.replace(listed.get(model, ServeEntry(model)), preload=True) for model in options["models"]
    )
    return msgspec.structs.replace(
        settings,
        gateway=msgspec.structs.replace(settings.gateway, **gateway),
        engine=msgspec.structs.replace(settings.engine, **engine),
        fleet=(*settings.fleet, *given),
        serve=(*named, *(entry for entry in entries if entry.model not in options["models"])),
    )


def _print_greeting(running: ServeSession, server: GatewayServer, access: _Access) -> None:
    """Everything that a person needs to begin."""
    gateway, snapshot = running.plan.settings.gateway, running.registry.snapshot
    # Not before it listens: of a start that fails nobody would have read the key.
    secret = access.store.add("first")[1] if not (access.loopback or access.store.list()) else None
    out = Console(highlight=False, soft_wrap=True, emoji=False)
    out.print(table(snapshot.replicas, running.plan.models, running.plan.boards.targets))
    out.print(legend(snapshot.replicas, running.budget() if running.plan.models else None), style="dim")
    for trouble in (*down_reasons(snapshot.replicas), *running.registry.problems):
        out.print(one_line(trouble), markup=False)
    lines, key = ["", f"serving at {server.url}/v1"], secret
    if secret is not None:
        where = f"It was made just now and cannot be shown again; {access.store.path} holds its digest."
        lines += ["", f"API key: {secret}", where, f"More of them: {access.add_command}"]
    elif access.store.list():
        key = "$PROMPTAI_API_KEY"
        lines.append(f"an API key is needed: export PROMPTAI_API_KEY=pk-...; {access.add_command} makes one")
    else:
        lines.append("open to this machine alone; no API key is needed")
    if not access.loopback:
        lines.append(f"from other machines: {external_url(gateway.host, server.port)}/v1")
    why_not = why_unavailable(snapshot.replicas)
    curl = curl_line(server.url, example_model(snapshot.replicas), key)
    lines += ["", one_line(why_not)] if why_not else ["", "try it:", curl]
    lines += ["", f"{'then' if why_not else 'or'}: promptai chat --url {server.url}"]
    lines += [f"API: {server.url}/docs    fleet: {server.url}/api/fleet    metrics: {server.url}/metrics"]
    lines.append(f"Ctrl-C ends it; answers that are under way are finished first, for up to {gateway.drain_s:g} s")
    click.echo("\n".join(lines))


def _log_to(console: Console, *, quiet: bool) -> None:
    """Our log on stderr; nobody's prompt is ever in it."""
    log = logging.getLogger("promptai")
    log.handlers = [LogHandler(console)]
    log.setLevel(logging.INFO)
    log.propagate = False
    logging.getLogger("promptai.access").setLevel(logging.WARNING if quiet else logging.INFO)
