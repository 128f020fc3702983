"""Boards of ``promptai serve``, and its memory budget."""

import pytest

from promptai.cli.serve_fleet import MemoryBudget, parse_boards
from promptai.device.memory import MemoryFacts
from promptai.device.process import ProcessMemory, TreeReading
from promptai.errors import SettingsError
from promptai.settings import FleetEntry

GIB = 1024**3
PI = "http://pi-1:8080"


class Site:
    """A machine with 10 GiB and simulated readings; this process itself holds 1 GiB."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.available = 6 * GIB
        self.anonymous: int | None = GIB
        self.now = 100.0
        monkeypatch.setattr("promptai.cli.serve_fleet.ProcessTree", lambda _: self)
        monkeypatch.setattr("promptai.cli.serve_fleet.read_memory", self.memory)
        monkeypatch.setattr("time.monotonic", lambda: self.now)

    def memory(self) -> MemoryFacts:
        """Memory of the whole machine; a tenth of it is 1 GiB."""
        return MemoryFacts(total_bytes=10 * GIB, available_bytes=self.available, swap_total_bytes=0, swap_used_bytes=0)

    def read(self) -> TreeReading:
        """Memory of this process and its engines."""
        memory = ProcessMemory(anon_bytes=self.anonymous, file_bytes=0, shmem_bytes=0, swap_bytes=0, major_faults=0)
        return TreeReading(memory=memory, cpu_s=0.0, processes=2)


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Site:
    """A machine with known readings."""
    return Site(monkeypatch)


def test_memory_of_running_engines_is_in_the_budget(site: Site) -> None:
    budget = MemoryBudget(None)
    first = budget()

    site.anonymous, site.available, site.now = 4 * GIB, 3 * GIB, site.now + 3

    assert [first, budget()] == [5 * GIB, 5 * GIB]


def test_keeps_the_budget_while_the_memory_of_an_ending_engine_is_unknown(site: Site) -> None:
    """Part of its memory may be available again, so neither 0 nor its last memory may be added to that."""
    budget = MemoryBudget(None)
    site.anonymous, site.available = 4 * GIB, 3 * GIB
    before = budget()

    site.anonymous, site.available, site.now = None, 4 * GIB, site.now + 3
    during = budget()
    site.anonymous, site.available, site.now = GIB, 5 * GIB, site.now + 3

    assert [before, during, budget()] == [5 * GIB, 5 * GIB, 4 * GIB]


def test_keeps_the_first_budget_if_memory_is_never_known(site: Site) -> None:
    site.anonymous = None
    budget = MemoryBudget(None)
    first = budget()

    site.available, site.now = 2 * GIB, site.now + 3

    assert [first, budget()] == [5 * GIB, 5 * GIB]


def test_a_configured_budget_is_fixed(site: Site) -> None:
    site.anonymous = None

    assert MemoryBudget(2048)() == 2 * GIB


@pytest.mark.parametrize(
    "entries",
    [
        pytest.param([FleetEntry(PI, name="pi-1", slots=2), FleetEntry(PI)], id="command-line-repeats-file"),
        pytest.param([FleetEntry(PI), FleetEntry(PI, name="pi-1", slots=2)], id="file-repeats-command-line"),
        pytest.param([FleetEntry(PI, name="pi-1", slots=2), FleetEntry("HTTP://Pi-1:8080/v1/")], id="other-spelling"),
    ],
)
def test_a_bare_url_adds_nothing_to_a_fuller_entry(entries: list[FleetEntry]) -> None:
    (target,) = parse_boards(entries, {}).targets

    assert (target.name, target.slots, target.base_url) == ("pi-1", 2, PI)


def test_a_repeated_url_is_one_board() -> None:
    assert len(parse_boards([FleetEntry(PI), FleetEntry(PI)], {}).targets) == 1


def test_a_repeated_url_adds_its_key_if_there_is_none() -> None:
    entries = [FleetEntry(PI, name="pi-1"), FleetEntry(PI, api_key_env="PROMPTAI_API_KEY")]

    assert parse_boards(entries, {"PROMPTAI_API_KEY": "sesame"}).keys == {PI: "sesame"}


@pytest.mark.parametrize(
    ("one", "other"),
    [(None, None), ("yi", "yi"), ("yi", None), (None, "yi")],
)
def test_rejects_a_board_with_two_names(one: str | None, other: str | None) -> None:
    """Otherwise it would get twice as many streams as it has slots."""
    entries = [FleetEntry(PI, name="pi-1", model=one), FleetEntry(f"{PI}/", name="kitchen", model=other)]

    with pytest.raises(SettingsError, match=f"^pi-1 and kitchen are the same board at {PI} "):
        parse_boards(entries, {})


def test_two_models_of_a_server_or_two_ports_of_a_machine_are_two_boards() -> None:
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
def test_names_boards_by_what_distinguishes_them(entries: list[FleetEntry], names: list[str]) -> None:
    """Of two boards with the same name, only the first would be in the fleet."""
    assert [target.replica_id for target in parse_boards(entries, {}).targets] == names


@pytest.mark.parametrize(
    "entries",
    [
        [FleetEntry("http://pi-1:80", name="kitchen"), FleetEntry("http://pi-2:80", name="kitchen")],
        [FleetEntry("http://pi-1:80", name="pi-2:80"), FleetEntry("http://pi-2:80")],
        [FleetEntry("http://pi-1:443"), FleetEntry("https://pi-1")],
    ],
)
def test_rejects_two_boards_with_the_same_name(entries: list[FleetEntry]) -> None:
    with pytest.raises(SettingsError, match=r"^2 boards are named (kitchen|pi-2:80|pi-1:443) "):
        parse_boards(entries, {})


@pytest.mark.parametrize("url", ["http://user:secret@pi:8080", "http://secret@pi:8080", "user:se/cret@pi:8080"])
def test_rejects_a_url_with_a_password_without_repeating_it(url: str) -> None:
    with pytest.raises(SettingsError, match=r"^the URL of pi:8080 contains a user name or a password ") as refusal:
        parse_boards([FleetEntry(url, api_key_env="NOT_SET")], {})

    assert "api_key_env" in refusal.value.hint
    assert "cret" not in str(refusal.value)
