from pathlib import Path

import pytest

from promptai.cli.measure import _render

pytestmark = pytest.mark.real


def test_the_rendering_process_does_not_import_the_users_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Users name scripts signal.py; here rendering gets as far as finding no run."""
    (tmp_path / "signal.py").write_text("raise SystemExit('the file of a user was run')")
    monkeypatch.chdir(tmp_path)

    assert not _render(tmp_path / "absent")

    assert "cannot write the report: promptai: " in capsys.readouterr().err
