"""Nights that are killed at any moment are taken up where they were, by the same command."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


@pytest.mark.system
def test_a_night_that_is_killed_at_any_moment_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    paths = os.pathsep.join(map(str, (TESTS.parent, TESTS, TESTS / "pipeline")))
    script = [sys.executable, str(Path(__file__).with_name("kill_nights.py")), str(tmp_path)]
    done = subprocess.run(
        script, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, *kills = [json.loads(line) for line in done.stdout.splitlines()]
    whole = first["whole"]
    assert (whole["outcome"], whole["pinned"], whole["left"]) == ("pass", [10, 20], [])
    assert whole["served"] == [[20, "2026-11-03"], [10, "2026-11-02"]]
    assert len(kills) >= 14
    for kill in kills:
        event, killed = kill["event"], kill["killed"]
        assert (kill["code"], kill["again"]) == (-signal.SIGKILL, 0), event
        assert kill["found"] == whole, event
        # At every moment one of the two serves, and is pinned.
        assert killed["served"] in (whole["served"], whole["served"][1:]), event
        assert {step for step, _ in killed["served"]} <= {*killed["pinned"]}, event
        # Nothing is recorded as done that is not as it is at the end.
        done_by_then = [step for step in killed["steps"] if step[1] == "done"]
        assert done_by_then == whole["steps"][: len(done_by_then)], event
    assert {len(kill["killed"]["steps"]) for kill in kills} >= {0, 2}
    assert {kill["killed"]["outcome"] for kill in kills} == {None, "pass"}
