"""The key file: only its owner reads it, a crash cannot damage it, and changes apply within a second."""

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
    """A path without a file or directory."""
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
def test_a_malformed_file_is_a_one_line_error(path: Path, content: bytes, word: str) -> None:
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
def test_an_invalid_key_is_an_error(path: Path, field: str, value: object) -> None:
    KeyStore(path).add("a")
    rewrite(path, lambda data: data["keys"][0].update({field: value}))  # type: ignore[index]

    with pytest.raises(SettingsError, match="cannot be read"):
        KeyStore(path)


def test_a_duplicate_key_is_an_error(path: Path) -> None:
    KeyStore(path).add("a")
    rewrite(path, lambda data: data.update(keys=data["keys"] * 2))  # type: ignore[operator]

    with pytest.raises(SettingsError, match="twice"):
        KeyStore(path)


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o602, 0o620])
def test_a_file_that_other_users_can_read_or_change_is_an_error(path: Path, mode: int) -> None:
    KeyStore(path).add("a")
    path.chmod(mode)

    with pytest.raises(SettingsError, match=f"chmod 600 {re.escape(str(path))}"):
        KeyStore(path)


def test_the_group_may_read_the_file_for_kubernetes(path: Path) -> None:
    KeyStore(path).add("a")
    path.chmod(0o440)

    assert len(KeyStore(path).list()) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_directory_is_an_error(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)

    with pytest.raises(SettingsError, match="cannot be written"):
        KeyStore(tmp_path / "keys.json").add("a")


def test_a_file_instead_of_the_directory_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "promptai").write_text("")

    with pytest.raises(SettingsError, match="cannot be"):
        KeyStore(tmp_path / "promptai" / "keys.json").add("a")


@pytest.mark.parametrize("name", ["", "a" * 65, "a\nb", "a\x1b[31m", "\u202eevil"])
def test_refuses_an_unprintable_name(path: Path, name: str) -> None:
    with pytest.raises(SettingsError, match="1 to 64 printable"):
        KeyStore(path).add(name)

    assert not path.exists()


def test_refuses_a_duplicate_name_until_the_first_key_is_revoked(path: Path) -> None:
    store = KeyStore(path)
    first, _ = store.add("laptop")

    with pytest.raises(SettingsError, match="a key named laptop already exists"):
        store.add("laptop")
    store.revoke(first.id)
    store.add("laptop")


def test_refuses_a_key_without_a_scope(path: Path) -> None:
    with pytest.raises(SettingsError, match="key a has no scope"):
        KeyStore(path).add("a", scopes=())


def test_revoking_an_unknown_key_is_an_error(path: Path) -> None:
    with pytest.raises(SettingsError, match="no key with id '12345678'"):
        KeyStore(path).revoke("12345678")


@pytest.mark.parametrize("secret", ["", "pk-", "pk-wrong", "\udcff", "x" * 100_000])
def test_a_wrong_secret_finds_nothing(path: Path, secret: str) -> None:
    store = KeyStore(path)
    store.add("a")

    assert store.find(secret) is None


def test_finds_a_key_by_its_secret_until_it_is_revoked(path: Path) -> None:
    store = KeyStore(path)
    limits = KeyLimits(requests_per_min=5, models=("a", "b"))
    key, secret = store.add("a", scopes=("infer", "metrics"), limits=limits)

    assert KeyStore(path).find(secret) == key
    assert (key.limits, key.scopes, secret[:7]) == (limits, ("infer", "metrics"), key.prefix)
    assert store.revoke(key.id).revoked
    assert KeyStore(path).find(secret) is None


def test_secrets_are_long_random_and_not_in_the_file(path: Path) -> None:
    store = KeyStore(path)
    secrets = [store.add(f"k{number}")[1] for number in range(20)]

    assert len(set(secrets)) == len(secrets)
    assert all(re.fullmatch(r"pk-[A-Za-z0-9_-]{43}", secret) for secret in secrets)
    assert not any(secret[8:] in path.read_text() for secret in secrets)


def test_only_the_owner_can_access_the_file_and_its_directory(path: Path) -> None:
    old = os.umask(0)
    try:
        KeyStore(path).add("a")
    finally:
        os.umask(old)

    assert (stat.S_IMODE(path.stat().st_mode), stat.S_IMODE(path.parent.stat().st_mode)) == (0o600, 0o700)


def test_writing_leaves_no_temporary_file(path: Path) -> None:
    store = KeyStore(path)
    store.add("a")
    store.add("b")

    assert [file.name for file in path.parent.iterdir()] == ["keys.json"]


def test_replaces_the_file_instead_of_overwriting_it(path: Path) -> None:
    """A reader sees the old or the new file, even after a crash."""
    store = KeyStore(path)
    store.add("a")
    with path.open() as old:
        before = old.read()
        store.add("b")
        old.seek(0)

        assert old.read() == before


def test_two_stores_can_add_keys_in_turn(path: Path) -> None:
    first, second = KeyStore(path), KeyStore(path)
    first.add("a")
    second.add("b")
    first.add("c")

    assert [key.name for key in KeyStore(path).list()] == ["a", "b", "c"]


def test_checks_the_file_for_a_revocation_once_a_second(path: Path) -> None:
    key, secret = KeyStore(path).add("a")
    gateway = KeyStore(path)
    gateway.refresh(100.0)
    KeyStore(path).revoke(key.id)

    gateway.refresh(100.9)
    assert gateway.find(secret) == key
    gateway.refresh(101.0)
    assert gateway.find(secret) is None


def test_a_damaged_file_permits_nothing_until_it_is_repaired(path: Path) -> None:
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


def test_notices_a_new_and_a_removed_file(path: Path) -> None:
    gateway = KeyStore(path)
    assert gateway.list() == ()
    KeyStore(path).add("a")
    gateway.refresh(1.0)
    assert len(gateway.list()) == 1
    path.unlink()
    gateway.refresh(2.0)
    assert gateway.list() == ()


def test_logs_a_removed_file_once(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = KeyStore(path)
    store.add("laptop")
    path.unlink()

    store.reload()
    store.reload()

    assert [record.getMessage() for record in caplog.records] == [
        f"{path} is missing: no API key is valid until it is restored"
    ]


def test_remembers_that_a_key_existed_after_the_file_is_removed(path: Path) -> None:
    gateway = KeyStore(path)
    assert not gateway.had_keys
    _, secret = KeyStore(path).add("a")
    gateway.refresh(1.0)
    path.unlink()
    gateway.refresh(2.0)

    assert (gateway.had_keys, gateway.find(secret)) == (True, None)
    assert not KeyStore(path).had_keys


def test_admin_permits_every_scope_and_others_only_themselves(path: Path) -> None:
    store = KeyStore(path)
    admin, _ = store.add("admin", scopes=("admin",))
    metrics, _ = store.add("metrics", scopes=("metrics",))

    assert [admin.permits(scope) for scope in ("infer", "metrics", "admin")] == [True, True, True]
    assert [metrics.permits(scope) for scope in ("infer", "metrics", "admin")] == [False, True, False]


def test_stores_the_sha256_of_the_secret(path: Path) -> None:
    """Other tools can create the file, for instance with sha256sum."""
    _, secret = KeyStore(path).add("a")

    (key,) = msgspec.json.decode(path.read_bytes())["keys"]
    assert key["sha256"] == hashlib.sha256(secret.encode()).hexdigest()
