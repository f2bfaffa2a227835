"""Avro files: values of every type against Python's own, files cut into units, and files that are damaged."""

import io
import uuid
from collections.abc import Iterable
from datetime import date, datetime, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import fastavro
import pytest
from test_blocks import WHOLE, read

from features.errors import UserError
from features.source import Format
from pipeline.ingest.files import find
from pipeline.ingest.formats import check_columns, raw_format, units
from pipeline.ingest.formats.base import Wanted

AVRO = Format(format="avro", timezone="Europe/Berlin")


def write(path: Path, kinds: dict[str, Any], rows: Iterable[dict[str, Any]], **settings: Any) -> bytes:
    fields = [{"name": name, "type": kind} for name, kind in kinds.items()]
    sink = io.BytesIO()
    fastavro.writer(sink, {"type": "record", "name": "row", "fields": fields}, rows, **settings)
    path.write_bytes(sink.getvalue())
    return sink.getvalue()


def logical(kind: str, name: str, **more: Any) -> dict[str, Any]:
    return {"type": kind, "logicalType": name, **more}


def test_avro_types_become_text_and_numbers(tmp_path: Path) -> None:
    aware, naive = datetime(2024, 7, 1, 12, 0, 0, 750_000, timezone.utc), datetime(2024, 7, 1, 12)
    color = {"type": "enum", "name": "color", "symbols": ["RED", "BLUE"]}
    noon, midnight, second = naive, datetime(2024, 7, 1), aware.replace(microsecond=0)
    seconds, number = int(aware.timestamp()), uuid.UUID(int=5)
    cases: dict[str, tuple[Any, str, Any, Any]] = {
        "text": ("string", "string", "Köln", "Köln"),
        "none": (["null", "string"], "string", None, None),
        "nothing": ("null", "string", None, None),
        "null last": (["long", "null"], "int", None, None),
        "id": ("long", "string", 7, "7"),
        "whole": ("int", "int", -7, -7),
        "double": ("double", "float", 1.5, 1.5),
        "single": ("float", "string", 0.1, "0.1"),  # not the nearest double, 0.10000000149011612
        "nan": ("double", "float", float("nan"), None),
        "infinite": ("double", "float", float("inf"), "inf"),
        "flag": ("boolean", "int", True, 1),
        "flag text": ("boolean", "string", True, "true"),
        "bytes": ("bytes", "string", b"ab", "ab"),
        "fixed": ({"type": "fixed", "name": "four", "size": 4}, "string", b"abcd", "abcd"),
        "enum": (color, "string", "BLUE", "BLUE"),
        "enum again": (["null", "color"], "string", "RED", "RED"),
        "list": ({"type": "array", "items": ["null", "long"]}, "string", [1, None], ["1", None]),
        "numbers": (["null", "int", "double"], "float", 3, 3.0),
        "integers": (["int", "long"], "int", 2**40, 2**40),
        "decimal": (logical("bytes", "decimal", precision=9, scale=2), "float", Decimal("1.50"), 1.5),
        "wide": (logical("bytes", "decimal", precision=50), "string", Decimal(10**45), str(10**45)),
        "uuid": (logical("string", "uuid"), "string", number, str(number)),
        "day": (logical("int", "date"), "time", date(2024, 7, 1), midnight),
        "millis": (logical("long", "timestamp-millis"), "time", aware, second),
        "micros": (["null", logical("long", "timestamp-micros")], "time", aware, second),
        "nanos": (logical("long", "timestamp-nanos"), "time", seconds * 10**9 + 5, second),
        "local": (logical("long", "local-timestamp-micros"), "time", naive, noon),
        "unknown": (logical("long", "of nobody"), "int", 5, 5),
    }
    kinds = {name.replace(" ", "_"): case[0] for name, case in cases.items()}
    write(tmp_path / "a.avro", kinds, [dict(zip(kinds, (case[2] for case in cases.values()), strict=True))])
    types = dict(zip(kinds, (case[1] for case in cases.values()), strict=True))
    [(line, *values)], bad = read(tmp_path, "a.avro", AVRO, types)
    assert (line, bad) == (1, [])
    assert dict(zip(cases, values, strict=True)) == {name: case[3] for name, case in cases.items()}


@pytest.mark.parametrize("codec", ["null", "deflate", "bzip2"])
@pytest.mark.parametrize("unit_bytes", [1, 3000, WHOLE])
def test_rows_of_avro_are_numbered_in_their_file_however_it_is_cut(tmp_path: Path, codec: str, unit_bytes: int) -> None:
    rows = [{"n": i, "s": f"text {i}"} for i in range(2000)]
    write(tmp_path / "a.avro", {"n": "long", "s": "string"}, rows, codec=codec, sync_interval=1000)
    [file] = find(str(tmp_path), "a.avro")
    cut = units([file], AVRO, unit_bytes, whole=True)
    assert (len(cut) > 1) == (unit_bytes < WHOLE)
    found, _ = read(tmp_path, "a.avro", AVRO, {"s": "string", "n": "int"}, unit_bytes)
    assert found == [(i + 1, f"text {i}", i) for i in range(2000)]
    first = 0
    for unit in cut:
        assert unit.first_row == first
        done: list[int] = []
        for block in raw_format(AVRO).read(unit, Wanted({"n": "int"}), done.append):
            first += block.columns.num_rows
        assert done[-1] == (file.size if unit.stop is None else unit.stop) - unit.start
    assert first == 2000


def test_columns_of_avro_are_the_fields_of_its_records(tmp_path: Path) -> None:
    write(tmp_path / "a.avro", {"b": "long", "a": "string"}, [])
    [file] = find(str(tmp_path), "a.avro")
    assert check_columns(file, AVRO, ["a"]) == ["b", "a"]
    assert read(tmp_path, "a.avro", AVRO, {"a": "string"}) == ([], [])
    with pytest.raises(UserError, match=r"a\.avro: column c is missing, the file has b, a\. Fix the schema\."):
        check_columns(file, AVRO, ["c"])


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        ({"type": "record", "name": "r", "fields": [{"name": "k", "type": "int"}]}, {"k": 1}, "record"),
        ({"type": "map", "values": "int"}, {"k": 1}, "map"),
        (["string", "int"], 1, "union of several types"),
        ({"type": "array", "items": {"type": "map", "values": "int"}}, [], "map"),
    ],
)
def test_a_column_that_is_neither_text_nor_number_is_refused_by_its_name(
    tmp_path: Path, kind: Any, value: Any, words: str
) -> None:
    write(tmp_path / "a.avro", {"n": "int", "c": kind}, [{"n": 1, "c": value}])
    with pytest.raises(UserError, match=rf"a\.avro: column c is Avro {words}, which cannot be read"):
        read(tmp_path, "a.avro", AVRO, {"c": "string"})
    assert read(tmp_path, "a.avro", AVRO, {"n": "int"})[0] == [(1, 1)]


def test_a_list_is_no_number_and_a_file_of_numbers_has_no_rows(tmp_path: Path) -> None:
    write(tmp_path / "a.avro", {"l": {"type": "array", "items": "int"}}, [{"l": [1]}])
    with pytest.raises(UserError, match=r"a\.avro: column l is list<"):
        read(tmp_path, "a.avro", AVRO, {"l": "int"})
    sink = io.BytesIO()
    fastavro.writer(sink, {"type": "array", "items": "int"}, [[1]])
    (tmp_path / "b.avro").write_bytes(sink.getvalue())
    with pytest.raises(UserError, match=r"b\.avro: holds no Avro records"):
        read(tmp_path, "b.avro", AVRO, {"l": "int"})


@pytest.mark.parametrize("unit_bytes", [500, WHOLE])
def test_a_truncated_or_damaged_file_is_refused_in_one_line(tmp_path: Path, unit_bytes: int) -> None:
    rows = [{"n": i, "s": f"text {i}"} for i in range(500)]
    data = write(tmp_path / "a.avro", {"n": "long", "s": "string"}, rows, codec="deflate", sync_interval=1000)
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 0xFF
    for damaged in (data[:3], data[:60], data[: len(data) // 2], data[:-3], b"n,s\n1,2\n", bytes(flipped), b""):
        (tmp_path / "a.avro").write_bytes(damaged)
        with pytest.raises(UserError, match=r"a\.avro: cannot be read.*\. Fetch it again") as caught:
            read(tmp_path, "a.avro", AVRO, {"n": "int", "s": "string"}, unit_bytes)
        assert "\n" not in str(caught.value)
