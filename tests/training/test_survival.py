"""Runs that are killed, stopped, resized, hung, or fed what cannot be learnt from: nothing is lost, and all of it is said."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import (
    PATHS,
    TRAIN_ROWS,
    assert_close,
    assert_identical,
    configuration,
    last,
    losses,
    make_dataset,
    model,
    on_late_device,
    tensors,
    write_checkpoint,
)
from two_ranks import train

from features.errors import Preempted, UserError
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.loader import Loader
from pipeline.run import checkpoint
from pipeline.run.checkpoint import writer
from pipeline.storage.files import read_lines
from pipeline.training.config import TrainConfig
from pipeline.training.faults.hang_watch import Heartbeat, diagnosis
from pipeline.training.observer import Observer
from pipeline.training.step import StepOutput
from pipeline.training.train import prepare
from pipeline.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("device")

HERE = Path(__file__).parent
EXACT = {
    "dense": {"name": "adamw", "lr": 0.003, "decay": "cosine"},
    "dropout": 0.3,
    "checkpoint_every": 20,
    "log_every": 7,
}


def records(run: Path, name: str) -> list[dict[str, Any]]:
    """Lines of a metrics file without what depends on the clock."""
    clock = ("time", "rows_per_s", "data_wait", "seconds_left")
    return [{k: v for k, v in line.items() if k not in clock} for line in read_lines(run / "metrics" / name)]


def manifest(run: Path) -> checkpoint.CheckpointManifest:
    return checkpoint.read(checkpoint.folder(run / "checkpoints", checkpoint.steps(run / "checkpoints")[-1]))


# Told to end


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    train(folder, "whole", **EXACT)
    return folder / "whole"


@pytest.mark.parametrize("step", [1, 6, 13, 14, 20, 49])
def test_a_run_that_was_told_to_end_after_any_step_goes_on_bit_for_bit(
    folder: Path, whole: Path, step: int, capfd: pytest.CaptureFixture
) -> None:
    class Preempting(Observer):
        def on_forward(self, trainer: Trainer, output: StepOutput) -> None:
            if trainer.state.step + 1 == step:
                os.kill(os.getpid(), signal.SIGTERM)

    name = f"told-{step}"
    with pytest.raises(Preempted, match=rf"SIGTERM: saved .*step-{step:08d}\. Rerun the same command to resume"):
        train(folder, name, Preempting(), **EXACT)
    assert json.loads((folder / name / "status.json").read_text())["state"] == "preempted"
    assert "SIGTERM: one more step" in capfd.readouterr().err
    resumed = train(folder, name, **EXACT)
    assert min(resumed.seen) == step + 1
    assert_identical(last(folder / name), last(whole))
    for file in ("train.jsonl", "progressive.jsonl"):
        assert records(folder / name, file) == records(whole, file)


@pytest.mark.system
def test_a_process_alone_exits_with_75_when_it_is_told_to_end(folder: Path) -> None:
    """And with 0 once it has gone on to its end."""
    faults = json.dumps([[0, 0, 9, "SIGTERM", "self"]])
    command = [sys.executable, str(HERE / "faulty_run.py"), str(folder), "alone"]
    environment = os.environ | {"PYTHONPATH": PATHS}
    done = subprocess.run([*command, "0", "{}", faults], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == os.EX_TEMPFAIL, done.stderr
    assert re.search(r"SIGTERM: saved \S+step-00000009\.", done.stderr)
    assert manifest(folder / "alone").step == 9


# Killed, hung, resized


def launch(folder: Path, name: str, ranks: int, attempt: int, faults: list, *flags: str, **settings: Any) -> Any:
    """A run of faulty_run.py under jobs.launch, what it said printed."""
    command = [sys.executable, "-m", "jobs.launch", f"--nproc-per-node={ranks}", *flags]
    command += [str(HERE / "faulty_run.py"), str(folder), name, str(attempt), json.dumps(settings), json.dumps(faults)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS}
    environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = "60"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    print(done.stdout, done.stderr)
    return done


def rows_of_steps(folder: Path, name: str) -> dict[int, list[int]]:
    """For each step the rows of the attempt that took it last: those of attempts before it were taken back."""
    steps: dict[int, tuple[int, list[int]]] = {}
    for file in sorted((folder / f"{name}.seen").iterdir()):
        for line in map(json.loads, file.read_text().splitlines()):
            attempt, rows = steps.get(line["step"], (-1, []))
            if line["attempt"] > attempt:
                attempt, rows = line["attempt"], []
            if line["attempt"] == attempt:
                steps[line["step"]] = attempt, rows + line["rows"]
    return {step: rows for step, (_, rows) in steps.items()}


def exactly_once(folder: Path, name: str) -> None:
    """Every epoch's rows, over all attempts and ranks."""
    steps = rows_of_steps(folder, name)
    assert sorted(steps) == list(range(1, 51))
    for epoch in range(3):
        rows = [row for step in range(13 * epoch + 1, 13 * epoch + 14) for row in steps[step]]
        assert len(rows) == len(set(rows)) == TRAIN_ROWS
    assert manifest(folder / name).rows == sum(map(len, steps.values()))
    assert manifest(folder / name).left_out == 0


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Path:
    train(folder, "undisturbed")
    return folder / "undisturbed"


@pytest.mark.system
def test_a_rank_that_is_killed_and_then_one_that_hangs_cost_the_steps_since_the_last_checkpoint_alone(
    folder: Path, undisturbed: Path
) -> None:
    """Rank 0 waits in C, as for a GPU that waits for another rank's: neither an error nor the launcher's SIGTERM ends it."""
    faults = [[0, 1, 12, "SIGKILL", "self"], [1, 1, 33, "SIGSTOP", "self"]]
    faults += [[0, 0, 12, "waits in C", ""], [1, 0, 33, "waits in C", ""]]
    done = launch(folder, "killed", 2, 0, faults, "--max-restarts=2", checkpoint_every=5, timeout=5)
    assert done.returncode == 0
    assert re.search(r"error \(rank 0\): step 12: rank 1 on \S+ failed: its process, pid \d+, is gone", done.stderr)
    # The checkpoint before the fault may have been under way.
    assert re.search(r"resumed from \S+step-000000(10|05)\n(.*\n)*.*resumed from \S+step-000000(30|25)\n", done.stderr)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error (rank 0): step ")]
    hung = next(line for line in lines if "does not answer" in line)
    assert re.match(r"error \(rank 0\): step 33: .* rank 1, pid \d+ on \S+, was at step \d+ and does not answer", hung)
    exactly_once(folder, "killed")
    assert_close(last(folder / "killed"), last(undisturbed), rtol=5e-3, atol=5e-4)
    assert losses(folder / "killed") == pytest.approx(losses(undisturbed), rel=1e-3)


@pytest.mark.system
def test_a_run_goes_from_two_ranks_to_four_to_one_and_every_row_is_seen_once(folder: Path, undisturbed: Path) -> None:
    plans = ["table_wise"], ["row_wise"]
    for attempt, (ranks, step) in enumerate([(2, 17), (4, 31)]):
        faults = [[attempt, ranks - 1, step, "SIGTERM", "launcher"]]
        settings = {"sharding": {"default": plans[attempt]}, "checkpoint_every": 100}
        done = launch(folder, "resized", ranks, attempt, faults, **settings)
        assert done.returncode == os.EX_TEMPFAIL
        stopped = manifest(folder / "resized")
        assert step <= stopped.step <= step + 2
        assert stopped.ranks == ranks
        if attempt:
            assert "written by 2 ranks\n" in done.stderr
            assert f"changed since: train.sharding.default {plans[0]} -> {plans[1]}\n" in done.stderr
            [again] = (folder / "resized.again").iterdir()
            before = checkpoint.folder(folder / "resized" / "checkpoints", int(again.name.removeprefix("step-")))
            assert_identical(
                tensors(again), {n: t for n, t in tensors(before).items() if not n.startswith("progress.")}
            )
    faults, settings = [], {"checkpoint_every": 100}
    command = [sys.executable, str(HERE / "faulty_run.py"), str(folder), "resized", "2", json.dumps(settings), "[]"]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": PATHS}, check=True, timeout=120)
    exactly_once(folder, "resized")
    assert_close(last(folder / "resized"), last(undisturbed), rtol=5e-3, atol=5e-4)


def beat(alive: int, step: int, phase: str, seconds: float = 70) -> Heartbeat:
    return Heartbeat(alive, step, phase, seconds, "node-7", 42, 41)


@pytest.mark.parametrize(
    ("first", "then", "says"),
    [
        ([beat(5, 8, "step"), beat(5, 8, "step")], [beat(8, 8, "step"), beat(5, 8, "step")], "rank 1, pid 42 on node-7, was"),
        ([beat(5, 8, "step"), None], [beat(8, 8, "step"), None], "rank 1 does not answer"),
        ([beat(5, 8, "step"), beat(5, 8, "data")], [beat(8, 8, "step"), beat(8, 8, "data", 71)],
         "rank 1, pid 42 on node-7, waits for data since 71 s, in step 8"),
        ([beat(5, 9, "data"), beat(5, 8, "step")], [beat(8, 9, "data"), beat(8, 8, "step")], "rank 1, pid 42"),
        ([beat(5, 8, "step")] * 2, [beat(8, 8, "step")] * 2, "all of them are in the same step"),
    ],
)  # fmt: skip
def test_the_rank_that_others_wait_for_is_the_silent_one_or_the_one_furthest_behind(
    first: list, then: list, says: str
) -> None:
    assert says in diagnosis(first, then, 0)
    assert "for 70 s" in diagnosis(first, then, 0)


# What cannot be learnt from


def step_of(data: Path, row_id: int, epoch: int = 0) -> int:
    """The step of an epoch that holds a row."""
    loader = Loader(Dataset(data), "train", 32, 4, 5, window=24)
    batches = enumerate(loader.batches(loader.start(epoch)), start=1 + 13 * epoch)
    return next(number for number, batch in batches if row_id in batch.row_id_B)


def test_batches_whose_loss_is_not_finite_are_skipped_as_if_they_had_not_been(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = make_dataset(folder / "infinite", spoil=("price", 22))
    wanted = tuple(step_of(data, 22, epoch) for epoch in range(4))
    without = prepare(configuration(data, folder / "without", checkpoint_every=8), None, torch.device("cpu"))
    without.state.skipped = set(wanted)  # from the beginning: these batches are never looked at
    without.run_to_end()
    train(folder, "skipping", data="infinite", checkpoint_every=8, nonfinite="skip")
    assert_identical(last(folder / "skipping"), last(folder / "without"))
    assert records(folder / "skipping", "train.jsonl") == records(folder / "without", "train.jsonl")
    inside = tuple(step for step in wanted if step <= 50)
    assert tuple(manifest(folder / "skipping").skipped) == inside
    padding = 13 * 32 - TRAIN_ROWS
    assert manifest(folder / "skipping").left_out == 32 * len(inside) - padding * sum(step % 13 == 0 for step in inside)
    said = caplog.text
    for step in inside:
        assert re.search(rf"step {step}, epoch \d: the loss of 1 rows of the batch is not finite, row_id 22\.", said)
        assert f"to skip the batch of step {step}" in said
    assert said.count("is not finite") == len(inside)


def test_a_batch_that_is_found_some_steps_later_as_on_a_gpu_leaves_nothing_behind(folder: Path) -> None:
    """Its numbers arrive 2 steps later. Lines are logged, which waits for all, more rarely."""
    data = make_dataset(folder / "infinite-late", spoil=("price", 22))
    settings: dict[str, Any] = {"checkpoint_every": 8, "log_every": 100, "max_steps": 20, "nonfinite": "skip"}
    bad, steps = step_of(data, 22), []

    class Steps(Observer):
        def on_step(self, trainer: Trainer, output: StepOutput) -> None:
            steps.append(trainer.state.step)

    made = prepare(configuration(data, folder / "late", **settings), None, torch.device("cpu"), [Steps()])
    on_late_device(made, 4).run_to_end()
    train(folder, "at-once", data="infinite-late", **settings)
    assert_identical(last(folder / "late"), last(folder / "at-once"))
    assert manifest(folder / "late").skipped[:1] == [bad]
    assert steps[: bad + 1] == list(range(1, bad + 2)), "it is not found at once"


def test_a_run_whose_last_batch_is_skipped_ends_with_a_checkpoint_all_the_same(folder: Path) -> None:
    data = make_dataset(folder / "infinite-last", spoil=("price", 22))
    step = step_of(data, 22)
    train(folder, "ended", data="infinite-last", checkpoint_every=4, max_steps=step, nonfinite="skip")
    assert (manifest(folder / "ended").step, manifest(folder / "ended").skipped) == (step, [step])
    assert train(folder, "ended", data="infinite-last", max_steps=step, nonfinite="skip").seen == {}


def test_too_many_batches_to_skip_stop_the_run_and_what_is_written_is_good(folder: Path) -> None:
    data = make_dataset(folder / "infinite-too", spoil=("price", 22))
    second = step_of(data, 22, 1)
    with pytest.raises(
        UserError, match=rf"step {second}: loss or gradient is not finite, and 1 batches were skipped already"
    ):
        train(folder, "limited", data="infinite-too", checkpoint_every=8, nonfinite="skip", max_skipped=1)
    assert all(value.isfinite().all() for value in model(last(folder / "limited")).values())


def test_a_row_group_that_cannot_be_read_is_left_out_and_counted_or_stops_the_run_by_name(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = make_dataset(folder / "torn")
    shard = sorted((data / "train").glob("*.parquet"))[1]
    content = bytearray(shard.read_bytes())
    content[40:60] = bytes(20)  # in the pages of the first row group
    shard.write_bytes(content)
    with pytest.raises(UserError, match=rf"{shard.name}, row group 0: cannot be read .* train\.corrupt=skip"):
        train(folder, "torn-stop", data="torn")
    with pytest.raises(UserError, match=r"40 of 415 rows cannot be read, more than train\.max_corrupt=0\.01 allows"):
        train(folder, "torn-too-much", data="torn", corrupt="skip")
    caplog.clear()
    survivor = train(folder, "torn-skip", data="torn", corrupt="skip", max_corrupt=0.1, max_steps=26)
    said = [line for line in caplog.messages if "are left out" in line]
    [line] = said  # once, though several lanes and epochs read it
    lost = 40  # a row group
    assert shard.name in line
    for epoch in range(2):
        rows = [row for step, seen in survivor.seen.items() if (step - 1) // 13 == epoch for row in seen]
        assert len(rows) == len(set(rows)) == TRAIN_ROWS - lost
    assert (manifest(folder / "torn-skip").rows, manifest(folder / "torn-skip").left_out) == (
        2 * (TRAIN_ROWS - lost),
        2 * lost,
    )
    assert records(folder / "torn-skip", "train.jsonl")[-1]["left_out"] == 2 * lost


def test_files_that_are_gone_stop_a_run_that_would_leave_damaged_ones_out(folder: Path) -> None:
    data = make_dataset(folder / "vanished")
    made = prepare(
        configuration(data, folder / "vanished-run", corrupt="skip", max_corrupt=1.0), None, torch.device("cpu")
    )
    for shard in (data / "train").iterdir():
        shard.unlink()
    with pytest.raises(UserError, match=r"No such file"):
        made.run_to_end()


def train_spoiled(folder: Path, name: str, at: int, **settings: Any) -> None:
    """A run whose gradient is not a number in one step, though all losses are finite."""
    made = prepare(configuration(folder / "data", folder / name, **settings), None, torch.device("cpu"))
    weight = next(iter(made.learner.dense.params.values()))
    weight.register_hook(lambda grad: grad * torch.nan if made.state.step + 1 == at else grad)
    made.run_to_end()


def test_a_gradient_that_is_not_finite_is_found_in_its_own_step_and_no_other_batch_pays_for_it(folder: Path) -> None:
    with pytest.raises(UserError, match=r"step 10, epoch 0: a gradient is not finite, though the losses are"):
        train_spoiled(folder, "spoiled-stop", 10, checkpoint_every=5)
    assert checkpoint.steps(folder / "spoiled-stop" / "checkpoints") == [5]
    train_spoiled(folder, "spoiled", 10, checkpoint_every=5, max_steps=15, nonfinite="skip")
    assert manifest(folder / "spoiled").skipped == [10]
    assert checkpoint.steps(folder / "spoiled" / "checkpoints") == [0, 5, 10, 15]  # also where the batch was left out
    for step in (10, 15):
        state = tensors(checkpoint.folder(folder / "spoiled" / "checkpoints", step))
        assert all(value.isfinite().all() for value in state.values())


def test_a_checkpoint_from_which_nothing_can_be_learnt_is_given_up_for_the_one_before(folder: Path) -> None:
    """Somebody has put weights into it that are finite and far too large."""
    name = "hopeless"
    train(folder, name, checkpoint_every=5, max_steps=10)
    path = checkpoint.folder(folder / name / "checkpoints", 10)
    made = prepare(
        configuration(folder / "data", folder / name, max_steps=20, nonfinite="skip"), None, torch.device("cpu")
    )
    with torch.no_grad():
        for weight in made.learner.dense.params.values():
            weight.fill_(1e38)
    checkpoint.remove(path)
    write_checkpoint(made)
    made.run_to_end()
    assert manifest(folder / name).step == 20
    assert manifest(folder / name).skipped == [11, 12]
    assert all(value.isfinite().all() for value in model(last(folder / name)).values())


# Written in the background


def test_a_checkpoint_in_the_background_holds_its_step_though_training_has_gone_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk waits until six more steps are taken."""
    gone_on, write = threading.Event(), writer._write

    def slow(*arguments: Any) -> Any:
        assert gone_on.wait(60)
        return write(*arguments)

    class Watching(Observer):
        def on_step(self, trainer: Trainer, output: StepOutput) -> None:
            if trainer.state.step == 15:
                gone_on.set()

    monkeypatch.setattr(writer, "_write", slow)
    train(folder, "behind", Watching(), checkpoint_every=8, max_steps=20)
    train(folder, "waited", checkpoint_every=8, max_steps=20, checkpoint_async=False)
    for step in (8, 16, 20):
        paths = [checkpoint.folder(folder / name / "checkpoints", step) for name in ("behind", "waited")]
        assert_identical(*map(tensors, paths))


def test_a_checkpoint_that_cannot_be_written_is_said_and_the_next_one_is_tried(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write = writer._write

    def full(aside: Path, *arguments: Any) -> Any:
        if aside.name == ".step-00000010":
            raise OSError(28, "No space left on device")
        return write(aside, *arguments)

    monkeypatch.setattr(writer, "_write", full)
    train(folder, "full", checkpoint_every=5, max_steps=20)
    assert checkpoint.steps(folder / "full" / "checkpoints") == [5, 15, 20]
    [said] = [line for line in caplog.messages if "cannot be written" in line]
    assert "step-00000010" in said
    assert "No space left on device" in said
    assert "Training continues" in said

    monkeypatch.setattr(writer, "_write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match=r"step-00000022: cannot be written: .*No space left"):
        train(folder, "full", checkpoint_every=5, max_steps=22)
    assert checkpoint.steps(folder / "full" / "checkpoints") == [5, 15, 20]


def test_settings_that_changed_since_a_checkpoint_are_said(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(folder, "changed", max_steps=3)
    caplog.set_level("INFO")
    train(folder, "changed", max_steps=5, dense={"lr": 0.5})
    assert "changed since: train.max_steps 3 -> 5, train.dense.lr 0.003 -> 0.5" in caplog.messages


def test_a_run_keeps_the_checkpoints_it_was_told_to_keep(folder: Path) -> None:
    train(folder, "few", checkpoint_every=3, max_steps=20, keep={"last": 2, "every": 6})
    assert checkpoint.steps(folder / "few" / "checkpoints") == [6, 12, 18, 20]
    config = TrainConfig.model_validate(configuration(folder / "data", folder / "few").model_dump(by_alias=True))
    assert config.train.keep.last is None
