"""What modules that train need: a dataset, and a process group of this process alone."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_training import make_dataset

from pipeline.training.parallel import process_group


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the dataset `data`; runs are written beside it."""
    path = tmp_path_factory.mktemp("training")
    make_dataset(path / "data")
    return path


@pytest.fixture(scope="module")
def device() -> Iterator[torch.device]:
    """Of the process group's one rank."""
    yield process_group.start()
    dist.destroy_process_group()
