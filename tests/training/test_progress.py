"""Progressive validation: NE of each day's batches before they were learnt from, against sums over the rows themselves."""

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_training import configuration, initial_state, make_dataset, model, unsharded

from features.batch import Batch
from pipeline.dataset.dataset import open_dataset
from pipeline.dataset.days import DAY_STRIDE
from pipeline.dataset.loader import Loader
from pipeline.storage.files import read_lines
from pipeline.training.config import TrainConfig
from pipeline.training.observer import Observer
from pipeline.training.parallel import process_group
from pipeline.training.step import StepOutput
from pipeline.training.train import prepare
from pipeline.training.trainer import Trainer

pytestmark = pytest.mark.integration

DAYS = ("2026-11-01", "2026-11-02", "2026-11-03")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("progress")
    for day in DAYS:
        make_dataset(path / "data" / day, rows=520)  # 416 train rows, 13 whole batches
    process_group.start()
    yield path
    dist.destroy_process_group()


class Keeper(Observer):
    """Keeps the output of each forward."""

    def __init__(self) -> None:
        self.kept: list[StepOutput] = []

    def on_forward(self, trainer: Trainer, output: StepOutput) -> None:
        self.kept.append(output)


def kept(config: TrainConfig) -> list[StepOutput]:
    """The outputs of a run to its end."""
    keeper = Keeper()
    prepare(config, None, torch.device("cpu"), [keeper]).run_to_end()
    return keeper.kept


def entropy(p: float) -> float:
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


def of_days(folder: Path, run: str, **settings: object) -> TrainConfig:
    config = configuration(folder / "data", folder / run, **({"epochs": 1, "max_steps": None} | settings))
    return config.model_copy(update={"days": f"{DAYS[0]}..{DAYS[-1]}"})


def test_ne_of_each_day_is_that_of_its_rows_by_the_weights_before_them(folder: Path) -> None:
    outputs = kept(of_days(folder, "days"))
    lines = list(read_lines(folder / "days" / "metrics" / "progressive.jsonl"))
    assert [(line["day"], line["step"], line["rows"]) for line in lines] == [
        (day, 13 * number, 416 * number) for number, day in enumerate(DAYS, start=1)
    ]
    loss, label, observed, weight = (torch.cat(parts).double() for parts in list(zip(*outputs, strict=True))[:4])
    day_B = torch.cat([output.row_id_B for output in outputs]) // DAY_STRIDE
    for number, line in enumerate(lines):
        for task, name in enumerate(("click", "conversion", "dwell")):
            mine = (day_B == number) & (observed[:, task] > 0)
            w, y = weight[mine, task], label[mine, task]
            mean = float((w * loss[mine, task]).sum() / w.sum())
            if name == "dwell":
                assert line["task_loss"][name] == pytest.approx(mean, rel=1e-9)
            else:
                assert line["ne"][name] == pytest.approx(mean / entropy(float((w * y).sum() / w.sum())), rel=1e-9)
    assert lines[0]["ne"]["click"] != lines[1]["ne"]["click"]


def test_a_batch_is_judged_before_it_is_learnt_from(folder: Path) -> None:
    """The first one by the weights that the run began with."""
    config = of_days(folder, "first", max_steps=1)
    weights = model(initial_state(config))
    outputs = kept(config)
    dataset = open_dataset(config.dataset, config.days)
    loader = Loader(dataset, "train", 32, 4, config.train.seed, window=config.train.window)
    batch = next(loader.batches(loader.start()))
    ranker = unsharded(config, dataset.schema, dataset.encoders, weights)
    logit_BT = ranker(Batch(**(vars(batch) | {"dense_BD": batch.dense_BD.double()})))
    wanted = torch.nn.functional.binary_cross_entropy_with_logits(
        logit_BT[:, 0], batch.label_BT[:, 0].double(), reduction="none"
    )
    torch.testing.assert_close(outputs[0].loss_BT[:, 0].double(), wanted.detach(), rtol=1e-5, atol=1e-6)


def test_without_days_an_epoch_is_one(folder: Path) -> None:
    config = configuration(folder / "data" / DAYS[0], folder / "epochs", epochs=2, max_steps=20)
    kept(config)
    [line] = read_lines(folder / "epochs" / "metrics" / "progressive.jsonl")
    assert (line["epoch"], line["day"], line["step"], line["rows"]) == (0, "", 13, 416)
