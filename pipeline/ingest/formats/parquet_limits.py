"""What a Parquet file may unpack to, checked before it is decoded: a kilobyte of runs and dictionaries makes terabytes."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.ingest.files import RawFile

PAGE_LIMIT = 256 << 20  # bytes of a page once it is decompressed; usual is one million
DECODED_BYTES = 512 << 20  # of the text of a batch
HEADER_BYTES = 16 << 20  # of a page, as Arrow has it
DICTIONARY_PAGE = 2  # of PageType in parquet.thrift
LIST_VALUE_BYTES = 8  # all of a list is in memory


@dataclass(frozen=True)
class Chunk:
    """A column of a row group, as the footer has it.

    Attributes:
        meta: its pyarrow.parquet.ColumnChunkMetaData.
        rows: of the row group.
    """

    group: int
    meta: Any
    rows: int
    is_list: bool

    @property
    def where(self) -> str:
        """Its place in the file, for messages."""
        return f"row group {self.group}, column {self.meta.path_in_schema}"


def chunks_of(file: RawFile, footer: pq.FileMetaData, groups: Iterable[int], wanted: Sequence[str]) -> list[Chunk]:
    """The chunks of which these columns are made. Raises OSError where the footer is damaged."""
    names, leaves = set(wanted), list[tuple[int, bool]]()
    for index in range(footer.num_columns):
        column = footer.schema.column(index)
        if names & {*accumulate(column.path.split("."), "{}.{}".format)}:
            leaves.append((index, column.max_repetition_level > 0))
    found = []
    for group in groups:
        _check_metadata(file, footer, group, wanted)
        meta = footer.row_group(group)
        found += [Chunk(group, meta.column(index), meta.num_rows, is_list) for index, is_list in leaves]
    return found


def _check_metadata(file: RawFile, footer: pq.FileMetaData, group: int, wanted: Sequence[str]) -> None:
    """Raises OSError where column chunks are damaged in the footer.

    To ask pyarrow for such a chunk would end the process, by an exception that nobody catches; a reader finds it in order,
    before it reads the first page.
    """
    reader = pq.ParquetFile(pa.PythonFile(_NoPages(file.size), mode="r"), metadata=footer, buffer_size=1 << 16)
    try:
        next(reader.iter_batches(1, [group], list(wanted), use_threads=False), None)
    except _PageReadError:
        return


class _PageReadError(Exception):
    """A reader has come to the pages of a file."""


class _NoPages:
    """A file of which only the footer is known."""

    closed = False

    def __init__(self, size: int) -> None:
        self._size, self._position = size, 0

    def size(self) -> int:
        return self._size

    def seek(self, position: int, whence: int = 0) -> int:
        self._position = position + (0, self._position, self._size)[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, _: int = -1) -> bytes:
        raise _PageReadError

    def close(self) -> None:
        pass


def check_footer(file: RawFile, chunks: Iterable[Chunk]) -> None:
    """Checks the sizes that the footer gives.

    Raises:
        ValueError: they cannot be.
        UserError: the columns unpack to more than the file may.
    """
    total = 0
    for chunk in chunks:
        packed, unpacked, values = (
            chunk.meta.total_compressed_size, chunk.meta.total_uncompressed_size, chunk.meta.num_values
        )  # fmt: skip
        if not (0 <= packed <= file.size and unpacked >= 0 and 0 <= chunk.rows <= values):
            raise ValueError(f"{chunk.where}: {values} values of {chunk.rows} rows in {packed} bytes")
        total += max(unpacked, values * (LIST_VALUE_BYTES if chunk.is_list else 1))
        file.check_unpacked(total, f", {chunk.where}")


def check_pages(file: RawFile, raw: BinaryIO, chunks: Iterable[Chunk]) -> None:
    """Checks the headers of all pages: a reader allocates what they say, whatever the footer has.

    Raises:
        ValueError: one is damaged, or its page is larger than PAGE_LIMIT.
        UserError: the pages unpack to more than the file may.
    """
    total = 0
    for chunk in chunks:
        for size in _page_sizes(raw, chunk.meta, file.size):
            if not 0 <= size <= PAGE_LIMIT:
                raise ValueError(f"{chunk.where}: a page of {size} bytes, {PAGE_LIMIT} are allowed")
            total += size
            file.check_unpacked(total, f", {chunk.where}")


def _page_sizes(raw: BinaryIO, chunk: Any, file_size: int) -> Iterator[int]:
    """The bytes of each page of a column chunk once it is decompressed, as its header says; of those that a reader reads."""
    # A row group without rows has no offsets.
    start = min((offset for offset in (chunk.dictionary_page_offset, chunk.data_page_offset) if offset), default=0)
    position, values, end = start, 0, min(start + chunk.total_compressed_size, file_size)
    while position < end and values < chunk.num_values:
        header = _header(raw, position)
        if header.packed < 0 or header.values < 0:
            raise ValueError(f"no page header at byte {position}")
        if header.kind == DICTIONARY_PAGE and position != start:
            raise ValueError(f"a dictionary after other pages, at byte {position}")
        yield header.unpacked
        position += header.length + header.packed
        values += header.values


def _header(raw: BinaryIO, position: int) -> "_Header":
    size = 1 << 10
    while size <= HEADER_BYTES:
        raw.seek(position)
        data = raw.read(size)
        try:
            return _Header(data)
        except IndexError:
            if len(data) < size:
                break
            size *= 4
    raise ValueError(f"no page header at byte {position}")


class _Header:
    """The beginning of a page header, in Thrift's compact protocol.

    Attributes:
        kind: of the page.
        unpacked, packed: sizes of the page in bytes.
        values: number of values, 0 but in data pages.
        length: of the header.
    """

    def __init__(self, data: bytes) -> None:
        """Raises IndexError where `data` end within it, ValueError where it is none."""
        self.data, self.length = data, 0
        found = self._struct(0)
        if not {1, 2, 3} <= found.keys():
            raise ValueError("a page header without sizes")
        self.kind, self.unpacked, self.packed = found[1], found[2], found[3]
        self.values = found.get(5, 0) + found.get(8, 0)  # the headers of data pages of version 1 and 2

    def _struct(self, depth: int) -> dict[int, int]:
        """Skips a struct and returns its integers by field, and of structs in it their first field."""
        field, found = 0, dict[int, int]()
        while kind := self._byte():
            field = field + (kind >> 4) if kind >> 4 else self._integer()
            value = self._skip(kind & 15, depth)
            if value is not None:
                found[field] = value
        return found

    def _skip(self, kind: int, depth: int) -> int | None:
        if kind in (1, 2):  # a boolean is its type
            return None
        if kind in (4, 5, 6):
            return self._integer()
        if kind == 3:
            self._byte()
        elif kind == 7:
            self._advance(8)
        elif kind == 8:
            self._advance(self._varint())
        elif kind == 12 and depth < 8:
            return self._struct(depth + 1).get(1)
        else:
            raise ValueError("a page header with a field of an unknown type")
        return None

    def _advance(self, size: int) -> None:
        self.length += size
        if self.length > len(self.data):
            raise IndexError

    def _byte(self) -> int:
        self._advance(1)
        return self.data[self.length - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            if (shift := shift + 7) > 63:
                raise ValueError("a page header with a number of too many bytes")

    def _integer(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)


def batch_rows(file: RawFile, raw: BinaryIO, footer: pq.FileMetaData, chunks: Iterable[Chunk], rows: int) -> int:
    """At most `rows`: so many that the text of a batch is about DECODED_BYTES, however long the values of dictionaries are.

    Raises:
        ValueError: lists of such values are too large for any batch.
        UserError: the text is more than the file may unpack to.
    """
    texts = [chunk for chunk in chunks if chunk.meta.physical_type == "BYTE_ARRAY" and chunk.meta.num_values]
    paths = list(dict.fromkeys(chunk.meta.path_in_schema for chunk in texts))
    reader = pq.ParquetFile(raw, metadata=footer, read_dictionary=paths, buffer_size=1 << 16)
    longest, most = dict.fromkeys(paths, 0), list[int]()  # bytes of a value by column, and of all values of each chunk
    for chunk in texts:
        # A reader has the dictionary from the first row on, but of lists only from the first one that is not empty.
        found = _dictionaries(reader, chunk, rows if chunk.is_list else 1)
        first = next((values for values in found if len(values.dictionary) or not chunk.is_list), None)
        size = 0 if first is None else pc.max(pc.binary_length(first.dictionary)).as_py() or 0
        longest[chunk.meta.path_in_schema] = max(size, longest[chunk.meta.path_in_schema])
        most.append(size * chunk.meta.num_values)
    count_all, total = sum(most) > file.max_unpacked, 0
    for chunk, size in zip(texts, most, strict=True):
        if count_all or (chunk.is_list and size > DECODED_BYTES):
            total += _text_bytes(reader, chunk, rows)
            file.check_unpacked(total, f", {chunk.where}")
    return max(1, min(rows, DECODED_BYTES // max(sum(longest.values()), 1)))


def _text_bytes(reader: pq.ParquetFile, chunk: Chunk, rows: int) -> int:
    """The bytes of a chunk's text. Raises ValueError where lists in a batch of so many rows have more than DECODED_BYTES."""
    total = 0
    for values in _dictionaries(reader, chunk, rows):
        lengths = pc.binary_length(values.dictionary).cast(pa.int64())
        size = pc.sum(lengths.take(values.indices)).as_py() or 0
        if chunk.is_list and size > DECODED_BYTES:
            raise ValueError(f"{chunk.where}: lists of {size} bytes in {rows} rows, {DECODED_BYTES} are allowed")
        total += size
    return total


def _dictionaries(file: pq.ParquetFile, chunk: Chunk, rows: int) -> Iterator[pa.DictionaryArray]:
    """The values of a column chunk as codes, without the lists around them; none where it cannot be read in this way."""
    for batch in file.iter_batches(rows, [chunk.group], [chunk.meta.path_in_schema], use_threads=False):
        values = batch.column(0)
        while pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
            values = values.flatten()
        if not pa.types.is_dictionary(values.type):
            return
        yield values
