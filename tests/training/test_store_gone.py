"""Training on a dataset of a store that goes away: a checkpoint and one line, and the same weights once it is back."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import assert_identical, configuration, last, make_dataset

from features.errors import Preempted
from pipeline.run import checkpoint
from pipeline.storage.store_path import StorePath
from pipeline.training.train import prepare

pytestmark = pytest.mark.usefixtures("device")


def run(dataset: Path, out: Path, **settings: Any) -> Path:
    config = configuration(dataset, out, max_steps=50, checkpoint_every=50, **settings)
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
        left[0] -= path.endswith(".parquet")
        if left[0] < 0 and path.endswith(".parquet"):
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
    left[0], why[0] = 30, PermissionError("the token has expired")
    with pytest.raises(
        Preempted, match=r"memory://.*refuses: the token has expired.*credentials are renewed. Saved .*"
    ):
        run(memory, tmp_path / "run", read_ahead_bytes=1 << 20)
    assert step < checkpoint.steps(tmp_path / "run" / "checkpoints")[-1] < 50
    left[0] = 1 << 30
    assert_identical(last(run(memory, tmp_path / "run")), wanted)
