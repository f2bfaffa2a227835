"""jobs.relabel: predictions as train labels, what stays of the dataset, training in two stages, and what is refused."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from tiny_training import assert_close, configuration, last, losses, make_dataset, model

from features.errors import UserError
from models.ranker import ModelConfig
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.verify import verify
from pipeline.evaluation import predictions
from pipeline.evaluation.relabel import RelabelConfig, relabel
from pipeline.evaluation.scorer import Scorer
from pipeline.run import checkpoint
from pipeline.run.run import Run
from pipeline.storage import objects
from pipeline.storage.files import copy_file
from pipeline.storage.store_path import StorePath, copy_all
from pipeline.training.train import prepare

pytestmark = pytest.mark.usefixtures("device")
AUTOTASK = {"name": "autotask", "width": 8, "examples": "mixed"}


def train(data: Path, run: Path, fusion: dict | None = None, **settings: object) -> Run:
    config = configuration(data, run, **({"max_steps": 13, "epochs": 1} | settings))
    if fusion:
        small = ModelConfig(fusion=fusion, tower=[8], embedding_std=0.1, field_dim=5)
        config = config.model_copy(update={"model": small})
    return prepare(config, None, torch.device("cpu")).run_to_end()


def predicted(run: Run, data: Path) -> Path:
    step = checkpoint.steps(run.checkpoints)[-1]
    Scorer(run, Dataset(data), "train", 64).evaluate(step, write_predictions=True)
    return predictions.path(run, "train", step)


def rows(data: Path, split: str) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(data / shard.path) for shard in Dataset(data).shards(split)])


@pytest.fixture(scope="module")
def teacher(folder: Path, device: torch.device) -> tuple[Path, Path]:
    """The dataset and a run's predictions of its train rows."""
    return folder / "data", predicted(train(folder / "data", folder / "teacher"), folder / "data")


def again(teacher: tuple[Path, Path], out: Path, **changes: Path) -> Path:
    data, file = teacher
    settings = {"dataset": data, "predictions": file, "out": out} | changes
    relabel(RelabelConfig(**settings))
    return out


def changed(teacher: tuple[Path, Path], file: Path, *columns: pl.Expr) -> Path:
    pl.read_parquet(teacher[1]).with_columns(*columns).write_parquet(file)
    return file


def test_train_labels_are_the_predictions_in_the_labels_unit_and_nothing_else_changes(teacher, tmp_path):
    out = again(teacher, tmp_path / "soft")
    logit = {row["row_id"]: row for row in pl.read_parquet(teacher[1]).iter_rows(named=True)}
    before, after = rows(teacher[0], "train"), rows(out, "train")
    for old, new in zip(before.iter_rows(named=True), after.iter_rows(named=True), strict=True):
        for task in ("click", "conversion", "dwell"):
            z = logit[old["row_id"]][f"logit.{task}"]
            wanted = z if task == "dwell" else 1 / (1 + math.exp(-z))
            assert (new[f"label.{task}"] is None) == (old[f"label.{task}"] is None)
            if new[f"label.{task}"] is not None:
                assert new[f"label.{task}"] == pytest.approx(wanted, rel=1e-6)
    labels = [name for name in before.columns if name.startswith("label.")]
    assert after.drop(labels).equals(before.drop(labels))
    for split in ("valid", "test"):
        assert rows(out, split).equals(rows(teacher[0], split))


def test_the_new_dataset_verifies_and_has_the_schema_and_encoders_of_the_old_one(small_dataset, tmp_path):
    train_rows = rows(small_dataset, "train").sort("row_id")
    logit = pl.Series(np.linspace(-800, 800, train_rows.height), dtype=pl.Float32)  # exp would overflow
    labels = [name for name in train_rows.columns if name.startswith("label.")]
    columns = {name.replace("label", "logit"): logit for name in labels}
    file = tmp_path / "train.parquet"
    train_rows.select("row_id", "weight", *labels).with_columns(**columns).write_parquet(file)
    old, new = Dataset(small_dataset), Dataset(again((small_dataset, file), tmp_path / "soft"))
    assert [line.partition(":")[0] for line in verify(new)] == [line.partition(":")[0] for line in verify(old)]
    assert (new.manifest.fingerprint, new.encoders_id) == (old.manifest.fingerprint, old.encoders_id)
    kept = {"shards", "positives"}
    assert new.manifest.model_dump(exclude=kept) == old.manifest.model_dump(exclude=kept)
    for now, then in zip(new.manifest.shards, old.manifest.shards, strict=True):
        assert (now.path, now.row_groups, now.rows, now.observed) == (
            then.path,
            then.row_groups,
            then.rows,
            then.observed,
        )
        assert (now == then) == (then.split != "train")
    click = rows(new.path, "train")["label.click"].cast(pl.Float64)
    assert new.manifest.positives["train"]["click"] == pytest.approx(click.sum(), rel=1e-12)
    assert (click.min(), click.max()) == (0, 1)
    assert rows(new.path, "train")["label.dwell"].max() > 700


def test_autotask_learns_in_two_stages_from_a_teacher_and_then_from_the_log(teacher, tmp_path):
    soft = again(teacher, tmp_path / "soft")
    first = train(soft, tmp_path / "first", AUTOTASK, dense={"lr": 0.01})
    start = prepare(
        configuration(teacher[0], tmp_path / "start", init_from=first.path, max_steps=13).model_copy(
            update={"model": ModelConfig(fusion=AUTOTASK, tower=[8], embedding_std=0.1, field_dim=5)}
        ),
        None,
        torch.device("cpu"),
    )
    assert_close({n: v for n, v in start.learner.state()["model"].items() if "fusion" in n or "tower" in n},
                 {n: v for n, v in model(last(first.path)).items() if "fusion" in n or "tower" in n})  # fmt: skip
    second = train(teacher[0], tmp_path / "second", AUTOTASK, init_from=first.path, dense={"lr": 0.01})
    assert all(np.isfinite([*losses(first.path), *losses(second.path)]))
    moved = [n for n, v in model(last(second.path)).items() if not torch.equal(v, model(last(first.path))[n])]
    assert any("over_examples" in name for name in moved)


def test_soft_labels_are_learnt_the_loss_of_the_teachers_own_predictions_is_their_entropy(teacher, tmp_path):
    soft = again(teacher, tmp_path / "soft")
    scored = pl.read_parquet(predicted(train(soft, tmp_path / "run", max_steps=1), soft))
    loss_B, weight_B = predictions.row_losses(
        scored.select("row_id", "weight", "label.click").join(
            pl.read_parquet(teacher[1]).select("row_id", "logit.click"), on="row_id", maintain_order="left"
        ), "click", "binary",
    )  # fmt: skip
    p_B = scored["label.click"].to_numpy().astype(np.float64)
    entropy_B = -(p_B * np.log(p_B) + (1 - p_B) * np.log1p(-p_B))
    assert np.allclose(loss_B[weight_B > 0], entropy_B[weight_B > 0], rtol=1e-5)


def test_a_task_without_predictions_keeps_its_labels(teacher, tmp_path):
    file = tmp_path / "click.parquet"
    pl.read_parquet(teacher[1]).drop("logit.dwell", "label.dwell", "logit.conversion").write_parquet(file)
    out = again(teacher, tmp_path / "soft", predictions=file)
    assert rows(out, "train")["label.dwell"].equals(rows(teacher[0], "train")["label.dwell"])
    assert not rows(out, "train")["label.click"].equals(rows(teacher[0], "train")["label.click"])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def stored(teacher, memory: StorePath) -> tuple[StorePath, StorePath]:
    """The teacher on a store."""
    for file in teacher[0].rglob("*"):
        if file.is_file():
            copy_file(file, memory / "data" / file.relative_to(teacher[0]).as_posix())
    copy_file(teacher[1], memory / "train.parquet")
    return memory / "data", memory / "train.parquet"


def test_a_commit_to_a_store_that_failed_is_ended_by_the_next_job(teacher, stored, tmp_path, memory, monkeypatch):
    def stops_after_one(pairs: list, before_each: Callable[[], None]) -> None:
        copy_all(pairs[:1], before_each)
        raise OSError("the store stops")

    with monkeypatch.context() as patch:
        patch.setattr(objects, "copy_all", stops_after_one)
        with pytest.raises(UserError, match="/soft is not written to its end: the store stops"):
            again(stored, memory / "soft")
    with pytest.raises(UserError, match=r"/soft exists\."):
        again(stored, memory / "soft")
    assert contents(memory / "soft") == contents(again(teacher, tmp_path / "soft"))


def test_a_dataset_that_another_job_has_committed_meanwhile_stays(teacher, tmp_path, monkeypatch):
    theirs, read = tmp_path / "soft" / "manifest.json", predictions.read

    def beside_another(*arguments: object) -> pl.DataFrame:
        theirs.parent.mkdir()
        theirs.write_text("theirs")
        return read(*arguments)

    monkeypatch.setattr(predictions, "read", beside_another)
    with pytest.raises(UserError, match=r"/soft exists\."):
        again(teacher, tmp_path / "soft")
    assert theirs.read_text() == "theirs"


def test_on_a_store_it_makes_the_files_that_it_makes_on_a_disk(teacher, stored, tmp_path, memory):
    out = again(stored, memory / "soft")
    assert contents(out) == contents(again(teacher, tmp_path / "soft"))
    assert {file.relative_to(memory).parts[0] for file in memory.rglob("*")} == {"data", "train.parquet", "soft"}


def test_files_that_stay_are_links_and_the_old_dataset_is_as_it_was(teacher, tmp_path):
    names = ["schema.yaml", "statistics.json", *(shard.path for shard in Dataset(teacher[0]).manifest.shards)]
    before = {name: (teacher[0] / name).read_bytes() for name in names if (teacher[0] / name).exists()}
    out = again(teacher, tmp_path / "soft")
    assert {name: (teacher[0] / name).read_bytes() for name in before} == before
    same = {shard.path: (out / shard.path).samefile(teacher[0] / shard.path) for shard in Dataset(out).manifest.shards}
    assert same == {name: not name.startswith("train/") for name in same}


def test_what_does_not_fit_is_refused_and_leaves_nothing(teacher, tmp_path):
    other = make_dataset(tmp_path / "other", rows=500)
    flipped = pl.when(pl.col("label.click").is_not_null()).then(1 - pl.col("label.click")).alias("label.click")
    one, known = pl.col("row_id") == 7, pl.read_parquet(teacher[1])["row_id"]
    for name, columns, words in (
        ("labels", [flipped], "labels of click are not those of"),
        ("nan", [pl.when(one).then(float("nan")).otherwise("logit.click").alias("logit.click")], "click is not finite"),
        (
            "ids",
            [pl.when(pl.col("row_id") == known[-1]).then(10**6).otherwise("row_id").alias("row_id")],
            "lacks row_id",
        ),
        ("order", [pl.col("row_id").reverse()], "not in order"),
        (
            "repeated",
            [pl.when(pl.col("row_id") == known[1]).then(known[0]).otherwise("row_id").alias("row_id")],
            "repeated or",
        ),
        ("task", [pl.lit(0.0, pl.Float32).alias("logit.sale")], "predicts sale, which is no task"),
        ("type", [pl.col("logit.click").cast(pl.String)], "has no column row_id, logit.click"),
    ):
        file = changed(teacher, tmp_path / f"{name}.parquet", *columns)
        with pytest.raises(UserError, match=words):
            again(teacher, tmp_path / "soft", predictions=file)
    for changes, words in (
        ({"dataset": other}, "has 415 rows, train of"),
        ({"predictions": tmp_path / "none.parquet"}, "no file of predictions"),
        (
            {"predictions": other / "manifest.json"},
            r"manifest\.json: cannot be read \(.*\)\. Write them with jobs\.evaluate",
        ),
        ({"dataset": tmp_path / "none"}, "no dataset"),
    ):
        with pytest.raises(UserError, match=words):
            again(teacher, tmp_path / "soft", **changes)
    with pytest.raises(UserError, match=r"exists\. Choose another"):
        again(teacher, other)
    assert not (tmp_path / "soft").exists()
    assert not list(tmp_path.glob("*staging*"))
    assert json.loads((other / "manifest.json").read_text())["rows"]["train"] == 400
