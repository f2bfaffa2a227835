"""Parts of a model that stand around the fusion, trained: numbers' codes, interactions, calibration."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import (
    SCHEMA,
    assert_close,
    assert_identical,
    configuration,
    last,
    losses,
    make_dataset,
    model,
    torchrun,
)

from pipeline.dataset.dataset import Dataset
from pipeline.dataset.loader import Loader
from pipeline.training.train import prepare
from pipeline.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("device")

INTERACTIONS: dict[str, dict[str, Any]] = {
    "concat": {},
    "dot": {},
    "cross": {"layers": 2, "rank": 3},
    "attention": {"layers": 2, "heads": 2},
}
CODED = {
    "age": {"missing_flag": True, "piecewise": 16},
    "price": {"transform": "log1p", "standardize": False, "piecewise": 6},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("parts")
    make_dataset(path / "data", dense=CODED)
    make_dataset(path / "plain", dense=SCHEMA["dense"])
    return path


def trainer(folder: Path, name: str, data: str = "data", pipelined: bool = False, **changes: Any) -> Trainer:
    config = configuration(folder / data, folder / name, max_steps=20, pipelined=pipelined)
    config.model = config.model.model_copy(update={"numeric_dim": 3, "field_dim": 4} | changes)
    return prepare(config, None, torch.device("cpu"))


def weights(made: Trainer) -> dict[str, torch.Tensor]:
    """Copies of the parameters that are not in tables."""
    named = made.learner.model.named_parameters()
    return {n.removeprefix("ranker."): p.detach().clone() for n, p in named if "embeddings" not in n}


@pytest.mark.parametrize("name", INTERACTIONS)
def test_each_interaction_trains_over_coded_numbers_and_the_pipelined_loop_trains_the_same(folder: Path, name: str):
    changes = {"interaction": {"name": name, **INTERACTIONS[name]}, "calibration": "monotone"}
    made = trainer(folder, name, **changes)
    start = weights(made)
    made.run_to_end()
    end = weights(made)
    assert [n for n in start if torch.equal(start[n], end[n])] == []
    assert {n.split(".")[0] for n in start} == {"numbers", "fusion", "towers", "calibration"} | (
        set() if name == "concat" else {"interaction"}
    )
    assert all(value == value and abs(value) < 100 for value in losses(folder / name))
    trainer(folder, f"{name}-pipelined", pipelined=True, **changes).run_to_end()
    assert_identical(last(folder / f"{name}-pipelined"), last(folder / name))
    assert losses(folder / f"{name}-pipelined") == losses(folder / name)


def test_a_run_reads_no_values_of_vocabularies(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def read(_: Path, table: str, __: int) -> None:
        raise AssertionError(f"the vocabulary of {table} was read")

    monkeypatch.setattr("features.fit.fitted_files.read_vocabulary", read)
    made = trainer(folder, "without-values")
    made.run_to_end()
    with pytest.raises(AssertionError, match="the vocabulary of user was read"):
        made.dataset.encoders.vocabularies["user"]


def test_a_binary_tasks_calibration_is_learnt_and_a_regressions_is_not(folder: Path):
    trainer(folder, "calibrated", calibration="monotone").run_to_end()
    state = model(last(folder / "calibrated"))
    assert [bool(steepness_K.any()) for steepness_K in state["calibration.steepness_TK"]] == [True, True, False]
    assert [bool(shift) for shift in state["calibration.shift_T"]] == [True, True, False]


def test_coded_numbers_with_missing_flags_train_another_model_than_plain_ones(folder: Path):
    plain, coded = trainer(folder, "plain-run", data="plain"), trainer(folder, "coded-run")
    # W for each of two codes beside their numbers.
    width, extra = plain.learner.model.module.ranker.numbers.out_dim, 2 * 3
    assert coded.learner.model.module.ranker.numbers.out_dim == width + extra
    for made in (plain, coded):
        made.run_to_end()
    assert losses(folder / "plain-run") != losses(folder / "coded-run")


@pytest.mark.system
def test_two_ranks_train_what_one_does_with_an_interaction_and_a_calibration(folder: Path):
    changes = {"interaction": {"name": "cross", "layers": 2, "rank": None}, "calibration": "monotone"}
    made = trainer(folder, "one-rank", **changes)
    made.run_to_end()
    settings = configuration(folder / "data", folder / "two-ranks").train
    keys = ("batch_size", "lanes", "window", "epochs", "seed", "log_every", "threads")
    done = torchrun(
        "-m", "jobs.train", f"dataset={folder / 'data'}", f"run={folder / 'two-ranks'}", "model=mmoe",
        "model.fusion.num_experts=3", "model.fusion.levels=[[16],[8]]", "model.tower=[8]", "model.embedding_std=0.1",
        "+model.numeric_dim=3", "+model.field_dim=4", "interaction=cross", "+model.calibration=monotone",
        *(f"train.{key}={getattr(settings, key)}" for key in keys),
        "train.max_steps=20", "train.tables.lr=0.05", "train.dense.lr=0.003",
    )  # fmt: skip
    done.check_returncode()
    assert_close(last(folder / "two-ranks"), last(folder / "one-rank"), rtol=1e-3, atol=1e-4)


def test_the_input_is_dropped_in_training_alone(folder: Path):
    ranker = trainer(folder, "dropped", input_dropout=0.5).learner.model.module.ranker
    loader = Loader(Dataset(folder / "data"), "train", 32)
    batch = next(loader.batches(loader.start()))
    kept = ranker.eval().inputs(batch)
    dropped = ranker.train().inputs(batch)
    gone = dropped == 0
    assert 0.4 < gone.float().mean() < 0.6
    torch.testing.assert_close(dropped[~gone], 2 * kept[~gone])
    assert torch.equal(ranker.eval().inputs(batch), kept)
