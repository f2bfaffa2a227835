"""What two ranks do, for test_managed_training.py: run by torchrun, it trains one run after the other in one process group.

    python -m jobs.launch --nproc-per-node=2 two_ranks_managed.py FOLDER

FOLDER holds the dataset `data` and a run of one rank, `one`; the runs are written beside it.
"""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import torch
import torch.distributed as dist
from dataset_from_rows import parse_text, write_dataset
from host_syncs import HostSyncs
from tiny_training import SCHEMA, configuration, on_each_rank, raw_rows
from two_ranks import stopped

from features.errors import UserError
from features.fit.encoders import Encoders
from features.fit.statistics import Statistics
from features.parse.raw import SPLIT
from features.schema.schema import SPLITS, Schema
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.loader import Loader
from pipeline.training.train import prepare
from pipeline.training.trainer import Trainer

STEPS, STOP = 20, 8
MIXED = {"default": ["row_wise"], "user": ["table_wise"]}
ADAGRAD = {"name": "adagrad", "lr": 0.05}
HALF = {"precision": "fp16", "rounding": "nearest"}
MANAGED = SCHEMA | {
    "tables": {"item": {"dim": 8, "managed": {"rows": 130}}},
    "categorical": {
        "user": {"dim": 8, "managed": {"rows": 30, "evict": "lfu"}},
        "shown": {"table": "item"},
        "device": {"dim": 4},
    },
}


def moving_rows(count: int = 517, seed: int = 3) -> pl.DataFrame:
    """Rows as tiny_training.raw_rows, but users and items come and go."""
    rng, number = np.random.default_rng(seed), np.arange(count)
    start = number // 2
    lengths = rng.integers(0, 6, count)
    return raw_rows(count, seed).with_columns(
        user=pl.Series([f"u{i}" for i in start + rng.integers(0, 20, count)]),
        shown=pl.Series([None if i % 9 == 0 else f"i{i}" for i in start + rng.integers(0, 40, count)]),
        recent=pl.Series(["|".join(f"i{i}" for i in s + rng.integers(0, 40, n)) for s, n in zip(start, lengths, strict=True)]),
    )  # fmt: skip


def make_managed_dataset(out: Path) -> Path:
    schema = Schema.parse(MANAGED, "managed.yaml")
    found = parse_text(schema, moving_rows())
    split_B = found[SPLIT].to_numpy()
    encoders = Encoders.fit(schema, Statistics.of(schema, found.filter(pa.array(split_B == 0))))
    splits = {split: encoders.encode(found.filter(pa.array(split_B == code))) for code, split in enumerate(SPLITS)}
    write_dataset(out, schema, splits, 40, 130, encoders)
    return out


def trainer(folder: Path, name: str, **settings: object) -> Trainer:
    quick = {"max_steps": STEPS, "checkpoint_at": [STOP / STEPS], "log_every": STEPS}
    return prepare(configuration(folder / "data", folder / name, **(quick | settings)), None, torch.device("cpu"))


def logits(folder: Path, made: Trainer, name: str) -> None:
    """The trainer's forward in eval mode on this rank's rows of the valid split."""
    made.learner.model.eval()
    loader = Loader(Dataset(folder / "data"), "valid", 20, 2, rank=made.rank, ranks=made.ranks)
    with torch.no_grad():
        found = [(batch.row_id_B, made.learner.ranker(batch)) for batch in loader.batches(loader.start())]
    torch.save([torch.cat(parts) for parts in zip(*found, strict=True)], folder / f"{name}.logits.{made.rank}.pt")


def counted(folder: Path, name: str) -> dict[str, int]:
    """How often the maps of a second step make the host wait for a GPU, and their messages."""
    learner = (made := trainer(folder, name, sharding=MIXED)).learner
    batches = made.loader.batches(made.loader.start())
    for step in (1, 2):
        sparse = next(batches).sparse
        with HostSyncs() as found:
            learner.ranker.managed(sparse)
            learner.managed.after_step(step)
    return found.messages | {"waits": found.waits.total()}


def main(folder: Path) -> None:
    rank = dist.get_rank()
    made = trainer(folder, "mixed", sharding=MIXED)
    made.run_to_end()
    logits(folder, made, "mixed")
    others = {"default": ["column_wise"], "user": ["data_parallel"]}
    trainer(folder, "adagrad", tables=ADAGRAD, sharding=others).run_to_end()
    (folder / f"counted.{rank}.json").write_text(json.dumps(counted(folder, "counted")))
    trainer(folder, "half", tables=HALF, sharding=MIXED).run_to_end()
    dist.barrier()
    if rank == 0:
        stopped(folder, "mixed", "resumed", STOP)
        stopped(folder, "one", "widened", STOP)
    dist.barrier()
    for name in ("resumed", "widened"):
        trainer(folder, name, sharding=MIXED).run_to_end()
    try:
        trainer(folder, "refused", sharding_group=1)
    except UserError as error:
        (folder / "refused.txt").write_text(str(error))


if __name__ == "__main__":
    on_each_rank(main)
