"""Whom the watch takes for hung: two of them in one process, one store between them, and ends that are only noted."""

import os
import sys
import time
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from pipeline.training.faults.hang_watch import HangWatch

Pair = tuple[HangWatch, HangWatch]
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)  # of a thread that ended


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The pids that each watch which has given up would have killed."""
    noted: list[list[int]] = []
    monkeypatch.setattr(HangWatch, "_kill", lambda _, beats: noted.append([beat.pid for beat in beats]))
    monkeypatch.setattr("os._exit", lambda _: sys.exit())  # ends its thread
    return noted


@pytest.fixture
def pair() -> Iterator[Pair]:
    store = dist.HashStore()
    watches = HangWatch(store, 0, 2, 1.0), HangWatch(store, 1, 2, 1.0)
    yield watches
    for watch in watches:
        watch.stop()


@pytest.mark.integration
@pytest.mark.parametrize(("ours", "theirs"), [("save", "save"), ("step", "save"), ("save", "step"), ("start", "start")])
def test_ranks_that_wait_for_one_that_writes_or_begins_and_still_answers_go_on_waiting(
    pair: Pair, ended: list, ours: str, theirs: str
) -> None:
    pair[0].enter(5, ours)
    pair[1].enter(5, theirs)
    time.sleep(2.5)
    assert ended == []


@pytest.mark.integration
@pytest.mark.parametrize("phase", ["step", "data", "save", "start"])
def test_a_rank_that_falls_silent_is_named_whatever_the_others_do(
    pair: Pair, ended: list, phase: str, capfd: pytest.CaptureFixture
) -> None:
    pair[1].enter(5, phase)
    pair[1].stop()
    pair[0].enter(5, phase)
    time.sleep(2.5)
    assert ended == [[os.getpid()]]  # where the silent one is, here
    assert "rank 1, pid" in capfd.readouterr().err


@pytest.mark.integration
def test_a_rank_that_waits_for_its_data_while_the_others_wait_for_it_is_named(
    pair: Pair, ended: list, capfd: pytest.CaptureFixture
) -> None:
    pair[1].enter(5, "data")
    pair[0].enter(5, "step")
    time.sleep(2.5)
    assert ended
    assert "rank 1, pid" in capfd.readouterr().err.splitlines()[0]


@pytest.mark.integration
def test_ranks_that_step_on_are_left_alone(pair: Pair, ended: list) -> None:
    for step in range(25):
        for watch in pair:
            watch.enter(step, "step")
        time.sleep(0.1)
    assert ended == []
