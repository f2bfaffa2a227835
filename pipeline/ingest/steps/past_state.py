"""The state of histories and counters: events of earlier datasets that a bucket begins with, and step `write_state`."""

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from features.hashing import bucket_of
from pipeline.dataset.entries import StateFile
from pipeline.dataset.past_state import definition, event_columns, opened, read_group, state_file
from pipeline.ingest import shuffle
from pipeline.ingest.messages import GatherPastReport, WriteStateReport, WriteStateWork
from pipeline.ingest.state import Job
from pipeline.ingest.written import written_whole


def earlier_events(job: Job, name: str, bucket: int) -> pl.DataFrame | None:
    """The events of earlier rows with the keys of a bucket, in their order; None where the past begins empty.

    Raises:
        UserError: the file is damaged.
    """
    if job.start is None:
        return None
    file, columns = job.start.file(name), event_columns(job.schema.past[name])
    count = len(file.row_groups)
    # A bucket is a range of hashes, and so is a row group: this one's first and last value, and the groups with these.
    first, last = -(-(bucket << 32) // job.buckets), -(-((bucket + 1) << 32) // job.buckets) - 1
    groups, found = range(first * count >> 32, (last * count >> 32) + 1), [columns.empty_table()]
    with opened(job.begun, file, columns, groups) as parquet:
        for number in groups:
            events = read_group(parquet, number, job.start.folder / file.path)
            found.append(events.filter(pa.array(bucket_of(events["key"].combine_chunks(), job.buckets) == bucket)))
    return pl.from_arrow(pa.concat_tables(found))  # type: ignore[return-value]


def write_state(job: Job, work: WriteStateWork) -> WriteStateReport:
    """Writes the events that later rows need of a history or counter, a row group for each bucket."""
    columns, relative = event_columns(job.schema.past[work.name]), state_file(work.name)
    path = job.staging / relative
    path.parent.mkdir(exist_ok=True)
    temporary = job.unfinished_path("state", relative)
    with (
        written_whole(temporary) as (target, written),
        pq.ParquetWriter(target, columns, compression="zstd", write_page_checksum=True) as writer,
    ):
        groups = []
        for report in job.found(GatherPastReport):
            if report.name == work.name:
                events = shuffle.read(report.later).select(columns.names).cast(columns)
                writer.write_table(events, row_group_size=max(1, events.num_rows))
                groups.append(events.num_rows)
    file = StateFile(
        path=relative, bytes=written.bytes, sha256=written.sha256, name=work.name,
        definition=definition(job.schema, work.name), row_groups=groups,
    )  # fmt: skip
    if temporary != path:
        temporary.rename(path)  # so that a failed attempt leaves nothing under this name
    return WriteStateReport(file)
