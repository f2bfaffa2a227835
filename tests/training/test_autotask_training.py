"""AutoTask through the trainer: mixed examples, logs of one task a row, a task held out, the pipelined loop."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import tiny_training
import torch
from tiny_training import assert_identical, configuration, last, make_dataset

from models.ranker import ModelConfig
from pipeline.dataset.dataset import Dataset
from pipeline.evaluation.metrics.accumulator import Metrics
from pipeline.evaluation.scorer import Scorer
from pipeline.run import checkpoint
from pipeline.run.run import Run
from pipeline.training.train import prepare

pytestmark = pytest.mark.usefixtures("device")

ROWS = 5000
TASKS = ("like", "share", "late")
FEATURES = {
    "source": {"files": "*.csv", "types": dict.fromkeys(TASKS, "int")},
    "tables": {},
    "dense": {"age": {}, "hour": {}},
    "categorical": {"user": {"dim": 4}, "shown": {"dim": 4}},
    "bag": {},
    "weight": None,
}
EVERY_TASK = FEATURES | {"tasks": {task: {"kind": "binary", "label": task} for task in TASKS}}
ONE_TASK = FEATURES | {
    "tasks": {task: {"kind": "binary", "label": task, "observed_when": f"place = '{task}'"} for task in TASKS}
}


def log(rows: int, share_seed: int = 0) -> pl.DataFrame:
    """A like and a share follow nearly the same taste, lateness another; each row was shown in one of three places."""
    rng = np.random.default_rng(11)
    user, shown = rng.integers(0, 20, rows), rng.integers(0, 12, rows)
    age, hour = rng.normal(size=(2, rows))
    taste = rng.normal(size=20)[user] + rng.normal(size=12)[shown] + age
    habit = rng.normal(size=20)[user] + 1.5 * hour
    noise = rng.normal(size=(2, rows)) * 0.5
    share_noise = np.random.default_rng(share_seed).normal(size=rows) * 0.5
    columns = {
        "age": age.round(4),
        "hour": hour.round(4),
        "user": [f"u{i}" for i in user],
        "shown": [f"s{i}" for i in shown],
        "place": rng.choice(TASKS, rows),
        "like": (taste + noise[0] > 0).astype(int),
        "share": (taste + 0.3 * habit + share_noise > 0.5).astype(int),
        "late": (habit + noise[1] > 0).astype(int),
    }
    return pl.DataFrame(columns).cast(pl.String)


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    def make(name: str, content: dict, share_seed: int = 0) -> Path:
        monkeypatch.setattr(tiny_training, "raw_rows", lambda rows: log(rows, share_seed))
        return make_dataset(tmp_path / name, ROWS, row_group=200, shard_rows=2000, **content)

    return make


def train(data: Path, run: Path, steps: int = 186, batch_size: int = 64, fusion: dict | None = None, **settings) -> Run:
    fusion = {"name": "autotask", "width": 16} | (fusion or {})
    model = ModelConfig(fusion=fusion, tower=[16], embedding_std=0.1, field_dim=5)
    settings = {"batch_size": batch_size, "max_steps": steps, "window": 1000, "dense": {"lr": 0.01}} | settings
    config = configuration(data, run, **settings).model_copy(update={"model": model})
    return prepare(config, None, torch.device("cpu")).run_to_end()


def aucs(run: Run, id_of: dict[str, str] | None = None) -> dict[str, float]:
    """AUC per task of the newest checkpoint on all that is not trained on.

    Args:
        id_of: tasks that are scored under the id of another.
    """
    dataset = Dataset(Path(run.config()["dataset"]))
    scorer = Scorer(run, dataset, "test", 500)
    scorer.metrics(checkpoint.steps(run.checkpoints)[-1])
    metrics, scored = Metrics(scorer.tasks), [TASKS.index((id_of or {}).get(task, task)) for task in TASKS]
    with torch.inference_mode():
        for batch in scorer.batches():
            metrics.update(scorer.ranker(batch)[:, scored], batch.label_BT, batch.observed_BT, batch.weight_BT)
    return {task: figures["auc"] for task, figures in metrics.compute().items()}


@pytest.mark.parametrize("examples", ["tasks", "mixed", "rows"])
def test_a_task_held_out_of_training_is_scored_better_than_chance(dataset, tmp_path, record_property, examples):
    data = dataset("data", ONE_TASK if examples == "rows" else EVERY_TASK)
    run = train(data, tmp_path / "run", fusion={"examples": examples, "unseen": ["share"]})
    found, given = aucs(run), aucs(run, {"share": "like"})
    print(f"{examples}: like {found['like']:.3f}, late {found['late']:.3f}; share, never seen, without an id "
          f"{found['share']:.3f}, with that of like {given['share']:.3f}")  # fmt: skip
    record_property("auc", json.dumps({"no id": found, "id of like": given}))
    assert found["like"] > 0.85
    assert found["late"] > 0.85
    assert found["share"] > 0.6
    assert given["share"] > 0.8


@pytest.mark.parametrize("examples", ["tasks", "mixed"])
def test_labels_of_a_task_held_out_change_no_weight(dataset, tmp_path, examples):
    runs, fusion = [], {"examples": examples}
    for seed in range(2):
        data = dataset(f"data-{seed}", EVERY_TASK, share_seed=seed)
        runs.append(last(train(data, tmp_path / f"run-{seed}", steps=4, fusion=fusion | {"unseen": ["share"]}).path))
    assert_identical(*runs)
    data = dataset("data", EVERY_TASK, share_seed=1)
    other = last(train(data, tmp_path / "run", steps=4, fusion=fusion).path)
    assert any(not torch.equal(other[name], runs[0][name]) for name in other)


@pytest.mark.parametrize("examples", ["tasks", "mixed"])
def test_the_pipelined_loop_trains_the_same_model(dataset, tmp_path, examples):
    data = dataset("data", ONE_TASK)
    fusion = {"examples": examples, "unseen": ["late"], "block": 5}
    plain, pipelined = (
        train(data, tmp_path / f"run-{loop}", steps=4, fusion=fusion, pipelined=loop) for loop in (False, True)
    )
    assert_identical(last(plain.path), last(pipelined.path))
