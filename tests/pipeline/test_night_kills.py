"""Nights, and going back, that are killed at any moment end as if they had not been, by the same command."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

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
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    before, after = [[10, "2026-11-02"]], [[20, "2026-11-03"], [10, "2026-11-02"]]
    kills = {command: [line for line in lines if line["command"] == command] for command in ("judge", "again", "back")}
    assert [len(found) >= least for found, least in zip(kills.values(), (14, 6, 6), strict=True)] == [True] * 3
    check(kills["judge"], before, after, {None, "pass"})
    check(kills["again"], after, after, {None, "pass"})
    check(kills["back"], after, before, {"pass"})
    assert {len(kill["killed"]["steps"]) for kill in kills["judge"]} >= {0, 2}


def check(kills: list[dict[str, Any]], before: list[Any], after: list[Any], outcomes: set[str | None]) -> None:
    """Kills of a command. Args: before, after: what serves, the newest first. outcomes: of the night when it is killed."""
    whole = kills[0]["whole"]
    assert (whole["outcome"], whole["left"], whole["served"]) == ("pass", [], after)
    assert whole["pinned"] == sorted(step for step, _ in after)
    for kill in kills:
        event, killed = f"{kill['command']}: {kill['event']}", kill["killed"]
        assert (kill["code"], kill["again"]) == (-signal.SIGKILL, 0), event
        assert kill["found"] == whole, event
        # At every moment one of the two serves, and is pinned.
        assert killed["served"] in (before, after), event
        assert {step for step, _ in killed["served"]} <= {*killed["pinned"]}, event
        # Nothing is recorded as done that is not as it is at the end.
        done_by_then = [step for step in killed["steps"] if step[1] == "done"]
        assert done_by_then == whole["steps"][: len(done_by_then)], event
    assert {kill["killed"]["outcome"] for kill in kills} == outcomes
