"""Settings that a model is sharded with to be scored."""

from pathlib import Path

import pytest
import torch

from features.errors import UserError
from pipeline.training.parallel.scoring import scoring_settings

WHERE = Path("run/config.yaml")
CACHED = {"default": ["fused"], "user": ["fused_uvm_caching"]}


@pytest.mark.parametrize("name", ["adam", "rowwise_adagrad"])
def test_nothing_of_a_runs_training_changes_how_it_is_scored(name: str) -> None:
    trained = {
        "tables": {"name": name},
        "sharding": {"default": ["data_parallel"]},
        "communication": {"forward": "fp16"},
        "sharding_group": 2,
        "pipelined": True,
    }
    for device in ("cpu", "cuda"):
        found = scoring_settings(trained, WHERE, torch.device(device), 64)
        assert (found.tables.name, found.batch_size, found.communication.forward) == ("sgd", 64, "fp32")
        assert found.sharding == {"default": None}
        assert found.sharding_group is None
        assert not found.pipelined


def test_rows_that_a_gpu_only_caches_stay_in_main_memory() -> None:
    trained = {"kernels": CACHED}
    assert scoring_settings(trained, WHERE, torch.device("cuda"), 64).kernels == CACHED
    assert scoring_settings(trained, WHERE, torch.device("cpu"), 64).kernels == {"default": ["fused"]}


def test_settings_that_are_none_name_the_file() -> None:
    with pytest.raises(UserError, match=r"run/config\.yaml: train\.batch_size.*Restore it"):
        scoring_settings({"batch_size": "many"}, WHERE, torch.device("cpu"), 64)
