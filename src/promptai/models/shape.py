"""The shape of a model: the dimensions that determine its size and speed.

Catalogue entries, synthetic models and forecasts all use it, so it has a module of its
own. ``models.tensors`` derives the tensors and their quantisation from it. Pure.
"""

import msgspec


class Shape(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """
    The dimensions of a transformer.

    Attributes:
        layers: Transformer blocks.
        width: Embedding length.
        heads: Query heads; ``kv_heads`` is the number of key and value heads.
        ffn: Width of the feed-forward layer.
        vocabulary: Rows of the embedding, padding included.
        context: Context length that the model was trained for, in tokens.
        architecture: llama.cpp's name: ``llama``, ``qwen3``, ``phi3`` …
        head_length: Dimensions of one head; ``None`` for width / heads.
        rotated: Dimensions of a head that rotary embedding rotates; ``None`` for all.
        tied: Whether the output matrix is the embedding, stored once.
        sliding_window: Tokens that some layers attend to; ``None`` when all layers attend to the whole context.
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
        """Dimensions of one head."""
        return self.head_length or self.width // self.heads
