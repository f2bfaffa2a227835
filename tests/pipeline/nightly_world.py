"""What tests of the nightly job share: a log of days whose clicks depend on user and item, datasets of days, runs."""

import csv
import datetime
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from features.schema.schema import Schema
from models.ranker import ModelConfig
from pipeline.dataset.dataset import open_dataset
from pipeline.evaluation.scorer import Scorer
from pipeline.ingest.config import PreprocessConfig
from pipeline.ingest.job import preprocess
from pipeline.release.config import NightlyConfig
from pipeline.run import checkpoint
from pipeline.run.run import Run
from pipeline.training.config import Settings, TrainConfig
from pipeline.training.train import train

sys.path.append(str(Path(__file__).parents[1] / "ingest"))
from ingest_runs import no_beam

FIRST = datetime.date(2026, 11, 1)
ROWS, USERS, ITEMS = 1500, 60, 20
CONTENT: dict[str, Any] = {
    "source": {
        "files": "log-{date}.csv",
        "row_id": "id",
        "types": {"click": "int", "save": "int", "dwell": "float", "price": "float"},
        "times": {"at": "s"},
    },
    "dense": {"price": {}},
    "categorical": {"user": {"dim": 4}, "item": {"dim": 4}},
    "tasks": {
        "click": {"kind": "binary", "label": "click"},
        "save": {"kind": "binary", "label": "save"},
        "dwell": {"kind": "regression", "label": "dwell"},
    },
    "event_time": "at",
    "split": {"by": "hash", "key": "id", "valid": 0.1, "test": 0.1},
}
MODEL = ModelConfig(fusion={"name": "mmoe", "num_experts": 2, "levels": [[8]]}, tower=[4])


def day(number: int) -> str:
    """The date of day 0, 1, …"""
    return (FIRST + datetime.timedelta(days=number)).isoformat()


def write_day(folder: Path, number: int, rows: int = ROWS, click_rate: float = 0.0, unseen: bool = False) -> None:
    """A day's log.

    Args:
        click_rate: added to the logit of a click. unseen: all users are others than on the other days.
    """
    rng = np.random.default_rng([7, number])
    tastes = np.random.default_rng(3).normal(0, 1.2, (2, USERS + ITEMS))
    user, item = rng.integers(0, USERS, rows), rng.integers(0, ITEMS, rows)
    logit = tastes[:, user] + tastes[:, USERS + item] - 0.5
    click, save = rng.random((2, rows)) < 1 / (1 + np.exp(-(logit + np.array([[click_rate], [0.0]]))))
    dwell = logit[0] + rng.normal(0, 1, rows)
    start = int(datetime.datetime.combine(FIRST, datetime.time(), datetime.timezone.utc).timestamp()) + 86_400 * number
    at = start + np.arange(rows) * 86_400 // rows
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"log-{day(number)}.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "at", "user", "item", "price", "click", "save", "dwell"])
        prefix = f"new{number}-" if unseen else "u"
        for n in range(rows):
            writer.writerow(
                [number * 1_000_000 + n, at[n], f"{prefix}{user[n]}", f"i{item[n]}", f"{rng.lognormal():.3f}",
                 int(click[n]), int(save[n]), f"{dwell[n]:.4f}"]
            )  # fmt: skip


def encode_day(log: Path, days: Path, number: int, content: dict[str, Any] = CONTENT, **settings: Any) -> None:
    """The dataset of a day in a folder of days."""
    config = PreprocessConfig(input=str(log), out=days, date=day(number), rows_per_row_group=256, **settings)
    with no_beam():
        preprocess(config, Schema.parse(content, "world.yaml"))


def train_run(days: Path, run: Path, last: int, steps: int = 60, **changes: Any) -> Run:
    """A run on days 0 to `last`, with checkpoints at half and at the end."""
    settings = Settings(
        batch_size=64, lanes=2, epochs=20, max_steps=steps, checkpoint_every=steps // 2, tables={"lr": 0.2}, threads=1,
        dense={"lr": 0.01}, **changes,
    )  # fmt: skip
    return train(TrainConfig(dataset=days, days=f"{day(0)}..{day(last)}", run=run, model=MODEL, train=settings))


def spoiled(run: Run, out: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Run:
    """A copy of a run whose newest checkpoint has other weights.

    Args:
        change: of a tensor, by its name in the model.
    """
    shutil.copytree(run.path, out)
    copy = Run(out)
    step = checkpoint.steps(copy.checkpoints)[-1]
    content = copy.config()
    scorer = Scorer(copy, open_dataset(Path(content["dataset"]), content["days"]), "test", 512)
    manifest = scorer.metrics(step)[1]
    weights = {name: change(name, tensor) for name, tensor in scorer.ranker.state_dict().items()}
    shutil.rmtree(checkpoint.folder(copy.checkpoints, step))
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    checkpoint.save(copy.checkpoints, {"model": weights}, manifest.model_copy(update={"files": {}, "checksum": ""}))
    dist.destroy_process_group()
    return copy


def night(log: Path, out: Path, number: int, **settings: Any) -> NightlyConfig:
    """Settings of a night."""
    return NightlyConfig.model_validate({"input": str(log), "out": out, "date": day(number), **settings})


def record(out: Path, number: int) -> dict[str, Any]:
    """What night.json holds."""
    return json.loads((out / day(number) / "night.json").read_text())
