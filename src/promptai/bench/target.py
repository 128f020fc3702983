"""What is measured: a model file on an engine that we start, or a server that is already there.

Both open into the same thing, a client that can play turns, so that the runner
does not care. A model file is checked before anything is started: header,
completeness, and whether it fits the memory that is left. Being refused with
numbers after a second is kinder than being killed after five minutes.
"""

import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import msgspec

from promptai.bench.manifest import EngineFacts, ModelFacts, TargetFacts
from promptai.engine.client import EngineClient
from promptai.engine.flags import BYTES_PER_VALUE, EngineFlags
from promptai.engine.launch import RunningEngine, free_port
from promptai.engine.locate import EngineBinary
from promptai.errors import EngineDiedError, EngineRefusedError, ModelError, ModelTooLargeError, SettingsError
from promptai.models.gguf import GgufHeader, read_header

_GIB = 1024**3


class OpenTarget(msgspec.Struct, frozen=True):
    """
    A target that answers.

    Attributes:
        client: Connected to it.
        model: The name that requests carry.
        llama_server: Whether it speaks llama-server's dialect.
        pid: The engine's process, when it is ours to watch.
        load_s: Seconds it took to load, when we loaded it.
        death: Why it has gone; ``None`` while it lives, or when it is not ours.
    """

    client: EngineClient
    model: str
    llama_server: bool
    pid: int | None
    load_s: float | None
    death: Callable[[], EngineDiedError | None]


@asynccontextmanager
async def open_target(
    facts: TargetFacts, *, log: Path, api_key: str | None, silence_s: float
) -> AsyncIterator[OpenTarget]:
    """
    Start or reach a target; inside the block it answers.

    Args:
        log: Where an engine that is started writes its log.
        api_key: For servers that demand one.
        silence_s: Longest wait for the next bytes of an answer.

    Raises:
        EngineError: It cannot be started or reached.
    """
    if facts.engine is None or facts.model is None:
        async with EngineClient(facts.url or "", api_key=api_key, silence_s=silence_s) as client:
            yield await _reach(client)
        return
    flags = facts.engine.flags
    if flags.port == 0:
        flags = msgspec.structs.replace(flags, port=free_port())
    binary = EngineBinary(facts.engine.source, facts.engine.command, facts.engine.build, facts.engine.features)
    engine = RunningEngine(binary, flags, log=log)
    async with engine, EngineClient(engine.base_url, silence_s=silence_s) as client:
        yield OpenTarget(client, flags.alias, True, engine.pid, engine.load_s, engine.death)


async def _reach(client: EngineClient) -> OpenTarget:
    try:
        props = await client.props()
    except EngineRefusedError as refused:
        if refused.status in (401, 503):
            raise  # a missing key, or a model that is still loading: no matter of dialect
        models = await client.models()
        if not models:
            raise SettingsError(f"{client.base_url} serves no model", hint="load one there first") from None
        return OpenTarget(client, models[0], False, None, None, lambda: None)
    return OpenTarget(client, props.model_alias or "model", True, None, None, lambda: None)


def is_url(target: str) -> bool:
    """Whether a target given by the user is a server rather than a file."""
    return target.startswith(("http://", "https://"))


def describe_url(url: str, name: str) -> TargetFacts:
    """
    A server by its URL, without credentials: the manifest is meant to be shared.

    Raises:
        SettingsError: It is no usable URL.
    """
    try:
        parts = urlsplit(url)
        usable = bool(parts.hostname) and parts.port != 0  # reading the port checks it
    except ValueError:
        usable = False
    if not usable:
        raise SettingsError(f"{url} is not a server's URL", hint="for example http://127.0.0.1:8080")
    if parts.username or parts.password:
        raise SettingsError("a URL with a password would end up in the run", hint="give it in PROMPTAI_API_KEY instead")
    return TargetFacts(name=name, url=url)


def describe_model(
    header: GgufHeader,
    flags: EngineFlags,
    engine: EngineBinary,
    *,
    name: str,
    missing: list[str],
    sha256: str,
) -> TargetFacts:
    """A model file and the engine it will run on."""
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
    Refuse a model whose weights and KV cache alone exceed the memory that is left.

    Compute buffers come on top, so that this is a lower bound: it never refuses what would fit.
    A model with a sliding window keeps less than its context; its cache counts as nothing here.

    Raises:
        ModelTooLargeError: With the numbers.
    """
    per_token = header.kv_bytes_per_token(bytes_per_value=BYTES_PER_VALUE[cache_type])
    kv_bytes = 0 if header.sliding_window else (per_token or 0) * context
    needed = header.tensor_bytes + kv_bytes
    if needed > available_bytes:
        raise ModelTooLargeError(
            f"{header.path} needs at least {needed / _GIB:.2f} GiB (weights {header.tensor_bytes / _GIB:.2f}, "
            f"KV cache {kv_bytes / _GIB:.2f} for {context} tokens), {available_bytes / _GIB:.2f} GiB are available",
            hint="use a smaller model, a smaller quantisation or a smaller --context",
        )


def verify_unchanged(facts: TargetFacts, progress: Callable[[int], None] | None = None) -> None:
    """
    Refuse to go on with a model file that is no longer the one that was measured.

    Raises:
        ModelError: It has gone, or changed.
    """
    if facts.model is None:
        return
    path = Path(facts.model.path)
    read_header(path)
    if sha256_of(path, progress) != facts.model.sha256:
        raise ModelError(f"model {path} has changed since the run began", hint="start a new run instead of --resume")


def sha256_of(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """
    SHA-256 of a file.

    Args:
        progress: Called with the bytes of each piece that was read.
    """
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
            if progress is not None:
                progress(len(piece))
    return digest.hexdigest()
