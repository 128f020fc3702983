"""The key file: nobody else reads it, no crash tears it, and a change is seen within a second."""

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from promptai.errors import SettingsError
from promptai.gateway.keys import KeyStore
from promptai.gateway.limits import KeyLimits


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where no file is yet, nor its directory."""
    return tmp_path / "promptai" / "keys.json"


def rewrite(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "cannot be read"),
        (b"{", "cannot be read"),
        (b"[]", "Expected `object`, got `array`"),
        (b"\xff", "cannot be read"),
        (b'{"keys": [], "schema": 2}', "Invalid enum value 2"),
        (b'{"kyes": []}', "unknown field `kyes`"),
        (b'{"keys": [{"id": "a"}]}', "missing required field"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_broken_file_is_an_error_of_one_line(path: Path, content: bytes, word: str) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    path.chmod(0o600)

    with pytest.raises(SettingsError, match=word) as caught:
        KeyStore(path)

    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"), [("sha256", "short"), ("scopes", ["root"]), ("limits", {"concurrent": 0}), ("secret", "x")]
)
def test_a_key_that_makes_no_sense_is_an_error(path: Path, field: str, value: object) -> None:
    KeyStore(path).add("a")
    rewrite(path, lambda data: data["keys"][0].update({field: value}))  # type: ignore[index]

    with pytest.raises(SettingsError, match="cannot be read"):
        KeyStore(path)


def test_a_key_that_is_there_twice_is_an_error(path: Path) -> None:
    KeyStore(path).add("a")
    rewrite(path, lambda data: data.update(keys=data["keys"] * 2))  # type: ignore[operator]

    with pytest.raises(SettingsError, match="twice"):
        KeyStore(path)


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o602, 0o620])
def test_a_file_that_others_may_read_or_change_is_an_error(path: Path, mode: int) -> None:
    KeyStore(path).add("a")
    path.chmod(mode)

    with pytest.raises(SettingsError, match=f"chmod 600 {re.escape(str(path))}"):
        KeyStore(path)


def test_the_group_may_read_it_as_kubernetes_wants(path: Path) -> None:
    KeyStore(path).add("a")
    path.chmod(0o440)

    assert len(KeyStore(path).list()) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)

    with pytest.raises(SettingsError, match="cannot be written"):
        KeyStore(tmp_path / "keys.json").add("a")


def test_a_folder_that_is_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "promptai").write_text("")

    with pytest.raises(SettingsError, match="cannot be"):
        KeyStore(tmp_path / "promptai" / "keys.json").add("a")


@pytest.mark.parametrize("name", ["", "a" * 65, "a\nb", "a\x1b[31m", "\u202eevil"])
def test_a_name_that_cannot_be_shown_is_refused(path: Path, name: str) -> None:
    with pytest.raises(SettingsError, match="1 to 64 printable"):
        KeyStore(path).add(name)

    assert not path.exists()


def test_two_keys_of_one_name_are_refused_until_one_is_revoked(path: Path) -> None:
    store = KeyStore(path)
    first, _ = store.add("laptop")

    with pytest.raises(SettingsError, match="there is a key laptop already"):
        store.add("laptop")
    store.revoke(first.id)
    store.add("laptop")


def test_a_key_that_opens_nothing_is_refused(path: Path) -> None:
    with pytest.raises(SettingsError, match="would open nothing"):
        KeyStore(path).add("a", scopes=())


def test_revoking_what_is_not_there_is_an_error(path: Path) -> None:
    with pytest.raises(SettingsError, match="there is no key 12345678"):
        KeyStore(path).revoke("12345678")


@pytest.mark.parametrize("secret", ["", "pk-", "pk-wrong", "\udcff", "x" * 100_000])
def test_a_wrong_secret_finds_nothing(path: Path, secret: str) -> None:
    store = KeyStore(path)
    store.add("a")

    assert store.find(secret) is None


def test_a_key_is_found_by_its_secret_and_not_once_revoked(path: Path) -> None:
    store = KeyStore(path)
    limits = KeyLimits(requests_per_min=5, models=("a", "b"))
    key, secret = store.add("a", scopes=("infer", "metrics"), limits=limits)

    assert KeyStore(path).find(secret) == key
    assert (key.limits, key.scopes, secret[:7]) == (limits, ("infer", "metrics"), key.prefix)
    assert store.revoke(key.id).revoked
    assert KeyStore(path).find(secret) is None


def test_secrets_are_long_random_and_nowhere_in_the_file(path: Path) -> None:
    store = KeyStore(path)
    secrets = [store.add(f"k{number}")[1] for number in range(20)]

    assert len(set(secrets)) == len(secrets)
    assert all(re.fullmatch(r"pk-[A-Za-z0-9_-]{43}", secret) for secret in secrets)
    assert not any(secret[8:] in path.read_text() for secret in secrets)


def test_only_the_owner_gets_at_the_file_and_its_folder(path: Path) -> None:
    old = os.umask(0)
    try:
        KeyStore(path).add("a")
    finally:
        os.umask(old)

    assert (stat.S_IMODE(path.stat().st_mode), stat.S_IMODE(path.parent.stat().st_mode)) == (0o600, 0o700)


def test_writing_leaves_no_other_file_behind(path: Path) -> None:
    store = KeyStore(path)
    store.add("a")
    store.add("b")

    assert [file.name for file in path.parent.iterdir()] == ["keys.json"]


def test_the_file_is_replaced_and_never_written_into(path: Path) -> None:
    """So that a reader, or a crash, sees the old one or the new one."""
    store = KeyStore(path)
    store.add("a")
    with path.open() as old:
        before = old.read()
        store.add("b")
        old.seek(0)

        assert old.read() == before


def test_two_who_add_at_once_both_succeed(path: Path) -> None:
    first, second = KeyStore(path), KeyStore(path)
    first.add("a")
    second.add("b")
    first.add("c")

    assert [key.name for key in KeyStore(path).list()] == ["a", "b", "c"]


def test_a_revocation_is_seen_within_a_second_and_the_file_looked_at_no_more_often(path: Path) -> None:
    key, secret = KeyStore(path).add("a")
    gateway = KeyStore(path)
    gateway.refresh(100.0)
    KeyStore(path).revoke(key.id)

    gateway.refresh(100.9)
    assert gateway.find(secret) == key
    gateway.refresh(101.0)
    assert gateway.find(secret) is None


def test_a_file_that_breaks_while_it_is_used_opens_nothing_until_it_is_well(path: Path) -> None:
    key, secret = KeyStore(path).add("a")
    gateway = KeyStore(path)
    good = path.read_bytes()
    path.write_bytes(b"{")

    for now in (1.0, 1.1):
        with pytest.raises(SettingsError, match="cannot be read"):
            gateway.refresh(now)
        assert (gateway.find(secret), gateway.list()) == (None, ())
    path.write_bytes(good)
    gateway.refresh(1.2)
    assert gateway.find(secret) == key


def test_a_file_that_appears_or_goes_is_seen(path: Path) -> None:
    gateway = KeyStore(path)
    assert gateway.list() == ()
    KeyStore(path).add("a")
    gateway.refresh(1.0)
    assert len(gateway.list()) == 1
    path.unlink()
    gateway.refresh(2.0)
    assert gateway.list() == ()


def test_that_the_file_has_gone_is_said_once(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = KeyStore(path)
    store.add("laptop")
    path.unlink()

    store.reload()
    store.reload()

    assert [record.getMessage() for record in caplog.records] == [f"{path} is gone: nobody is let in until it is back"]


def test_that_there_was_a_key_is_not_forgotten_when_the_file_goes(path: Path) -> None:
    gateway = KeyStore(path)
    assert not gateway.had_keys
    _, secret = KeyStore(path).add("a")
    gateway.refresh(1.0)
    path.unlink()
    gateway.refresh(2.0)

    assert (gateway.had_keys, gateway.find(secret)) == (True, None)
    assert not KeyStore(path).had_keys


def test_admin_opens_everything_and_others_what_they_name(path: Path) -> None:
    store = KeyStore(path)
    admin, _ = store.add("admin", scopes=("admin",))
    metrics, _ = store.add("metrics", scopes=("metrics",))

    assert [admin.opens(scope) for scope in ("infer", "metrics", "admin")] == [True, True, True]
    assert [metrics.opens(scope) for scope in ("infer", "metrics", "admin")] == [False, True, False]


def test_the_digest_is_that_of_the_secret(path: Path) -> None:
    """Another tool can make the file: Python's hashlib, or sha256sum."""
    _, secret = KeyStore(path).add("a")

    (key,) = msgspec.json.decode(path.read_bytes())["keys"]
    assert key["sha256"] == hashlib.sha256(secret.encode()).hexdigest()
