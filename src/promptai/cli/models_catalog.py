"""``promptai models check-catalog``: compare the catalogue with the hub.

Repositories are renamed, closed and gated without notice, and a catalogue that was
right in November is wrong in March. So this command requests every entry's metadata
from the hub and lists the differences; it changes nothing. It also settles facts that
were not seen when an entry was written (``unverified``).
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import click
import msgspec
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from promptai.errors import HubError, HubUnreachableError
from promptai.models.catalog import Entry, FourBit, differences, load_catalog
from promptai.models.hub import RepositoryFacts, repository_facts
from promptai.models.library import readable_size

#: Few enough to be polite to the hub; the whole catalogue takes seconds instead of half a minute.
_CONCURRENT_REQUESTS = 8

FetchFacts = Callable[[str], RepositoryFacts]


class EntryCheck(msgspec.Struct, frozen=True):
    """
    The result for one entry.

    Attributes:
        differences: Differences from the hub, one line each.
        file_bytes: Sizes of the entry's files on the hub; ``None`` when the hub does not report one.
        expected_bytes: Sizes implied by the entry's shape.
    """

    id: str
    repository: str
    gguf: str
    differences: list[str]
    file_bytes: dict[FourBit, int | None]
    expected_bytes: dict[FourBit, int]


@click.command(
    "check-catalog",
    epilog="\b\nExamples:\n  promptai models check-catalog\n  promptai models check-catalog llama-3.2-3b --json",
)
@click.argument("names", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def check_catalog(context: click.Context, names: tuple[str, ...], *, as_json: bool) -> None:
    """Compare the catalogue's entries (all, or NAMES) with the hub; exits with 1 when something differs."""
    catalog = load_catalog()
    entries = [catalog.find(name) for name in names] or list(catalog.entries)
    console = Console(stderr=True)
    with Progress(
        TextColumn("requesting from the hub"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    ) as progress:
        task = progress.add_task("requesting", total=len(_repositories(entries)))
        found = check(entries, repository_facts, answered=lambda: progress.advance(task))
    if as_json:
        click.echo(msgspec.json.encode(found))
    else:
        Console().print(_table(found))
    if any(checked.differences for checked in found):
        context.exit(1)


def check(
    entries: Sequence[Entry], fetch: FetchFacts, *, answered: Callable[[], None] = lambda: None
) -> list[EntryCheck]:
    """
    Compare entries with the metadata that ``fetch`` returns for their repositories, with concurrent requests.

    Raises:
        HubUnreachableError: The first request failed for lack of a connection.
    """

    def answer(name: str) -> RepositoryFacts | HubError:
        try:
            return fetch(name)
        except HubError as error:
            return error

    answers: dict[str, RepositoryFacts | HubError] = {}
    with ThreadPoolExecutor(_CONCURRENT_REQUESTS) as pool:
        requested = {pool.submit(answer, name): name for name in _repositories(entries)}
        try:
            for future in as_completed(requested):
                answers[requested[future]] = result = future.result()
                if len(answers) == 1 and isinstance(result, HubUnreachableError):
                    raise result
                answered()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # on Ctrl-C, do not wait for the queued requests
            raise
    return [_checked(entry, answers) for entry in entries]


def _repositories(entries: Sequence[Entry]) -> list[str]:
    return list(dict.fromkeys(name for entry in entries for name in (entry.repository, entry.gguf)))


def _checked(entry: Entry, answers: dict[str, RepositoryFacts | HubError]) -> EntryCheck:
    answer = answers[entry.gguf]
    sizes = {} if isinstance(answer, HubError) else answer.files
    return EntryCheck(
        id=entry.id,
        repository=entry.repository,
        gguf=entry.gguf,
        differences=differences(entry, answers),
        file_bytes={quant: sizes.get(file) for quant, file in entry.files.items()},
        expected_bytes={quant: entry.expected_bytes(quant) for quant in entry.files},
    )


def _table(found: Sequence[EntryCheck]) -> Table:
    table = Table("model", "files", "differences")
    for checked in found:
        files = [f"{quant} {_size(size)}" for quant, size in checked.file_bytes.items()]
        table.add_row(checked.id, "\n".join(files), "\n".join(map(escape, checked.differences)) or "[green]none[/]")
    return table


def _size(size: int | None) -> str:
    return "?" if size is None else readable_size(size)
