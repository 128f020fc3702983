from pathlib import Path
from typing import Any

import pytest

from promptai.bench.arrivals import Arrivals
from promptai.bench.options import BenchOptions
from promptai.bench.plan import Protocol
from promptai.errors import SettingsError


def make_options(**changes: Any) -> BenchOptions:
    return BenchOptions(library=Path("models"), engines=Path("engines"), **changes)


def test_the_default_protocol_is_the_papers() -> None:
    assert make_options().protocol() == Protocol()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"max_tokens": 0}, "must be at least 1", id="no-tokens"),
        pytest.param({"repeats": 0}, "must be at least 1", id="no-passes"),
        pytest.param({"silence_s": 0.0}, "--timeout must be above 0 seconds, not 0", id="no-time"),
        pytest.param({"silence_s": float("nan")}, "--timeout must be above 0 seconds, not nan", id="nan"),
        pytest.param(
            {"concurrency": 4, "arrivals": Arrivals("poisson", 0.2)},
            "--concurrency 4 cannot be combined with --arrivals poisson:0.2",
            id="open-arrivals-with-concurrency",
        ),
    ],
)
def test_rejects_options_that_define_no_requests(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        make_options(**changes).protocol()
