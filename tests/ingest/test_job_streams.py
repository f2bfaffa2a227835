"""Streams of a job that hold no rows, and keys that are computed: the rows are those of a plain log."""

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fastavro
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ingest_runs import content_of, refused, rows_by_id, rows_of, run

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("steps_alone")]

COUNT = 40


def impression(number: int) -> dict[str, Any]:
    return {"id": number, "at": 1000 + number, "user": f"u{number % 3}", "item": f"i{number % 5}"}


def click(number: int) -> dict[str, Any]:
    """One of every fourth row, two seconds later."""
    return {"id": 4 * number, "when": 1002 + 4 * number, "dwell": number / 2, "place": f"p{number}"}


def as_csv(rows: list[dict[str, Any]], _: dict[str, Any]) -> bytes:
    return "".join(",".join(map(str, row.values())) + "\n" for row in rows).encode()


def as_jsonl(rows: list[dict[str, Any]], _: dict[str, Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def as_parquet(rows: list[dict[str, Any]], like: dict[str, Any]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=pa.Table.from_pylist([like]).schema), sink)
    return sink.getvalue().to_pybytes()


def as_avro(rows: list[dict[str, Any]], like: dict[str, Any]) -> bytes:
    kinds = {int: "long", float: "double", str: "string"}
    fields = [{"name": name, "type": kinds[type(value)]} for name, value in like.items()]
    sink = io.BytesIO()
    fastavro.writer(sink, {"type": "record", "name": "row", "fields": fields}, rows)
    return sink.getvalue()


Write = Callable[[list[dict[str, Any]], dict[str, Any]], bytes]
FORMATS: dict[str, tuple[dict[str, Any], Write]] = {
    "headerless.csv": ({"format": "csv"}, as_csv),
    "headerless.csv.gz": ({"format": "csv"}, lambda rows, like: gzip.compress(as_csv(rows, like))),
    "jsonl": ({"format": "jsonl"}, as_jsonl),
    "jsonl.gz": ({"format": "jsonl"}, lambda rows, like: gzip.compress(as_jsonl(rows, like))),
    "parquet": ({"format": "parquet"}, as_parquet),
    "avro": ({"format": "avro"}, as_avro),
}


def written(folder: Path, ending: str, impressions: list[dict[str, Any]], clicks: list[dict[str, Any]]) -> Path:
    """A log whose impressions and clicks are in one format."""
    folder.mkdir(parents=True)
    _, write = FORMATS[ending]
    (folder / f"log.{ending}").write_bytes(write(impressions, impression(0)))
    (folder / f"clicks.{ending}").write_bytes(write(clicks, click(0)))
    return folder


def content_for(ending: str, **outcome: Any) -> dict[str, Any]:
    form, _ = FORMATS[ending]
    names = [{"columns": list(row)} if form["format"] == "csv" else {} for row in (impression(0), click(0))]
    read = {"files": "clicks.*", "key": "id", "time": "when", "columns": {"dwell": "float", "place": "string"}}
    return {
        "source": {
            "files": "log.*", "key": "id", "row_id": "id", "times": {"at": "index"}, **form, **names[0],
            "outcomes": {"click": read | {"window": 10, "read": form | names[1] | {"times": {"when": "index"}}} | outcome},
        },
        "categorical": {"user": {}},
        "bag": {
            "seen": {"history": {"user": "user", "item": "item"}},
            "clicked": {"history": {"user": "user", "item": "item", "when": "click"}},
        },
        "tasks": {
            "click": {"kind": "binary", "label": "click"},
            "dwell": {"kind": "regression", "label": "click_dwell", "observed_when": "click"},
            "here": {"kind": "binary", "label": "click_place = 'p3'"},
        },
        "event_time": "at",
        "split": {"by": "hash", "key": "user", "valid": 0, "test": 0},
    }  # fmt: skip


@pytest.mark.parametrize("ending", FORMATS)
def test_a_log_without_clicks_has_rows_that_were_not_clicked(ending, tmp_path):
    folder = written(tmp_path / "log", ending, [impression(n) for n in range(COUNT)], [])
    manifest = run(folder, tmp_path / "out", content_for(ending))
    rows = rows_by_id(tmp_path / "out")
    assert [row["row_id"] for row in rows] == list(range(COUNT))
    assert [row["label.click"] for row in rows] == [0.0 if n + 10 < COUNT else None for n in range(COUNT)]
    assert {row["label.dwell"] for row in rows} == {None}
    assert [len(row["seen"]) for row in rows] == [n // 3 for n in range(COUNT)]
    assert not any(row["clicked"] for row in rows)
    assert manifest.read == {"impressions": COUNT, "click": 0}
    assert not any(manifest.outcomes["click"].values())
    assert manifest.complete_until == {"click": 1000 + COUNT - 1}


@pytest.mark.parametrize("ending", FORMATS)
def test_a_log_without_impressions_has_no_rows_to_make_a_dataset_of(ending, tmp_path):
    folder = written(tmp_path / "log", ending, [], [click(n) for n in range(5)])
    assert "no rows are left" in refused(folder, tmp_path / "out", content_for(ending))


@pytest.mark.parametrize("ending", FORMATS)
def test_an_empty_file_beside_others_of_its_stream_changes_nothing(ending, tmp_path):
    folder = written(tmp_path / "log", ending, [impression(n) for n in range(COUNT)], [click(n) for n in range(10)])
    content = content_for(ending)
    content["source"]["files"], content["source"]["outcomes"]["click"]["files"] = "*log.*", "*clicks.*"
    run(folder, tmp_path / "before", content)
    assert [row["label.dwell"] for row in rows_by_id(tmp_path / "before")][:20:4] == [0, 0.5, 1, 1.5, 2]
    _, write = FORMATS[ending]
    for name, like in (("log", impression(0)), ("clicks", click(0))):
        (folder / f"zero-{name}.{ending}").write_bytes(write([], like))
    run(folder, tmp_path / "after", content)
    assert content_of(tmp_path / "after") == content_of(tmp_path / "before")


# Keys that are computed


@pytest.mark.parametrize(
    ("key", "expression", "kind"),
    [
        ("number", "CAST(id AS BIGINT) + 0", "int"),
        ("number", "CAST(id AS BIGINT) + 0", "string"),
        ("word", "'k' || id", "string"),
        ("remainder", "CAST(id AS BIGINT) % 7", "string"),
    ],
)
@pytest.mark.parametrize("bucket_bytes", [1 << 20, 60])
def test_a_derived_key_joins_as_a_column_of_the_same_values_does(key, expression, kind, bucket_bytes, tmp_path):
    value = {"number": lambda n: n, "word": lambda n: f"k{n}", "remainder": lambda n: n % 7}[key]
    clicks = [click(n) | {"id": value(4 * n)} for n in range(COUNT // 4)]
    folder = written(tmp_path / "log", "jsonl", [impression(n) for n in range(COUNT)], clicks)
    derived = content_for("jsonl")
    derived["source"] |= {"derived": {key: expression}, "key": key, "types": {key: "int"} if kind == "int" else {}}
    sizes = {"bucket_bytes": bucket_bytes, "unit_bytes": 300}
    manifest = run(folder, tmp_path / "derived", derived, **sizes)
    plain = content_for("jsonl")
    plain["source"] |= {"key": key}
    rows = [impression(n) | {key: value(n)} for n in range(COUNT)]
    run(written(tmp_path / "plain_log", "jsonl", rows, clicks), tmp_path / "plain", plain, **sizes)
    assert manifest.outcomes["click"]["joined"] == COUNT // 4
    assert any(row["label.click"] for row in rows_by_id(tmp_path / "derived"))
    assert rows_of(tmp_path / "derived", "train").equals(rows_of(tmp_path / "plain", "train"))


def test_a_derived_key_with_fractions_is_refused_since_no_outcome_would_ever_be_joined(tmp_path):
    folder = written(tmp_path / "log", "jsonl", [impression(n) for n in range(COUNT)], [click(n) for n in range(10)])
    content = content_for("jsonl")
    content["source"] |= {"derived": {"half": "id / 2.0"}, "key": "half"}
    message = refused(folder, tmp_path / "out", content)
    assert message.startswith("source.key: half is Decimal")
    assert message.endswith("make it whole with CAST(... AS BIGINT)")


def test_a_derived_number_can_be_row_id_time_and_key_of_the_split(tmp_path):
    folder = written(tmp_path / "log", "jsonl", [impression(n) for n in range(COUNT)], [])
    content = content_for("jsonl")
    content["source"] |= {
        "row_id": "twice",
        "types": {"id": "int", "at": "int"},
        "times": {"later": "index"},
        "derived": {"twice": "2 * id", "later": "at + 5", "third": "id % 3"},
    }
    content |= {"event_time": "later", "split": {"by": "hash", "key": "third", "valid": 0, "test": 0}}
    run(folder, tmp_path / "out", content)
    rows = rows_by_id(tmp_path / "out")
    assert [(row["row_id"], row["event_time"]) for row in rows] == [(2 * n, 1005 + n) for n in range(COUNT)]
