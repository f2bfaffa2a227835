"""One log in every format, cut or whole, from a folder or a bucket: the same rows and the same dead letters."""

import csv
import gzip
import io
import json
from collections.abc import Callable
from datetime import datetime, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import fastavro
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ingest_runs import content_of, dead_letters_of, rows_by_id, rows_of, run

from pipeline.ingest.formats import FORMATS as REGISTERED
from pipeline.ingest.formats import text

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("steps_alone")]

COLUMNS = ["id", "at", "price", "city", "tags", "click"]
Row = dict[str, Any]


def row(number: int) -> Row:
    """Row `number` as JSON and Parquet hold it, with numbers and nulls of their own."""
    return {
        "id": number,
        "at": 1_700_000_000 + 60 * number,
        "price": None if number % 7 == 0 else number / 8,
        "city": ["Köln", "Paris, France", 'the "Hague"', None][number % 4],
        "tags": "|".join(f"t{k}" for k in range(number % 4)) or None,
        "click": number % 3 == 0,
    }


ROWS = [row(number) for number in range(300)]


def as_text(value: Any) -> str:
    return "" if value is None else str(int(value)) if isinstance(value, bool) else str(value)


def csv_bytes(rows: list[Row], delimiter: str = ",") -> bytes:
    lines: list[str] = []

    class Lines:
        write = staticmethod(lines.append)

    writer = csv.writer(Lines, delimiter=delimiter, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows([as_text(value) for value in row.values()] for row in rows)
    return "".join(lines).encode()


def json_bytes(rows: list[Row]) -> bytes:
    return "".join(json.dumps(row | {"click": int(row["click"])}, ensure_ascii=False) + "\n" for row in rows).encode()


def compressed(data: bytes, codec: str) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, codec) as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def parquet_bytes(rows: list[Row]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=40)
    return sink.getvalue().to_pybytes()


def typed_parquet_bytes(rows: list[Row]) -> bytes:
    """With timestamps, lists, codes into text and decimals."""
    columns = {name: [row[name] for row in rows] for name in COLUMNS}
    table = pa.table(
        {
            "tags": pa.array([None if t is None else t.split("|") for t in columns["tags"]], pa.list_(pa.string())),
            "click": pa.array(columns["click"]).cast(pa.int8()),
            "id": pa.array(columns["id"], pa.int16()),
            "city": pa.array(columns["city"]).dictionary_encode(),
            "at": pa.array([s * 1000 for s in columns["at"]], pa.timestamp("ms")),
            "price": pa.array(columns["price"]).cast(pa.decimal128(9, 3)),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def avro_bytes(rows: list[Row], **changes: Any) -> bytes:
    """In blocks of a few rows. `changes` are types of columns in place of plain ones."""
    kinds = {"id": "long", "at": "long", "price": "double", "city": "string", "tags": "string", "click": "boolean"}
    fields = [{"name": name, "type": ["null", kind]} for name, kind in (kinds | changes).items()]
    sink = io.BytesIO()
    fastavro.writer(sink, {"type": "record", "name": "row", "fields": fields}, rows, "deflate", sync_interval=500)
    return sink.getvalue()


def typed_avro_bytes(rows: list[Row]) -> bytes:
    """With timestamps, lists and decimals."""
    changes = {
        "id": "int",
        "at": {"type": "long", "logicalType": "timestamp-millis"},
        "price": {"type": "bytes", "logicalType": "decimal", "precision": 9, "scale": 3},
        "tags": {"type": "array", "items": "string"},
        "click": "int",
    }
    typed = [
        row
        | {
            "at": datetime.fromtimestamp(row["at"], timezone.utc),
            "price": None if row["price"] is None else Decimal(row["price"]),
            "tags": None if row["tags"] is None else row["tags"].split("|"),
            "click": int(row["click"]),
        }
        for row in rows
    ]
    return avro_bytes(typed, **changes)


FORMATS: dict[str, tuple[dict[str, Any], Callable[[list[Row]], bytes]]] = {
    "csv": ({}, csv_bytes),
    "tsv": ({"delimiter": "\t"}, lambda rows: csv_bytes(rows, "\t")),
    "csv.gz": ({}, lambda rows: gzip.compress(csv_bytes(rows))),
    "csv.zst": ({}, lambda rows: compressed(csv_bytes(rows), "zstd")),
    "csv.bz2": ({}, lambda rows: compressed(csv_bytes(rows), "bz2")),
    "multiline.csv": ({"multiline": True}, csv_bytes),
    "jsonl": ({"format": "jsonl"}, json_bytes),
    "jsonl.gz": ({"format": "jsonl"}, lambda rows: gzip.compress(json_bytes(rows))),
    "parquet": ({"format": "parquet"}, parquet_bytes),
    "typed.parquet": ({"format": "parquet"}, typed_parquet_bytes),
    "avro": ({"format": "avro"}, avro_bytes),
    "typed.avro": ({"format": "avro"}, typed_avro_bytes),
}


def content_for(**source: Any) -> dict[str, Any]:
    return {
        "source": {"files": "log-*", "row_id": "id", "types": {"click": "int"}} | source,
        "dense": {"price": {"missing_flag": True}},
        "categorical": {"city": {}},
        "bag": {"tags": {}},
        "tasks": {"click": {"kind": "binary", "label": "click = 1"}},
        "event_time": "at",
        "split": {"by": "hash", "key": "id", "valid": 0.2, "test": 0.2},
    }


def write_log(folder: Path, ending: str, rows: list[Row]) -> Path:
    """Two files."""
    folder.mkdir()
    _, write = FORMATS[ending]
    (folder / f"log-0.{ending}").write_bytes(write(rows[:170]))
    (folder / f"log-1.{ending}").write_bytes(write(rows[170:]))
    return folder


@pytest.fixture(scope="module")
def as_csv(tmp_path_factory) -> Path:
    """The dataset of the log as plain CSV files."""
    folder = tmp_path_factory.mktemp("formats")
    run(write_log(folder / "log", "csv", ROWS), folder / "out", content_for())
    return folder / "out"


def same_rows(one: Path, other: Path) -> None:
    for split in ("train", "valid", "test"):
        a, b = rows_of(one, split), rows_of(other, split)
        assert a.num_rows > 20
        assert a.schema == b.schema
        assert a.to_pylist() == b.to_pylist()
    assert content_of(one / "encoders") == content_of(other / "encoders")


def test_the_rows_of_the_plain_csv_are_those_that_were_written(as_csv):
    found = rows_by_id(as_csv)
    assert [x["row_id"] for x in found] == [x["id"] for x in ROWS]
    assert [x["event_time"] for x in found] == [x["at"] for x in ROWS]
    assert [x["label.click"] for x in found] == [x["click"] for x in ROWS]
    assert [x["price_missing"] for x in found] == [x["price"] is None for x in ROWS]
    assert [len(x["tags"]) for x in found] == [x["id"] % 4 for x in ROWS]
    assert len({x["city"] for x in found}) == 4


def test_every_registered_format_has_a_log_here():
    assert {source.get("format", "csv") for source, _ in FORMATS.values()} == set(REGISTERED)


@pytest.mark.parametrize("ending", [name for name in FORMATS if name != "csv"])
def test_every_format_gives_the_rows_of_plain_csv(ending, as_csv, tmp_path):
    source, _ = FORMATS[ending]
    run(write_log(tmp_path / "log", ending, ROWS), tmp_path / "out", content_for(**source))
    same_rows(tmp_path / "out", as_csv)


@pytest.mark.parametrize("ending", REGISTERED)
def test_files_cut_into_many_units_give_the_rows_of_whole_ones(ending, as_csv, tmp_path):
    source, _ = FORMATS[ending]
    log = write_log(tmp_path / "log", ending, ROWS)
    manifest = run(log, tmp_path / "out", content_for(**source), unit_bytes=1000)
    assert manifest.read == {"impressions": len(ROWS)}
    same_rows_but_for_digits(tmp_path / "out", as_csv)


def same_rows_but_for_digits(one: Path, other: Path) -> None:
    """Moments of parts are merged in another order, so that the last digit of a number may differ."""
    for a, b in zip(rows_by_id(one), rows_by_id(other), strict=True):
        assert a.pop("price") == pytest.approx(b.pop("price"), rel=1e-5, abs=1e-6)
        assert a == b


DAMAGE = {
    "csv": [b"1,2", b"", b"x,1,1,a,b,1", b'5,5,"1,a,b,1', b"\xff,1,1,a,b,1", b"", b"7,1,one,a,b,1"],
    "jsonl": [b"{", b"", b'{"id": "x"}', b"[]", b'"\xff"', b"", b'{"id": 7, "price": "one", "at": 1, "click": 1}'],
}


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_dead_letters_have_the_same_lines_whether_a_file_is_cut_or_not(ending, tmp_path, monkeypatch):
    source, write = FORMATS[ending]
    lines = write(ROWS).split(b"\n")
    bad = {}
    for index, damage in enumerate(DAMAGE[ending] * 3, 1):
        place = 13 * index
        lines.insert(place, damage)
        if damage:
            bad[place + 1] = damage
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / f"log-0.{ending}").write_bytes(b"\n".join(lines))
    content = content_for(**source)
    found = []
    for unit_bytes, block_bytes in ((1 << 30, 1 << 25), (1000, 1 << 25), (1000, 300)):
        monkeypatch.setattr(text, "BLOCK_BYTES", block_bytes)
        out = tmp_path / f"out-{unit_bytes}-{block_bytes}"
        run(tmp_path / "log", out, content, unit_bytes=unit_bytes, max_bad_fraction=0.5)
        assert [x["row_id"] for x in rows_by_id(out)] == [x["id"] for x in ROWS]
        found.append(dead_letters_of(out))
    assert [letter["line"] for letter in found[0]] == list(bad)
    assert found[1] == found[0]
    assert found[2] == found[0]


def test_a_bucket_gives_the_bytes_of_a_folder(as_csv, tmp_path, monkeypatch):
    s3fs, server = pytest.importorskip("s3fs"), pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    try:
        host, port = running.get_host_and_port()
        keys = {"ENDPOINT_URL": f"http://{host}:{port}", "ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "x"}
        for name, value in (keys | {"DEFAULT_REGION": "us-east-1"}).items():
            monkeypatch.setenv(f"AWS_{name}", value)
        s3fs.S3FileSystem.clear_instance_cache()
        client = boto3.client("s3")
        client.create_bucket(Bucket="whole-job")
        for path in write_log(tmp_path / "log", "csv", ROWS).iterdir():
            client.put_object(Bucket="whole-job", Key=f"raw/{path.name}", Body=path.read_bytes())
        run("s3://whole-job/raw", tmp_path / "out", content_for())
        assert content_of(tmp_path / "out") == content_of(as_csv)
    finally:
        running.stop()
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize("ending", ["csv.gz", *REGISTERED])
def test_files_without_rows_add_none(ending, as_csv, tmp_path):
    source, write = FORMATS[ending]
    log = write_log(tmp_path / "log", ending, ROWS)
    schema = pq.read_schema(pa.BufferReader(parquet_bytes(ROWS)))
    sink = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), sink)
    empty = sink.getvalue().to_pybytes() if ending == "parquet" else write([])
    for name in ("log-00", "log-2"):
        (log / f"{name}.{ending}").write_bytes(empty)
    run(log, tmp_path / "out", content_for(**source))
    same_rows(tmp_path / "out", as_csv)


@pytest.mark.parametrize("ending", ["csv.gz", *REGISTERED])
def test_the_index_of_a_row_in_its_file_decides_its_split_however_the_file_is_cut(ending, tmp_path):
    source, _ = FORMATS[ending]
    split = {"by": "row_index", "modulo": 7, "train": [0, 1, 2, 3], "valid": [4, 5], "test": [6]}
    run(
        write_log(tmp_path / "log", ending, ROWS),
        tmp_path / "out",
        content_for(**source) | {"split": split},
        unit_bytes=500,
    )
    place = [*range(170), *range(130)]
    names = ["train"] * 4 + ["valid"] * 2 + ["test"]
    assert [row["split"] for row in rows_by_id(tmp_path / "out")] == [names[i % 7] for i in place]
