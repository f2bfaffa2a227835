"""HoME, PEPNet and STEM-Net through the trainer: they learn, are scored, and STEM's tables hold apart what tasks train."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import assert_close, configuration, last, losses, model
from torch import Tensor

from models.ranker import ModelConfig, is_table
from pipeline.dataset.dataset import Dataset
from pipeline.evaluation.scorer import Scorer
from pipeline.run.run import Run
from pipeline.training.train import prepare

pytestmark = pytest.mark.usefixtures("device")

HOME = {"name": "home", "levels": [[16], [8]], "groups": [["click", "dwell"], ["conversion"]], "rank": 4}
PEPNET = {"name": "pepnet", "widths": [16, 8], "priors": ["user", "shown"], "domains": ["device"], "hidden": 8}
STEM = {"name": "stem", "widths": [16, 8], "shared_experts": 2, "gate_widths": [8]}
EPOCH = 13  # steps
SCHEMA_DIMS = {"user": 8, "item": 8, "device": 4, "topics": 4}


def train(folder: Path, name: str, fusion: dict[str, Any], **settings: Any) -> Run:
    config = configuration(folder / "data", folder / name, **settings)
    config = config.model_copy(update={"model": ModelConfig(fusion=fusion, tower=[8], embedding_std=0.1)})
    return prepare(config, None, torch.device("cpu")).run_to_end()


def tables(run: Run) -> dict[str, Tensor]:
    """weight_RSD of each table of a run's newest checkpoint, by set."""
    found = {name.split(".")[-2]: value for name, value in model(last(run.path)).items() if is_table(name)}
    return {name: value.unflatten(1, (-1, SCHEMA_DIMS[name])) for name, value in found.items()}


@pytest.mark.parametrize(
    ("fusion", "gates"),
    [(HOME, [(4, 6), (3, 12)]), (PEPNET, [(3, 2)]), (STEM, [(3, 5)])],
    ids=lambda value: str(value)[:15],
)
def test_a_run_learns_and_its_checkpoint_is_scored_with_its_gates(folder: Path, fusion: dict, gates: list) -> None:
    run = train(folder, fusion["name"], fusion, epochs=8, max_steps=8 * EPOCH)
    loss = losses(run.path)
    assert sum(loss[-EPOCH:]) < 0.85 * sum(loss[:EPOCH])
    record = Scorer(run, Dataset(folder / "data"), "valid", 64).evaluate(8 * EPOCH)
    assert [(len(mean_UE), len(mean_UE[0])) for mean_UE in record["gates"]] == gates


def test_tables_of_stem_are_as_many_times_as_wide_as_there_are_sets_and_pass_micro_batches(folder: Path) -> None:
    whole, parts = train(folder, "whole", STEM, max_steps=9), train(folder, "parts", STEM, max_steps=9, accumulate=3)
    assert {name: value.shape[1] for name, value in tables(whole).items()} == dict.fromkeys(SCHEMA_DIMS, 4)
    assert_close(model(last(parts.path)), model(last(whole.path)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad"])
def test_a_task_without_weight_in_the_loss_leaves_its_set_as_it_was(folder: Path, optimizer: str) -> None:
    weights = {"name": "fixed", "weights": {"click": 0.0, "dwell": 0.0}}
    settings = {"weighting": weights, "tables": {"name": optimizer, "lr": 0.05}}
    before, after = (
        tables(train(folder, f"{optimizer}-{steps}", STEM, max_steps=steps, **settings)) for steps in (1, 20)
    )
    for name in SCHEMA_DIMS:
        moved = (before[name] != after[name]).any(2).any(0).tolist()
        assert moved == [False, True, False, True], name  # click, conversion, dwell, shared
