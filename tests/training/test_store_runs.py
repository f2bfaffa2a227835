"""Runs on an S3 server: the weights and lines of those on disk, whatever becomes of the server, the ranks or the lease."""

import errno
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from s3_server import KEY, SECRET, S3Server
from store_fixtures import FaultProxy
from tiny_training import assert_identical, configuration, last, make_dataset, tensors, torchrun
from two_ranks_on_store import SETTINGS

from features.errors import Preempted, UserError
from pipeline.run import checkpoint, outbox
from pipeline.run.checkpoint import writer
from pipeline.run.outbox import Outbox
from pipeline.run.owner import Owner
from pipeline.run.retention import Keep
from pipeline.run.run import LostRunError, Run
from pipeline.run.tracking.registry import Sinks
from pipeline.storage import lease, objects
from pipeline.storage.files import read_lines
from pipeline.storage.store_path import StorePath, files_below
from pipeline.training.observer import Observer
from pipeline.training.step import StepOutput
from pipeline.training.train import prepare
from pipeline.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("device")

HERE = Path(__file__).parent
EXACT = {"dense": {"name": "adamw", "lr": 0.003, "decay": "cosine"}, "dropout": 0.3, "checkpoint_every": 20}


def train(data: Path, run: Path, *observers: Observer, **settings: Any) -> Path:
    prepare(configuration(data, run, **settings), None, torch.device("cpu"), observers).run_to_end()
    return run


def put_dataset(data: Path, folder: StorePath) -> StorePath:
    for file in data.rglob("*"):
        if file.is_file():
            (folder / file.relative_to(data).as_posix()).write_bytes(file.read_bytes())
    return folder


def lines(run: Path, name: str) -> list[dict[str, Any]]:
    """Of a file of metrics, without what depends on the clock."""
    clock = ("time", "rows_per_s", "data_wait", "seconds_left")
    return [{k: v for k, v in line.items() if k not in clock} for line in read_lines(run / "metrics" / name)]


class At(Observer):
    """Calls something after a step."""

    def __init__(self, step: int, what: Any) -> None:
        self.step, self.what = step, what

    def on_step(self, trainer: Trainer, output: StepOutput) -> None:
        if trainer.state.step == self.step:
            self.what(trainer)


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    return train(folder / "data", folder / "whole", **EXACT)


def test_a_run_and_its_dataset_on_a_store_give_the_same_weights_and_lines_and_no_credentials(
    folder: Path, whole: Path, s3: StorePath
) -> None:
    data = put_dataset(folder / "data", s3 / "data")

    def preempt(trainer: Trainer) -> None:
        trainer.preemption.received = True

    with pytest.raises(Preempted, match=r"saved s3://.*step-00000026"):
        train(data, s3 / "run", At(26, preempt), keep={"last": 1}, **EXACT)
    assert Run(s3 / "run").status().state == "preempted"
    train(data, s3 / "run", keep={"last": 1}, **EXACT)

    assert checkpoint.steps(s3 / "run" / "checkpoints") == [50]
    assert_identical(last(s3 / "run"), last(whole))
    for name in ("train.jsonl", "progressive.jsonl"):
        assert lines(s3 / "run", name) == lines(whole, name)
    assert Run(s3 / "run").status().state == "finished"
    assert [(start.step, start.reason) for start in Run(s3 / "run").starts()] == [(0, "start"), (26, "resume")]

    files = {str(file).removeprefix(f"{s3}/"): file.read_bytes() for file in files_below(s3)}
    assert not [name for name, content in files.items() if KEY.encode() in content or SECRET.encode() in content]
    kinds = {name.split("/")[1] for name in files if name.startswith("run/")}
    on_disk = {path.name for path in whole.iterdir()}
    assert kinds == on_disk
    assert not [name for name in files if ".lease/" in name]
    curves = [content for name, content in files.items() if name.startswith("run/tensorboard/")]
    assert len(curves) == 2
    assert all(b"train/loss" in content for content in curves)

    train(data, s3 / "warm", max_steps=1, init_from=s3 / "run")
    assert "init_from: s3://" in (s3 / "warm" / "config.yaml").read_text()


@pytest.mark.system
def test_ranks_of_a_run_on_a_store_are_killed_and_go_on_at_once_and_on_another_number_of_ranks(
    tmp_path: Path, s3: StorePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset(tmp_path / "data")
    put_dataset(tmp_path / "data", s3 / "data")
    monkeypatch.setenv("ON_STORE", str(s3))
    done = torchrun("--max-restarts=1", str(HERE / "two_ranks_on_store.py"), str(tmp_path))
    assert done.returncode == 0, done.stderr
    begun, again = Run(s3 / "two").starts()
    assert (begun.step, again.step, again.ranks) == (0, 20, 2)
    assert again.time - begun.time < lease.LEASE_S  # nobody has waited for a dead owner's
    for data, run in ((tmp_path / "data", tmp_path / "two"), (s3 / "data", s3 / "two")):
        train(data, run, **SETTINGS | {"max_steps": 50})
    for step in (40, 50):
        found = [tensors(checkpoint.folder(run / "checkpoints", step)) for run in (s3 / "two", tmp_path / "two")]
        assert_identical(*found)
    assert not [file for file in files_below(s3) if SECRET.encode() in file.read_bytes()]


def test_a_server_that_is_killed_in_a_checkpoint_and_comes_back_costs_nothing(
    folder: Path, whole: Path, s3: StorePath, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, restarts = writer._write, []

    def killing(staging: Path, *arguments: Any) -> Any:
        if staging.name == "step-00000020":
            s3_server.kill()
            restarts.append(threading.Timer(1, s3_server.start))
            restarts[0].start()
        return write(staging, *arguments)

    monkeypatch.setattr(writer, "_write", killing)
    train(folder / "data", s3 / "run", **EXACT)
    restarts[0].join()
    assert checkpoint.steps(s3 / "run" / "checkpoints") == [20, 40, 50]
    assert_identical(last(s3 / "run"), last(whole))
    assert lines(s3 / "run", "train.jsonl") == lines(whole, "train.jsonl")


def test_a_store_that_stays_away_for_a_checkpoint_is_a_line_and_training_goes_on(
    folder: Path,
    whole: Path,
    through_proxy: StorePath,
    proxy: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("TASKFUSE_STORE_TIMEOUT", "1.5")
    monkeypatch.setattr(outbox, "EVERY_S", 0.1)
    run, write = through_proxy / "run", writer._write

    def away(staging: Path, *arguments: Any) -> Any:
        if staging.name == "step-00000020":
            proxy.stop()
        return write(staging, *arguments)

    def back(trainer: Trainer) -> None:
        assert trainer.writer.thread is not None
        trainer.writer.thread.join()
        proxy.start()

    monkeypatch.setattr(writer, "_write", away)
    train(folder / "data", run, At(39, back), **EXACT)
    assert checkpoint.steps(run / "checkpoints") == [40, 50]
    assert_identical(last(run), last(whole))
    assert lines(run, "train.jsonl") == lines(whole, "train.jsonl")
    [said] = [line for line in caplog.messages if "Training continues" in line]
    assert "step-00000020: cannot be written: " in said
    assert "has not answered for 1.5 s" in said


def test_a_rollback_on_a_store_leaves_each_step_once_in_its_lines(tmp_path: Path, memory: StorePath) -> None:
    data = make_dataset(tmp_path / "data", spoil=("price", 123))
    settings = {"nonfinite": "skip", "checkpoint_every": 5, "max_steps": 20}
    runs = [train(data, place / "run", **settings) for place in (tmp_path, memory)]
    assert lines(runs[1], "train.jsonl") == lines(runs[0], "train.jsonl")
    steps = [line["step"] for line in lines(runs[1], "train.jsonl")]
    assert steps == sorted(set(steps))
    assert checkpoint.read(checkpoint.folder(memory / "run" / "checkpoints", 20)).skipped
    assert_identical(last(runs[1]), last(runs[0]))


def test_a_trainer_that_has_lost_its_run_rolls_nothing_of_it_back(tmp_path: Path, memory: StorePath) -> None:
    data = make_dataset(tmp_path / "data", spoil=("price", 123))

    def files() -> dict[StorePath, bytes]:
        return {file: file.read_bytes() for file in files_below(memory) if ".lease/" not in str(file)}

    def taken_over(trainer: Trainer) -> None:
        trainer.wait_for_writer()
        trainer.run.flush()
        lock: Any = trainer.owner.lock
        lock.owned.lost = True
        seen.update(files())

    seen: dict[StorePath, bytes] = {}
    settings = {"nonfinite": "skip", "checkpoint_every": 50, "max_steps": 20, "log_every": 1}
    with pytest.raises(LostRunError, match="another trainer has taken the run over"):
        train(data, memory / "run", At(3, taken_over), **settings)
    assert lines(memory / "run", "train.jsonl")
    assert files() == seen


def test_a_second_trainer_is_refused_and_changes_nothing(folder: Path, s3: StorePath) -> None:
    train(folder / "data", s3 / "run", max_steps=2)
    before = {file: file.read_bytes() for file in files_below(s3)}
    with Run(s3 / "run").lock("train", "mine"), pytest.raises(UserError, match="another trainer writes to it"):
        train(folder / "data", s3 / "run", max_steps=4)
    assert {file: file.read_bytes() for file in files_below(s3)} == before


def test_a_trainer_whose_lease_was_taken_over_writes_nothing_more(
    folder: Path, s3: StorePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "LEASE_S", 0.3)
    monkeypatch.setattr(outbox, "EVERY_S", 0.05)
    seen: dict[StorePath, bytes] = {}

    def taken_over(trainer: Trainer) -> None:
        held = lease.folder_of(trainer.run.lock_file("train")) / "exclusive"
        about = json.loads(held.read_bytes())
        held.write_bytes(json.dumps(about | {"owner": "another"}).encode())
        trainer.owner.lock.owned.stop.wait(0.4)  # some renewals
        seen.update({file: file.read_bytes() for file in files_below(s3)})

    with pytest.raises(LostRunError, match="another trainer has taken the run over"):
        train(folder / "data", s3 / "run", At(9, taken_over), checkpoint_every=10)
    assert checkpoint.steps(s3 / "run" / "checkpoints") == []
    assert {file: file.read_bytes() for file in files_below(s3)} == seen


def test_many_lines_are_few_puts_and_all_of_them_are_there(
    memory: StorePath, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(outbox, "EVERY_S", 0.02)
    puts, away = [], threading.Event()
    write = objects.ObjectStorage.write

    def counted(self: Any, path: Path, content: bytes) -> None:
        if away.is_set():
            raise OSError(110, "the store has not answered for 1 s", str(path))
        puts.append((path.name, content.count(b"\n")))
        write(self, path, content)

    monkeypatch.setattr(objects.ObjectStorage, "write", counted)
    file = memory / "train.jsonl"
    file.write_bytes(b'{"step": 0}\n')
    box = Outbox()
    for step in range(1, 1001):
        box.append(file, {"step": step})
    box.flush()
    assert len(puts) < 20
    assert [line["step"] for line in read_lines(file)] == list(range(1001))
    away.set()
    box.append(file, {"step": 1001})
    box.put(memory / "status.json", lambda: b"old")
    with pytest.raises(OSError, match="has not answered"):
        box.flush()
    away.clear()
    box.put(memory / "status.json", lambda: b"new")
    assert box.close()
    assert [line["step"] for line in read_lines(file)] == list(range(1002))
    assert (memory / "status.json").read_bytes() == b"new"

    lost = Outbox(lambda: True)
    lost.append(file, {"step": 1002})
    assert lost.close()
    assert [line["step"] for line in read_lines(file)] == list(range(1002))


def test_a_file_whose_content_cannot_be_had_keeps_neither_lines_nor_checkpoints_back(memory: StorePath) -> None:
    def failing(error: Exception) -> bytes:
        assert not box.guard.locked()  # a line is added without waiting for TensorBoard
        raise error

    run, box = Run(memory / "run"), Outbox()
    box.put(memory / "events", lambda: failing(OSError(errno.ENOSPC, "No space left on device", "events")))
    box.put(memory / "others", lambda: failing(ValueError("closed")))
    box.append(memory / "train.jsonl", {"step": 1})
    with pytest.raises(OSError, match=r"No space left|closed"):
        box.flush()
    assert (memory / "train.jsonl").read_bytes() == b'{"step": 1}\n'
    box.append(memory / "train.jsonl", {"step": 2})
    run.outbox = box
    Owner(run, Keep(), "data", Sinks()).before_commit()
    assert len((memory / "train.jsonl").read_bytes().splitlines()) == 2
    box.put(memory / "events", lambda: b"whole")
    box.put(memory / "others", lambda: b"whole")
    assert box.close()
    assert (memory / "others").read_bytes() == b"whole"


def test_a_run_whose_last_lines_cannot_be_written_ends_with_an_error(
    memory: StorePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(self: Any, path: Path, content: bytes) -> None:
        raise OSError(errno.ETIMEDOUT, "the store has not answered for 1 s", str(path))

    def trained() -> None:
        with Owner(run, Keep(), "data", Sinks()).writing():
            run.append(run.train_metrics, {"step": 1})
            monkeypatch.setattr(objects.ObjectStorage, "write", away)

    run = Run(memory / "run")
    with pytest.raises(UserError, match="the last lines of its metrics cannot be written"):
        trained()


def test_a_run_that_is_lost_as_a_checkpoint_is_committed_keeps_the_others_checkpoints(memory: StorePath) -> None:
    run = Run(memory / "run")
    for step in (3, 5):
        (checkpoint.folder(run.checkpoints, step) / "manifest.json").write_bytes(b"{}")
    owner = Owner(run, Keep(last=1), "data", Sinks())
    with lease.lease(memory / "lock") as owner.lock:
        owner.lock.owned.lost = True
        owner.committed(3, 1.0)
    assert checkpoint.steps(run.checkpoints) == [3, 5]


def test_a_lease_that_is_lost_while_lines_are_put_commits_no_checkpoint(memory: StorePath) -> None:
    run = Run(memory / "run")
    owner = Owner(run, Keep(), "data", Sinks())
    with lease.lease(memory / "lock") as held:

        class Slow(Outbox):
            def flush(self, only_lines: bool = False) -> None:
                held.owned.lost = True

        run.outbox, owner.lock = Slow(), held
        with pytest.raises(LostRunError, match="taken the run over"):
            owner.before_commit()
        run.outbox.ended.set()
