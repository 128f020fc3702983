"""API keys of the gateway, in one file that only its owner reads and writes.

A key is shown once, when it is made; the file holds its SHA-256. A plain digest suffices
because a key is 256 random bits: slow hashes and salts protect passwords that can be
guessed, and nobody guesses these. For the same reason a key is found by its digest: what
a lookup's time tells about a digest tells nothing about a key.

The command line changes the file while a gateway runs. The gateway looks at it at most
once a second and reads it again when it is another one.
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

_LOOK_EVERY_S = 1.0
#: "pk-" and four characters: enough to tell keys apart, and 24 of 256 bits.
_SHOWN_CHARS = 7
_NAME = re.compile(r"[^\x00-\x1f\x7f-\x9f]{1,64}")


class Key(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """
    One API key, without its secret.

    Attributes:
        id: What ``promptai keys revoke`` takes.
        name: Who or what it is for.
        sha256: Of the secret, in hex.
        prefix: The first characters of the secret.
        scopes: What it opens; ``admin`` opens everything.
        created: When it was made, in UTC.
        limits: How much it may use.
        revoked: It opens nothing any more; it stays in the file, so that a log can be read later.
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
            raise ValueError(f"sha256 of key {self.id} is none")

    def opens(self, scope: Scope) -> bool:
        """Whether it may go where that scope is demanded."""
        return scope in self.scopes or "admin" in self.scopes


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    keys: tuple[Key, ...] = ()
    schema: Literal[1] = 1


class KeyStore:
    """
    The keys of one file, which need not exist yet.

    Args:
        path: The file; reading it is part of making this.

    Raises:
        SettingsError: The file is broken, or others may read or change it.

    Attributes:
        had_keys: There was a key in it at any look, even if it or the file is gone since.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.had_keys = False
        self._seen: tuple[int, ...] | None = None
        self._looked_at: float | None = None
        self._by_digest: dict[str, Key] = {}
        self._keys: tuple[Key, ...] = ()
        self.reload()

    def list(self) -> tuple[Key, ...]:
        """All keys as of the last look, revoked ones too, in the order in which they were made."""
        return self._keys

    def find(self, secret: str) -> Key | None:
        """The key with that secret, as of the last look; ``None``: there is none, or it was revoked."""
        digest = hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()
        key = self._by_digest.get(digest)
        return None if key is None or key.revoked else key

    def refresh(self, now: float) -> None:
        """
        Look at the file, unless that was done within the last second.

        Raises:
            SettingsError: As when it is made. No key is found then, until the file is well again.
        """
        if self._looked_at is None or not 0 <= now - self._looked_at < _LOOK_EVERY_S:
            self.reload()
            # Only now: a broken file is looked at, and complained about, every time.
            self._looked_at = now

    def reload(self) -> None:
        """Read the file if it is another one than last time."""
        try:
            seen = _identity(self.path)
            if seen == self._seen:
                return
            if seen is None and self._keys:
                _log.warning("%s is gone: nobody is let in until it is back", self.path)
            self._take(_read(self.path) if seen is not None else ())
            self._seen = seen
        except SettingsError:
            self._seen = None
            self._take(())
            raise

    def add(
        self, name: str, *, scopes: Sequence[Scope] = ("infer",), limits: KeyLimits | None = None
    ) -> tuple[Key, str]:
        """
        Make a key.

        Returns:
            The key, and its secret, which nobody can find out again.

        Raises:
            SettingsError: The name or a scope will not do, or the file cannot be written.
        """
        if not _NAME.fullmatch(name) or not name.isprintable():
            raise SettingsError("a key's name is 1 to 64 printable characters", hint="say who or what it is for")
        if not scopes:
            raise SettingsError(f"key {name} would open nothing", hint="give it a scope: infer, metrics or admin")
        secret = "pk-" + secrets.token_urlsafe(32)
        with self._locked():
            taken = {key.id for key in self._keys}
            if any(key.name == name and not key.revoked for key in self._keys):
                raise SettingsError(f"there is a key {name} already", hint="revoke it, or choose another name")
            key = Key(
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

    def revoke(self, key_id: str) -> Key:
        """
        Let a key open nothing any more; running gateways learn it within a second.

        Raises:
            SettingsError: There is no key of that id, or the file cannot be written.
        """
        with self._locked():
            if all(key.id != key_id for key in self._keys):
                raise SettingsError(f"there is no key {key_id}", hint="promptai keys list shows their ids")
            revoked = tuple(
                msgspec.structs.replace(key, revoked=True) if key.id == key_id else key for key in self._keys
            )
            self._write(revoked)
        return next(key for key in self._keys if key.id == key_id)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other commands from changing the file between our reading and writing it."""
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

    def _write(self, keys: tuple[Key, ...]) -> None:
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

    def _take(self, keys: tuple[Key, ...]) -> None:
        self._keys = keys
        self.had_keys = self.had_keys or bool(keys)
        self._by_digest = {key.sha256: key for key in keys}


def _identity(path: Path) -> tuple[int, ...] | None:
    """What changes when the file does; ``None``: there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unreadable(path, error.strerror or "an error") from None
    # Its group may read it: that is how Kubernetes gives a secret to a process that is not root.
    if stat.S_ISREG(found.st_mode) and found.st_mode & 0o027:
        raise SettingsError(f"others may read or change the keys in {path}", hint=f"chmod 600 {path}")
    return found.st_mtime_ns, found.st_ino, found.st_size, found.st_mode


def _read(path: Path) -> tuple[Key, ...]:
    try:
        keys = msgspec.json.decode(path.read_bytes(), type=_File).keys
    except OSError as error:
        raise _unreadable(path, error.strerror or "an error") from None
    except MALFORMED as error:
        raise _unreadable(path, str(error)) from None
    if len({key.id for key in keys}) < len(keys) or len({key.sha256 for key in keys}) < len(keys):
        raise _unreadable(path, "a key is in it twice")
    return keys


def _unreadable(path: Path, why: str) -> SettingsError:
    return SettingsError(
        f"keys in {path} cannot be read: {why}", hint="restore the file, or remove it and add new keys"
    )


def _unwritable(path: Path, error: OSError) -> SettingsError:
    return SettingsError(
        f"keys in {path} cannot be written: {error.strerror}", hint="check the folder, or PROMPTAI_KEYS"
    )
