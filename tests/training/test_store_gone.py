"""Training on a dataset of a store that goes away: a checkpoint and one line, and the same weights once it is back."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import assert_identical, configuration, last, make_dataset

from features.errors import Preempted, UserError
from pipeline.dataset.loader import Position
from pipeline.run import checkpoint
from pipeline.storage.store_path import StorePath, files_below
from pipeline.training import loading
from pipeline.training.train import prepare

pytestmark = pytest.mark.usefixtures("device")


def run(dataset: Path, out: Path, **settings: Any) -> Path:
    config = configuration(dataset, out, **{"max_steps": 50, "checkpoint_every": 50} | settings)
    return prepare(config, None, torch.device("cpu")).run_to_end().path


def test_a_store_that_stays_away_ends_a_run_with_a_checkpoint_from_which_it_goes_on_to_the_same_weights(
    tmp_path: Path, memory: StorePath, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = make_dataset(tmp_path / "data", rows=2000)
    for file in data.rglob("*"):
        if file.is_file():
            (memory / file.relative_to(data).as_posix()).write_bytes(file.read_bytes())
    wanted = last(run(data, tmp_path / "local"))
    system = type(memory.system)
    cat_file, left, why = system.cat_file, [1 << 30], [OSError(errno.EIO, "gone")]

    def failing(self: Any, path: str, *arguments: Any, **named: Any) -> bytes:
        is_shard = path.endswith(".parquet") and "/vocabularies/" not in path
        left[0] -= is_shard
        if left[0] < 0 and is_shard:
            raise why[0]
        return cat_file(self, path, *arguments, **named)

    monkeypatch.setattr(system, "cat_file", failing)
    monkeypatch.setenv("TASKFUSE_STORE_TIMEOUT", "0.2")
    left[0] = 40  # of 13 footers and 50 row groups
    with pytest.raises(Preempted, match=r"memory://.*has not answered for 0.2 s: .* resumes.* Saved .*step-") as error:
        run(memory, tmp_path / "run", read_ahead_bytes=1 << 20)
    assert "\n" not in str(error.value)
    [step] = checkpoint.steps(tmp_path / "run" / "checkpoints")
    assert 0 < step < 50
    left[0], why[0] = 32, PermissionError("the token has expired")
    with pytest.raises(
        Preempted, match=r"memory://.*refuses: the token has expired.*credentials are renewed. Saved .*"
    ):
        run(memory, tmp_path / "run", read_ahead_bytes=1 << 20)
    assert step < checkpoint.steps(tmp_path / "run" / "checkpoints")[-1] < 50
    steps = checkpoint.steps(tmp_path / "run" / "checkpoints")
    left[0] = 0  # gone before the first batch
    with pytest.raises(Preempted, match="the token has expired"):
        run(memory, tmp_path / "run", read_ahead_bytes=1 << 20)
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == steps
    with pytest.raises(Preempted, match=r"the token has expired.* Saved .*step-00000000\."):
        run(memory, tmp_path / "new", read_ahead_bytes=1 << 20)
    left[0] = 1 << 30
    assert_identical(last(run(memory, tmp_path / "run")), wanted)


def test_ranks_stop_before_the_first_batch_where_one_of_them_has_none_and_all_know_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    def gather(found: list[Any], ours: Any, group: Any) -> None:
        found[:] = [ours, "another's store is gone"]

    monkeypatch.setattr(loading.dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(loading.dist, "all_gather_object", gather)
    loader: Any = SimpleNamespace(stored=object(), gone=None, batches=lambda position: iter("abc"))
    assert loading.why_gone(loader, object()) == "another's store is gone"

    def stop() -> None:
        raise Preempted("stopped")

    with pytest.raises(Preempted, match="stopped"):
        next(loading.agreed(loader, Position(), 2, object(), stop))
    assert list(loading.agreed(loader, Position(), 2, None, stop)) == ["a", "b"]


def test_a_restore_that_fails_leaves_no_lease_behind(tmp_path: Path, memory: StorePath) -> None:
    data = make_dataset(tmp_path / "data")
    run(data, memory / "run", max_steps=2)
    with pytest.raises(UserError, match="has checkpoints") as error:
        run(data, memory / "run", resume="never")
    assert not [file for file in files_below(memory) if ".lease/" in str(file)]
    assert error  # whose traceback still refers to the trainer
