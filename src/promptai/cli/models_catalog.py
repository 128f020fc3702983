"""``promptai models check-catalog``: whether the catalogue still says what the hub says.

Repositories are renamed, closed and gated without a word, and a catalogue that was
right in November is wrong in March. So one command asks the hub for every entry and
says what differs; it changes nothing. Whatever was not seen when an entry was
written (``unverified``) is settled here.
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

#: Polite to a hub, and a whole catalogue takes seconds instead of half a minute.
_AT_ONCE = 8

FetchFacts = Callable[[str], RepositoryFacts]


class EntryCheck(msgspec.Struct, frozen=True):
    """
    What came out for one entry.

    Attributes:
        differences: What the hub says otherwise, a line each.
        file_bytes: Sizes that the hub gives for the entry's files.
        expected_bytes: Sizes that its shape implies.
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
    """Ask the hub whether the catalogue's entries (all, or NAMES) still hold; leaves with 1 when something differs."""
    catalog = load_catalog()
    entries = [catalog.find(name) for name in names] or list(catalog.entries)
    console = Console(stderr=True)
    with Progress(
        TextColumn("asking the hub"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    ) as progress:
        task = progress.add_task("asking", total=len(_repositories(entries)))
        found = check(entries, repository_facts, answered=lambda: progress.advance(task))
    if as_json:
        click.echo(msgspec.json.encode(found))
    else:
        Console().print(_table(found))
    if any(checked.differences for checked in found):
        context.exit(1)


def check(
    entries: Sequence[Entry], ask: FetchFacts, *, answered: Callable[[], None] = lambda: None
) -> list[EntryCheck]:
    """
    Hold entries against what ``ask`` says of their repositories, several questions at once.

    Raises:
        HubUnreachableError: The very first answer is that there is no connection.
    """

    def answer(name: str) -> RepositoryFacts | HubError:
        try:
            return ask(name)
        except HubError as error:
            return error

    answers: dict[str, RepositoryFacts | HubError] = {}
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        asked = {pool.submit(answer, name): name for name in _repositories(entries)}
        try:
            for future in as_completed(asked):
                answers[asked[future]] = said = future.result()
                if len(answers) == 1 and isinstance(said, HubUnreachableError):
                    raise said
                answered()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # Ctrl-C must not wait for the rest of the queue
            raise
    return [_checked(entry, answers) for entry in entries]


def _repositories(entries: Sequence[Entry]) -> list[str]:
    return list(dict.fromkeys(name for entry in entries for name in (entry.repository, entry.gguf)))


def _checked(entry: Entry, answers: dict[str, RepositoryFacts | HubError]) -> EntryCheck:
    said = answers[entry.gguf]
    sizes = {} if isinstance(said, HubError) else said.files
    return EntryCheck(
        id=entry.id,
        repository=entry.repository,
        gguf=entry.gguf,
        differences=differences(entry, answers),
        file_bytes={quant: sizes.get(file) for quant, file in entry.files.items()},
        expected_bytes={quant: entry.expected_bytes(quant) for quant in entry.files},
    )


def _table(found: Sequence[EntryCheck]) -> Table:
    table = Table("model", "files", "what differs")
    for checked in found:
        files = [f"{quant} {_size(size)}" for quant, size in checked.file_bytes.items()]
        table.add_row(checked.id, "\n".join(files), "\n".join(map(escape, checked.differences)) or "[green]nothing[/]")
    return table


def _size(size: int | None) -> str:
    return "?" if size is None else f"{size / 1e9:.2f} GB"
