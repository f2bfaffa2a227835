"""Step `join`: outcomes to the impressions that they belong to, a bucket of keys at a time."""

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from features.errors import UserError
from features.hashing import bucket_of
from features.join.outcomes import EXAMPLES, join
from features.kinds.canonical import canonical
from features.parse import raw
from features.schema.schema import Schema
from features.source import RawType
from pipeline.ingest import shuffle
from pipeline.ingest.messages import JoinReport, JoinSide, JoinWork
from pipeline.ingest.state import Job


def key_type(schema: Schema) -> RawType:
    """The type in which keys are read and compared, on both sides of a join."""
    return schema.raw_types.get(str(schema.source.key), "string")


def comparable(schema: Schema, keys: pa.Array, where: str) -> pa.Array:
    """Keys of either side as integers, or as canonical texts. Raises UserError, naming `where`, for a value that is no key."""
    return keys if key_type(schema) in ("int", "time") else canonical(keys, where)


def scatter_keys(job: Job, rows: pa.Table) -> str:
    """Scatters keys and times of impressions to buckets. Raises UserError for a derived key that has fractions."""
    schema = job.schema
    key = pl.Series(raw.column(schema, rows, str(schema.source.key)))
    fractions = key.dtype.is_numeric() and not key.dtype.is_integer()
    if fractions and key_type(schema) == "string":  # its text would be 1.0, which no outcome has
        raise UserError(f"source.key: {schema.source.key} is {key.dtype}: make it whole with CAST(... AS BIGINT)")
    keys = comparable(schema, key.rechunk().to_arrow(), f"source.key: column {schema.source.key}")
    columns = {"key": keys, shuffle.POSITION: pa.array(np.arange(rows.num_rows))}
    return scatter(
        job, pa.table(columns | ({"time": raw.event_time(schema, rows)} if schema.event_time else {})), "key"
    )


def scatter(job: Job, table: pa.Table, key: str) -> str:
    """Scatters rows to buckets by a column; returns the path of a file with a batch for each bucket."""
    bucket_B = bucket_of(table[key].combine_chunks(), job.buckets)
    return shuffle.write(job.temporary_path("scattered"), shuffle.partition(table, bucket_B, job.buckets))


def join_bucket(job: Job, work: JoinWork) -> JoinReport:
    """Joins all outcomes of a bucket to its impressions."""
    join_statuses, latest, sides = {}, {}, {}
    keys, sizes = shuffle.read_bucket([part.keys for part in job.typed() if part.keys], work.bucket)
    columns = keys.select(shuffle.POSITION)
    for name, outcome in job.schema.source.outcomes.items():
        events, _ = shuffle.read_bucket(job.outcomes(name), work.bucket)
        found = join(name, outcome, keys, events.select([outcome.key, *outcome.types]))
        columns, join_statuses[name], latest[name] = columns.hstack(found.columns), found.join_statuses, found.latest
        first, last = found.times or (None, None)
        sides[name] = JoinSide(rows=events.height, keys=found.not_joined, first=first, last=last)
    path = shuffle.write_batches(job.temporary_path("gathered"), columns, sizes)
    return JoinReport(path, join_statuses, latest, impressions=_side(keys), outcomes=sides)


def _side(keys: pl.DataFrame) -> JoinSide:
    """What the impressions of a bucket look like."""
    examples = keys["key"].head(100).drop_nulls().unique(maintain_order=True).head(EXAMPLES)
    times = pc.min_max(keys["time"].to_arrow()).as_py() if "time" in keys.columns else {"min": None, "max": None}
    return JoinSide(rows=keys.height, keys=examples.cast(pl.String).to_list(), first=times["min"], last=times["max"])


def joined(job: Job, part: int, rows: int) -> pl.DataFrame | None:
    """The columns that outcomes add to a part; None without outcomes."""
    paths = [report.path for report in job.found(JoinReport)]
    return pl.from_arrow(shuffle.gather(paths, part, rows)) if paths else None  # type: ignore[return-value]
