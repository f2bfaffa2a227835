"""Parquet files whose pages, runs and dictionaries unpack to far more than they hold, and whose sizes are lies."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from test_blocks import WHOLE, read

from features.errors import UserError
from features.parquet_pages import mapped, pages
from features.source import Format
from pipeline.ingest import files
from pipeline.ingest.files import RawFile, find
from pipeline.ingest.formats import parquet_expansion, raw_format, units
from pipeline.ingest.formats.base import Wanted
from pipeline.ingest.formats.parquet_expansion import Chunk, batch_rows, check_footer_sizes, check_page_sizes, chunks_of

PARQUET = Format(format="parquet")


def blocks(folder: Path, types: dict[str, Any], ratio: int = 500) -> list[int]:
    """The rows of each block."""
    [file] = find(str(folder), "a.parquet", max_unpack_ratio=ratio)
    form = raw_format(PARQUET)
    read_ = (form.read(unit, Wanted(types), lambda _: None) for unit in units([file], PARQUET, WHOLE))
    return [block.columns.num_rows for found in read_ for block in found]


def chunks(path: Path, names: list[str]) -> tuple[pq.FileMetaData, list[Chunk]]:
    footer = pq.ParquetFile(path).metadata
    [file] = find(str(path.parent), path.name)
    return footer, chunks_of(file, footer, range(footer.num_row_groups), names)


@pytest.mark.parametrize("kind", ["pages", "runs", "lists"])
def test_columns_that_unpack_to_too_much_are_refused_by_the_footer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(files, "ALWAYS_ALLOWED_BYTES", 1 << 16)
    values = {
        "pages": pa.array(["x" * 1000] * 2000), "runs": pa.array([7] * 200_000),
        "lists": pa.array([[7] * 1000] * 200),
    }[kind]  # fmt: skip
    numbers = pa.array([1] * len(values) if kind == "runs" else range(len(values)))
    table = pa.table({"n": numbers, "c": values})
    pq.write_table(table, tmp_path / "a.parquet", compression="zstd", use_dictionary=kind != "pages")
    with pytest.raises(
        UserError, match=r"a\.parquet, row group 0, column c\S*: .* unpack to .* max_unpack_ratio=1 "
    ) as caught:
        blocks(tmp_path, {"c": "string"}, ratio=1)
    assert "\n" not in str(caught.value)
    assert sum(blocks(tmp_path, {"n": "int", "c": "string"}, ratio=5000)) == len(values)
    assert kind == "runs" or sum(blocks(tmp_path, {"n": "int"}, ratio=20)) == len(
        values
    )  # of what nobody reads nothing is unpacked


class Lying:
    """A column chunk of a footer with other numbers."""

    def __init__(self, real: Any, **more: int | None) -> None:
        self.real, self.more = real, more

    def __getattr__(self, name: str) -> Any:
        return self.more[name] if name in self.more else getattr(self.real, name)


@pytest.mark.parametrize(
    "lie",
    [
        {"num_values": 3},
        {"total_compressed_size": 1 << 40},
        {"total_compressed_size": -1},
        {"total_uncompressed_size": -1},
    ],
)
def test_sizes_that_cannot_be_are_refused(tmp_path: Path, lie: dict[str, int]) -> None:
    pq.write_table(pa.table({"c": range(100)}), tmp_path / "a.parquet")
    [file], [chunk] = find(str(tmp_path), "a.parquet"), chunks(tmp_path / "a.parquet", ["c"])[1]
    check_footer_sizes(file, [chunk])
    with pytest.raises(ValueError, match="row group 0, column c: "):
        check_footer_sizes(file, [Chunk(0, Lying(chunk.meta, **lie), 100, False)])


def test_pages_are_not_believed_to_be_as_the_footer_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(
        pa.table({"c": ["x" * 1000] * 2000}), tmp_path / "a.parquet", compression="zstd", use_dictionary=False
    )
    [file], [chunk] = find(str(tmp_path), "a.parquet", max_unpack_ratio=1), chunks(tmp_path / "a.parquet", ["c"])[1]
    lying = Chunk(0, Lying(chunk.meta, total_uncompressed_size=10), 2000, False)
    check_footer_sizes(file, [lying])
    with mapped(Path(file.path)) as content:
        check_page_sizes(file, content, [lying])
        monkeypatch.setattr(parquet_expansion, "PAGE_LIMIT", 100_000)
        with pytest.raises(ValueError, match=r"row group 0, column c: a page of \d{6,} bytes, 100000 are allowed"):
            check_page_sizes(file, content, [lying])
        monkeypatch.undo()
        monkeypatch.setattr(files, "ALWAYS_ALLOWED_BYTES", 1 << 16)
        with pytest.raises(UserError, match=r"row group 0, column c: .* max_unpack_ratio=1 "):
            check_page_sizes(file, content, [lying])


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("codec", ["none", "snappy", "zstd", "gzip"])
def test_page_sizes_add_up_to_those_of_the_footer(tmp_path: Path, codec: str, version: str) -> None:
    table = pa.table({
        "n": pa.array(range(5_000)), "s": [f"text {i % 700} " + "y" * (i % 50) for i in range(5_000)],
        "l": [[i, None][: i % 3] for i in range(5_000)], "long": ["z" * 5000] * 5_000,
        "b": [bool(i % 2) for i in range(5_000)], "x": pa.array([i / 7 for i in range(5_000)]),
    })  # fmt: skip
    pq.write_table(
        table, tmp_path / "a.parquet", compression=codec, data_page_version=version, data_page_size=2_000,
        row_group_size=2_000, write_page_checksum=True,
    )  # fmt: skip
    _, found = chunks(tmp_path / "a.parquet", table.column_names)
    assert len(found) == 3 * 6
    with mapped(tmp_path / "a.parquet") as content:
        for chunk in found:
            sizes = [page.unpacked for page in pages(content, chunk.meta)]
            # The footer counts headers, too.
            assert 0 < chunk.meta.total_uncompressed_size - sum(sizes) < 20_000 * len(sizes)
            assert sum(sizes) > chunk.meta.total_uncompressed_size / 2 or sum(sizes) < 2000


def test_the_long_values_of_a_dictionary_make_batches_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_expansion, "DECODED_BYTES", 1 << 20)
    rows = [f"{i % 7}" * 10_000 for i in range(3000)]
    pq.write_table(pa.table({"c": rows, "n": range(3000)}), tmp_path / "a.parquet")
    assert blocks(tmp_path, {"c": "string"})[:2] == [104, 104]
    assert blocks(tmp_path, {"n": "int"}) == [3000]
    found, _ = read(tmp_path, "a.parquet", PARQUET, {"c": "string", "n": "int"})
    assert found == [(i + 1, row, i) for i, row in enumerate(rows)]


def test_a_value_that_stands_for_more_text_than_the_file_may_hold_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "ALWAYS_ALLOWED_BYTES", 1 << 20)
    pq.write_table(pa.table({"c": ["x" * 10_000] * 3000}), tmp_path / "a.parquet", row_group_size=1000)
    with pytest.raises(
        UserError, match=r"row group 0, column c: \S+ bytes unpack to 10,000,000 or more.* max_unpack_ratio=500"
    ):
        blocks(tmp_path, {"c": "string"})
    rare = ["x" * 10_000, *(f"item {i % 9}" for i in range(3000))]  # as long, and once only
    pq.write_table(pa.table({"c": rare}), tmp_path / "a.parquet")
    assert sum(blocks(tmp_path, {"c": "string"})) == 3001


@pytest.mark.parametrize("first", [None, [], [None], ["x" * 10_000]])
def test_long_values_after_rows_without_any_are_found_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: list[str | None] | None
) -> None:
    monkeypatch.setattr(files, "ALWAYS_ALLOWED_BYTES", 1 << 20)
    lists = [first] * 10 + [["x" * 10_000]] * 3000
    for values in (lists, [value[0] if value else None for value in lists]):
        pq.write_table(pa.table({"c": values}), tmp_path / "a.parquet", data_page_size=100, write_batch_size=5)
        with pytest.raises(UserError, match=r"column c\S*: .* unpack to 30,\d+,000 or more.* max_unpack_ratio=10 "):
            blocks(tmp_path, {"c": "string"}, 10)


def test_lists_of_long_values_are_refused_where_one_batch_could_not_hold_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_expansion, "DECODED_BYTES", 1 << 20)
    pq.write_table(pa.table({"c": [["x" * 1000] * 2000] * 3}), tmp_path / "a.parquet")
    with pytest.raises(
        UserError, match=r"a\.parquet: cannot be read: row group 0, column c\S*: lists of 6000000 bytes"
    ):
        blocks(tmp_path, {"c": "string"})
    lists = [["long" * 500], *([f"i{i % 9}"] * 2 for i in range(3000))]  # one long value among many
    pq.write_table(pa.table({"c": lists}), tmp_path / "a.parquet")
    assert [row for _, row in read(tmp_path, "a.parquet", PARQUET, {"c": "string"})[0]] == lists


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.binary(), pa.dictionary(pa.int32(), pa.string())])
@pytest.mark.parametrize("nulls", [False, True])
def test_usual_text_is_read_in_the_batches_it_always_was(tmp_path: Path, kind: pa.DataType, nulls: bool) -> None:
    values = pa.array([None if nulls or i % 3 == 0 else f"item {i % 100}" for i in range(1000)], pa.string())
    table = pa.table({"c": values.dictionary_encode() if pa.types.is_dictionary(kind) else values.cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=300)
    [file], (footer, found) = find(str(tmp_path), "a.parquet"), chunks(tmp_path / "a.parquet", ["c"])
    with (tmp_path / "a.parquet").open("rb") as raw:
        assert batch_rows(file, raw, footer, found, 1 << 17) == 1 << 17
    assert [row for _, row in read(tmp_path, "a.parquet", PARQUET, {"c": "string"})[0]] == values.to_pylist()


def test_row_groups_without_rows_have_no_pages(tmp_path: Path) -> None:
    table = pa.table({"c": ["a"], "n": [1]})
    with pq.ParquetWriter(tmp_path / "a.parquet", table.schema) as writer:
        for part in (table[:0], table, table[:0]):
            writer.write_table(part)
    assert read(tmp_path, "a.parquet", PARQUET, {"c": "string", "n": "int"})[0] == [(1, "a", 1)]


@pytest.mark.parametrize("codec", ["uncompressed", "lz4", "zstd", "snappy"])
def test_files_of_another_writer_pass_the_checks(tmp_path: Path, codec: Any) -> None:
    rows = {
        "s": [f"i{i % 9}" * (i % 50) for i in range(9000)],
        "n": list(range(9000)),
        "l": [[i] * (i % 3) for i in range(9000)],
    }
    pl.DataFrame(rows).write_parquet(
        tmp_path / "a.parquet", compression=codec, row_group_size=4000, data_page_size=3000
    )
    found, _ = read(tmp_path, "a.parquet", PARQUET, {"s": "string", "n": "int", "l": "string"})
    assert found == [(i + 1, rows["s"][i], i, [str(n) for n in rows["l"][i]]) for i in range(9000)]


def test_columns_within_others_and_names_with_dots_are_found(tmp_path: Path) -> None:
    table = pa.table({"a.b": ["x"], "a": [{"b": 1, "c": [2]}], "ab": [1], "l": [["y"]]})
    pq.write_table(table, tmp_path / "a.parquet")
    _, found = chunks(tmp_path / "a.parquet", ["a.b", "l"])
    assert [chunk.is_list for chunk in found if chunk.meta.path_in_schema.startswith("l.")] == [True]
    assert "ab" not in [chunk.meta.path_in_schema for chunk in found]
    assert read(tmp_path, "a.parquet", PARQUET, {"l": "string"})[0] == [(1, ["y"])]


@pytest.mark.parametrize(
    ("wanted", "lists", "good"), [("string", False, [1]), ("int", False, [1]), ("string", True, [])]
)
def test_rows_with_text_that_is_not_utf8_are_bad_ones(
    tmp_path: Path, wanted: str, lists: bool, good: list[int]
) -> None:
    odd = pa.StringArray.from_buffers(2, pa.array([b"a", b"\xff"]).buffers()[1], pa.py_buffer(b"a\xff"))
    column = pa.ListArray.from_arrays(pa.array([0, 2], pa.int32()), odd) if lists else odd
    pq.write_table(pa.table({"c": column}), tmp_path / "a.parquet")
    rows, bad = read(tmp_path, "a.parquet", PARQUET, {"c": wanted})
    assert [line for line, *_ in rows] == good
    assert [(line, reason) for line, reason, _ in bad] == [(1 if lists else 2, "not UTF-8")]


def mutations(data: bytes) -> Iterator[Any]:
    near_end = st.one_of(st.integers(0, len(data) - 1), st.integers(len(data) - 400, len(data) - 1))
    yield st.builds(lambda at, byte: data[:at] + bytes([byte]) + data[at + 1 :], near_end, st.integers(0, 255))
    yield st.builds(lambda at, end: data[:at] + data[end:], near_end, near_end)


def sample() -> bytes:
    sink = pa.BufferOutputStream()
    rows = range(40)
    table = pa.table({"n": rows, "s": [f"i{i % 5}" for i in rows], "l": [[i] * (i % 3) for i in rows]})
    pq.write_table(table, sink, row_group_size=20, compression="zstd")
    return sink.getvalue().to_pybytes()


@settings(max_examples=examples(150), deadline=None)
@given(st.one_of(*mutations(sample())))
def test_whatever_is_changed_in_a_file_it_is_read_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    folder = tmp_path_factory.getbasetemp()
    (folder / "random.parquet").write_bytes(data)
    message = ""
    try:
        rows, _ = read(folder, "random.parquet", PARQUET, {"n": "int", "s": "string", "l": "string"}, 100)
        assert len(rows) <= 1000
    except UserError as error:
        message = str(error)
    assert "\n" not in message


@settings(max_examples=examples(100), deadline=None)
@given(st.binary(max_size=60))
def test_bytes_that_are_no_page_header_are_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "random"
    path.write_bytes(data)
    _, [chunk] = chunks(written_once(path.parent), ["c"])
    lying = Lying(chunk.meta, dictionary_page_offset=None, data_page_offset=1, total_compressed_size=len(data))
    try:
        sizes = list(pages(data, lying))
    except ValueError:
        return
    assert len(sizes) <= len(data)


def written_once(folder: Path) -> Path:
    if not (folder / "once.parquet").exists():
        pq.write_table(pa.table({"c": range(100)}), folder / "once.parquet")
    return folder / "once.parquet"


def test_a_file_of_another_size_is_a_file_of_the_same_path_and_version() -> None:
    assert RawFile("a", 1, "v") == RawFile("a", 1, "v", max_unpack_ratio=7)


def test_a_damaged_footer_does_not_end_the_process(tmp_path: Path) -> None:
    data = sample()
    length = int.from_bytes(data[-8:-4], "little")
    refused = 0
    for at in range(len(data) - 8 - length, len(data) - 8 - length // 2, 2):
        (tmp_path / "a.parquet").write_bytes(data[:at] + bytes([data[at] ^ 0x0B]) + data[at + 1 :])
        try:
            blocks(tmp_path, {"n": "int", "s": "string", "l": "string"})
        except UserError:
            refused += 1
    assert refused > 50
