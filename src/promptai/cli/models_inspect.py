"""``promptai models inspect``: show a model's header, for local and remote files.

The file's texts are untrusted: control characters are escaped before display, and markup
is not interpreted.
"""

import functools
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.progress import DownloadColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from promptai.errors import ModelFormatError, SettingsError
from promptai.models.bundled import NAME, bundled_model
from promptai.models.gguf import GgufHeader, join_parts, part_names, read_header
from promptai.models.library import Library, resolve
from promptai.models.remote import read_remote_header
from promptai.report import format as fmt
from promptai.settings import load_settings, models_directory

_HUB = re.compile(r"hub:([^/:]+/[^/:]+):(.+\.gguf)", re.IGNORECASE)
_SPECIAL = re.compile(r"tokenizer\.ggml\.(\w+)_token_id")


class TypeShare(msgspec.Struct, frozen=True):
    """The share of a model's tensors that have one type."""

    type: str
    tensors: int
    bytes: int
    share: float


@click.command(
    epilog="""\b
Examples:
  promptai models inspect yi-coder-1.5b.gguf
  promptai models inspect promptai-tiny --tensors
  promptai models inspect hub:OWNER/NAME:FILE.gguf     downloads the header only
"""
)
@click.argument("model", metavar="PATH|NAME|hub:OWNER/NAME:FILE.gguf")
@click.option("--tensors", is_flag=True, help="Also list the tensors.")
@click.option("--template", is_flag=True, help="Print only the chat template.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect(model: str, *, tensors: bool, template: bool, as_json: bool) -> None:
    """Show a model's header, and check that its file is complete."""
    header = _header(model, Console(stderr=True))
    if template:
        if header.chat_template is None:
            raise SettingsError(f"{model} has no chat template", hint="engines fall back to ChatML")
        click.echo(harmless(header.chat_template, keep="\n\t"))
        return
    facts = describe(header)
    if tensors:
        facts["tensors"] = header.tensors
    if as_json:
        click.echo(msgspec.json.encode(facts))
        return
    console = Console()
    console.print(_table(header))
    if tensors:
        console.print(_tensor_table(header))


def describe(header: GgufHeader) -> dict[str, Any]:
    """Return the output of ``--json``; ``None`` for facts that the file does not declare."""
    return {
        "name": header.name,
        "path": header.path,
        "file_bytes": header.file_bytes,
        "gguf_version": header.version,
        "architecture": header.architecture,
        "parameters": header.parameters,
        "quantization": header.quantization,
        "mix": mix(header),
        "tensor_count": len(header.tensors),
        "tensor_bytes": header.tensor_bytes,
        "context_length": header.context_length,
        "sliding_window": header.sliding_window,
        "kv_bytes_per_token_f16": header.kv_bytes_per_token(),
        "tokenizer": {
            "model": header.metadata.get("tokenizer.ggml.model"),
            "pre": header.metadata.get("tokenizer.ggml.pre"),
            "vocabulary": header.vocabulary,
            "special_tokens": special_tokens(header),
        },
        "chat_template": header.chat_template is not None,
        "parts": header.split[1] if header.split is not None else 1,
        "synthetic": header.synthetic,
        "license": header.metadata.get("general.license"),
        "made_from": made_from(header) or None,
    }


def mix(header: GgufHeader) -> list[TypeShare]:
    """Return the share of each tensor type, in decreasing order of bytes."""
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for tensor in header.tensors:
        counts[tensor.quantization] += 1
        sizes[tensor.quantization] += tensor.size_bytes
    total = sizes.total() or 1
    return [TypeShare(kind, counts[kind], size, size / total) for kind, size in sizes.most_common()]


def special_tokens(header: GgufHeader) -> dict[str, int]:
    """Return the ids of special tokens (begin, end and others), by their names in the file."""
    found = ((_SPECIAL.fullmatch(key), value) for key, value in header.metadata.items())
    return {match[1]: value for match, value in found if match is not None and isinstance(value, int)}


def made_from(header: GgufHeader) -> dict[str, Any]:
    """Return the provenance recorded by ``promptai models quantize``: the source's name, type and SHA-256; the tool."""
    keys = ("source.name", "source.quantization", "source.sha256", "quantized_by")
    found = {key.replace("source.", ""): header.metadata.get(f"promptai.{key}") for key in keys}
    return {key: value for key, value in found.items() if value is not None}


def harmless(text: str, *, keep: str = "") -> str:
    """Escape non-printable characters in an untrusted text."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def _header(model: str, console: Console) -> GgufHeader:
    """Read the header of a local, stored, bundled or remote model; combines the parts of a split model."""
    library = Library(models_directory(load_settings()))
    match = _HUB.fullmatch(model)
    if match is not None and library.find(model) is None:
        headers = _remote_headers(match[1], match[2], console)
    else:
        path = bundled_model() if model == NAME else resolve(model, library)
        names = part_names(path.name) if path.is_file() else [path.name]
        headers = [read_header(path.with_name(name)) for name in names]
    split = headers[0].split
    if split is not None and split[1] != len(headers):
        raise ModelFormatError(
            f"model {model} is part {split[0] + 1} of {split[1]}, but is not named accordingly",
            hint=f"restore the published names of all parts: …-00001-of-{split[1]:05}.gguf",
        )
    return join_parts(headers)


def _remote_headers(repository: str, file: str, console: Console) -> list[GgufHeader]:
    # Imported here: the hub's client takes half a second, which local files do not need.
    from promptai.models.hub import file_size, read_range  # noqa: PLC0415

    progress = Progress(
        TextColumn("reading the header"),
        DownloadColumn(binary_units=True),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    progress.disable = not console.is_terminal
    folder, slash, name = file.rpartition("/")
    with progress:
        task = progress.add_task("", total=None)
        return [
            read_remote_header(
                functools.partial(read_range, repository, part),
                file_size(repository, part),
                f"hub:{repository}:{part}",
                progress=functools.partial(progress.advance, task),
            )
            for part in (f"{folder}{slash}{part}" for part in part_names(name))
        ]


def _table(header: GgufHeader) -> Table:
    table = Table(show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(header):
        table.add_row(name, Text(harmless(value or "unknown")))
    return table


def _rows(header: GgufHeader) -> Iterator[tuple[str, str | None]]:
    """Yield the table's rows, the most useful first."""
    yield "name", header.name
    yield "file", f"{header.path}, {fmt.quantity(header.file_bytes, 'bytes')}"
    if header.split is not None:
        yield "parts", f"{header.split[1]} files, all read"
    yield "architecture", header.architecture
    yield "parameters", f"{header.parameters:,}"
    yield "tensors", f"{len(header.tensors):,}, GGUF version {header.version}"
    for share in mix(header):
        tensors = f"{share.tensors:,} tensor{'s' * (share.tensors != 1)}"
        yield share.type, f"{100 * share.share:.1f} % of the bytes, {tensors}, {fmt.quantity(share.bytes, 'bytes')}"
    context = header.context_length
    window = f", some layers attend to {header.sliding_window:,} only" if header.sliding_window else ""
    yield "context", f"{context:,} tokens{window}" if context else None
    per_token = header.kv_bytes_per_token()
    whole = f", {fmt.quantity(per_token * context, 'bytes')} for the whole context" if per_token and context else ""
    yield "KV cache, f16", f"{per_token:,} bytes per token{whole}" if per_token else None
    yield "tokenizer", _tokenizer(header)
    template = header.chat_template
    yield (
        "chat template",
        "no (engines fall back to ChatML)" if template is None else f"yes, {len(template):,} characters (--template)",
    )
    if isinstance(header.metadata.get("general.license"), str):
        yield "licence (declared in the file)", str(header.metadata["general.license"])
    for key, value in made_from(header).items():
        yield {"quantized_by": "quantised by"}.get(key, f"source, {key}"), str(value)
    yield "synthetic", "yes: random weights, for speed and memory, never for accuracy" if header.synthetic else "no"


def _tokenizer(header: GgufHeader) -> str | None:
    model, pre = header.metadata.get("tokenizer.ggml.model"), header.metadata.get("tokenizer.ggml.pre")
    if model is None:
        return None
    special = ", ".join(f"{name} {number}" for name, number in special_tokens(header).items())
    size = f", {header.vocabulary:,} tokens" if header.vocabulary is not None else ""
    return f"{model}{f', pre-tokenizer {pre}' if pre is not None else ''}{size}{f'; {special}' if special else ''}"


def _tensor_table(header: GgufHeader) -> Table:
    table = Table("tensor", "shape", "type", "bytes")
    table.columns[0].overflow = "fold"
    table.columns[3].justify = "right"
    for tensor in header.tensors:
        shape = " x ".join(map(str, tensor.shape))
        table.add_row(Text(harmless(tensor.name)), shape, tensor.quantization, f"{tensor.size_bytes:,}")
    return table
