"""Turn options into a run that can start: check everything that can be checked, then create its directory.

A damaged model, a malformed workload or too little memory must fail within the first second, not
after an hour of measuring another model. ``prepare`` starts a run and ``prepare_resume`` continues
one; both return a ``Prepared``, which ``bench.runner`` plays. Nothing is written before all checks
have passed.
"""

import asyncio
import shutil
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol as Interface

import msgspec

from promptai.bench.manifest import (
    MachineFacts,
    Manifest,
    TargetFacts,
    describe_machine,
    describe_packages,
    describe_workload,
    verify_same_machine,
)
from promptai.bench.options import BenchOptions
from promptai.bench.plan import WarmUpRates, typical_prompt
from promptai.bench.recorder import create_run, discard, read_manifest
from promptai.bench.selection import choose_conversations, cut_to_budget, load_workload, reload_selected
from promptai.bench.target_facts import describe_targets, parse_targets, verify_unchanged
from promptai.bench.warmup import measure_rates
from promptai.bench.workload import Conversation
from promptai.device.cpu import board_slug
from promptai.device.memory import read_memory
from promptai.engine.locate import locate

#: Largest share of a time budget spent on measuring rates before the workload is cut to it.
_RATES_SHARE = 0.05


class Prepared(msgspec.Struct, frozen=True):
    """
    A run that can start.

    Attributes:
        directory: Its directory, which contains at least the manifest.
        conversations: The selected ones, in order.
        api_key: For servers that require one.
        silence_s: Longest wait for the next bytes of an answer.
    """

    directory: Path
    manifest: Manifest
    conversations: list[Conversation]
    api_key: str | None
    silence_s: float


class PrepareObserver(Interface):
    """A display of the slow steps."""

    def step(self, description: str) -> AbstractContextManager[object]:
        """Show ``description`` while the block runs."""

    def hashing(self) -> AbstractContextManager[Callable[[int], None]]:
        """Show the bytes that are passed to the function while the block runs."""

    def log_kept(self, log: Path) -> None:
        """Name the log of an engine that failed."""


def prepare(options: BenchOptions, observer: PrepareObserver) -> Prepared:
    """
    Check the options, the workload and every target, and create the run's directory.

    Raises:
        PromptAIError: The run cannot start: options, workload, a model, an engine or the directory are at fault.
    """
    protocol = options.protocol()
    with observer.step("reading the workload"):  # slow if the hub has to send it
        workload = load_workload(options.workload)
    conversations, selection = choose_conversations(workload, count=options.conversations, seed=protocol.seed)
    sources = parse_targets(options.targets, options.library)
    machine = describe_machine()
    with observer.hashing() as hashed:
        targets = describe_targets(
            sources,
            conversations,
            options,
            engine=lambda: locate(options.engine_path, cache=options.engines),
            cpu=machine.cpu,
            available_bytes=read_memory().available_for_new_process(),
            hashing=hashed,
        )
    manifest = Manifest(
        created=datetime.now(UTC).isoformat(timespec="milliseconds"),
        command=options.command,
        machine=machine,
        workload=describe_workload(workload, conversations, selection),
        protocol=protocol,
        targets=tuple(targets),
        packages=describe_packages(),
    )
    if options.budget_s is not None:
        rates = _measure_rates(manifest, conversations, options, options.budget_s, observer)
        conversations, selection = cut_to_budget(conversations, selection, protocol, rates, options.budget_s)
        manifest = msgspec.structs.replace(
            manifest, workload=describe_workload(workload, conversations, selection), budget_s=options.budget_s
        )
    directory = create_run(options.runs, manifest, label=_label(targets, machine), now=datetime.now(UTC))
    return Prepared(directory, manifest, conversations, options.api_key, options.silence_s)


def prepare_resume(directory: Path, *, api_key: str | None, silence_s: float, observer: PrepareObserver) -> Prepared:
    """
    Check that a run can continue: same machine, same workload, same model files.

    Raises:
        RunError: There is no such run, or it started on another machine.
        WorkloadError: The workload has changed.
        ModelError: A model file is missing or has changed.
    """
    manifest = read_manifest(directory)
    verify_same_machine(manifest.machine, describe_machine())
    workload = load_workload(manifest.workload.source)
    conversations = reload_selected(workload, manifest.workload.sha256, manifest.workload.selected)
    with observer.hashing() as hashed:
        for target in manifest.targets:
            verify_unchanged(target, hashed)
    return Prepared(directory, manifest, conversations, api_key, silence_s)


def _measure_rates(
    manifest: Manifest,
    conversations: list[Conversation],
    options: BenchOptions,
    budget_s: float,
    observer: PrepareObserver,
) -> dict[str, WarmUpRates]:
    """Open every target briefly to measure its rates for the budget; the log of an engine that fails is kept."""
    logs = Path(tempfile.mkdtemp(prefix="promptai-"))
    try:
        with observer.step("measuring the targets briefly"):
            rates = asyncio.run(
                measure_rates(
                    manifest,
                    typical_prompt(conversations, manifest.protocol.history),
                    at_most_s=_RATES_SHARE * budget_s,
                    api_key=options.api_key,
                    silence_s=options.silence_s,
                    logs=logs,
                )
            )
    except BaseException as error:
        kept = discard(logs, error)
        if kept is not None:
            observer.log_kept(kept)
        raise
    shutil.rmtree(logs)
    return rates


def _label(targets: list[TargetFacts], machine: MachineFacts) -> str:
    """Targets and board, for the name of the run's directory."""
    more = f"+{len(targets) - 1}" if len(targets) > 1 else ""
    return f"{targets[0].name}{more}_{board_slug(machine.board)}"
