"""Limit the use of an API key: requests and tokens per minute, and concurrent requests.

Token buckets that hold one minute's worth. The number of tokens that a request generates is unknown when it arrives,
so an estimate is reserved when it is admitted, and corrected when it has ended. The request that takes the last tokens
may overdraw the bucket; its key waits until the debt is refilled.

Pure: the time is an argument, ``now``. ``gateway.auth`` begins and ends requests, ``gateway.app`` reserves and charges
their tokens.
"""

from typing import Literal

import msgspec

#: It is unknown when a running request of the same key ends.
_RETRY_CONCURRENT_S = 1.0


class KeyLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """
    Limits of one key; ``None``: unlimited.

    Attributes:
        requests_per_min: Requests per minute; a minute's worth may arrive at once.
        tokens_per_min: Prompt and generated tokens per minute.
        concurrent: Concurrent requests, including queued ones.
        models: Permitted names: models, aliases (which permit their model under that name), ``auto`` (any model).
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
        """Whether the key may request this name."""
        return self.models is None or model in self.models


class LimitReached(msgspec.Struct, frozen=True):
    """
    The limit that keeps a request from beginning now.

    Attributes:
        retry_after_s: Seconds until it may begin.
    """

    limit: Literal["requests", "tokens", "concurrent"]
    retry_after_s: float


class _Bucket(msgspec.Struct):
    """Requests or tokens left at the time ``at``; negative: debt."""

    left: float
    at: float

    def fill(self, per_min: int, now: float) -> None:
        self.left = min(float(per_min), self.left + max(0.0, now - self.at) * per_min / 60.0)
        self.at = now

    def wait_s(self, per_min: int) -> float:
        # Tolerance for float rounding: a client that waits exactly retry_after_s must be admitted.
        return 0.0 if self.left > 1.0 - 1e-6 else (1.0 - self.left) * 60.0 / per_min


class UsageMeter:
    """Recent use of each key; one entry per key with limits, so memory is bounded."""

    def __init__(self) -> None:
        self._requests: dict[str, _Bucket] = {}
        self._tokens: dict[str, _Bucket] = {}
        self._running: dict[str, int] = {}

    def begin(self, key_id: str, limits: KeyLimits, now: float) -> LimitReached | None:
        """Count a request, or return the limit it exceeds; every counted request needs an ``end``."""
        if limits.concurrent is not None and self.running(key_id) >= limits.concurrent:
            return LimitReached("concurrent", _RETRY_CONCURRENT_S)
        tokens = _filled(self._tokens, key_id, limits.tokens_per_min, now)
        if limits.tokens_per_min is not None and tokens is not None and tokens.wait_s(limits.tokens_per_min):
            return LimitReached("tokens", tokens.wait_s(limits.tokens_per_min))
        requests = _filled(self._requests, key_id, limits.requests_per_min, now)
        if limits.requests_per_min is not None and requests is not None:
            if requests.wait_s(limits.requests_per_min):
                return LimitReached("requests", requests.wait_s(limits.requests_per_min))
            requests.left -= 1.0
        self._running[key_id] = self.running(key_id) + 1
        return None

    def end(self, key_id: str) -> None:
        """Count the end of a request."""
        left = self.running(key_id) - 1
        if left > 0:
            self._running[key_id] = left
        else:
            self._running.pop(key_id, None)

    def reserve(self, key_id: str, limits: KeyLimits, tokens: int, now: float) -> LimitReached | None:
        """
        Reserve the tokens that a request will probably use until ``charge``, or return the limit it exceeds.

        One remaining token suffices: a request larger than the whole limit overdraws the bucket.
        """
        bucket = _filled(self._tokens, key_id, limits.tokens_per_min, now)
        if limits.tokens_per_min is None or bucket is None:
            return None
        if wait_s := bucket.wait_s(limits.tokens_per_min):
            requests = self._requests.get(key_id)
            if requests is not None:  # a request refused for its tokens does not count
                requests.left += 1.0
            return LimitReached("tokens", wait_s)
        bucket.left -= tokens
        return None

    def charge(self, key_id: str, limits: KeyLimits, tokens: int, now: float, *, reserved: int = 0) -> None:
        """Charge the tokens that a request used, and release the ``reserved`` ones."""
        bucket = _filled(self._tokens, key_id, limits.tokens_per_min, now)
        if bucket is not None:
            bucket.left += reserved - tokens

    def running(self, key_id: str) -> int:
        """Return the number of requests of a key that have begun and not ended."""
        return self._running.get(key_id, 0)


def _filled(buckets: dict[str, _Bucket], key_id: str, per_min: int | None, now: float) -> _Bucket | None:
    if per_min is None:
        buckets.pop(key_id, None)
        return None
    bucket = buckets.setdefault(key_id, _Bucket(float(per_min), now))
    bucket.fill(per_min, now)
    return bucket
