"""Whom the watch takes for hung or failed: two of them in one process, one store between them, and ends that are only noted."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from waiting import wait_for

from features.errors import OtherRankError, Preempted, UserError
from pipeline.training import train as training
from pipeline.training import trainer as trainer_module
from pipeline.training.config import Settings
from pipeline.training.faults import failures, hang_watch
from pipeline.training.faults.failures import Failure
from pipeline.training.faults.hang_watch import HangWatch, Heartbeat
from pipeline.training.faults.preemption import PREEMPTED, PreemptionSignal
from pipeline.training.parallel import process_group

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
def exits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What each watch that has ended its process would have exited with; it has little patience."""
    noted: list[int] = []
    monkeypatch.setattr(hang_watch, "GRACE_S", 0.3)
    monkeypatch.setattr(HangWatch, "_kill", lambda *_: None)

    def end(code: int) -> None:
        noted.append(code)
        sys.exit()  # the thread

    monkeypatch.setattr("os._exit", end)
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
    pair: Pair, ended: list, phase: str, capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hang_watch, "leave", lambda *_: None)
    pair[1].enter(5, phase)
    pair[1].stop()
    pair[0].enter(5, phase)
    wait_for(lambda: ended)
    pair[0].thread.join()
    assert ended == [[os.getpid()]]  # where the silent one is, here
    assert "rank 1, pid" in capfd.readouterr().err


@pytest.mark.integration
def test_a_rank_that_waits_for_its_data_while_the_others_wait_for_it_is_named(
    pair: Pair, ended: list, capfd: pytest.CaptureFixture
) -> None:
    pair[1].enter(5, "data")
    pair[0].enter(5, "step")
    wait_for(lambda: ended)
    pair[0].thread.join()
    assert "rank 1, pid" in capfd.readouterr().err.splitlines()[0]


@pytest.mark.integration
def test_ranks_that_step_on_are_left_alone(pair: Pair, ended: list) -> None:
    for step in range(25):
        for watch in pair:
            watch.enter(step, "step")
        time.sleep(0.1)
    assert ended == []


# A rank that has failed


@pytest.mark.integration
def test_a_rank_ends_soon_after_another_has_failed_with_that_ones_name_and_reason(
    pair: Pair, exits: list, capfd: pytest.CaptureFixture
) -> None:
    for watch in pair:
        watch.enter(5, "step")
    pair[1].stop(UserError("part-3.parquet: no room. Make some."))
    wait_for(lambda: exits == [1])
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("error (rank 0): step 5: rank 1 on ")
    assert line.endswith(
        " failed: part-3.parquet: no room. Make some. jobs.launch --max-restarts=N resumes from the newest checkpoint."
    )


@pytest.mark.integration
def test_a_rank_that_writes_a_checkpoint_has_longer_and_one_that_ends_by_itself_is_not_ended(
    pair: Pair, exits: list
) -> None:
    pair[0].enter(5, "save")
    pair[1].stop(MemoryError("no room"))
    time.sleep(0.8)
    assert exits == []
    pair[0].enter(6, "step")
    pair[0].stop(OtherRankError("step 5: lost contact"))
    assert exits == []


@pytest.mark.integration
@pytest.mark.parametrize("error", [None, Preempted("saved"), SystemExit(PREEMPTED), SystemExit()])
def test_a_rank_that_ends_as_it_should_ends_no_other(pair: Pair, exits: list, error: BaseException | None) -> None:
    assert pair[0].store
    pair[0].enter(5, "step")
    pair[1].stop(error)
    time.sleep(0.6)
    pair[0].enter(6, "save")  # which may take longer than `timeout`
    time.sleep(2.3 if error is None else 0)
    assert exits == []
    assert not pair[0].store.check([failures.FAILED])
    assert pair[0].store.check(["left/1"])


def test_of_several_failures_the_first_cause_is_reported_and_not_what_followed_from_it() -> None:
    store = dist.HashStore()
    followed, cause, later = Failure("lost contact", False), Failure("no room", True), Failure("no room here too", True)
    for failure, wanted in ((followed, followed), (cause, cause), (later, cause), (followed, cause)):
        failures.report(store, failure)
        assert failures.reported(store) == wanted
    made = failures.failure_of(3, OtherRankError("step 5: lost contact"))
    assert made
    assert (made.cause, made.text.split(" on ")[0]) == (False, "rank 3")


@pytest.mark.integration
@pytest.mark.parametrize("left", [False, True])
def test_a_process_of_this_machine_that_is_gone_has_failed_unless_it_has_left(
    exits: list, capfd: pytest.CaptureFixture, left: bool
) -> None:
    gone = subprocess.Popen(["true"])
    time.sleep(0.2)  # not waited for: a launcher takes a while to notice
    store = dist.HashStore()
    store.set("beat/3", json.dumps(Heartbeat(1, 5, "step", 0, "here", gone.pid, os.getppid())))
    if left:
        store.set("left/3", "")
    watch = HangWatch(store, 2, 4, 1.0, local=[3])
    watch.enter(5, "step")
    time.sleep(1.0) if left else wait_for(lambda: exits == [1])
    watch.stop()
    gone.wait()
    assert exits == ([] if left else [1])
    assert (
        f"step 5: rank 3 on {os.uname().nodename} failed: its process, pid {gone.pid}, is gone"
        in capfd.readouterr().err
    ) != left


class Gone:
    """A store whose host closes the connection once `host` is False."""

    def __init__(self) -> None:
        self.store, self.host = dist.HashStore(), True

    def __getattr__(self, name: str) -> Any:
        if not self.host:
            raise dist.DistNetworkError("failed to recv, got 0 bytes")
        return getattr(self.store, name)


@pytest.mark.integration
def test_a_rank_without_a_store_ends_once_it_stands_still_and_not_before(
    exits: list, capfd: pytest.CaptureFixture
) -> None:
    store: Any = Gone()
    watch = HangWatch(store, 1, 2, 1.0)
    store.host = False
    for step in range(8):
        watch.enter(step, "step")
        time.sleep(0.2)
    assert exits == []
    wait_for(lambda: exits == [1])
    watch.stop()
    assert (
        "error (rank 1): step 7: has stood still for 1 s, and the launcher of rank 0 is gone" in capfd.readouterr().err
    )


@pytest.mark.integration
@pytest.mark.parametrize("phase", ["step", "save"])
def test_a_rank_that_stands_still_after_sigterm_ends_before_its_launcher_would_kill_it(
    monkeypatch: pytest.MonkeyPatch, exits: list, capfd: pytest.CaptureFixture, phase: str
) -> None:
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "0.5")
    watch = HangWatch(dist.HashStore(), 0, 2, 2.0)
    watch.enter(7, phase)
    watch.expect_end()
    time.sleep(1.1)
    watch.stop()
    assert exits == ([1] if phase == "step" else [])
    assert ("step 7: has stood still for" in capfd.readouterr().err) == (phase == "step")


def test_sigterm_is_known_while_the_main_thread_waits_in_c() -> None:
    """Where Python runs no handler: here until a thread releases a mutex, at once or in the end."""
    mutex, libc, begin = ctypes.create_string_buffer(64), ctypes.CDLL(None), time.monotonic()
    received = PreemptionSignal(log=False)
    timers = (
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)),
        threading.Timer(5, libc.pthread_mutex_unlock, (mutex,)),
    )
    libc.pthread_mutex_lock(mutex)
    with received.handling(lambda: libc.pthread_mutex_unlock(mutex)):
        for timer in timers:
            timer.start()
        libc.pthread_mutex_lock(mutex)
    timers[1].cancel()
    assert received.received
    assert time.monotonic() - begin < 4


def test_training_that_fails_leaves_its_reason_with_the_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[BaseException | None] = []
    errors = [UserError("no room"), RuntimeError("Read error: Connection reset by peer"), ValueError("a defect")]

    def prepare(*_: Any) -> None:
        raise errors[len(said)]

    monkeypatch.setattr(process_group, "start", lambda _: torch.device("cpu"))
    monkeypatch.setattr(training, "watch_ranks", lambda _: SimpleNamespace(stop=said.append))
    monkeypatch.setattr(training, "prepare", prepare)
    monkeypatch.setattr(training.tracking, "check", lambda _: None)
    config: Any = SimpleNamespace(train=Settings(timeout=60))
    for _ in errors:
        with pytest.raises((UserError, RuntimeError, ValueError)):
            training.train(config)
    assert [type(error) for error in said] == [UserError, OtherRankError, ValueError]


@pytest.mark.parametrize("is_lost", [False, True])
def test_a_run_is_marked_as_failed_unless_another_trainer_has_it_by_now(
    is_lost: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []

    def run_to_end() -> None:
        raise UserError("no more")

    trainer = SimpleNamespace(
        rank=0,
        state=SimpleNamespace(step=3),
        steps=9,
        owner=SimpleNamespace(is_lost=is_lost),
        run=SimpleNamespace(write_status=lambda state, *_: written.append(state)),
        run_to_end=run_to_end,
    )
    monkeypatch.setattr(process_group, "start", lambda _: torch.device("cpu"))
    monkeypatch.setattr(training, "watch_ranks", lambda _: SimpleNamespace(stop=lambda _: None))
    monkeypatch.setattr(training, "prepare", lambda *_: trainer)
    monkeypatch.setattr(training.tracking, "check", lambda _: None)
    config: Any = SimpleNamespace(train=Settings(timeout=60))
    with pytest.raises(UserError, match="no more"):
        training.train(config)
    assert written == ([] if is_lost else ["failed"])


def test_a_session_with_a_watch_of_its_own_leaves_its_reason_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[BaseException | None] = []
    watch = SimpleNamespace(stop=lambda error=None: said.append(error), expect_end=lambda: None)
    monkeypatch.setattr(trainer_module, "watch_ranks", lambda _: watch)
    for error in (ValueError("a defect"), None):
        session: Any = object.__new__(trainer_module.Trainer)
        session.watch, session.settings, session.rank, session.ranks, session.steps = None, Settings(), 1, 1, 1
        session.state, session.preemption = SimpleNamespace(step=0), PreemptionSignal(log=False)
        with suppress(ValueError), session._session():
            if error:
                raise error
        assert said[-1] is error
