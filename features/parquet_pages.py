"""Sizes of a Parquet file's pages, compared with its footer: the headers of pages decide what is allocated, not the footer."""

import mmap
from collections.abc import Iterable
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
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for number in range(footer.num_row_groups) if groups is None else groups:
            for index in chosen:
                _check_chunk(path, content, footer.row_group(number).column(index))


def _check_chunk(path: Path, content: mmap.mmap, chunk: pq.ColumnChunkMetaData) -> None:
    place = chunk_start(chunk)
    end = place + chunk.total_compressed_size
    values = unpacked = 0
    while values < chunk.num_values and place < end:
        try:
            header, body = _Thrift(content, place, end).struct()
            size, unpacked = header[PACKED], unpacked + header[UNPACKED] + body - place
            kind = next((header[field] for field in (DATA, DATA_2) if field in header), None)
            values += kind[VALUES] if kind else 0
            bad = (
                min(size, header[UNPACKED], kind[VALUES] if kind else 0, header.get(DICTIONARY, {VALUES: 0})[VALUES])
                < 0
            )
        except (IndexError, KeyError, TypeError):  # no thrift, or not that of a page
            bad = True
        if bad:
            raise UserError(f"{path}: column {chunk.path_in_schema} has a page without a valid header: it is damaged")
        place = body + size
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
