"""The catalogue: models worth running on a board, under short names.

The hub has a million repositories; the catalogue lists a few models with the location
of their files, their licence and their shape. Such facts go out of date, and a wrong
shape leads to a wrong forecast that goes unnoticed. So each fact either cites where it
was seen or is marked unverified, and ``differences`` compares an entry with the hub's
current metadata. The data is ``data/catalog.toml``. The catalogue does not aim to be
complete, and this module uses no network.
"""

import difflib
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.resources import files
from typing import Annotated, Any, Literal, NamedTuple, get_args

import msgspec

from promptai.errors import HubError, HubGatedError, HubNotFoundError, ModelFormatError, ModelNotFoundError
from promptai.models.hub import RepositoryFacts
from promptai.models.shape import Shape
from promptai.models.tensors import Quant, possible, tensor_bytes
from promptai.wire.malformed import MALFORMED

#: Quantisations of the catalogue's files.
FourBit = Literal["Q4_0", "Q4_K_M"]
#: Chat template that a model was tuned for; phi2 is ``Instruct: … Output:``, which engines do not support.
Template = Literal["chatml", "gemma", "llama2", "llama3", "mistral", "phi2", "phi3", "zephyr"]
#: Facts that an entry must either cite or mark as unverified; ``gguf`` includes the file names.
Fact = Literal["repository", "shape", "parameters", "gguf", "licence", "gated", "template"]
#: The hub's licence value for "none of the standard ones".
_OTHER_LICENCE = "other"
#: Accepted difference between a file's size and the size its shape implies: quantisers before 2024 mixed
#: tensor types slightly differently.
SIZE_TOLERANCE = 0.03
#: A GGUF header is nearly all tokenizer: 25 to 61 bytes per vocabulary row in the Q4_K_M files of known size.
_HEADER_BYTES_PER_ROW = 40

_Text = Annotated[str, msgspec.Meta(min_length=1)]
_Repository = Annotated[str, msgspec.Meta(pattern=r"^[\w.-]+/[\w.-]+$")]


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """
    One model.

    Attributes:
        id: The name that users type.
        repository: Repository of the original model; ``gguf`` is the repository of its 4-bit files.
        files: Quantisation -> file name in ``gguf``.
        parameters: Number of weights, from a source other than the shape.
        licence: SPDX identifier, or the licence's name if it has none.
        gated: The hub serves the original only to users who accepted its licence; ``gguf_gated`` is the
            same for the 4-bit files.
        seen: Fact -> addresses of its sources.
        unverified: Facts without a source.
        paper: The paper's model that this entry stands for; ``None`` for models outside the paper.
        ambiguous: Several entries stand for the same model of the paper, which does not identify it uniquely.
    """

    id: Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9.-]*$")]
    title: _Text
    repository: _Repository
    gguf: _Repository
    files: Annotated[dict[FourBit, _Text], msgspec.Meta(min_length=1)]
    parameters: Annotated[int, msgspec.Meta(gt=0)]
    licence: _Text
    gated: bool
    template: Template
    shape: Shape
    seen: dict[Fact, Annotated[list[_Text], msgspec.Meta(min_length=1)]]
    unverified: tuple[Fact, ...] = ()
    gguf_gated: bool = False
    paper: str | None = None
    ambiguous: bool = False

    def __post_init__(self) -> None:
        for fact in get_args(Fact):
            if (fact in self.seen) == (fact in self.unverified):
                raise ValueError(f"`{fact}` must be either in `seen` or in `unverified`")
        if not all(possible(self.shape, _quant(name)) for name in self.files):
            raise ValueError("engines cannot load a model of this shape")

    def expected_bytes(self, quant: FourBit) -> int:
        """Return the file size that the shape implies; within 1 % for all files of known size."""
        return tensor_bytes(self.shape, _quant(quant)) + _HEADER_BYTES_PER_ROW * self.shape.vocabulary


def _quant(quant: FourBit) -> Quant:
    return "q4_0" if quant == "Q4_0" else "q4_k_m"


class Catalog(NamedTuple):
    """
    All entries, in the file's order.

    Attributes:
        looked_up: Month in which the sources were checked, e.g. ``2026-11``.
    """

    entries: tuple[Entry, ...]
    looked_up: str

    def find(self, name: str) -> Entry:
        """
        Return the entry with this name, ignoring case.

        Raises:
            ModelNotFoundError: The catalogue has no such entry; the hint suggests the nearest names.
        """
        ids = [entry.id for entry in self.entries]
        wanted = name.strip().lower()
        if wanted in ids:
            return self.entries[ids.index(wanted)]
        near = [i for i in ids if wanted and wanted in i] or difflib.get_close_matches(wanted, ids, n=1)
        raise ModelNotFoundError(
            f"the catalogue has no model named '{name}'",
            hint=f"did you mean {' or '.join(near)}?" if near else "promptai models list shows all models",
        )


class _File(msgspec.Struct, forbid_unknown_fields=True):
    looked_up: Annotated[str, msgspec.Meta(pattern=r"^\d{4}-\d{2}$")]
    sources: dict[str, Annotated[str, msgspec.Meta(pattern="^https://")]]
    entry: list[dict[str, Any]]


@cache
def load_catalog() -> Catalog:
    """Return the catalogue shipped with this package."""
    return parse_catalog((files("promptai.models") / "data" / "catalog.toml").read_bytes(), "catalog.toml")


def parse_catalog(data: bytes, where: str) -> Catalog:
    """
    Parse a catalogue; unknown fields are errors.

    Raises:
        ModelFormatError: The data is malformed; names the entry.
    """
    hint = "docs/concepts/catalog.md describes the format of an entry"
    try:
        file = msgspec.toml.decode(data, type=_File)
    except MALFORMED as error:
        raise ModelFormatError(f"{where}: {error}", hint=hint) from None
    entries: list[Entry] = []
    for number, raw in enumerate(file.entry, 1):
        name = raw.get("id", f"number {number}")
        try:
            entry = msgspec.convert(raw, Entry)
            if entry.id in {other.id for other in entries}:
                raise ValueError("an earlier entry has the same id")
            seen = {fact: [_address(source, file.sources) for source in named] for fact, named in entry.seen.items()}
        except ValueError as error:
            raise ModelFormatError(f"{where}: entry {name}: {error}", hint=hint) from None
        entries.append(msgspec.structs.replace(entry, seen=seen))
    return Catalog(tuple(entries), file.looked_up)


def _address(source: str, sources: Mapping[str, str]) -> str:
    if source.startswith("https://"):
        return source
    if source not in sources:
        raise ValueError(f"unknown source `{source}`")
    return sources[source]


def differences(entry: Entry, answers: Mapping[str, RepositoryFacts | HubError]) -> list[str]:
    """
    List the differences between an entry and the hub, one line each.

    Args:
        answers: The hub's responses for ``entry.repository`` and ``entry.gguf``.
    """
    return [
        *_repository_differences(entry.repository, entry.gated, answers[entry.repository]),
        *_licence_differences(entry, answers[entry.repository]),
        *_repository_differences(entry.gguf, entry.gguf_gated, answers[entry.gguf]),
        *_file_differences(entry, answers[entry.gguf]),
    ]


def _repository_differences(
    name: str,
    gated: bool,  # noqa: FBT001
    answer: RepositoryFacts | HubError,
) -> Iterator[str]:
    if isinstance(answer, HubNotFoundError):
        yield f"the hub has no repository {name}"
    elif isinstance(answer, HubError) and not isinstance(answer, HubGatedError):
        yield f"not checked: {answer.message}"
    else:
        found = isinstance(answer, HubGatedError) or answer.gated
        if found != gated:
            yield f"{name} is {'' if found else 'not '}gated on the hub, but {'not ' if found else ''}in the catalogue"


def _licence_differences(entry: Entry, answer: RepositoryFacts | HubError) -> Iterator[str]:
    if isinstance(answer, HubError) or (answer.license or "").lower() in (_OTHER_LICENCE, entry.licence.lower()):
        return
    yield f"{entry.repository}: licence {answer.license or 'not declared'} on the hub, {entry.licence} in the catalogue"


def _file_differences(entry: Entry, answer: RepositoryFacts | HubError) -> Iterator[str]:
    if isinstance(answer, HubError):
        return
    for quant, file in entry.files.items():
        if file not in answer.files:
            same_quant = [other for other in answer.files if quant.lower() in other.lower()]
            near = difflib.get_close_matches(file, same_quant, n=1)
            yield f"{entry.gguf} has no {file}" + (f" (nearest: {near[0]})" if near else "")
            continue
        size, expected = answer.files[file], entry.expected_bytes(quant)
        if size is not None and abs(size / expected - 1) > SIZE_TOLERANCE:
            yield f"{file}: {size:,} bytes, but its shape implies {expected:,} ({100 * (size / expected - 1):+.1f} %)"
