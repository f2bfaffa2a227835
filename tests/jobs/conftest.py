"""What tests of command lines need: a job that runs in this process, in a folder of its own."""

import importlib
import sys
from pathlib import Path

import pytest
from job_calls import Call


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path) -> Call:
    """Runs a job's command line in this process (a process each would take minutes); gives what it exits with or prints."""
    monkeypatch.chdir(tmp_path)

    def run(job: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [f"jobs.{job}", *map(str, arguments)])
        try:
            importlib.import_module(f"jobs.{job}").main()
        except SystemExit as stopped:
            return str(stopped.code)
        return capsys.readouterr().out

    return run
