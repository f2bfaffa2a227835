"""A shard opened for reading, once it is what the manifest says and unpacks to no more than its size allows."""

from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from features.errors import UserError
from features.fit.fitted_files import RESTORE_HINT
from features.parquet_limits import check_footer
from features.parquet_pages import check_pages
from features.parquet_schema import check_nesting_of
from features.regular_files import lstat_regular
from pipeline.dataset.dataset import Dataset
from pipeline.dataset.manifest import Shard, footer_sha256


def open_shard(dataset: Dataset, shard: Shard, columns: Sequence[str] | None = None) -> pq.ParquetFile:
    """Opens one.

    Args:
        columns: that will be read; all if None.
    Raises:
        UserError: it is no regular file, its row groups are not those of the manifest, or it would unpack to too much.
        pa.ArrowException, OSError, ValueError: it cannot be read; its footer or columns are not those that were written.
    """
    path = dataset.path / shard.path
    lstat_regular(dataset.path, shard.path)
    if footer_sha256(path) != shard.footer_sha256:
        raise pa.ArrowInvalid("its footer is not the manifest's")  # pages have checksums of their own
    check_nesting_of(path)
    file = pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)
    if file.schema_arrow != dataset.columns:
        raise pa.ArrowInvalid("its columns are not the schema's")
    footer = file.metadata
    check_row_groups(footer, path, shard)
    check_footer(footer, path, shard.bytes, columns)
    check_pages(path, footer, columns, nested=True)
    return file


def check_row_groups(footer: pq.FileMetaData, path: Path, shard: Shard) -> None:
    """Raises UserError unless the row groups of a file are those that the manifest lists."""
    if [footer.row_group(i).num_rows for i in range(footer.num_row_groups)] != shard.row_groups:
        raise UserError(f"{path}: its row groups have other numbers of rows than in the manifest. {RESTORE_HINT}")
