"""Load a workload, and select the conversations that a run plays.

A workload is selected before anything starts, and the manifest records the rule in words. A
resumed run plays exactly the conversations that its first session selected. Nothing is written here.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from random import Random

import msgspec

from promptai.bench.oasst1 import FILENAME, REPOSITORY, load_oasst1
from promptai.bench.oasst1 import NAME as OASST1
from promptai.bench.plan import Protocol, WarmUpRates, conversation_seconds, fit_budget, stratified
from promptai.bench.workload import EDGE_50, Conversation, Workload, load_bundled, load_jsonl
from promptai.errors import SettingsError, WorkloadError
from promptai.models.hub import fetch_dataset_file


def load_workload(source: str) -> Workload:
    """
    Load ``edge-50``, ``oasst1`` (from the hub unless cached), ``oasst1:FILE`` or a .jsonl file.

    The ``source`` of a file is an absolute path, so a run can be resumed from any directory.

    Raises:
        WorkloadError: It is malformed or cannot be read.
        HubError: The hub cannot deliver it.
    """
    if source == EDGE_50:
        return load_bundled()
    if source == OASST1:
        return load_oasst1(fetch_dataset_file(REPOSITORY, FILENAME))
    if source.startswith(f"{OASST1}:"):
        path = Path(source.removeprefix(f"{OASST1}:"))
        return load_oasst1(path, source=f"{OASST1}:{path.absolute()}")
    path = Path(source)
    return msgspec.structs.replace(load_jsonl(path), source=str(path.absolute()))


def choose_conversations(workload: Workload, *, count: int | None, seed: int) -> tuple[list[Conversation], str]:
    """Return the conversations to play and the rule of selection in words; ``count`` ``None``: all."""
    everything = list(workload.conversations)
    if count is None or count >= len(everything):
        return everything, "all"
    if count < 1:
        raise SettingsError(f"--conversations must be at least 1, not {count}")
    part = stratified(everything, count, Random(seed))  # noqa: S311  reproducible, not secret
    return part, f"{count} of {len(everything)}, one from each of {count} strata by length, seed {seed}"


def cut_to_budget(
    conversations: Sequence[Conversation],
    selection: str,
    protocol: Protocol,
    rates: Mapping[str, WarmUpRates],
    budget_s: float,
) -> tuple[list[Conversation], str]:
    """
    Return the part of the workload that fits ``budget_s`` on all targets together, and the rule in words.

    Args:
        selection: The rule that selected ``conversations``, in words.

    Raises:
        SettingsError: No conversation fits.
    """

    def seconds(conversation: Conversation) -> float:
        return protocol.repeats * sum(
            conversation_seconds(conversation, cache, rate, protocol.history)
            for rate in rates.values()
            for cache in protocol.caches
        )

    def generator_for(count: int) -> Random:
        return Random(f"{protocol.seed}/{count}")  # noqa: S311  reproducible, not secret

    part = fit_budget(conversations, budget_s, seconds, generator_for)
    if not part:
        shortest = min(seconds(conversation) for conversation in conversations)
        raise SettingsError(
            f"the shortest conversation takes about {shortest:.0f} s here, over the budget of {budget_s:.0f} s",
            hint="use a larger --budget or a smaller --max-tokens",
        )
    everything, these = ("", "") if selection == "all" else (f"{selection}; then ", "these ")
    total = len(conversations)
    if len(part) == total:
        return part, f"{everything}all{' of these' if these else ''}, which fit the budget of {budget_s:.0f} s"
    if len(part) == 1 and part != stratified(conversations, 1, generator_for(1)):
        return (
            part,
            f"{everything}the shortest of {these}{total}: no stratified selection fits a budget of {budget_s:.0f} s",
        )
    return part, (
        f"{everything}{len(part)} of {these}{total}, one from each of {len(part)} strata by length, "
        f"as many as fit a budget of {budget_s:.0f} s, seed {protocol.seed}"
    )


def reload_selected(workload: Workload, sha256: str, selected: Iterable[str]) -> list[Conversation]:
    """
    Return the conversations that the first session selected.

    Raises:
        WorkloadError: The workload has changed.
    """
    if workload.sha256 != sha256:
        raise WorkloadError(
            f"workload {workload.source} has changed since the run began",
            hint="start a new run instead of --resume",
        )
    by_id = {conversation.id: conversation for conversation in workload.conversations}
    return [by_id[id_] for id_ in selected]
