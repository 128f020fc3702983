"""Boards as ``promptai serve`` takes them from its settings, and the memory that it shares out."""

import pytest

from promptai.cli.serve_fleet import MemoryBudget, parse_boards
from promptai.device.memory import MemoryFacts
from promptai.device.process import ProcessMemory, TreeReading
from promptai.errors import SettingsError
from promptai.settings import FleetEntry

GIB = 1024**3
PI = "http://pi-1:8080"


class Site:
    """A machine with 10 GiB whose readings a test sets; this process itself holds 1 GiB."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.available = 6 * GIB
        self.anonymous: int | None = GIB
        self.now = 100.0
        monkeypatch.setattr("promptai.cli.serve_fleet.ProcessTree", lambda _: self)
        monkeypatch.setattr("promptai.cli.serve_fleet.read_memory", self.memory)
        monkeypatch.setattr("time.monotonic", lambda: self.now)

    def memory(self) -> MemoryFacts:
        """Of the whole machine; a tenth of it is 1 GiB."""
        return MemoryFacts(total_bytes=10 * GIB, available_bytes=self.available, swap_total_bytes=0, swap_used_bytes=0)

    def read(self) -> TreeReading:
        """Of this process and its engines."""
        memory = ProcessMemory(anon_bytes=self.anonymous, file_bytes=0, shmem_bytes=0, swap_bytes=0, major_faults=0)
        return TreeReading(memory=memory, cpu_s=0.0, processes=2)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Site:
    """A machine of which everything is known."""
    return Site(monkeypatch)


def test_what_engines_hold_is_in_the_budget(site: Site) -> None:
    budget = MemoryBudget(None)
    first = budget()

    site.anonymous, site.available, site.now = 4 * GIB, 3 * GIB, site.now + 3

    assert [first, budget()] == [5 * GIB, 5 * GIB]


def test_while_an_engine_ends_and_nobody_tells_what_it_holds_the_budget_stays(site: Site) -> None:
    """Half of its memory may be back already: neither nothing nor all that it held may be added to that."""
    budget = MemoryBudget(None)
    site.anonymous, site.available = 4 * GIB, 3 * GIB
    before = budget()

    site.anonymous, site.available, site.now = None, 4 * GIB, site.now + 3
    during = budget()
    site.anonymous, site.available, site.now = GIB, 5 * GIB, site.now + 3

    assert [before, during, budget()] == [5 * GIB, 5 * GIB, 4 * GIB]


def test_where_nobody_ever_tells_it_is_what_there_was_at_the_start(site: Site) -> None:
    site.anonymous = None
    budget = MemoryBudget(None)
    first = budget()

    site.available, site.now = 2 * GIB, site.now + 3

    assert [first, budget()] == [5 * GIB, 5 * GIB]


def test_a_budget_that_is_set_stays(site: Site) -> None:
    site.anonymous = None

    assert MemoryBudget(2048)() == 2 * GIB


@pytest.mark.parametrize(
    "entries",
    [
        pytest.param([FleetEntry(PI, name="pi-1", slots=2), FleetEntry(PI)], id="the-command-line-repeats-the-file"),
        pytest.param([FleetEntry(PI), FleetEntry(PI, name="pi-1", slots=2)], id="the-other-way-round"),
        pytest.param(
            [FleetEntry(PI, name="pi-1", slots=2), FleetEntry("HTTP://Pi-1:8080/v1/")], id="the-same-written-otherwise"
        ),
    ],
)
def test_an_address_alone_adds_nothing_to_an_entry_that_says_more(entries: list[FleetEntry]) -> None:
    (target,) = parse_boards(entries, {}).targets

    assert (target.name, target.slots, target.base_url) == ("pi-1", 2, PI)


def test_the_same_address_twice_is_one_board() -> None:
    assert len(parse_boards([FleetEntry(PI), FleetEntry(PI)], {}).targets) == 1


def test_a_repeated_address_brings_its_key_where_there_is_none() -> None:
    entries = [FleetEntry(PI, name="pi-1"), FleetEntry(PI, api_key_env="PROMPTAI_API_KEY")]

    assert parse_boards(entries, {"PROMPTAI_API_KEY": "sesame"}).keys == {PI: "sesame"}


@pytest.mark.parametrize(
    ("one", "other"),
    [(None, None), ("yi", "yi"), ("yi", None), (None, "yi")],
)
def test_a_board_under_two_names_is_refused_with_both(one: str | None, other: str | None) -> None:
    """It would be given twice as many streams as it has slots."""
    entries = [FleetEntry(PI, name="pi-1", model=one), FleetEntry(f"{PI}/", name="kitchen", model=other)]

    with pytest.raises(SettingsError, match=f"^pi-1 and kitchen are the same board, at {PI} "):
        parse_boards(entries, {})


def test_two_models_of_one_server_and_two_servers_of_one_machine_are_two_boards() -> None:
    models = [FleetEntry(PI, name="a", model="yi"), FleetEntry(PI, name="b", model="gemma")]
    ports = [FleetEntry("http://pi-1:8080", name="a"), FleetEntry("http://pi-1:8081", name="b")]

    assert [len(parse_boards(entries, {}).targets) for entries in (models, ports)] == [2, 2]


@pytest.mark.parametrize(
    ("entries", "names"),
    [
        ([FleetEntry(PI, model="yi"), FleetEntry(PI, model="gemma")], ["pi-1:8080/yi", "pi-1:8080/gemma"]),
        ([FleetEntry("http://hub/a/v1"), FleetEntry("http://hub/b")], ["hub:80/a", "hub:80/b"]),
        ([FleetEntry(PI, model="yi"), FleetEntry(PI, name="kitchen", model="gemma")], ["pi-1:8080", "kitchen"]),
        ([FleetEntry(PI, model="yi"), FleetEntry("http://pi-2:8080")], ["pi-1:8080", "pi-2:8080"]),
    ],
)
def test_boards_without_names_are_called_by_what_tells_them_apart(entries: list[FleetEntry], names: list[str]) -> None:
    """Of two that were called alike only the first one was in the fleet."""
    assert [target.replica_id for target in parse_boards(entries, {}).targets] == names


@pytest.mark.parametrize(
    "entries",
    [
        [FleetEntry("http://pi-1:80", name="kitchen"), FleetEntry("http://pi-2:80", name="kitchen")],
        [FleetEntry("http://pi-1:80", name="pi-2:80"), FleetEntry("http://pi-2:80")],
        [FleetEntry("http://pi-1:443"), FleetEntry("https://pi-1")],
    ],
)
def test_two_boards_of_one_name_are_refused(entries: list[FleetEntry]) -> None:
    with pytest.raises(SettingsError, match=r"^2 boards are called (kitchen|pi-2:80|pi-1:443) "):
        parse_boards(entries, {})


@pytest.mark.parametrize("url", ["http://user:secret@pi:8080", "http://secret@pi:8080", "user:se/cret@pi:8080"])
def test_an_address_with_a_secret_is_refused_without_repeating_it(url: str) -> None:
    with pytest.raises(SettingsError, match=r"^the address of pi:8080 holds a user or a password ") as refusal:
        parse_boards([FleetEntry(url, api_key_env="NOT_SET")], {})

    assert "api_key_env" in refusal.value.hint
    assert "cret" not in str(refusal.value)
