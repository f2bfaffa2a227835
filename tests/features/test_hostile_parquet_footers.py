"""Parquet files that unpack to far more than they hold, honestly or with a footer that lies."""

from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parquet_forgery import lied

from features import parquet_limits
from features.errors import UserError
from features.parquet_limits import check_footer
from features.parquet_pages import check_pages, pages


def written(path: Path, table: pa.Table, **options) -> pq.FileMetaData:
    pq.write_table(table, path, compression="zstd", **options)
    return pq.read_metadata(path)


def rows(count: int) -> pa.Table:
    rng = np.random.default_rng(0)
    lists = [[int(x)] * int(x) for x in rng.integers(0, 5, count)]
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(rng.normal(size=3 * count).astype(np.float32)), 3)
    words = pa.array([f"w{x}" for x in rng.integers(0, 50, count)])
    return pa.table({"id": np.arange(count), "bag": pa.array(lists, pa.list_(pa.int64())), "v": vectors, "word": words})


@pytest.mark.parametrize("options", [{}, {"use_dictionary": False}, {"data_page_version": "2.0"},
                                     {"row_group_size": 70, "data_page_size": 64}, {"write_statistics": True},
                                     {"write_page_checksum": True}, {"write_page_index": True}])  # fmt: skip
def test_files_of_our_writer_pass(tmp_path, options):
    footer = written(tmp_path / "a.parquet", rows(500), **options)
    check_footer(footer, "a.parquet", (tmp_path / "a.parquet").stat().st_size)
    check_pages(tmp_path / "a.parquet", footer)
    check_pages(tmp_path / "a.parquet", footer, ["bag"], nested=True)


def test_a_file_without_rows_or_with_nulls_alone_passes(tmp_path):
    for name, table in {"none": rows(0), "null": pa.table({"x": pa.nulls(50, pa.float32())})}.items():
        footer = written(tmp_path / name, table)
        check_footer(footer, name, (tmp_path / name).stat().st_size)
        check_pages(tmp_path / name, footer)


@pytest.mark.parametrize("dictionary", [True, False])
def test_a_small_file_that_unpacks_to_much_is_refused_by_its_footer(tmp_path, monkeypatch, dictionary):
    monkeypatch.setattr(parquet_limits, "ALWAYS_ALLOWED_BYTES", 1 << 20)
    footer = written(tmp_path / "a.parquet", pa.table({"x": np.zeros(1 << 20, np.int64)}), use_dictionary=dictionary)
    size = (tmp_path / "a.parquet").stat().st_size
    assert size < 10_000
    with pytest.raises(
        UserError, match=r"^a.parquet: row group 0 has .* bytes that unpack to 8,3\d\d,\d+, more than 64 times"
    ):
        check_footer(footer, "a.parquet", size)
    check_footer(footer, "a.parquet", size, columns=["y"])  # of a column that is not read


def test_row_groups_that_are_read_at_once_count_together(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet_limits, "ALWAYS_ALLOWED_BYTES", 1 << 20)
    footer = written(tmp_path / "a", pa.table({"x": np.zeros(1 << 18, np.int64)}), row_group_size=1 << 16)
    size = (tmp_path / "a").stat().st_size
    check_footer(footer, "a", size)
    with pytest.raises(UserError, match=r"a has .* bytes that unpack to"):
        check_footer(footer, "a", size, whole=True)


def test_a_list_whose_footer_has_fewer_values_than_its_pages_is_refused(tmp_path):
    count = 1_000_000
    values = pa.ListArray.from_arrays(pa.array([0, count], pa.int32()), pa.array(np.zeros(count, np.int64)))
    written(tmp_path / "a", pa.table({"bag": values}), write_statistics=False)
    footer = lied(tmp_path / "a", count, 1)
    check_footer(footer, "a", (tmp_path / "a").stat().st_size)
    assert footer.row_group(0).column(0).num_values == 1
    with pytest.raises(UserError, match=r"pages of column bag.list.element have .* values .* its footer says 1 and "):
        check_pages(tmp_path / "a", footer, nested=True)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_damaged_page_header_is_a_user_error_or_passes(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("damaged") / "a"
    footer = written(path, rows(50))
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(4, len(content) - footer.serialized_size - 9))
    content[place : place + 4] = data.draw(st.binary(min_size=4, max_size=4))
    path.write_bytes(content)
    with suppress(UserError):
        check_pages(path, footer)


def test_a_damaged_footer_does_not_end_the_process(tmp_path: Path) -> None:
    """pyarrow aborts where it is asked for a column chunk that is damaged."""
    file = tmp_path / "a.parquet"
    written(file, rows(100))
    data = file.read_bytes()
    length = int.from_bytes(data[-8:-4], "little")
    refused = 0
    for at in range(len(data) - 8 - length, len(data) - 8 - length // 2, 3):
        file.write_bytes(data[:at] + bytes([data[at] ^ 0x0B]) + data[at + 1 :])
        try:
            parquet_limits.check_file(file)
        except (UserError, OSError, pa.ArrowException):
            refused += 1
    assert refused > 50


def test_a_page_header_whose_size_is_a_struct_is_no_page_header() -> None:
    class Chunk:
        dictionary_page_offset, data_page_offset, total_compressed_size, num_values = None, 4, 60, 3

    # Thrift: i32 1 = 0, struct 2 (the unpacked size) = {}, i32 3 = 2, struct 5 (of a data page) = {i32 1 = 3}.
    header = bytes([0x15, 0x00, 0x1C, 0x00, 0x15, 0x04, 0x2C, 0x15, 0x06, 0x00, 0x00])
    with pytest.raises(ValueError, match="no page header at byte 4"):
        list(pages(b"PAR1" + header + bytes(60), Chunk()))  # type: ignore[arg-type]
