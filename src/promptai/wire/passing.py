"""Former names of types in ``promptai.wire``."""

from promptai.wire.inference import InferenceRequest, Prompt, assistant_turn
from promptai.wire.llamaserver import NativeChunk
from promptai.wire.openai import ChunkChoice, CompletionChunk, CompletionResponse, Delta, Logprobs, TokenId, Usage

PassingRequest = InferenceRequest
PassingChunk = CompletionChunk
PassingReply = CompletionResponse
PassingChoice = ChunkChoice
PassingDelta = Delta
PassingUsage = Usage
answered = assistant_turn

__all__ = [
    "Logprobs",
    "NativeChunk",
    "PassingChoice",
    "PassingChunk",
    "PassingDelta",
    "PassingReply",
    "PassingRequest",
    "PassingUsage",
    "Prompt",
    "TokenId",
    "answered",
]
