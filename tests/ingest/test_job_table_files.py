"""Files of side tables: keys of any type, snapshots by day, and what stops a job."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ingest_runs import no_beam, refused, rows_by_id, run

from pipeline.dataset.dataset import Dataset, open_dataset
from pipeline.dataset.verify import verify

pytestmark = pytest.mark.integration


@pytest.mark.parametrize(
    "kind",
    [pa.int64(), pa.uint64(), pa.float64(), pa.decimal128(25, 2), pa.string(), pa.dictionary(pa.int32(), pa.string())],
)
@pytest.mark.parametrize("broadcast_bytes", [0, 1 << 20])
def test_equal_keys_of_other_physical_types_find_their_row(
    kind: pa.DataType, broadcast_bytes: int, tmp_path: Path
) -> None:
    ids = [10_000_000_004, 5, 7]  # Arrow writes the first one of a float as 1.0000000004e+10
    (tmp_path / "log.csv").write_text("item,y\n10000000004,1\n5.0,0\n7,1\nNULL,0\n8,1\n")
    keys = pa.array([str(i) for i in ids] if pa.types.is_dictionary(kind) else ids).cast(kind)
    pq.write_table(pa.table({"item": keys, "cost": [1.0, 2.0, 3.0]}), tmp_path / "items.parquet")
    table = {"files": "items.parquet", "key": "item", "columns": {"cost": "float", "size": "int"}}
    read = {"format": "parquet", "optional": {"size": 9}}
    raw = {"standardize": False, "missing_flag": True}
    content = {
        "source": {"files": "log.csv", "types": {"y": "int"}, "tables": {"item": table | {"read": read}}},
        "dense": {"item_cost": raw, "item_size": raw},
        "tasks": {"y": {"kind": "binary", "label": "y"}},
        "split": {"by": "row_index", "modulo": 1, "train": [0]},
    }
    with no_beam():
        manifest = run(tmp_path, tmp_path / "out", content, broadcast_bytes=broadcast_bytes, bucket_bytes=30)
    rows = rows_by_id(tmp_path / "out")
    assert [row["item_cost"] for row in rows][:3] == [1, 2, 3]
    assert [row["item_cost_missing"] for row in rows] == [0, 0, 0, 1, 1]
    assert [row["item_size"] for row in rows][:3] == [9, 9, 9]  # a column that no file has
    assert manifest.absent_columns["item"] == {"size": 3}
    assert manifest.side_tables["item"].missing_key_rows == 1


def test_a_file_without_labels_is_looked_up_in_the_tables_that_features_read(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("id,item,shop,bought\n1,a,s,1\n2,b,s,0\n")
    (tmp_path / "items.csv").write_text("item,cost\nA,1\nB,2\n")
    (tmp_path / "shops.csv").write_text("shop,refunds\ns,0\n")
    raw = {"standardize": False}
    content = {
        "source": {
            "files": "log.csv", "row_id": "id", "types": {"bought": "int"}, "derived": {"upper_item": "UPPER(item)"},
            "tables": {
                "item": {"files": "items.csv", "key": "item", "by": "upper_item", "columns": {"cost": "float"}},
                "shop": {"files": "shops.csv", "key": "shop", "columns": {"refunds": "int"}},
            },
        },
        "dense": {"item_cost": raw},
        "tasks": {"kept": {"kind": "binary", "label": "bought = 1 AND shop_refunds = 0"}},
        "split": {"by": "row_index", "modulo": 1, "train": [0]},
    }  # fmt: skip
    with no_beam():
        run(tmp_path, tmp_path / "out", content)
        (tmp_path / "log.csv").write_text("id,item\n1,a\n2,b\n")
        (tmp_path / "shops.csv").unlink()
        manifest = run(tmp_path, tmp_path / "scored", content, labels="none", encoders={"from": tmp_path / "out"})
    assert [row["item_cost"] for row in rows_by_id(tmp_path / "scored")] == [1, 2]
    assert [row["label.kept"] for row in rows_by_id(tmp_path / "out")] == [1, 0]
    assert list(manifest.side_tables) == ["item"]


def test_rows_of_a_table_may_have_several_lines_where_impressions_have_one(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("item,y\na,1\nb,0\n")
    (tmp_path / "items.csv").write_text('item,about,cost\na,"two\nlines",1\nb,"and\nthree\nlines",2\n')
    table = {"files": "items.csv", "key": "item", "columns": {"cost": "float"}, "read": {"multiline": True}}
    content = {
        "source": {"files": "log.csv", "types": {"y": "int"}, "tables": {"item": table}},
        "dense": {"item_cost": {"standardize": False}},
        "tasks": {"y": {"kind": "binary", "label": "y"}},
        "split": {"by": "row_index", "modulo": 1, "train": [0]},
    }
    with no_beam():
        run(tmp_path, tmp_path / "out", content)
    assert [row["item_cost"] for row in rows_by_id(tmp_path / "out")] == [1, 2]
    said = "; ".join(verify(Dataset(tmp_path / "out")))
    assert "6 of item = 1 header + 0 blank + 5 of rows + 0 of dead letters" in said


# Days


def day_log(folder: Path) -> dict[str, Any]:
    """Impressions of three days and snapshots of prices of two: b has no row in the second one."""
    for day in (1, 2, 3):
        (folder / f"log-2024-07-0{day}.csv").write_text(f"at,item\n2024-07-0{day} 09:00,a\n2024-07-0{day} 09:00,b\n")
    (folder / "prices-2024-07-01.csv").write_text("item,price\na,1\nb,1\n")
    (folder / "prices-2024-07-03.csv").write_text("item,price\na,3\n")
    price = {"files": "prices-{date}.csv", "key": "item", "columns": {"price": "float"}}
    return {
        "source": {"files": "log-{date}.csv", "tables": {"now": price}},
        "dense": {"now_price": {"standardize": False, "missing_flag": True}},
        "tasks": {"a": {"kind": "binary", "label": "1"}},
        "event_time": "at",
        "split": {"by": "time", "valid_from": "2025-01-01", "test_from": "2025-01-01"},
    }  # fmt: skip


def prices(out: Path) -> list[float | None]:
    return [None if row["now_price_missing"] else row["now_price"] for row in rows_by_id(out)]


@pytest.mark.parametrize("broadcast_bytes", [0, 1 << 20])
def test_a_day_sees_the_newest_snapshot_up_to_it_by_itself_as_within_all_days(
    broadcast_bytes: int, tmp_path: Path
) -> None:
    content, settings_ = day_log(tmp_path), {"broadcast_bytes": broadcast_bytes, "bucket_bytes": 50}
    content["split"] = {"by": "time", "valid_from": "2024-07-04", "test_from": "2024-07-04"}
    with no_beam():
        for day, expected in {"2024-07-01": [1, 1], "2024-07-02": [1, 1], "2024-07-03": [3, None]}.items():
            run(tmp_path, tmp_path / "days", content, date=day, **settings_)
            assert prices(tmp_path / "days" / day) == expected
        content["split"] = {"by": "hash", "key": "item", "valid": 0, "test": 0}
        manifest = run(tmp_path, tmp_path / "whole", content, **settings_)
    assert prices(tmp_path / "whole") == [1, 1, 1, 1, 3, None]
    assert manifest.side_tables["now"].model_dump() == {
        "rows": 3, "keys": 2, "duplicates": 0, "matched_rows": 5, "unmatched_rows": 1, "early_rows": 0,
        "missing_key_rows": 0, "unmatched_keys": 1,
    }  # fmt: skip


def test_a_snapshot_begins_at_midnight_where_the_log_was_written(tmp_path: Path) -> None:
    content = day_log(tmp_path)
    content["source"]["timezone"] = "Asia/Tokyo"
    content["split"] = {"by": "hash", "key": "item", "valid": 0, "test": 0}
    (tmp_path / "log-2024-07-04.csv").write_text(
        "at,item\n2024-07-02 14:59:59Z,a\n2024-07-02 15:00:00Z,a\n2024-06-30,a\n"
    )
    with no_beam():
        manifest = run(tmp_path, tmp_path / "out", content)
    assert prices(tmp_path / "out")[-3:] == [1, 3, None]
    assert manifest.side_tables["now"].early_rows == 1


def test_days_read_as_one_add_up(tmp_path: Path) -> None:
    content = day_log(tmp_path)
    content["split"] = {"by": "time", "valid_from": "2024-07-04", "test_from": "2024-07-04"}
    with no_beam():
        for day in ("2024-07-02", "2024-07-03"):
            run(tmp_path, tmp_path / "days", content, date=day)
    counts = open_dataset(tmp_path / "days", "2024-07-02..2024-07-03").manifest.side_tables["now"]
    assert (counts.rows, counts.keys, counts.matched_rows, counts.unmatched_rows) == (3, 2, 3, 1)


# What stops a job


def test_faults_stop_the_job_in_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    folder.mkdir()
    content = day_log(folder)

    def fault(table: dict[str, Any] | None = None, **settings_: Any) -> str:
        source = content["source"] | {"tables": {"now": content["source"]["tables"]["now"] | (table or {})}}
        with no_beam():
            return refused(folder, tmp_path / "out", content | {"source": source}, **settings_)

    (folder / "log-2024-06-30.csv").write_text("at,item\n2024-06-30,a\n")
    assert "the first snapshot of side table now is of 2024-07-01, which is later" in fault(date="2024-06-30")
    assert "prices-x.csv: no such file" in fault({"files": "prices-x.csv"})
    assert "prices-2024-07-01.csv: column sku is missing, the file has item, price" in fault(
        {"key": "sku", "by": "item"}
    )
    assert fault({"read": {"format": "xml"}}).startswith("source.tables.now.read.format: 'xml' is not a raw format")
    (folder / "prices-latest.csv").write_text("item,price\n")
    assert "prices-latest.csv: no day such as 2026-11-21 stands in place of {date} of prices-{date}.csv" in fault()
    (folder / "prices-latest.csv").unlink()
    (folder / "prices-2024-07-03.csv").write_text("item,price\na,cheap\n,2\n")
    assert "2 of 4 rows of now are bad" in fault()
    (folder / "log-2024-07-01.csv").write_text("at,item,now_price\n2024-07-01,a,1\n")
    assert "column now_price is also what the schema adds" in fault()


def test_snapshots_without_event_time_need_a_date(tmp_path: Path) -> None:
    content = day_log(tmp_path)
    content["split"] = {"by": "hash", "key": "item", "valid": 0, "test": 0}
    del content["event_time"]
    with no_beam():
        message = refused(tmp_path, tmp_path / "out", content)
        assert message.startswith(
            "source.tables.now: its files have {date}, of which an impression sees those of its time"
        )
        run(tmp_path, tmp_path / "days", content, date="2024-07-03")
    assert prices(tmp_path / "days" / "2024-07-03") == [3, None]


def test_versions_within_snapshots_need_a_date_as_a_later_file_has_rows_that_begin_before_it(tmp_path: Path) -> None:
    content = day_log(tmp_path)
    content["split"] = {"by": "hash", "key": "item", "valid": 0, "test": 0}
    (tmp_path / "prices-2024-07-01.csv").write_text("item,price,since\na,1,2024-06-01\nb,1,2024-07-02\n")
    (tmp_path / "prices-2024-07-03.csv").write_text("item,price,since\na,3,2024-06-01\n")
    content["source"]["tables"]["now"]["valid_from"] = "since"
    with no_beam():
        assert refused(tmp_path, tmp_path / "out", content) == (
            "source.tables.now: its files have {date}, each is the whole table from that day on; by valid_from its rows would "
            "reach impressions of days before. Set date=, remove valid_from, or write * in place of {date}."
        )
        for day, expected in {"2024-07-01": [1, None], "2024-07-02": [1, 1], "2024-07-03": [3, None]}.items():
            run(tmp_path, tmp_path / day, content, date=day)
            assert prices(tmp_path / day / day) == expected
