"""A calibration with round prices."""

from promptai.advisor.attention import AttentionPrice, AttentionPrices
from promptai.advisor.calibration import Calibration

CALIBRATION = Calibration(
    engine="an engine",
    cpu="a processor",
    threads=4,
    decode_s_per_byte={"Q4_0": 1e-9, "Q6_K": 2e-9},
    decode_s_per_layer=0.001,
    attention=AttentionPrices(by_head={"128": AttentionPrice(query_s=1e-9, kv_s=2e-9)}, step=1),
    prefill_s_per_weight={"Q4_0": 1e-11},
    copied_share={"Q4_0": 1.0, "Q6_K": 0.0},
    base_anon_bytes=1_000_000,
    base_file_bytes=500_000,
    buffer_scale=1.0,
    created="2026-11-21T00:00:00+00:00",
)
