"""Define every metric of ``summary.json`` in one sentence.

docs/reference/summary.md is generated from here; a test fails if a summary and this list differ.
"""

_STEADY = {
    "within": "mean of the buckets' coefficients of variation, weighted by requests: steadiness at one prompt length",
    "across": "coefficient of variation of the bucket means: how much the prompt length changes the rate",
    "all": "sample standard deviation / mean over all requests",
}
_SHAPES = {
    "mean": "mean",
    "p50": "median, with at least 20 requests",
    "p95": "95th percentile, with at least 20 requests",
    "max": "maximum",
}

METRICS: dict[str, str] = {
    **{
        f"ttft_s_{shape}": f"first content token minus request sent, by the client's clock: {words}"
        for shape, words in _SHAPES.items()
    },
    **{
        f"latency_s_{shape}": f"end of generation minus request sent, by the client's clock: {words}"
        for shape, words in _SHAPES.items()
    },
    "prefill_tps": "sum of uncached prompt tokens / sum of the engine's prompt time",
    "decode_tps": "sum of (generated tokens - 1) / sum of (end of generation - first token), by the client's clock",
    "engine_decode_tps": "decode_tps by the engine's clock, to check the client's",
    "total_tps": "sum of (prompt + generated tokens) / sum of (end of generation - request sent)",
    "mean_of_prefill_tps": "mean of the requests' own prefill rates: not a throughput",
    "mean_of_decode_tps": "mean of the requests' own decode rates: not a throughput",
    "mean_of_total_tps": "mean of the requests' own total rates: not a throughput",
    "prompt_tokens_mean": "mean tokens of a prompt, including history, by the model's tokenizer",
    "generated_tokens_mean": "mean tokens of an answer",
    "cached_share": "share of the prompt tokens that came from the KV cache",
    "capped_share": "share of the answers that reached the token limit",
    **{f"{rate}_tps_cv_{kind}": words for rate in ("prefill", "decode", "total") for kind, words in _STEADY.items()},
    "cpu_percent": "busy share of all usable cores during requests, by all processes",
    "engine_cpu_percent": "the engine's share of all usable cores during requests",
    "memory_anon_bytes": "peak anonymous memory of the engine: KV cache, buffers, repacked weights",
    "memory_file_bytes": "peak file-backed memory of the engine: mapped weights, which the kernel may drop",
    "memory_rss_bytes": "peak of the engine's anonymous, file-backed and shared memory together",
    "available_bytes_min": "least memory available on the machine without swapping",
    "swap_used_bytes": "peak swap in use on the machine",
    "temperature_c_max": "highest processor temperature",
    "cpu_mhz": "mean processor clock during requests, as set by the kernel",
    "watts": "mean power during requests; energy_source names the source of the readings",
    "joules_per_token": "mean power times seconds with a request in progress / generated tokens; idle power included",
}
