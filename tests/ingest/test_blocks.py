"""Blocks of rows against a plain reading of the same bytes, a line at a time by Python's csv and json modules."""

import bz2
import csv
import gzip
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from csv_by_hand import by_hand, with_a_line_end
from examples import examples
from hypothesis import example, given, settings
from hypothesis import strategies as st

from features.errors import UserError
from features.source import Format
from pipeline.ingest.files import BOM, find
from pipeline.ingest.formats import check_columns, raw_format, text, units
from pipeline.ingest.formats.base import LineCounts, Wanted
from pipeline.ingest.formats.text import NOT_UTF8

WHOLE = 1 << 40
TYPES = {"n": "int", "x": "float", "s": "string"}
ROWS: list[dict[str, Any]] = [
    {"n": 1, "x": 0.5, "s": "plain"},
    {"n": -20, "x": 3e10, "s": 'a "quoted", with a comma'},
    {"n": 300, "x": -7.25, "s": "Köln"},
]


def read(
    folder: Path,
    name: str,
    format: Format,
    types: Mapping[str, Any],
    unit_bytes: int = WHOLE,
    lists: Mapping[str, str] | None = None,
    spans: bool = False,
) -> tuple[list[tuple], list[tuple]]:
    """All rows of a file as (line, values...) and its bad lines, numbered in the file, after a look at their order.

    With `spans` a bad line has the number of its lines.
    """
    [file] = find(str(folder), name)
    names = check_columns(file, format, list(types))
    rows, bad, before, counts = [], [], 0, LineCounts()
    for unit in units([file], format, unit_bytes):
        count, line_count = 0, 0
        for block in raw_format(format).read(unit, Wanted(types, names, lists or {}), lambda _: None):
            assert block.columns.column_names == list(types)
            assert block.row == count
            count += block.columns.num_rows
            line_count += block.line_count
            lines = [before + int(line) for line in block.line_numbers()]
            rows += [(line, *row.values()) for line, row in zip(lines, block.columns.to_pylist(), strict=True)]
            bad += [(before + each.line, each.reason, each.raw, each.lines)[: 4 if spans else 3] for each in block.bad]
            counts += block.counts
        before += line_count
    assert [line for line, *_ in rows] == sorted({line for line, *_ in rows})
    if format.format in ("csv", "jsonl"):
        assert counts.physical == before == counts.header + counts.blank + counts.rows + counts.dead_letters
        if name.endswith((".csv", ".jsonl")):
            data = (folder / name).read_bytes()
            assert before == data.count(b"\n") + (data[-1:] not in (b"", b"\n"))
    return rows, bad


@contextmanager
def blocks_of(size: int) -> Iterator[None]:
    with mock.patch.object(text, "BLOCK_BYTES", size), mock.patch.object(text, "TAIL_BYTES", max(size // 2, 1)):
        yield


LINES = [b"x,y\n", b'"p, q",r\n', b"z,\xff\n", b"\n\n"]
PIECES = st.sampled_from(
    [
        b"a",
        b"b",
        b",",
        b",",
        b'"',
        b"\n",
        b"\n",
        b"\r",
        b" ",
        "é".encode(),
        b"\xff",
        b'""',
        b"\r\n",
        b"\n" + BOM,
        *LINES,
    ]
)


@settings(max_examples=examples(300), deadline=None)
@given(
    data=st.lists(PIECES, max_size=30).map(b"".join),
    columns=st.integers(1, 3),
    unit_bytes=st.integers(1, 40),
    block_bytes=st.integers(1, 40),
    quote=st.sampled_from(['"', None]),
)
@example(data=b'x,"y\n\n', columns=2, unit_bytes=5, block_bytes=9, quote='"')  # takes in nothing but blank lines
@example(data=b'x"y,"z', columns=2, unit_bytes=3, block_bytes=9, quote='"')
@example(data=BOM + b'"x",y\r\n"v""w",z', columns=2, unit_bytes=4, block_bytes=3, quote='"')
@example(data=b'"a""b,c\nd,e\n', columns=2, unit_bytes=40, block_bytes=40, quote='"')
@example(
    data=b'p,q\r"\n",r\n', columns=2, unit_bytes=40, block_bytes=40, quote='"'
)  # as many rows as lines, but others
@example(data=b"a,b\n" + BOM + b"a,b\n", columns=2, unit_bytes=4, block_bytes=4, quote='"')
def test_lines_cut_anywhere_are_those_of_a_reading_line_by_line(
    tmp_path_factory: pytest.TempPathFactory,
    data: bytes,
    columns: int,
    unit_bytes: int,
    block_bytes: int,
    quote: str | None,
) -> None:
    folder, data = tmp_path_factory.getbasetemp(), with_a_line_end(data)
    (folder / "random.csv").write_bytes(data)
    format = Format(columns=["a", "b", "c"][:columns], quote=quote)
    expected = by_hand(data, columns, quote, wanted=1)
    assert read(folder, "random.csv", format, {"a": "string"}, spans=True) == expected
    with blocks_of(block_bytes):
        assert read(folder, "random.csv", format, {"a": "string"}, unit_bytes, spans=True) == expected


JSON_LINES = st.sampled_from(
    ['{"a": 1, "b": ["x", 2]}', '{"b": "p|q"}', '{"a": "é"}', "5", "[1]", '{"a":', "", " ", "{}", '{"b": []}', "null"]
)


@settings(max_examples=examples(150), deadline=None)
@given(st.lists(JSON_LINES, max_size=12), st.integers(1, 60), st.booleans())
def test_json_lines_cut_anywhere_are_those_of_a_reading_line_by_line(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], unit_bytes: int, ends: bool
) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "random.jsonl").write_text("\n".join(lines) + "\n" * ends)
    rows, bad = [], []
    for number, line in enumerate(lines, 1):
        try:
            found = json.loads(line)
        except ValueError:
            bad += [(number, line)] if line.strip() else []
            continue
        if isinstance(found, dict):
            items = found.get("b")
            items = items.split("|") if isinstance(items, str) else items and [str(i) for i in items]
            rows.append((number, None if "a" not in found else str(found["a"]), items))
        else:
            bad.append((number, line))
    for size in (WHOLE, unit_bytes):
        types = {"a": "string", "b": "string"}
        got, faults = read(folder, "random.jsonl", Format(format="jsonl"), types, size, {"b": "|"})
        # A block where no value is a list has text, which the reader of the block splits.
        assert [(n, a, b.split("|") if isinstance(b, str) else b) for n, a, b in got] == rows
        assert [(line, raw) for line, _, raw in faults] == bad


def as_csv(delimiter: str = ",", quoting: int = csv.QUOTE_MINIMAL, end: str = "\n") -> bytes:
    lines = []
    for row in [dict(zip(TYPES, TYPES, strict=True)), *ROWS]:
        values = [f'"{value}"' if quoting == csv.QUOTE_ALL else str(value) for value in list(row.values())[:2]]
        quoted = '"' + str(row["s"]).replace('"', '""') + '"'
        lines.append(delimiter.join([*values, quoted]) + end)
    return "".join(lines).encode()


JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
FILES: dict[str, tuple[bytes, dict[str, Any]]] = {
    "a.csv": (as_csv(), {}),
    "windows.csv": (BOM + as_csv(end="\r\n"), {}),
    "last.csv": (as_csv().removesuffix(b"\n"), {}),
    "a.tsv": (as_csv("\t"), {"delimiter": "\t"}),
    "quoted.csv": (as_csv(quoting=csv.QUOTE_ALL), {}),
    "multiline.csv": (as_csv(), {"multiline": True}),
    "a.csv.gz": (gzip.compress(as_csv()[:40]) + gzip.compress(as_csv()[40:]), {}),
    "a.csv.bz2": (bz2.compress(as_csv()), {}),
    "a.csv.zst": (pa.Codec("zstd").compress(as_csv(), asbytes=True), {}),
    "multiline.csv.gz": (gzip.compress(as_csv()), {"multiline": True}),
    "bom.jsonl": (BOM + JSONL, {"format": "jsonl"}),
    "a.jsonl": (JSONL, {"format": "jsonl"}),
    "a.jsonl.gz": (gzip.compress(JSONL), {"format": "jsonl"}),
}


@pytest.mark.parametrize("name", [*FILES, "a.parquet"])
def test_the_same_rows_come_out_of_every_format_and_compression(tmp_path: Path, name: str) -> None:
    data, options = FILES.get(name, (b"", {"format": "parquet"}))
    (tmp_path / name).write_bytes(data)
    if name == "a.parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / name)
    rows, bad = read(tmp_path, name, Format(**options), TYPES)
    assert [{"n": int(n), "x": float(x), "s": s} for _, n, x, s in rows] == ROWS
    assert bad == []
    assert [line for line, *_ in rows] == ([1, 2, 3] if options.get("format") else [2, 3, 4])


NUMBERS = st.one_of(
    st.integers(-(2**63), 2**63 - 1).map(str),
    st.floats().map(str),
    st.sampled_from(
        ["", "NA", "7 ", "\t8", "0x1F", "1e400", "nan(1)", "+5", "5.", "12345678901234567890", "1e3", "?", "-0"]
    ),
)


def whole(text: str) -> int:
    """Decimal, or hexadecimal as pyarrow reads it."""
    return int(text, 16) if "0x" in text.lower() else int(text)


@settings(max_examples=examples(200), deadline=None)
@given(st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), min_size=1, max_size=4))
def test_numbers_are_those_of_their_text(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple]) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "numbers.csv").write_text("".join(",".join(row) + "\n" for row in rows))
    format = Format(columns=["n", "x", "t"], missing=["", "NA"])
    got, bad = read(folder, "numbers.csv", format, {"n": "int", "x": "float", "t": "time"})
    assert not bad
    for (_, *values), texts in zip(got, rows, strict=True):
        for value, shown, kind in zip(values, texts, (whole, float, whole), strict=True):
            if isinstance(value, str):
                assert value == shown
            elif value is None:
                assert shown in ("", "NA", "nan")
            else:
                assert value == kind(shown)
                assert math.isfinite(value)


def test_a_bad_number_changes_no_other_value(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("n,x,s\n1,1.5,a\n2,much,b\n3,2.5,c\n")
    rows, bad = read(tmp_path, "a.csv", Format(), TYPES)
    assert [(int(n), x, s) for _, n, x, s in rows] == [(1, "1.5", "a"), (2, "much", "b"), (3, "2.5", "c")]
    assert bad == []


def test_a_marker_that_is_a_number_is_missing_with_spaces_around_it_too(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("n\n 5\n -1\n")
    rows, _ = read(tmp_path, "a.csv", Format(trim=True, missing=["-1"]), {"n": "int"})
    assert rows == [(2, " 5"), (3, " -1")]  # text, for whoever strips it


def test_bytes_that_are_no_utf8_cost_their_line_only(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"a,b\n1,x\n\n2,K\xf6ln\n3\n4,K\xc3\xb6ln\n")
    rows, bad = read(tmp_path, "a.csv", Format(), {"b": "string"})
    assert rows == [(2, "x"), (6, "Köln")]
    assert bad == [(4, NOT_UTF8, "2,K�ln"), (5, "1 columns instead of 2", "3")]


def test_lines_before_the_header_count_as_lines(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'\r\n\n"a",b\n1,x\n\n3\n2,y')
    rows, bad = read(tmp_path, "a.csv", Format(), {"a": "int", "b": "string"}, unit_bytes=11)
    assert rows == [(4, 1, "x"), (7, 2, "y")]
    assert [line for line, *_ in bad] == [6]
    with blocks_of(2):
        assert read(tmp_path, "a.csv", Format(), {"a": "int", "b": "string"}) == (rows, bad)


def test_bad_lines_among_many_are_found_each(tmp_path: Path) -> None:
    lines = [f'{i},"text {i}"' for i in range(5000)]
    for i in range(0, 5000, 97):
        lines[i] = f'{i},"open {i}'
    (tmp_path / "a.csv").write_text("\n".join(["a,b", *lines]))
    rows, bad = read(tmp_path, "a.csv", Format(), {"a": "int", "b": "string"})
    assert [line for line, *_ in bad] == [i + 2 for i in range(0, 5000, 97)]
    assert rows == [(i + 2, i, f"text {i}") for i in range(5000) if i % 97]


def test_values_with_line_breaks_are_read_where_the_format_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('"a","b\nc"\n1,"x\ny"\n2\n3,"z ""w"""\n4,5,6\n7\n8,9\n')
    rows, bad = read(tmp_path, "a.csv", Format(multiline=True), {"b\nc": "string"})
    assert rows == [(3, "x\ny"), (6, 'z "w"'), (9, "9")]
    assert [line for line, *_ in bad] == [5, 7, 8]
    assert [reason for _, reason, _ in bad] == [f"{count} columns instead of 2" for count in (1, 3, 1)]


def test_where_values_hold_line_breaks_rows_are_numbered_by_their_first_lines(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('a,b\n\n1,"x\ny"\n\n\n2\n3,z\n')
    rows, bad = read(tmp_path, "a.csv", Format(multiline=True), {"b": "string"})
    assert rows == [(3, "x\ny"), (8, "z")]
    assert [line for line, *_ in bad] == [7]


def test_a_list_in_json_is_a_list_and_a_text_beside_it_is_split(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"l": [1, "b", null, true, 2.5]}\n{"l": "p|q"}\n{"l": "[r"}\n{"l": null}\n{}\n')
    lists = [["1", "b", None, "true", "2.5"], ["p", "q"], ["[r"], None, None]
    rows, _ = read(tmp_path, "a.jsonl", Format(format="jsonl"), {"l": "string"}, lists={"l": "|"})
    assert [row for _, row in rows] == lists


def test_json_that_only_one_reader_takes_costs_its_line_only(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n{"a": NaN}\n{"a": "\xff"}\n' + b'{"a": ' * 9999 + b'\n{"a": 2}\n')
    rows, bad = read(tmp_path, "a.jsonl", Format(format="jsonl"), {"a": "string"})
    assert rows == [(1, "1"), (5, "2")]
    assert [line for line, *_ in bad] == [2, 3, 4]
    assert [reason for _, reason, _ in bad][:2] == ["not JSON that can be read", NOT_UTF8]


def test_an_object_in_json_is_kept_as_its_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": {"k": [1, "x"]}}\n')
    [(_, value)], _ = read(tmp_path, "a.jsonl", Format(format="jsonl"), {"a": "string"})
    assert json.loads(value) == {"k": [1, "x"]}


@pytest.mark.parametrize("multiline", [False, True])
@pytest.mark.parametrize("cut", [20, -5])
def test_a_cut_gz_is_refused_in_one_line(tmp_path: Path, cut: int, multiline: bool) -> None:
    whole = gzip.compress("".join(f"{i},{i * i}\n" for i in range(50_000)).encode())
    (tmp_path / "a.csv.gz").write_bytes(whole[:cut])
    with pytest.raises(
        UserError, match=r"^\S+a\.csv\.gz: cannot be read.*: Truncated compressed stream\. Fetch it .*$"
    ):
        read(tmp_path, "a.csv.gz", Format(columns=["a", "b"], multiline=multiline), {"a": "int"})


def test_progress_ends_with_the_bytes_of_the_unit(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"a\n" + b"12345\n" * 1000)
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    pq.write_table(pa.table({"a": range(1000)}), tmp_path / "c.parquet", row_group_size=100)
    for name, kind in (("a.csv", "csv"), ("b.csv.gz", "csv"), ("c.parquet", "parquet")):
        [file] = find(str(tmp_path), name)
        format, total = Format(format=kind), 0
        for unit in units([file], format, 1000):
            noted: list[int] = []
            for _ in raw_format(format).read(unit, Wanted({"a": "int"}, ["a"]), noted.append):
                pass
            assert noted == sorted(noted)
            total += noted[-1]
        assert total == file.size or (kind == "parquet" and abs(total - file.size) <= 10)
