"""Sizes of a Parquet file's pages, compared with its footer: the headers of pages decide what is allocated, not the footer."""

import mmap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from features.errors import UserError

# Of PageHeader (parquet.thrift): unpacked and packed bytes; and of what it says of each kind of page, the number of values.
UNPACKED, PACKED, VALUES = 2, 3, 1
DATA, DICTIONARY, DATA_2 = 5, 7, 8  # fields that hold a DataPageHeader, DictionaryPageHeader, DataPageHeaderV2
BOOLS, BYTE, INTS, DOUBLE, BINARY, LISTS, MAP, STRUCT = (1, 2), 3, (4, 5, 6), 7, 8, (9, 10), 11, 12
DEEPEST = 8  # structs within structs


def check_pages(
    path: Path,
    footer: pq.FileMetaData,
    columns: Iterable[str] | None = None,
    nested: bool = False,
    groups: Iterable[int] | None = None,
) -> None:
    """Adds up the pages' sizes of each column chunk, without unpacking any.

    Args:
        path: of a file whose footer `features.parquet_limits.check_footer` has passed.
        columns: top-level columns; all if None. nested: only lists and structs, of which a row may have any number of values.
        groups: numbers of row groups; all if None.
    Raises:
        UserError: pages with another number of values than the footer says, more unpacked bytes, or no page headers.
    """
    wanted = None if columns is None else {*columns}
    chosen = [
        index
        for index in range(footer.num_columns)
        if (wanted is None or footer.schema.column(index).path.partition(".")[0] in wanted)
        and (not nested or footer.schema.column(index).max_repetition_level)
    ]
    if not chosen:
        return
    with _mapped(path) as content:
        for number in range(footer.num_row_groups) if groups is None else groups:
            for index in chosen:
                _check_chunk(path, content, footer.row_group(number).column(index))


def largest_dictionary(path: Path, footer: pq.FileMetaData, column: str) -> int:
    """Unpacked bytes of the largest dictionary page of a column, 0 without one: the most that one of its values may have.

    Args:
        footer: of a file that `check_pages` has passed.
    """
    found = 0
    with _mapped(path) as content:
        for number in range(footer.num_row_groups):
            group = footer.row_group(number)
            chunks = (group.column(index) for index in range(group.num_columns))
            for chunk in chunks:
                if chunk.path_in_schema == column:
                    pages = (header for header, _ in _pages(content, chunk) if DICTIONARY in header)
                    found = max(found, *(header[UNPACKED] for header in pages), 0)
    return found


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        yield content


def _pages(content: mmap.mmap, chunk: pq.ColumnChunkMetaData) -> Iterator[tuple[dict[int, Any], int]]:
    """The headers of a chunk's pages and their lengths, to the last of its values. Raises ValueError for what is none."""
    place = chunk_start(chunk)
    end = place + chunk.total_compressed_size
    values = 0
    while values < chunk.num_values and place < end:
        try:
            header, body = _Thrift(content, place, end).struct()
            counts = [header[kind][VALUES] for kind in (DATA, DATA_2, DICTIONARY) if kind in header]
            if min(header[PACKED], header[UNPACKED], *counts) < 0:
                raise ValueError
        except (IndexError, KeyError, TypeError):
            raise ValueError from None
        yield header, body - place
        values += _values_of(header)
        place = body + header[PACKED]


def _values_of(header: dict[int, Any]) -> int:
    """Values of a page, 0 of a dictionary."""
    return next((header[kind][VALUES] for kind in (DATA, DATA_2) if kind in header), 0)


def _check_chunk(path: Path, content: mmap.mmap, chunk: pq.ColumnChunkMetaData) -> None:
    values = unpacked = 0
    try:
        for header, length in _pages(content, chunk):
            values, unpacked = values + _values_of(header), unpacked + header[UNPACKED] + length
    except ValueError:
        raise UserError(
            f"{path}: column {chunk.path_in_schema} has a page without a valid header: it is damaged"
        ) from None
    if values != chunk.num_values or unpacked > chunk.total_uncompressed_size:
        raise UserError(
            f"{path}: pages of column {chunk.path_in_schema} have {values:,} values and {unpacked:,} bytes when unpacked, "
            f"its footer says {chunk.num_values:,} and {chunk.total_uncompressed_size:,}: it is damaged"
        )


def chunk_start(chunk: pq.ColumnChunkMetaData) -> int:
    """Where a column chunk's first page begins; a writer may leave the place of its dictionary out, or write 0."""
    places = (chunk.dictionary_page_offset, chunk.data_page_offset)
    return min((place for place in places if place), default=0)


class _Thrift:
    """A cursor over thrift's compact protocol: integers and structs as dictionaries by field, all else is skipped."""

    def __init__(self, content: mmap.mmap, place: int, end: int) -> None:
        self.content, self.place, self.end = content, place, end

    def struct(self, depth: int = 0) -> tuple[dict[int, Any], int]:
        """A struct's fields, and the place after it. Raises IndexError, TypeError where there is none."""
        found: dict[int, Any] = {}
        field = 0
        while kind := self.byte():
            field = field + (kind >> 4) if kind >> 4 else self.integer()
            found[field] = self.value(kind & 15, depth)
        return found, self.place

    def value(self, kind: int, depth: int) -> Any:
        if kind in INTS:
            return self.integer()
        if kind == STRUCT and depth < DEEPEST:
            return self.struct(depth + 1)[0]
        if kind not in (*BOOLS, BYTE, DOUBLE, BINARY):
            raise TypeError  # lists and maps are in no page's header
        self.skip({BYTE: 1, DOUBLE: 8}.get(kind, 0) if kind != BINARY else self.varint())
        return None

    def byte(self) -> int:
        self.skip(1)
        return self.content[self.place - 1]

    def skip(self, count: int) -> None:
        self.place += count
        if self.place > self.end:
            raise IndexError

    def varint(self) -> int:
        number = shift = 0
        while (byte := self.byte()) & 128:
            number, shift = number | (byte & 127) << shift, shift + 7
            if shift > 63:
                raise TypeError
        return number | byte << shift

    def integer(self) -> int:
        number = self.varint()
        return number >> 1 ^ -(number & 1)
