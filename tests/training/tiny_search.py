"""A small architecture search over the dataset of tiny_training.py."""

from pathlib import Path
from typing import Any

import torch
from tiny_training import configuration

from pipeline.search.config import SearchConfig
from pipeline.search.search import SearchTrainer
from pipeline.training.observer import Observer
from pipeline.training.train import prepare

SPACE = {
    "width": 8, "token_dim": 4, "experts": 3, "depth": 2, "chosen": 2,
    "interaction": ["product_inner", "cross_2", "attention_2", "skip"],
    "blocks": ["gating", "mlp_4", "mlp_8", "conv_3", "skip"],
}  # fmt: skip
DENSE = {"name": "sgd", "lr": 0.02, "decay": "cosine"}  # as in jobs/conf/search.yaml


def searching(
    dataset: Path, run: Path, space: dict[str, Any] | None = None, search: dict[str, Any] | None = None, **train: Any
) -> SearchConfig:
    """A quick search: 12 steps of 32 rows, 3 of them before beta learns."""
    settings: dict[str, Any] = {"dense": DENSE, "max_steps": 12}
    base = configuration(dataset, run, **(settings | train)).model_dump(by_alias=True)
    model = base["model"] | {"fusion": {"name": "automtl"}}
    return SearchConfig(**base | {"model": model, "space": SPACE | (space or {}), "search": search or {}})


def prepared(config: SearchConfig, *observers: Observer) -> SearchTrainer:
    """A search whose run is restored, ready for `run_to_end`."""
    made = prepare(config, None, torch.device("cpu"), observers, SearchTrainer)
    assert isinstance(made, SearchTrainer)
    return made


def run_search(folder: Path, name: str, *observers: Observer, data: str = "data", **settings: Any) -> SearchTrainer:
    """A search to its end."""
    made = prepared(searching(folder / data, folder / name, **settings), *observers)
    made.run_to_end()
    return made
