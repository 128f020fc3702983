"""``promptai report`` as a command."""

import subprocess
import sys
from pathlib import Path

import pytest

from support_cli import clean_environment, promptai
from support_runs import make_run, write_run

pytestmark = pytest.mark.real


def test_prints_markup_in_a_directory_literally(tmp_path: Path) -> None:
    """Square brackets are markup in rich."""
    write_run(tmp_path / "pi[bold]5[" / "run", make_run(conversations=1, turns=1))

    done = promptai("report", "pi[bold]5[/run", cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    assert "report:  pi[bold]5[/run/report.html" in done.stdout


def test_rejects_json_with_figures(tmp_path: Path) -> None:
    write_run(tmp_path / "run", make_run(conversations=1, turns=1))

    done = promptai("report", "run", "--json", "--figures", cwd=tmp_path)

    assert done.returncode == 2
    assert "promptai: error: --json cannot be combined with --figures" in done.stderr
    assert not (tmp_path / "run" / "summary.json").exists()


def test_json_imports_no_drawing_library(tmp_path: Path) -> None:
    """They need a second and 200 MB, which a board may not have."""
    write_run(tmp_path / "run", make_run(conversations=1, turns=1))
    script = (
        "import sys; from promptai.cli.report import report; report.main(['run', '--json'], standalone_mode=False); "
        "sys.exit(', '.join({'altair', 'vl_convert', 'jinja2'} & set(sys.modules)) or 0)"
    )

    done = subprocess.run(
        [sys.executable, "-c", script],
        check=False,
        cwd=tmp_path,
        env=clean_environment(),
        capture_output=True,
        text=True,
    )

    assert (done.returncode, done.stderr) == (0, "")
