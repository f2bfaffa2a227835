"""Files beside a log that are none: a draft names them and uses the log, whatever they hold."""

import gzip
import io
import sqlite3
from pathlib import Path

import pyarrow as pa
import pyarrow.orc
import pytest

from pipeline.ingest.draft.config import DraftConfig
from pipeline.ingest.draft.draft import draft
from pipeline.ingest.draft.groups import Group
from pipeline.ingest.draft.sample import sample_of
from pipeline.ingest.files import find

LOG = "user,price,click\n" + "".join(f"u{i % 17},{i * 1.5},{i % 3 == 0:d}\n" for i in range(500))


def orc() -> bytes:
    sink = io.BytesIO()
    pa.orc.write_table(pa.table({"a": ["x", "y"]}), sink)
    return sink.getvalue()


def arrow() -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, pa.schema([("a", pa.string())])):
        pass
    return sink.getvalue().to_pybytes()


def sqlite() -> bytes:
    connection = sqlite3.connect(":memory:")
    connection.execute("create table t(a)")
    return connection.serialize()


OTHERS = {
    "a.db": (sqlite(), "is an SQLite database"), "a.xz": (b"\xfd7zXZ\0abc\n", "is packed with xz"),
    "a.arrow": (arrow(), "is Arrow IPC: write it as Parquet"), "a.orc": (orc(), "is ORC: write it as Parquet"),
    "u16.txt": ("a,b\n1,2\n".encode("utf-16-le"), "is UTF-16LE: convert it"), "cr.txt": (b"a,b\r1,2\r", "CR alone"),
    "a.dat": (bytes(range(256)) * 10, "is no text: its first line has NUL bytes"), "plain.gz": (b"a,b\n", "is not gzip"),
    "cut.csv.gz": (gzip.compress(LOG.encode())[:40], "cannot be read: Truncated"),
    "picture": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "is a picture"), "paper": (b"%PDF-1.7\n%\xe2\xe3\n", "is a PDF"),
}  # fmt: skip


def test_a_draft_is_made_of_the_log_beside_other_files_and_names_each_with_the_reason(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "log.csv").write_text(LOG)
    for name, (content, _) in OTHERS.items():
        (folder / name).write_bytes(content)
    lines = draft(DraftConfig(input=str(folder), out=tmp_path / "conf" / "data" / "mine.yaml")).lines
    assert any(line.startswith("impressions  log.csv") for line in lines)
    for name, (_, why) in OTHERS.items():
        [line] = [line for line in lines if f" {name}: " in line]
        assert why in line
        assert str(folder) not in line


@pytest.mark.parametrize("name", ["ORC", "ORCID", "BZh_id", "PNG"])
def test_a_header_that_begins_as_a_binary_file_does_is_one(tmp_path: Path, name: str) -> None:
    (tmp_path / "log.csv").write_text(LOG.replace("user", name, 1))
    found = sample_of(Group("log.csv", find(str(tmp_path), "log.csv"), []))
    assert list(found.columns) == [name, "price", "click"]
