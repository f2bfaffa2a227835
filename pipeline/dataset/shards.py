"""A shard opened for reading, once it is what the manifest says and unpacks to no more than its size allows."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features.errors import UserError
from features.fit.fitted_files import RESTORE_HINT
from features.parquet_limits import ALWAYS_ALLOWED_BYTES, check_footer
from features.parquet_pages import check_pages
from features.parquet_schema import check_nesting_of
from features.regular_files import lstat_regular
from features.schema.kept import TEXT
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.entries import Shard
from pipeline.dataset.manifest import footer_sha256


def open_shard(
    dataset: Dataset, shard: Shard, columns: Sequence[str] | None = None, groups: Sequence[int] | None = None
) -> pq.ParquetFile:
    """Opens one. Kept texts are read as codes into their values: a value that many rows have is in memory once.

    Args:
        columns: that will be read; all if None.
        groups: numbers of row groups that will be read; all if None. Others are to be checked before: `check_groups`.
    Raises:
        UserError: it is no regular file, its row groups are not those of the manifest, or it would unpack to too much.
        pa.ArrowException, OSError, ValueError: it cannot be read; its footer or columns are not those that were written.
    """
    path = dataset.path / shard.path
    lstat_regular(dataset.path, shard.path)
    if footer_sha256(path) != shard.footer_sha256:
        raise pa.ArrowInvalid("its footer is not the manifest's")  # pages have checksums of their own
    check_nesting_of(path)
    texts = _texts(dataset)
    footer = pq.read_metadata(path, memory_map=True)
    found = {footer.schema.column(index).path for index in range(footer.num_columns)}
    file = pq.ParquetFile(
        path,
        metadata=footer,
        memory_map=True,
        page_checksum_verification=True,
        read_dictionary=[column for column in texts if column in found],
    )
    if file.schema_arrow != _as_read(dataset.columns, texts):
        raise pa.ArrowInvalid("its columns are not the schema's")
    check_row_groups(footer, path, shard)
    check_groups(dataset, shard, footer, columns, groups)
    return file


def check_groups(
    dataset: Dataset,
    shard: Shard,
    footer: pq.FileMetaData,
    columns: Sequence[str] | None = None,
    groups: Sequence[int] | None = None,
) -> None:
    """Raises UserError where a row group of an open shard would unpack to too much. Arguments as of `open_shard`.

    All of a shard of many columns take as long as decoding one of them.
    """
    path = dataset.path / shard.path
    check_footer(footer, path, shard.bytes, columns, groups=groups)
    check_pages(path, footer, columns, nested=True, groups=groups)
    texts = [column for column in _texts(dataset) if columns is None or column in columns]
    check_pages(path, footer, texts, groups=groups)


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
