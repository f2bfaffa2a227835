"""Columns of Parquet files as text and numbers, against Python's own dates, and the rows that a block holds."""

import math
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from zoneinfo import ZoneInfo

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_blocks import WHOLE, read

from features.errors import UserError
from features.kinds.times import seconds
from features.source import Format
from pipeline.ingest.files import find
from pipeline.ingest.formats import raw_format, units
from pipeline.ingest.formats.base import Wanted


def test_parquet_types_become_text_and_numbers(tmp_path: Path) -> None:
    moments = [datetime(1969, 12, 31, 23, 59, 58, 500_000), datetime(2024, 7, 1, 12)]
    naive = [m.replace(microsecond=0) for m in moments]
    aware = [m.replace(tzinfo=timezone.utc) for m in naive]
    midnight = [datetime(2024, 7, 1)] * 2
    berlin = [int(m.replace(tzinfo=ZoneInfo("Europe/Berlin")).timestamp()) for m in naive]
    cases: dict[str, tuple[pa.Array, str, list]] = {
        "naive": (pa.array(moments, pa.timestamp("us")), "time", naive),
        "aware": (pa.array(moments, pa.timestamp("ms", "UTC")), "time", aware),
        "day": (pa.array([date(2024, 7, 1)] * 2), "time", midnight),
        "number": (pa.array(moments, pa.timestamp("us")), "int", berlin),
        "floats": (pa.array([1.7e9 + 0.75, -0.25]), "time", [1_700_000_000, -1]),
        "gone time": (pa.array([1.7e9, math.nan]), "time", [1_700_000_000, None]),
        "dictionary": (pa.array(["a", None]).dictionary_encode(), "string", ["a", None]),
        "bytes": (pa.array([b"a", b"b"]), "string", ["a", "b"]),
        "id": (pa.array([7, None], pa.int32()), "string", ["7", None]),
        "decimal": (pa.array([Decimal("1.50"), None]), "float", [1.5, None]),
        "exact": (pa.array([Decimal(2**62 + 1), None]), "int", [2**62 + 1, None]),
        "half": (pa.array([1.5, 2.0], pa.float16()), "float", [1.5, 2.0]),
        "flag": (pa.array([True, False]), "int", [1, 0]),
        "said": (pa.array([True, False]), "string", ["true", "false"]),
        "odd": (pa.array([1.5, math.inf]), "float", ["1.5", "inf"]),
        "gone": (pa.array([1.5, math.nan]), "float", [1.5, None]),
        "gone half": (pa.array([math.nan, 1.5], pa.float16()), "float", [None, 1.5]),
        "gone part": (pa.array([7.0, math.nan], pa.float32()), "int", [7, None]),
        "gone id": (pa.array([math.nan, 7.0]).dictionary_encode(), "string", [None, "7"]),
        "large": (pa.array([1, 2**64 - 1], pa.uint64()), "int", ["1", str(2**64 - 1)]),
        "whole": (pa.array([7.0, None]), "int", [7, None]),
        "part": (pa.array([7.0, 7.5]), "int", ["7", "7.5"]),
        "double": (pa.array([7, 8], pa.int32()), "float", [7.0, 8.0]),
        "list": (pa.array([[1, None], None]), "string", [["1", None], None]),
    }
    pq.write_table(pa.table({name: array for name, (array, _, _) in cases.items()}), tmp_path / "a.parquet")
    format = Format(format="parquet", timezone="Europe/Berlin")
    rows, _ = read(tmp_path, "a.parquet", format, {name: kind for name, (_, kind, _) in cases.items()})
    got = dict(zip(cases, zip(*(values for _, *values in rows), strict=True), strict=True))
    assert {name: list(values) for name, values in got.items()} == {name: c[2] for name, c in cases.items()}


@pytest.mark.parametrize("kind", [pa.timestamp("s"), pa.timestamp("ms"), pa.timestamp("ns")])
@pytest.mark.parametrize("zone", ["Europe/Berlin", "America/Sao_Paulo", "Australia/Lord_Howe"])
def test_times_of_parquet_are_those_of_their_text_and_one_that_the_clocks_skipped_is_none(
    tmp_path: Path, kind: pa.DataType, zone: str
) -> None:
    changes = [datetime(2018, 3, 25), datetime(2018, 10, 28), datetime(2018, 11, 4), datetime(2018, 10, 7)]
    shown = [day + timedelta(minutes=15 * number) for day in changes for number in range(20)]
    pq.write_table(pa.table({"at": pa.array([*shown, None], kind)}), tmp_path / "a.parquet")
    rows, _ = read(tmp_path, "a.parquet", Format(format="parquet", timezone=zone), {"at": "time"})
    values, wrong = seconds("at", pa.array([at for _, at in rows], pa.timestamp("s")), Format(timezone=zone))
    back = [
        moment.replace(tzinfo=ZoneInfo(zone)).astimezone(timezone.utc).astimezone(ZoneInfo(zone)) for moment in shown
    ]
    exists = [was.replace(tzinfo=None) == moment for was, moment in zip(back, shown, strict=True)]
    expected = [int(was.timestamp()) if is_one else None for was, is_one in zip(back, exists, strict=True)]
    assert values.to_list() == [*expected, None]
    assert wrong.to_list() == [*(not is_one for is_one in exists), False]
    assert False in exists


def test_days_that_began_an_hour_late_are_no_times(tmp_path: Path) -> None:
    days = [date(2018, 11, 3), date(2018, 11, 4), None]
    pq.write_table(pa.table({"day": pa.array(days, pa.date32())}), tmp_path / "a.parquet")
    form = Format(format="parquet", timezone="America/Sao_Paulo")
    rows, _ = read(tmp_path, "a.parquet", form, {"day": "time"})
    assert rows == [(1, datetime(2018, 11, 3)), (2, datetime(2018, 11, 4)), (3, None)]
    midnight = int(datetime(2018, 11, 3, 3, tzinfo=timezone.utc).timestamp())
    values, wrong = seconds("day", pa.array([day for _, day in rows], pa.timestamp("s")), form)
    assert (values.to_list(), wrong.to_list()) == ([midnight, None, None], [False, True, False])
    rows, _ = read(tmp_path, "a.parquet", form, {"day": "int"})
    assert rows == [(1, str(midnight)), (2, "2018-11-04 00:00:00"), (3, None)]


def test_a_block_of_parquet_has_few_rows_however_well_they_compress(tmp_path: Path) -> None:
    pq.write_table(pa.table({"s": ["the same text in every row"] * 300_000}), tmp_path / "a.parquet")
    [file] = find(str(tmp_path), "a.parquet")
    [unit] = units([file], Format(format="parquet"), WHOLE)
    blocks = list(raw_format(Format(format="parquet")).read(unit, Wanted({"s": "string"}), lambda _: None))
    assert [block.columns.num_rows for block in blocks] == [131_072, 131_072, 37_856]
    assert [block.row for block in blocks] == [0, 131_072, 262_144]


def test_rows_of_parquet_are_numbered_in_their_file_however_it_is_cut(tmp_path: Path) -> None:
    pq.write_table(pa.table({"n": range(1000)}), tmp_path / "a.parquet", row_group_size=64)
    for unit_bytes in (1, 1500, WHOLE):
        rows, _ = read(tmp_path, "a.parquet", Format(format="parquet"), {"n": "int"}, unit_bytes)
        assert rows == [(i + 1, i) for i in range(1000)]


def test_a_parquet_column_of_records_is_refused_by_its_name(tmp_path: Path) -> None:
    pq.write_table(pa.table({"r": [{"k": 1}]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: column r is struct<k: int64>"):
        read(tmp_path, "a.parquet", Format(format="parquet"), {"r": "string"})


def test_a_parquet_list_is_no_number(tmp_path: Path) -> None:
    pq.write_table(pa.table({"l": [[1]]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: column l is list<"):
        read(tmp_path, "a.parquet", Format(format="parquet"), {"l": "int"})
