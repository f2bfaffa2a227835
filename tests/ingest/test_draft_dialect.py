"""How a draft tells what files look like: compared with what the csv and json modules wrote."""

import csv
import gzip
import json
from datetime import date, datetime, timedelta, timezone
from pathlib import Path

import fastavro
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from examples import examples
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from features.errors import UserError
from pipeline.ingest.draft import sample
from pipeline.ingest.draft.column import column_of
from pipeline.ingest.draft.dialect import NoLogError
from pipeline.ingest.draft.groups import Group, find_groups, literal, shape_of
from pipeline.ingest.draft.moments import FORMATS, UNITS, moments_of
from pipeline.ingest.draft.sample import Sample, sample_of
from pipeline.ingest.files import find
from pipeline.ingest.formats import text

NAMES = ["user", "price", "note", "n"]


def sampled(folder: Path, name: str) -> Sample:
    return sample_of(Group(literal(name), find(str(folder), literal(name)), []))


def columns_read(sample: Sample) -> dict[str, list[str]]:
    return {name: values.to_list() for name, values in sample.columns.items()}


TEXT = st.text("abcdef é価-_", min_size=1, max_size=8).map(lambda text: f"w{text}w")
ROWS = st.lists(
    st.tuples(TEXT, st.floats(0, 1e6).map(lambda x: f"{x:.2f}"), TEXT, st.integers(0, 99).map(str)),
    min_size=3,
    max_size=30,
)


@settings(max_examples=examples(60), suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(ROWS, st.sampled_from(",;\t|"), st.booleans(), st.booleans(), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_a_sample_has_the_rows_that_the_csv_module_wrote(
    tmp_path: Path, rows: list, delimiter: str, header: bool, all_quoted: bool, end: str, packed: bool
) -> None:
    rows = [(f"{user}{delimiter}x" if all_quoted else user, *rest) for user, *rest in rows]
    path = tmp_path / ("a.csv.gz" if packed else "a.csv")
    with gzip.open(path, "wt", newline="") if packed else path.open("w", newline="") as file:
        quoting = csv.QUOTE_ALL if all_quoted else csv.QUOTE_MINIMAL
        csv.writer(file, delimiter=delimiter, quoting=quoting, lineterminator=end).writerows([NAMES] * header + rows)
    found = sampled(tmp_path, path.name)
    path.unlink()
    names = NAMES if header else ["c1", "c2", "c3", "c4"]
    assert columns_read(found) == {name: [row[i] for row in rows] for i, name in enumerate(names)}
    assert found.dialect.options.get("columns") == (None if header else names)
    assert found.dialect.options.get("delimiter", ",") == delimiter
    assert (found.rows, found.to_its_end, found.bad) == (len(rows), True, 0)


@pytest.mark.parametrize(("form", "size"), [("csv", 5000), ("csv", 1700), ("parquet", 5000)])
def test_of_a_large_file_beginning_and_end_are_read_each_row_once(
    tmp_path: Path, monkeypatch, form: str, size: int
) -> None:
    rows = [{"id": f"r{i:06d}", "n": i} for i in range(size)]
    monkeypatch.setattr(sample, "PIECE_BYTES", 20_000)
    monkeypatch.setattr(sample, "TAIL_BYTES", 3_000)
    if form == "csv":
        (tmp_path / "a.csv").write_text("id,n\n" + "".join(f"{row['id']},{row['n']}\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.csv", row_group_size=900)
    found = sampled(tmp_path, "a.csv")
    read = found.columns["id"].to_list()
    assert (
        len({*read}) == len(read) <= 0.8 * size or size == len(read) == 1700
    )  # whose end begins where its beginning ends
    assert (read[0], read[-1], found.to_its_end) == ("r000000", rows[-1]["id"], True)
    assert found.rows == pytest.approx(size, rel=0.3)


def test_a_compressed_file_that_is_not_read_to_its_end_says_so(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sample, "PIECE_ROWS", 100)
    monkeypatch.setattr(text, "BLOCK_BYTES", 4_000)
    with gzip.open(tmp_path / "a.csv.gz", "wt") as file:
        file.write("id,n\n" + "".join(f"r{i},{i}\n" for i in range(5000)))
    found = sampled(tmp_path, "a.csv.gz")
    assert not found.to_its_end
    assert found.height == 100


def test_values_with_line_breaks_are_told_from_stray_quotes(tmp_path: Path) -> None:
    rows = [[f"u{i}", f"two\nlines {i}" if i % 3 else "one", str(i)] for i in range(50)]
    with (tmp_path / "breaks.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["user", "note", "n"], *rows])
    found = sampled(tmp_path, "breaks.csv")
    assert found.dialect.options == {"multiline": True}
    assert list(zip(*columns_read(found).values(), strict=True)) == [tuple(row) for row in rows]
    lines = ["user,note,n", *(f'u{i},"{i} inch disk,{i}' for i in range(50))]
    (tmp_path / "stray.csv").write_text("\n".join(lines))
    found = sampled(tmp_path, "stray.csv")
    assert found.dialect.options == {"quote": None}
    assert columns_read(found)["note"] == [f'"{i} inch disk' for i in range(50)]
    one = ["user,note,n", *(f'u{i},"a, {i}",{i}' for i in range(50)), 'u50,"5 inch disk,1', 'u51,"b, c",2']
    (tmp_path / "one.csv").write_text("\n".join(one))
    found = sampled(tmp_path, "one.csv")
    assert found.dialect.options == {}
    assert found.bad == 1


def test_spaces_around_values_are_trimmed(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("user, n, c\n" + "".join(f"u{i}, {i}, x\n" for i in range(20)))
    assert sampled(tmp_path, "a.csv").dialect.options == {"trim": True}


def test_a_header_in_which_a_name_stands_twice_is_one_and_no_row(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(
        "user,item,item,click\n" + "".join(f"u{i % 7},x{i % 3},z{i % 5},{i % 2}\n" for i in range(300))
    )
    found = sampled(tmp_path, "a.csv")
    assert columns_read(found) == {"user": [f"u{i % 7}" for i in range(300)], "click": [str(i % 2) for i in range(300)]}
    assert found.left_out == {"item": "several columns have this name"}
    # Without numbers below a name such a line may be one of values.
    for first, last, is_header in [
        ("x,x,b", "7", True),
        ("x,x,b", "w", False),
        ("x,x,", "7", False),
        ("x,x,1", "7", False),
    ]:
        (tmp_path / "a.csv").write_text(f"{first}\n" + "".join(f"u{i},v{i},{last}\n" for i in range(9)))
        assert ("columns" not in sampled(tmp_path, "a.csv").dialect.options) == is_header


RECORDS = [{"user": f"u{i}", "n": i, "x": i / 4, "tags": ["a", f"b{i % 3}"], "yes": i % 2 == 0} for i in range(40)]


def write_jsonl(path: Path) -> None:
    path.write_text("".join(json.dumps(record | {"deep": {"a": 1}}) + "\n" for record in RECORDS))


def write_parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([record | {"deep": {"a": 1}} for record in RECORDS]), path)


def write_avro(path: Path) -> None:
    kinds = {
        "user": "string",
        "n": "long",
        "x": "double",
        "tags": {"type": "array", "items": "string"},
        "yes": "boolean",
    }
    kinds["deep"] = {"type": "map", "values": "long"}
    schema = {"type": "record", "name": "row", "fields": [{"name": n, "type": t} for n, t in kinds.items()]}
    with path.open("wb") as file:
        fastavro.writer(file, fastavro.parse_schema(schema), [record | {"deep": {"a": 1}} for record in RECORDS])


@pytest.mark.parametrize(("form", "write"), [("jsonl", write_jsonl), ("parquet", write_parquet), ("avro", write_avro)])
def test_a_format_is_told_by_content_and_its_nested_columns_are_left_out(tmp_path: Path, form: str, write) -> None:
    write(tmp_path / "a.data")  # the name says nothing
    found = sampled(tmp_path, "a.data")
    assert found.dialect.options == {"format": form}
    assert set(found.left_out) == {"deep"}
    read = {name: column_of(name, values, False) for name, values in found.columns.items()}
    assert {name: column.kind for name, column in read.items()} == {
        "user": "text", "n": "int", "x": "float", "tags": "list", "yes": "text",
    }  # fmt: skip
    for name in ("user", "n", "x", "tags"):
        assert read[name].values.to_list() == [record[name] for record in RECORDS]
    assert read["yes"].values.to_list() == [str(record["yes"]).lower() for record in RECORDS]


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (gzip.compress(b"a,b\n1,2\n", mtime=0), "rename it to a.csv.gz"), ("a,b\n1,2\n".encode("utf-16"), "is UTF-16"),
        (b"a\0b", "is binary"), (b"\n\n", "is empty"), (b'[{"a": 1}]\n', "one JSON"), (b"PK\x03\x04zip", "is a ZIP"),
        (b"{a: 1}\n", "no objects"), (b"a,b\n", "has no rows"),
    ],
)  # fmt: skip
def test_what_is_no_log_is_named(tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(NoLogError, match=why):
        sampled(tmp_path, "a.csv")


MOMENTS = st.datetimes(datetime(1990, 1, 1), datetime(2099, 12, 31)).map(
    lambda moment: moment.replace(tzinfo=timezone.utc)
)


@settings(max_examples=examples(100), deadline=None)
@given(st.lists(MOMENTS, min_size=1, max_size=5), st.sampled_from([*UNITS, *FORMATS]))
def test_times_are_those_that_datetime_writes(moments: list[datetime], form: str) -> None:
    seconds = [(moment - datetime(1970, 1, 1, tzinfo=timezone.utc)) // timedelta(seconds=1) for moment in moments]
    if form in UNITS:
        texts = [str(second * UNITS[form]) for second in seconds]
    else:
        texts = [moment.strftime(form) for moment in moments]
        read = [datetime.strptime(text, form) for text in texts]
        seconds = [int(moment.replace(tzinfo=timezone.utc).timestamp()) for moment in read]
    found = moments_of(pl.Series([*texts, None]), "event_time")
    assert found is not None
    if found.unit != form:  # day and month may be either, and a date of numbers alone
        assert {found.unit, form} <= {*FORMATS, None, "s"}
        again = moments_of(pl.Series(texts), "event_time")
        assert again is not None
        return
    assert found.seconds.to_list() == [*seconds, None]


def test_numbers_are_times_only_where_name_or_order_says_so() -> None:
    ids = pl.Series([str(1_700_000_000 + 7919 * i % 1000) for i in range(200)])
    assert moments_of(ids, "item") is None
    assert moments_of(ids, "item_id") is None
    assert moments_of(ids, "created_at") is not None
    assert moments_of(pl.Series([str(1_700_000_000 + i) for i in range(200)]), "c5") is None  # ids given in turn
    assert moments_of(pl.Series([str(1_700_000_000 + i * i) for i in range(200)]), "c5") is not None
    assert moments_of(pl.Series(["250", "300"]), "watch_time") is None
    digits = {
        "20261101": "%Y%m%d",
        "2026110105": "%Y%m%d%H",
        "202611010500": "%Y%m%d%H%M",
        "20261101050000": "%Y%m%d%H%M%S",
    }
    for number, unit in digits.items():
        assert moments_of(pl.Series([number] * 3), "ts").unit == unit


def test_patterns_part_the_files_and_find_reads_them_back(tmp_path: Path) -> None:
    streams = {
        "impressions-{date}.csv": ["impressions-2026-11-01.csv", "impressions-2026-11-02.csv"],
        "event_1-{date}.csv": ["event_1-2026-11-01.csv"],
        "event_2-{date}.csv": ["event_2-2026-11-01.csv"],
        "part-*-of-*.parquet": ["part-00000-of-00002.parquet", "part-00001-of-00002.parquet"],
        "dt={date}/part-*.csv": ["dt=2026-11-01/part-0.csv", "dt=2026-11-02/part-1.csv"],
        "odd[[]x[*].csv": ["odd[x*.csv"],
        "ratings.csv": ["ratings.csv"],
    }
    for name in [name for names in streams.values() for name in names]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("a,b\n1,2\n")
    for name in (".hidden.csv", "README.md", "_SUCCESS"):
        (tmp_path / name).write_text("a,b\n1,2\n")
    groups = find_groups(str(tmp_path), None)
    days = {group.pattern: group.days for group in groups if group.days}
    assert days.pop("event_1-{date}.csv") == days.pop("event_2-{date}.csv") == [date(2026, 11, 1)]
    both = [date(2026, 11, 1), date(2026, 11, 2)]
    assert days == {"impressions-{date}.csv": both, "dt={date}/part-*.csv": both}
    found = {group.pattern: [Path(file.path) for file in group.files] for group in groups}
    assert found == {pattern: [tmp_path / name for name in names] for pattern, names in streams.items()}
    for pattern, names in streams.items():
        assert [Path(file.path) for file in find(str(tmp_path), pattern)] == [tmp_path / name for name in names]
    assert shape_of("2026-13-01.csv") == ("*.csv", [])  # no date


@pytest.mark.parametrize(
    ("names", "pattern", "days"),
    [
        (["export-2026-12-31/imp-2026-11-0{}.csv"], "export-2026-12-31/imp-{date}.csv", [1, 2, 3]),
        (["dt=2026-11-0{}/imp-2026-12-31.csv"], "dt={date}/imp-2026-12-31.csv", [1, 2, 3]),
        (["dt=2026-11-0{0}/imp-2026-11-0{0}.csv"], "dt={date}/imp-*.csv", [1, 2, 3]),
        (["run-2026-12-0{0}/imp-2026-11-0{0}.csv"], "run-*/imp-{date}.csv", [1, 2, 3]),
        (
            ["run-2026-12-01/2026-11-0{}.csv", "run-2026-12-02/2026-11-1{}.csv"],
            "run-*/{date}.csv",
            [1, 2, 3, 11, 12, 13],
        ),
        (["run-2026-12-31/2026-11-05-part-0{}.csv"], "run-2026-12-31/{date}-part-*.csv", [5]),
    ],
)
def test_of_several_dates_in_a_name_the_one_of_the_rows_is_the_day(
    tmp_path: Path, names: list[str], pattern: str, days: list[int]
) -> None:
    paths = [tmp_path / name.format(i) for name in names for i in (1, 2, 3)]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_text("a,b\n1,2\n")
    [group] = find_groups(str(tmp_path), None)
    assert group.pattern == pattern
    assert group.days == [date(2026, 11, day) for day in days]
    assert {Path(file.path) for file in group.files} == {*paths}
    assert find(str(tmp_path), pattern) == group.files


def test_an_error_of_the_storage_is_none_of_a_folder_without_logs(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError("403 Forbidden")

    monkeypatch.setattr(MemoryFileSystem, "glob", forbidden)
    with pytest.raises(
        UserError, match=r"^memory://b/logs: the storage reports an error: [^\[]*403 Forbidden\. Check address"
    ):
        find_groups("memory://b/logs", None)
