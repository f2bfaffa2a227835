"""Towers that start at what is known of the train labels, by every kind of tower."""

import math
from pathlib import Path

import polars as pl
import pytest
import torch
from tiny_training import configuration, raw_rows

from features.errors import UserError
from models.emm import build_ranker
from models.ranker import ModelConfig
from models.row_losses import GivenConfig
from pipeline.dataset.dataset import Dataset
from pipeline.training.train import prepare
from pipeline.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("device")

TASK_TOWERS = {"name": "shared_bottom", "widths": [8]}
SHARED_TOWER = {"name": "multitab", "layers": 1, "heads": 2, "hidden": 8}


def by_hand(task: str) -> float:
    """The logit of a task's weighted mean over observed train rows."""
    rows = raw_rows().with_row_index().filter(pl.col("index") % 10 < 8, pl.col("click").is_not_null())
    if task == "conversion":
        rows = rows.filter(pl.col("click") == "1")
    label, weight = rows[task].cast(pl.Float64), rows["importance"].cast(pl.Float64)
    positive, whole = (label * weight).sum() + 0.5, weight.sum() + 1
    return math.log(positive / (whole - positive))


def trainer(folder: Path, name: str, **model: object) -> Trainer:
    config = configuration(folder / "data", folder / name)
    return prepare(
        config.model_copy(update={"model": config.model.model_copy(update=model)}), None, torch.device("cpu")
    )


@pytest.mark.parametrize("fusion", [TASK_TOWERS, SHARED_TOWER], ids=lambda f: f["name"])
@pytest.mark.parametrize("calibration", ["none", "monotone"])
def test_towers_start_at_the_weighted_train_mean_of_their_task(folder: Path, fusion: dict, calibration: str) -> None:
    ranker = trainer(folder, f"{fusion['name']}-{calibration}", fusion=fusion, calibration=calibration).learner.ranker
    with torch.no_grad():
        for name, parameter in ranker.towers.named_parameters():
            if name.endswith("weight_SDH"):
                parameter.zero_()
        out_KBT = ranker.towers(torch.randn(2, 3, ranker.fusion.out_dim))
    answer_BT = ranker.units(out_KBT if ranker.calibration is None else ranker.calibration(out_KBT[0]).unsqueeze(0))
    dwell = raw_rows().with_row_index().filter(pl.col("index") % 10 < 8, pl.col("click") == "1")
    label, weight = (dwell[name].cast(pl.Float64) for name in ("dwell", "importance"))
    wanted = [by_hand("click"), by_hand("conversion"), (label * weight).sum() / weight.sum()]
    for row in answer_BT.tolist():
        assert row == pytest.approx(wanted, abs=1e-5)


def test_calibration_leaves_the_further_numbers_of_a_task_as_they_are(folder: Path) -> None:
    data = Dataset(folder / "data")
    config = ModelConfig(fusion=TASK_TOWERS, calibration="monotone", given=GivenConfig(name="dr"))
    ranker = build_ranker(data.schema, data.encoders, config, device="cpu")
    ranker.read = lambda *_: torch.ones(3, ranker.interaction.out_dim)
    out_KBT = ranker.dense_outputs(torch.zeros(3, 1), None)
    assert out_KBT.shape == (2, 3, 3)
    assert torch.equal(out_KBT[1], ranker.towers(ranker.fusion(ranker.read()))[1])


def test_zero_starts_near_zero(folder: Path) -> None:
    towers = trainer(folder, "zero", fusion=TASK_TOWERS, start="zero").learner.ranker.towers
    assert towers.out.bias_SH.abs().max() < 1 / math.sqrt(8)


def test_a_task_held_out_starts_where_the_others_do_and_its_labels_say_nothing(folder: Path) -> None:
    fusion = {"name": "autotask", "width": 8, "unseen": ["conversion"]}
    bias_T = trainer(folder, "unseen", fusion=fusion).learner.ranker.towers.bias_K1T[0, 0].tolist()
    assert bias_T == pytest.approx([by_hand("click"), by_hand("click") / 2, 0.0], abs=1e-6)


def test_rates_of_days_are_those_of_their_rows_together(folder: Path) -> None:
    data = Dataset(folder / "data")
    rates = data.base_rates()
    assert rates.keys() == {"click", "conversion"}
    data.manifest = data.manifest.model_copy(update={"shards": [*data.manifest.shards, *data.manifest.shards]})
    weight = sum(s.weights["click"] for s in data.manifest.shards if s.split == "train")
    positive = sum(s.weighted["click"] for s in data.manifest.shards if s.split == "train")
    assert data.base_rates()["click"] == pytest.approx((positive + 0.5) / (weight + 1))
    assert data.base_rates()["click"] != rates["click"]


def test_models_over_all_impressions_need_a_task_that_is_given_another(folder: Path) -> None:
    data = Dataset(folder / "data").only(["conversion"])
    config = ModelConfig(fusion=TASK_TOWERS, given=GivenConfig(name="esmm"))
    with pytest.raises(
        UserError, match=r"esmm learns tasks that are given others, and click is not among tasks=. Add it there, or set"
    ):
        build_ranker(data.schema, data.encoders, config)
    data = Dataset(folder / "data").only(["click", "dwell"])
    with pytest.raises(UserError, match=r"given others, and no task has `given`. Write one in the schema, such as"):
        build_ranker(data.schema, data.encoders, config)


@pytest.mark.parametrize("unseen", ["click", "conversion"])
def test_over_all_impressions_no_task_of_a_chain_is_held_out(folder: Path, unseen: str) -> None:
    fusion = {"name": "autotask", "width": 8, "examples": "tasks", "unseen": [unseen]}
    data = Dataset(folder / "data")
    build_ranker(data.schema, data.encoders, ModelConfig(fusion=fusion))
    build_ranker(
        data.schema, data.encoders, ModelConfig(fusion=fusion | {"unseen": ["dwell"]}, given=GivenConfig(name="esmm"))
    )
    with pytest.raises(
        UserError, match=rf"model\.fusion\.unseen: with .*name=esmm labels of {unseen} train other tasks"
    ):
        build_ranker(data.schema, data.encoders, ModelConfig(fusion=fusion, given=GivenConfig(name="esmm")))
