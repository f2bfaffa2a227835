"""Ids, keys and splits of the whole job do not depend on the physical types that hold them, nor on the format of a file."""

import io
import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import fastavro
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from examples import examples
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ingest_runs import dead_letters_of, refused, rows_by_id, run, values_of

from pipeline.dataset.card.card import read_card
from pipeline.dataset.card.summary import summary
from pipeline.dataset.card.tables import tables
from pipeline.dataset.dataset import Dataset

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("steps_alone")]

Cells = list[int | None]
BASE = 1_719_800_000


def text(value: int | None, ending: str = "") -> str:
    return "" if value is None else f"{value}{ending}"


# A column of whole numbers as an Arrow array, by the physical type that holds it.
PARQUET: dict[str, Callable[[Cells], pa.Array]] = {
    "int64": lambda cells: pa.array(cells, pa.int64()),
    "uint64": lambda cells: pa.array(cells, pa.uint64()),
    "double": lambda cells: pa.array(cells, pa.float64()),
    "decimal": lambda cells: pa.array([c if c is None else Decimal(c) for c in cells], pa.decimal128(30, 2)),
    "dictionary": lambda cells: pa.array(cells, pa.int64()).dictionary_encode(),
    "words": lambda cells: pa.array([c if c is None else str(c) for c in cells]).dictionary_encode(),
    "text": lambda cells: pa.array([c if c is None else f"{c}.0" for c in cells], pa.large_string()),
}
AVRO = {"long": "long", "double": "double", "string": "string"}
KINDS = [("parquet", kind) for kind in PARQUET] + [("avro", kind) for kind in AVRO]
KINDS += [("csv", ""), ("csv", ".0"), ("csv", ".000"), ("jsonl", "int"), ("jsonl", "float"), ("jsonl", "text")]


def write(folder: Path, name: str, kind: tuple[str, str], times: list[int], columns: dict[str, Cells]) -> None:
    """A file of a column `at` and others of whole numbers, which are held as `kind` says."""
    form, way = kind
    names, path = ["at", *columns], folder / f"{name}.{form}"
    rows = [dict(zip(names, cells, strict=True)) for cells in zip(times, *columns.values(), strict=True)]
    if form == "parquet":
        pq.write_table(pa.table({"at": times} | {c: PARQUET[way](cells) for c, cells in columns.items()}), path)
    elif form == "csv":
        lines = [",".join(text(row[c], way if c != "at" else "") for c in names) for row in rows]
        path.write_text("\n".join([",".join(names), *lines]) + "\n")
    elif form == "jsonl":
        held = {"int": lambda x: x, "float": float, "text": lambda x: f"{x}.0"}[way]
        shown = [{c: v if v is None or c == "at" else held(v) for c, v in row.items()} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in shown))
    else:
        held = {"long": int, "double": float, "string": str}[way]
        fields = [{"name": c, "type": ["null", "long" if c == "at" else AVRO[way]]} for c in names]
        shown = [{c: v if v is None or c == "at" else held(v) for c, v in row.items()} for row in rows]
        sink = io.BytesIO()
        fastavro.writer(sink, {"type": "record", "name": "row", "fields": fields}, shown)
        path.write_bytes(sink.getvalue())


def content_for(impressions: str, clicks: str) -> dict[str, Any]:
    return {
        "source": {
            "files": f"log-*.{impressions}", "format": impressions, "key": "imp",
            "outcomes": {"click": {"files": f"click.{clicks}", "key": "of", "time": "at", "read": {"format": clicks}}},
        },
        "categorical": {"item": {}, "user": {"hash": 10**10}},
        "bag": {"before": {"table": "own", "history": {"user": "user", "item": "item"}}},
        "tables": {"own": {}},
        "tasks": {"click": {"kind": "binary", "label": "click"}},
        "event_time": "at",
        "split": {"by": "hash", "key": "user", "valid": 0.3, "test": 0.3},
    }  # fmt: skip


def found(folder: Path, kinds: list[tuple[str, str]], log: tuple[list[tuple[int, int, int | None]], list[int]]) -> Any:
    """What the job makes of a log whose two files of impressions, and the one of clicks, are of these kinds."""
    impressions, clicked = log
    folder.mkdir()
    half = len(impressions) // 2
    for number, rows in enumerate((impressions[:half], impressions[half:])):
        times = [BASE + 60 * (number * half + i) for i in range(len(rows))]
        columns: dict[str, Cells] = {c: [row[i] for row in rows] for i, c in enumerate(("imp", "user", "item"))}
        write(folder, f"log-{number}", kinds[number], times, columns)
    keys: Cells = [impressions[i][0] for i in clicked]
    write(folder, "click", kinds[2], [BASE + 10**6] * len(keys), {"of": keys})
    out = folder / "out"
    content = content_for(kinds[0][0], kinds[2][0])
    manifest = run(folder, out, content, encoders={}, max_bad_fraction=0, bucket_bytes=500)
    words = {table: {0: None, 1: "?"} | values_of(out, table) for table in ("item", "own")}
    rows = [
        {
            "row_id": row["row_id"], "item": words["item"][row["item"]], "user": row["user"], "split": row["split"],
            "click": row["label.click"], "before": [words["own"][i] for i in row["before"]],
        }
        for row in rows_by_id(out)
    ]  # fmt: skip
    return rows, manifest.outcomes


IDS = st.integers(0, 50) | st.integers(10**10, 2**53)
LOGS = st.lists(st.tuples(IDS, IDS, st.none() | IDS), min_size=2, max_size=12, unique_by=lambda row: row[0]).flatmap(
    lambda rows: st.tuples(st.just(rows), st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=6, unique=True))
)
FIXED = [
    (10**10 + 4, 7, None),
    (0, 10**12, 10**15),
    (3, 7, 12),
    (2**53, 10**12, 12),
    (10**10 + 5, 7, 0),
    (12, 1, 5),
    (13, 1, 12),
    (14, 6, 12),
]


@settings(max_examples=examples(6), deadline=None, derandomize=True)
@example((FIXED[:2], [0, 1]), ("csv", ""), ("csv", ".0"), ("jsonl", "text"))
@example((FIXED[:2], [0, 1]), ("parquet", "text"), ("parquet", "double"), ("csv", ".000"))
@example((FIXED[:2], [0, 1]), ("avro", "string"), ("avro", "string"), ("parquet", "decimal"))
@given(LOGS, st.sampled_from(KINDS), st.sampled_from(KINDS), st.sampled_from(KINDS))
def test_ids_joins_splits_and_histories_are_those_of_whole_numbers_whatever_holds_them(
    log: Any, first: tuple[str, str], second: tuple[str, str], clicks: tuple[str, str]
) -> None:
    rows, clicked = log
    rows, log = [*FIXED, *(row for row in rows if row[0] not in {r[0] for r in FIXED})], None
    kinds = [first, second if second[0] == first[0] else first, clicks]
    with TemporaryDirectory() as name:
        expected, statuses = found(Path(name) / "plain", [("parquet", "int64")] * 3, (rows, clicked))
        got, got_statuses = found(Path(name) / "drawn", kinds, (rows, clicked))
    # The rows of a file are numbered by file and place, in every format.
    assert [row | {"row_id": 0} for row in got] == [row | {"row_id": 0} for row in expected]
    assert got_statuses == statuses
    assert statuses["click"]["joined"] == len(clicked)
    assert [row["click"] for row in expected] == [float(i in clicked) for i in range(len(rows))]
    for row, (_, _, item) in zip(expected, rows, strict=True):
        assert row["item"] in (None if item is None else str(item), "?")


SCHEMA: dict[str, Any] = {
    "source": {"files": "log*", "format": "parquet", "types": {"click": "int"}},
    "categorical": {"item": {}, "user": {"hash": 100}},
    "tasks": {"click": {"kind": "binary", "label": "click"}},
    "split": {"by": "row_index", "modulo": 1, "train": [0]},
}


def with_source(**changes: Any) -> dict[str, Any]:
    return SCHEMA | {"source": SCHEMA["source"] | changes}


def write_parquet(folder: Path, *columns: dict[str, pa.Array]) -> Path:
    folder.mkdir()
    for number, content in enumerate(columns):
        rows = len(next(iter(content.values())))
        plain = {name: pa.array([1] * rows) for name in ("item", "user", "click")}
        pq.write_table(pa.table(plain | content), folder / f"log-{number}.parquet")
    return folder


def test_one_moment_is_one_id_whatever_its_unit_and_zone(tmp_path: Path) -> None:
    seconds = [0, 86_400, 1_700_000_001]
    naive = [pa.array(seconds, pa.timestamp("s")).cast(pa.timestamp(unit)) for unit in ("ms", "us", "ns")]
    zones = [pa.array(seconds, pa.timestamp("s", zone)) for zone in ("UTC", "Asia/Kolkata")]
    days = pa.array([0, 1, None], pa.date32())
    folder = write_parquet(tmp_path / "in", *({"item": array} for array in (*naive, *zones, days)))
    run(folder, tmp_path / "out", SCHEMA)
    words = {0: None} | values_of(tmp_path / "out", "item")
    found = [words[row["item"]] for row in rows_by_id(tmp_path / "out")]
    assert found[:9] == ["1970-01-01", "1970-01-02", "2023-11-14T22:13:21"] * 3
    assert found[9:15] == ["1970-01-01T00:00:00Z", "1970-01-02T00:00:00Z", "2023-11-14T22:13:21Z"] * 2
    assert found[15:] == ["1970-01-01", "1970-01-02", None]


@pytest.mark.parametrize("column", ["item", "user"])
@pytest.mark.parametrize("kind", [pa.float64(), pa.decimal128(9, 2), pa.list_(pa.float64())])
def test_a_fraction_in_an_id_stops_the_job_naming_file_column_and_value(
    tmp_path: Path, column: str, kind: pa.DataType
) -> None:
    cells = [Decimal("2"), Decimal("3.5")]
    array = pa.array([[float(c)] for c in cells]) if pa.types.is_list(kind) else pa.array(cells).cast(kind)
    content: dict[str, Any] = SCHEMA | {"bag": {"more": {"column": column}}}
    if pa.types.is_list(kind):
        content["categorical"] = {name: {} for name in ("item", "user") if name != column}
    folder = write_parquet(tmp_path / "in", {column: array})
    message = refused(folder, tmp_path / "out", content)
    shown = "3.50" if pa.types.is_decimal(kind) else "3.5"
    assert message.startswith(
        f"{folder}/log-0.parquet: column {column} holds {shown}, which is no id. Make it whole or text"
    )


def test_a_fraction_in_a_key_stops_the_job_on_either_side(tmp_path: Path) -> None:
    content = SCHEMA | {"source": {"files": "log*", "format": "parquet", "key": "user", "outcomes": {
        "buy": {"files": "buy*", "key": "of"}}}}  # fmt: skip
    folder = write_parquet(tmp_path / "in", {"user": pa.array([1.0])})
    pq.write_table(pa.table({"of": [1.0, 0.5]}), folder / "buy.parquet")
    assert refused(folder, tmp_path / "out", content).startswith(
        f"{folder}/buy.parquet: column of holds 0.5, which is no id"
    )
    pq.write_table(pa.table({"of": [1.0, 2.0**60]}), folder / "buy.parquet")
    assert "column of holds 1.152921504606847e+18, of which a float has lost the last digits" in refused(
        folder, tmp_path / "out", content
    )
    typed = content | {"source": content["source"] | {"types": {"user": "float"}}}
    pq.write_table(pa.table({"of": [1.0, 0.5]}), folder / "buy.parquet")
    assert refused(folder, tmp_path / "out", typed | {"categorical": {"item": {}}}).startswith(
        "source.outcomes.buy: its key of holds 0.5, which is no id"
    )


def test_one_odd_cell_of_a_column_of_large_numbers_is_one_dead_letter(tmp_path: Path) -> None:
    exact = [2**53 - 1 - n for n in range(60)]
    whole = {
        "double": pa.array([*map(float, exact[:59]), 0.5]), "infinite": pa.array([*map(float, exact[:59]), float("inf")]),
        "decimal": pa.array([*map(Decimal, exact[:59]), Decimal("0.5")], pa.decimal128(30, 2)),
        "unsigned": pa.array([*exact[:59], 2**63], pa.uint64()),
    }  # fmt: skip
    for name, array in whole.items():
        folder = write_parquet(tmp_path / name, {"click": pa.array([0] * 60), "number": array})
        content = with_source(types={"number": "int", "click": "int"}, row_id="number")
        manifest = run(folder, tmp_path / f"{name}-out", content, max_bad_fraction=0.1)
        assert manifest.dead_letters == {"number: wrong value": 1}
        assert [row["row_id"] for row in rows_by_id(tmp_path / f"{name}-out")] == sorted(exact[:59])
        [letter] = dead_letters_of(tmp_path / f"{name}-out")
        assert letter["line"] == 60
    shown = {"double": "0.5", "infinite": "inf", "decimal": "0.50", "unsigned": str(2**63)}
    assert letter["reason"] == f"number: '{shown[name]}' is not an integer"


def test_usual_markers_are_missing_in_numbers_and_keys_and_counted_in_ids(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    rows = ["a,NULL,1,1", "b,x,nan,1", "NULL,nan,2,0", "d,NULL,\\N,None", "e,y,3,0", "f,,oops,1", "\\N,z,1,1"]
    (folder / "log.csv").write_text("\n".join(["imp,item,price,click", *rows]) + "\n")
    (folder / "buy.csv").write_text("of\na\nNULL\nnan\n\nd\n")
    content: dict[str, Any] = {
        "source": {
            "files": "log.csv", "key": "imp", "types": {"click": "int"},
            "outcomes": {"buy": {"files": "buy.csv", "key": "of"}},
        },
        "dense": {"price": {"missing_flag": True}},
        "categorical": {"item": {}, "hashed": {"column": "item", "hash": 50}},
        "tasks": {"click": {"kind": "binary", "label": "click"}, "buy": {"kind": "binary", "label": "buy"}},
        "split": {"by": "row_index", "modulo": 1, "train": [0]},
    }  # fmt: skip
    manifest = run(folder, tmp_path / "out", content, max_bad_fraction=0.7)
    assert manifest.dead_letters == {"imp: missing key": 2, "price: wrong value": 1, "of: missing key": 2}
    found = rows_by_id(tmp_path / "out")
    words = {0: None} | values_of(tmp_path / "out", "item")
    assert [words[row["item"]] for row in found] == ["NULL", "x", "NULL", "y"]
    assert [row["price_missing"] for row in found] == [0, 1, 1, 0]
    assert [row["label.click"] for row in found] == [1, 1, None, 0]
    assert [row["label.buy"] for row in found] == [1, 0, 1, 0]
    card = read_card(tmp_path / "out")
    assert card["ids"]["item"]["markers"] == card["ids"]["hashed"]["markers"] == {"NULL": 2}
    [table] = [t for t in tables(manifest, card) if t.title.startswith("Ids that look like missing values")]
    assert table.lines == [["item", "'NULL'", "2"], ["hashed", "'NULL'", "2"]]
    advice = "list it in source.missing where it means a missing value"
    assert summary(manifest, card)[-2:] == [f"warning  {name}: 'NULL' (2): {advice}" for name in ("item", "hashed")]


def test_the_card_says_which_types_a_column_has_in_the_files(tmp_path: Path) -> None:
    arrays = [pa.array([1, 2, 3]), pa.array([1.0, None]), pa.array(["4"]).dictionary_encode()]
    folder = write_parquet(tmp_path / "in", *({"item": array} for array in arrays))
    manifest = run(folder, tmp_path / "out", SCHEMA)
    kinds = {"int64": 3, "double": 2, "string (dictionary)": 1}
    assert manifest.types == {"impressions": {"item": kinds, "user": {"int64": 6}, "click": {"int64": 6}}}
    assert Dataset(tmp_path / "out").manifest.types == manifest.types
    [table] = [t for t in tables(manifest, read_card(tmp_path / "out")) if t.title.startswith("Column types")]
    assert sorted(table.lines) == [
        ["click", "impressions", "int64"],
        ["item", "impressions", "int64: 3, double: 2, string (dictionary): 1"],
        ["user", "impressions", "int64"],
    ]
