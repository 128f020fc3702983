"""Store the gateway's API keys in one file that only its owner reads and writes.

A key is shown once, when it is created; the file contains its SHA-256. A plain digest suffices because a key is 256
random bits: slow hashes and salts protect passwords that can be guessed. For the same reason a key is looked up by its
digest: the time of the lookup may reveal something about the digest, but nothing about the key.

The command line changes the file while a gateway runs. The gateway checks the file at most once a second, and reads it
again when it has changed.
"""

import contextlib
import datetime as dt
import fcntl
import hashlib
import logging
import os
import re
import secrets
import stat
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from promptai.errors import SettingsError
from promptai.gateway.limits import KeyLimits
from promptai.wire.malformed import MALFORMED

_log = logging.getLogger("promptai.gateway")

Scope = Literal["infer", "admin", "metrics"]

_CHECK_EVERY_S = 1.0
#: "pk-" and four characters: enough to distinguish keys, and only 24 of 256 bits.
_SHOWN_CHARS = 7
_NAME = re.compile(r"[^\x00-\x1f\x7f-\x9f]{1,64}")


class ApiKey(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """
    One API key, without its secret.

    Attributes:
        id: The argument of ``promptai keys revoke``.
        name: Its user or purpose.
        sha256: Digest of the secret, in hex.
        prefix: The first characters of the secret.
        scopes: Its permissions; ``admin`` includes all others.
        created: Time of creation, in UTC.
        limits: How much it may use.
        revoked: Whether it is invalid; it stays in the file because logs refer to its id.
    """

    id: str
    name: str
    sha256: str
    prefix: str
    scopes: tuple[Scope, ...]
    created: str
    limits: KeyLimits = KeyLimits()
    revoked: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise ValueError(f"sha256 of key {self.id} is not a SHA-256 digest in hex")

    def permits(self, scope: Scope) -> bool:
        """Whether its scopes include ``scope``."""
        return scope in self.scopes or "admin" in self.scopes


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    keys: tuple[ApiKey, ...] = ()
    schema: Literal[1] = 1


class KeyStore:
    """
    The keys of one file, which need not exist yet; the constructor reads it.

    Raises:
        SettingsError: The file is malformed, or other users may read or change it.

    Attributes:
        had_keys: Whether the file has ever contained a key, even if the key or the file has been removed since.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.had_keys = False
        self._seen: tuple[int, ...] | None = None
        self._checked_at: float | None = None
        self._by_digest: dict[str, ApiKey] = {}
        self._keys: tuple[ApiKey, ...] = ()
        self.reload()

    def list(self) -> tuple[ApiKey, ...]:
        """Return all keys as of the last check, including revoked ones, in order of creation."""
        return self._keys

    def find(self, secret: str) -> ApiKey | None:
        """Return the key with this secret, as of the last check; ``None``: unknown or revoked."""
        digest = hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()
        key = self._by_digest.get(digest)
        return None if key is None or key.revoked else key

    def refresh(self, now: float) -> None:
        """
        Check the file for changes, unless it was checked within the last second.

        Raises:
            SettingsError: As in the constructor. No key is valid until the file is repaired.
        """
        if self._checked_at is None or not 0 <= now - self._checked_at < _CHECK_EVERY_S:
            self.reload()
            # Set only after success: a malformed file is checked and reported on every request.
            self._checked_at = now

    def reload(self) -> None:
        """Read the file if it has changed."""
        try:
            seen = _identity(self.path)
            if seen == self._seen:
                return
            if seen is None and self._keys:
                _log.warning("%s is missing: no API key is valid until it is restored", self.path)
            self._set_keys(_read(self.path) if seen is not None else ())
            self._seen = seen
        except SettingsError:
            self._seen = None
            self._set_keys(())
            raise

    def add(
        self, name: str, *, scopes: Sequence[Scope] = ("infer",), limits: KeyLimits | None = None
    ) -> tuple[ApiKey, str]:
        """
        Create a key.

        Returns:
            The key and its secret, which cannot be recovered later.

        Raises:
            SettingsError: The name is invalid or taken, there is no scope, or the file cannot be written.
        """
        if not _NAME.fullmatch(name) or not name.isprintable():
            raise SettingsError(f"invalid key name {name!a}", hint="use 1 to 64 printable characters")
        if not scopes:
            raise SettingsError(f"key {name} has no scope", hint="choose infer, metrics or admin")
        secret = "pk-" + secrets.token_urlsafe(32)
        with self._locked():
            taken = {key.id for key in self._keys}
            if any(key.name == name and not key.revoked for key in self._keys):
                raise SettingsError(f"a key named {name} already exists", hint="revoke it, or choose another name")
            key = ApiKey(
                id=next(number for number in iter(lambda: secrets.token_hex(4), "") if number not in taken),
                name=name,
                sha256=hashlib.sha256(secret.encode()).hexdigest(),
                prefix=secret[:_SHOWN_CHARS],
                scopes=tuple(dict.fromkeys(scopes)),
                created=dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
                limits=limits or KeyLimits(),
            )
            self._write((*self._keys, key))
        return key, secret

    def revoke(self, key_id: str) -> ApiKey:
        """
        Revoke a key; running gateways refuse it within a second.

        Raises:
            SettingsError: No key has this id, or the file cannot be written.
        """
        with self._locked():
            if all(key.id != key_id for key in self._keys):
                raise SettingsError(f"no key with id {key_id!r}", hint="see promptai keys list for all ids")
            revoked = tuple(
                msgspec.structs.replace(key, revoked=True) if key.id == key_id else key for key in self._keys
            )
            self._write(revoked)
        return next(key for key in self._keys if key.id == key_id)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other commands from changing the file between reading and writing it; reads it again."""
        folder = self.path.parent
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise _unwritable(self.path, error) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.reload()
            yield
        finally:
            os.close(lock)

    def _write(self, keys: tuple[ApiKey, ...]) -> None:
        data = msgspec.json.format(msgspec.json.encode(_File(keys))) + b"\n"
        part = None
        try:
            handle, part = tempfile.mkstemp(dir=self.path.parent, prefix=".keys-")  # mode 0600
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(part).replace(self.path)
        except OSError as error:
            if part is not None:
                Path(part).unlink(missing_ok=True)
            raise _unwritable(self.path, error) from None
        self.reload()

    def _set_keys(self, keys: tuple[ApiKey, ...]) -> None:
        self._keys = keys
        self.had_keys = self.had_keys or bool(keys)
        self._by_digest = {key.sha256: key for key in keys}


def _identity(path: Path) -> tuple[int, ...] | None:
    """Return a value that changes when the file does; ``None``: no file."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(path, error.strerror or "an error") from None
    # The group may read it: Kubernetes mounts a secret that way for a process that is not root.
    if stat.S_ISREG(found.st_mode) and found.st_mode & 0o027:
        raise SettingsError(f"other users can read or change the keys in {path}", hint=f"chmod 600 {path}")
    return found.st_mtime_ns, found.st_ino, found.st_size, found.st_mode


def _read(path: Path) -> tuple[ApiKey, ...]:
    try:
        keys = msgspec.json.decode(path.read_bytes(), type=_File).keys
    except OSError as error:
        raise _unreadable(path, error.strerror or "an error") from None
    except MALFORMED as error:
        raise _unreadable(path, str(error)) from None
    if len({key.id for key in keys}) < len(keys) or len({key.sha256 for key in keys}) < len(keys):
        raise _unreadable(path, "it contains a key twice")
    return keys


def _unreadable(path: Path, why: str) -> SettingsError:
    return SettingsError(
        f"keys in {path} cannot be read: {why}", hint="restore the file, or remove it and add new keys"
    )


def _unwritable(path: Path, error: OSError) -> SettingsError:
    return SettingsError(
        f"keys in {path} cannot be written: {error.strerror}", hint="check the directory, or PROMPTAI_KEYS"
    )
