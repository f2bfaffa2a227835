"""CSV and JSON lines cut at every byte: units and blocks of any size give what one read of the whole file gives."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from csv_by_hand import by_hand, with_a_line_end
from examples import examples
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_blocks import WHOLE, blocks_of, read

from features.source import Format

PIECES = st.sampled_from(
    [b"a", b"b", b",", b",", b'"', b'"', b"\n", b"\n", b"\r", b"\r\n", b" ", b"\xff", b'""', b'"\n', b',"', b'",',
     b'x,"y\nz"\n', b'"p",q\n', b"r,s\n", b"\n\n", b'"a""b,c\n', "é".encode()]
)  # fmt: skip


@settings(max_examples=examples(200), deadline=None)
@given(
    data=st.lists(PIECES, max_size=40).map(b"".join),
    columns=st.integers(1, 3),
    multiline=st.booleans(),
    limits=st.tuples(st.integers(1, 5), st.integers(1, 60)),
    unit_bytes=st.integers(1, 60),
    block_bytes=st.integers(1, 60),
)
@example(data=b'a,"b\nc"\nd,e\n', columns=2, multiline=False, limits=(1, 60), unit_bytes=5, block_bytes=5)
@example(data=b'x,"\nb,"\nc,"\n', columns=2, multiline=False, limits=(5, 60), unit_bytes=5, block_bytes=60)
@example(data=b'u1,"x,y\nu2,z,w"\nu3,p,q\n', columns=3, multiline=True, limits=(5, 60), unit_bytes=9, block_bytes=60)
@example(
    data=b'a,"b\n' + b"c" * 20 + b'\nd"\n', columns=2, multiline=True, limits=(5, 15), unit_bytes=9, block_bytes=60
)
@example(data=b'a,"b\nc"\n', columns=2, multiline=False, limits=(5, 7), unit_bytes=99, block_bytes=99)  # as many bytes
@example(data=b'a,"b\nc"\n', columns=2, multiline=False, limits=(5, 6), unit_bytes=99, block_bytes=99)  # one too many
@example(data=b'a,"b\rc\nd"\n', columns=2, multiline=False, limits=(5, 60), unit_bytes=9, block_bytes=60)
@example(
    data=b'a,"b\n' + b"c" * 20 + b'\n"d\n', columns=2, multiline=True, limits=(5, 15), unit_bytes=9, block_bytes=60
)
@example(  # the last column in which quotes are followed, and the one after it
    data=b'a,"b\nc"' + b"," * 18 + b'"d"\ne,f\n',
    columns=2,
    multiline=True,
    limits=(5, 60),
    unit_bytes=99,
    block_bytes=99,
)
@example(
    data=b'a,"b\nc"' + b"," * 19 + b'"d"\ne,f\n',
    columns=2,
    multiline=True,
    limits=(5, 60),
    unit_bytes=99,
    block_bytes=99,
)
def test_rows_and_faults_are_those_of_a_reading_character_by_character(
    tmp_path_factory: pytest.TempPathFactory,
    data: bytes,
    columns: int,
    multiline: bool,
    limits: tuple[int, int],
    unit_bytes: int,
    block_bytes: int,
) -> None:
    folder = tmp_path_factory.getbasetemp()
    data = with_a_line_end(data)
    (folder / "random.csv").write_bytes(data)
    names = ["a", "b", "c"][:columns]
    format = Format(columns=names, multiline=multiline, max_row_lines=limits[0], max_line_bytes=limits[1])
    expected = by_hand(data, columns, '"', multiline, limits)
    types = dict.fromkeys(names, "string")
    assert read(folder, "random.csv", format, types, spans=True) == expected
    with blocks_of(block_bytes):
        assert read(folder, "random.csv", format, types, unit_bytes, spans=True) == expected


@settings(max_examples=examples(100), deadline=None)
@given(
    data=st.lists(PIECES, max_size=40).map(b"".join),
    delimiter=st.sampled_from([b"\t", b" "]),
    columns=st.integers(1, 3),
    multiline=st.booleans(),
    size=st.integers(1, 60),
)
@example(data=b'a,"b\n"c",d\n', delimiter=b"\t", columns=2, multiline=True, size=60)
@example(data=b'a,"b\n"c",d\n', delimiter=b" ", columns=2, multiline=True, size=60)
def test_a_delimiter_that_is_white_space_is_none_to_trim(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, delimiter: bytes, columns: int, multiline: bool, size: int
) -> None:
    folder, sign = tmp_path_factory.getbasetemp(), delimiter.decode()
    data = with_a_line_end(data.replace(b" ", b""))  # the one white space is the delimiter
    (folder / "trimmed.csv").write_bytes(data.replace(b",", delimiter))
    names = ["a", "b", "c"][:columns]
    rows, bad = by_hand(data, columns, '"', multiline)
    expected = (
        [(line, *(value.replace(",", sign) for value in values)) for line, *values in rows],
        [(line, reason, raw.replace(",", sign), lines) for line, reason, raw, lines in bad],
    )
    format = Format(columns=names, multiline=multiline, delimiter=sign, trim=True)
    with blocks_of(size):
        assert read(folder, "trimmed.csv", format, dict.fromkeys(names, "string"), size, spans=True) == expected


@pytest.mark.parametrize(("delimiter", "multiline"), [("\t", False), ("\t", True), (" ", False), (" ", True)])
def test_trim_leaves_the_delimiters_of_a_header_with_quotes(tmp_path: Path, delimiter: str, multiline: bool) -> None:
    with (tmp_path / "header.csv").open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter, quoting=csv.QUOTE_ALL).writerows([["a", "b"], ["1", "2"]])
    format = Format(delimiter=delimiter, multiline=multiline, trim=True)
    assert read(tmp_path, "header.csv", format, {"a": "string", "b": "string"}) == ([(2, "1", "2")], [])


# Files as they are: with line breaks and quotes in values, with CRLF, damaged in several ways, and JSON lines.
GOOD = b'user,note\r\nu1,"two\r\nlines"\r\n\r\nu2,"a ""b"", c"\r\nu3,5" disk\r\nu4,""\r\nu5,"""\r\n"\r\nu6,end'
DAMAGED = (
    b'user,note\nu1,ok\nu2,"5 inch disk\nu3,x\nu4,"y"z\nu5,"1\n2"\nu6,a\rb\nu7,"p\n\nq",r\nu8,\xff\nu9\n'
    b'u10,"s"\nu11,"open\n'
)
JSON = (
    b'{"user": "u1", "note": "a"}\n\n{"user": "u2"}\r\n[]\n{"user": "\xc3\xa9", "note": "b\\n"}\n{"user"\n{"note": "c"}'
)
FILES: dict[str, tuple[bytes, dict[str, Any]]] = {
    "good.csv": (GOOD, {"multiline": True}),
    "lines.csv": (GOOD, {}),
    "damaged.csv": (DAMAGED, {"max_row_lines": 4}),
    "multiline.csv": (DAMAGED, {"multiline": True, "max_row_lines": 4}),
    "plain.csv": (GOOD, {"quote": None}),
    "some.jsonl": (JSON, {"format": "jsonl"}),
}


@pytest.mark.parametrize("name", FILES)
def test_a_boundary_at_any_byte_changes_no_row_no_dead_letter_and_no_line_number(tmp_path: Path, name: str) -> None:
    data, options = FILES[name]
    (tmp_path / name).write_bytes(data)
    format, types = Format(**options), {"user": "string", "note": "string"}
    whole = read(tmp_path, name, format, types, spans=True)
    assert whole[0]
    for size in range(1, len(data) + 1):
        with blocks_of(size):
            assert read(tmp_path, name, format, types, WHOLE, spans=True) == whole
            assert read(tmp_path, name, format, types, size, spans=True) == whole
        if size < 16:  # units of many blocks
            with blocks_of(1 + size % 7):
                assert read(tmp_path, name, format, types, size, spans=True) == whole


def test_what_the_files_hold_is_what_a_person_sees_in_them(tmp_path: Path) -> None:
    types = {"user": "string", "note": "string"}

    def found(name: str) -> tuple[list[tuple], list[tuple]]:
        (tmp_path / name).write_bytes(FILES[name][0])
        rows, bad = read(tmp_path, name, Format(**FILES[name][1]), types, spans=True)
        return rows, [(line, lines, reason.partition(":")[0]) for line, reason, _, lines in bad]

    rows, bad = found("good.csv")
    assert [list(row) for _, *row in rows] == [
        row for row in csv.reader(io.StringIO(GOOD.decode(), newline="")) if row
    ][1:]
    assert rows == [
        (2, "u1", "two\r\nlines"), (5, "u2", 'a "b", c'), (6, "u3", '5" disk'), (7, "u4", ""), (8, "u5", '"\r\n'),
        (10, "u6", "end"),
    ]  # fmt: skip
    assert bad == []
    assert found("lines.csv") == (
        [row for row in rows if row[0] not in (2, 8)],
        [(2, 2, "a value with line breaks"), (8, 2, "a value with line breaks")],
    )
    lost = [
        (3, 1, "a quote is not closed"), (5, 1, "text after a closing quote"), (6, 2, "a value with line breaks"),
        (8, 1, "a carriage return within the line"), (9, 3, "3 columns instead of 2"), (12, 1, "not UTF-8"),
        (13, 1, "1 columns instead of 2"), (15, 1, "a quote is not closed"),
    ]  # fmt: skip
    rows = [(2, "u1", "ok"), (4, "u3", "x"), (14, "u10", "s")]
    assert found("damaged.csv") == (rows, lost)
    rows.insert(2, (6, "u5", "1\n2"))
    # The quote of line 3 is closed in line 5, where text follows it.
    lost[0] = (3, 1, "text after a closing quote")
    lost[3] = (8, 1, "a carriage return outside quotes")
    assert found("multiline.csv") == (rows, [each for each in lost if each[0] != 6])


VALUES = st.text(st.sampled_from(list('ab",;\n\r \té€')), max_size=6)


@settings(max_examples=examples(150), deadline=None)
@given(
    rows=st.lists(st.lists(VALUES, min_size=2, max_size=2), max_size=8),
    end=st.sampled_from(["\n", "\r\n"]),
    quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
    closed=st.booleans(),
    size=st.integers(1, 60),
)
def test_what_python_writes_as_csv_is_read_as_python_reads_it(
    tmp_path_factory: pytest.TempPathFactory, rows: list[list[str]], end: str, quoting: Any, closed: bool, size: int
) -> None:
    folder, sink = tmp_path_factory.getbasetemp(), io.StringIO(newline="")
    if quoting == csv.QUOTE_MINIMAL:  # where a return is written without quotes around it
        rows = [[value.replace("\r", "") for value in row] for row in rows]
    csv.writer(sink, quoting=quoting, lineterminator=end).writerows([["p", "q"], *rows])
    text = sink.getvalue() if closed else sink.getvalue().removesuffix(end)
    (folder / "written.csv").write_bytes(text.encode())
    again = [row for row in csv.reader(io.StringIO(text, newline="")) if row][1:]
    assert again == rows
    with blocks_of(size):
        found, bad = read(folder, "written.csv", Format(multiline=True), {"p": "string", "q": "string"})
    assert [list(row) for _, *row in found] == rows
    assert bad == []
    starts = [text.count("\n", 0, start) + 1 for start in _starts(text, end)]
    assert [line for line, *_ in found] == starts[1 : len(rows) + 1]


def _starts(text: str, end: str) -> list[int]:
    """Where rows begin in a text, by its quotes alone: writers leave none open."""
    return [0, *(i + len(end) for i in range(len(text)) if text.startswith(end, i) and text.count('"', 0, i) % 2 == 0)]


@settings(max_examples=examples(100), deadline=None)
@given(
    lines=st.lists(
        st.sampled_from(['{"a": 1}', '{"a": "x\\ny"}', "", "[1]", "{", '{"b": 2}', '{"a": "é"}']), max_size=10
    ),
    end=st.sampled_from(["\n", "\r\n"]),
    sizes=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
def test_json_lines_are_those_of_the_json_module_wherever_they_are_cut(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], end: str, sizes: tuple[int, int]
) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "random.jsonl").write_bytes(end.join(lines).encode())
    good, bad = [], []
    for number, line in enumerate(lines, 1):
        try:
            content = json.loads(line)
        except ValueError:
            bad += [number] if line else []
            continue
        if isinstance(content, dict):
            value = content.get("a")
            good.append((number, None if value is None else str(value)))
        else:
            bad.append(number)
    with blocks_of(sizes[1]):
        found = read(folder, "random.jsonl", Format(format="jsonl"), {"a": "string"}, sizes[0])
    assert (found[0], [line for line, *_ in found[1]]) == (good, bad)
