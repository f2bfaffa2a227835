"""What a Parquet file may unpack to, checked before it is decoded: a kilobyte of runs and dictionaries makes terabytes."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features.parquet_limits import check_chunks
from features.parquet_pages import Content, pages
from pipeline.ingest.files import RawFile

PAGE_LIMIT = 256 << 20  # bytes of a page once it is decompressed; usual is one million
DECODED_BYTES = 512 << 20  # of the text of a batch
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
    found, groups = [], list(groups)
    check_chunks(footer, file.size, groups, wanted)
    for group in groups:
        meta = footer.row_group(group)
        found += [Chunk(group, meta.column(index), meta.num_rows, is_list) for index, is_list in leaves]
    return found


def check_footer_sizes(file: RawFile, chunks: Iterable[Chunk]) -> None:
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


def check_page_sizes(file: RawFile, content: Content, chunks: Iterable[Chunk]) -> None:
    """Checks the headers of all pages: a reader allocates what they say, whatever the footer has.

    Raises:
        ValueError: one is damaged, or its page is larger than PAGE_LIMIT.
        UserError: the pages unpack to more than the file may.
    """
    total = 0
    for chunk in chunks:
        for page in pages(content, chunk.meta):
            if page.unpacked > PAGE_LIMIT:
                raise ValueError(f"{chunk.where}: a page of {page.unpacked} bytes, {PAGE_LIMIT} are allowed")
            total += page.unpacked
            file.check_unpacked(total, f", {chunk.where}")


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
