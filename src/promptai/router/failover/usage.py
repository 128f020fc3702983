"""What engines say that a request took, of all its answers together.

llama-server tells it of each answer by itself; of several prompts, or several answers to one, the
last account is that of one of them, and a key that pays for it pays a fraction. Pure.
"""

from promptai.wire.llamaserver import Timings
from promptai.wire.openai import CompletionChunk


class UsageTally:
    """
    The accounts of one request's answers.

    Args:
        alternatives: Answers to each of its prompts; their indices stand together.
    """

    def __init__(self, alternatives: int = 1) -> None:
        self._alternatives = max(1, alternatives)
        self._told: dict[int, Timings] = {}
        self._index = 0

    def take(self, chunk: CompletionChunk) -> None:
        """Look into a chunk; an account without an answer beside it is that of the answer before it."""
        for choice in chunk.choices or ():
            self._index = choice.index
        if chunk.timings is not None:
            self.note(chunk.timings, self._index)

    def note(self, timings: Timings, index: int = 0) -> None:
        """An account of an answer; the last one counts."""
        self._told[index] = timings

    def total(self) -> Timings | None:
        """
        The sum, in tokens and ms; ``None`` while nothing was told.

        Answers to one prompt share it: it counts once, as whoever had most to compute of it says. What was cached is
        only known if it is of every prompt.
        """
        if len(self._told) <= 1:
            return next(iter(self._told.values()), None)
        prompts: dict[int, Timings] = {}
        for index, told in sorted(self._told.items()):
            first = prompts.setdefault(index // self._alternatives, told)
            if told.prompt_n > first.prompt_n:
                prompts[index // self._alternatives] = told
        cached = [one.cache_n for one in prompts.values() if one.cache_n is not None]
        return Timings(
            prompt_n=sum(one.prompt_n for one in prompts.values()),
            prompt_ms=sum(one.prompt_ms for one in prompts.values()),
            predicted_n=sum(one.predicted_n for one in self._told.values()),
            predicted_ms=sum(one.predicted_ms for one in self._told.values()),
            cache_n=sum(cached) if len(cached) == len(prompts) else None,
        )
