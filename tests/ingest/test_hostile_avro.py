"""Avro files that lie about their sizes, unpack to far more than they hold, or nest without end."""

import bz2
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fastavro
import pyarrow as pa
import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import memory_below
from test_blocks import WHOLE, read
from test_blocks_avro import AVRO, write

from features.errors import UserError
from pipeline.ingest import files
from pipeline.ingest.formats import avro, avro_limits, raw_format, units
from pipeline.ingest.formats.base import Wanted

SYNC = b"\7" * 16


def long(value: int) -> bytes:
    """Zig-zag and variable length, for numbers >= 0."""
    value, found = value << 1, bytearray()
    while value >= 0x80:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*found, value])


def by_hand(path: Path, schema: Any, blocks: list[tuple[int, bytes]], codec: str = "null") -> None:
    """A file whose blocks say what they want."""
    meta = {b"avro.schema": json.dumps(schema).encode(), b"avro.codec": codec.encode()}
    head = b"Obj\x01" + long(2) + b"".join(long(len(part)) + part for pair in meta.items() for part in pair) + b"\0"
    body = b"".join(long(count) + long(len(data)) + data + SYNC for count, data in blocks)
    path.write_bytes(head + SYNC + body)


def record(**fields: Any) -> dict[str, Any]:
    return {"type": "record", "name": "row", "fields": [{"name": n, "type": t} for n, t in fields.items()]}


def test_what_is_written_by_hand_can_be_read(tmp_path: Path) -> None:
    by_hand(tmp_path / "a.avro", record(n="long"), [(2, long(5) + long(6)), (0, b""), (1, long(7))])
    assert read(tmp_path, "a.avro", AVRO, {"n": "int"}) == ([(1, 5), (2, 6), (3, 7)], [])


@pytest.mark.parametrize("codec", ["deflate", "bzip2", "xz", "zstandard"])
def test_a_block_that_unpacks_to_too_much_is_refused_before_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codec: str
) -> None:
    monkeypatch.setattr(avro_limits, "BLOCK_LIMIT", 5 << 20)
    monkeypatch.setattr(avro_limits, "STEP_BYTES", 1 << 20)
    rows = [{"s": "x" * (1 << 20)} for _ in range(4)]
    if codec == "zstandard":  # fastavro may lack what it needs to read it
        block = pa.Codec("zstd").compress(long(8 << 20) + bytes(8 << 20), asbytes=True)
        by_hand(tmp_path / "a.avro", record(s="string"), [(1, block)], codec)
    else:
        write(tmp_path / "a.avro", {"s": "string"}, rows, codec=codec, sync_interval=1 << 30)
        assert len(read(tmp_path, "a.avro", AVRO, {"s": "string"})[0]) == 4
        write(tmp_path / "a.avro", {"s": "string"}, rows * 8, codec=codec, sync_interval=1 << 30)
    said = r"a\.avro: cannot be read to its end: the block at byte \d+ unpacks to more than"
    with memory_below(20 << 20), pytest.raises(UserError, match=said):
        read(tmp_path, "a.avro", AVRO, {"s": "string"})


def test_blocks_that_unpack_to_too_much_together_name_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "ALWAYS_ALLOWED_BYTES", 1 << 20)
    rows = [{"s": "x" * 1000} for _ in range(4000)]
    write(tmp_path / "a.avro", {"s": "string"}, rows, codec="deflate", sync_interval=100_000)
    [file] = files.find(str(tmp_path), "a.avro", max_unpack_ratio=50)
    with pytest.raises(UserError, match=r"a\.avro: .* bytes unpack to .* max_unpack_ratio=50"):
        list(raw_format(AVRO).read(units([file], AVRO, WHOLE)[0], Wanted({"s": "string"}), lambda _: None))
    [file] = files.find(str(tmp_path), "a.avro")
    blocks = raw_format(AVRO).read(units([file], AVRO, WHOLE)[0], Wanted({"s": "string"}), lambda _: None)
    assert sum(block.columns.num_rows for block in blocks) == 4000


@pytest.mark.parametrize("codec", ["snappy", "lz4"])
def test_a_size_before_the_data_is_not_believed(tmp_path: Path, codec: str) -> None:
    data = b"\xff\xff\xff\xff\x0f" + b"x" * 20 if codec == "snappy" else b"\xff\xff\xff\x7f" + b"x" * 20
    by_hand(tmp_path / "a.avro", record(n="long"), [(1, data)], codec)
    with pytest.raises(
        UserError, match=r"a\.avro: cannot be read to its end: the block at byte \d+ unpacks to more than"
    ):
        read(tmp_path, "a.avro", AVRO, {"n": "int"})


def test_a_second_stream_in_a_block_is_refused(tmp_path: Path) -> None:
    by_hand(tmp_path / "a.avro", record(n="long"), [(1, bz2.compress(long(5)) + bz2.compress(b"0" * 9999))], "bzip2")
    with pytest.raises(UserError, match=r"a\.avro: cannot be read to its end: bytes follow the data of a block"):
        read(tmp_path, "a.avro", AVRO, {"n": "int"})


@pytest.mark.parametrize(("count", "length"), [(1 << 60, 1), (2, 1 << 50), (-1, 2), (1, -40)])
def test_counts_and_lengths_that_cannot_be_are_refused(tmp_path: Path, count: int, length: int) -> None:
    def zigzag(value: int) -> bytes:
        return long(value) if value >= 0 else bytes([(-value * 2 - 1) & 0x7F])

    by_hand(tmp_path / "a.avro", record(n="long"), [])
    head = (tmp_path / "a.avro").read_bytes()
    (tmp_path / "a.avro").write_bytes(head + zigzag(count) + zigzag(length) + long(5) + SYNC)
    for unit_bytes in (1, WHOLE):
        with pytest.raises(UserError, match=r"a\.avro: cannot be read to its end"):
            read(tmp_path, "a.avro", AVRO, {"n": "int"}, unit_bytes)


def test_a_number_without_an_end_is_refused(tmp_path: Path) -> None:
    by_hand(tmp_path / "a.avro", record(n="long"), [])
    (tmp_path / "a.avro").write_bytes((tmp_path / "a.avro").read_bytes() + b"\xff" * 100_000)
    for unit_bytes in (1, WHOLE):
        with pytest.raises(UserError, match=r"a\.avro: cannot be read to its end: a number has too many bytes"):
            read(tmp_path, "a.avro", AVRO, {"n": "int"}, unit_bytes)


def doubling(depth: int) -> Any:
    """A record of two records of two records ..., each but the innermost named once."""
    kind: Any = {"type": "record", "name": "r0", "fields": [{"name": "n", "type": "null"}]}
    for level in range(1, depth):
        fields = [{"name": "a", "type": kind}, {"name": "b", "type": f"r{level - 1}"}]
        kind = {"type": "record", "name": f"r{level}", "fields": fields}
    return kind


NODE = {"type": "record", "name": "node", "fields": [{"name": "next", "type": ["null", "node"]}]}
REFUSED = {
    "holds itself": NODE,
    "more than 100000 types": doubling(60),
    "items without bytes": {"type": "array", "items": "null"},
    "items without": {"type": "array", "items": {"type": "fixed", "name": "nothing", "size": 0}},
    "items": {"type": "array", "items": {"type": "record", "name": "none", "fields": []}},
}


@pytest.mark.parametrize("words", REFUSED)
def test_types_that_unpack_without_end_are_refused_whoever_reads_them(tmp_path: Path, words: str) -> None:
    by_hand(tmp_path / "a.avro", record(n="long", x=REFUSED[words]), [(1, long(5) + b"\2" * 2_000_000 + b"\0")])
    with pytest.raises(UserError, match=rf"a\.avro: cannot be read: .*{words}") as caught:
        read(tmp_path, "a.avro", AVRO, {"n": "int"})
    assert "\n" not in str(caught.value)


def test_types_named_several_times_are_read_as_ever(tmp_path: Path) -> None:
    point = {"type": "record", "name": "a.point", "fields": [{"name": "x", "type": "int"}]}
    kinds = {
        "n": "long",
        "p": point,
        "q": ["null", "a.point"],
        "r": {"type": "map", "values": "a.point"},
        "s": doubling(6),
    }
    nested: Any = {"n": None}
    for _ in range(5):
        nested = {"a": nested, "b": nested}
    rows = [{"n": i, "p": {"x": i}, "q": None, "r": {"k": {"x": 1}}, "s": nested} for i in range(5)]
    write(tmp_path / "a.avro", kinds, rows)
    assert read(tmp_path, "a.avro", AVRO, {"n": "int"})[0] == [(i + 1, i) for i in range(5)]


def test_records_of_a_large_block_are_objects_a_few_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(avro, "BLOCK_ROWS", 100)
    sizes = []
    columns = avro._columns

    def counted(records: list[Any], kinds: Any) -> Any:
        sizes.append(len(records))
        return columns(records, kinds)

    monkeypatch.setattr(avro, "_columns", counted)
    write(tmp_path / "a.avro", {"n": "long"}, [{"n": i} for i in range(250)], sync_interval=1 << 20)
    assert read(tmp_path, "a.avro", AVRO, {"n": "int"})[0] == [(i + 1, i) for i in range(250)]
    assert sizes == [100, 100, 50]
    monkeypatch.setattr(avro, "BLOCK_BYTES", 500)
    assert read(tmp_path, "a.avro", AVRO, {"n": "int"})[0] == [(i + 1, i) for i in range(250)]


def mutations(data: bytes) -> Iterator[Any]:
    yield st.builds(
        lambda at, byte: data[:at] + bytes([byte]) + data[at + 1 :], st.integers(0, len(data) - 1), st.integers(0, 255)
    )
    yield st.builds(lambda at, more: data[:at] + more + data[at:], st.integers(0, len(data)), st.binary(max_size=12))
    yield st.builds(lambda at, end: data[:at] + data[end:], st.integers(0, len(data)), st.integers(0, len(data)))


SINK = io.BytesIO()
fastavro.writer(
    SINK, record(n="long", s=["null", "string"], l={"type": "array", "items": "int"}),
    [{"n": i, "s": "x" * i, "l": list(range(i))} for i in range(20)], codec="deflate", sync_interval=50,
)  # fmt: skip


@settings(max_examples=examples(150), deadline=None)
@given(st.one_of(*mutations(SINK.getvalue())), st.sampled_from([1, WHOLE]))
def test_whatever_is_changed_in_a_file_it_is_read_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, unit_bytes: int
) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "random.avro").write_bytes(data)
    message = ""
    try:
        rows, _ = read(folder, "random.avro", AVRO, {"n": "int", "s": "string", "l": "string"}, unit_bytes)
        assert len(rows) <= 1000
    except UserError as error:
        message = str(error)
    assert "\n" not in message
