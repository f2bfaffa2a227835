"""Kept columns of the whole job: the values of the log, of every format and origin, in every order, and without labels."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ingest_runs import content_of, dead_letters_of, refused, rows_by_id, rows_of, run
from test_job_formats import FORMATS, ROWS, content_for, write_log
from test_job_side_tables import LOG, expected_rows
from test_job_side_tables import content_for as joined_content
from test_job_side_tables import write_log as write_joined_log

from features.errors import UserError
from pipeline.dataset.card.card import read_card
from pipeline.dataset.card.tables import tables
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.verify import verify
from pipeline.evaluation.relabel import RelabelConfig, relabel
from pipeline.ingest.formats import FORMATS as REGISTERED

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("steps_alone")]

KEEP = ["city", "id", "at", "price", "click", "long", "cheap"]
DERIVED = {"long": "LENGTH(city)", "cheap": "price < 10"}


def kept(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The kept columns by their own names."""
    return [{name[4:]: value for name, value in row.items() if name.startswith("raw.")} for row in rows]


def with_keep(content: dict[str, Any], keep: list[str]) -> dict[str, Any]:
    return content | {"keep": keep}


def by_hand(row: dict[str, Any]) -> dict[str, Any]:
    city, price = row["city"], row["price"]
    return {
        **{name: row[name] for name in ("city", "id", "at", "price")}, "click": int(row["click"]),
        "long": None if city is None else len(city), "cheap": None if price is None else int(price < 10),
    }  # fmt: skip


@pytest.mark.parametrize("ending", [*REGISTERED, "typed.parquet", "typed.avro"])
def test_values_of_the_log_are_kept_from_every_format(ending: str, tmp_path: Path) -> None:
    content = with_keep(content_for(**FORMATS[ending][0], derived=DERIVED), KEEP)
    run(write_log(tmp_path / "log", ending, ROWS), tmp_path / "out", content, unit_bytes=4000)
    found = rows_by_id(tmp_path / "out")
    assert kept(found) == [by_hand(row) for row in ROWS]
    assert [row["row_id"] for row in found] == [row["id"] for row in ROWS]
    columns = rows_of(tmp_path / "out", "valid").schema
    assert {name: columns.field(f"raw.{name}").type for name in KEEP} == {
        "city": pa.large_string(), "id": pa.int64(), "at": pa.int64(), "price": pa.float64(), "click": pa.int64(),
        "long": pa.int64(), "cheap": pa.int64(),
    }  # fmt: skip


@pytest.mark.parametrize("order", ["shuffled", "time", "input"])
def test_beside_kept_columns_a_dataset_is_what_it_is_without(order: str, tmp_path: Path) -> None:
    log, plain = write_log(tmp_path / "log", "csv", ROWS), content_for(derived=DERIVED)
    settings: dict[str, Any] = {"order": order, "unit_bytes": 2000, "rows_per_row_group": 16, "rows_per_shard": 60}
    run(log, tmp_path / "plain", plain, **settings)
    run(log, tmp_path / "empty", with_keep(plain, []), **settings)
    run(log, tmp_path / "kept", with_keep(plain, KEEP), **settings)
    before, empty = content_of(tmp_path / "plain"), content_of(tmp_path / "empty")
    assert empty.pop("schema.yaml") != before.pop("schema.yaml")
    assert empty == before
    for split in ("train", "valid", "test"):
        found, names = rows_of(tmp_path / "kept", split), rows_of(tmp_path / "plain", split).column_names
        assert found.select(names).equals(rows_of(tmp_path / "plain", split))
        assert found.column_names == names + [f"raw.{name}" for name in KEEP]
        of_id = {row["id"]: by_hand(row) for row in ROWS}
        assert kept(found.to_pylist()) == [of_id[row_id] for row_id in found["row_id"].to_pylist()]
    assert content_of(tmp_path / "kept" / "encoders") == content_of(tmp_path / "plain" / "encoders")
    assert Dataset(tmp_path / "kept").encoders_id == Dataset(tmp_path / "plain").encoders_id


@pytest.mark.parametrize("broadcast_bytes", [0, 1 << 20])
def test_columns_of_side_tables_counters_and_what_is_derived_of_them_are_kept(
    broadcast_bytes: int, tmp_path: Path
) -> None:
    keep = ["user", "item_brand", "user_country", "shop", "item_cost", "user_age", "odd", "brand_rows"]
    write_joined_log(tmp_path, LOG, "jsonl")
    content = joined_content("jsonl")
    content["source"]["derived"] |= {"old": "user_age > 20"}
    run(
        tmp_path, tmp_path / "out", with_keep(content, [*keep, "old"]), unit_bytes=200, bucket_bytes=300,
        broadcast_bytes=broadcast_bytes,
    )  # fmt: skip
    expected = [
        {
            **{name: row[name] for name in keep if name in row},
            "user": seen["user"],
            "odd": seen["id"] % 2,
            "old": None if row["user_age"] is None else int(row["user_age"] > 20),
        }
        for seen, row in zip(LOG.impressions, expected_rows(LOG), strict=True)
    ]
    assert kept(rows_by_id(tmp_path / "out")) == [{name: row[name] for name in [*keep, "old"]} for row in expected]


OF_LABELS = ["click", "click_count", "click_dwell", "qty", "heavy"]
OF_FILES = ["user", "at", "age", "initial"]


@pytest.fixture
def small(small_content: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    content = small_content()
    content["source"]["derived"] = {"initial": 'SUBSTR("user", 1, 2)', "heavy": "qty = 3"}
    return with_keep(content, [*OF_LABELS, *OF_FILES])


def test_what_happened_is_kept_with_labels_and_null_without(
    small: dict[str, Any], small_log: Path, tmp_path: Path
) -> None:
    run(small_log, tmp_path / "first", small)
    first = rows_by_id(tmp_path / "first")
    for row, found in zip(kept(first), first, strict=True):
        number = found["row_id"] - 1000
        assert (row["user"], row["at"], row["qty"]) == (f"u{number % 37}", found["event_time"], number % 4)
        assert (row["click"], row["heavy"]) == (int(number % 3 == 0), int(number % 4 == 3))
        assert row["click_count"] == (number % 3 == 0) + (number == 180)
        # Of two clicks the first that is read counts.
        assert row["click_dwell"] == ((number // 3 * 3) % 50 if number % 3 == 0 else None)
        assert row["age"] == (20 + number % 13 if number % 7 else None)
    (tmp_path / "asked").mkdir()
    for name in ("impressions-1.csv", "impressions-3.csv"):
        log = pl.read_csv(small_log / name, infer_schema=False, null_values=[]).drop("qty")
        log.write_csv(tmp_path / "asked" / name)
    run(tmp_path / "asked", tmp_path / "out", small, encoders={"from": tmp_path / "first"}, labels="none")
    scored = rows_by_id(tmp_path / "out")
    of_id = dict(zip([row["row_id"] for row in first], kept(first), strict=True))
    assert kept(scored) == [of_id[row["row_id"]] | dict.fromkeys(OF_LABELS) for row in scored]
    assert len(scored) == 600
    read_card(tmp_path / "out", Dataset(tmp_path / "out").schema)
    assert len(list(verify(Dataset(tmp_path / "out")))) > 5


def test_a_bad_row_shows_its_kept_columns(tmp_path: Path) -> None:
    rows = [row | {"price": "dear"} if row["id"] == 5 else row for row in ROWS]
    content = content_for()
    content["bag"], content["categorical"] = {}, {"id": {}}
    log = write_log(tmp_path / "log", "csv", rows)
    run(log, tmp_path / "out", with_keep(content, ["city"]), max_bad_fraction=0.1)
    (bad,) = dead_letters_of(tmp_path / "out")
    assert json.loads(bad["raw"])["city"] == ROWS[5]["city"]


def test_a_column_that_no_file_has_or_that_holds_lists_is_refused(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", "csv", ROWS)
    message = refused(log, tmp_path / "out", with_keep(content_for(), ["citi"]))
    assert (
        "log-0.csv: column citi is missing (did you mean city?), the file has id, at, price, city, tags, click"
        in message
    )
    log = write_log(tmp_path / "typed", "typed.parquet", ROWS)
    content = content_for(format="parquet")
    content["bag"] = {}
    message = refused(log, tmp_path / "out", with_keep(content, ["tags"]))
    assert message == "keep: column tags holds lists: keep a column of one value a row"


def test_a_kept_column_that_some_files_lack_has_its_default_there(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", "csv", ROWS)
    extra = pl.read_csv(log / "log-1.csv", infer_schema=False).with_columns(surface=pl.lit("tv"))
    extra.write_csv(log / "log-1.csv")
    run(log, tmp_path / "out", with_keep(content_for(optional={"surface": "web"}), ["surface"]))
    found = {row["row_id"]: row["raw.surface"] for row in rows_by_id(tmp_path / "out")}
    assert found == {row["id"]: "web" if row["id"] < 170 else "tv" for row in ROWS}


@pytest.fixture(scope="module")
def dataset(
    small_log: Path, small_content: Callable[[], dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("kept") / "out"
    content = with_keep(small_content(), ["user", "city", "at", "click_dwell"])
    run(small_log, out, content, rows_per_row_group=32, rows_per_shard=100)
    return out


def test_the_card_lists_kept_columns_with_what_is_missing(dataset: Path) -> None:
    card = read_card(dataset, Dataset(dataset).schema)
    rows = rows_of(dataset, "train")
    assert card["kept"] == {
        name: {"type": kind, "missing": pytest.approx(rows[name].null_count / rows.num_rows)}
        for name, kind in {
            "raw.user": "text", "raw.city": "text", "raw.at": "integer", "raw.click_dwell": "number",
        }.items()
    }  # fmt: skip
    assert rows["raw.city"].null_count > 0
    (table,) = (t for t in tables(Dataset(dataset).manifest, card) if t.title.startswith("Columns kept"))
    assert table.title == "Columns kept for slices and keys, no inputs (train)"
    assert table.lines[1] == ["raw.city", "text", "20.0%"]


@pytest.mark.parametrize(
    "edit",
    [
        lambda found: found.pop("kept"),
        lambda found: found["kept"].pop("raw.city"),
        lambda found: found["kept"].update({"raw.x": {"type": "text", "missing": 0.0}}),
        lambda found: found["kept"]["raw.city"].update(type="number"),
        lambda found: found["kept"]["raw.city"].update(type="bytes"),
        lambda found: found["kept"]["raw.city"].update(missing=2.0),
    ],
)
def test_a_card_of_other_kept_columns_is_refused(edit: Callable[[Any], object], dataset: Path, tmp_path: Path) -> None:
    found = json.loads((dataset / "statistics.json").read_text())
    edit(found)
    (tmp_path / "statistics.json").write_text(json.dumps(found))
    with pytest.raises(UserError, match=r"statistics\.json"):
        read_card(tmp_path, Dataset(dataset).schema)


def test_relabelled_datasets_have_the_kept_columns_and_verify(dataset: Path, tmp_path: Path) -> None:
    rows: pl.DataFrame = pl.from_arrow(rows_of(dataset, "train"))  # type: ignore[assignment]
    labels = [name for name in rows.columns if name.startswith("label.")]
    logits = {name.replace("label", "logit"): pl.lit(0.5, pl.Float32) for name in labels}
    scored = rows.sort("row_id").select("row_id", "weight", *labels).with_columns(**logits)
    scored.write_parquet(tmp_path / "predictions.parquet")
    relabel(RelabelConfig(dataset=dataset, predictions=tmp_path / "predictions.parquet", out=tmp_path / "soft"))
    again = rows_of(tmp_path / "soft", "train")
    assert again.schema == rows_of(dataset, "train").schema
    names = [name for name in again.column_names if name not in labels]
    assert again.select(names).equals(rows_of(dataset, "train").select(names))
    assert len(list(verify(Dataset(tmp_path / "soft")))) == len(list(verify(Dataset(dataset))))
    texts = pq.ParquetFile(tmp_path / "soft" / Dataset(dataset).shards("train")[0].path).metadata.row_group(0)
    encodings = {texts.column(i).path_in_schema: texts.column(i).encodings for i in range(texts.num_columns)}
    assert "RLE_DICTIONARY" in encodings["raw.user"]
    assert "RLE_DICTIONARY" not in encodings["user"], "ids are written without dictionaries"
