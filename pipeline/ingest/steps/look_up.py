"""Step `look_up`: the columns of side tables for what impressions ask of them, by part or by bucket of keys.

A table that is broadcast is held by every worker, which does the lookups of a part at a time. Of a larger one, rows and
lookups are scattered to buckets by key while they are read, and the results of a bucket come back as a batch for each part.
"""

from collections import Counter
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from features.errors import UserError
from features.hashing import bucket_of
from features.join import side_tables
from features.join.side_tables import KEY, VALID_FROM, Lookups, SideTableIndex
from features.parse import raw
from features.schema.schema import Schema
from features.source import RawType
from pipeline.ingest import shuffle
from pipeline.ingest.messages import LookUpReport, LookUpWork, TypedPart
from pipeline.ingest.state import Job
from pipeline.ingest.steps.placed import placed


def table_types(schema: Schema, name: str) -> dict[str, RawType]:
    """The columns that are read of a side table; its key in the type that it has in the impressions, as outcomes' are."""
    table = schema.source.tables[name]
    return {table.key: schema.raw_types.get(table.foreign_key, "string"), **table.types}


def separators(job: Job, name: str) -> dict[str, str]:
    """The columns of a side table that may hold lists, with the separator of items where they hold text."""
    found = raw.list_columns(job.schema)
    columns = job.schema.source.tables[name].columns
    return {column: found[f"{name}_{column}"] for column in columns if f"{name}_{column}" in found}


def scatter_rows(job: Job, name: str, rows: pa.Table, snapshot: int | None) -> tuple[str, pl.DataFrame]:
    """Scatters a block of a side table to buckets, if it has any; rows without a key or a plausible time are dead letters.

    Args:
        snapshot: when the file's rows become valid, where the table has no such column.
    """
    table = job.schema.source.tables[name]
    if pa.types.is_nested(rows.schema.field(table.key).type):
        raise UserError(f"source.tables.{name}: its key {table.key} holds lists: name a column with one value a row")
    rows, dead_letters = placed(job, name, rows, table.key, table.valid_from)
    keys = side_tables.canonical_codes(rows[table.key].combine_chunks(), f"source.tables.{name}.key: {table.key}")
    columns: dict[str, pa.Array] = {KEY: keys.cast(pa.large_string())}
    if table.valid_from:
        columns[VALID_FROM] = rows[table.valid_from]
    elif name in job.snapshots:
        columns[VALID_FROM] = pa.array(np.full(rows.num_rows, snapshot, np.int64))
    for column in table.columns:
        nested = pa.types.is_nested(rows.schema.field(column).type)
        columns[column] = rows[column].cast(pa.large_list(pa.large_string())) if nested else rows[column]
    return _scatter(job, pa.table(columns), 1 if name in job.broadcast else job.buckets), dead_letters


def scatter_lookups(job: Job, rows: pa.Table) -> dict[str, str]:
    """Scatters the lookups of a block of impressions in the side tables that are not broadcast; returns the path for each."""
    found = {}
    for name in job.schema.source.tables.keys() - job.broadcast:
        lookups = _lookups(job, name, rows).distinct
        lookups = lookups.append_column(shuffle.POSITION, pa.array(np.arange(lookups.num_rows)))
        found[name] = _scatter(job, lookups, job.buckets)
    return found


def _scatter(job: Job, table: pa.Table, buckets: int) -> str:
    bucket_B = bucket_of(table[KEY].combine_chunks(), buckets)
    return shuffle.write(job.temporary_path("scattered"), shuffle.partition(table, bucket_B, buckets))


def _lookups(job: Job, name: str, rows: pa.Table) -> Lookups:
    """What typed rows ask of a side table. Raises UserError for a key that has fractions, or holds lists."""
    schema, table = job.schema, job.schema.source.tables[name]
    plain = table.foreign_key in schema.source.derived or pa.types.is_nested(rows.schema.field(table.foreign_key).type)
    keys = raw.column(schema, rows, table.foreign_key) if plain else rows[table.foreign_key].combine_chunks()
    time_B = None
    if table.valid_from or name in job.snapshots:
        time_B = raw.event_time(schema, rows).fill_null(side_tables.NEVER).to_numpy()
    return side_tables.lookups(
        side_tables.canonical_codes(keys, f"source.tables.{name}.by: {table.foreign_key}"), time_B
    )


def look_up(job: Job, work: LookUpWork) -> LookUpReport:
    """Does the lookups of a part in a broadcast table, or those of a bucket."""
    name = work.table
    if name in job.broadcast:
        index = _broadcast_index(job, name)
        lookups = _lookups(job, name, shuffle.read(job.typed()[work.index].path)).distinct
        found = index.find(lookups)
        results = side_tables.take(index.values, found.row_Q, name)
        path = shuffle.write(job.temporary_path("gathered"), [results])
        return _report(work, path, index, found)
    index = _index(job, name, work.index)
    paths = [part.lookups[name] for part in job.typed()]
    parts = shuffle.read_each(paths, [work.index] * len(paths))
    lookups = pa.concat_tables(parts)
    found = index.find(lookups)
    ends = np.cumsum([part.num_rows for part in parts])
    results = [
        side_tables.take(index.values, row_Q, name).append_column(shuffle.POSITION, part[shuffle.POSITION])
        for part, row_Q in zip(parts, np.split(found.row_Q, ends[:-1]), strict=True)
    ]
    return _report(work, shuffle.write(job.temporary_path("gathered"), results), index, found)


def _report(work: LookUpWork, path: str, index: SideTableIndex, found: side_tables.Found) -> LookUpReport:
    rows = index.values.num_rows + index.duplicates
    return LookUpReport(work.table, path, rows, index.keys, index.duplicates, found.statuses, found.sketch)


def _index(job: Job, name: str, bucket: int, mapped: bool = False) -> SideTableIndex:
    paths = job.table_rows(name)
    rows = side_tables.same_types(shuffle.read_each(paths, [bucket] * len(paths), mapped), separators(job, name))
    return SideTableIndex(rows, job.snapshots.get(name))


def _broadcast_index(job: Job, name: str) -> SideTableIndex:
    """Loaded once a worker and step."""
    key = f"side table {name}"
    if key not in job.cache:
        job.cache[key] = _index(job, name, 0, mapped=True)
    return job.cache[key]


def part_rows(job: Job, index: int, part: TypedPart) -> pa.Table:
    """The typed rows of a part, with the columns of side tables."""
    rows = shuffle.read(part.path)
    for name in job.schema.source.tables:
        lookups = _lookups(job, name, rows)
        reports = [report for report in job.found(LookUpReport) if report.table == name]
        if name in job.broadcast:
            results = shuffle.read(reports[index].path)
        else:
            results = shuffle.gather([report.path for report in reports], index, lookups.distinct.num_rows)
        for column, values in side_tables.spread(results, lookups.lookup_B, name).items():
            rows = rows.append_column(column, values)
    return rows


def side_table_counts(job: Job) -> dict[str, dict[str, Any]]:
    """What the manifest says of each side table: its rows, and what became of the impressions' keys."""
    impressions = sum(part.rows for part in job.typed())
    found = {}
    for name in job.schema.source.tables:
        reports = [report for report in job.found(LookUpReport) if report.table == name]
        of_table = reports[:1] if name in job.broadcast else reports
        statuses: Counter[str] = sum((Counter(report.statuses) for report in reports), Counter())
        found[name] = {
            **{what: sum(getattr(report, what) for report in of_table) for what in ("rows", "keys", "duplicates")},
            **{f"{status}_rows": statuses[status] for status in side_tables.LOOK_UP_STATUSES},
            "missing_key_rows": impressions - statuses.total(),
            "unmatched_keys": side_tables.distinct_keys(
                side_tables.merged_sketch([report.sketch for report in reports])
            ),
        }
    return found
