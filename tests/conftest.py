"""What holds for every test: a unit test has two seconds, and the developer's environment does not leak in."""

import os

import pytest

UNIT_LIMIT_S = 2.0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start no real process are cut off after two seconds, fixtures not counted."""
    for item in items:
        if item.get_closest_marker("real") is None and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(UNIT_LIMIT_S, func_only=True))


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("PROMPTAI_")]:
        monkeypatch.delenv(name)
