"""What is kept of a request that has ended: counts, times, and one line of a log.

What was asked and answered is in neither.
"""

import logging

from promptai.gateway.admission import AdmittedRequest
from promptai.gateway.metrics import Metrics, RequestRecord
from promptai.router.failover.request import RoutedRequest

_log = logging.getLogger("promptai.access")


def outcome_of(admitted: AdmittedRequest, status: int, arrived: float) -> RequestRecord:
    """
    How a request went.

    Args:
        status: HTTP status; 499 where the client went away.
        arrived: The loop's time at which it came.
    """
    leases, timings = admitted.routed.leases, admitted.routed.timings
    if not leases:
        return RequestRecord(model=admitted.model, replica="", status=status)
    prompt, cached, generated = _counted(admitted.routed)
    computed = timings.prompt_n if timings is not None else 0
    decoded = (
        timings.predicted_n - admitted.routed.route_request.answers if timings is not None else 0
    )  # the first is prefill's
    return RequestRecord(
        model=admitted.model,
        replica=leases[-1].replica.id,
        status=status,
        prompt_tokens=prompt,
        cached_tokens=cached,
        generated_tokens=generated,
        ttft_s=min((lease.first_at - arrived for lease in leases if lease.first_at is not None), default=None),
        queue_s=leases[0].queued_s,
        decode_s_per_token=timings.predicted_ms / 1000 / decoded if timings is not None and decoded > 0 else None,
        saved_s=cached * timings.prompt_ms / computed / 1000 if timings is not None and cached and computed else None,
    )


def used(admitted: AdmittedRequest, outcome: RequestRecord) -> int:
    """Tokens that a request is charged to its key; what nobody has counted, as many as were expected."""
    if not admitted.routed.leases:  # it was never sent
        return 0
    lease, prompt, generated = admitted.routed.leases[0], outcome.prompt_tokens, outcome.generated_tokens
    prompt = round(lease.request.tokens) if prompt is None else prompt
    return prompt + (round(lease.request.answers * lease.expected) if generated is None else generated)


def _counted(routed: RoutedRequest) -> tuple[int | None, int | None, int | None]:
    """Tokens of the prompt, cached ones among them, and generated ones: as the engine says, as far as it does."""
    timings, usage = routed.timings, routed.usage
    # What an engine generated whose successor went on is a part of the successor's prompt, and of the answer.
    before, last = sum(lease.generated for lease in routed.leases[:-1]), routed.leases[-1].generated
    told, outcome = routed.said.prompt_tokens, routed.leases[-1].outcome
    if routed.route_request.answers > 1 and outcome is None:
        # Of several, an account comes with the end of each; whoever left before had all prompts computed, or queued.
        ended = timings.predicted_n if timings is not None else 0
        return max(told or 0, round(routed.route_request.tokens)), None, before + max(ended, last)
    if timings is not None:
        read = timings.prompt_n + (timings.cache_n or 0)
        whole = told if routed.continuations and told is not None else max(0, read - before)
        found = None if timings.cache_n is None else min(timings.cache_n, whole)
        return whole, found, before + timings.predicted_n
    if usage is None:
        untold = outcome is not None and outcome.generated is None and not last
        return told, None, None if untold else before + last
    details = usage.prompt_tokens_details
    cached = details.cached_tokens if details is not None else None
    prompt = told if usage.prompt_tokens is None else usage.prompt_tokens
    return prompt, cached, before + (last if usage.completion_tokens is None else usage.completion_tokens)


def account(metrics: Metrics, admitted: AdmittedRequest, outcome: RequestRecord) -> None:
    """Count a request."""
    metrics.observe_request(outcome)
    for reason in admitted.routed.retries:
        metrics.observe_retry(reason)
    for how in admitted.routed.continuations:
        metrics.observe_continuation(how)


def write_line(name: str, key: str, path: str, outcome: RequestRecord, total_s: float) -> None:
    """One line of the access log."""
    if not _log.isEnabledFor(logging.INFO):
        return
    _log.info(
        "%s %s %s model=%s replica=%s status=%d queue=%s ttft=%s total=%s tokens=%s cached=%s",
        name,
        key,
        path,
        outcome.model or "-",
        outcome.replica or "-",
        outcome.status,
        _seconds(outcome.queue_s),
        _seconds(outcome.ttft_s),
        _seconds(total_s),
        "-" if outcome.generated_tokens is None else outcome.generated_tokens,
        "-" if outcome.cached_tokens is None else outcome.cached_tokens,
    )


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}s"
