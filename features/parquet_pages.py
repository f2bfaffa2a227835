"""Sizes of a Parquet file's pages, compared with its footer: the headers of pages decide what is allocated, not the footer."""

import mmap
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from features.errors import UserError
from features.regular_files import mounted

# Of PageHeader (parquet.thrift): unpacked and packed bytes; and of what it says of each kind of page, the number of values.
UNPACKED, PACKED, VALUES = 2, 3, 1
DATA, DICTIONARY, DATA_2 = 5, 7, 8  # fields that hold a DataPageHeader, DictionaryPageHeader, DataPageHeaderV2
BOOLS, BYTE, INTS, DOUBLE, BINARY, LISTS, MAP, STRUCT = (1, 2), 3, (4, 5, 6), 7, 8, (9, 10), 11, 12
MAX_DEPTH = 8  # structs within structs

Content = mmap.mmap | bytes  # of a file


def check_pages(
    path: Path,
    footer: pq.FileMetaData,
    columns: Iterable[str] | None = None,
    nested: bool = False,
    groups: Iterable[int] | None = None,
    content: Content | None = None,
) -> None:
    """Adds up the pages' sizes of each column chunk, without unpacking any.

    Args:
        path: of a file whose footer `features.parquet_limits.check_footer` has passed.
        columns: top-level columns; all if None. nested: only lists and structs, of which a row may have any number of values.
        groups: numbers of row groups; all if None.
        content: the file's bytes, where these pages are in memory; None: the file is mapped.
    Raises:
        UserError: pages with another number of values than the footer says, more unpacked bytes, or no page headers.
    """
    wanted = None if columns is None else {*columns}
    chosen = [
        index
        for index in range(footer.num_columns)
        if (wanted is None or is_part_of(footer.schema.column(index).path, wanted))
        and (not nested or footer.schema.column(index).max_repetition_level)
    ]
    if not chosen:
        return
    with mapped(path) if content is None else nullcontext(content) as found:
        for number in range(footer.num_row_groups) if groups is None else groups:
            for index in chosen:
                _check_chunk(path, found, footer.row_group(number).column(index))


def is_part_of(path: str, columns: set[str]) -> bool:
    """Whether a path of a Parquet schema may be of one of these top-level columns, whose names may have dots themselves."""
    parts = path.split(".")
    return any(".".join(parts[:end]) in columns for end in range(1, len(parts) + 1))


class Page(NamedTuple):
    """What the header of a page says: bytes before and after unpacking, values (0 of a dictionary), and its own length."""

    packed: int
    unpacked: int
    values: int
    is_dictionary: bool
    header: int


def largest_dictionary(path: Path, footer: pq.FileMetaData, column: str) -> int:
    """Unpacked bytes of the largest dictionary page of a column, 0 without one: the most that one of its values may have.

    Args:
        footer: of a file that `check_pages` has passed.
    """
    found = 0
    with mapped(path) as content:
        for number in range(footer.num_row_groups):
            group = footer.row_group(number)
            chunks = (group.column(index) for index in range(group.num_columns))
            for chunk in chunks:
                if chunk.path_in_schema == column:
                    found = max(found, *(page.unpacked for page in pages(content, chunk) if page.is_dictionary), 0)
    return found


@contextmanager
def mapped(path: Path) -> Iterator[Content]:
    """The bytes of a file, of which only what is used is read; of a file on a store, all are."""
    if not mounted(path):
        yield path.read_bytes()
        return
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        yield content


def pages(content: Content, chunk: pq.ColumnChunkMetaData) -> Iterator[Page]:
    """The pages of a column chunk, to the last of its values. Raises ValueError for what is no page, or out of its place."""
    start = place = chunk_start(chunk)
    end = min(start + chunk.total_compressed_size, len(content))
    values = 0
    while values < chunk.num_values and place < end:
        try:
            header, body = Thrift(content, place, end).struct()
            counts = [header[kind][VALUES] for kind in (DATA, DATA_2) if kind in header]
            page = Page(header[PACKED], header[UNPACKED], sum(counts), DICTIONARY in header, body - place)
            least = min(page.packed, page.unpacked, *counts, 0)  # a damaged field may be a struct, which has no order
        except (IndexError, KeyError, TypeError):
            raise ValueError(f"no page header at byte {place}") from None
        if least < 0:
            raise ValueError(f"no page header at byte {place}")
        if page.is_dictionary and place != start:
            raise ValueError(f"a dictionary after other pages, at byte {place}")
        yield page
        values += page.values
        place = body + page.packed


def _check_chunk(path: Path, content: Content, chunk: pq.ColumnChunkMetaData) -> None:
    values = unpacked = 0
    try:
        for page in pages(content, chunk):
            values, unpacked = values + page.values, unpacked + page.unpacked + page.header
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


class Thrift:
    """A cursor over thrift's compact protocol: integers and structs as dictionaries by field, all else is skipped."""

    def __init__(self, content: Content, place: int, end: int) -> None:
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
        """A value of a type; None for one that is skipped. Raises IndexError, TypeError."""
        if kind in INTS:
            return self.integer()
        if kind == STRUCT and depth < MAX_DEPTH:
            return self.struct(depth + 1)[0]
        if kind not in (*BOOLS, BYTE, DOUBLE, BINARY):
            raise TypeError  # lists and maps are in no page's header
        self.skip({BYTE: 1, DOUBLE: 8}.get(kind, 0) if kind != BINARY else self.varint())
        return None

    def byte(self) -> int:
        """The next byte. Raises IndexError at the end."""
        self.skip(1)
        return self.content[self.place - 1]

    def skip(self, count: int) -> None:
        """Moves on. Raises IndexError beyond the end."""
        self.place += count
        if self.place > self.end:
            raise IndexError

    def varint(self) -> int:
        """An unsigned integer of 7 bits a byte."""
        number = shift = 0
        while (byte := self.byte()) & 128:
            number, shift = number | (byte & 127) << shift, shift + 7
            if shift > 63:
                raise TypeError
        return number | byte << shift

    def integer(self) -> int:
        """A signed integer."""
        number = self.varint()
        return number >> 1 ^ -(number & 1)
