"""The catalogue: models worth running on a board, by a name that a person would type.

A hub has a million repositories and a person on a board has one question, so a few
models are named here with where their files lie, their licence and their shape.
What a catalogue says is soon wrong, and a wrong shape makes a wrong forecast that
nobody notices. So each fact names where it was seen, or admits that it was not, and
``differences`` holds an entry against what the hub says today. The data is
``data/catalog.toml``; here is no network and no wish to be complete.
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

#: How a file of the catalogue is quantised.
FourBit = Literal["Q4_0", "Q4_K_M"]
#: The prompt that a model was tuned to; phi2 is ``Instruct: … Output:``, which no engine knows.
Template = Literal["chatml", "gemma", "llama2", "llama3", "mistral", "phi2", "phi3", "zephyr"]
#: What an entry accounts for, each as seen or as unverified; ``gguf`` with the names of the files.
Fact = Literal["repository", "shape", "parameters", "gguf", "licence", "gated", "template"]
#: What the hub calls a licence without saying which.
_SAYS_NOTHING = "other"
#: How far a file may be from what its shape implies: quantisers before 2024 mixed their types a little otherwise.
SIZE_TOLERANCE = 0.03
#: A GGUF header is nearly all tokenizer: 25 to 61 bytes a row of vocabulary in the Q4_K_M files of known size.
_HEADER_BYTES_A_ROW = 40

_Text = Annotated[str, msgspec.Meta(min_length=1)]
_Repository = Annotated[str, msgspec.Meta(pattern=r"^[\w.-]+/[\w.-]+$")]


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """
    One model.

    Attributes:
        id: What a person types.
        paper: Which of the paper's eight models it stands for, if any.
        ambiguous: Other entries claim the same model of the paper; nobody knows which it was.
        repository: The original's; ``gguf`` is where 4-bit files lie.
        files: Quantisation -> name in ``gguf``.
        parameters: Weights, by a source other than the shape.
        licence: SPDX identifier, else the licence's name.
        gated: The original is given only to those who accepted its licence; ``gguf_gated`` the 4-bit files.
        seen: Fact -> addresses where it was seen.
        unverified: Facts that were not seen anywhere.
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
            raise ValueError("no engine would load a model of this shape")

    def expected_bytes(self, quant: FourBit) -> int:
        """The size of a file of this shape; within one percent of the files whose sizes are known."""
        return tensor_bytes(self.shape, _quant(quant)) + _HEADER_BYTES_A_ROW * self.shape.vocabulary


def _quant(quant: FourBit) -> Quant:
    return "q4_0" if quant == "Q4_0" else "q4_k_m"


class Catalog(NamedTuple):
    """
    All entries, in the file's order.

    Attributes:
        looked_up: Month in which the sources were read, e.g. ``2026-11``.
    """

    entries: tuple[Entry, ...]
    looked_up: str

    def find(self, name: str) -> Entry:
        """
        The entry of that name, in whatever case.

        Raises:
            ModelNotFoundError: There is none; the hint names the nearest.
        """
        ids = [entry.id for entry in self.entries]
        wanted = name.strip().lower()
        if wanted in ids:
            return self.entries[ids.index(wanted)]
        near = [i for i in ids if wanted and wanted in i] or difflib.get_close_matches(wanted, ids, n=1)
        raise ModelNotFoundError(
            f"the catalogue has no model {name}",
            hint=f"did you mean {' or '.join(near)}?" if near else "promptai models list shows them",
        )


class _File(msgspec.Struct, forbid_unknown_fields=True):
    looked_up: Annotated[str, msgspec.Meta(pattern=r"^\d{4}-\d{2}$")]
    sources: dict[str, Annotated[str, msgspec.Meta(pattern="^https://")]]
    entry: list[dict[str, Any]]


@cache
def load_catalog() -> Catalog:
    """The catalogue of this package."""
    return parse_catalog((files("promptai.models") / "data" / "catalog.toml").read_bytes(), "catalog.toml")


def parse_catalog(data: bytes, where: str) -> Catalog:
    """
    Read a catalogue strictly.

    Raises:
        ModelFormatError: It is not one; names the entry.
    """
    hint = "docs/concepts/catalog.md says what an entry consists of"
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
                raise ValueError("the name is taken")
            seen = {fact: [_address(source, file.sources) for source in named] for fact, named in entry.seen.items()}
        except ValueError as error:
            raise ModelFormatError(f"{where}: entry {name}: {error}", hint=hint) from None
        entries.append(msgspec.structs.replace(entry, seen=seen))
    return Catalog(tuple(entries), file.looked_up)


def _address(source: str, sources: Mapping[str, str]) -> str:
    if source.startswith("https://"):
        return source
    if source not in sources:
        raise ValueError(f"there is no source `{source}`")
    return sources[source]


def differences(entry: Entry, answers: Mapping[str, RepositoryFacts | HubError]) -> list[str]:
    """
    What the hub says otherwise than an entry, one line each; nothing when they agree.

    Args:
        answers: What the hub said of ``entry.repository`` and ``entry.gguf``.
    """
    return [
        *_of_repository(entry.repository, entry.gated, answers[entry.repository]),
        *_of_licence(entry, answers[entry.repository]),
        *_of_repository(entry.gguf, entry.gguf_gated, answers[entry.gguf]),
        *_of_files(entry, answers[entry.gguf]),
    ]


def _of_repository(name: str, gated: bool, answer: RepositoryFacts | HubError) -> Iterator[str]:  # noqa: FBT001
    if isinstance(answer, HubNotFoundError):
        yield f"the hub has no {name}"
    elif isinstance(answer, HubError) and not isinstance(answer, HubGatedError):
        yield f"not answered: {answer.message}"
    else:
        found = isinstance(answer, HubGatedError) or answer.gated
        if found != gated:
            yield f"{name} is {'' if found else 'not '}gated, the catalogue says otherwise"


def _of_licence(entry: Entry, answer: RepositoryFacts | HubError) -> Iterator[str]:
    if isinstance(answer, HubError) or (answer.license or "").lower() in (_SAYS_NOTHING, entry.licence.lower()):
        return
    yield f"the licence of {entry.repository} is {answer.license or 'not said'}, in the catalogue {entry.licence}"


def _of_files(entry: Entry, answer: RepositoryFacts | HubError) -> Iterator[str]:
    if isinstance(answer, HubError):
        return
    for quant, file in entry.files.items():
        if file not in answer.files:
            alike = [other for other in answer.files if quant.lower() in other.lower()]
            near = difflib.get_close_matches(file, alike, n=1)
            yield f"{entry.gguf} has no {file}" + (f", but {near[0]}" if near else "")
            continue
        size, expected = answer.files[file], entry.expected_bytes(quant)
        if size is not None and abs(size / expected - 1) > SIZE_TOLERANCE:
            yield f"{file} has {size:,} bytes, its shape implies {expected:,} ({100 * (size / expected - 1):+.1f} %)"
