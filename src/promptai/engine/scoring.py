"""Exact log-likelihoods of a given text, over llama-server's HTTP API.

llama-server rejects ``echo``, so the likelihood tasks of common harnesses fail against it. But ``n_probs`` reports the
*raw* log-probability of the sampled token, and ``logit_bias`` decides which token is sampled. So each token of the
continuation is forced in turn and its probability read. This agreed with a full softmax to 1e-6 for every token tried
(b11434, b11549). With the prompt cache on, each further token costs one decode step.
"""

from collections.abc import Sequence

from promptai.engine.client import EngineClient
from promptai.errors import EngineProtocolError, EngineRefusedError
from promptai.wire.llamaserver import TokenProbability

#: Larger than any real logit, so the forced token always wins.
_FORCE = 1000.0


async def continuation_logprobs(
    client: EngineClient, context: Sequence[int], continuation: Sequence[int]
) -> list[float]:
    """
    Return the natural-log probability of each token of ``continuation`` after ``context``.

    Args:
        context: Token ids before the continuation; at least one, for example the begin token.
        continuation: Token ids to score.

    Raises:
        ValueError: ``context`` is empty.
        EngineError: The engine failed, or does not report probabilities.
    """
    if not context:
        raise ValueError("a continuation needs at least one token before it")
    found = []
    for position, target in enumerate(continuation):
        prompt = [*context, *continuation[:position]]
        reported = await force_token(client, prompt, target, n_probs=1)
        if reported is not None and reported.id != target:
            raise _unable(client)
        found.append(await _from_all(client, prompt, target) if reported is None else reported.logprob)
    return found


async def _from_all(client: EngineClient, prompt: list[int], target: int) -> float:
    """
    Force another token, and read the probability of ``target`` from those of the whole vocabulary.

    llama-server reports nothing for a token that ends inside a UTF-8 character, because it waits for the rest. This way
    is exact but slow, and needed for few tokens.
    """
    try:
        letter = (await client.tokenize("a"))[-1]
        reported = await force_token(client, prompt, letter, n_probs=await client.vocabulary() or 1)
    except (EngineProtocolError, EngineRefusedError):
        raise _unable(client) from None
    for candidate in reported.top_logprobs if reported is not None else ():
        if candidate.id == target:
            return candidate.logprob
    raise _unable(client)


def _unable(client: EngineClient) -> EngineProtocolError:
    return EngineProtocolError(
        f"{client.base_url} did not report the probability of the forced token",
        hint="scoring needs a llama-server that supports n_probs and logit_bias",
    )


async def force_token(
    client: EngineClient, prompt: Sequence[int], forced: int, *, n_probs: int = 1
) -> TokenProbability | None:
    """
    Force one token after ``prompt``, and return the model's own probabilities for that position.

    Returns:
        The raw probability of the forced token with the ``n_probs`` likeliest ones; ``None`` in the middle of a UTF-8
        character, where llama-server reports nothing.
    """
    answer = await client.complete(
        {
            "prompt": list(prompt),
            "n_predict": 1,
            "temperature": 0,
            "n_probs": n_probs,
            "logit_bias": [[forced, _FORCE]],
            "cache_prompt": True,
        }
    )
    return answer.completion_probabilities[0] if answer.completion_probabilities else None
