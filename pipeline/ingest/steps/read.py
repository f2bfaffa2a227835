"""Step `read`: a unit of a raw file to typed rows."""

from collections import Counter
from collections.abc import Iterator

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from features.errors import UserError
from features.parse import raw
from features.parse.raw import LINE, ROW
from features.source import RawType
from pipeline.ingest import shuffle
from pipeline.ingest.absent_columns import Completion
from pipeline.ingest.bad_rows import BadRows
from pipeline.ingest.files import check_unchanged
from pipeline.ingest.formats import raw_format
from pipeline.ingest.formats.base import Block, LineCounts, Wanted
from pipeline.ingest.messages import LabelledPart, ReadReport, ReadWork, TypedPart
from pipeline.ingest.progress import UnitProgress
from pipeline.ingest.state import IMPRESSIONS, Job
from pipeline.ingest.steps.dead_letters import spill
from pipeline.ingest.steps.join import comparable, key_type, scatter, scatter_keys
from pipeline.ingest.steps.label import label_rows
from pipeline.ingest.steps.look_up import scatter_lookups, scatter_rows, separators, table_types
from pipeline.ingest.steps.placed import placed

ROW_ID_STRIDE = 1 << 40  # row_id = number of the file * stride + row in it, where the schema names no row_id column


def read(job: Job, work: ReadWork) -> ReadReport:
    """Reads a unit: impressions to typed parts, or without joins labelled ones; outcomes and side tables to buckets."""
    stream, unit = work.stream, work.unit
    outcome = job.schema.source.outcomes.get(stream)
    table = job.schema.source.tables.get(stream)
    options = job.schema.source.format_of(None if stream == IMPRESSIONS else stream)
    types = _types(job, stream)
    codes = raw.code_columns(job.schema) if stream == IMPRESSIONS else set()
    lists = raw.list_columns(job.schema) if stream == IMPRESSIONS else separators(job, stream) if table else {}
    keys, ids = _named(job, stream, types)
    completion = Completion(types, work.names, options, lists)
    progress, bad_rows = UnitProgress(job.progress, work.number), BadRows(job, work)

    def on_bytes(done: int) -> None:
        progress.record(done)
        bad_rows.record(done)

    blocks = raw_format(options).read(unit, Wanted(completion.present, work.names, lists, ids), on_bytes)
    met: dict[str, Counter[str]] = {}
    typed_parts, labelled, outcomes, table_rows, bad, latest, count, lines = [], [], [], [], [], [], 0, 0
    counts, swallowed = LineCounts(), 0
    for block in _at_least_one(blocks, completion.present):
        columns = completion.complete(block.columns)
        first = unit.first_row + block.row
        typed = raw.type_columns(columns, types, codes, options, block.line_numbers(), first, keys)
        if outcome is not None:
            path, dead_letters = _scatter_outcomes(job, stream, typed.rows)
            outcomes.append(path)
        elif table is not None:
            path, dead_letters = scatter_rows(job, stream, typed.rows, work.snapshot)
            table_rows.append(path)
        else:
            part, dead_letters = _impressions(job, work, typed.rows)
            if isinstance(part, TypedPart):
                typed_parts.append(part)
            else:
                labelled.append(part)
            if job.joins and job.schema.event_time:
                latest.append(pc.max(raw.event_time(job.schema, typed.rows)).as_py())
        no_rows = [(line.line, line.reason, line.raw) for line in block.bad]
        found = [raw.dead_letters(*zip(*no_rows, strict=True) if no_rows else ()), typed.bad, dead_letters]
        bad_rows.count(block.columns.num_rows + len(block.bad), found, block.line_count)
        bad += found
        count += block.columns.num_rows + len(block.bad)
        lines += block.line_count
        for column, kind in block.types.items():
            met.setdefault(column, Counter())[kind] += block.columns.num_rows
        counts += block.counts
        swallowed += sum(line.lines - 1 for line in block.bad)
    bad_rows.end()
    check_unchanged(unit.file)
    return ReadReport(
        stream=stream, file=unit.file.path, lines=lines, read=count, typed=typed_parts, labelled=labelled,
        outcomes=outcomes, latest=max((time for time in latest if time is not None), default=None),
        dead_letters=spill(job, bad), table_rows=table_rows, absent=completion.absent, keys=completion.keys,
        types={column: dict(rows) for column, rows in met.items()}, counts=counts, swallowed=swallowed,
        bytes=bad_rows.bytes,
    )  # fmt: skip


def _types(job: Job, stream: str) -> dict[str, RawType]:
    """The columns that are read of a stream."""
    if outcome := job.schema.source.outcomes.get(stream):
        return {outcome.key: key_type(job.schema), **outcome.types}
    if stream in job.schema.source.tables:
        return table_types(job.schema, stream)
    return {name: job.schema.raw_types.get(name, "string") for name in job.schema.raw_columns}


def _named(job: Job, stream: str, types: dict[str, RawType]) -> tuple[set[str], set[str]]:
    """The text columns of a stream that are keys of a join, and those whose values name something, keys among them."""
    source = job.schema.source
    if outcome := source.outcomes.get(stream):
        named = {outcome.key}
    elif table := source.tables.get(stream):
        named = {table.key}
    else:
        named = {str(source.key), *(table.foreign_key for table in source.tables.values())}
    keys = {key for key in named if types.get(key) == "string"}
    if stream == IMPRESSIONS:
        return keys, raw.id_columns(job.schema)
    ids = {
        column for column in types if f"{stream}_{column}" in raw.id_columns(job.schema) and types[column] == "string"
    }
    return keys, keys | (ids if stream in source.tables else set())


def _at_least_one(blocks: Iterator[Block], types: dict[str, RawType]) -> Iterator[Block]:
    """The blocks of a unit; without any, one that has no rows: later steps need the columns."""
    block = None
    for block in blocks:
        yield block
    if block is None:
        yield Block(pa.table({name: pa.array([], pa.string()) for name in types}), 0, lambda: np.empty(0, np.int64))


def _impressions(job: Job, work: ReadWork, rows: pa.Table) -> tuple[TypedPart | LabelledPart, pl.DataFrame]:
    """Spills a block of impressions, or labels it at once where nothing is joined to it."""
    row_id = work.unit.number * ROW_ID_STRIDE
    if not job.joins:
        return label_rows(job, work.number, row_id, rows)
    path = shuffle.write(job.temporary_path("typed"), [rows])
    keys = scatter_keys(job, rows) if job.schema.source.outcomes else None
    return TypedPart(work.number, rows.num_rows, row_id, path, keys, scatter_lookups(job, rows)), raw.dead_letters()


def _scatter_outcomes(job: Job, name: str, rows: pa.Table) -> tuple[str, pl.DataFrame]:
    """Scatters a block of outcomes to buckets; those without a key or a plausible time belong to no impression."""
    outcome = job.schema.source.outcomes[name]
    if pa.types.is_nested(rows.schema.field(outcome.key).type):
        raise UserError(
            f"source.outcomes.{name}: its key {outcome.key} holds lists: name a column with one value a row"
        )
    rows, dead_letters = placed(job, name, rows, outcome.key, outcome.time)
    key = comparable(job.schema, rows[outcome.key].combine_chunks(), f"source.outcomes.{name}: its key {outcome.key}")
    rows = rows.set_column(rows.column_names.index(outcome.key), outcome.key, key)
    return scatter(job, rows.drop_columns([LINE, ROW]), outcome.key), dead_letters
