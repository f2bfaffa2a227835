"""Parquet: units are row groups, and rows are numbered in their file."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from features.parquet_pages import mapped
from features.parquet_schema import check_nesting
from features.parse.convert import NotUTF8Error, convert_columns
from pipeline.ingest.files import BLOCK_BYTES, RawFile, Unit, is_local, open_raw, readable
from pipeline.ingest.formats.base import BadLine, Block, OnBytes, RawFormat, Wanted
from pipeline.ingest.formats.columns import not_utf8, shown_rows, type_names
from pipeline.ingest.formats.parquet_expansion import batch_rows, check_footer_sizes, check_page_sizes, chunks_of
from pipeline.ingest.formats.text import NOT_UTF8

BLOCK_ROWS = 1 << 17  # of a block: values that repeat take next to no bytes in the file


class Parquet(RawFormat):
    """Parquet files; columns that the schema wants are read, all others are skipped."""

    def column_names(self, file: RawFile) -> list[str] | None:
        """See RawFormat."""
        with readable(file.path), open_raw(file.path) as raw:
            check_nesting(raw, file.path)
            return pq.ParquetFile(raw).schema_arrow.names

    def units(self, file: RawFile, number: int, unit_bytes: int, whole: bool) -> list[Unit]:  # noqa: ARG002
        """See RawFormat. The footer has the number of rows in each row group, so any file can be cut."""
        with readable(file.path), open_raw(file.path) as raw:
            check_nesting(raw, file.path)
            footer = pq.ParquetFile(raw).metadata
            groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
            if any(g.num_rows < 0 or g.total_byte_size < 0 for g in groups):
                raise ValueError("the footer has a row group of less than no rows or bytes")
        found, start, first_row, size = [], 0, 0, 0
        for index, group in enumerate(groups, 1):
            size += group.total_byte_size
            if size >= unit_bytes or index == len(groups):
                found.append(Unit(file, number, start, index, first_row))
                first_row += sum(g.num_rows for g in groups[start:index])
                start, size = index, 0
        return found or [Unit(file, number)]

    def read(self, unit: Unit, wanted: Wanted, on_bytes: OnBytes) -> Iterator[Block]:
        """See RawFormat."""
        path, row = unit.file.path, 0
        with readable(path), open_raw(path) as raw:
            check_nesting(raw, path)
            file = pq.ParquetFile(raw, pre_buffer=True)
            stop = file.num_row_groups if unit.stop is None else unit.stop
            groups = range(unit.start, stop)
            footers = [file.metadata.row_group(i) for i in groups]
            rows, size = sum(g.num_rows for g in footers), sum(g.total_byte_size for g in footers)
            chunks = chunks_of(unit.file, file.metadata, groups, list(wanted.types))
            check_footer_sizes(unit.file, chunks)
            if is_local(path):  # of other files every page would cost a request
                with mapped(Path(path)) as content:
                    check_page_sizes(unit.file, content, chunks)
            most = max(1, min(BLOCK_ROWS, rows * BLOCK_BYTES // max(size, 1)))
            most = batch_rows(unit.file, raw, file.metadata, chunks, most)
            for batch in file.iter_batches(most, list(groups), list(wanted.types), use_threads=False):
                found = {name: batch[name] for name in wanted.types}
                number_B = unit.first_row + row + 1 + np.arange(batch.num_rows)
                yield self._block(path, found, wanted, row, number_B)
                row += batch.num_rows
                on_bytes(unit.file.size * row // file.metadata.num_rows)

    def _block(self, path: str, found: dict[str, pa.Array], wanted: Wanted, row: int, number_B: np.ndarray) -> Block:
        """A batch as a block; rows with text that is not UTF-8 are bad ones."""
        bad, good = list[BadLine](), found
        try:
            columns = convert_columns(path, good, wanted.types, self.options, wanted.ids)
        except NotUTF8Error:
            bad_B = not_utf8(found)
            lost = shown_rows({name: values.filter(pa.array(bad_B)) for name, values in found.items()})
            bad = [BadLine(number, NOT_UTF8, text) for number, text in zip(number_B[bad_B].tolist(), lost, strict=True)]
            good, number_B = {name: values.filter(pa.array(~bad_B)) for name, values in found.items()}, number_B[~bad_B]
            columns = convert_columns(path, good, wanted.types, self.options, wanted.ids)
        return Block(columns, row, lambda: number_B, bad, types=type_names(found))
