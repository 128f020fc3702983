"""From what the user asked for to a manifest: check everything that can be checked before anything starts.

Whatever is wrong with a model, a workload or a memory budget should be said in
the first second, not after an hour of measuring the other model. Nothing is
written here.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from random import Random

import msgspec

from promptai.bench.manifest import TargetFacts
from promptai.bench.oasst1 import FILENAME, REPOSITORY, load_oasst1
from promptai.bench.oasst1 import NAME as OASST1
from promptai.bench.plan import (
    Protocol,
    WarmUpRates,
    chars_per_token,
    context_needed,
    conversation_seconds,
    fit_budget,
    stratified,
)
from promptai.bench.target import check_fits, describe_model, describe_url, is_url, sha256_of
from promptai.bench.workload import EDGE_50, Conversation, Workload, load_bundled, load_jsonl
from promptai.device.cpu import CpuFacts, default_threads
from promptai.engine.flags import EngineFlags
from promptai.engine.locate import EngineBinary, missing_features
from promptai.errors import ModelError, SettingsError, WorkloadError
from promptai.models.gguf import GgufHeader, read_header
from promptai.models.hub import fetch_dataset_file
from promptai.models.synth import BORROWED_TOKENS


class EngineOptions(msgspec.Struct, frozen=True):
    """
    What the user wants of engines; ``None`` leaves the choice to us.

    Attributes:
        context: Tokens of context of *one* slot.
        port: 0 takes a free one.
    """

    threads: int | None = None
    context: int | None = None
    slots: int = 1
    batch: int = 512
    cache_type: str = "f16"
    cache_ram_mib: int = 0
    mmap: bool = True
    port: int = 0


def load_workload(source: str) -> Workload:
    """
    ``edge-50``, ``oasst1`` (fetched from the hub when it is not cached), ``oasst1:FILE`` or a .jsonl file.

    Its ``source`` names a file absolutely, so that a run goes on from any folder.

    Raises:
        WorkloadError: It is malformed or cannot be read.
        PromptAIError: The hub cannot give it.
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


def describe_targets(
    sources: Sequence[str],
    conversations: Sequence[Conversation],
    protocol: Protocol,
    options: EngineOptions,
    *,
    engine: Callable[[], EngineBinary],
    cpu: CpuFacts,
    available_bytes: int,
    hashing: Callable[[int], None] | None = None,
) -> list[TargetFacts]:
    """
    Check every target and decide its engine's flags.

    Model files are named absolutely, so that a run goes on from any folder; as they were given they
    stand in the manifest's command line.

    Args:
        sources: Paths of GGUF files or URLs of servers.
        engine: Finds the engine; called once, and only if a file is among the sources.
        hashing: Told how many bytes were hashed, for a progress display.

    Raises:
        ModelError: A file is missing, damaged or too large for the memory that is left.
        EngineError: There is no usable engine.
    """
    headers = {source: read_header(Path(source)) for source in sources if not is_url(source)}
    binary = engine() if headers else None
    names = unique_names([_stem(source) for source in sources])
    found = []
    for source, name in zip(sources, names, strict=True):
        if binary is None or source not in headers:
            found.append(describe_url(source, name))
            continue
        header = headers[source]
        if header.split is not None:
            raise ModelError(
                f"{source} is part {header.split[0] + 1} of {header.split[1]}: its size and checksum say too little",
                hint="join the parts first: llama-gguf-split --merge FIRST-PART WHOLE.gguf",
            )
        context = _context(header, conversations, protocol, options.context)
        check_fits(header, context * options.slots, available_bytes, cache_type=options.cache_type)
        flags = EngineFlags(
            model=str(Path(source).absolute()),
            port=options.port,
            threads=options.threads or default_threads(cpu),
            context=context * options.slots,
            slots=options.slots,
            batch=options.batch,
            ubatch=options.batch,
            cache_type_k=options.cache_type,
            cache_type_v=options.cache_type,
            cache_ram_mib=options.cache_ram_mib,
            mmap=options.mmap,
        )
        missing = missing_features(binary, cpu.features)
        sha256 = sha256_of(Path(source), hashing)
        found.append(describe_model(header, flags, binary, name=name, missing=missing, sha256=sha256))
    return found


def choose_conversations(workload: Workload, *, count: int | None, seed: int) -> tuple[list[Conversation], str]:
    """The conversations to play and how they were chosen, in words; ``count`` ``None`` takes all."""
    everything = list(workload.conversations)
    if count is None or count >= len(everything):
        return everything, "all"
    if count < 1:
        raise SettingsError(f"{count} conversations cannot be played", hint="give at least 1")
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
    The part of the workload that all targets together can play in ``budget_s``, and how it was chosen.

    Args:
        selection: How ``conversations`` were chosen, in words.

    Raises:
        SettingsError: Not even one conversation fits.
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
            f"the shortest conversation takes about {shortest:.0f} s on these targets, the budget is {budget_s:.0f} s",
            hint="give a larger --budget, or a smaller --max-tokens",
        )
    everything, these = ("", "") if selection == "all" else (f"{selection}; then ", "these ")
    total = len(conversations)
    if len(part) == total:
        return part, f"{everything}all{' of these' if these else ''}, which fit the budget of {budget_s:.0f} s"
    if len(part) == 1 and part != stratified(conversations, 1, generator_for(1)):
        return part, f"{everything}the shortest of {these}{total}: no even draw fits a budget of {budget_s:.0f} s"
    return part, (
        f"{everything}{len(part)} of {these}{total}, one from each of {len(part)} strata by length, "
        f"as many as fit a budget of {budget_s:.0f} s, seed {protocol.seed}"
    )


def reload_selected(workload: Workload, sha256: str, selected: Iterable[str]) -> list[Conversation]:
    """
    The conversations that an earlier session selected.

    Raises:
        WorkloadError: The workload is no longer the same.
    """
    if workload.sha256 != sha256:
        raise WorkloadError(
            f"workload {workload.source} has changed since the run began",
            hint="start a new run instead of --resume",
        )
    by_id = {conversation.id: conversation for conversation in workload.conversations}
    return [by_id[id_] for id_ in selected]


def _context(header: GgufHeader, conversations: Sequence[Conversation], protocol: Protocol, wished: int | None) -> int:
    """Tokens of context of one slot: the user's, else what the workload needs, as far as the model goes."""
    most = header.context_length
    if wished is not None:
        if most is not None and wished > most:
            raise SettingsError(
                f"--context {wished} is more than the {most} tokens that {header.path} was made for",
                hint=f"give at most {most}",
            )
        return wished
    needed = context_needed(
        conversations,
        protocol.max_tokens,
        chars_per_token=_chars_per_token(header),
        history=protocol.history,
    )
    return min(needed, most or needed)


def _chars_per_token(header: GgufHeader) -> float:
    """Synthetic models speak promptai-tiny's tokens, however many they have, and toys one token a byte."""
    if not header.synthetic:
        return chars_per_token(header.vocabulary)
    return chars_per_token(BORROWED_TOKENS) if (header.vocabulary or 0) >= BORROWED_TOKENS else 1.0


def unique_names(names: Sequence[str]) -> list[str]:
    """The same names, numbered where two are alike."""
    found: list[str] = []
    for name in names:
        candidate, number = name, 2
        while candidate in found:
            candidate, number = f"{name}-{number}", number + 1
        found.append(candidate)
    return found


def _stem(source: str) -> str:
    if is_url(source):
        return source.split("://", 1)[1].split("/", maxsplit=1)[0].rsplit("@", 1)[-1].replace(":", "-")
    return Path(source).stem
