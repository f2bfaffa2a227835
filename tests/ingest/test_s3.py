"""Raw files in an S3 bucket, served on this machine: the same files, units and rows as from a folder."""

import gzip
import io
from collections.abc import Iterator
from pathlib import Path

import fastavro
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.errors import UserError
from features.source import Format
from pipeline.ingest.files import check_unchanged, find
from pipeline.ingest.formats import check_columns, raw_format, units
from pipeline.ingest.formats.base import Wanted

pytestmark = pytest.mark.integration

s3fs = pytest.importorskip("s3fs")
server = pytest.importorskip("moto.server")
boto3 = pytest.importorskip("boto3")

ROWS = [(i, f"text {i}") for i in range(2000)]
CSV = "".join(["n,s\n", *(f"{n},{s}\n" for n, s in ROWS)]).encode()


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    host, port = running.get_host_and_port()
    yield f"http://{host}:{port}"
    running.stop()


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    settings = {"ENDPOINT_URL": endpoint, "ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "x", "DEFAULT_REGION": "us-east-1"}
    for name, value in settings.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    s3fs.S3FileSystem.clear_instance_cache()
    client = boto3.client("s3")
    client.create_bucket(Bucket="logs")
    pq.write_table(pa.table({"n": [n for n, _ in ROWS], "s": [s for _, s in ROWS]}), tmp_path / "p", row_group_size=300)
    for day in (1, 2):
        client.put_object(Bucket="logs", Key=f"raw/2024-01-0{day}/a.csv", Body=CSV)
    client.put_object(Bucket="logs", Key="raw/b.csv.gz", Body=gzip.compress(CSV))
    client.put_object(Bucket="logs", Key="raw/c.parquet", Body=(tmp_path / "p").read_bytes())
    fields = [{"name": "n", "type": "long"}, {"name": "s", "type": "string"}]
    records, sink = [{"n": n, "s": s} for n, s in ROWS], io.BytesIO()
    fastavro.writer(sink, {"type": "record", "name": "row", "fields": fields}, records, sync_interval=2000)
    client.put_object(Bucket="logs", Key="raw/d.avro", Body=sink.getvalue())
    yield "s3://logs/raw"
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize(
    ("name", "kind", "unit_bytes"),
    [
        ("2024-01-01/a.csv", "csv", 7000),
        ("b.csv.gz", "csv", 7000),
        ("c.parquet", "parquet", 5000),
        ("d.avro", "avro", 7000),
    ],
)
def test_a_bucket_gives_the_rows_that_were_put_there(bucket: str, name: str, kind: str, unit_bytes: int) -> None:
    [file] = find(bucket, name)
    format = Format(format=kind)
    names = check_columns(file, format, ["n", "s"])
    cut = units([file], format, unit_bytes)
    assert (len(cut) > 1) == (name != "b.csv.gz")
    rows = []
    for unit in cut:
        for block in raw_format(format).read(unit, Wanted({"n": "int", "s": "string"}, names), lambda _: None):
            rows += [tuple(row.values()) for row in block.columns.to_pylist()]
    check_unchanged(file)
    assert rows == ROWS


def test_files_of_a_bucket_are_found_by_pattern(bucket: str) -> None:
    found = find(bucket, "{date}/*.csv")
    assert [file.path for file in found] == [f"{bucket}/2024-01-0{day}/a.csv" for day in (1, 2)]
    assert {file.size for file in found} == {len(CSV)}
    assert [file.path for file in find(bucket + "/", "*.gz")] == [f"{bucket}/b.csv.gz"]


def test_an_object_that_is_replaced_is_noticed(bucket: str) -> None:
    _, file = find(bucket, "{date}/*.csv")
    check_unchanged(file)
    find(bucket, "2024-01-02/*.csv")  # a listing that must not be trusted later
    boto3.client("s3").put_object(Bucket="logs", Key="raw/2024-01-02/a.csv", Body=CSV.replace(b"text 7", b"TEXT 7"))
    with pytest.raises(UserError, match=r"^s3://logs/raw/2024-01-02/a\.csv changed while it was read"):
        check_unchanged(file)
    boto3.client("s3").delete_object(Bucket="logs", Key="raw/2024-01-02/a.csv")
    with pytest.raises(UserError, match="changed while it was read"):
        check_unchanged(file)


def test_what_is_not_in_a_bucket_is_said_in_one_line(bucket: str) -> None:
    for folder in (bucket, "s3://no-such-bucket/raw"):
        with pytest.raises(UserError, match=r"^s3://.*/none-\*\.csv: no such file\. Set input=FOLDER.*$"):
            find(folder, "none-*.csv")


def test_a_server_that_does_not_answer_is_named_in_one_line(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("TASKFUSE_STORE_TIMEOUT", "0.5")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(UserError, match=r"^s3://logs/raw: the store has not answered for 0.5 s: .*127\.0\.0\.1:9.*$"):
        find(bucket, "*.csv")
