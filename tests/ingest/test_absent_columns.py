"""Optional columns: what stands in their place is what the same files would hold, and files that lack others are named."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastavro
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ingest_runs import content_of, refused, rows_by_id, run

from features.source import Format
from pipeline.dataset.card.tables import tables
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.manifest import Manifest, merge_manifests
from pipeline.ingest.absent_columns import Completion

pytestmark = pytest.mark.usefixtures("steps_alone")
START = 1_800_000_000
PER_FILE = 20
Row = dict[str, Any]


def write_csv(path: Path, rows: list[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_jsonl(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(path: Path, rows: list[Row]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_avro(path: Path, rows: list[Row]) -> None:
    kinds = {int: "long", str: "string", float: "double"}
    fields = [{"name": name, "type": kinds[type(value)]} for name, value in rows[0].items()]
    with path.open("wb") as file:
        fastavro.writer(file, {"type": "record", "name": "row", "fields": fields}, rows)


WRITERS: dict[str, Callable[[Path, list[Row]], None]] = {
    "csv": write_csv, "jsonl": write_jsonl, "parquet": write_parquet, "avro": write_avro,
}  # fmt: skip
OPTIONAL: Row = {"x": 2.5, "city": None, "tags": "p|q", "dwell": 7}


def impression(n: int) -> Row:
    return {"id": n, "at": START + n, "x": n / 2, "city": f"c{n % 3}", "tags": "p", "y": n % 2}


def click(n: int) -> Row:
    return {"id": n, "when": START + n + 1, "dwell": n}


def content_for(form: str, optional: Row | None) -> dict[str, Any]:
    columns = {"files": "clicks-*", "key": "id", "time": "when", "columns": {"dwell": "int"}}
    return {
        "source": {
            "files": "log-*", "format": form, "row_id": "id", "key": "id", "types": {"y": "int"},
            "outcomes": {"click": columns}, "optional": optional or {},
        },
        "dense": {"x": {}},
        "categorical": {"city": {}},
        "bag": {"tags": {}},
        "tasks": {"y": {"kind": "binary", "label": "y"}, "dwell": {"kind": "regression", "label": "click_dwell"}},
        "event_time": "at",
        "split": {"by": "hash", "key": "id", "valid": 0, "test": 0},
    }  # fmt: skip


def write_log(folder: Path, form: str, lacking: Callable[[Row], Row]) -> Path:
    """Two files of impressions and two of clicks, of which the second of each is as `lacking` makes it."""
    folder.mkdir()
    for number, change in enumerate((dict, lacking)):
        rows = range(number * PER_FILE, (number + 1) * PER_FILE)
        WRITERS[form](folder / f"log-{number}.{form}", [change(impression(n)) for n in rows])
        WRITERS[form](folder / f"clicks-{number}.{form}", [change(click(n)) for n in rows])
    return folder


def without(row: Row) -> Row:
    return {name: value for name, value in row.items() if name not in OPTIONAL}


def filled(row: Row) -> Row:
    """What a file would hold that has the columns; of a text that is missing the usual marker."""
    return row | {name: "" if value is None else value for name, value in OPTIONAL.items() if name in row}


@pytest.mark.parametrize("form", list(WRITERS))
def test_a_file_without_optional_columns_is_as_one_with_their_values_and_its_rows_are_counted(
    tmp_path: Path, form: str
) -> None:
    manifest = run(write_log(tmp_path / "log", form, without), tmp_path / "out", content_for(form, OPTIONAL))
    run(write_log(tmp_path / "full", form, filled), tmp_path / "whole", content_for(form, {"city": None}))
    assert rows_by_id(tmp_path / "out") == rows_by_id(tmp_path / "whole")
    assert content_of(tmp_path / "out" / "encoders") == content_of(tmp_path / "whole" / "encoders")
    absent = dict.fromkeys(("x", "city", "tags"), PER_FILE)
    assert manifest.absent_columns == {"impressions": absent, "click": {"dwell": PER_FILE}}
    assert manifest.lines.keys() == ({"impressions", "click"} if form in ("csv", "jsonl") else set())
    assert Dataset(tmp_path / "out").manifest == manifest
    [table] = [
        t for t in tables(manifest, json.loads((tmp_path / "out" / "statistics.json").read_text())) if "lack" in t.title
    ]
    assert ["dwell", "click", str(PER_FILE), "50.0%"] in table.lines
    assert len(table.lines) == 4


def test_columns_that_a_file_lacks_are_counted_in_the_order_of_the_schema() -> None:
    names = [f"c{number}" for number in range(9)]
    completion = Completion(dict.fromkeys(names, "string"), ["id"], Format(optional=dict.fromkeys(names)), {})
    for _ in range(2):  # blocks of one unit
        completion.complete(pa.table({"id": ["a", "b", "c"]}))
    assert [*completion.absent.items()] == [(name, 6) for name in names]


def test_optional_columns_that_all_files_have_change_nothing(tmp_path: Path) -> None:
    folder = write_log(tmp_path / "log", "csv", dict)
    manifest = run(folder, tmp_path / "out", content_for("csv", OPTIONAL))
    run(folder, tmp_path / "plain", content_for("csv", None))
    assert rows_by_id(tmp_path / "out") == rows_by_id(tmp_path / "plain")
    assert manifest.absent_columns == {}


def test_a_null_of_json_counts_as_absent(tmp_path: Path) -> None:
    rows = [impression(n) | ({"x": None, "tags": None} if n % 4 == 0 else {"tags": ["a", "b"]}) for n in range(40)]
    (tmp_path / "log").mkdir()
    write_jsonl(tmp_path / "log" / "log-0.jsonl", rows)
    write_jsonl(tmp_path / "log" / "clicks-0.jsonl", [click(0)])
    manifest = run(tmp_path / "log", tmp_path / "out", content_for("jsonl", OPTIONAL))
    assert manifest.absent_columns == {"impressions": {"x": 10, "tags": 10}}
    assert {len(row["tags"]) for row in rows_by_id(tmp_path / "out")} == {2}


@pytest.mark.parametrize("form", ["csv", "parquet", "avro"])
def test_a_column_that_one_file_lacks_is_a_fault_of_that_file(tmp_path: Path, form: str) -> None:
    folder = write_log(tmp_path / "log", form, without)
    message = refused(folder, tmp_path / "out", content_for(form, {c: None for c in OPTIONAL if c != "dwell"}))
    assert message == (
        f"{folder}/clicks-1.{form} lacks column dwell (found: id, when), which the other file of the stream has: fix or "
        "remove the file, or list dwell in source.optional with its default"
    )
    for number in (2, 3):
        WRITERS[form](folder / f"clicks-{number}.{form}", [without(click(number))])
    content = content_for(form, {c: None for c in OPTIONAL if c != "dwell"})
    content["source"]["outcomes"]["click"]["read"] = {"format": form}
    message = refused(folder, tmp_path / "out", content)
    assert message.startswith(
        f"{folder}/clicks-1.{form} and 2 more lack column dwell (found: id, when), which the other file of"
    )
    assert message.endswith("list dwell in source.outcomes.click.read.optional with its default")


def test_a_column_that_all_files_lack_is_a_fault_of_the_schema(tmp_path: Path) -> None:
    folder = write_log(tmp_path / "log", "csv", dict)
    content = content_for("csv", None) | {"dense": {"pirce": {}}}
    message = refused(folder, tmp_path / "out", content)
    assert message.startswith(f"{folder}/log-0.csv: column pirce is missing, the file has id, at, ")


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_a_file_that_has_nothing_but_other_columns_is_refused_though_all_are_optional(
    tmp_path: Path, form: str
) -> None:
    WRITERS[form](tmp_path / f"log-0.{form}", [{"x": 1.5, "y": 1}])
    WRITERS[form](tmp_path / f"log-1.{form}", [{"z": 1.5}])
    content = {
        "source": {"files": "log-*", "format": form, "types": {"y": "int"}, "optional": {"x": None, "y": None}},
        "dense": {"x": {}},
        "tasks": {"y": {"kind": "binary", "label": "y"}},
        "split": {"by": "row_index", "modulo": 1, "train": [0]},
    }
    message = refused(tmp_path, tmp_path / "out", content)
    assert message == f"{tmp_path}/log-1.{form}: has none of the columns x, y: remove it, or fix the schema"
    (tmp_path / f"log-1.{form}").unlink()
    assert run(tmp_path, tmp_path / "out", content).rows["train"] == 1


@pytest.mark.parametrize(("section", "column"), [("dense", "pirce"), ("click", "dwel")])
def test_a_key_that_no_row_of_json_has_is_refused_unless_it_is_optional(
    tmp_path: Path, section: str, column: str
) -> None:
    folder = write_log(tmp_path / "log", "jsonl", dict)
    content = content_for("jsonl", None)
    if section == "dense":
        content["dense"] = {column: {"missing_flag": True}}
    else:
        content["source"]["outcomes"]["click"]["columns"] = {column: "int"}
        content["tasks"] = {"y": content["tasks"]["y"]}
    stream, files = ("impressions", "log-*") if section == "dense" else ("click", "clicks-*")
    assert refused(folder, tmp_path / "out", content) == (
        f"{files}: no row of {stream} has a value under the key {column}, which the schema reads. Fix the name in the "
        f"schema, or list {column} in source.optional with its default."
    )
    content["source"]["optional"] = {column: 3}
    manifest = run(folder, tmp_path / "out", content)
    assert manifest.absent_columns == {stream: {column: 2 * PER_FILE}}


def test_days_that_are_read_as_one_add_up_and_a_count_beyond_the_rows_is_damage(tmp_path: Path) -> None:
    manifest = run(write_log(tmp_path / "log", "csv", without), tmp_path / "out", content_for("csv", OPTIONAL))
    plain = manifest.model_copy(update={"absent_columns": {}})
    days: dict[str, Manifest] = {"2026-11-01": plain, "2026-11-02": manifest, "2026-11-03": manifest}
    assert merge_manifests(days).absent_columns["click"] == {"dwell": 2 * PER_FILE}
    file = tmp_path / "out" / "manifest.json"
    content = json.loads(file.read_text())
    content["absent_columns"]["click"]["dwell"] = 41
    file.write_text(json.dumps(content))
    with pytest.raises(Exception, match=r"41 rows of click lack a column, more than were read"):
        Dataset(tmp_path / "out")


def test_nulls_of_json_are_counted_in_every_block():
    completion = Completion({"a": "string"}, None, Format(optional={"a": None}), {})
    for values in (["x", None], [None, None, "y"]):
        completion.complete(pa.table({"a": pa.array(values, pa.string())}))
    assert completion.absent == {"a": 3}


def test_a_key_that_stood_in_any_block_of_a_file_is_there():
    completion = Completion({"a": "string", "b": "string", "c": "string"}, None, Format(), {})
    for present in ("a", "b"):
        completion.complete(pa.table({c: pa.array(["x" if c == present else None], pa.string()) for c in "abc"}))
    assert completion.keys == ["a", "b"]
