"""Limits of an untrusted Parquet file, checked in its footer before anything is decoded."""

import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from features.errors import UserError, one_line
from features.parquet_pages import check_pages, chunk_start, is_part_of
from features.parquet_schema import check_nesting, check_nesting_of
from features.regular_files import mounted

ALWAYS_ALLOWED_BYTES = 1 << 30  # decoded, which a row group may always have
MAX_RATIO = 64  # decoded bytes over those in the file, of a row group that has more


def check_footer(
    footer: pq.FileMetaData,
    where: object,
    file_bytes: int,
    columns: Iterable[str] | None = None,
    whole: bool = False,
    groups: Sequence[int] | None = None,
) -> None:
    """Compares a footer with itself and with the size of its file: what a small file may unpack to is limited.

    A footer may lie about sizes; `features.parquet_pages` compares it with the pages.

    Args:
        where: of the file, for errors. file_bytes: its size.
        columns: that will be read, by the names of top-level columns; all if None.
        whole: they are read at once, so that the limit is one of all row groups together.
        groups: numbers of row groups that will be read; all if None.
    Raises:
        UserError: numbers of rows or places that contradict each other, or more decoded bytes than
            max(ALWAYS_ALLOWED_BYTES, MAX_RATIO times those in the file) in a row group (whole: in the file).
    """
    wanted = None if columns is None else {*columns}
    packed = decoded = rows = 0
    numbers = range(footer.num_row_groups) if groups is None else groups
    try:
        check_chunks(footer, file_bytes, numbers, wanted)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{where}: its footer is damaged: {one_line(error)}") from None
    for number in numbers:
        group = footer.row_group(number)
        what = f"{where}: row group {number}"
        if group.num_rows < 0:
            raise UserError(f"{what} has {group.num_rows:,} rows: the file is damaged")
        rows += group.num_rows
        packed, decoded = (packed, decoded) if whole else (0, 0)
        for index in range(group.num_columns):
            chunk = group.column(index)
            if wanted is not None and not is_part_of(chunk.path_in_schema, wanted):
                continue
            start = chunk_start(chunk)
            if min(start, chunk.total_compressed_size, chunk.total_uncompressed_size, chunk.num_values) < 0 or (
                start + chunk.total_compressed_size > file_bytes
            ):
                raise UserError(f"{what}: column {chunk.path_in_schema} lies outside of the file: it is damaged")
            packed += chunk.total_compressed_size
            decoded += decoded_bytes(chunk)
        if decoded > max(ALWAYS_ALLOWED_BYTES, MAX_RATIO * packed):
            raise UserError(
                f"{where if whole else what} has {packed:,} bytes that unpack to {decoded:,}, more than {MAX_RATIO} times as "
                f"many and than {ALWAYS_ALLOWED_BYTES:,}. Write it in smaller row groups, if it is what it should be."
            )
    if groups is None and rows != footer.num_rows:
        raise UserError(
            f"{where}: its row groups have {rows:,} rows, its footer says {footer.num_rows:,}: it is damaged"
        )


def check_file(path: Path, columns: Iterable[str] | None = None) -> None:
    """Checks a file that is read at once, by its footer and by its pages.

    Args:
        columns: that will be read; all if None.
    Raises:
        UserError: as check_footer and check_pages.
        pa.ArrowException, OSError: it is no Parquet file.
    """
    if mounted(path):
        check_nesting_of(path)
        footer, content = pq.read_metadata(path), None
    else:
        content = path.read_bytes()
        check_nesting(io.BytesIO(content), path)
        footer = pq.read_metadata(pa.BufferReader(content))
    check_footer(footer, path, path.stat().st_size if content is None else len(content), columns, whole=True)
    check_pages(path, footer, columns, content=content)


def check_chunks(
    footer: pq.FileMetaData, file_bytes: int, groups: Iterable[int], columns: Iterable[str] | None = None
) -> None:
    """Raises OSError where column chunks of row groups are damaged in the footer.

    To ask pyarrow for such a chunk (`RowGroupMetaData.column`) would end the process, by an exception that nobody catches; a
    reader finds it in order, before it reads the first page.

    Args:
        columns: names of top-level columns; all if None.
    """
    names, file = None if columns is None else list(columns), _NoPages(file_bytes)
    reader = pq.ParquetFile(pa.PythonFile(file, mode="r"), metadata=footer, buffer_size=1 << 16)
    for group in groups:
        file.asked = False
        try:
            next(reader.iter_batches(1, [group], names, use_threads=False), None)
        except (OSError, pa.ArrowException):
            if not file.asked:
                raise


class _NoPages:
    """A file of which only the footer is known: it ends where its first page is read.

    It raises nothing itself, since Arrow would keep the exception, and with it the frames of all callers.
    """

    closed = False

    def __init__(self, size: int) -> None:
        self._size, self._position, self.asked = size, 0, False

    def size(self) -> int:
        return self._size

    def seek(self, position: int, whence: int = 0) -> int:
        self._position = position + (0, self._position, self._size)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, _: int = -1) -> bytes:
        self.asked = True
        return b""

    def close(self) -> None:
        pass


def decoded_bytes(chunk: pq.ColumnChunkMetaData) -> int:
    """At least how much memory a column chunk takes: pages may repeat a value any number of times, so values count, too."""
    width = 8 if chunk.physical_type in ("INT64", "DOUBLE") else 12 if chunk.physical_type == "INT96" else 4
    return max(chunk.total_uncompressed_size, chunk.num_values * width)
