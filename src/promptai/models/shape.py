"""The shape of a model: the numbers that decide its size and its speed.

A catalogue entry carries one, a synthetic model is written from one, a forecast
is made of one. So it stands apart from all three. What follows from it (which
tensors there are, how they are quantised) is in ``models.tensors``. Pure.
"""

import msgspec


class Shape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """
    What decides a transformer's speed and size.

    Attributes:
        layers: Transformer blocks.
        width: Embedding length.
        heads: Attention heads; ``kv_heads`` of keys and values.
        ffn: Width of the feed-forward layer.
        vocabulary: Rows of the embedding, padding included.
        context: Tokens that it was made for.
        architecture: llama.cpp's name: ``llama``, ``qwen3``, ``phi3`` …
        head_length: Numbers of one head; absent: width / heads.
        rotated: Numbers of a head that the position rotates; absent: all.
        tied: Whether the output matrix is the embedding, stored once.
        sliding_window: Tokens that some layers look back; absent: all layers see everything.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    ffn: int
    vocabulary: int
    context: int = 8192
    architecture: str = "llama"
    head_length: int | None = None
    rotated: int | None = None
    tied: bool = False
    sliding_window: int | None = None

    @property
    def head(self) -> int:
        """Numbers of one head."""
        return self.head_length or self.width // self.heads
