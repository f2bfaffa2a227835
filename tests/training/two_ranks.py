"""What two ranks do, for test_training.py: run by torchrun, it trains one run after the other in one process group.

    python -m jobs.launch --nproc-per-node=2 two_ranks.py FOLDER

FOLDER holds the dataset `data`; the runs are written beside it.
"""

import json
import logging
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_training import configuration, on_each_rank, on_late_device, write_checkpoint

from features.batch import PADDING
from features.errors import UserError
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.loader import Loader
from pipeline.run import checkpoint
from pipeline.training.observer import Observer
from pipeline.training.step import StepOutput
from pipeline.training.train import prepare
from pipeline.training.trainer import Trainer

OPTIMIZERS = ("rowwise_adagrad", "adagrad", "sgd")
PLACEMENTS = ("table_wise", "row_wise")
# TorchRec's own mean divides table-wise bags twice beside row-wise ones.
MIXED = {
    "mixed": ("rowwise_adagrad", {"default": ["table_wise"], "item": ["row_wise"]}),
    "mixed-columns": ("adagrad", {"default": ["row_wise"], "item": ["column_wise"], "user": ["table_wise"]}),
}
HALF = {
    "tables": {"name": "rowwise_adagrad", "lr": 0.05, "precision": "fp16", "rounding": "nearest"},
    "sharding": MIXED["mixed"][1],
}
STOP = 20  # in the second epoch
# What cannot be learnt from, by the name of its dataset.
SURVIVING = {
    "infinite": {"nonfinite": "skip", "checkpoint_every": 8, "max_steps": 30},
    "torn": {"corrupt": "skip", "max_corrupt": 0.2, "max_steps": 30},
}


class Recorder(Observer):
    """Records the rows of each step."""

    def __init__(self) -> None:
        self.seen: dict[int, list[int]] = {}

    def on_step(self, trainer: Trainer, output: StepOutput) -> None:
        rows = output.row_id_B
        self.seen[trainer.state.step] = rows[rows != PADDING].tolist()


def trainer(folder: Path, name: str, *observers: Observer, **settings: object) -> Trainer:
    return prepare(configuration(folder / "data", folder / name, **settings), None, torch.device("cpu"), observers)


def train(folder: Path, name: str, *observers: Observer, data: str = "data", **settings: object) -> Recorder:
    """A run to its end; returns what a recorder saw of it."""
    config, recorder = configuration(folder / data, folder / name, **settings), Recorder()
    prepare(config, None, torch.device("cpu"), [recorder, *observers]).run_to_end()
    return recorder


def stopped(folder: Path, source: str, name: str, step: int = STOP) -> None:
    """Makes a run as it would stand, had `source` been killed some steps after `step`."""
    shutil.copytree(folder / source, folder / name)
    for later in checkpoint.steps(folder / name / "checkpoints"):
        if later > step:
            shutil.rmtree(checkpoint.folder(folder / name / "checkpoints", later))


def logits(folder: Path, name: str, **settings: object) -> None:
    """The sharded forward of a finished run on this rank's rows of the valid split."""
    made = trainer(folder, name, **settings)
    made.learner.model.eval()
    loader = Loader(Dataset(folder / "data"), "valid", 20, 2, rank=made.rank, ranks=made.ranks)
    with torch.no_grad():
        found = [(batch.row_id_B, made.learner.model.module.ranker(batch)) for batch in loader.batches(loader.start())]
    names = made.learner.model.module.ranker.embeddings(next(loader.batches(loader.start())).sparse).keys()
    torch.save([torch.cat(parts) for parts in zip(*found, strict=True)], folder / f"{name}.logits.{made.rank}.pt")
    if made.rank == 0:
        (folder / f"{name}.keys.json").write_text(json.dumps(names))


def main(folder: Path) -> None:
    rank = dist.get_rank()
    for optimizer in OPTIMIZERS:
        for placement in PLACEMENTS:
            settings = {"tables": {"name": optimizer, "lr": 0.05}, "sharding": {"default": [placement]}}
            recorder = Recorder()
            trainer(folder, f"{optimizer}-{placement}", recorder, checkpoint_every=STOP, **settings).run_to_end()
            if placement == "table_wise" and optimizer == "rowwise_adagrad":
                (folder / f"seen.{rank}.json").write_text(json.dumps(recorder.seen))

    table_wise = {"sharding": {"default": ["table_wise"]}}
    logits(folder, "rowwise_adagrad-table_wise", checkpoint_every=STOP, **table_wise)
    for name, (optimizer, sharding) in MIXED.items():
        settings = {"tables": {"name": optimizer, "lr": 0.05}, "sharding": sharding}
        trainer(folder, name, **settings).run_to_end()
        logits(folder, name, **settings)

    trainer(folder, "half", checkpoint_every=STOP, **HALF).run_to_end()
    for placement in PLACEMENTS:
        write_checkpoint(trainer(folder, f"start-{placement}", sharding={"default": [placement]}))
    columns = {"default": ["table_wise"], "item": ["column_wise"]}
    write_checkpoint(trainer(folder, "start-column_wise", sharding=columns, tables={"name": "adagrad"}))

    again = {"checkpoint_every": STOP, "dropout": 0.3, **table_wise}
    trainer(folder, "dropout", **again).run_to_end()
    dist.barrier()
    if rank == 0:
        stopped(folder, "dropout", "dropout-resumed")
    dist.barrier()
    handler = logging.FileHandler(folder / f"log.{rank}.txt")
    logging.getLogger("pipeline").addHandler(handler)
    logging.getLogger("pipeline").setLevel(logging.INFO)
    trainer(folder, "dropout-resumed", **again).run_to_end()
    logging.getLogger("pipeline").removeHandler(handler)

    for name, settings in SURVIVING.items():
        made = configuration(folder / f"{name}-two", folder / f"{name}-two-run", **settings)
        prepare(made, None, torch.device("cpu")).run_to_end()
    made = configuration(folder / "infinite-two", folder / "infinite-late", **SURVIVING["infinite"], log_every=50)
    # Rank 0 reads its numbers in their own step, rank 1 two steps later.
    on_late_device(prepare(made, None, torch.device("cpu")), 5 * dist.get_rank()).run_to_end()

    trainer(folder, "pipelined", pipelined=True, **table_wise).run_to_end()
    trainer(folder, "pipelined-row_wise", pipelined=True, sharding={"default": ["row_wise"]}).run_to_end()
    trainer(folder, "clipped", max_steps=3, clip_norm=0.05, **table_wise).run_to_end()

    refused = ""
    try:
        trainer(folder, "refused", batch_size=1, lanes=1)
    except UserError as error:
        refused = str(error)
    (folder / f"refused.{rank}.txt").write_text(refused)


if __name__ == "__main__":
    on_each_rank(main)
