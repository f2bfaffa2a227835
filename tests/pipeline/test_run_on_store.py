"""A run and its dataset on a store: the same figures, packages and predictions as on disk."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from models.ranker import ModelConfig
from pipeline.evaluation import follow, priority
from pipeline.evaluation.follow import EvaluateConfig, evaluate
from pipeline.run.run import Run
from pipeline.storage.files import copy_file
from pipeline.storage.store_path import StorePath
from pipeline.training.config import Settings, TrainConfig
from pipeline.training.train import train

pytestmark = pytest.mark.integration
MODEL = ModelConfig(fusion={"name": "adatt", "levels": [[8], [4]]}, tower=[4])


@pytest.fixture(scope="module")
def trained(small_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints at steps 2 and 4."""
    run = tmp_path_factory.mktemp("runs") / "run"
    settings = Settings(batch_size=64, lanes=2, epochs=2, max_steps=4, checkpoint_every=2, threads=1)
    train(TrainConfig(dataset=small_dataset, run=run, model=MODEL, train=settings))
    return run


def put(folder: Path, target: StorePath) -> StorePath:
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            copy_file(file, target / file.relative_to(folder).as_posix())
    return target


def put_run(run: Path, dataset: StorePath, target: StorePath) -> Run:
    """A copy of a run on a store, trained on the dataset there."""
    put(run, target)
    config = yaml.safe_load((run / "config.yaml").read_text()) | {"dataset": str(dataset), "run": str(target)}
    (target / "config.yaml").write_text(yaml.safe_dump(config))
    return Run(target)


@pytest.fixture
def world(trained: Path, small_dataset: Path, s3: StorePath, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """The run on S3, with its dataset."""
    monkeypatch.setattr(priority, "lower", lambda _: None)
    monkeypatch.setattr(follow, "POLL_INTERVAL_OF_STORE", 0.05)
    return put_run(trained, put(small_dataset, s3 / "data"), s3 / "run")


def test_metrics_are_those_of_the_run_on_disk(world: Run, trained: Path):
    there = list(evaluate(EvaluateConfig(run=world.path, split="test", threads=1, follow=True, predictions=True)))
    here = list(evaluate(EvaluateConfig(run=trained, split="test", threads=1, predictions=True)))
    assert [r["metrics"] for r in there] == [r["metrics"] for r in here]
