"""features/parquet_schema.py: a footer whose groups are nested 100,000 deep ends the process that asks pyarrow for it."""

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.errors import UserError
from features.parquet_limits import check_file
from features.parquet_schema import MAX_ELEMENTS, MAX_NESTING, check_nesting, check_nesting_of


def varint(number: int) -> bytes:
    found = b""
    while number > 127:
        number, found = number >> 7, found + bytes([number & 127 | 128])
    return found + bytes([number])


def group(children: int) -> bytes:
    """A SchemaElement: name (field 4), num_children (field 5, zigzag)."""
    return b"\x48\x01g" + b"\x15" + varint(2 * children) + b"\x00"


LEAF = b"\x15\x02\x25\x00\x18\x01x\x00"  # type INT32, required, named x


def file_with(elements: list[bytes], count: int | None = None) -> bytes:
    """A file that is a footer alone: version 1, the schema, no rows, no row groups."""
    head = b"\xfc" + varint(len(elements) if count is None else count)
    footer = b"\x15\x02\x19" + head + b"".join(elements) + b"\x16\x00\x19\x0c\x00"
    return b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1"


@pytest.mark.parametrize("depth", [MAX_NESTING + 1, 20_000, 100_000])
def test_columns_nested_without_end_are_refused_before_pyarrow_sees_them(tmp_path: Path, depth: int) -> None:
    (tmp_path / "a.parquet").write_bytes(file_with([group(1)] * depth + [LEAF]))
    for check in (check_nesting_of, check_file):
        with pytest.raises(UserError, match=rf"a\.parquet: columns nested more than {MAX_NESTING} deep"):
            check(tmp_path / "a.parquet")


def test_groups_beside_each_other_are_not_nested(tmp_path: Path) -> None:
    content = file_with([group(200), *[group(2), LEAF, group(1), LEAF] * 200])
    check_nesting(io.BytesIO(content), "x")
    assert pq.ParquetFile(pa.BufferReader(content)).metadata.num_columns == 400, "as pyarrow reads it"


@pytest.mark.parametrize("levels", [1, 10, (MAX_NESTING - 2) // 2])
def test_columns_that_pyarrow_writes_pass(tmp_path: Path, levels: int) -> None:
    kind: pa.DataType = pa.list_(pa.int64())
    for _ in range(levels - 1):
        kind = pa.list_(kind)
    pq.write_table(pa.table({"deep": pa.array([None], kind), "b": pa.array([True]), "t": pa.array([1], pa.timestamp("us"))}),
                   tmp_path / "a.parquet")  # fmt: skip
    check_nesting_of(tmp_path / "a.parquet")


@pytest.mark.parametrize(("content", "says"), [
    (file_with([LEAF], MAX_ELEMENTS + 1), "columns and groups"), (file_with([LEAF], 5), "no schema"),
    (b"PAR1" + b"\x00" * 4 + (4).to_bytes(4, "little") + b"PAR1", "no schema"),
])  # fmt: skip
def test_a_footer_without_a_schema_is_refused(content: bytes, says: str) -> None:
    with pytest.raises(UserError, match=says):
        check_nesting(io.BytesIO(content), "x")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"no parquet file at all", b"PAR1\xff\xff\xff\xffPAR1"])
def test_what_is_no_parquet_file_is_left_to_pyarrow(content: bytes) -> None:
    check_nesting(io.BytesIO(content), "x")
    with pytest.raises(pa.ArrowInvalid):
        pq.ParquetFile(pa.BufferReader(content))


@given(st.binary(max_size=80))
def test_any_footer_passes_or_is_refused(data: bytes) -> None:
    content = b"PAR1" + data + len(data).to_bytes(4, "little") + b"PAR1"
    refused = ""
    try:
        check_nesting(io.BytesIO(content), "x")
    except UserError as error:
        refused = str(error)
    assert "\n" not in refused
