"""A shard opened for reading, once it is what the manifest says and unpacks to no more than its size allows."""

import hashlib
import io
import mmap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features.errors import UserError
from features.fit.fitted_files import RESTORE_HINT
from features.parquet_limits import ALWAYS_ALLOWED_BYTES, check_footer
from features.parquet_pages import Content, check_pages, chunk_start, is_part_of
from features.parquet_schema import MAGIC, MAX_FOOTER_BYTES, check_nesting, check_nesting_of
from features.regular_files import lstat_regular, mounted
from features.schema.kept import TEXT
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.entries import Shard
from pipeline.dataset.manifest import footer_sha256
from pipeline.storage.ranges import Range, coalesced, read_ranges, requests_of

FOOTER_BYTES = 256 << 10  # that are read of a footer whose length is not known
OTHER_FOOTER = "its footer is not the manifest's"  # pages have checksums of their own


def open_shard(
    dataset: Dataset, shard: Shard, columns: Sequence[str] | None = None, groups: Sequence[int] | None = None
) -> pq.ParquetFile:
    """Opens one. Kept texts are read as codes into their values: a value that many rows have is in memory once.

    Of a shard on a store, what will be read is fetched into memory.

    Args:
        columns: that will be read; all if None.
        groups: numbers of row groups that will be read; all if None. Others are to be checked before: `check_groups`.
    Raises:
        UserError: it is no regular file, its row groups are not those of the manifest, or it would unpack to too much.
        pa.ArrowException, OSError, ValueError: it cannot be read; its footer or columns are not those that were written.
    """
    path = dataset.path / shard.path
    if not mounted(path):
        fetched = FetchedShard(dataset, shard, read_footer(path, shard.bytes))
        numbers = range(fetched.footer.num_row_groups) if groups is None else groups
        check_footer(fetched.footer, path, shard.bytes, columns, groups=groups)
        wanted = requests_of(fetched.ranges(columns, numbers))
        fetched.put(zip(wanted, read_ranges(path, wanted), strict=True))
        check_groups(dataset, shard, fetched.footer, columns, groups, fetched.content)
        return fetched.file
    lstat_regular(dataset.path, shard.path)
    if footer_sha256(path) != shard.footer_sha256:
        raise pa.ArrowInvalid(OTHER_FOOTER)
    check_nesting_of(path)
    footer = pq.read_metadata(path, memory_map=True)
    file = _parquet_file(dataset, shard, path, footer)
    check_groups(dataset, shard, footer, columns, groups)
    return file


def _parquet_file(
    dataset: Dataset, shard: Shard, source: Path | pa.NativeFile, footer: pq.FileMetaData
) -> pq.ParquetFile:
    texts = _texts(dataset)
    found = {footer.schema.column(index).path for index in range(footer.num_columns)}
    file = pq.ParquetFile(
        source,
        metadata=footer,
        memory_map=True,
        page_checksum_verification=True,
        read_dictionary=[column for column in texts if column in found],
    )
    if file.schema_arrow != _as_read(dataset.columns, texts):
        raise pa.ArrowInvalid("its columns are not the schema's")
    check_row_groups(footer, dataset.path / shard.path, shard)
    return file


class FetchedShard:
    """A shard on a store: its footer, and the memory that parts of it are put into, each at its place in the file.

    So the checks and the decoding are those of a mapped file. Memory that nothing was put into is none of the machine's.

    Args:
        footer: of the file, as `read_footer`.
    Attributes:
        file: reads what was put into `content`.
    Raises:
        as open_shard; no row group is checked.
    """

    def __init__(self, dataset: Dataset, shard: Shard, footer: bytes) -> None:
        path = dataset.path / shard.path
        if hashlib.sha256(footer).hexdigest() != shard.footer_sha256:
            raise pa.ArrowInvalid(OTHER_FOOTER)
        check_nesting(io.BytesIO(MAGIC + footer), path)
        self.shard = shard
        self.footer: pq.FileMetaData = pq.read_metadata(pa.BufferReader(MAGIC + footer))
        self.content = mmap.mmap(-1, shard.bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel without large pages; with them a row group takes a tenth of the faults
            self.content.madvise(mmap.MADV_HUGEPAGE)
        self.file = _parquet_file(dataset, shard, pa.BufferReader(pa.py_buffer(self.content)), self.footer)

    def ranges(self, columns: Sequence[str] | None, groups: Iterable[int]) -> list[Range]:
        """Where the column chunks of row groups lie that check_footer has passed, in as few ranges as are worth it."""
        wanted = None if columns is None else {*columns}
        schema = self.footer.schema
        names = [schema.column(index).path for index in range(self.footer.num_columns)]
        chosen = [index for index, name in enumerate(names) if wanted is None or is_part_of(name, wanted)]
        chunks = (self.footer.row_group(group).column(index) for group in groups for index in chosen)
        places = ((chunk_start(chunk), chunk.total_compressed_size) for chunk in chunks)
        return coalesced([(start, start + size) for start, size in places])

    def put(self, parts: Iterable[tuple[Range, bytes]]) -> None:
        """Copies parts of the file into memory."""
        for (start, stop), part in parts:
            self.content[start:stop] = part

    @contextmanager
    def holding(self, parts: Iterable[tuple[Range, bytes]]) -> Iterator[mmap.mmap]:
        """Within it parts of the file are in memory, which is given back at the end."""
        self.put(parts)
        try:
            yield self.content
        finally:
            self.content.madvise(mmap.MADV_DONTNEED)


def read_footer(path: Path, size: int, guess: int = FOOTER_BYTES) -> bytes:
    """The footer of a Parquet file, with its length and magic number: all that follows the last page.

    Args:
        size: of the file. guess: bytes that are read at first, and suffice where the footer has no more.
    Raises:
        OSError: as read_ranges.
    """
    start = max(0, size - guess)
    tail = read_ranges(path, [(start, size)])[0]
    length = min(int.from_bytes(tail[-8:-4], "little"), MAX_FOOTER_BYTES) + 8
    if start and length > len(tail):
        tail = read_ranges(path, [(max(0, size - length), start)])[0] + tail
    return tail[-length:]


def check_groups(
    dataset: Dataset,
    shard: Shard,
    footer: pq.FileMetaData,
    columns: Sequence[str] | None = None,
    groups: Sequence[int] | None = None,
    content: Content | None = None,
) -> None:
    """Raises UserError where a row group of an open shard would unpack to too much.

    All of a shard of many columns take as long as decoding one of them.

    Args:
        columns, groups: as of `open_shard`.
        content: as of check_pages, for a shard on a store: its footer was checked before its pages were fetched.
    """
    path = dataset.path / shard.path
    if content is None:
        check_footer(footer, path, shard.bytes, columns, groups=groups)
    check_pages(path, footer, columns, nested=True, groups=groups, content=content)
    texts = [column for column in _texts(dataset) if columns is None or column in columns]
    check_pages(path, footer, texts, groups=groups, content=content)


def _texts(dataset: Dataset) -> list[str]:
    return [column for column, kind in dataset.schema.kept.items() if kind == TEXT]


def _as_read(columns: pa.Schema, texts: Sequence[str]) -> pa.Schema:
    for name in texts:
        columns = columns.set(columns.get_field_index(name), pa.field(name, pa.dictionary(pa.int32(), pa.string())))
    return columns


def with_plain_texts(rows: pa.Table, where: Path) -> pa.Table:
    """Rows of a shard with kept texts themselves in place of codes. Raises UserError where they are too large, naming it."""
    for index, field in enumerate(rows.schema):
        if pa.types.is_dictionary(field.type):
            codes = rows[field.name].combine_chunks()
            size = pc.sum(pc.binary_length(codes.dictionary).take(codes.indices)).as_py() or 0
            if size > ALWAYS_ALLOWED_BYTES:
                raise UserError(
                    f"{where}: column {field.name} has {size:,} bytes of text in a row group, more than "
                    f"{ALWAYS_ALLOWED_BYTES:,}. Write it in smaller row groups, or keep another column."
                )
            rows = rows.set_column(index, pa.field(field.name, TEXT), codes.cast(TEXT))
    return rows


def check_row_groups(footer: pq.FileMetaData, path: Path, shard: Shard) -> None:
    """Raises UserError unless the row groups of a file are those that the manifest lists."""
    if [footer.row_group(i).num_rows for i in range(footer.num_row_groups)] != shard.row_groups:
        raise UserError(f"{path}: its row groups have other numbers of rows than in the manifest. {RESTORE_HINT}")


def table_sizes(dataset: Dataset) -> dict[str, int | None]:
    """Rows of the table of each feature of ids; None for a managed one, whose ids are hashes."""
    schema, encoders = dataset.schema, dataset.encoders
    tables = {name: schema.table_of(name) for name in schema.sparse}
    return {n: None if schema.all_tables[t].managed else encoders.num_embeddings(t) for n, t in tables.items()}


def check_ids(file: Path, feature: str, ids: pa.Array, size: int | None) -> None:
    """Ids lie in their table: 0 .. size - 1; those of a managed table (None) are hashes, of which none is negative.

    Raises:
        UserError: one does not, or is missing; such a one would be read from the memory of other rows, or end training.
    """
    values = ids.flatten() if pa.types.is_list(ids.type) else ids
    found = pc.min_max(values).as_py()
    if ids.null_count or values.null_count:
        raise UserError(f"{file}: an id of {feature} is missing. {RESTORE_HINT}")
    if len(values) and (found["min"] < 0 or (size is not None and found["max"] >= size)):
        bad = found["min"] if found["min"] < 0 else found["max"]
        rows = f"0 .. {size - 1:,}" if size is not None else "0 and above"
        raise UserError(f"{file}: id {bad:,} of {feature} is not in its table, which has {rows}. {RESTORE_HINT}")
