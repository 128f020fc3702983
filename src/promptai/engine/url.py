"""The URL of a server, checked once for measuring and for serving.

A URL ends up in manifests, logs and error messages. So one that contains a user name or a
password is rejected, and the error does not repeat it. Nothing here connects to the server.
"""

import re
from typing import Self
from urllib.parse import urlsplit

import msgspec

from promptai.errors import SettingsError

_DEFAULT_PORTS = {"http": 80, "https": 443}


class EngineUrl(msgspec.Struct, frozen=True):
    """
    An http or https URL with a host and a valid port.

    Attributes:
        text: As given.
        base: Without a trailing slash or ``/v1``: where the API starts.
        netloc: Host and port as given.
        location: Scheme, lower-case host, port and path; equal for two spellings of one URL.
    """

    text: str
    base: str
    netloc: str
    location: tuple[str, str, int, str]

    @classmethod
    def parse(cls, text: str, *, name: str | None = None, key_hint: str = "put the key into $PROMPTAI_API_KEY") -> Self:
        """
        Check a URL that a user gave.

        Args:
            name: Used in errors instead of the host, where the server has a name.
            key_hint: Where an API key belongs.

        Raises:
            SettingsError: It is not an http or https URL with a host and a valid port, or it contains a user name or
                a password.
        """
        if "@" in text:
            raise SettingsError(
                f"the URL of {name or text.rpartition('@')[2]} contains a user name or a password",
                hint=f"{key_hint}: URLs appear in messages and files",
            )
        base = text.rstrip("/").removesuffix("/v1")
        try:
            parts = urlsplit(base)
            port = _DEFAULT_PORTS[parts.scheme] if parts.port is None else parts.port
            host = parts.hostname
        except (ValueError, KeyError):
            host, port = None, 0
        if not host or not port:
            raise SettingsError(f"{text!r} is not an engine URL", hint="write it as http://host:port")
        return cls(text, base, parts.netloc, (parts.scheme, host, port, parts.path))

    @property
    def address(self) -> str:
        """Host and port, with the scheme's default port where the URL has none."""
        return f"{re.sub(r':[0-9]*$', '', self.netloc)}:{self.location[2]}"


def looks_like_url(text: str) -> bool:
    """Whether a user's text names a server rather than a file or a model."""
    return text.startswith(("http://", "https://"))
