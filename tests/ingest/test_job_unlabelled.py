"""labels=none: files to be scored give the features, and nothing else is read; and how a day is written."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from ingest_runs import content_of, refused, rows_by_id, rows_of, run
from pydantic import ValidationError

from features.schema.splits import TimeSplit
from pipeline.dataset.dataset import Dataset
from pipeline.ingest.config import PreprocessConfig

pytestmark = pytest.mark.usefixtures("steps_alone")
OTHERS = ("qty",)  # read by a label and by the weight alone


@pytest.fixture
def to_score(small_log: Path, tmp_path: Path) -> Path:
    """The small log as it is before anything happened: no clicks, and no column that only labels and weights read."""
    folder = tmp_path / "asked"
    folder.mkdir()
    for path in (small_log / "impressions-1.csv", small_log / "impressions-3.csv"):
        with path.open(newline="", encoding="utf-8") as file:
            rows = [{k: v for k, v in row.items() if k not in OTHERS} for row in csv.DictReader(file)]
        with (folder / path.name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return folder


def test_the_features_are_those_of_the_labelled_rows_and_no_label_is_observed(
    to_score: Path, small_log: Path, small_dataset: Path, small_content: Callable[[], dict[str, Any]], tmp_path: Path
) -> None:
    content = small_content()
    content["source"]["derived"] = {"bulk": "qty * 2", "initial": 'SUBSTR("user", 1, 2)'}
    content["tasks"]["bought"]["label"] = "bulk > 2"
    content["categorical"]["initial"] = {"dim": 4}
    run(small_log, tmp_path / "first", content)
    reference = {"from": tmp_path / "first"}
    manifest = run(to_score, tmp_path / "out", content, encoders=reference, labels="none")
    assert manifest.fingerprint == Dataset(tmp_path / "first").manifest.fingerprint
    assert Dataset(tmp_path / "out").manifest == manifest
    assert manifest.read == {"impressions": 600}
    assert manifest.outcomes == {}
    assert all(count == 0 for counts in manifest.observed.values() for count in counts.values())
    labelled = {row["row_id"]: row for row in rows_by_id(tmp_path / "first")}
    found = rows_by_id(tmp_path / "out")
    assert len(found) == 600
    for row in found:
        same = labelled[row["row_id"]]
        blank = {name: None for name in same if name.startswith("label.")} | {"weight": 1.0}
        assert row == same | blank
    assert content_of(tmp_path / "out" / "encoders") == content_of(tmp_path / "first" / "encoders")
    assert (tmp_path / "out" / "schema.yaml").read_bytes() == (tmp_path / "first" / "schema.yaml").read_bytes()


def test_files_to_be_scored_need_encoders_and_files_to_be_learnt_from_their_outcomes(
    to_score: Path, small_dataset: Path, small_content: Callable[[], dict[str, Any]], tmp_path: Path
) -> None:
    message = refused(to_score, tmp_path / "out", small_content(), labels="none")
    assert message == (
        "labels=none: rows without labels train nothing. Set encoders.from=DATASET, whose encoders are used."
    )
    message = refused(to_score, tmp_path / "out", small_content(), encoders={"from": small_dataset})
    assert "clicks-*.csv: no such file" in message


def test_a_history_of_outcomes_is_that_of_the_state_and_refused_without_one(
    to_score: Path, small_log: Path, small_content: Callable[[], dict[str, Any]], tmp_path: Path
) -> None:
    content = small_content()
    content["bag"] |= {"clicked": {"table": "item", "history": {"user": "user", "item": "item", "when": "click"}}}
    content["source"]["outcomes"]["click"] |= {"time": "dwell", "columns": {}}
    content["tasks"] = {"click": content["tasks"]["click"]}
    content["source"]["times"]["dwell"] = "index"
    run(small_log, tmp_path / "first", content, min_joined=0)
    settings: dict[str, Any] = {"encoders": {"from": tmp_path / "first"}, "labels": "none"}
    message = refused(to_score, tmp_path / "out", content, **settings, state={"from": "empty"})
    assert message.startswith(
        "labels=none: clicked is made of click of earlier rows, an outcome or label, and these are not there."
    )
    for path in to_score.iterdir():
        later = pl.read_csv(path, infer_schema=False).with_columns(pl.col("at").cast(pl.Int64) + 10 * 86_400)
        later.write_csv(path)
    assert run(to_score, tmp_path / "scored", content, **settings).state is None
    assert any(row["clicked"] for row in rows_by_id(tmp_path / "scored"))
    content["bag"]["clicked"]["history"] = {"user": "user", "item": "item", "when": "city IS NOT NULL"}
    shutil.rmtree(tmp_path / "first")
    run(small_log, tmp_path / "first", content, min_joined=0)
    run(to_score, tmp_path / "out", content, **settings)
    assert any(row["clicked"] for row in rows_by_id(tmp_path / "out"))


def test_counters_of_outcomes_are_those_of_the_state_smoothed_towards_the_mean_of_the_encoders(
    to_score: Path, small_log: Path, small_content: Callable[[], dict[str, Any]], tmp_path: Path
) -> None:
    content = small_content()
    content["source"]["counters"] = {"ctr": {"by": "user", "of": "click", "take": "mean", "smoothing": 4}}
    content["dense"]["ctr"] = {"standardize": False}
    content["source"]["outcomes"]["click"] |= {"time": "dwell", "columns": {}, "window": "2d"}
    content["tasks"] = {"click": content["tasks"]["click"]}
    content["source"]["times"]["dwell"] = "index"
    run(small_log, tmp_path / "first", content, min_joined=0)
    encoders = tmp_path / "first" / "encoders" / "encoders.json"
    mean = json.loads(encoders.read_text())["counter_means"]["ctr"]
    for path in to_score.iterdir():
        later = pl.read_csv(path, infer_schema=False).with_columns(pl.col("at").cast(pl.Int64) + 10 * 86_400)
        later.write_csv(path)
    run(to_score, tmp_path / "scored", content, encoders={"from": tmp_path / "first"}, labels="none")
    state = pl.read_parquet(tmp_path / "first" / "state" / "ctr.parquet")
    sums = {key: (value, weight) for key, value, weight in state.group_by("key").sum()["key", "value", "weight"].rows()}
    users: dict[int, str] = {}
    for path in to_score.iterdir():
        with path.open(newline="", encoding="utf-8") as file:
            users |= {int(row["id"]): row["user"] for row in csv.DictReader(file)}
    for row in rows_by_id(tmp_path / "scored"):
        clicks, rows = sums.get(users[row["row_id"]], (0.0, 0.0))
        assert row["ctr"] == pytest.approx((clicks + 4 * mean) / (rows + 4), rel=1e-5)


def ratings_content() -> dict[str, Any]:
    return {
        "source": {
            "files": "log.csv", "row_id": "id", "types": {"rating": "int", "cost": "int"},
            "derived": {"doubled": "rating * 2", "spent": "cost + 1"},
            "counters": {
                "mean": {"by": "user", "take": "mean", "of": "rating"},
                "doubles": {"by": "user", "take": "sum", "of": "doubled"},
                "spending": {"by": "user", "take": "sum", "of": "spent"},
            },
        },
        "dense": {name: {"standardize": False} for name in ("mean", "doubles", "spending")},
        "tasks": {"liked": {"kind": "binary", "label": "rating >= 4"}},
        "event_time": "at",
        "split": {"by": "row_index", "modulo": 1, "train": [0]},
    }  # fmt: skip


def test_counters_of_a_column_of_labels_are_those_of_the_state_and_others_go_on(tmp_path: Path) -> None:
    ratings = {"a": [1, 4, 5], "b": [2]}
    lines = [(user, rating) for user, found in ratings.items() for rating in found]
    begin = 1_700_000_000
    text = "".join(f"{i},{begin + i},{user},{rating},{i}\n" for i, (user, rating) in enumerate(lines))
    (tmp_path / "log.csv").write_text(f"id,at,user,rating,cost\n{text}")
    run(tmp_path, tmp_path / "first", ratings_content())
    (tmp_path / "log.csv").write_text("".join(
        ["id,at,user,cost\n", *(f"{i},{begin + 100 + i},{user},10\n" for i, user in enumerate("aba"))]
    ))  # fmt: skip
    settings: dict[str, Any] = {"encoders": {"from": tmp_path / "first"}, "labels": "none"}
    run(tmp_path, tmp_path / "scored", ratings_content(), **settings)
    found = rows_by_id(tmp_path / "scored")
    for row, user in zip(found, "aba", strict=True):
        assert row["mean"] == pytest.approx(sum(ratings[user]) / len(ratings[user]))
        assert row["doubles"] == 2 * sum(ratings[user])
    # Rows 0 to 2 of the first log are a's, row 3 is b's; of the second log a's third row has seen a's first one.
    assert [row["spending"] for row in found] == [1 + 2 + 3, 4, 1 + 2 + 3 + 11]
    message = refused(tmp_path, tmp_path / "out", ratings_content(), **settings, state={"from": "empty"})
    assert message.startswith(
        "labels=none: mean is made of rating of earlier rows, an outcome or label, and these are not"
    )


def test_a_counter_of_a_derived_column_of_outcomes_is_that_of_the_state(tmp_path: Path) -> None:
    content = ratings_content()
    click = {"files": "clicks.csv", "key": "id", "time": "then", "window": "60s", "columns": {"dwell": "float"}}
    content["source"] |= {
        "key": "id", "types": {}, "outcomes": {"click": click}, "derived": {"longer": "click_dwell + 1"},
        "counters": {"mean": {"by": "user", "take": "sum", "of": "longer"}},
    }  # fmt: skip
    content |= {"dense": {"mean": {"standardize": False}}, "tasks": {"click": {"kind": "binary", "label": "click"}}}
    begin = 1_700_000_000
    log = [f"{i},{begin + i},u\n" for i in range(4)]
    (tmp_path / "log.csv").write_text("".join(["id,at,user\n", *log, f"4,{begin + 500},v\n"]))
    (tmp_path / "clicks.csv").write_text(f"id,then,dwell\n0,{begin + 5},2\n3,{begin + 6},7\n")
    run(tmp_path, tmp_path / "first", content, as_of="2024-01-01")
    (tmp_path / "clicks.csv").unlink()
    (tmp_path / "log.csv").write_text(f"id,at,user\n9,{begin + 1000},u\n")
    run(tmp_path, tmp_path / "scored", content, encoders={"from": tmp_path / "first"}, labels="none")
    assert [row["mean"] for row in rows_by_id(tmp_path / "scored")] == [2 + 1 + 7 + 1]


def test_the_split_is_by_a_derived_key_as_it_was(
    to_score: Path, small_log: Path, small_content, tmp_path: Path
) -> None:
    content = small_content()
    content["source"]["derived"] = {"who": "CONCAT('#', \"user\")"}
    content["split"] = {"by": "hash", "key": "who", "valid": 0.2, "test": 0.3}
    run(small_log, tmp_path / "first", content)
    run(to_score, tmp_path / "out", content, encoders={"from": tmp_path / "first"}, labels="none")
    for split in ("train", "valid", "test"):
        before, after = ({*rows_of(tmp_path / name, split)["row_id"].to_pylist()} for name in ("first", "out"))
        assert after
        assert after <= before


@pytest.mark.parametrize("written", [20261107, 19900101, 21001231, 20261107.0])
def test_a_time_written_as_digits_of_a_day_is_refused(written: float) -> None:
    with pytest.raises(ValidationError, match=r"is no time: write it as 2026-11-07 or 2026-11-07T12:00:00Z"):
        PreprocessConfig(input="log", out=Path("out"), as_of=written)  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match=r"is no time: write it as 2026-11-07"):
        TimeSplit(by="time", valid_from=written, test_from="2026-11-08")  # type: ignore[arg-type]
    assert TimeSplit(by="time", valid_from=100, test_from=200).test_from.timestamp() == 200  # type: ignore[arg-type]


@pytest.mark.parametrize("written", [20261107, "20261107", "2026/11/07", "2026-11-07T00:00", "1794009600", "today"])
def test_a_day_that_is_written_otherwise_is_refused_with_the_form_that_is_wanted(written: str | int) -> None:
    with pytest.raises(ValidationError, match=r"is no date as YYYY-MM-DD: write 2026-11-07"):
        PreprocessConfig(input="log", out=Path("out"), date=written)  # type: ignore[arg-type]
    assert str(PreprocessConfig(input="log", out=Path("out"), date="2026-11-07").date) == "2026-11-07"  # type: ignore[arg-type]
