"""Check the targets of a run and describe them for its manifest, before anything starts.

A model file is checked for its header, completeness and size: an error with numbers within a
second is better than the kernel's killing the engine after five minutes. Starting an engine or
connecting to a server is ``bench.target``'s part.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from promptai.bench.manifest import EngineFacts, ModelFacts, TargetFacts
from promptai.bench.options import BenchOptions
from promptai.bench.plan import chars_per_token, context_needed
from promptai.bench.workload import Conversation
from promptai.device.cpu import CpuFacts, default_threads
from promptai.engine.flags import BYTES_PER_VALUE, EngineFlags
from promptai.engine.locate import EngineBinary, missing_features
from promptai.engine.url import EngineUrl, looks_like_url
from promptai.errors import ModelError, ModelTooLargeError, SettingsError
from promptai.models.bundled import bundled_model
from promptai.models.gguf import GgufHeader, read_header
from promptai.models.library import Library, resolve
from promptai.models.synth import BORROWED_TOKENS

_GIB = 1024**3


def parse_targets(given: Sequence[str], library: Path) -> list[EngineUrl | Path]:
    """
    Resolve the targets that a user named; the bundled model if there are none.

    Args:
        given: URLs of servers, paths of GGUF files, or names of models in the library.
        library: Its directory.

    Raises:
        SettingsError: A URL is invalid, or contains a user name or a password.
        ModelNotFoundError: A name matches neither a file nor a model in the library.
        ModelError: A name matches several models in the library.
    """
    if not given:
        return [bundled_model()]
    models = Library(library)
    return [EngineUrl.parse(text) if looks_like_url(text) else resolve(text, models) for text in given]


def describe_targets(
    sources: Sequence[EngineUrl | Path],
    conversations: Sequence[Conversation],
    options: BenchOptions,
    *,
    engine: Callable[[], EngineBinary],
    cpu: CpuFacts,
    available_bytes: int,
    hashing: Callable[[int], None] | None = None,
) -> list[TargetFacts]:
    """
    Check every target and choose its engine's flags.

    Paths of model files become absolute, so a run can be resumed from any directory; the manifest's
    command line keeps them as given.

    Args:
        engine: Finds the engine; called once, and only if a file is among the sources.
        hashing: Receives the number of bytes hashed, for a progress display.

    Raises:
        ModelError: A file is missing, damaged, one of several parts, or too large for the available memory.
        SettingsError: ``--context`` exceeds the model's own.
        EngineError: No engine is usable.
    """
    headers = {source: read_header(source) for source in sources if isinstance(source, Path)}
    binary = engine() if headers else None
    found = []
    for source, name in zip(sources, unique_names([_name(source) for source in sources]), strict=True):
        if isinstance(source, EngineUrl):
            found.append(TargetFacts(name=name, url=source.text))
        elif binary is not None:
            header = headers[source]
            flags = _flags(header, source, conversations, options, cpu, available_bytes)
            missing = missing_features(binary, cpu.features)
            sha256 = sha256_of(source, hashing)
            found.append(describe_model(header, flags, binary, name=name, missing=missing, sha256=sha256))
    return found


def _flags(
    header: GgufHeader,
    path: Path,
    conversations: Sequence[Conversation],
    options: BenchOptions,
    cpu: CpuFacts,
    available_bytes: int,
) -> EngineFlags:
    """Return the flags of the engine that serves a model file, if the file is whole and fits the memory."""
    if header.split is not None:
        raise ModelError(
            f"{path} is part {header.split[0] + 1} of {header.split[1]}: its size and checksum cover one part only",
            hint="join the parts first: llama-gguf-split --merge FIRST-PART WHOLE.gguf",
        )
    context = _context(header, conversations, options) * options.slots
    check_fits(header, context, available_bytes, cache_type=options.cache_type)
    return EngineFlags(
        model=str(path.absolute()),
        port=options.port,
        threads=options.threads or default_threads(cpu),
        context=context,
        slots=options.slots,
        batch=options.batch,
        ubatch=options.batch,
        cache_type_k=options.cache_type,
        cache_type_v=options.cache_type,
        cache_ram_mib=options.cache_ram_mib,
        mmap=options.mmap,
    )


def describe_model(
    header: GgufHeader,
    flags: EngineFlags,
    engine: EngineBinary,
    *,
    name: str,
    missing: list[str],
    sha256: str,
) -> TargetFacts:
    """Describe a model file and the engine that will serve it."""
    model = ModelFacts(
        path=flags.model,
        sha256=sha256,
        file_bytes=header.file_bytes,
        name=header.name,
        architecture=header.architecture,
        parameters=header.parameters,
        quantization=header.quantization,
        context_length=header.context_length,
        synthetic=header.synthetic,
    )
    facts = EngineFacts(engine.source, engine.command, engine.build, engine.features, tuple(missing), flags)
    return TargetFacts(name=name, model=model, engine=facts)


def check_fits(header: GgufHeader, context: int, available_bytes: int, *, cache_type: str = "f16") -> None:
    """
    Reject a model whose weights and KV cache alone exceed the available memory.

    This is a lower bound, because compute buffers are extra: a model that fits is never rejected. The cache
    of a model with a sliding window is smaller than its context and counts as 0.

    Raises:
        ModelTooLargeError: The message contains the numbers.
    """
    per_token = header.kv_bytes_per_token(bytes_per_value=BYTES_PER_VALUE[cache_type])
    kv_bytes = 0 if header.sliding_window else (per_token or 0) * context
    needed = header.tensor_bytes + kv_bytes
    if needed > available_bytes:
        raise ModelTooLargeError(
            f"{header.path} needs at least {needed / _GIB:.2f} GiB (weights {header.tensor_bytes / _GIB:.2f}, "
            f"KV cache {kv_bytes / _GIB:.2f} for {context} tokens); {available_bytes / _GIB:.2f} GiB are available",
            hint="use a smaller model, a smaller quantisation or a smaller --context",
        )


def _context(header: GgufHeader, conversations: Sequence[Conversation], options: BenchOptions) -> int:
    """Tokens of context of one slot: as requested, else enough for the workload, capped at the model's own."""
    most = header.context_length
    if options.context is not None:
        if most is not None and options.context > most:
            raise SettingsError(
                f"--context {options.context} exceeds the {most} tokens that {header.path} supports",
                hint=f"use at most {most}",
            )
        return options.context
    needed = context_needed(
        conversations,
        options.max_tokens,
        chars_per_token=_chars_per_token(header),
        history=options.history,
    )
    return min(needed, most or needed)


def _chars_per_token(header: GgufHeader) -> float:
    """Synthetic models have promptai-tiny's tokenizer whatever their vocabulary; the smallest use a token per byte."""
    if not header.synthetic:
        return chars_per_token(header.vocabulary)
    return chars_per_token(BORROWED_TOKENS) if (header.vocabulary or 0) >= BORROWED_TOKENS else 1.0


def unique_names(names: Sequence[str]) -> list[str]:
    """Append numbers to repeated names."""
    found: list[str] = []
    for name in names:
        candidate, number = name, 2
        while candidate in found:
            candidate, number = f"{name}-{number}", number + 1
        found.append(candidate)
    return found


def _name(source: EngineUrl | Path) -> str:
    return source.netloc.replace(":", "-") if isinstance(source, EngineUrl) else source.stem


def verify_unchanged(facts: TargetFacts, progress: Callable[[int], None] | None = None) -> None:
    """
    Refuse to resume with a model file that is not the one measured so far.

    Raises:
        ModelError: The file is missing or has changed.
    """
    if facts.model is None:
        return
    path = Path(facts.model.path)
    read_header(path)
    if sha256_of(path, progress) != facts.model.sha256:
        raise ModelError(f"model {path} has changed since the run began", hint="start a new run instead of --resume")


def sha256_of(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """
    Return the SHA-256 of a file.

    Args:
        progress: Receives the number of bytes in each piece read.
    """
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
            if progress is not None:
                progress(len(piece))
    return digest.hexdigest()
