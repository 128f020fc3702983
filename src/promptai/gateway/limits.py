"""How much one API key may use: requests and tokens a minute, and requests at once.

Token buckets that hold one minute's worth. What a request will generate is not known when
it comes, so an estimate is reserved when it is accepted, and corrected when it has ended. The
request that takes the last tokens may run into debt; its key waits until the debt is paid off.

Pure: the time comes in as ``now``. ``gateway.auth`` admits and releases, ``gateway.app`` has
tokens reserved and charged.
"""

from typing import Literal

import msgspec

#: Nobody knows when a running request of the same key ends.
_RETRY_CONCURRENT_S = 1.0


class KeyLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """
    What one key may use; ``None``: as much as there is.

    Attributes:
        requests_per_min: Requests a minute; a minute's worth may come at once.
        tokens_per_min: Prompt and generated tokens a minute.
        concurrent: Requests at once, those that wait in the queue included.
        models: Names that it may ask for: of models, of aliases with what they stand for, or ``auto`` with all models.
    """

    requests_per_min: int | None = None
    tokens_per_min: int | None = None
    concurrent: int | None = None
    models: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for name in ("requests_per_min", "tokens_per_min", "concurrent"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")

    def allow(self, model: str) -> bool:
        """Whether it may ask for that name."""
        return self.models is None or model in self.models


class Refusal(msgspec.Struct, frozen=True):
    """
    Why a request may not begin now.

    Attributes:
        retry_after_s: When it may.
    """

    reason: Literal["requests", "tokens", "concurrent"]
    retry_after_s: float


class _Bucket(msgspec.Struct):
    """Tokens that are left, as of ``at``; below 0 is debt."""

    left: float
    at: float

    def fill(self, per_min: int, now: float) -> None:
        self.left = min(float(per_min), self.left + max(0.0, now - self.at) * per_min / 60.0)
        self.at = now

    def wait_s(self, per_min: int) -> float:
        # Whoever waited as long as told is let in, whatever the rounding of floats.
        return 0.0 if self.left > 1.0 - 1e-6 else (1.0 - self.left) * 60.0 / per_min


class Meter:
    """What each key has used lately. One entry a key that has limits, never more."""

    def __init__(self) -> None:
        self._requests: dict[str, _Bucket] = {}
        self._tokens: dict[str, _Bucket] = {}
        self._running: dict[str, int] = {}

    def begin(self, key_id: str, limits: KeyLimits, now: float) -> Refusal | None:
        """Count a request in, or say why not; whoever was counted in must be counted out with ``end``."""
        if limits.concurrent is not None and self.running(key_id) >= limits.concurrent:
            return Refusal("concurrent", _RETRY_CONCURRENT_S)
        tokens = _filled(self._tokens, key_id, limits.tokens_per_min, now)
        if limits.tokens_per_min is not None and tokens is not None and tokens.wait_s(limits.tokens_per_min):
            return Refusal("tokens", tokens.wait_s(limits.tokens_per_min))
        requests = _filled(self._requests, key_id, limits.requests_per_min, now)
        if limits.requests_per_min is not None and requests is not None:
            if requests.wait_s(limits.requests_per_min):
                return Refusal("requests", requests.wait_s(limits.requests_per_min))
            requests.left -= 1.0
        self._running[key_id] = self.running(key_id) + 1
        return None

    def end(self, key_id: str) -> None:
        """Count a request out."""
        left = self.running(key_id) - 1
        if left > 0:
            self._running[key_id] = left
        else:
            self._running.pop(key_id, None)

    def reserve(self, key_id: str, limits: KeyLimits, tokens: int, now: float) -> Refusal | None:
        """
        Set tokens aside that a request will probably use, until ``charge`` tells how many it did; or say why not.

        A single token that is left is enough: a request larger than the whole limit runs into debt.
        """
        bucket = _filled(self._tokens, key_id, limits.tokens_per_min, now)
        if limits.tokens_per_min is None or bucket is None:
            return None
        if wait_s := bucket.wait_s(limits.tokens_per_min):
            requests = self._requests.get(key_id)
            if requests is not None:  # whoever is refused for its tokens costs no request
                requests.left += 1.0
            return Refusal("tokens", wait_s)
        bucket.left -= tokens
        return None

    def charge(self, key_id: str, limits: KeyLimits, tokens: int, now: float, *, reserved: int = 0) -> None:
        """Charge tokens that were used; ``reserved``: so many were set aside for them."""
        bucket = _filled(self._tokens, key_id, limits.tokens_per_min, now)
        if bucket is not None:
            bucket.left += reserved - tokens

    def running(self, key_id: str) -> int:
        """Requests of a key that have begun and not ended."""
        return self._running.get(key_id, 0)


def _filled(buckets: dict[str, _Bucket], key_id: str, per_min: int | None, now: float) -> _Bucket | None:
    if per_min is None:
        buckets.pop(key_id, None)
        return None
    bucket = buckets.setdefault(key_id, _Bucket(float(per_min), now))
    bucket.fill(per_min, now)
    return bucket
