"""Lines that are too long, too deep or no text: each costs itself only, in time and memory that grow with its length."""

import bz2
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from csv_by_hand import by_hand, with_a_line_end
from examples import examples
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ingest_runs import dead_letters_of, no_beam, refused, rows_by_id, run
from memory import memory_below
from test_blocks import WHOLE, blocks_of, read

from features.errors import UserError
from features.schema.schema import Schema
from features.source import Format
from pipeline.ingest.files import BOM
from pipeline.ingest.formats import text
from pipeline.ingest.formats.csv_quotes import Quotes
from pipeline.ingest.formats.csv_rows import FURTHER
from pipeline.ingest.formats.text import NOT_UTF8, SHOWN_BYTES, whole_lines

COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes, ".gz": gzip.compress, ".bz2": bz2.compress,
    ".zst": lambda data: pa.Codec("zstd").compress(data, asbytes=True), ".lz4": lambda data: lz4(data),
}  # fmt: skip


def lz4(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "lz4") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def too_long(line: bytes, limit: int, what: str = "line") -> str:
    return f"{what} of {len(line)} bytes is longer than max_line_bytes={limit}"


PIECES = st.sampled_from([b"a", b",", b'"', b"\n", b"\n", b"\r", b"\r\n", "é".encode(), b"\xff", b"x,y\n", b"a" * 9])


@settings(max_examples=examples(300), deadline=None)
@given(
    data=st.lists(PIECES, max_size=40).map(b"".join),
    limit=st.integers(1, 12),
    unit_bytes=st.integers(1, 40),
    block_bytes=st.integers(1, 40),
)
@example(data=b"x,y\n" + b"a" * 50 + b"\nx,y\n", limit=5, unit_bytes=7, block_bytes=3)
@example(data=BOM + b"a" * 50, limit=5, unit_bytes=7, block_bytes=3)
@example(data=b"x,yz\r\nx,y\r\n", limit=4, unit_bytes=40, block_bytes=40)
def test_lines_are_those_of_a_reading_line_by_line_where_longer_ones_are_bad(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, limit: int, unit_bytes: int, block_bytes: int
) -> None:
    folder, data = tmp_path_factory.getbasetemp(), with_a_line_end(data)
    expected = by_hand(data, 2, limits=(1000, limit), wanted=1)
    for ending, compress in COMPRESSIONS.items():
        (folder / f"random.csv{ending}").write_bytes(compress(data))
        format = Format(columns=["a", "b"], max_line_bytes=limit)
        with blocks_of(block_bytes):
            found = read(folder, f"random.csv{ending}", format, {"a": "string"}, unit_bytes, spans=True)
        assert found == expected


@settings(max_examples=examples(100), deadline=None)
@given(
    st.lists(st.integers(0, 40), max_size=12), st.integers(8, 40), st.integers(1, 60), st.integers(1, 60), st.booleans()
)
def test_every_json_line_is_a_row_or_a_dead_letter_once(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], limit: int, unit_bytes: int, block: int, ends: bool
) -> None:
    folder = tmp_path_factory.getbasetemp()
    lines = [json.dumps({"a": "x" * size}) for size in sizes]
    (folder / "random.jsonl").write_text("\n".join(lines) + "\n" * ends)
    format = Format(format="jsonl", max_line_bytes=limit)
    with blocks_of(block):
        rows, bad = read(folder, "random.jsonl", format, {"a": "string"}, unit_bytes)
    assert rows == [(n, "x" * sizes[n - 1]) for n, line in enumerate(lines, 1) if len(line) <= limit]
    assert bad == [(n, too_long(line.encode(), limit), line) for n, line in enumerate(lines, 1) if len(line) > limit]


def test_of_a_long_line_the_beginning_is_kept_and_no_character_is_cut(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b\n1,x\n" + "ö" * (1 << 20) + "\r\n2,y\n")
    rows, [(line, reason, raw)] = read(tmp_path, "a.csv", Format(), {"b": "string"})
    assert rows == [(2, "x"), (4, "y")]
    assert (line, reason) == (3, "line of 2097153 bytes is longer than max_line_bytes=1048576")
    assert raw == "ö" * (SHOWN_BYTES // 2) + "…"


def test_a_line_of_the_limit_is_read_as_usual(tmp_path: Path) -> None:
    wide = "x" * ((1 << 20) - 2)
    (tmp_path / "a.csv").write_text(f"a,b\n1,{wide}\n2,{wide}x\n")
    rows, bad = read(tmp_path, "a.csv", Format(), {"b": "string"})
    assert rows == [(2, wide)]
    assert [line for line, *_ in bad] == [3]


def test_a_line_of_many_pieces_takes_neither_their_memory_nor_the_square_of_their_number() -> None:
    copied = 0

    class Piece(bytes):
        def __getitem__(self, key: Any) -> Any:
            nonlocal copied
            found = super().__getitem__(key)
            copied += len(found) if isinstance(found, bytes) else 0
            return found

    size, count = 1 << 16, 1 << 10
    with memory_below(2 << 20):
        pieces = (Piece(b"x" * size) for _ in range(count))
        [lines] = whole_lines(pieces, 1 << 18)
    assert [(line.index, line.size, len(line.beginning)) for line in lines.long] == [(0, size * count, SHOWN_BYTES)]
    assert lines.data == b"\n"
    assert copied < 1 << 20


def test_units_within_a_long_line_do_not_read_it_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.csv").write_bytes(b"x,y\n" + b"a" * 100_000 + b"\nx,y\n")
    taken = 0
    pieces = text._pieces

    def counted(stream: Any, start: int, stop: int | None) -> Any:
        nonlocal taken
        before = stream.tell()
        yield from pieces(stream, start, stop)
        taken += stream.tell() - max(start - 1, before)

    monkeypatch.setattr(text, "_pieces", counted)
    format = Format(columns=["a", "b"], max_line_bytes=100)
    with blocks_of(512):
        rows, bad = read(tmp_path, "a.csv", format, {"a": "string"}, 1000)
    assert ([line for line, *_ in rows], [line for line, *_ in bad]) == ([1, 3], [2])
    assert taken < 250_000


@pytest.mark.parametrize("ending", COMPRESSIONS)
@pytest.mark.parametrize("multiline", [False, True])
def test_a_header_may_be_as_long_as_a_line(tmp_path: Path, ending: str, multiline: bool) -> None:
    names = [f"column{i}" for i in range(40_000)]  # more than the first bytes of a file that are read at once
    (tmp_path / f"a.csv{ending}").write_bytes(
        COMPRESSIONS[ending](",".join(names).encode() + b"\n" + b"1," * 39_999 + b"2\n")
    )
    format = Format(multiline=multiline)
    rows, bad = read(tmp_path, f"a.csv{ending}", format, {names[-1]: "string"})
    assert (rows, bad) == ([(2, "2")], [])
    short = Format(multiline=multiline, max_line_bytes=400_000)
    with pytest.raises(
        UserError, match=r"a\.csv\S*: its header line is longer than max_line_bytes=400,000\. Fix it"
    ) as caught:
        read(tmp_path, f"a.csv{ending}", short, {names[-1]: "string"})
    assert "\n" not in str(caught.value)


def test_a_header_follows_any_number_of_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("\n" * 600_000 + "a,b\n1,x\n")
    assert read(tmp_path, "a.csv", Format(), {"b": "string"}) == ([(600_002, "x")], [])


def test_a_row_of_several_lines_that_is_too_long_is_a_bad_row(tmp_path: Path) -> None:
    wide = "x\n" * 600
    text = f'1,x,y\n2,"{wide}",z\n3\n4,"{wide[:900]}",w\n5,v,u\n'
    (tmp_path / "a.csv").write_text("a,b,c\n" + text)
    format = Format(multiline=True, max_line_bytes=1000)
    rows, bad = read(tmp_path, "a.csv", format, {"a": "int", "b": "string"})
    assert rows == [(2, 1, "x"), (605, 4, wide[:900]), (1056, 5, "v")]
    assert bad[0] == (
        3,
        "a quote is not closed within max_line_bytes=1000 bytes: set quote: null where quotes are plain characters",
        '2,"x',
    )
    assert [line for line, *_ in bad] == list(range(3, 605))
    expected = by_hand(text.encode(), 3, multiline=True, limits=(1000, 1000))
    assert [(line + 1, reason, raw) for line, reason, raw, _ in expected[1]] == bad


def test_a_row_that_does_not_end_costs_its_first_line_only(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('a,b\n1,"' + "x,y\n" * (1 << 14))
    with blocks_of(1 << 12):
        rows, bad = read(tmp_path, "a.csv", Format(multiline=True), {"b": "string"})
    assert [line for line, *_ in rows] == list(range(3, (1 << 14) + 2))
    assert bad == [
        (
            2,
            "a quote is not closed within max_row_lines=1000 lines: set quote: null where quotes are plain characters",
            '1,"x,y',
        )
    ]


@pytest.mark.parametrize("multiline", [False, True])
@pytest.mark.parametrize("line", ['b",x,"', 'a,"', 'a,"x', '"""', 'a,b,"",""', '5" x,"'])
def test_quotes_that_are_open_in_every_line_are_not_followed_through_the_file_from_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, multiline: bool
) -> None:
    data = f"{line}\n".encode() * 5000
    (tmp_path / "a.csv").write_bytes(data)
    followed, row = 0, Quotes.row

    def counted(self: Quotes, data: bytes, start: int, *given: Any) -> Any:
        nonlocal followed
        found = row(self, data, start, *given)
        followed += found.end - start
        return found

    monkeypatch.setattr(Quotes, "row", counted)
    rows, bad = read(tmp_path, "a.csv", Format(columns=["a", "b", "c"], multiline=multiline), {"a": "string"}, 10_000)
    assert len(rows) + len(bad) > 0
    assert followed < len(data) * (2 * 3 + FURTHER + 10)


BAD_JSON = {
    "open arrays": b'{"a": ' + b"[" * 1_000_000, "closed arrays": b'{"a": ' + b"[" * 400_000 + b"]" * 400_000 + b"}",
    "objects": b'{"a":' * 200_000, "digits": b'{"a": ' + b"9" * 1_000_000 + b"}", "exponent": b'{"a": 1e400}',
    "unread": b'{"z": ' + b"9" * 3000 + b', "a": 1}', "not utf-8": b'{"a": "' + b"\xff" * 1000 + b'"}',
    "nan": b'{"a": NaN}', "infinity": b'{"a": [-Infinity]}', "surrogate": b'{"a": "\\udc00"}', "nul": b"\0" * 1000,
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_JSON)
@pytest.mark.parametrize("lists", [{}, {"a": "|"}])
def test_json_that_no_reader_takes_is_a_dead_letter_however_deep(
    tmp_path: Path, name: str, lists: dict[str, str]
) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"a": "1"}\n' + BAD_JSON[name] + b'\n{"a": "2"}\n')
    rows, [(line, reason, _)] = read(tmp_path, "a.jsonl", Format(format="jsonl"), {"a": "string"}, lists=lists)
    assert [line for line, _ in rows] == [1, 3]
    assert line == 2
    assert reason.startswith("not ")
    assert len(reason) < 400


def test_json_that_only_one_reader_takes_is_not_searched_for_line_by_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        b"".join(b'{"a": %d, "b": NaN}\n{"a": 1e999}\n{"a": 1}\n' % i for i in range(5000))
    )
    calls = 0
    from pipeline.ingest.formats.jsonl import JsonParser

    real = JsonParser._read

    def counted(self: JsonParser, data: bytes) -> Any:
        nonlocal calls
        calls += 1
        return real(self, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JsonParser, "_read", counted)
        rows, bad = read(tmp_path, "a.jsonl", Format(format="jsonl"), {"a": "string"})
    assert (len(rows), len(bad)) == (5000, 10_000)
    assert calls < 10


@pytest.mark.parametrize(
    "value", [b'"' * 499_999, b'",' * 250_000, b'"",' * 150_000 + b'"x', b"\xff" * 500_000, b"," * 900_000]
)
def test_csv_lines_of_quotes_or_commas_cost_themselves_only(tmp_path: Path, value: bytes) -> None:
    (tmp_path / "a.csv").write_bytes(b"a,b\n1,x\n" + value + b"\n2,y\n")
    rows, bad = read(tmp_path, "a.csv", Format(), {"a": "int", "b": "string"})
    assert [line for line, *_ in rows] == [2, 4]
    assert [line for line, *_ in bad] == [3]


def test_lines_of_control_bytes_are_no_header_and_no_crash(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xff\xf0" * 1000)
    with pytest.raises(UserError, match=r"column a is missing"):
        read(tmp_path, "a.csv", Format(), {"a": "string"})


SCHEMA: dict[str, Any] = {
    "source": {"files": "log.csv", "types": {"y": "int"}},
    "categorical": {"item": {"dim": 4}},
    "tasks": {"click": {"kind": "binary", "label": "y"}},
    "split": {"by": "row_index", "modulo": 4, "train": [0, 1], "valid": [2], "test": [3]},
}


def test_the_limit_is_part_of_the_fingerprint_only_where_it_is_another_one() -> None:
    def fingerprint(**more: Any) -> str:
        return Schema.parse(SCHEMA | {"source": SCHEMA["source"] | more}, where="mine.yaml").fingerprint

    assert fingerprint() == fingerprint(max_line_bytes=1 << 20)
    assert fingerprint() != fingerprint(max_line_bytes=1 << 10)
    with pytest.raises(UserError, match=r"source\.max_line_bytes: .* less than or equal to 67108864"):
        fingerprint(max_line_bytes=1 << 30)


def log_with_a_long_line(folder: Path, size: int) -> Path:
    lines = [f"i{i},{i % 2}" for i in range(40)]
    lines[20] = "x" * size
    folder.mkdir()
    (folder / "log.csv").write_text("\n".join(["item,y", *lines]) + "\n")
    return folder


@pytest.mark.integration
@pytest.mark.parametrize("unit_bytes", [64, 1 << 20])
def test_a_long_line_is_one_dead_letter_of_the_dataset(tmp_path: Path, unit_bytes: int) -> None:
    content = SCHEMA | {"source": SCHEMA["source"] | {"max_line_bytes": 100}}
    content |= {"split": {"by": "hash", "key": "item", "valid": 0.2, "test": 0.2}}
    folder = log_with_a_long_line(tmp_path / "in", 5000)
    with no_beam():
        manifest = run(folder, tmp_path / "out", content, unit_bytes=unit_bytes, max_bad_fraction=0.1)
    assert manifest.read == {"impressions": 40}
    assert manifest.dead_letters == {"line is longer than max_line_bytes=100": 1}
    [letter] = dead_letters_of(tmp_path / "out")
    assert (letter["line"], letter["reason"]) == (22, "line of 5000 bytes is longer than max_line_bytes=100")
    assert letter["raw"] == "x" * SHOWN_BYTES + "…"
    assert len(rows_by_id(tmp_path / "out")) == 39


@pytest.mark.integration
def test_too_many_long_lines_stop_the_job_with_one_short_line(tmp_path: Path) -> None:
    folder = log_with_a_long_line(tmp_path / "in", 2 << 20)
    with no_beam():
        message = refused(folder, tmp_path / "out", SCHEMA)
    assert "log.csv, line 22: line of 2097152 bytes is longer than max_line_bytes=1048576" in message
    content = SCHEMA | {"source": {"files": "log.csv", "types": {"y": "float"}}}
    (folder / "log.csv").write_text("item,y\n" + "a,0\n" * 8 + "a," + "7" * 500_000 + "x\n")
    with no_beam():
        message = refused(folder, tmp_path / "out", content)
    assert "line 10: y: '777" in message
    assert len(message) < 1000


def test_bytes_that_are_no_text_have_the_reason_they_always_had(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"a,b\n1,x\n2,\xff\n")
    assert read(tmp_path, "a.csv", Format(), {"b": "string"}, WHOLE)[1] == [(3, NOT_UTF8, "2,�")]
