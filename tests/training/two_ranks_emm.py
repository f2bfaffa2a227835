"""Small single-task runs and runs fused from them; as a script, what two ranks do for test_emm_runs.py, run by torchrun.

    python -m jobs.launch --nproc-per-node=2 two_ranks_emm.py FOLDER

FOLDER holds the dataset `data` and the single-task runs; the fused ones are written beside them.
"""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from tiny_training import configuration, on_each_rank, write_checkpoint

from models.ranker import ModelConfig
from pipeline.run import checkpoint
from pipeline.run.checkpoint import manifest
from pipeline.training.config import TrainConfig
from pipeline.training.train import prepare
from pipeline.training.trainer import Trainer

# They share the widths 32 and 16: two levels of components of one layer or two, and towers of other depths.
SOURCES: dict[str, dict[str, Any]] = {
    "click-a": {"fusion": {"name": "shared_bottom", "widths": [32, 16]}, "tower": [16, 12]},
    "click-b": {"fusion": {"name": "single_task", "widths": [24, 32, 16, 16]}, "tower": [5], "dropout": 0.3},
    "conversion": {
        "fusion": {"name": "shared_bottom", "widths": [20, 32, 16]},
        "tower": {"conversion": [7, 16, 16]},
        "numeric_dim": 3,
    },
    "dwell": {"fusion": {"name": "single_task", "widths": [32, 16, 16]}, "tower": [], "interaction": {"name": "dot"}},
}
STEPS, STOP = 20, 12


def settings(folder: Path, name: str, model: dict[str, Any], tasks: list[str] | None, **train: Any) -> TrainConfig:
    made = configuration(folder / "data", folder / name, **({"max_steps": STEPS} | train))
    return made.model_copy(update={"model": ModelConfig(**({"embedding_std": 0.1} | model)), "tasks": tasks})


def source(folder: Path, name: str, model: dict[str, Any] | None = None, **train: Any) -> Trainer:
    """A single-task run, of the task its name begins with."""
    config = settings(folder, name, model or SOURCES[name], [name.split("-")[0]], **train)
    return prepare(config, None, torch.device("cpu"))


def fused(
    folder: Path, name: str, of: tuple[str, ...] = tuple(SOURCES), tasks: list[str] | None = None,
    model: dict[str, Any] | None = None, train: dict[str, Any] | None = None, **fusion: Any,
) -> Trainer:  # fmt: skip
    """A run fused from those named in `of`, by default from all."""
    emm = {"fusion": {"name": "emm"} | fusion, "from": [str(folder / source) for source in of]}
    return prepare(settings(folder, name, emm | (model or {}), tasks, **(train or {})), None, torch.device("cpu"))


def stopped(folder: Path, source: str, name: str) -> None:
    """Makes a run as it would stand, had `source` been killed some steps after STOP."""
    shutil.copytree(folder / source, folder / name)
    for later in checkpoint.steps(folder / name / "checkpoints"):
        if later > STOP:
            shutil.rmtree(checkpoint.folder(folder / name / "checkpoints", later))


def main(folder: Path) -> None:
    for placement in ("table_wise", "row_wise"):
        train = {"sharding": {"default": [placement]}, "checkpoint_every": STOP}
        fused(folder, f"two-{placement}", train=train).run_to_end()
        fused(folder, f"two-tuned-{placement}", train=train, tables="tuned").run_to_end()
    with mock.patch.object(manifest, "sha256", wraps=manifest.sha256) as checksum:
        made = fused(folder, "two-start", train={"sharding": {"default": ["row_wise"]}})
    checked = [str(call.args[0].relative_to(folder)) for call in checksum.call_args_list]
    (folder / f"checked.{dist.get_rank()}.json").write_text(json.dumps(checked))
    write_checkpoint(made)
    dist.barrier()
    if dist.get_rank() == 0:
        stopped(folder, "two-table_wise", "two-resumed")
    dist.barrier()
    fused(folder, "two-resumed", train={"sharding": {"default": ["table_wise"]}, "checkpoint_every": STOP}).run_to_end()
    fused(folder, "two-pipelined", train={"sharding": {"default": ["table_wise"]}, "pipelined": True}).run_to_end()


if __name__ == "__main__":
    on_each_rank(main)
