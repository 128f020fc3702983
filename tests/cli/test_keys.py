"""``promptai keys`` from the command line."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from promptai.gateway.keys import KeyStore
from promptai.settings import keys_path
from support_cli import promptai

pytestmark = pytest.mark.real


def keys(tmp_path: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run the command with its own configuration directory."""
    return promptai("keys", *arguments, cwd=tmp_path, XDG_CONFIG_HOME=str(tmp_path))


def listed(tmp_path: Path) -> list[dict[str, Any]]:
    done = keys(tmp_path, "list", "--json")
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("add",), "Missing argument 'NAME'"),
        (("add", "a", "--scope", "root"), "'root' is not one of"),
        (("add", "a", "--rpm", "0"), "0 is not in the range"),
        (("add", "a", "--models", " , "), "--models lists no model"),
        (("add", "a\nb"), "1 to 64 printable characters"),
        (("revoke", "12345678"), "no key with id '12345678' (see promptai keys list for all ids)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_invalid_input_is_a_usage_error_and_changes_nothing(
    tmp_path: Path, arguments: tuple[str, ...], word: str
) -> None:
    done = keys(tmp_path, *arguments)

    assert (done.returncode, done.stdout) == (2, "")
    assert word in done.stderr
    assert not (tmp_path / "promptai" / "keys.json").exists()


def test_a_damaged_key_file_is_a_one_line_error(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    path.write_text("{")
    path.chmod(0o600)

    done = promptai("keys", "list", cwd=tmp_path, PROMPTAI_KEYS=str(path))

    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert f"keys in {path} cannot be read" in done.stderr


def test_prints_only_the_secret_on_stdout_and_it_works_until_revoked(tmp_path: Path) -> None:
    added = keys(tmp_path, "add", "laptop", "--models", "tiny, small", "--rpm", "30", "--tpm", "9000")
    secret = added.stdout.strip()
    store = KeyStore(keys_path({"XDG_CONFIG_HOME": str(tmp_path)}))

    key = store.find(secret)
    assert key is not None
    assert secret not in added.stderr
    assert key.id in added.stderr
    revoked = keys(tmp_path, "revoke", key.id)
    assert revoked.stdout == f"revoked key {key.id} for laptop\n"
    store.reload()
    assert store.find(secret) is None


def test_the_json_list_has_everything_but_secrets_and_digests(tmp_path: Path) -> None:
    added = json.loads(
        keys(
            tmp_path, "add", "a", "--scope", "admin", "--scope", "metrics", "--concurrent", "2", "--tpm", "5", "--json"
        ).stdout
    )

    secret = added.pop("key")
    assert listed(tmp_path) == [added]
    assert (added["scopes"], added["revoked"], added["prefix"]) == (["admin", "metrics"], False, secret[:7])
    limits = {"requests_per_min": None, "tokens_per_min": 5, "concurrent": 2, "models": None}
    assert (added["limits"], "sha256" in added) == (limits, False)


def test_the_table_shows_names_unchanged(tmp_path: Path) -> None:
    keys(tmp_path, "add", "[red]alert[/red]", "--models", "tiny", "--rpm", "3")
    keys(tmp_path, "revoke", listed(tmp_path)[0]["id"])
    shown = keys(tmp_path, "list").stdout

    assert "[red]alert[/red]" in shown
    assert "revoked" in shown
    assert "3 requests/min; only tiny" in shown


def test_uses_the_key_file_of_the_given_settings(tmp_path: Path) -> None:
    config, path = tmp_path / "other.toml", tmp_path / "others.json"
    config.write_text(f"[gateway]\nkeys = '{path}'\n")

    empty = keys(tmp_path, "list", "--config", str(config)).stdout
    added = json.loads(keys(tmp_path, "add", "laptop", "--config", str(config), "--json").stdout)
    shown = keys(tmp_path, "list", "--config", str(config)).stdout
    elsewhere = listed(tmp_path)
    revoked = keys(tmp_path, "revoke", added["id"], "--config", str(config))
    absent = keys(tmp_path, "list", "--config", "absent.toml")

    assert empty == f"no keys in {path}; create one with promptai keys add NAME --config {config}\n"
    assert "laptop" in shown
    assert elsewhere == []
    assert (revoked.returncode, KeyStore(path).list()[0].revoked) == (0, True)
    assert (absent.returncode, len(absent.stderr.splitlines())) == (2, 1)


def test_an_empty_list_shows_how_to_create_a_key(tmp_path: Path) -> None:
    done = keys(tmp_path, "list")

    assert (done.returncode, done.stdout) == (
        0,
        f"no keys in {tmp_path}/promptai/keys.json; create one with promptai keys add NAME\n",
    )
    assert listed(tmp_path) == []
