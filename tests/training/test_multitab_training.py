"""MultiTab with attention between rows, through the trainer and the scorer."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from tiny_training import assert_identical, configuration, last

from models.ranker import ModelConfig
from pipeline.dataset.dataset import Dataset
from pipeline.evaluation import predictions
from pipeline.evaluation.scorer import Scorer
from pipeline.run.run import Run
from pipeline.training.config import TrainConfig
from pipeline.training.train import prepare

pytestmark = pytest.mark.usefixtures("device")


def config(data: Path, run: Path, rows: str, **settings: object) -> TrainConfig:
    fusion = {"name": "multitab", "layers": 1, "heads": 2, "hidden": 8, "rows": rows}
    model = ModelConfig(fusion=fusion, tower=[8], embedding_std=0.1, field_dim=4)
    made = configuration(data, run, max_steps=6, dense={"lr": 0.05}, **settings)
    return made.model_copy(update={"model": model})


def logits(run: Run, data: Path, batch_size: int) -> np.ndarray:
    Scorer(run, Dataset(data), "test", batch_size).evaluate(6, write_predictions=True)
    rows: pl.DataFrame = predictions.read(predictions.path(run, "test", 6))
    return rows.select("logit.click", "logit.dwell").to_numpy()


@pytest.mark.parametrize("rows", ["alone", "batch"])
def test_scores_depend_on_the_batch_only_with_attention_between_rows(folder: Path, tmp_path: Path, rows: str) -> None:
    run = prepare(config(folder / "data", tmp_path / "run", rows), None, torch.device("cpu")).run_to_end()
    one, other = (logits(run, folder / "data", size) for size in (7, 64))
    assert np.isfinite(one).all()
    assert np.allclose(one, other, rtol=0, atol=1e-6) == (rows == "alone")


def test_the_pipelined_loop_and_micro_batches_run_with_attention_between_rows(folder: Path, tmp_path: Path) -> None:
    states = []
    for name, settings in {"plain": {}, "pipelined": {"pipelined": True}, "parts": {"accumulate": 2}}.items():
        made = config(folder / "data", tmp_path / name, "batch", **settings)
        states.append(last(prepare(made, None, torch.device("cpu")).run_to_end().path))
    assert_identical(*states[:2])
    assert any(not torch.allclose(states[2][name], states[0][name]) for name in states[0] if "fusion" in name)
