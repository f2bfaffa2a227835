"""What two ranks do, for test_planning.py: python -m jobs.launch --nproc-per-node=2 two_ranks_planning.py FOLDER

FOLDER holds the dataset `data` and `alone`, a run of one rank that stopped; the runs are written beside them.
"""

import json
import logging
import shutil
from io import StringIO
from pathlib import Path

import torch
import torch.distributed as dist
from tiny_training import on_each_rank
from two_ranks import trainer

from features.errors import UserError
from pipeline.training.parallel import plan, shard
from pipeline.training.parallel.topology import Cluster
from pipeline.training.trainer import Trainer

OPTIMIZERS = ("rowwise_adagrad", "adagrad", "sgd")
STOP, STEPS = 9, 18  # an epoch has 13
REPLICATED = {"default": ["data_parallel"]}
MIXED = {"default": ["row_wise"], "item": ["data_parallel"], "device": ["table_wise"]}


def settings(optimizer: str, sharding: dict[str, list[str]], steps: int = STEPS) -> dict[str, object]:
    return {
        "tables": {"name": optimizer, "lr": 0.05},
        "sharding": sharding,
        "max_steps": steps,
        "checkpoint_every": STOP,
    }


def tables(made: Trainer) -> dict[str, torch.Tensor]:
    """This rank's copies of weights and momenta, under the names of a checkpoint."""
    state = made.learner.state()
    found = {f"model.{name}": value for name, value in state["model"].items() if name.startswith("embeddings.")}
    for weight, momenta in state["tables"].items():
        found |= {f"tables.{weight}.{name}": value for name, value in momenta.items()}
    return found


def held(made: Trainer) -> dict[str, int]:
    """Bytes that this rank really holds of the tables."""
    found = {"model": 0, "tables": 0}
    for name, value in tables(made).items():
        found[name.split(".")[0]] += sum(p.numel() * p.element_size() for p, _ in shard.local_parts(value))
    return {"weights": found["model"], "state": found["tables"]}


def main(folder: Path) -> None:
    rank = dist.get_rank()
    for optimizer in OPTIMIZERS:
        trainer(folder, f"table_wise-{optimizer}", **settings(optimizer, {"default": ["table_wise"]})).run_to_end()
        trainer(folder, f"replicated-{optimizer}", **settings(optimizer, REPLICATED)).run_to_end()

    logged = StringIO()
    plan.logger.setLevel(logging.INFO)
    plan.logger.addHandler(logging.StreamHandler(logged))
    made = trainer(folder, "mixed", pipelined=True, **settings("rowwise_adagrad", MIXED))
    plan.logger.handlers.clear()
    made.run_to_end()
    (folder / f"held.{rank}.json").write_text(json.dumps(held(made)))
    (folder / f"logged.{rank}.txt").write_text(logged.getvalue())

    dist.barrier()
    if rank == 0:
        shutil.copytree(folder / "alone", folder / "alone-goes-on")
    dist.barrier()
    made = trainer(folder, "alone-goes-on", **settings("rowwise_adagrad", REPLICATED))
    torch.save({name: value.clone() for name, value in tables(made).items()}, folder / f"loaded.{rank}.pt")
    made.run_to_end()

    current, refused = plan.current_cluster, ""
    plan.current_cluster = lambda device: Cluster(2, 2, "cpu", 0, 103_000)  # of which tables have 2 kB
    try:
        trainer(folder, "never", **settings("rowwise_adagrad", REPLICATED))
    except UserError as error:
        refused = str(error)
    plan.current_cluster = current
    (folder / f"refused.{rank}.txt").write_text(refused)


if __name__ == "__main__":
    on_each_rank(main)
