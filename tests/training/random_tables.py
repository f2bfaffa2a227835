"""What several ranks do, for test_placements.py: python -m jobs.launch --nproc-per-node=4 random_tables.py FOLDER

FOLDER holds a dataset `data-CASE` for each case; the runs are written beside them.
"""

from pathlib import Path
from random import Random
from typing import Any

import torch
import torch.distributed as dist
from tiny_training import configuration, make_dataset, on_each_rank

from pipeline.training.config import TrainConfig
from pipeline.training.train import prepare
from pipeline.training.trainer import Trainer

STEPS = 3
LANES = 24  # which 3, 4 and 8 ranks divide
# Of the demo: planned by time alone, four ranks have an empty shard of the smallest table, the only row-wise one.
DEMO = {
    "categorical": {"user": {"dim": 16, "hash": 200_000}, "shown": {"table": "item"}, "device": {"dim": 8}},
    "tables": {"item": {"dim": 16, "hash": 8_386}},
}


def drawn(seed: int) -> dict[str, Any]:
    """Changes of the tiny_training's schema: tables of few rows mostly, bags, and sequences, which look up item by item."""
    random = Random(seed)

    def table() -> dict[str, int]:
        return {
            "dim": random.choice([4, 8, 12]),
            "hash": random.choice([1, 2, 3, 5, 6, 7, 9, 30, 1000, random.randint(1, 40)]),
        }

    pooling = {"pooling": "sequence"} if random.random() < 0.5 else {}
    return {
        "tables": {"item": table()},
        "categorical": {"user": table(), "shown": {"table": "item"}, "device": table()},
        "bag": {"recent": {"table": "item", "max_length": 5, **pooling}, "topics": table()},
    }


CASES = {"demo": DEMO, **{f"drawn-{seed}": drawn(seed) for seed in range(3)}}


def config(folder: Path, case: str, name: str) -> TrainConfig:
    return configuration(
        folder / f"data-{case}",
        folder / name,
        max_steps=STEPS,
        lanes=LANES,
        batch_size=2 * LANES,
        tables={"name": "sgd", "lr": 10.0},  # Adagrad would make a large step of the rounding of a gradient near 0
    )


def train(folder: Path, case: str, name: str) -> Trainer:
    made = prepare(config(folder, case, name), None, torch.device("cpu"))
    made.run_to_end()
    return made


def make_datasets(folder: Path) -> None:
    for case, changes in CASES.items():
        make_dataset(folder / f"data-{case}", **changes)


def main(folder: Path) -> None:
    for case in CASES:
        train(folder, case, f"{dist.get_world_size()}-{case}")


if __name__ == "__main__":
    on_each_rank(main)
