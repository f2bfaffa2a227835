"""What a Parquet file may unpack to, checked before it is decoded: a kilobyte of runs and dictionaries makes terabytes."""

from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.ingest.files import RawFile

PAGE_LIMIT = 256 << 20  # bytes of a page once it is decompressed; usual is one million
DECODED_BYTES = 512 << 20  # of the text of a batch
HEADER_BYTES = 16 << 20  # of a page, as Arrow has it
LIST_VALUE_BYTES = 8  # all of a list is in memory


def chunks_of(footer: pq.FileMetaData, group: int, wanted: Sequence[str]) -> list[Any]:
    """The column chunks of a row group that the columns `wanted` are made of."""
    meta = footer.row_group(group)
    chunks = [meta.column(i) for i in range(meta.num_columns)]
    return [chunk for chunk in chunks if chunk.path_in_schema in wanted or _top(chunk.path_in_schema, wanted)]


def _top(path: str, wanted: Sequence[str]) -> bool:
    return any(path.startswith(f"{name}.") for name in wanted)


def check_footer(file: RawFile, footer: pq.FileMetaData, groups: Sequence[int], wanted: Sequence[str]) -> None:
    """Checks the sizes that the footer gives of some row groups.

    Raises:
        ValueError: they cannot be.
        UserError: the columns unpack to more than the file may.
    """
    total = 0
    for group in groups:
        rows = footer.row_group(group).num_rows
        for chunk in chunks_of(footer, group, wanted):
            where = f", row group {group}, column {chunk.path_in_schema}"
            packed, unpacked, values = chunk.total_compressed_size, chunk.total_uncompressed_size, chunk.num_values
            if not (0 <= packed <= file.size and unpacked >= 0 and 0 <= rows <= values):
                raise ValueError(f"{where[2:]}: {values} values of {rows} rows in {packed} bytes")
            total += max(unpacked, values * (LIST_VALUE_BYTES if _is_list(footer, chunk) else 1))
            file.check_unpacked(total, where)


def _is_list(footer: pq.FileMetaData, chunk: Any) -> bool:
    return "." in chunk.path_in_schema and any(
        column.max_repetition_level > 0
        for column in (footer.schema.column(i) for i in range(footer.num_columns))
        if column.path == chunk.path_in_schema
    )


def check_pages(
    file: RawFile, raw: BinaryIO, footer: pq.FileMetaData, groups: Sequence[int], wanted: Sequence[str]
) -> None:
    """Checks the headers of all pages: a reader allocates what they say, whatever the footer has.

    Raises:
        ValueError: one is damaged, or its page is larger than PAGE_LIMIT.
        UserError: the pages of a column unpack to more than the file may.
    """
    for group in groups:
        for chunk in chunks_of(footer, group, wanted):
            where = f", row group {group}, column {chunk.path_in_schema}"
            start = min(o for o in (chunk.dictionary_page_offset, chunk.data_page_offset) if o is not None)
            total = 0
            for size in _page_sizes(raw, start, min(start + chunk.total_compressed_size, file.size)):
                if not 0 <= size <= PAGE_LIMIT:
                    raise ValueError(f"{where[2:]}: a page of {size} bytes, {PAGE_LIMIT} are allowed")
                total += size
                file.check_unpacked(total, where)


def _page_sizes(raw: BinaryIO, position: int, end: int) -> Iterator[int]:
    """The bytes of each page of a column chunk once it is decompressed, as its header says."""
    while position < end:
        raw.seek(position)
        data, size = raw.read(1 << 10), 1 << 10
        while True:
            try:
                header = _Header(data)
                break
            except IndexError:
                size *= 4
                if len(data) < size // 4 or size > HEADER_BYTES:
                    raise ValueError(f"no page header at byte {position}") from None
                raw.seek(position)
                data = raw.read(size)
        if header.packed < 0:
            raise ValueError(f"no page header at byte {position}")
        yield header.unpacked
        position += header.length + header.packed


class _Header:
    """The beginning of a page header, in Thrift's compact protocol.

    Attributes:
        unpacked, packed: sizes of the page in bytes.
        length: of the header.
    """

    def __init__(self, data: bytes) -> None:
        """Raises IndexError where `data` end within it, ValueError where it is none."""
        self.data, self.length = data, 0
        found = self._struct(0)
        if not {2, 3} <= found.keys():
            raise ValueError("a page header without sizes")
        self.unpacked, self.packed = found[2], found[3]

    def _struct(self, depth: int) -> dict[int, int]:
        """Skips a struct and returns its integers by field."""
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
            self._struct(depth + 1)
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


def batch_rows(raw: BinaryIO, footer: pq.FileMetaData, groups: Sequence[int], wanted: Sequence[str], rows: int) -> int:
    """At most `rows`: so many that the text of a batch is about DECODED_BYTES, however long the values of dictionaries are.

    Raises:
        ValueError: lists of such values are too large for any batch.
    """
    longest: dict[str, int] = {}
    for group in groups:
        chunks = [c for c in chunks_of(footer, group, wanted) if c.physical_type == "BYTE_ARRAY" and c.num_values]
        for chunk, size in zip(chunks, _longest(raw, chunks, group), strict=True):
            longest[chunk.path_in_schema] = max(size, longest.get(chunk.path_in_schema, 0))
            if _is_list(footer, chunk) and size * chunk.num_values > DECODED_BYTES:
                _check_lists(raw, chunk, group, rows)
    total = sum(longest.values())
    return max(1, min(rows, DECODED_BYTES // max(total, 1)))


def _longest(raw: BinaryIO, chunks: Sequence[Any], group: int) -> list[int]:
    """The bytes of the longest value in the dictionary of each chunk, read with its first row."""
    found = []
    for chunk in chunks:
        batch = next(_dictionaries(raw, chunk, group, 1), None)
        dictionary = None if batch is None else batch.dictionary
        found.append(pc.max(pc.binary_length(dictionary)).as_py() or 0 if dictionary is not None else 0)
    return found


def _check_lists(raw: BinaryIO, chunk: Any, group: int, rows: int) -> None:
    """Raises ValueError where the lists of a batch have more text than DECODED_BYTES."""
    for batch in _dictionaries(raw, chunk, group, rows):
        lengths = pc.cast(pc.binary_length(batch.dictionary), pa.int64())
        size = pc.sum(lengths.take(batch.indices)).as_py() or 0
        if size > DECODED_BYTES:
            raise ValueError(f"row group {group}, column {chunk.path_in_schema}: lists of {size} bytes in {rows} rows")


def _dictionaries(raw: BinaryIO, chunk: Any, group: int, rows: int) -> Iterator[pa.DictionaryArray]:
    """The values of a column chunk as codes, without the lists around them."""
    path = chunk.path_in_schema
    file = pq.ParquetFile(raw, read_dictionary=[path], buffer_size=1 << 16)
    for batch in file.iter_batches(rows, [group], [path], use_threads=False):
        values = batch.column(0)
        while pa.types.is_nested(values.type) and hasattr(values, "flatten"):
            flat = values.flatten()
            values = flat[0] if isinstance(flat, list) else flat
        if not pa.types.is_dictionary(values.type):
            return
        yield values
