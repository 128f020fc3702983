"""Which requests the engine counts as the same text as the gateway (characters per token)."""

from typing import Any

import pytest

from promptai.router.failover.protocol import is_prompt_comparable
from promptai.wire.inference import InferenceRequest

TEXT = {"type": "text", "text": "up?"}


def chat(content: object, **fields: Any) -> InferenceRequest:
    return InferenceRequest(messages=[{"role": "user", "content": content}], **fields)


@pytest.mark.parametrize(
    "request_", [chat("up?"), chat([TEXT]), InferenceRequest(prompt="up?"), InferenceRequest(input="up?")]
)
def test_one_text_is_comparable(request_: InferenceRequest) -> None:
    assert is_prompt_comparable(request_)


@pytest.mark.parametrize(
    "request_",
    [
        chat([TEXT, {"type": "image_url"}]),
        chat("up?", n=2),
        InferenceRequest(prompt=["up?", "down?"]),
        InferenceRequest(prompt=[7, 8, 9]),
        InferenceRequest(prompt="up?", n=2),
        InferenceRequest(input=["up?", "down?"]),
        InferenceRequest(input=[[7], [8]]),
    ],
    ids=str,
)
def test_images_ids_and_several_prompts_are_not_comparable(request_: InferenceRequest) -> None:
    """Four requests with several prompts once cut the estimate of every prompt to a fifth."""
    assert not is_prompt_comparable(request_)
