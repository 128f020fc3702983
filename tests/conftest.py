"""Rules for every test: two seconds for a unit test, and no settings from the developer's environment."""

import os

import pytest

UNIT_LIMIT_S = 2.0
#: The limit beside other workers. It counts wall time, and their engines take the cores for seconds; the slowest unit
#: test takes 1.2 s of an idle core.
SHARED_LIMIT_S = 6.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Limit tests that start no real process to two seconds, fixtures not counted."""
    limit_s = SHARED_LIMIT_S if "PYTEST_XDIST_WORKER" in os.environ else UNIT_LIMIT_S
    for item in items:
        if item.get_closest_marker("real") is None and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(limit_s, func_only=True))


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PROMPTAI_")]:
        monkeypatch.delenv(name)
