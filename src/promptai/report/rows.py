"""Which metrics a person sees first, under which name; one list for terminal and page."""

#: Metric name -> label.
ROWS = {
    "ttft_s_p50": "first token, median",
    "ttft_s_p95": "first token, 95 % within",
    "ttft_s_mean": "first token, mean",
    "latency_s_mean": "whole answer, mean",
    "prefill_tps": "prefill",
    "decode_tps": "decode",
    "total_tps": "total",
    "generated_tokens_mean": "length of an answer, mean",
    "cached_share": "prompt tokens from the cache",
    "decode_tps_cv_within": "decode CV at one length",
    "decode_tps_cv_across": "decode CV across lengths",
    "memory_anon_bytes": "memory, anonymous (peak)",
    "memory_file_bytes": "memory, mapped (peak)",
    "cpu_percent": "CPU, of all cores",
    "temperature_c_max": "temperature (peak)",
    "watts": "power",
    "joules_per_token": "energy a token",
}
