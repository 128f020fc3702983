"""Add up what engines report for the answers of one request.

llama-server reports timings and usage for each answer separately. With several prompts, or several answers to one
prompt, the last report covers one answer only, and a key charged by it pays a fraction. So the reports are kept by
answer and combined here, for the charge, the metrics and the response alike. Pure.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from promptai.wire.llamaserver import Timings
from promptai.wire.openai import CompletionChunk, PromptTokensDetails, Usage

Report = TypeVar("Report")


class UsageTally:
    """
    Timings and usage of one request's answers.

    Args:
        alternatives: Answers per prompt; the answers to one prompt have consecutive indices.
    """

    def __init__(self, alternatives: int = 1) -> None:
        self._alternatives = max(1, alternatives)
        self._timings: dict[int, Timings] = {}
        self._usages: dict[int, Usage] = {}
        self._index = 0

    def add(self, chunk: CompletionChunk) -> None:
        """Take the reports in a chunk; without choices beside them, they belong to the previous chunk's answer."""
        for choice in chunk.choices or ():
            self._index = choice.index
        self.record(timings=chunk.timings, usage=chunk.usage, index=self._index)

    def record(self, *, timings: Timings | None = None, usage: Usage | None = None, index: int = 0) -> None:
        """Record reports for one answer; later ones replace earlier ones."""
        if timings is not None:
            self._timings[index] = timings
        if usage is not None:
            self._usages[index] = usage

    def timings(self) -> Timings | None:
        """Return the combined timings of all answers in tokens and ms; ``None`` without a report."""
        if len(self._timings) <= 1:
            return next(iter(self._timings.values()), None)
        prompts = self._by_prompt(self._timings, lambda report: report.prompt_n)
        return Timings(
            prompt_n=sum(report.prompt_n for report in prompts),
            prompt_ms=sum(report.prompt_ms for report in prompts),
            predicted_n=sum(report.predicted_n for report in self._timings.values()),
            predicted_ms=sum(report.predicted_ms for report in self._timings.values()),
            cache_n=_total(report.cache_n for report in prompts),
        )

    def usage(self) -> Usage | None:
        """Return the combined usage of all answers; ``None`` without a report, or for a count that one lacks."""
        if len(self._usages) <= 1:
            return next(iter(self._usages.values()), None)
        prompts = self._by_prompt(
            self._usages, lambda report: (report.prompt_tokens or 0) - (report.cached_tokens or 0)
        )
        return Usage(
            prompt_tokens=_total(report.prompt_tokens for report in prompts),
            completion_tokens=_total(report.completion_tokens for report in self._usages.values()),
            prompt_tokens_details=PromptTokensDetails(_total(report.cached_tokens for report in prompts)),
        )

    @property
    def usage_reports(self) -> int:
        """Number of answers with a usage report."""
        return len(self._usages)

    def _by_prompt(self, reports: Mapping[int, Report], computed: Callable[[Report], float]) -> list[Report]:
        """Return one report per prompt: the one whose answer computed most of the shared prompt."""
        chosen: dict[int, Report] = {}
        for index, report in sorted(reports.items(), key=lambda item: item[0]):
            first = chosen.setdefault(index // self._alternatives, report)
            if computed(report) > computed(first):
                chosen[index // self._alternatives] = report
        return list(chosen.values())


def _total(counts: Iterable[int | None]) -> int | None:
    """Return the sum; ``None`` if one count is unknown."""
    known = list(counts)
    return None if None in known else sum(count for count in known if count is not None)
