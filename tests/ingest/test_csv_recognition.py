"""Files that are no text in UTF-8, or packed otherwise than their name says: each is named in one line, with what to do."""

import bz2
import gzip
import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import fastavro
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ingest_runs import no_beam, refused
from test_blocks import read
from test_hostile_files import schema

from features.errors import UserError
from features.source import Format
from pipeline.ingest.files import find
from pipeline.ingest.formats import check_columns
from pipeline.ingest.formats.recognition import check_text

TEXT = "user,click\n" + "".join(f"u{i},{i % 2}\n" for i in range(40))


def zipped(data: bytes) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr("a.csv", data)
    return sink.getvalue()


def parquet(_: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"user": ["u"]}), sink)
    return sink.getvalue().to_pybytes()


def avro(_: bytes) -> bytes:
    sink = io.BytesIO()
    fastavro.writer(
        sink, {"type": "record", "name": "r", "fields": [{"name": "user", "type": "string"}]}, [{"user": "u"}]
    )
    return sink.getvalue()


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


def lz4(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "lz4") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACKED: list[tuple[str, Callable[[bytes], bytes], str]] = [
    ("a.csv", gzip.compress, "is gzip under the name a.csv: rename it to a.csv.gz"),
    ("a.csv", zstd, "is zstd under the name a.csv: rename it to a.csv.zst"),
    ("a.csv", bz2.compress, "is bzip2 under the name a.csv: rename it to a.csv.bz2"),
    ("a.csv", lz4, "is lz4 under the name a.csv: rename it to a.csv.lz4"),
    ("a.csv.zst", gzip.compress, "is gzip under the name a.csv.zst: rename it to a.csv.gz"),
    ("a.csv.gz", zstd, "is zstd under the name a.csv.gz: rename it to a.csv.zst"),
    ("a.csv.gz", bytes, "is not gzip: rename it to a.csv if it is plain text"),
    ("a.csv.gz", lambda data: gzip.compress(gzip.compress(data)), "is gzip, packed twice: unpack it once"),
    ("a.csv", zipped, "is a ZIP archive or an Excel workbook"),
    ("a.csv", parquet, "is Parquet: set format: parquet"),
    ("a.csv", avro, "is Avro: set format: avro"),
]
ENCODED = [
    ("utf-16", "is UTF-16: convert it with iconv -f UTF-16 -t UTF-8"),
    ("utf-16-le", "is UTF-16LE: convert it with iconv -f UTF-16LE -t UTF-8"),
    ("utf-16-be", "is UTF-16BE: convert it with iconv -f UTF-16BE -t UTF-8"),
    ("utf-32", "is UTF-32: convert it with iconv -f UTF-32 -t UTF-8"),
    ("utf-32-le", "is UTF-32LE: convert it with iconv -f UTF-32LE -t UTF-8"),
    ("utf-32-be", "is UTF-32BE: convert it with iconv -f UTF-32BE -t UTF-8"),
]
FORMATS = [Format(), Format(multiline=True), Format(columns=["user", "click"]), Format(format="jsonl")]


def fault_of(folder: Path, name: str, format: Format) -> str:
    [file] = find(str(folder), name)
    with pytest.raises(UserError) as caught:
        check_columns(file, format, ["user"])
    assert str(caught.value).startswith(f"{folder / name}: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_packed_under_another_name_is_named(tmp_path: Path, format: Format) -> None:
    for name, pack, words in PACKED:
        (tmp_path / name).write_bytes(pack(TEXT.encode()))
        assert words in fault_of(tmp_path, name, format)


@pytest.mark.parametrize("format", FORMATS)
def test_other_encodings_binary_files_and_old_line_ends_are_named(tmp_path: Path, format: Format) -> None:
    for name, words in ENCODED:
        (tmp_path / "a.csv").write_bytes(TEXT.encode(name))
        assert words in fault_of(tmp_path, "a.csv", format)
        (tmp_path / "a.csv.gz").write_bytes(gzip.compress(TEXT.encode(name)))
        assert words in fault_of(tmp_path, "a.csv.gz", format)
    (tmp_path / "a.csv").write_bytes(TEXT.replace("\n", "\r").encode())
    assert "its lines end with CR alone. Convert it with tr '\\r' '\\n'." in fault_of(tmp_path, "a.csv", format)
    (tmp_path / "a.csv").write_bytes(bytes(range(256)) * 100)
    assert "is no text: its first line has NUL bytes" in fault_of(tmp_path, "a.csv", format)
    (tmp_path / "a.csv").write_bytes(bytes(number for number in range(1, 256) if number != 10) * 20)
    assert "is no text: its first line has control characters, and is not UTF-8" in fault_of(tmp_path, "a.csv", format)


def test_text_that_only_resembles_such_files_is_read(tmp_path: Path) -> None:
    for header in ("BZh,b", "PAR1,b", "ORC,b", "PK,b"):
        (tmp_path / "a.csv").write_text(f"{header}\n1,x\n")
        assert read(tmp_path, "a.csv", Format(), {"b": "string"}) == ([(2, "x")], [])
    (tmp_path / "a.csv").write_bytes(b"a,b\n1,\0\0\0\0\n" + b"\0" * 50 + b"\n2,x\n")  # a hole of a crashed disk
    rows, bad = read(tmp_path, "a.csv", Format(), {"b": "string"})
    assert rows == [(2, "\0\0\0\0"), (4, "x")]
    assert [line for line, *_ in bad] == [3]


def test_text_with_control_characters_whose_last_character_is_cut_is_text() -> None:
    line = "\1" * 9 + "ü" * 40 + "価"
    for cut in range(3):
        check_text("a.csv", line.encode()[: len(line.encode()) - cut])
    with pytest.raises(UserError, match="control characters, and is not UTF-8"):
        check_text("a.csv", line.encode() + b"\xe4x")


def test_a_line_end_may_be_cut_after_its_carriage_return() -> None:
    check_text("a.csv", b"user,click\r")
    with pytest.raises(UserError, match="its lines end with CR alone"):
        check_text("a.csv", b"user,click\ru")


@pytest.mark.parametrize("multiline", [False, True])
def test_a_header_with_spaces_suggests_trim(tmp_path: Path, multiline: bool) -> None:
    (tmp_path / "a.csv").write_text("user, click\nu, 1\n")
    [file] = find(str(tmp_path), "a.csv")
    with pytest.raises(UserError, match=r"a\.csv: the header has spaces around click\. Set trim: true"):
        check_columns(file, Format(multiline=multiline), ["user", "click"])
    assert check_columns(file, Format(trim=True, multiline=multiline), ["user", "click"]) == ["user", "click"]


@pytest.mark.parametrize(("sign", "said"), [(";", '";"'), ("\t", r'"\\t"'), ("|", r'"\|"')])
def test_a_header_that_another_delimiter_cuts_suggests_it(tmp_path: Path, sign: str, said: str) -> None:
    (tmp_path / "a.csv").write_text(f"user{sign} click\nu{sign}1\n")
    [file] = find(str(tmp_path), "a.csv")
    with pytest.raises(UserError, match=rf"column click is missing.* Set delimiter: {said} in the schema's source\.$"):
        check_columns(file, Format(), ["click"])
    with pytest.raises(UserError, match=r"column price is missing.* Fix the schema, or name the columns"):
        check_columns(file, Format(), ["price"])


@pytest.mark.parametrize("multiline", [False, True])
def test_a_header_whose_quote_is_not_closed_is_named(tmp_path: Path, multiline: bool) -> None:
    (tmp_path / "a.csv").write_text('user,"click\nu,1\n')
    [file] = find(str(tmp_path), "a.csv")
    with pytest.raises(UserError, match=r"a\.csv: its header line cannot be read: a quote is not closed"):
        check_columns(file, Format(multiline=multiline), ["user"])


@pytest.mark.integration
def test_a_job_stops_before_its_first_step(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "log.csv").write_text("item,y\na,1\n", encoding="utf-16")
    with no_beam():
        message = refused(tmp_path / "in", tmp_path / "out", schema())
    assert message == f"{tmp_path}/in/log.csv: is UTF-16: convert it with iconv -f UTF-16 -t UTF-8."
