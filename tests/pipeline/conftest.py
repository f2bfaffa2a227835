"""What tests of checkpoints need, a process group of this process alone, and the dataset of tests of slices."""

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import sliced_log
import torch.distributed as dist


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def sliced_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset of `sliced_log`; the log is beside it."""
    from features.schema.schema import Schema
    from pipeline.ingest.config import PreprocessConfig
    from pipeline.ingest.job import preprocess

    folder = tmp_path_factory.mktemp("sliced")
    (folder / "log").mkdir()
    sliced_log.write_log(folder / "log")
    preprocess(
        PreprocessConfig(input=str(folder / "log"), out=folder / "dataset", rows_per_row_group=64, rows_per_shard=200),
        Schema.parse(copy.deepcopy(sliced_log.CONTENT), where="sliced.yaml"),
    )
    return folder / "dataset"
