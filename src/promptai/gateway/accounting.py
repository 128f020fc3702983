"""Record finished requests: metrics, the charge to the key, and a line of the access log.

None of them contains any text of a prompt or an answer.
"""

import logging

from promptai.gateway.admission import AdmittedRequest
from promptai.gateway.metrics import Metrics, RequestRecord
from promptai.router.failover.request import RoutedRequest

_log = logging.getLogger("promptai.access")


def request_record(admitted: AdmittedRequest, status: int, arrived: float) -> RequestRecord:
    """
    Summarise a finished request.

    Args:
        status: HTTP status; 499 if the client disconnected.
        arrived: The loop's time of its arrival.
    """
    routed = admitted.routed
    leases, timings = routed.leases, routed.timings
    if not leases:
        return RequestRecord(model=admitted.model, replica="", status=status)
    prompt, cached, generated = _token_counts(routed)
    computed = timings.prompt_n if timings is not None else 0
    # The first token of each answer belongs to prefill.
    decoded = timings.predicted_n - routed.slot_request.answers if timings is not None else 0
    first_tokens = [lease.first_token_at for lease in leases if lease.first_token_at is not None]
    return RequestRecord(
        model=admitted.model,
        replica=leases[-1].replica.id,
        status=status,
        prompt_tokens=prompt,
        cached_tokens=cached,
        generated_tokens=generated,
        ttft_s=min(first_tokens) - arrived if first_tokens else None,
        queue_s=leases[0].queued_s,
        decode_s_per_token=timings.predicted_ms / 1000 / decoded if timings is not None and decoded > 0 else None,
        saved_s=cached * timings.prompt_ms / computed / 1000 if timings is not None and cached and computed else None,
    )


def charged_tokens(admitted: AdmittedRequest, record: RequestRecord) -> int:
    """Return the tokens to charge to the key; estimates replace counts that are unknown."""
    if not admitted.routed.leases:  # never sent
        return 0
    lease, prompt, generated = admitted.routed.leases[0], record.prompt_tokens, record.generated_tokens
    prompt = round(lease.request.prompt_tokens) if prompt is None else prompt
    expected = round(lease.request.answers * lease.expected_answer_tokens)
    return prompt + (expected if generated is None else generated)


def _token_counts(routed: RoutedRequest) -> tuple[int | None, int | None, int | None]:
    """Return prompt tokens, the cached ones among them, and generated tokens, as far as the engines reported them."""
    timings, usage = routed.timings, routed.usage
    # Tokens of an attempt that a later one resumed are part of the later prompt, and of the answer.
    before, last = sum(lease.generated for lease in routed.leases[:-1]), routed.leases[-1].generated
    reported, result = routed.sent.prompt_tokens, routed.leases[-1].result
    if routed.slot_request.answers > 1 and result is None:
        # Engines report each of several answers at its end; a client that disconnects earlier had all prompts computed
        # or queued.
        ended = timings.predicted_n if timings is not None else 0
        return max(reported or 0, round(routed.slot_request.prompt_tokens)), None, before + max(ended, last)
    if timings is not None:
        processed = timings.prompt_n + (timings.cache_n or 0)
        prompt = reported if routed.continuations and reported is not None else max(0, processed - before)
        cached = None if timings.cache_n is None else min(timings.cache_n, prompt)
        return prompt, cached, before + timings.predicted_n
    if usage is None:
        unknown = result is not None and result.generated_tokens is None and not last
        return reported, None, None if unknown else before + last
    prompt_tokens = reported if usage.prompt_tokens is None else usage.prompt_tokens
    generated = last if usage.completion_tokens is None else usage.completion_tokens
    return prompt_tokens, usage.cached_tokens, before + generated


def observe(metrics: Metrics, admitted: AdmittedRequest, record: RequestRecord) -> None:
    """Add a request to the metrics."""
    metrics.observe_request(record)
    for reason in admitted.routed.retries:
        metrics.observe_retry(reason)
    for source in admitted.routed.continuations:
        metrics.observe_continuation(source)


def write_access_line(request_id: str, key: str, path: str, record: RequestRecord, total_s: float) -> None:
    """Write one line of the access log."""
    if not _log.isEnabledFor(logging.INFO):
        return
    _log.info(
        "%s %s %s model=%s replica=%s status=%d queue=%s ttft=%s total=%s tokens=%s cached=%s",
        request_id,
        key,
        path,
        record.model or "-",
        record.replica or "-",
        record.status,
        _seconds(record.queue_s),
        _seconds(record.ttft_s),
        _seconds(total_s),
        "-" if record.generated_tokens is None else record.generated_tokens,
        "-" if record.cached_tokens is None else record.cached_tokens,
    )


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}s"
