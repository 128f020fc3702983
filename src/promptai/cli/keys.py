"""``promptai keys``: manage the API keys of the gateway.

The gateway need not be running; a running one applies a change within a second.
"""

import os
import shlex
from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from promptai.errors import SettingsError
from promptai.gateway.keys import ApiKey, KeyStore, Scope
from promptai.gateway.limits import KeyLimits
from promptai.settings import keys_path, load_settings

_AT_LEAST_ONE = click.IntRange(min=1)
_CONFIG = click.option("--config", type=click.Path(path_type=Path), help="The promptai.toml of promptai serve.")


@click.group()
def keys() -> None:
    """
    Add, list and revoke API keys of the gateway.

    A gateway on loopback needs no key until one exists. On any other address it always requires one.
    """


@keys.command(
    epilog="\b\nExamples:\n  promptai keys add laptop\n  promptai keys add prometheus --scope metrics\n"
    "  promptai keys add ci --models tinyllama-1.1b --rpm 30 --concurrent 1"
)
@click.argument("name")
@click.option(
    "--scope",
    "scopes",
    type=click.Choice(["infer", "admin", "metrics"]),
    multiple=True,
    default=("infer",),
    show_default=True,
    help="Permissions of the key; repeatable. admin permits everything.",
)
@click.option("--models", metavar="A,B", help="Models, aliases or auto that the key may use.  [default: all]")
@click.option("--rpm", type=_AT_LEAST_ONE, help="Requests per minute.  [default: unlimited]")
@click.option("--tpm", type=_AT_LEAST_ONE, help="Tokens per minute, prompts and answers.  [default: unlimited]")
@click.option("--concurrent", type=_AT_LEAST_ONE, help="Concurrent requests.  [default: unlimited]")
@_CONFIG
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def add(
    *,
    name: str,
    scopes: tuple[Scope, ...],
    models: str | None,
    rpm: int | None,
    tpm: int | None,
    concurrent: int | None,
    config: Path | None,
    as_json: bool,
) -> None:
    """Create a key for NAME and print it; it cannot be shown again."""
    limits = KeyLimits(requests_per_min=rpm, tokens_per_min=tpm, concurrent=concurrent, models=_models(models))
    key, secret = _store(config).add(name, scopes=scopes, limits=limits)
    if as_json:
        click.echo(msgspec.json.encode(_shown(key) | {"key": secret}))
        return
    click.echo(secret)
    click.echo(f"key {key.id} for {key.name}; it cannot be shown again", err=True)


@keys.command(name="list", epilog="\b\nExample:\n  promptai keys list --json")
@_CONFIG
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_keys(*, config: Path | None, as_json: bool) -> None:
    """List all keys without their secrets."""
    store = _store(config)
    if as_json:
        click.echo(msgspec.json.encode([_shown(key) for key in store.list()]))
        return
    if not store.list():
        click.echo(f"no keys in {store.path}; create one with {add_command(config)}")
        return
    table = Table("id", "name", "begins with", "scope", "limits", "created")
    for key in store.list():
        scope = "revoked" if key.revoked else ", ".join(key.scopes)
        table.add_row(key.id, escape(key.name), key.prefix, scope, escape(_describe(key.limits)), key.created[:10])
    Console(highlight=False).print(table)


@keys.command(epilog="\b\nExample:\n  promptai keys revoke 5f0c2a91")
@click.argument("key_id", metavar="ID")
@_CONFIG
def revoke(*, key_id: str, config: Path | None) -> None:
    """Revoke a key; running gateways refuse it within a second."""
    key = _store(config).revoke(key_id)
    click.echo(f"revoked key {key.id} for {key.name}")


def add_command(config: Path | None) -> str:
    """Return the command that adds a key to the file that ``promptai serve --config`` reads."""
    return "promptai keys add NAME" + ("" if config is None else f" --config {shlex.quote(str(config))}")


def _store(config: Path | None) -> KeyStore:
    return KeyStore(keys_path(os.environ, load_settings(config)))


def _models(option: str | None) -> tuple[str, ...] | None:
    if option is None:
        return None
    names = tuple(dict.fromkeys(name.strip() for name in option.split(",") if name.strip()))
    if not names:
        raise SettingsError("--models lists no model", hint="omit --models to allow all models")
    return names


def _shown(key: ApiKey) -> dict[str, object]:
    """Return the fields of a key for JSON, without its digest."""
    facts: dict[str, object] = msgspec.to_builtins(key)
    del facts["sha256"]
    return facts


def _describe(limits: KeyLimits) -> str:
    parts = [
        None if limits.requests_per_min is None else f"{limits.requests_per_min} requests/min",
        None if limits.tokens_per_min is None else f"{limits.tokens_per_min} tokens/min",
        None if limits.concurrent is None else f"{limits.concurrent} concurrent",
        None if limits.models is None else "only " + ", ".join(limits.models),
    ]
    return "; ".join(part for part in parts if part)
