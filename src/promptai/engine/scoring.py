"""Exact log-likelihoods of given text, over llama-server's HTTP API.

llama-server refuses ``echo``, which is why likelihood tasks of common harnesses
fail against it. But ``n_probs`` reports the *raw* log-probability of the token
that was sampled, and ``logit_bias`` decides which one that is: so each token of the
continuation is forced in turn and its probability read off. Against a full
softmax this agreed to 1e-6 for every token tried (b11434, b11549). With the
prompt cache on, each further token costs one decode step.
"""

from collections.abc import Sequence

from promptai.engine.client import EngineClient
from promptai.errors import EngineProtocolError

#: Larger than any real logit: the forced token wins whatever the model thinks.
_FORCE = 1000.0


async def continuation_logprobs(
    client: EngineClient, context: Sequence[int], continuation: Sequence[int]
) -> list[float]:
    """
    Natural-log probability of each token of ``continuation`` after ``context``.

    Args:
        context: Token ids that stand before; at least one (the begin token, say).
        continuation: Token ids to score.

    Raises:
        ValueError: ``context`` is empty: there is nothing to condition on.
        EngineError: The engine failed, or does not report probabilities.
    """
    if not context:
        raise ValueError("a continuation needs at least one token before it")
    found = []
    for position, target in enumerate(continuation):
        answer = await client.complete(
            {
                "prompt": [*context, *continuation[:position]],
                "n_predict": 1,
                "temperature": 0,
                "n_probs": 1,
                "logit_bias": [[target, _FORCE]],
                "cache_prompt": True,
            }
        )
        if not answer.completion_probabilities or answer.completion_probabilities[0].id != target:
            raise EngineProtocolError(
                f"{client.base_url} did not report the probability of the token that was forced",
                hint="scoring needs a llama-server that knows n_probs and logit_bias",
            )
        found.append(answer.completion_probabilities[0].logprob)
    return found
