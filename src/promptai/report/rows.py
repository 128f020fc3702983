"""The main metrics with their labels, for terminal and page."""

#: Metric name -> label.
ROWS = {
    "ttft_s_p50": "time to first token, median",
    "ttft_s_p95": "time to first token, p95",
    "ttft_s_mean": "time to first token, mean",
    "latency_s_mean": "latency, mean",
    "prefill_tps": "prefill",
    "decode_tps": "decode",
    "total_tps": "total",
    "generated_tokens_mean": "answer length, mean",
    "cached_share": "cached share of prompt tokens",
    "decode_tps_cv_within": "decode CV at one length",
    "decode_tps_cv_across": "decode CV across lengths",
    "memory_anon_bytes": "memory, anonymous (peak)",
    "memory_file_bytes": "memory, mapped (peak)",
    "cpu_percent": "CPU, share of all cores",
    "temperature_c_max": "temperature (peak)",
    "watts": "power",
    "joules_per_token": "energy per token",
}
