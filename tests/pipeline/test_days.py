"""Days of a log, each a dataset of its own, read as one: in order, each row once, whatever the number of ranks."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import yaml
from dataset_by_hand import draw_rows
from dataset_by_hand import write_dataset as write_by_hand
from dataset_from_rows import write_dataset
from pydantic import ValidationError

from features.batch import PADDING
from features.errors import UserError
from features.fit.encoders import Encoders, arrow_schema
from features.kinds.moments import Moments
from features.schema.schema import Schema
from models.ranker import ModelConfig
from pipeline.dataset import dataset as datasets
from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.days import DAY_STRIDE, MAX_DAYS, day_ranges
from pipeline.dataset.loader import Loader, Position
from pipeline.evaluation import oracle, predictions
from pipeline.evaluation.follow import EvaluateConfig, evaluate
from pipeline.evaluation.oracle import Truth
from pipeline.release.config import NightlyConfig
from pipeline.release.nightly import nightly
from pipeline.run import records
from pipeline.run.run import Run
from pipeline.training.config import Settings, TrainConfig
from pipeline.training.train import train

CONTENT = {
    "source": {"files": "*-{date}.csv"},
    "dense": {"x": {}},
    "tasks": {"click": {"kind": "binary", "label": "click"}},
    "split": {"by": "hash", "key": "k", "valid": 0.0, "test": 0.0},
}
SCHEMA = Schema.parse(CONTENT, "days.yaml")
ROWS = {"2026-11-01": 90, "2026-11-02": 7, "2026-11-03": 150}


def write_day(root: Path, number: int, day: str, rows: int, schema: Schema = SCHEMA, mean: float = 0.0) -> None:
    """Rows whose x is 1000 times the day and their place in it; without a column of ids each day has row ids from 0."""
    content = [
        {"x": 1000.0 * number + row, "label.click": row % 2, "weight": 1.0, "event_time": 0, "row_id": row}
        for row in range(rows)
    ]
    encoders = Encoders(schema, {}, {"x": Moments(2, mean, 2.0)}, {})
    write_dataset(root / day, schema, {"train": pa.Table.from_pylist(content, arrow_schema(schema))}, 16, 60, encoders)


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("days")
    for number, (day, rows) in enumerate(ROWS.items()):
        write_day(folder, number, day, rows)
    return folder


def batches(dataset: Dataset, position: Position | None = None, **settings: int) -> list[list[int]]:
    loader = Loader(dataset, "train", 16, **{"lanes": 4, "window": 20, "seed": 3, **settings})
    found = loader.batches(position or loader.start())
    return [batch.dense_BD[batch.row_id_B != PADDING, 0].int().tolist() for batch in found]


def row_ids(dataset: Dataset, lanes: int = 4) -> dict[int, int]:
    """The row id of each x."""
    loader = Loader(dataset, "train", 16, lanes, window=20)
    found: dict[int, int] = {}
    for batch in loader.batches(loader.start()):
        real = batch.row_id_B != PADDING
        found |= zip(batch.dense_BD[real, 0].int().tolist(), batch.row_id_B[real].tolist(), strict=True)
    return found


@pytest.mark.parametrize("window", [0, 20])
def test_days_follow_each_other_and_every_row_is_read_once(root, window):
    dataset = open_dataset(root, "2026-11-01..2026-11-03")
    assert dataset.manifest.rows["train"] == sum(ROWS.values())
    found = batches(dataset, window=window)
    flat = [row for batch in found for row in batch]
    assert sorted(flat) == [1000 * n + row for n, rows in enumerate(ROWS.values()) for row in range(rows)]
    days = [{row // 1000 for row in batch} for batch in found]
    # Lanes of a day end within a row of each other: a batch at its end holds rows of both days, and so may the next one.
    assert all(max(before) <= min(after) for before, after in zip(days, days[2:], strict=False))
    assert sum(len(batch) > 1 for batch in days) <= 4


def test_a_day_alone_and_a_range_of_one_are_the_same(root):
    assert batches(open_dataset(root, "2026-11-03")) == batches(open_dataset(root, "2026-11-03..2026-11-03"))
    assert sorted(row for batch in batches(open_dataset(root, "2026-11-03")) for row in batch) == list(
        range(2000, 2150)
    )


def test_two_ranks_read_what_one_reads_and_a_position_continues(root):
    dataset = open_dataset(root, "2026-11-01..2026-11-03")
    whole = batches(dataset)
    shared = [sorted(a + b) for a, b in zip(batches(dataset, ranks=2), batches(dataset, rank=1, ranks=2), strict=True)]
    assert shared == [sorted(batch) for batch in whole]
    loader = Loader(dataset, "train", 16, lanes=4, window=20, seed=3)
    assert batches(dataset, loader.after(loader.start(), 7)) == whole[7:]


def test_a_missing_day_other_encoders_and_another_schema_are_refused_by_name(root, tmp_path):
    with pytest.raises(UserError, match=r"no dataset of 2026-11-04 in .*date=2026-11-04 first, or set days=2026-11-01"):
        open_dataset(root, "2026-11-01..2026-11-04")
    for days in ("yesterday", "2026-11-02..2026-11-01", "2026-11-02.."[:-1]):
        with pytest.raises(UserError, match="days="):
            open_dataset(root, days)
    write_day(tmp_path, 0, "2026-11-01", 5)
    write_day(tmp_path, 1, "2026-11-02", 5, mean=1.0)
    with pytest.raises(UserError, match=r"2026-11-02 was encoded with .*encoders.from="):
        open_dataset(tmp_path, "2026-11-01..2026-11-02")
    write_day(tmp_path, 2, "2026-11-03", 5, schema=Schema.parse(CONTENT | {"weight": "2"}, "other.yaml"))
    with pytest.raises(UserError, match=r"2026-11-03 was written for schema"):
        open_dataset(tmp_path, "2026-11-02..2026-11-03")


def test_days_that_keep_other_columns_are_refused_by_name(root, tmp_path):
    shutil.copytree(root, tmp_path / "days")
    first, second = sorted(path for path in (tmp_path / "days").iterdir() if path.is_dir())[:2]
    schema = yaml.safe_load((second / "schema.yaml").read_text())
    (second / "schema.yaml").write_text(yaml.safe_dump(schema | {"keep": ["x"]}, sort_keys=False))
    with pytest.raises(UserError, match=rf"{second.name} keeps the columns .*{first.name} keeps \[\]"):
        open_dataset(tmp_path / "days", f"{first.name}..{second.name}")


def test_days_with_holes_are_read_as_a_list_or_with_those_missing_left_out(root, tmp_path, caplog):
    whole = row_ids(open_dataset(root, "2026-11-01..2026-11-03"))
    for number, day in enumerate(("2026-11-01", "2026-11-02", "2026-11-04", "2026-11-07")):
        write_day(tmp_path, number, day, 20)
    four = "2026-11-01..2026-11-02,2026-11-04,2026-11-07"
    named = open_dataset(tmp_path, four)
    assert (named.days, named.name) == (["2026-11-01", "2026-11-02", "2026-11-04", "2026-11-07"], f"{tmp_path}/{four}")
    with pytest.raises(UserError) as caught:
        open_dataset(tmp_path, "2026-11-01..2026-11-08")
    # The line names what can be pasted into a shell: the job of the first day that is missing, and the days that are there.
    assert str(caught.value) == (
        f"days=2026-11-01..2026-11-08: no dataset of 2026-11-03, 2026-11-05..2026-11-06, 2026-11-08 in {tmp_path}. Run "
        f"jobs.preprocess with out={tmp_path} date=2026-11-03 first, or set "
        '"days=[2026-11-01..2026-11-02,2026-11-04,2026-11-07]" or missing_days=skip.'
    )
    [setting] = re.findall(r'"days=\[(.*)\]"', str(caught.value))
    assert parsed_days(setting.split(",")) == parsed_days(four) == four
    skipped = open_dataset(tmp_path, "2026-11-01..2026-11-08", "skip")
    assert "without 2026-11-03, 2026-11-05..2026-11-06, 2026-11-08" in caplog.text
    assert row_ids(skipped) == row_ids(named) == {
        1000 * number + row: number * 2**56 + row for number in range(4) for row in range(20)
    }  # fmt: skip
    assert row_ids(open_dataset(root, "2026-11-01..2026-11-09", "skip")) == whole
    with pytest.raises(
        UserError, match=r"no dataset of these days. It has those of 2026-11-01..2026-11-02, 2026-11-04"
    ):
        open_dataset(tmp_path, "2026-12-01..2026-12-08", "skip")
    for days in ("2026-11-02,2026-11-01", "2026-11-01..2026-11-02,2026-11-02", "2026-11-01,", ""):
        with pytest.raises(UserError, match="days="):
            open_dataset(tmp_path, days)


def test_days_cannot_be_left_out_where_none_are_named(root):
    with pytest.raises(
        UserError, match=r"^missing_days=skip: no days are named of which one may be missing\. Set days="
    ):
        open_dataset(root / "2026-11-01", None, "skip")


def parsed_days(value: str | list[str]) -> str | None:
    """The setting days= of a job."""
    return EvaluateConfig.model_validate({"run": "run", "days": value}).days


@pytest.mark.parametrize(
    ("value", "wanted"), [(20261101, "2026-11-01"), (20261399, "2026-11-07"), (2026, "2026-11-07"), (1.5, "")]
)
def test_days_that_are_read_as_a_number_are_answered_with_the_form_of_a_day(value: float, wanted: str) -> None:
    with pytest.raises(ValidationError, match=rf"{value} is no date as YYYY-MM-DD: write {wanted}"):
        EvaluateConfig.model_validate({"run": "run", "days": value})
    assert EvaluateConfig.model_validate({"run": "run", "days": None}).days is None


def test_row_ids_of_days_never_meet_and_stay_as_they_are_in_one_dataset(root):
    rows = [(number, row) for number, rows in enumerate(ROWS.values()) for row in range(rows)]
    found = row_ids(open_dataset(root, "2026-11-01..2026-11-03"))
    assert found == {1000 * number + row: number * 2**56 + row for number, row in rows}
    assert len(set(found.values())) == len(rows)
    assert row_ids(open_dataset(root, "2026-11-02..2026-11-03").only(["click"]), lanes=1) == {
        1000 * number + row: (number - 1) * 2**56 + row for number, row in rows if number
    }
    for alone in (open_dataset(root, "2026-11-03"), Dataset(root / "2026-11-03")):
        assert row_ids(alone) == {2000 + row: row for row in range(150)}


def test_row_ids_that_a_column_gives_are_the_columns_own(tmp_path):
    source = {"source": {**CONTENT["source"], "row_id": "id"}}
    for number, day in enumerate(("2026-11-01", "2026-11-02")):
        write_day(tmp_path, number, day, 20, Schema.parse(CONTENT | source, "named.yaml"))
    found = row_ids(open_dataset(tmp_path, "2026-11-01..2026-11-02"))
    assert found == {1000 * number + row: row for number in (0, 1) for row in range(20)}


def test_more_days_than_row_ids_have_room_for_are_refused(root, monkeypatch):
    last = (MAX_DAYS - 1) * DAY_STRIDE + 65_535 * 2**40 + 2**40 - 1
    assert last == np.iinfo(np.int64).max
    monkeypatch.setattr(datasets, "MAX_DAYS", 2)
    assert len(open_dataset(root, "2026-11-01..2026-11-02").days) == 2
    with pytest.raises(UserError, match=r"3 days, of which at most 2 .*source\.row_id"):
        open_dataset(root, "2026-11-01..2026-11-03")


def test_a_manifest_of_days_counts_what_all_of_them_count(tmp_path):
    days = ["2026-11-01", "2026-11-02", "2026-11-03"]
    write_by_hand(tmp_path / days[0], draw_rows(100))
    for day in days[1:]:
        shutil.copytree(tmp_path / days[0], tmp_path / day)
        file = tmp_path / day / "manifest.json"
        content = json.loads(file.read_text())
        content["read"]["impressions"] += 7
        content["left_out"] = {f"rule of {day}": 18}
        content["outcomes"]["click"] |= {"joined": 60, "late": 13}
        content["dead_letters"] = {"odd": 5}
        content["complete_until"] = {"click": 1_000_000 - int(day[-1])}
        file.write_text(json.dumps(content))
    found = open_dataset(tmp_path, f"{days[0]}..{days[-1]}").manifest
    total: dict[tuple[str, ...], int] = {}
    for day in days:
        for keys, value in counters(json.loads((tmp_path / day / "manifest.json").read_text())):
            total[keys] = total.get(keys, 0) + value
    assert dict(counters(found.model_dump())) == total
    assert total["outcomes", "click", "early"] == 0
    assert total["undecided", "click", "window still open"] == 33
    assert found.absent_days == {"click": ["2026-03-02", "2026-03-04..2026-03-05"]}
    assert open_dataset(tmp_path, f"{days[1]}..{days[2]}").manifest.complete_until == {"click": 1_000_000 - 3}
    assert sum(letters.rows for letters in found.dead_letter_files) == 15
    assert all((tmp_path / part.path).is_file() for part in [*found.dead_letter_files, *found.shards])


def counters(tree: dict[str, Any]) -> list[tuple[tuple[str, ...], int]]:
    """The numbers of nested dictionaries with the keys that lead to them; versions, times and lines are no counters."""
    found = []
    for key in tree.keys() - {"version", "complete_until", "dead_letter_examples"}:
        value = tree[key]
        parts = counters(value) if isinstance(value, dict) else [((), value)] if isinstance(value, int | float) else []
        found += [((key, *keys), number) for keys, number in parts]
    return found


def test_a_folder_of_days_opened_without_them_says_which_there_are(root, tmp_path):
    with pytest.raises(UserError) as caught:
        open_dataset(root)
    for words in ("days=2026-11-01..2026-11-03", f"{root}/2026-11-01."):
        assert words in str(caught.value)
    for name in ("2026-02-28", "2026-03-01", "2026-03-03", "20260304", "latest", "2026-03-03.card"):
        write_day(tmp_path, 0, name, 1)
    (tmp_path / "2026-03-02").mkdir()
    assert day_ranges(tmp_path) == ["2026-02-28..2026-03-01", "2026-03-03"]
    assert day_ranges(tmp_path / "nowhere") == []


# A run that is trained on days

NAMED = {**CONTENT, "categorical": {"c": {"hash": 5, "dim": 4}}}
BOTH = "2026-11-01..2026-11-02"
TRAIN, TEST = 60, 25  # rows of each day


def config(root: Path, run: Path, days: str = BOTH) -> TrainConfig:
    settings = Settings(batch_size=16, lanes=2, window=16, epochs=2, checkpoint_every=5, threads=1, tables={"lr": 0.1})
    model = ModelConfig(fusion={"name": "shared_bottom", "widths": [8]}, tower=[4])
    return TrainConfig(dataset=root, days=days, run=run, model=model, train=settings)


@pytest.fixture(scope="module")
def learnt(tmp_path_factory) -> Path:
    """Three days and a run on the first two of them: 16 steps, checkpoints at 5, 10, 15 and 16."""
    folder, schema = tmp_path_factory.mktemp("learnt"), Schema.parse(NAMED, "named.yaml")
    for number, day in enumerate(ROWS):
        rng = np.random.default_rng(number)
        content = [
            {"x": x, "c": int(rng.integers(1, 6)), "label.click": float(rng.random() < 0.4), "weight": 1.0,
             "event_time": 0, "row_id": row} for row, x in enumerate(rng.normal(size=TRAIN + TEST))
        ]  # fmt: skip
        rows = pa.Table.from_pylist(content, arrow_schema(schema))
        encoders = Encoders(schema, {}, {"x": Moments(2, 0.0, 2.0)}, {})
        write_dataset(folder / day, schema, {"train": rows[:TRAIN], "test": rows[TRAIN:]}, 8, 30, encoders)
    train(config(folder, folder / "run"))
    return folder


def predicted(run: Path, step: int = 16) -> pl.DataFrame:
    return pl.read_parquet(predictions.path(Run(run), "test", step))


def evaluated(run: Path, **settings: Any) -> list[dict[str, Any]]:
    return list(evaluate(EvaluateConfig(run=run, threads=1, predictions=True, **{"step": 16, **settings})))


def normalized_entropy(rows: pl.DataFrame) -> float:
    """Weighted log loss of the clicks over the entropy of their base rate."""
    seen = rows.drop_nulls("label.click")
    y, w = seen["label.click"].to_numpy(), seen["weight"].to_numpy()
    p = 1 / (1 + np.exp(-seen["logit.click"].to_numpy().astype(np.float64)))
    rate = np.full(len(y), np.average(y, weights=w))
    loss, entropy = (-np.average(y * np.log(q) + (1 - y) * np.log(1 - q), weights=w) for q in (p, rate))
    return loss / entropy


def labels(root: Path, number: int) -> pl.DataFrame:
    """The test rows of a day as its files hold them, with the row ids that it has as one of several."""
    files = sorted((root / list(ROWS)[number] / "test").iterdir())
    rows = pl.concat(pl.read_parquet(file) for file in files).select("row_id", "label.click")
    return rows.with_columns(pl.col("row_id") + number * 2**56)


def test_a_run_is_evaluated_on_its_own_days_and_every_row_is_accounted_for(learnt, tmp_path):
    run = shutil.copytree(learnt / "run", tmp_path / "run")
    [record] = evaluated(run)
    found, wanted = predicted(run), pl.concat([labels(learnt, 0), labels(learnt, 1)])
    assert found.select("row_id", "label.click").rows() == wanted.sort("row_id").rows()
    assert record["metrics"]["click"]["ne"] == pytest.approx(normalized_entropy(found), rel=1e-5)
    assert [r["step"] for r in evaluated(run, step="all")] == [5, 10, 15]


def test_other_days_are_other_records_and_a_day_is_the_same_however_it_is_named(learnt, tmp_path):
    run = shutil.copytree(learnt / "run", tmp_path / "run")
    rows = {}
    for days in (BOTH, "2026-11-01", "2026-11-02", "2026-11-03"):
        [record] = evaluated(run, **({} if days == BOTH else {"days": days}))
        assert record["dataset"] == f"{learnt}/{days}"
        assert records.latest(Run(run), "test", record["dataset"]) == {16: record}
        rows[days] = predicted(run)["logit.click"].to_list()
    assert rows[BOTH] == pytest.approx(rows["2026-11-01"] + rows["2026-11-02"], abs=1e-6)
    assert evaluated(run, dataset=learnt / "2026-11-03") == evaluated(run, dataset=learnt, days="2026-11-03") == []


def test_another_dataset_does_not_take_over_that_days_could_be_missing(learnt, tmp_path):
    run = shutil.copytree(learnt / "run", tmp_path / "run")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(settings | {"missing_days": "skip"}))
    [record] = evaluated(run, dataset=learnt / "2026-11-03")
    assert record["dataset"] == f"{learnt}/2026-11-03"
    [record] = evaluated(run)
    assert record["dataset"] == f"{learnt}/{BOTH}"
    with pytest.raises(UserError, match="missing_days=skip: no days are named"):
        evaluated(run, dataset=learnt / "2026-11-02", missing_days="skip")


def test_the_truth_is_looked_up_for_the_rows_of_every_day(learnt, tmp_path):
    run = shutil.copytree(learnt / "run", tmp_path / "run")
    known = pl.concat([labels(learnt, 0), labels(learnt, 1)]).sample(fraction=1, shuffle=True, seed=0)
    p = (known["label.click"] * 0.6 + 0.2).alias("p")  # right with odds of 4 : 1 in every row
    known.select("row_id", p).write_parquet(tmp_path / "truth.parquet")
    evaluated(run, truth=Truth(file=tmp_path / "truth.parquet", key="row_id", columns={"click": "p"}))
    rate = known["label.click"].to_numpy().mean()
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    best = oracle.read(Run(run), "test", str(learnt / BOTH), {"click": "binary"})
    assert best is not None
    assert best["click"]["ne"] == pytest.approx(-np.log(0.8) / entropy, rel=1e-6)


def test_a_run_on_days_that_stopped_goes_on_to_the_same_weights(learnt, tmp_path):
    run = shutil.copytree(learnt / "run", tmp_path / "run")
    evaluated(run)
    whole = predicted(run)
    for step in (10, 15, 16):  # of the 8 steps of an epoch the first four read the first day: 5 is within the second
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    train(config(learnt, run))
    shutil.rmtree(run / "predictions")
    evaluated(run)
    assert predicted(run).equals(whole)
    with pytest.raises(UserError, match="this job has"):
        train(config(learnt, run, "2026-11-01..2026-11-03"))


def test_nightly_judges_a_run_on_days_by_a_log_encoded_as_they_were(small_dataset, small_log, tmp_path):
    for day in BOTH.split(".."):
        shutil.copytree(small_dataset, tmp_path / "days" / day)
    train(config(tmp_path / "days", tmp_path / "run"))
    given = {"input": str(small_log), "out": tmp_path / "night", "date": "d", "data_gates": {"action": "warn"}}
    candidate, frames = nightly(NightlyConfig(run=tmp_path / "run", **given)).night.scored("candidate"), []
    for split in ("train", "valid", "test"):  # of the same log, read and encoded once before
        evaluated(tmp_path / "run", split=split, step="newest", dataset=small_dataset)
        frames.append(pl.read_parquet(predictions.path(Run(tmp_path / "run"), split, candidate.model.step)))
    assert Dataset(Path(candidate.day)).encoders_id == Dataset(small_dataset).encoders_id
    assert candidate.figures["click"].value == pytest.approx(normalized_entropy(pl.concat(frames)), rel=1e-5)
