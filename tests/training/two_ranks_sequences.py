"""What two ranks do, for test_sequence_training.py: run by torchrun, it trains models that read sequences.

    python -m jobs.launch --nproc-per-node=2 two_ranks_sequences.py FOLDER

FOLDER holds the dataset `data`; the runs are written beside it.
"""

from pathlib import Path
from typing import Any

import torch
from tiny_training import configuration, on_each_rank

from models.ranker import ModelConfig
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.loader import Loader
from pipeline.training.config import TrainConfig
from pipeline.training.train import prepare
from pipeline.training.trainer import Trainer

# A sequence with a candidate and one without; a bag whose table a sequence reads and one whose table none does.
BAGS = {
    "recent": {"table": "item", "max_length": 5, "pooling": "sequence"},
    "again": {"column": "recent", "table": "item", "max_length": 3},
    "topics": {"dim": 4},
    "words": {"column": "topics", "dim": 8, "max_length": 4, "pooling": "sequence"},
}
FUSION = {"name": "dtrn", "widths": [8], "behaviours": ["words", "topics", "recent"], "condition": 3, "hidden": 8}
PLACEMENTS = ("table_wise", "row_wise")
STOP, STEPS = 8, 16  # in the first epoch, and in the second


def config(folder: Path, name: str, fusion: dict[str, Any] | None = None, **settings: Any) -> TrainConfig:
    model = ModelConfig(fusion=fusion or FUSION, tower=[8], embedding_std=0.1, field_dim=4)
    made = configuration(folder / "data", folder / name, **({"max_steps": STEPS, "checkpoint_every": STOP} | settings))
    return made.model_copy(update={"model": model})


def trainer(folder: Path, name: str, **settings: Any) -> Trainer:
    return prepare(config(folder, name, **settings), None, torch.device("cpu"))


def logits(folder: Path, name: str) -> None:
    """The sharded forward of a finished run on this rank's rows of the valid split."""
    made = trainer(folder, name)
    made.learner.model.eval()
    loader = Loader(Dataset(folder / "data"), "valid", 20, 2, rank=made.rank, ranks=made.ranks)
    with torch.no_grad():
        found = [(batch.row_id_B, made.learner.model.module.ranker(batch)) for batch in loader.batches(loader.start())]
    torch.save([torch.cat(parts) for parts in zip(*found, strict=True)], folder / f"{name}.logits.{made.rank}.pt")


def main(folder: Path) -> None:
    for placement in PLACEMENTS:
        sharding = {"default": [placement]}
        trainer(folder, placement, sharding=sharding).run_to_end()
        logits(folder, placement)
        trainer(folder, f"pipelined-{placement}", sharding=sharding, pipelined=True, max_steps=STOP).run_to_end()


if __name__ == "__main__":
    on_each_rank(main)
